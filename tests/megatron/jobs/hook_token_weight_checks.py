"""Checks of the weights that a forward step gives its tokens, run by test_hook.py.

TP 2 and two data-parallel ranks, whose micro-batches have weights of their own.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from megatron.core import parallel_state
from support import helpers
from support.emo_oracle import emo_oracle
from support.hook_model import (
    MASK,
    MILE,
    B,
    S,
    Step,
    batch,
    build_model,
    forward,
    forward_step,
    host_loss,
    raises,
    run_checks,
)

from megatron_mile import ObjectiveConfig, attach, set_token_weight, wrap_forward_step
from megatron_mile.errors import MileError

RANKS = 4
TP = 2
# Measured 1.2e-7 in loss, report and gradients of all weights.
SAME = 2e-6


def weights_of(rank: int) -> torch.Tensor:
    """Uneven weights [b, s] of a data-parallel rank, some of them 0."""
    drawn = torch.rand(B, S, generator=torch.Generator().manual_seed(20 + rank))
    return (4 * drawn * (drawn > 0.2) + rank).float()


def weighted_step(iterator: Any, model: Any) -> Step:
    set_token_weight(weights_of(parallel_state.get_data_parallel_rank()))
    return forward_step(iterator, model)


def gathered(shard: torch.Tensor, dim: int) -> torch.Tensor:
    """All tensor-parallel ranks' parts of a tensor."""
    shards = [torch.empty_like(shard) for _ in range(TP)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim)


def compare(config: ObjectiveConfig, fused: bool, truth: Any, weight: torch.Tensor) -> None:
    """Train one micro-batch, and compare with the oracle, whose gradient has the weights in it."""
    model, own = build_model(tensor_model_parallel_size=TP), weights_of(
        parallel_state.get_data_parallel_rank()
    )  # fmt: skip
    attach(model, config, fused_linear=fused)
    output, loss_func = wrap_forward_step(weighted_step, config)(None, model)
    total, _, report = loss_func(output)
    total.backward()
    ours = {name: x.grad.clone() for name, x in model.named_parameters()}
    both = sum((MASK * weight * weights_of(rank)).sum() for rank in range(2))
    alpha = 1.0 if config.normalize == "none" else 2 * MASK.sum() / both
    expected = (MASK * alpha * own * truth.loss).sum()
    assert helpers.error(total, expected) < SAME
    assert helpers.error(report["mile loss"], torch.stack([expected, MASK.sum()])) < SAME
    mean = torch.stack([(MASK * own * weight).sum(), MASK.sum()])
    assert helpers.error(report["mile weight"], mean) < SAME
    assert helpers.error(report["lm loss"][0], (MASK * truth.nll).sum()) < SAME
    model.zero_grad()
    shards = (alpha * MASK.unsqueeze(-1) * truth.grad).float().chunk(TP, -1)
    plain = build_model(tensor_model_parallel_size=TP)
    rank = parallel_state.get_tensor_model_parallel_rank()
    forward(plain, None).backward(shards[rank].contiguous())
    for name, x in plain.named_parameters():
        assert helpers.error(ours[name], x.grad) < SAME, name


def check_weights_teach_every_weight_as_the_oracle() -> None:
    """Each objective, with and without alpha, and with the output layer in the loss."""
    labels, own = batch()[1], weights_of(parallel_state.get_data_parallel_rank())
    logits = gathered(forward(build_model(tensor_model_parallel_size=TP), None).detach(), -1)
    for config in (MILE, ObjectiveConfig("ce"), ObjectiveConfig("power", normalize="none")):
        truth = helpers.oracle(logits, labels, config, own)
        for fused in (False, True):
            compare(config, fused, truth, truth.weight)
    model = build_model(tensor_model_parallel_size=TP)
    rows = gathered(model.output_layer.weight.detach(), 0)
    truth = emo_oracle(logits, labels, rows, upstream=own)
    compare(ObjectiveConfig("emo"), False, truth, torch.ones(B, S))


def check_equal_weights_are_none() -> None:
    totals = []
    for factor in (None, 1.0, 0.5):

        def step(iterator: Any, model: Any, factor: float | None = factor) -> Step:
            if factor is not None:
                set_token_weight(torch.full((B, S), factor))
            return forward_step(iterator, model)

        model = build_model(tensor_model_parallel_size=TP)
        attach(model, MILE)
        output, loss_func = wrap_forward_step(step, MILE)(None, model)
        totals.append(loss_func(output)[0].detach())
    assert helpers.error(totals[1], totals[0]) < 1e-6
    assert helpers.error(totals[2], totals[0]) < 1e-6


def check_evaluation_ignores_weights() -> None:
    model = build_model(tensor_model_parallel_size=TP)
    expected = forward(model, batch()[1]).detach()
    attach(model, MILE)
    with torch.no_grad():
        output, loss_func = wrap_forward_step(weighted_step, MILE)(None, model)
        assert torch.equal(output, expected)
        assert torch.equal(loss_func(output)[0], host_loss(MASK, expected)[0])


def check_misuse_ends_in_one_line() -> None:
    model = build_model(tensor_model_parallel_size=TP)
    attach(model, MILE)
    raises(MileError, "was called outside a forward step", set_token_weight, torch.ones(B, S))

    def late(iterator: Any, model: Any) -> Step:
        found = forward_step(iterator, model)
        set_token_weight(torch.ones(B, S))
        return found

    def twice(iterator: Any, model: Any) -> Step:
        set_token_weight(torch.ones(B, S))
        return weighted_step(iterator, model)

    def turned(iterator: Any, model: Any) -> Step:
        set_token_weight(torch.ones(S, B))
        return forward_step(iterator, model)

    def outer(iterator: Any, model: Any) -> Step:
        set_token_weight(torch.ones(B, S))
        return wrap_forward_step(forward_step, MILE)(iterator, model)

    for step, text in (
        (late, "set_token_weight was called after the model had computed its loss"),
        (twice, "set_token_weight was called twice in one forward step"),
        (turned, "set_token_weight: token_weight is torch.float32 (8, 3) on cpu; expected real"),
        (outer, "ran in another one inside it, so that its weights are unused"),
    ):
        raises(MileError, text, wrap_forward_step(step, MILE), None, model)


def check_a_negative_weight_stops_the_first_step_and_is_nan_later() -> None:
    sign = 1.0

    def step(iterator: Any, model: Any) -> Step:
        set_token_weight(torch.full((B, S), sign))
        return forward(model, batch()[1]), functools.partial(host_loss, MASK)

    model = build_model(tensor_model_parallel_size=TP)
    attach(model, MILE)
    for first in (-1.0, float("nan")):
        sign = first
        output, loss_func = wrap_forward_step(step, MILE)(None, model)
        raises(MileError, "a weight is negative or NaN; expected weights >= 0", loss_func, output)
    wrapped = wrap_forward_step(step, MILE)
    for sign in (1.0, -1.0):
        output, loss_func = wrapped(None, model)
        assert loss_func(output)[0].isnan().item() == (sign < 0)


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1], TP)
