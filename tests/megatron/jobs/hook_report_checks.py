"""Checks of the figures that are reported on demand, run by test_hook.py.

Two tensor-parallel ranks; the truth is made of the whole logits, in float64.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.core import parallel_state
from support import helpers
from support.hook_model import (
    MASK,
    MILE,
    B,
    Report,
    S,
    V,
    batch,
    build_model,
    forward,
    forward_step,
    raises,
    run_checks,
)

from megatron_mile import ObjectiveConfig, attach, uninstall, wrap_forward_step
from megatron_mile.errors import MileError

RANKS = 2
TP = 2
DEFAULT = ["lm loss", "mile loss", "mile entropy", "mile weight"]
# Means of 15 tokens in fp32; 2.8e-8 measured.
SAME = 2e-7


def whole_logits(model: Any) -> torch.Tensor:
    """The logits of the whole vocabulary, [b, s, V], float64."""
    with torch.no_grad():
        shard = forward(model, None)
    if shard.size(-1) == V:
        return shard.double()
    parts = [torch.empty_like(shard) for _ in range(TP)]
    torch.distributed.all_gather(
        parts, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
    )
    return torch.cat(parts, -1).double()


def expected(model: Any) -> dict[str, float]:
    """Mean accuracy and entropy over the tokens that count."""
    uninstall()
    logits = whole_logits(model)
    assert logits.shape == (B, S, V)
    log_p = logits.log_softmax(-1)
    at_target = logits.gather(-1, batch()[1].unsqueeze(-1)).squeeze(-1)
    figures = {
        "mile accuracy": (at_target == logits.amax(-1)).double(),
        "mile entropy": -(log_p.exp() * log_p).sum(-1),
    }
    return {key: ((x * MASK).sum() / MASK.sum()).item() for key, x in figures.items()}


def report(
    model: Any, config: ObjectiveConfig, names: str | None, train: bool, **settings: Any
) -> Report:
    """What a step reports."""
    attach(model, config, **settings)
    step = wrap_forward_step(forward_step, config, names)
    with torch.set_grad_enabled(train):
        output, loss_func = step(None, model)
        found: Report = loss_func(output)[-1]
    uninstall()
    return found


def with_hits(model: Any) -> Any:
    """Let the targets of three tokens that count have the largest logits."""
    with torch.no_grad():
        model.output_layer.weight.mul_(0.01)
        _, labels = batch()
        shard, rank = V // TP, parallel_state.get_tensor_model_parallel_rank()
        hidden = whole_hidden(model)
        for b, s in ((0, 0), (1, 2), (2, 5)):
            row, local = hidden[s, b], int(labels[b, s]) - rank * shard
            if 0 <= local < shard:
                model.output_layer.weight[local] = 9 * row / row.norm()
    return model


def whole_hidden(model: Any) -> torch.Tensor:
    """What the output layer is given, [s, b, h]."""
    seen: list[torch.Tensor] = []
    handle = model.output_layer.register_forward_pre_hook(
        lambda layer, given: seen.append(given[0])
    )
    forward(model, None)
    handle.remove()
    return seen[0]


def check_accuracy_and_entropy_are_those_of_the_whole_logits() -> None:
    """In training by each node, and in evaluation; the rest as without."""
    model = with_hits(build_model(tensor_model_parallel_size=TP))
    truth = expected(model)
    assert 0.1 < truth["mile accuracy"] < 0.9
    configs = (MILE, ObjectiveConfig("ce"), ObjectiveConfig("emo"))
    cases = [(config, {}) for config in configs] + [(MILE, {"fused_linear": True})]
    for config, settings in cases:
        for train in (True, False):
            found = report(model, config, "accuracy,entropy", train, **settings)
            assert [*found] == ["lm loss", "mile accuracy", "mile entropy"]
            for key, value in truth.items():
                total, count = found[key]
                assert count == MASK.sum()
                mean = torch.tensor(value)
                assert helpers.error(total / count, mean) < SAME, (config.objective, key, train)


def check_default_is_what_it_was_and_evaluation_stays_the_hosts() -> None:
    model = build_model(tensor_model_parallel_size=TP)
    plain = report(model, MILE, None, True)
    assert [*plain] == DEFAULT
    chosen = report(model, MILE, "weight,loss", True)
    assert [*chosen] == ["lm loss", "mile weight", "mile loss"]
    assert all(torch.equal(chosen[key], plain[key]) for key in chosen)
    host = report(model, MILE, None, False)
    assert [*host] == ["lm loss"]
    for names, keys in (("loss", []), ("entropy,loss", ["mile entropy"])):
        ours = report(model, MILE, names, False)
        assert [*ours] == ["lm loss", *keys]
        assert torch.equal(ours["lm loss"], host["lm loss"])


def check_unknown_names_are_refused() -> None:
    known = "expected some of loss, entropy, weight, gamma, accuracy, with commas between"
    for names in ("", "los", "loss,", "emo"):
        raises(MileError, known, wrap_forward_step, forward_step, MILE, names)
    wrap_forward_step(forward_step, ObjectiveConfig("emo"), "emo, accuracy")


def check_last_report_holds() -> None:
    step = wrap_forward_step(forward_step, MILE, "loss")
    assert wrap_forward_step(step, MILE, "loss") is step
    again = wrap_forward_step(step, MILE, "accuracy")
    model = build_model(tensor_model_parallel_size=TP)
    attach(model, MILE)
    output, loss_func = again(None, model)
    assert [*loss_func(output)[-1]] == ["lm loss", "mile accuracy"]


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1], TP)
