"""Checks of the hooked loss of a real GPTModel against float64, run by test_hook.py."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from megatron.core.models.gpt import GPTModel
from support import helpers
from support.hook_model import (
    HAS_HYBRID,
    HOST,
    MASK,
    MILE,
    Report,
    Step,
    V,
    batch,
    build_hybrid,
    build_model,
    forward,
    forward_step,
    host_loss,
    raises,
    run_checks,
)

from megatron_mile import ObjectiveConfig, attach, install, token_loss, wrap_forward_step
from megatron_mile.errors import MileError
from megatron_mile.integration.hook import METHOD

RANKS = 1


def check_evaluation_returns_the_hosts_bits() -> None:
    model, labels = build_model(), batch()[1]
    expected = forward(model, labels)
    install(MILE)
    step = wrap_forward_step(forward_step, MILE)
    with torch.no_grad():
        assert torch.equal(forward(model, labels), expected)
    for mode in (True, False):
        with torch.no_grad():
            output, loss_func = step(None, model.train(mode))
            assert torch.equal(output, expected)
            assert [*loss_func(output)[2]] == ["lm loss"]
            assert torch.equal(loss_func(output)[0], host_loss(MASK, expected)[0])


def check_evaluation_mode_trains_the_objective_where_it_is_differentiated() -> None:
    """Frozen dropout on purpose, or a forgotten model.train(); its value is plain cross-entropy."""
    model, gradients = build_model(), []
    plain = forward(model, batch()[1]).detach()
    install(MILE)
    for mode in (True, False):
        model.zero_grad()
        output, loss_func = wrap_forward_step(forward_step, MILE)(None, model.train(mode))
        assert helpers.error(output, plain) < 1e-6
        total, _, report = loss_func(output)
        total.backward()
        assert "mile loss" in report
        gradients.append(model.output_layer.weight.grad.clone())
    assert torch.equal(*gradients)


def check_training_repeats_the_oracle() -> None:
    """Loss, report and the gradient of the output weights, against float64."""
    model, labels, hidden = build_model(), batch()[1], []
    logits = forward(model, None).detach()
    model.output_layer.register_forward_pre_hook(lambda layer, given: hidden.append(given[0]))
    install(MILE)
    output, loss_func = wrap_forward_step(forward_step, MILE)(None, model)
    total, count, report = loss_func(output)
    total.backward()
    truth = helpers.oracle(logits, labels, MILE)
    alpha = MASK.sum() / (MASK * truth.weight).sum()
    assert count == MASK.sum() == 15
    for name, values in (
        ("lm loss", truth.nll),
        ("mile loss", alpha * truth.loss),
        ("mile entropy", truth.entropy),
        ("mile weight", truth.weight),
    ):
        expected = torch.stack([(MASK * values).sum(), MASK.sum()])
        assert helpers.error(report[name], expected) < 1e-6, name
    assert [*report] == ["lm loss", "mile loss", "mile entropy", "mile weight"]
    assert helpers.error(total, (MASK * alpha * truth.loss).sum()) < 1e-6
    upstream = alpha * MASK.unsqueeze(-1) * truth.grad
    gradient = torch.einsum("bsv,sbh->vh", upstream, hidden[0].double())
    assert helpers.error(model.output_layer.weight.grad, gradient) < 2e-6


def check_training_output_has_the_value_of_the_hosts() -> None:
    """And the gradient of token_loss."""
    model, labels = build_model(), batch()[1]
    logits = forward(model, None)
    plain = forward(model, labels).detach()
    config = ObjectiveConfig("mile", gamma=2.0, normalize="none")
    attach(model, config)
    output, loss_func = wrap_forward_step(forward_step, config)(None, model)
    assert helpers.error(output, plain) < 1e-6
    loss_func(output)[0].backward()
    found = model.output_layer.weight.grad.clone()
    model.zero_grad()
    (token_loss(logits, labels, config).loss * MASK).sum().backward()
    assert helpers.error(found, model.output_layer.weight.grad) < 1e-6


def check_logits_that_a_hook_keeps_are_left_alone() -> None:
    model, kept = build_model(), []
    expected = forward(model, None).detach()
    model.output_layer.register_forward_hook(lambda layer, given, out: kept.append(out[0]))
    install(MILE)
    output, loss_func = wrap_forward_step(forward_step, MILE)(None, model)
    loss_func(output)[0].backward()
    assert torch.equal(kept[0].detach().transpose(0, 1), expected)


def check_report_keeps_the_form_of_a_mean() -> None:
    def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, Report]:
        return output.mean(), {"lm loss": output.detach().mean()}

    def step(iterator: Any, model: Any) -> Step:
        return forward(model, batch()[1]), mean_loss

    model = build_model()
    plain = forward(model, batch()[1]).detach().mean()
    install(MILE)
    output, loss_func = wrap_forward_step(step, MILE)(None, model)
    loss, report = loss_func(output)
    assert report["lm loss"].shape == ()
    assert helpers.error(report["lm loss"], plain) < 1e-6
    assert helpers.error(report["mile loss"], loss) < 1e-6
    assert {figure.shape for figure in report.values()} == {()}


def check_masked_token_may_hold_any_label() -> None:
    model, labels = build_model(), batch()[1]
    labels[0, 5] = V + 7  # MASK is 0 here

    def step(iterator: Any, model: Any) -> Step:
        return forward(model, labels), functools.partial(host_loss, MASK)

    install(MILE)
    results = []
    for one in (forward_step, step):
        model.zero_grad()
        output, loss_func = wrap_forward_step(one, MILE)(None, model)
        loss = loss_func(output)[0]
        loss.backward()
        results.append((loss.detach(), model.output_layer.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def check_prediction_heads_keep_the_hosts_loss() -> None:
    """With two multi-token-prediction heads the third loss of a step is the main one."""
    model, labels = build_model(), batch()[1]
    logits = forward(model, None).transpose(0, 1).contiguous()
    host = HOST(model, labels, logits.clone())
    plain = token_loss(logits.transpose(0, 1), labels, MILE).nll
    model.config.mtp_num_layers, model.mtp_process = 2, True

    def step(iterator: Any, model: Any) -> tuple[list[torch.Tensor], Callable[..., Any]]:
        losses = [getattr(model, METHOD)(labels, logits.clone()) for _ in range(3)]
        return losses, functools.partial(host_loss, MASK)

    install(MILE)
    (first, second, main), _ = wrap_forward_step(step, MILE)(None, model)
    assert torch.equal(first, host)
    assert torch.equal(second, host)
    assert torch.equal(main, plain)
    raises(MileError, "wrap_forward_step", step, None, model)
    # GPTModel computes them on its last stage wherever they are, and so does what inherits from it.
    model.mtp_process = False
    model.__class__ = type("ModelOfAFork", (GPTModel,), {})
    (_, second, main), _ = wrap_forward_step(step, MILE)(None, model)
    assert torch.equal(second, host)
    assert torch.equal(main, plain)


def check_main_loss_is_no_head_where_the_heads_are_left_out() -> None:
    """A HybridModel with a prediction head trains the objective with the head and without."""
    if not HAS_HYBRID:
        return
    model, labels = build_hybrid("*-/*-", num_layers=2, mtp_num_layers=1), batch()[1]
    with torch.no_grad():
        logits = forward(model, None)
    plain = token_loss(logits, labels, MILE).nll
    heads: list[int] = []
    model.mtp.register_forward_hook(lambda *_: heads.append(len(results)))
    install(MILE)
    results: list[Report] = []
    for forward_of in (forward, _forward_without_head, forward):

        def step(iterator: Any, model: Any, forward_of: Any = forward_of) -> Step:
            return forward_of(model, labels), functools.partial(host_loss, MASK)

        output, loss_func = wrap_forward_step(step, MILE)(None, model)
        assert helpers.error(output, plain) < 1e-6
        results.append(loss_func(output)[2])
    assert heads == [0, 2]
    for name, figure in results[0].items():
        assert torch.equal(results[1][name], figure), name


def _forward_without_head(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a forward that leaves the head out, though the model has it.

    That is an argument from 0.20 on; before, it is done by hand.
    """
    if "compute_mtp_loss" in inspect.signature(model.forward).parameters:
        return forward(model, labels, compute_mtp_loss=False)
    model.mtp_process = False
    back = model.output_layer.register_forward_pre_hook(
        lambda *_: setattr(model, "mtp_process", True)
    )
    try:
        return forward(model, labels)
    finally:
        back.remove()


