"""What is timed: one case, its data, and how far an answer is from the truth."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from megatron_mile import ObjectiveConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest errors by `Inputs.errors` that still count as right, (loss, gradient). On [2048, 32000]
# right losses have at most 2.8e-7 and 9.6e-7 in fp32, 1.7e-6 and 6.9e-3 in bf16, where the gradient
# may be rounded twice, by up to 2^-8 relative each. The rest is for other orders of summation, and
# in bf16 for packages that round their loss too.
TOLERANCES = {"fp32": (1e-5, 5e-5), "bf16": (1e-2, 1e-2)}
# With the output layer, at [2048, 512] x [32000, 512]: 9.2e-6 and 1.0e-5 in fp32, 1.2e-2 and 5.0e-2
# in bf16, where a logit between 8 and 16 is rounded by up to 2^-5, and its probability with it.
LINEAR_TOLERANCES = {"fp32": (5e-5, 1e-4), "bf16": (5e-2, 1e-1)}
# EMO with rows of 512: 1.1e-6 (dense) and 1.5e-4 (ours) in fp32, where two terms of a gradient
# cancel; in bf16, where cosines are rounded by 2^-9, 0.13 of the gradient, and 1.1 the dense form,
# which has slack. A gradient of zeros is off by 1, one of the other sign by 2.
EMO_TOLERANCES = {"fp32": (1e-5, 5e-4), "bf16": (1e-2, 0.4)}
GAMMA = SIGMA = 1.0


def config_of(settings: str, backend: str = "auto") -> ObjectiveConfig:
    """Return what words "name=value" set.

    Raises:
        ValueError: a word is no setting of a loss of logits, or has a value that does not fit.
    """
    fields = {field.name: field for field in dataclasses.fields(ObjectiveConfig)}
    values: dict[str, Any] = {"objective": "mile", "gamma": GAMMA, "sigma": SIGMA}
    for word in settings.split():
        name, sign, text = word.partition("=")
        if not sign or name not in fields or name == "backend":
            raise ValueError(f"{word}: expected NAME=VALUE with a setting of ObjectiveConfig")
        default = fields[name].default
        number = isinstance(default, float)
        values[name] = float(text) if number else text == "True" if default is False else text
    config = ObjectiveConfig(**values, backend=backend)
    if config.definition.needs_cost:
        raise ValueError(f"objective={config.objective} needs cost rows; use --cost-width")
    if config.definition.inputs:
        raise ValueError(f"objective={config.objective} needs inputs per token, which no case has")
    return config


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
    hidden: int = 0
    """Size of the hidden states where the output layer is part of the work; 0: logits are given."""
    cost_width: int = 0
    """Width of EMO's cost matrix where EMO is the work; 0: it is not."""
    settings: str = ""
    """Words "name=value" of ObjectiveConfig that this package is timed with; "" for MiLe Loss."""

    @property
    def shard_bytes(self) -> int:
        """Bytes of the logits of one rank."""
        return self.tokens * self.vocab // self.tp * DTYPES[self.dtype].itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes that every loss leaves on one rank: d(hidden) and d(weight).

        None where logits are given: their gradient may lie over them.
        """
        rows = self.tokens + self.vocab // self.tp
        return rows * self.hidden * DTYPES[self.dtype].itemsize

    @property
    def tolerances(self) -> tuple[float, float]:
        """Largest errors of loss and gradient that count as right."""
        if self.cost_width:
            return EMO_TOLERANCES[self.dtype]
        return (LINEAR_TOLERANCES if self.hidden else TOLERANCES)[self.dtype]


class Inputs(NamedTuple):
    """One rank's data, and the truth about some rows of each gradient."""

    leaves: dict[str, torch.Tensor]
    """What gets a gradient, in the case's dtype: "logits" [T, V/tp], or "hidden" [T, H] and
    "weight" [V/tp, H]. Providers get copies."""
    targets: torch.Tensor
    """[T], int64, ids in the whole vocabulary."""
    upstream: torch.Tensor
    """Gradient that reaches the loss per token, [T], fp32, in [0.5, 1.5)."""
    checked: dict[str, torch.Tensor]
    """"loss" and names of leaves -> int64, the rows that are checked."""
    truths: dict[str, dict[str, torch.Tensor]]
    """Objective -> those rows of the loss and of each gradient, fp64."""
    given: tuple[torch.Tensor, ...] = ()
    """What the losses take after the leaves, without a gradient: EMO's cost rows [V/tp, d]."""

    def errors(
        self, objective: str, loss: torch.Tensor, gradients: tuple[torch.Tensor, ...]
    ) -> tuple[float, ...]:
        """Compare with the truth.

        Args:
            objective: "ce", "mile", "emo", or the case's settings.
            loss: [T].
            gradients: of the leaves, in their shapes.

        Returns:
            max |a - b| / (1 + |b|) of the loss, and of each leaf max |a - b| / (|b| + mean |b| of
            the row), for gradients have entries much smaller than 1. NaN if anything is NaN.
        """
        truth = self.truths[objective]
        off = (loss[self.checked["loss"]].double() - truth["loss"]).abs()
        errors = [(off / (1 + truth["loss"].abs())).max().item()]
        for name, gradient in zip(self.leaves, gradients, strict=True):
            size = truth[name].abs()
            off = (gradient[self.checked[name]].double() - truth[name]).abs()
            errors.append((off / (size + size.mean(-1, keepdim=True))).max().item())
        return tuple(errors)
