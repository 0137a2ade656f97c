"""What is timed: logits, targets and incoming gradient of one case, and what the answer must be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest errors by `Inputs.errors` that still count as right, (loss, gradient). On [2048, 32000]
# right losses have at most 2.8e-7 and 9.6e-7 in fp32, 1.7e-6 and 6.9e-3 in bf16, where the gradient
# may be rounded twice, by up to 2^-8 relative each. The rest is for other orders of summation, and
# in bf16 for packages that round their loss too.
TOLERANCES = {"fp32": (1e-5, 5e-5), "bf16": (1e-2, 1e-2)}
GAMMA = SIGMA = 1.0
_CHECKED_ROWS = 256


class Case(NamedTuple):
    """One size at one precision and layout."""

    dtype: str
    """A key of `DTYPES`."""
    tokens: int
    vocab: int
    """Whole vocabulary, divisible by tp."""
    tp: int
    """Ranks that share the vocabulary."""
    threads: int
    """Threads of each rank."""
    device: str
    """cpu or cuda."""

    @property
    def shard_bytes(self) -> int:
        """Bytes of the logits of one rank."""
        return self.tokens * self.vocab // self.tp * DTYPES[self.dtype].itemsize


class Inputs(NamedTuple):
    """One rank's data, and the truth about some rows of it."""

    logits: torch.Tensor
    """[T, V/tp] in the case's dtype; providers get copies."""
    targets: torch.Tensor
    """[T], int64, ids in the whole vocabulary."""
    upstream: torch.Tensor
    """Gradient that reaches the loss per token, [T], fp32, in [0.5, 1.5)."""
    rows: torch.Tensor
    """[R], int64: the rows that are checked."""
    truths: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Objective -> loss [R] and gradient [R, V/tp], fp64."""

    def errors(
        self, objective: str, loss: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[float, float]:
        """Compare with the truth.

        Args:
            objective: "ce" or "mile".
            loss: [T].
            gradient: [T, V/tp].

        Returns:
            max |a - b| / (1 + |b|) of the loss, and max |a - b| / (|b| + mean |b| of the row) of
            the gradient, whose entries are much smaller than 1. NaN if anything is NaN.
        """
        true_loss, true_gradient = self.truths[objective]
        size = true_gradient.abs()
        off = (gradient[self.rows].double() - true_gradient).abs()
        off_loss = (loss[self.rows].double() - true_loss).abs() / (1 + true_loss.abs())
        return off_loss.max().item(), (off / (size + size.mean(-1, keepdim=True))).max().item()


def make_inputs(case: Case, rank: int, device: torch.device) -> Inputs:
    """Make the same data on every rank and keep the shard of `rank`.

    Half of the targets are likely and half are not, so that the losses differ.
    """
    random = torch.Generator(device).manual_seed(0)
    shape = (case.tokens, case.vocab)
    logits = torch.randn(shape, generator=random, device=device, dtype=DTYPES[case.dtype]).mul_(2)
    targets = torch.randint(case.vocab, shape[:1], generator=random, device=device)
    likely = torch.arange(0, case.tokens, 2, device=device)
    # The others add up to about V e^2: a probability of a half, where p_y - 1 cancels little.
    logits[likely, targets[likely]] = math.log(case.vocab) + 2
    upstream = torch.rand(case.tokens, generator=random, device=device) + 0.5
    count = min(case.tokens, _CHECKED_ROWS)
    rows = torch.linspace(0, case.tokens - 1, count, dtype=torch.float64, device=device).long()
    width = case.vocab // case.tp
    shard = slice(rank * width, (rank + 1) * width)
    truths = {
        objective: (loss, gradient[:, shard].clone())
        for objective in ("ce", "mile")
        for loss, gradient in [oracle(logits[rows], targets[rows], objective, upstream[rows])]
    }
    return Inputs(logits[:, shard].clone(), targets, upstream, rows, truths)


def oracle(
    logits: torch.Tensor, targets: torch.Tensor, objective: str, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss [R] and gradient [R, V] in fp64: softmax, entropy and autograd by definition.

    Args:
        logits: [R, V], the whole vocabulary.
        targets: [R].
        objective: "ce", or "mile" for (1 + H) * nll with the weight held constant.
        upstream: [R].
    """
    z = logits.double().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    loss = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if objective == "mile":
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss = ((SIGMA + entropy) ** GAMMA).detach() * loss
    (gradient,) = torch.autograd.grad(loss, z, upstream.double())
    return loss.detach(), gradient
