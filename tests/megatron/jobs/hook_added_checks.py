"""Checks of label smoothing, z-loss and deft in the hook against float64, run by test_hook.py."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from support import helpers
from support.hook_model import (
    MASK,
    Report,
    Step,
    V,
    batch,
    build_model,
    forward,
    forward_step,
    host_loss,
    raises,
    run_checks,
)

from megatron_mile import ObjectiveConfig, attach, wrap_forward_step
from megatron_mile.errors import MileError
from megatron_mile.integration.checkpoints import changed_settings
from megatron_mile.integration.refusals import refuse_smoothed_padding

RANKS = 1
CONFIGS = {
    "smoothed": ObjectiveConfig(gamma=2, label_smoothing=0.1),
    "z": ObjectiveConfig("ce", z_loss=0.01),
    "deft with both": ObjectiveConfig("deft", label_smoothing=0.2, z_loss=0.02),
}


def check_training_repeats_the_oracle_with_and_without_the_layer_fused() -> None:
    """Loss, report and the gradient of the output weights, against float64."""
    for fused in (False, True):
        for name, config in CONFIGS.items():
            _repeat_the_oracle(config, fused, f"{name}, fused {fused}")


def _repeat_the_oracle(config: ObjectiveConfig, fused: bool, name: str) -> None:
    model, labels, hidden = build_model(), batch()[1], []
    logits = forward(model, None).detach()
    plain = forward(model, labels).detach()
    model.decoder.register_forward_hook(lambda module, given, out: hidden.append(out))
    attach(model, config, fused_linear=fused)
    output, loss_func = wrap_forward_step(forward_step, config)(None, model)
    assert helpers.error(output, plain) < 1e-6, name
    total, count, report = loss_func(output)
    total.backward()
    truth = helpers.oracle(logits, labels, config)
    z = helpers.true_z_loss(logits, config)
    alpha = 1.0
    if config.definition.weight is not None:
        alpha = MASK.sum() / (MASK * truth.weight).sum()
    figures = {
        "lm loss": truth.nll,
        "mile loss": alpha * truth.loss + z,
        "mile entropy": truth.entropy,
        "mile weight": truth.weight,
        **({"mile z loss": z} if config.z_loss else {}),
    }
    assert [*report] == [*figures], name
    for figure, values in figures.items():
        expected = torch.stack([(MASK * values).sum(), MASK.sum()])
        assert helpers.error(report[figure], expected) < 1e-6, (name, figure)
    assert count == MASK.sum()
    assert helpers.error(total, (MASK * figures["mile loss"]).sum()) < 1e-6, name
    of_loss = helpers.oracle(logits, labels, _without_z(config)).grad
    upstream = MASK.unsqueeze(-1) * (alpha * of_loss + (truth.grad - of_loss))
    gradient = torch.einsum("bsv,sbh->vh", upstream, hidden[0].double())
    assert helpers.error(model.output_layer.weight.grad, gradient) < 5e-6, name


def _without_z(config: ObjectiveConfig) -> ObjectiveConfig:
    return ObjectiveConfig(
        config.objective, gamma=config.gamma, label_smoothing=config.label_smoothing
    )


def check_a_mean_gets_its_share_of_the_z_loss() -> None:
    """Where the host divides by itself, and has a mask that leaves a NaN out."""
    config = CONFIGS["z"]

    def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, Report]:
        loss = (output * MASK).sum() / MASK.sum()
        return loss, {"lm loss": loss.detach()}

    def step(iterator: Any, model: Any) -> Step:
        return forward(model, batch()[1]), mean_loss

    model = build_model()
    logits, labels = forward(model, None).detach(), batch()[1]
    attach(model, config)
    output, loss_func = wrap_forward_step(step, config)(None, model)
    loss, report = loss_func(output)
    loss.backward()
    truth = helpers.oracle(logits, labels, config).nll + helpers.true_z_loss(logits, config)
    expected = (MASK * truth).sum() / MASK.sum()
    assert helpers.error(loss, expected) < 1e-6
    assert helpers.error(report["mile loss"], expected) < 1e-6
    assert report["mile z loss"].shape == ()


def check_a_masked_token_may_have_a_label_of_no_token() -> None:
    config, labels = CONFIGS["deft with both"], batch()[1]
    other = labels.clone()
    other[0, 5] = V + 7  # MASK is 0 here

    def step(labels: torch.Tensor, iterator: Any, model: Any) -> Step:
        return forward(model, labels), functools.partial(host_loss, MASK)

    results = []
    for given in (labels, other):
        model = build_model()
        attach(model, config)
        wrapped = wrap_forward_step(functools.partial(step, given), config)
        output, loss_func = wrapped(None, model)
        loss = loss_func(output)[0]
        loss.backward()
        results.append((loss.detach(), model.output_layer.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def check_evaluation_stays_the_hosts() -> None:
    model, labels = build_model(), batch()[1]
    expected = forward(model, labels).detach()
    attach(model, CONFIGS["deft with both"])
    with torch.no_grad():
        output, loss_func = wrap_forward_step(forward_step, CONFIGS["deft with both"])(None, model)
        assert torch.equal(output, expected)
        assert [*loss_func(output)[2]] == ["lm loss"]


def check_padding_is_refused_where_it_would_be_smoothed() -> None:
    smoothed, columns = CONFIGS["smoothed"], "spread over 128 columns, of which 28 are padding"
    raises(MileError, columns, refuse_smoothed_padding, smoothed, 128, 100)
    raises(MileError, "--mile-mask-padded-vocab", refuse_smoothed_padding, smoothed, 128, 100)
    refuse_smoothed_padding(smoothed, 128, 128)
    refuse_smoothed_padding(CONFIGS["z"], 128, 100)


def check_a_resume_compares_what_is_added() -> None:
    def args(objective: str, **settings: float) -> dict[str, Any]:
        return {"mile_objective": objective, **{f"mile_{k}": v for k, v in settings.items()}}

    mile, ce, none = args("mile"), args("ce"), args("none")
    assert changed_settings(mile, args("mile", label_smoothing=0.1)) == [
        "label_smoothing 0.0 -> 0.1"
    ]
    assert changed_settings(args("mile", z_loss=1e-4), mile) == ["z_loss 0.0001 -> 0.0"]
    # Plain cross-entropy is that of the host, smoothed it is not.
    assert changed_settings(none, ce) == []
    assert changed_settings(none, args("ce", label_smoothing=0.1)) == ["label_smoothing 0.0 -> 0.1"]
    assert changed_settings(args("ce", z_loss=0.1), none) == ["z_loss 0.1 -> 0.0"]
    assert changed_settings(args("none", label_smoothing=0.1), ce) == []  # it was not used
    assert changed_settings(args("emo", label_smoothing=0.0), args("emo")) == []


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
