"""Checks of --mile-normalize batch against float64, run by test_hook.py.

A step of several micro-batches on two data-parallel ranks through Megatron's own schedule, DDP and
finalisation: its gradient is that of the weighted mean over all tokens of both.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from support import helpers
from support.hook_model import (
    MASK,
    B,
    S,
    batch,
    build_model,
    forward,
    forward_step,
    host_loss,
    raises,
    run_checks,
)

from megatron_mile import (
    ObjectiveConfig,
    attach,
    wrap_finalize_model_grads,
    wrap_forward_step,
)
from megatron_mile.errors import MileError
from megatron_mile.integration import versions
from megatron_mile.integration.host import resolve

RANKS = 2

SAME = 5e-7  # measured 3.5e-8 of the gradient
CONFIG = ObjectiveConfig("mile", gamma=2.0, normalize="batch")
NOTHING, EVERYTHING = torch.zeros(B, S), torch.ones(B, S)
# Which tokens count, of the micro-batches of either rank: as many as the other, or not.
MASKS = {
    "even": ([EVERYTHING, EVERYTHING], [EVERYTHING, EVERYTHING]),
    "uneven": ([MASK, EVERYTHING, 1 - MASK], [1 - MASK, NOTHING, MASK]),
    "rank without tokens": ([MASK, EVERYTHING], [NOTHING, NOTHING]),
    "weights below 1 in all": ([1e-3 * MASK], [1e-4 * EVERYTHING]),
    "nothing": ([NOTHING, NOTHING], [NOTHING, NOTHING]),
}


def step(masks: Any, model: Any) -> Any:
    """A forward step on the next micro-batch's mask."""
    return forward(model, batch()[1]), functools.partial(host_loss, next(masks))


def keep(inputs: list[torch.Tensor], layer: Any, given: tuple[torch.Tensor, ...]) -> None:
    """Keep what a layer is given."""
    inputs.append(given[0].detach())


def prepared(**settings: Any) -> tuple[Any, Any]:
    """A model in Megatron's DDP with the objective, and the model inside."""
    model = build_model(calculate_per_token_loss=True, **settings)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = wrap_finalize_model_grads(finalize_model_grads, CONFIG)
    attach(ddp, CONFIG)
    return ddp, model


def run_step(ddp: Any, masks: list[torch.Tensor], forward_step: Callable[..., Any] = step) -> Any:
    """Run the micro-batches of this rank; the reports."""
    return get_forward_backward_func()(
        forward_step_func=wrap_forward_step(forward_step, CONFIG),
        data_iterator=iter(masks),
        model=ddp,
        num_microbatches=len(masks),
        seq_length=S,
        micro_batch_size=B,
    )


def check_update_is_the_weighted_mean_over_the_global_batch() -> None:
    for name, by_rank in MASKS.items():
        ddp, model = prepared()
        hidden: list[torch.Tensor] = []
        model.output_layer.register_forward_pre_hook(functools.partial(keep, hidden))
        truth = helpers.oracle(forward(model, None).detach(), batch()[1], CONFIG)
        masks = torch.stack([mask.double() for masks in by_rank for mask in masks]).sum(0)
        weights = (masks * truth.weight).sum()
        for _ in range(2):  # a second step starts anew
            ddp.zero_grad_buffer()
            reports = run_step(ddp, by_rank[dist.get_rank()])
            upstream = (masks / weights.clamp(min=1e-30)).unsqueeze(-1) * truth.grad
            expected = torch.einsum("bsv,sbh->vh", upstream, hidden[0].double())
            found = model.output_layer.weight.main_grad
            assert helpers.error(found, expected) < SAME / 5, name
            assert (found.abs().max() > 1e-3) == (name != "nothing"), name
        found = sum(torch.stack([report[tag] for tag in FIGURES]) for report in reports)
        dist.all_reduce(found)
        sums = [(masks * values).sum() for values in (truth.nll, truth.loss, truth.weight)]
        counts = torch.stack([masks.sum(), weights, masks.sum()])
        assert helpers.error(found, torch.stack([torch.stack(sums), counts], 1)) < SAME, name


