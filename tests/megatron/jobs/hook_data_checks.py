"""Checks of the report's forms and of Megatron's own schedule, run by test_hook.py.

Two data-parallel ranks that hold different numbers of tokens. The loss functions are in the forms
that `pretrain_gpt.py` and the schedules have had from 0.12 on; each runs on every version.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from support import helpers
from support.hook_model import (
    MASK,
    MILE,
    B,
    S,
    Step,
    batch,
    build_model,
    forward,
    gradients,
    host_loss,
    run_checks,
)

from megatron_mile import ObjectiveConfig, install, uninstall, wrap_forward_step

RANKS = 2
MICRO_BATCHES = 2
# Measured on every version of megatron-core, the same digits: 8.9e-7, in the embedding's gradient.
SAME = 2e-6
LossFunc = Callable[[torch.Tensor, torch.Tensor], tuple[Any, ...]]


def own_mask() -> torch.Tensor:
    """15 tokens on rank 0, 7 on rank 1."""
    mask = MASK.clone()
    if torch.distributed.get_rank() == 1:
        mask[2] = 0
    return mask


def summed_loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    """As in 0.12: the report is summed over all ranks, and is no tensor."""
    total, count, report = host_loss(mask, output)
    everywhere = report["lm loss"].clone()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(everywhere, group=group)
    return total, count, {"lm loss": (everywhere[0], everywhere[1])}


def mean_loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    """The older form without a count, which the schedules still take."""
    mean = (output * mask).sum() / mask.sum()
    return mean, {"lm loss": mean.detach().clone()}


def step_with(loss: LossFunc) -> Callable[[Any, Any], Step]:
    def step(iterator: Any, model: Any) -> Step:
        return forward(model, batch()[1]), functools.partial(loss, own_mask())

    return step


def schedule(model: Any, loss: LossFunc, config: ObjectiveConfig | None) -> Any:
    """Reports and gradients of one training step of Megatron's own."""
    uninstall()
    step = step_with(loss)
    if config:
        install(config)
        step = wrap_forward_step(step, config)
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=model,
        num_microbatches=MICRO_BATCHES,
        seq_length=S,
        micro_batch_size=B,
        forward_only=False,
    )
    return reports, gradients(model)


def check_report_has_the_hosts_form() -> None:
    model, reports = build_model(), []
    install(MILE)
    for loss in (host_loss, summed_loss, mean_loss):
        output, loss_func = wrap_forward_step(step_with(loss), MILE)(None, model)
        reports.append(loss_func(output)[-1])
    pairs, everywhere, means = reports
    for name, pair in pairs.items():
        both = pair.clone()
        torch.distributed.all_reduce(both)
        assert both[1] == 22
        assert isinstance(everywhere[name], tuple)
        assert helpers.error(torch.stack(everywhere[name]), both) < SAME, name
        # "lm loss" is what this host makes of it: the mean of one rank.
        mean = pair[0] / pair[1] if name == "lm loss" else both[0] / both[1]
        assert helpers.error(means[name], mean) < SAME, name


def check_one_rank_alone_may_report() -> None:
    """Ranks must still enter the same collectives: a second step's alpha is the first's."""

    def reports_on_rank_0(mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
        mean, report = mean_loss(mask, output)
        return mean, report if torch.distributed.get_rank() == 0 else {}

    model = build_model()
    install(MILE)
    step = wrap_forward_step(step_with(reports_on_rank_0), MILE)
    losses = []
    for _ in range(2):
        output, loss_func = step(None, model)
        loss, report = loss_func(output)
        assert report["mile loss"].shape == ()
        losses.append(loss.detach())
    assert torch.equal(*losses)


def check_schedule_takes_every_form() -> None:
    """With ce, the schedule's gradients and reports are the host's, however it divides."""
    model = build_model()
    for loss, per_token in itertools.product((host_loss, summed_loss, mean_loss), (False, True)):
        model.config.calculate_per_token_loss = per_token
        host_reports, host = schedule(model, loss, None)
        reports, ours = schedule(model, loss, ObjectiveConfig("ce"))
        assert len(reports) == MICRO_BATCHES
        for found, expected in zip(reports, host_reports, strict=True):
            found, expected = (torch.as_tensor(one["lm loss"]) for one in (found, expected))
            assert helpers.error(found, expected) < SAME
        for name, grad in host.items():
            assert helpers.error(ours[name], grad) < SAME, name


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
