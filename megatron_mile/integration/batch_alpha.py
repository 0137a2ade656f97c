"""alpha over the whole global batch: Megatron divides by the sum of weights, not by the tokens.

With a loss per token (`calculate_per_token_loss`) Megatron adds up the gradients of all
micro-batches and ranks, and at the end of a step `finalize_model_grads` (core/distributed, 0.19.2)
sends num_tokens from the last pipeline stage to the others, adds it up over the DP x CP ranks and
divides by it. Here it gets sum(M w) of this rank in its place. So the update is

    sum(M w grad nll) / sum(M w)     over all tokens of the global batch,

which has alpha = sum(M) / sum(M w) over the global batch, and needs no collective of its own.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.models import unwrap
from megatron_mile.integration.refusals import refuse_batch_alpha

BATCH = "batch"

# sum(M w) of each micro-batch since the last update, by the model that ran it.
_weights: weakref.WeakKeyDictionary[Any, list[torch.Tensor]] = weakref.WeakKeyDictionary()


def wrap_finalize_model_grads(
    finalize: Callable[..., None], config: ObjectiveConfig
) -> Callable[..., None]:
    """Let Megatron's finalisation of gradients divide by sum(M w) where normalize is batch.

    The launcher does it. In a loop on megatron.core, on the ranks of all pipeline stages:
    `model.config.finalize_model_grads_func = wrap_finalize_model_grads(finalize_model_grads,
    config)`, with `calculate_per_token_loss` in the model's config.

    Args:
        finalize: Megatron's `finalize_model_grads`, or what calls it with the same arguments.
        config: The objective that `wrap_forward_step` was given.

    Returns:
        A function of the same arguments; `finalize` itself with another normalize, or without a
        weight. It raises MileError where Megatron does not divide by tokens (num_tokens is None),
        and where it adds losses of its own.
    """
    if config.alpha_mode != BATCH:
        return finalize

    @functools.wraps(finalize)
    def finalize_model_grads(
        model: Sequence[Any], num_tokens: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> None:
        refuse_batch_alpha(unwrap(model[0]).config)
        if num_tokens is None:
            raise MileError(
                "normalize batch, but the schedule counts no tokens (num_tokens is None); set "
                "calculate_per_token_loss in the config of every model"
            )
        # Other stages have no weights, and get the last one's.
        left = [weights for chunk in model for weights in _weights.pop(unwrap(chunk), [])]
        if left:
            total = torch.stack(left).sum()
        else:
            total = num_tokens.new_zeros((), dtype=torch.float64)
        with _dividing_by(model, total):
            finalize(model, total, *args, **kwargs)

    finalize_model_grads.__megatron_mile__ = config  # type: ignore[attr-defined]
    return finalize_model_grads


@contextlib.contextmanager
def _dividing_by(model: Sequence[Any], total: torch.Tensor) -> Iterator[None]:
    """Make the models divide their gradients by `total`, as it is when they are asked to.

    Megatron divides by at least 1 (from 0.16), and weights may add up to less.
    """
    for chunk in model:
        scale = chunk.scale_gradients
        chunk.scale_gradients = lambda _, scale=scale: scale(
            total.masked_fill(total == 0, 1).reciprocal()
        )
    try:
        yield
    finally:
        for chunk in model:
            del chunk.scale_gradients


def keep_weights(model: Any, config: ObjectiveConfig, weights: torch.Tensor) -> None:
    """Keep sum(M w) of a micro-batch, fp64 0-d, until the step's gradients are finalised.

    Raises:
        MileError: The model's gradients will not be divided by it.
    """
    finalize = getattr(unwrap(model).config, "finalize_model_grads_func", None)
    if getattr(finalize, "__megatron_mile__", None) != config:
        raise MileError(
            "normalize batch, but the model's config.finalize_model_grads_func does not divide by "
            "the weights; set it to wrap_finalize_model_grads(finalize_model_grads, config), or "
            "start the script with `-m megatron_mile.launch`"
        )
    _weights.setdefault(unwrap(model), []).append(weights)
