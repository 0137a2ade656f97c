"""Shared set-up: one thread per process, so that tests fit a small machine, and fixed seeds."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same cases in every run; `--hypothesis-profile long` draws others, and more of them.
settings.register_profile("repeated", derandomize=True)
settings.register_profile("long", max_examples=1000)
settings.load_profile("repeated")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give every test the same random numbers in whatever order the tests run."""
    torch.manual_seed(0)
