"""What the tests of EMO on one rank share: settings, a run of token_loss, and the comparison."""

from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import token_loss
from support.emo_oracle import EmoTruth
from support.helpers import error

# Measured: fp64 3.6e-13 (gt_q in mode 2, whose ratio may be 1e5 and more), fp32 3.9e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
# Mode, gt_q, cap: each as the authors have it somewhere.
MIXES = [("1", False, 0), ("1", True, 0), ("1", False, 3), ("2", False, 0), ("2", True, 0)]
MIXES += [("alone", False, 0)]
EMO = ObjectiveConfig("emo")


def mixed(mode: str, gt_q: bool, cap: float, backend: str = "auto") -> ObjectiveConfig:
    return ObjectiveConfig("emo", emo_mode=mode, emo_gt_q=gt_q, emo_cap=cap, backend=backend)


def run(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig,
    cost: Any,
    inplace: bool = False,
    upstream: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return loss, nll, entropy, distance and gradient."""
    leaf = logits.detach().clone().requires_grad_()
    out = token_loss(leaf * 1, targets, config, inplace=inplace, cost=cost)
    assert out.emo is not None
    assert torch.equal(out.weight, out.valid.to(out.weight.dtype))
    upstream = torch.ones_like(out.loss) if upstream is None else upstream.to(out.loss.dtype)
    (grad,) = torch.autograd.grad(out.loss, leaf, upstream)
    return out.loss, out.nll, out.entropy, out.emo, grad


def assert_close(ours: tuple[torch.Tensor, ...], truth: EmoTruth, tolerance: float) -> None:
    for name, a, b in zip(truth._fields, ours, truth, strict=True):
        assert error(a, b) <= tolerance, f"{name}: {error(a, b):.2e} > {tolerance:.2e}"
