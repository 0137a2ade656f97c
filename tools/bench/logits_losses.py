"""Losses of given logits: this package's, Megatron-Core's, and those of packages.

Each is a function of (logits [T, V/tp], targets [T], tensor-parallel group) that returns the loss
per token [T]. The reason why one cannot run here is data too: the tables say it. Calls of packages
that need a GPU follow their public signatures and are "not run" wherever there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_mile import token_loss
from megatron_mile.ops import dispatch
from tools.bench.case import DTYPES, GAMMA, SIGMA, Case, config_of
from tools.bench.provider import BASELINE, Loss, Provider, needs


def _ours(
    backend: str, inplace: bool = False, settings: str = ""
) -> Callable[[], tuple[Loss, str]]:
    config = config_of(settings, backend)

    def loss(logits: torch.Tensor, targets: torch.Tensor, group: Any) -> torch.Tensor:
        out = token_loss(logits, targets, config, tp_group=group, inplace=inplace)
        return out.loss if out.z_loss is None else out.loss + out.z_loss

    return lambda: (loss, "")


def _compiled(settings: str = "") -> Callable[[], tuple[Loss, str]]:
    """Our plain torch form, fused by torch.compile."""
    loss, _ = _ours("torch", settings=settings)()
    return lambda: (torch.compile(loss), "torch.compile")


def _chunked_obstacle(case: Case) -> str:
    return "" if case.device == "cpu" else "made for CPUs"


def _triton_obstacle(case: Case) -> str:
    """Ask the package; its interpreter on a CPU is correct but no matter of speed."""
    if case.device != "cuda":
        return "needs a GPU"
    try:
        dispatch.select("triton", torch.device(case.device), DTYPES[case.dtype])
    except ValueError as error:
        return str(error)
    return ""


def megatron_loss() -> tuple[Loss, str]:
    """Megatron's unfused cross-entropy, which overwrites fp32 logits."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return lambda z, y, group: vocab_parallel_cross_entropy(z, y, tp_group=group), ""


def _megatron_fused() -> tuple[Loss, str]:
    """megatron.core.fusions, under torch.compile where that works, else as plain functions."""
    from megatron.core import jit

    how = "torch.compile"
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=torch.get_default_device()))
    except Exception as error:  # a missing compiler shows as one of many types
        jit.disable_jit_fuser()
        how = f"plain functions: torch.compile fails ({type(error).__name__})"
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return fused_vocab_parallel_cross_entropy, how


def _naive() -> tuple[Loss, str]:
    cross_entropy, _ = megatron_loss()

    def loss(logits: torch.Tensor, targets: torch.Tensor, group: Any) -> torch.Tensor:
        # Before the cross-entropy, which overwrites fp32 logits.
        entropy = _entropy(logits.detach(), group)
        return (SIGMA + entropy) ** GAMMA * cross_entropy(logits, targets, group)

    return loss, ""


@torch.no_grad()
def _entropy(logits: torch.Tensor, group: Any) -> torch.Tensor:
    """Entropy of the vocabulary-parallel softmax, one tensor operation after the other, [T]."""
    logits = logits.float()
    maximum = logits.amax(-1)
    dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
    shifted = logits - maximum.unsqueeze(-1)
    exps = shifted.exp()
    total = exps.sum(-1)
    dist.all_reduce(total, group=group)
    p = exps / total.unsqueeze(-1)
    moment = (p * shifted).sum(-1)
    dist.all_reduce(moment, group=group)
    return total.log() - moment


def _liger() -> tuple[Loss, str]:
    from liger_kernel.megatron import LigerMegatronCrossEntropy

    module = LigerMegatronCrossEntropy()
    return lambda z, y, group: module(z.unsqueeze(1), y.unsqueeze(1), group).squeeze(1), ""


def _transformer_engine() -> tuple[Loss, str]:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def loss(logits: torch.Tensor, targets: torch.Tensor, group: Any) -> torch.Tensor:
        shaped = logits.unsqueeze(1), targets.unsqueeze(1)
        return parallel_cross_entropy(*shaped, dist_process_group=group).flatten()

    return loss, ""


def _flash_attn() -> tuple[Loss, str]:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def loss(logits: torch.Tensor, targets: torch.Tensor, group: Any) -> torch.Tensor:
        return cross_entropy_loss(logits, targets, inplace_backward=True, process_group=group)[0]

    return loss, "inplace_backward"


def _quack() -> tuple[Loss, str]:
    from quack import cross_entropy

    def loss(logits: torch.Tensor, targets: torch.Tensor, group: Any) -> torch.Tensor:
        return cross_entropy(logits, targets, reduction="none", inplace_backward=True)

    return loss, "inplace_backward"


def _all_of_ours(settings: str = "") -> dict[str, Provider]:
    """Return this package's with some settings; the objective is their name in the table."""
    name = settings or "mile"
    builds = {
        "ours-reference": (_ours("torch", settings=settings), needs()),
        "ours-chunked": (_ours("auto", settings=settings), _chunked_obstacle),
        "ours-compiled": (_compiled(settings), needs(gpu=True)),
        "ours-triton": (_ours("triton", settings=settings), _triton_obstacle),
        "ours-inplace": (_ours("auto", inplace=True, settings=settings), needs()),
    }
    return {key: Provider(name, *rest) for key, rest in builds.items()}


def with_settings(settings: str) -> dict[str, Provider]:
    """Return this package's with other settings, beside Megatron's cross-entropy."""
    return {**_all_of_ours(settings), BASELINE: LOGITS_LOSSES[BASELINE]}


LOGITS_LOSSES = {
    **_all_of_ours(),
    BASELINE: Provider("ce", megatron_loss, needs("megatron")),
    "megatron-fused": Provider("ce", _megatron_fused, needs("megatron")),
    "naive-mile": Provider("mile", _naive, needs("megatron")),
    "liger": Provider("ce", _liger, needs("liger_kernel", gpu=True)),
    "transformer-engine": Provider(
        "ce", _transformer_engine, needs("transformer_engine", gpu=True)
    ),
    "flash-attn": Provider("ce", _flash_attn, needs("flash_attn", gpu=True)),
    "quack": Provider("ce", _quack, needs("quack", gpu=True, whole_vocabulary=True)),
}
"""Name -> loss, in the order of the tables. "naive-mile" is what one writes without a fused loss:
Megatron's cross-entropy, and the entropy by separate operations without a graph of its own."""
