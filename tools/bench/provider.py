"""What a provider is, and what may keep it from running."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from tools.bench.case import Case

Loss = Callable[..., torch.Tensor]
BASELINE = "megatron"
FLOOR = "gemms"


class Provider(NamedTuple):
    """One loss."""

    objective: str
    """ce, mile, emo, or none: no loss, so that there is nothing to check."""
    build: Callable[[], tuple[Loss, str]]
    """Imports what it needs; returns the loss, and how it runs ("" if there is but one way)."""
    obstacle: Callable[[Case], str]
    """Why it cannot run in this case, "" if it can."""
    slack: float = 1.0
    """Times the case's tolerances that it may be off: of forms that compute in the case's dtype."""


def needs(
    *packages: str, gpu: bool = False, whole_vocabulary: bool = False
) -> Callable[[Case], str]:
    """Return the obstacle of a loss with such needs.

    Args:
        packages: must be installed.
        gpu: its kernels need one.
        whole_vocabulary: it has no form for a vocabulary that ranks share.
    """

    def obstacle(case: Case) -> str:
        if gpu and case.device != "cuda":
            return "needs a GPU"
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"no {', '.join(missing)} here"
        return "needs the whole vocabulary" if whole_vocabulary and case.tp > 1 else ""

    return obstacle
