"""Checks of what one micro-batch launches on a GPU, counted without one; run by test_hook.py.

The hook of a real GPTModel at TP 2 and DP 2, a loss function with the operations of Megatron's
(`pretrain_gpt.py`), the report and the backward, from the logits to their gradient. The process
group pretends that there are four ranks, the tensors have no values.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # the kernels without a GPU; none of them runs here

import torch
from support.hook_model import B, S, V, build_model, raises, run_checks
from support.launches import Launches

from megatron_mile import (
    GammaSchedule,
    ObjectiveConfig,
    attach,
    wrap_finalize_model_grads,
    wrap_forward_step,
)
from megatron_mile.integration.batch_alpha import keep_weights

RANKS = 1
PRETENDED = 4
TP = 2

# Launches in the hook, in the loss function with its own nine, and in the backward.
# In 0.19.2 Megatron's own cross-entropy takes 19, 7 and 9. Each kernel more needs a reason.
EXPECTED = {
    ("mile", "global"): (7, 25, 5),
    ("mile", "official"): (7, 31, 5),
    ("mile", "local"): (7, 24, 5),
    ("mile", "none"): (7, 21, 5),
    ("mile", "batch"): (7, 21, 5),
    ("focal", "global"): (10, 25, 5),
    ("dft", "global"): (7, 25, 5),
    ("eaft", "global"): (7, 25, 5),
    ("power", "global"): (10, 25, 5),
    ("ce", "global"): (5, 21, 5),
}
BUDGET = 45
ADDED: dict[str, dict[str, Any]] = {
    "smoothed": {"label_smoothing": 0.1},
    "z": {"z_loss": 1e-4},
    "deft": {"objective": "deft"},
    "deft smoothed z": {"objective": "deft", "label_smoothing": 0.1, "z_loss": 1e-4},
}
EXPECTED_ADDED = {
    "smoothed": (7, 25, 5),
    "z": (7, 26, 5),
    "deft": (8, 25, 5),
    "deft smoothed z": (8, 26, 5),
}


def loss_function(
    mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The operations of Megatron's loss function."""
    losses, flat = output.view(-1).float(), mask.view(-1).float()
    loss = torch.sum(losses * flat)
    count = flat.sum().clone().detach().to(torch.int)
    return loss, count, {"lm loss": torch.cat([loss.clone().detach().view(1), count.view(1)])}


def finalize(model: Any, num_tokens: torch.Tensor) -> None:
    """Megatron's division, without its collectives."""
    for chunk in model:
        chunk.scale_gradients(1.0 / torch.clamp(num_tokens, min=1))


