"""What the autograd nodes share: their settings, and what they cannot do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.parallel.vocab import VocabShard

SPENT = (
    "token_loss(inplace=True) has already written its gradient over the logits; use inplace=False "
    "to run the backward twice"
)
Gradients = tuple[torch.Tensor | None, ...]


Inputs = Mapping[str, torch.Tensor]


class NodeSettings(NamedTuple):
    """What a node of `token_loss` needs beside tensors."""

    config: ObjectiveConfig
    shard: VocabShard
    inplace: bool
    ignore_index: int
    inputs: Inputs
    accuracy: bool


def with_hits(
    fields: torch.Tensor, m: torch.Tensor, z_y: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Return the fields [n, ...] and 1 where the target's logit is the largest, ties included."""
    hits = (z_y >= m) & valid  # never where no shard held the target: z_y is NaN there
    return torch.cat([fields, hits.to(fields.dtype).unsqueeze(0)])


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Make a backward raise where its result would have to be differentiated again.

    torch's `once_differentiable` returns constants there if the incoming gradient is one, so that
    a penalty on gradients would be wrong without a word.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: torch.Tensor) -> Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True through the loss of megatron_mile, whose gradient has no "
                "gradient; differentiate it once, or use torch.nn.functional.cross_entropy"
            )
        return backward(ctx, *grads)

    return checked
