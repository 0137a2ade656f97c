"""Shared set-up: one thread per process, so that tests fit a small machine, and fixed seeds."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same random numbers in whatever order the tests run."""
    torch.manual_seed(0)
