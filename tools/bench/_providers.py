"""Who is compared in which workload."""

from __future__ import annotations

from _linear_losses import LINEAR_LOSSES
from _logits_losses import LOGITS_LOSSES
from _provider import Provider


def providers(hidden: int) -> dict[str, Provider]:
    """Return name -> provider in the order of the tables.

    Args:
        hidden: size of the hidden states; 0 for the workload where logits are given.
    """
    return LINEAR_LOSSES if hidden else LOGITS_LOSSES
