"""The losses that are compared: this package, Megatron-Core, and packages that may be installed.

Each is a function of (logits [T, V/tp], targets [T], tensor-parallel group) that returns the loss
per token [T]. The reason why one cannot run here is data too: the tables say it. Calls of packages
that need a GPU follow their public signatures and are "not run" wherever there is none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _case import DTYPES, GAMMA, SIGMA, Case

from megatron_mile import ObjectiveConfig, token_loss
from megatron_mile.ops import dispatch

Loss = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
BASELINE = "megatron"


class Provider(NamedTuple):
    """One loss."""

    objective: str
    """ce or mile."""
    build: Callable[[], tuple[Loss, str]]
    """Imports what it needs; returns the loss, and how it runs ("" if there is but one way)."""
    obstacle: Callable[[Case], str]
    """Why it cannot run in this case, "" if it can."""


def _installed(*packages: str) -> Callable[[Case], str]:
    """Obstacle of a package that needs nothing but to be installed."""

    def obstacle(_: Case) -> str:
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        return f"no {', '.join(missing)} here" if missing else ""

    return obstacle


def _gpu_package(package: str) -> Callable[[Case], str]:
    """Obstacle of a package whose kernels need a GPU."""

    def obstacle(case: Case) -> str:
        return "needs a GPU" if case.device != "cuda" else _installed(package)(case)

    return obstacle


def _projection(package: str) -> Callable[[Case], str]:
    """Obstacle of a loss that takes hidden states and the output layer's weight."""

    def obstacle(case: Case) -> str:
        missing = _installed(package)(case)
        return missing or "computes the logits itself: another workload than a loss of logits"

    return obstacle


def _ours(backend: str, inplace: bool = False) -> Callable[[], tuple[Loss, str]]:
    config = ObjectiveConfig("mile", gamma=GAMMA, sigma=SIGMA, backend=backend)

    def loss(logits: torch.Tensor, targets: torch.Tensor, group: Any) -> torch.Tensor:
        return token_loss(logits, targets, config, tp_group=group, inplace=inplace).loss

    return lambda: (loss, "")


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


def _megatron() -> tuple[Loss, str]:
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
    cross_entropy, _ = _megatron()

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


def _never() -> tuple[Loss, str]:
    raise AssertionError("a provider with an obstacle was built")


PROVIDERS = {
    "ours-reference": Provider("mile", _ours("torch"), lambda _: ""),
    "ours-chunked": Provider("mile", _ours("auto"), _chunked_obstacle),
    "ours-triton": Provider("mile", _ours("triton"), _triton_obstacle),
    "ours-inplace": Provider("mile", _ours("auto", inplace=True), lambda _: ""),
    "ours-linear": Provider("mile", _never, _projection("megatron_mile.linear")),
    BASELINE: Provider("ce", _megatron, _installed("megatron")),
    "megatron-fused": Provider("ce", _megatron_fused, _installed("megatron")),
    "naive-mile": Provider("mile", _naive, _installed("megatron")),
    "liger": Provider("ce", _liger, _gpu_package("liger_kernel")),
    "transformer-engine": Provider("ce", _transformer_engine, _gpu_package("transformer_engine")),
    "flash-attn": Provider("ce", _flash_attn, _gpu_package("flash_attn")),
    "verl": Provider("ce", _never, _projection("verl")),
    "cut-cross-entropy": Provider("ce", _never, _projection("cut_cross_entropy")),
}
"""Name -> loss, in the order of the tables. "naive-mile" is what one writes without a fused loss:
Megatron's cross-entropy, and the entropy by separate operations without a graph of its own."""
