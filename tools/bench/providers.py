"""Who is compared in which workload."""

from __future__ import annotations

from tools.bench.emo_losses import EMO_LOSSES
from tools.bench.linear_losses import LINEAR_LOSSES
from tools.bench.logits_losses import LOGITS_LOSSES, with_settings
from tools.bench.provider import Provider


def providers(hidden: int, cost_width: int = 0, settings: str = "") -> dict[str, Provider]:
    """Return name -> provider in the order of the tables.

    Args:
        hidden: size of the hidden states; 0 for the workloads where logits are given.
        cost_width: width of EMO's cost matrix; 0 where EMO is not the work.
        settings: of this package, where logits are given; "" for MiLe Loss.
    """
    if settings:
        return with_settings(settings)
    if cost_width:
        return EMO_LOSSES
    return LINEAR_LOSSES if hidden else LOGITS_LOSSES
