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


class Given(NamedTuple):
    """What a call of `token_loss` has beside logits and targets; see its arguments."""

    inputs: Inputs
    token_weight: torch.Tensor | None
    accuracy: bool


class NodeSettings(NamedTuple):
    """What a node of `token_loss` needs beside tensors."""

    config: ObjectiveConfig
    shard: VocabShard
    inplace: bool
    ignore_index: int
    given: Given


def check_token_weight(token_weight: torch.Tensor | None, targets: torch.Tensor) -> None:
    """Raise ValueError unless weights of tokens, if there are any, fit the targets."""
    if token_weight is None:
        return
    if (
        token_weight.shape != targets.shape
        or token_weight.is_complex()
        or token_weight.device != targets.device
    ):
        raise ValueError(
            f"token_weight is {token_weight.dtype} {tuple(token_weight.shape)} on "
            f"{token_weight.device}; expected real numbers of the targets' shape "
            f"{tuple(targets.shape)} on {targets.device}"
        )


def of_tokens(token_weight: torch.Tensor) -> torch.Tensor:
    """Return weights of tokens as factors, fp64 [...]: NaN where they are negative."""
    wide = token_weight.detach().double()
    return wide.masked_fill(wide < 0, torch.nan)


def with_hits(
    fields: torch.Tensor, m: torch.Tensor, z_y: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Return the fields [n, ...] and 1 where the target's logit is the largest, ties included.

    Never where nll, the second field, is NaN: in a row with NaN, whose m is open, in one of masked
    logits alone, and where no shard held the target.
    """
    hits = (z_y >= m) & valid & ~fields[1].isnan()
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