def check_backward_refuses_a_loss_that_nobody_normalised() -> None:
    model = build_model()
    install(MILE)
    for step in (forward_step, wrap_forward_step(forward_step, MILE)):
        output, _ = step(None, model)
        raises(MileError, "nobody normalised its loss", output.sum().backward)
        assert all(weight.grad is None for weight in model.parameters())


def check_nothing_of_a_step_stays_in_memory() -> None:
    """Neither window nor loss per token, whose graph holds the activations, and without gc."""
    model = build_model()
    install(MILE)
    gc.disable()
    for until in ("output", "loss", "backward"):
        output, loss_func = wrap_forward_step(forward_step, MILE)(None, model)
        left = [weakref.ref(loss_func.args[1]), weakref.ref(output), weakref.ref(loss_func.args[2])]
        if until != "output":
            total = loss_func(output)[0]
        if until == "backward":
            total.backward()
        total = output = loss_func = None
        assert [what() is not None for what in left] == [False, False, True], until
    gc.enable()


def check_step_refuses_two_main_losses() -> None:
    def step(iterator: Any, model: Any) -> Step:
        forward_step(iterator, model)
        return forward_step(iterator, model)

    install(MILE)
    wrapped = wrap_forward_step(step, MILE)
    raises(MileError, "computed the language-model loss twice", wrapped, None, build_model())


def check_loss_func_refuses_a_model_that_bypasses() -> None:
    def step(iterator: Any, model: Any) -> Step:
        with mock.patch.object(GPTModel, METHOD, HOST):
            return forward_step(iterator, model)

    install(MILE)
    output, loss_func = wrap_forward_step(step, MILE)(None, build_model())
    raises(MileError, "objective not applied: GPTModel computed its loss", loss_func, output)


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
