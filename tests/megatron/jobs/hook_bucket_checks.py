"""Checks of the losses per frequency bucket, run by test_hook.py.

Two data-parallel ranks that hold different numbers of tokens, and loss functions in the forms that
Megatron's have had from 0.12 on. The expected sums are made of the host's own losses per token.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from hook_data_checks import mean_loss, own_mask, step_with, summed_loss
from support import helpers
from support.hook_model import MILE, Step, V, batch, build_model, forward, host_loss, run_checks

from megatron_mile import ObjectiveConfig, attach, uninstall, wrap_forward_step
from megatron_mile.integration.token_frequencies import (
    BUCKETS,
    FrequencyTables,
    TokenFrequencies,
    assign_buckets,
)

RANKS = 2
FORMS = (host_loss, summed_loss, mean_loss)
KEYS = [f"lm loss {bucket}" for bucket in BUCKETS]
# fp32 sums of 22 losses, as the host's: 9.9e-8 measured.
SAME = 5e-7


def tables(counts: list[int]) -> FrequencyTables:
    """Tables of a vocabulary that is smaller than the model's."""
    return FrequencyTables(TokenFrequencies(counts, assign_buckets(counts)), V, "cpu")


SKEWED = [2 ** (token % 12) for token in range(V - 5)]
# One token that the batch does not have: high has no label here, and medium no token at all.
SINGLE = [0] * (V - 5)
SINGLE[next(token for token in range(V) if token not in set(batch()[1].flatten().tolist()))] = 7


def expected(nll: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Sum and count of each bucket on this rank, [3, 2]; one token after the other."""
    sums = torch.zeros(len(BUCKETS), 2, dtype=torch.float64)
    buckets = assign_buckets(counts) + [2] * 5
    values = (x.flatten().tolist() for x in (batch()[1], nll, own_mask()))
    for label, loss, weight in zip(*values, strict=True):
        sums[buckets[label]] += torch.tensor([loss * weight, weight], dtype=torch.float64)
    return sums


def run(
    model: Any,
    loss: Callable[..., Any],
    config: ObjectiveConfig | None,
    counts: list[int] = SKEWED,
    train: bool = True,
) -> tuple[Any, ...]:
    """What the loss function of one step returns."""
    uninstall()
    step: Callable[..., Step] = step_with(loss)
    if config:
        attach(model, config, buckets=tables(counts).buckets)
        step = wrap_forward_step(step, config)
    with torch.set_grad_enabled(train):
        output, loss_func = step(None, model)
        return tuple(loss_func(output))


def check_buckets_are_the_hosts_losses_by_label() -> None:
    model = build_model()
    uninstall()
    with torch.no_grad():
        here = expected(forward(model, batch()[1]), SKEWED)
    everywhere = here.clone()
    torch.distributed.all_reduce(everywhere)
    assert (everywhere[:, 1] > 0).all()
    for config in (MILE, ObjectiveConfig("ce")):
        for train in (True, False):
            pairs, sums, means = (run(model, loss, config, train=train)[-1] for loss in FORMS)
            assert [key for key in pairs if key.startswith("lm loss ")] == KEYS
            for key, own, total in zip(KEYS, here, everywhere, strict=True):
                assert helpers.error(pairs[key], own) < SAME, key
                assert helpers.error(torch.stack(sums[key]), total) < SAME, key
                assert helpers.error(means[key], total[0] / total[1]) < SAME, key
            together = sum(pairs[key].double() for key in KEYS)
            assert helpers.error(together, pairs["lm loss"]) < SAME
            assert together[1] == pairs["lm loss"][1]


def check_evaluation_is_the_hosts_bit_for_bit() -> None:
    model = build_model()
    for loss in FORMS:
        host, ours = (run(model, loss, config, train=False) for config in (None, MILE))
        assert len(ours) == len(host)
        for found, wanted in zip(ours[:-1], host[:-1], strict=True):
            assert torch.equal(found, wanted)
        assert not ours[0].requires_grad
        found, wanted = (torch.as_tensor(result[-1]["lm loss"]) for result in (ours, host))
        assert torch.equal(found, wanted)
        assert [*ours[-1]] == ["lm loss", *KEYS]


def check_a_bucket_without_tokens_is_0_and_never_nan() -> None:
    model = build_model()
    for train in (True, False):
        pairs, sums, means = (run(model, loss, MILE, SINGLE, train)[-1] for loss in FORMS)
        for key in KEYS[:2]:
            micro_batches = torch.vstack([pairs[key], pairs[key]]).sum(0)
            torch.distributed.all_reduce(micro_batches)
            assert micro_batches[0] / micro_batches[1] == 0
            assert sums[key][0] / sums[key][1] == 0
            assert means[key] == 0
        # What an empty rank adds to another one's count, and to a count in fp32.
        assert pairs[KEYS[0]][1] + torch.tensor(3.0) == 3
        assert helpers.error(pairs[KEYS[2]], pairs["lm loss"]) < SAME


def check_training_is_the_same_with_and_without_buckets() -> None:
    model, losses = build_model(), []
    for buckets in (None, tables(SKEWED).buckets):
        attach(model, MILE, buckets=buckets)
        output, loss_func = wrap_forward_step(step_with(host_loss), MILE)(None, model)
        loss, _, report = loss_func(output)
        losses.append([loss.detach(), *(report[key] for key in report if key not in KEYS)])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def check_ignored_labels_are_in_no_bucket() -> None:
    """A label of -100 with mask 0 must neither break the look-up nor count."""
    model, (_, labels) = build_model(), batch()
    labels = labels.masked_fill(own_mask() == 0, -100)

    def step(iterator: Any, model: Any) -> Step:
        return forward(model, labels), functools.partial(host_loss, own_mask())

    attach(model, MILE, buckets=tables(SKEWED).buckets)
    output, loss_func = wrap_forward_step(step, MILE)(None, model)
    report = loss_func(output)[-1]
    assert sum(report[key][1] for key in KEYS) == own_mask().sum()


def check_prediction_heads_have_no_part() -> None:
    model = build_model(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
    for train in (True, False):
        report = run(model, host_loss, MILE, train=train)[-1]
        uninstall()
        with torch.no_grad():
            here = expected(forward(model, batch()[1]), SKEWED)
        for key, own in zip(KEYS, here, strict=True):
            assert helpers.error(report[key], own) < SAME, (key, train)


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