FIGURES = ("lm loss", "mile loss", "mile weight")


def check_what_is_handed_to_the_host_stays_the_hosts() -> None:
    """The number of tokens, for its log."""
    ddp, _ = prepared()
    output, loss_func = wrap_forward_step(forward_step, CONFIG)(None, ddp)
    _, count, report = loss_func(output)
    assert count == MASK.sum()
    assert report["lm loss"][1] == MASK.sum()


def check_a_stage_without_the_loss_gets_the_sum_of_the_last() -> None:
    """Megatron sends num_tokens there: a tensor of the last stage's dtype, whatever it counted."""
    ddp, model = prepared()
    handed = []

    def finalize(model: Any, num_tokens: torch.Tensor, **others: Any) -> None:
        handed.append(num_tokens.clone())

    model.config.finalize_model_grads_func = wrap_finalize_model_grads(finalize, CONFIG)
    run_step(ddp, [MASK])
    other = prepared()[0]
    wrap_finalize_model_grads(finalize, CONFIG)([other], torch.tensor(7, dtype=torch.int))
    last, stage = handed
    assert (last.shape, last.dtype) == (stage.shape, stage.dtype) == ((), torch.float64)
    assert last > 0
    assert stage == 0
    assert "scale_gradients" not in ddp.__dict__


def check_refuse_what_would_not_be_divided_by_the_weights() -> None:
    ddp, model = prepared()
    model.config.finalize_model_grads_func = finalize_model_grads
    raises(MileError, "does not divide by the weights; set it to", run_step, ddp, [MASK])
    other = ObjectiveConfig("mile", gamma=3.0, normalize="batch")
    wrapped = wrap_finalize_model_grads(finalize_model_grads, other)
    model.config.finalize_model_grads_func = wrapped
    raises(MileError, "does not divide by the weights; set it to", run_step, ddp, [MASK])
    raises(MileError, "counts no tokens", wrapped, [ddp], None)
    model.config.calculate_per_token_loss = False
    raises(MileError, "without --calculate-per-token-loss", wrapped, [ddp], torch.tensor(1))


def check_refuse_losses_that_are_scaled_by_the_tokens() -> None:
    ddp, model = prepared()
    finalize = model.config.finalize_model_grads_func
    for name, value in (
        ("moe_aux_loss_coeff", 1e-2),
        ("moe_aux_loss_coeff", [0.0, 1e-2]),
        ("moe_z_loss_coeff", 1e-3),
        ("mtp_num_layers", 1),
    ):
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        expected = f"cannot be combined with --{name.replace('_', '-')} {value}"
        raises(MileError, expected, finalize, [ddp], torch.tensor(1))
        setattr(model.config, name, before)
    model.config.moe_aux_loss_coeff = [0.0, 0.0]
    finalize([ddp], torch.tensor(1))


def check_refuse_loss_functions_that_divide_or_add() -> None:
    ddp, model = prepared()

    def mean(output: torch.Tensor) -> tuple[Any, ...]:
        return output.mean(), {"lm loss": output.detach().mean()}

    def adds(output: torch.Tensor) -> tuple[Any, ...]:
        loss, *others = host_loss(MASK, output)
        return loss + model.output_layer.weight.square().sum(), *others

    for loss_func, expected in ((mean, "a mean"), (adds, "adds a loss")):
        raises(
            MileError,
            expected,
            run_step,
            ddp,
            [MASK],
            lambda _, model, loss_func=loss_func: (forward(model, batch()[1]), loss_func),
        )


def check_other_settings_leave_the_finalisation_alone() -> None:
    for config in (ObjectiveConfig("mile"), ObjectiveConfig("ce", normalize="batch")):
        assert wrap_finalize_model_grads(finalize_model_grads, config) is finalize_model_grads
    assert resolve(versions.FINALIZE) is finalize_model_grads


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
