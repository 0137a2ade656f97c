"""Shared set-up: one thread per process, so that multi-process tests fit a small machine."""

import torch

torch.set_num_threads(1)
