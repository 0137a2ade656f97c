"""EMO in mode 1: this package's, and the dense form in which it was published.

Each is a function of (logits [T, V/tp], cost rows [V/tp, d], targets [T], tensor-parallel group)
that returns the loss per token [T].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_mile import CostRows, ObjectiveConfig, token_loss
from tools.bench.logits_losses import megatron_loss
from tools.bench.provider import BASELINE, Loss, Provider, needs

Tensor = torch.Tensor
_EMO = ObjectiveConfig("emo", emo_mode="1")


def _ours(inplace: bool) -> Callable[[], tuple[Loss, str]]:
    """Return EMO by this package."""

    def loss(logits: Tensor, cost: Tensor, targets: Tensor, group: Any) -> Tensor:
        return token_loss(logits, targets, _EMO, group, inplace=inplace, cost=CostRows(cost)).loss

    return lambda: (loss, "")


def _dense() -> tuple[Loss, str]:
    """The equations of arXiv 2310.04691 one tensor operation after the other.

    As the published code has them: one-hot targets as a [T, V] matrix, unit rows made in every
    call, expected rows of target and model by one product each, all in the dtype of the logits.
    """

    def loss(logits: Tensor, cost: Tensor, targets: Tensor, group: Any) -> Tensor:
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        one_hot = torch.nn.functional.one_hot(targets, logits.size(-1)).to(logits.dtype)
        q = torch.softmax(logits, -1)
        unit = cost / torch.linalg.vector_norm(cost, dim=1, keepdim=True)
        distance = 1 - ((q @ unit) * (one_hot @ unit)).sum(-1)
        return 0.5 * (nll + (nll / (distance + 1e-10)).detach() * distance)

    return loss, ""


def _megatron() -> tuple[Loss, str]:
    cross_entropy, _ = megatron_loss()
    return lambda logits, _, targets, group: cross_entropy(logits, targets, group), ""


EMO_LOSSES = {
    "ours": Provider("emo", _ours(inplace=False), needs()),
    "ours-inplace": Provider("emo", _ours(inplace=True), needs()),
    BASELINE: Provider("ce", _megatron, needs("megatron")),
    "dense-emo": Provider("emo", _dense, needs(whole_vocabulary=True), slack=4.0),
}
"""Name -> loss, in the order of the tables. Megatron's is plain cross-entropy, for comparison."""
