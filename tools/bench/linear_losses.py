"""Losses of hidden states and the output layer's weight, and the bare GEMMs that none can avoid.

Each is a function of (hidden [T, H], weight [V/tp, H], targets [T], tensor-parallel group) that
returns the loss per token [T]; its gradient of the hidden states is that of all ranks together.
As for logits, calls of packages follow their public signatures, and the tables say why one cannot
run here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_mile import ObjectiveConfig, token_loss
from megatron_mile.linear import linear_token_loss
from tools.bench.case import GAMMA, SIGMA
from tools.bench.logits_losses import megatron_loss
from tools.bench.provider import BASELINE, FLOOR, Loss, Provider, needs

Tensor = torch.Tensor
_MILE = ObjectiveConfig("mile", gamma=GAMMA, sigma=SIGMA)


def _output_layer(hidden: Tensor, weight: Tensor, group: Any) -> Tensor:
    """Logits by the function behind Megatron's ColumnParallelLinear."""
    from megatron.core.tensor_parallel.layers import (
        linear_with_grad_accumulation_and_async_allreduce as linear,
    )

    return linear(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=dist.get_world_size(group) > 1,
        sequence_parallel=False,
        tp_group=group,
    )


def _ours_fused() -> tuple[Loss, str]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, group: Any) -> Tensor:
        return linear_token_loss(hidden, weight, targets, _MILE, tp_group=group).loss

    return loss, ""


def _ours_unfused() -> tuple[Loss, str]:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, group: Any) -> Tensor:
        logits = _output_layer(hidden, weight, group)
        return token_loss(logits, targets, _MILE, tp_group=group, inplace=True).loss

    return loss, ""


def _megatron() -> tuple[Loss, str]:
    cross_entropy, _ = megatron_loss()

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, group: Any) -> Tensor:
        return cross_entropy(_output_layer(hidden, weight, group), targets, group)

    return loss, ""


class _Gemms(torch.autograd.Function):
    """The products of the output layer, forward and backward, with nothing between them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return numbers of the shape of a loss, without reading the rest of the logits."""
        logits = hidden @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits[:, 0]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor]:
        """Return d(hidden) and d(weight), with the logits as if they were their gradient."""
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.t() @ hidden


def _gemms() -> tuple[Loss, str]:
    return lambda hidden, weight, *_: _Gemms.apply(hidden, weight), "no loss: nothing to check"


def _verl() -> tuple[Loss, str]:
    """The Triton kernels, whose caller adds up d(hidden)."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, group: Any) -> Tensor:
        hidden = copy_to_tensor_model_parallel_region(hidden, group)
        return _weighted(*linear_cross_entropy(hidden, weight, targets, 1.0, "none", group))

    return loss, ""


def _verl_chunked() -> tuple[Loss, str]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    module = FusedLinearForPPO()
    return lambda hidden, weight, targets, _: _weighted(*module(hidden, weight, targets)), ""


def _weighted(log_probability: Tensor, entropy: Tensor) -> Tensor:
    """MiLe Loss of what verl returns per token."""
    return (SIGMA + entropy.detach()) ** GAMMA * -log_probability


def _liger() -> tuple[Loss, str]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, targets, _: module(weight, hidden, targets), ""


def _cut_cross_entropy() -> tuple[Loss, str]:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if torch.cuda.is_available() else "torch_compile"

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, _: Any) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)

    return loss, impl


LINEAR_LOSSES = {
    "ours-linear": Provider("mile", _ours_fused, needs()),
    "ours-unfused": Provider("mile", _ours_unfused, needs("megatron")),
    BASELINE: Provider("ce", _megatron, needs("megatron")),
    FLOOR: Provider("none", _gemms, needs()),
    "verl": Provider("mile", _verl, needs("verl", gpu=True)),
    "verl-chunked": Provider("mile", _verl_chunked, needs("verl", whole_vocabulary=True)),
    "liger": Provider("ce", _liger, needs("liger_kernel", gpu=True, whole_vocabulary=True)),
    "cut-cross-entropy": Provider(
        "ce", _cut_cross_entropy, needs("cut_cross_entropy", whole_vocabulary=True)
    ),
}
"""Name -> loss, in the order of the tables. Those of verl give log-probability and entropy at once,
so they are made MiLe Loss. cut-cross-entropy as released on PyPI (25.1.1) has no form for a shared
vocabulary; its repository has one."""