def micro_batch(
    config: ObjectiveConfig | None, keep_logits: bool = False, scheduled: bool = False
) -> tuple[Launches, Launches, Launches]:
    """What a later step does in the hook, in the loss function, and in the backward."""
    model = build_model(tensor_model_parallel_size=TP)
    if keep_logits:
        model.output_layer.register_forward_hook(lambda *given: None)
    labels = torch.empty(B, S, dtype=torch.long, device="meta")
    host = functools.partial(loss_function, torch.empty(B, S, device="meta"))
    logits = torch.empty(S, B, V // TP, device="meta", requires_grad=True) * 1

    def step(iterator: Any, model: Any) -> Any:
        return model.compute_language_model_loss(labels, logits), host

    if config is not None:
        model.config.finalize_model_grads_func = wrap_finalize_model_grads(finalize, config)
        schedule = GammaSchedule(config, 9, device="meta") if scheduled else None
        attach(model, config, inputs=schedule.inputs if schedule else None)
        step = wrap_forward_step(step, config)
    phases = (Launches(), Launches(), Launches())
    with phases[0]:
        output, loss_func = step(None, model)
    if config is not None:
        loss_func.func.checked = True  # the first step looks at values
    with phases[1]:
        loss = loss_func(output)[0]
    with phases[2]:
        torch.autograd.grad(loss, logits)
    return phases


def check_launches_stay_what_they_are() -> None:
    found = {}
    for objective, normalize in EXPECTED:
        config = ObjectiveConfig(objective, normalize=normalize, backend="triton")
        found[objective, normalize] = tuple(len(phase.names) for phase in micro_batch(config))
    assert found == EXPECTED, found
    assert max(map(sum, found.values())) <= BUDGET


def check_label_smoothing_launches_nothing_more_and_z_loss_little() -> None:
    """Smoothing and the sums of squares ride in the kernels that are there."""
    found = {}
    for name, settings in ADDED.items():
        config = ObjectiveConfig(**{"objective": "mile", "backend": "triton", **settings})
        phases = micro_batch(config)
        found[name] = tuple(len(phase.names) for phase in phases)
        assert [len(phase.collectives) for phase in phases] == [1, 1, 0], name
    assert found == {name: EXPECTED_ADDED[name] for name in ADDED}, found


def check_a_schedule_of_gamma_costs_one_launch_in_the_report() -> None:
    for objective in ("mile", "focal"):
        config = ObjectiveConfig(objective, backend="triton")
        plain = EXPECTED[objective, "global"]
        counts = tuple(len(phase.names) for phase in micro_batch(config, scheduled=True))
        assert counts == (plain[0], plain[1] + 1, plain[2]), counts


def check_loss_and_alpha_are_one_collective_each() -> None:
    expected_of = {"global": 1, "official": 1, "local": 0, "none": 0, "batch": 0}
    for normalize, expected in expected_of.items():
        config = ObjectiveConfig("mile", normalize=normalize, backend="triton")
        hook, loss, backward = micro_batch(config)
        assert len(hook.collectives) == 1
        assert len(loss.collectives) == expected
        assert not backward.collectives


def check_batch_adds_five_launches_to_a_step() -> None:
    """To add the weights up, and to divide by them where they are not 0; none to a micro-batch."""
    model = build_model(tensor_model_parallel_size=TP, calculate_per_token_loss=True)
    gradients = torch.empty(3, device="meta")
    own = {"scale_gradients": lambda self, scaling: gradients.mul_(scaling)}
    model.__class__ = type("Wrapped", (type(model),), own)
    counts = []
    for normalize in ("batch", "global"):
        config = ObjectiveConfig("mile", normalize=normalize)
        model.config.finalize_model_grads_func = wrap_finalize_model_grads(finalize, config)
        for _ in range(4 if normalize == "batch" else 0):
            keep_weights(model, config, torch.empty((), dtype=torch.float64, device="meta"))
        tokens = torch.empty((), dtype=torch.int, device="meta")
        with Launches() as counted:
            model.config.finalize_model_grads_func([model], tokens)
        assert not counted.collectives
        counts.append(counted.names)
    assert len(counts[0]) - len(counts[1]) == 5, counts


def check_nothing_of_the_logits_size_is_made() -> None:
    """In place; logits that a hook may have stored are kept, and the measure sees that."""
    for entropy_grad in (False, True):
        config = ObjectiveConfig("mile", backend="triton", entropy_grad=entropy_grad)
        for keep_logits in (False, True):
            largest = max(phase.largest for phase in micro_batch(config, keep_logits))
            assert (largest >= S * B * V // TP) == keep_logits, largest


def check_reading_a_value_raises_and_so_does_a_tensor_of_a_cpu() -> None:
    """What the checks above would miss on a device that allows it."""
    tensor = torch.empty(3, device="meta")
    for forbidden in (tensor.tolist, tensor.nonzero, lambda: tensor[tensor > 0]):
        raises((RuntimeError, NotImplementedError), "", forbidden)
    with Launches():
        raises(AssertionError, "beside", torch.add, tensor, torch.ones(3))


def check_the_count_sees_operations_and_no_views() -> None:
    tensor = torch.empty(3, 4, device="meta")
    with Launches() as counted:
        tensor.view(12).add_(1).unsqueeze(0).clone()
        tensor[:0].zero_()
        torch.where(tensor > 0, tensor, 0)
    assert counted.names == [
        "aten::add_.Tensor",
        "aten::clone",
        "aten::gt.Scalar",
        "aten::scalar_tensor",  # torch.where fills its number in on the device
        "aten::where.self",
    ]


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1], TP)
