"""Checks that the mask is what the job's loss function does, run by test_hook.py.

Two data-parallel ranks, which hold different masks; the first step has none, so that what is looked
at only once would be wrong from the second on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from support import helpers
from support.hook_model import (
    MASK,
    MILE,
    B,
    Report,
    S,
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

from megatron_mile import ObjectiveConfig, attach, install, wrap_forward_step
from megatron_mile.errors import MileError
from megatron_mile.integration.host import METHOD

RANKS = 2
# Measured 1.3e-7 in loss and gradient of the logits, over all forms, steps and normalisations.
SAME = 3e-7
LossFunc = Callable[[torch.Tensor], tuple[Any, ...]]


def masks(rank: int) -> list[torch.Tensor]:
    """One mask a step: everything, all but one token, a triangle, fractions."""
    one = torch.ones(B, S)
    one[rank, 3] = 0
    triangle = MASK.clone()
    triangle[2 * rank] = 0
    fractions = torch.rand(B, S, generator=torch.Generator().manual_seed(rank)).mul(4).round() / 4
    fractions[rank, :2] = torch.tensor([0.0, 1.0])
    return [torch.ones(B, S), one, triangle, fractions]


class LossOfAClass:
    """A loss function that is an object."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, output: torch.Tensor) -> tuple[Any, ...]:
        return host_loss(self.mask, output)


def keyword_loss(labels: torch.Tensor, output: torch.Tensor, scale: torch.Tensor) -> Any:
    """As ms-swift's: labels first, the mask under another name."""
    return host_loss(scale, output)


def mean_loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, Report]:
    """Without a count, and with a report that is averaged over the ranks already."""
    mean = (output * mask).sum() / mask.sum()
    report = mean.detach().clone()
    torch.distributed.all_reduce(report)
    return mean, {"lm loss": report / 2}


def labels_loss(labels: torch.Tensor, mask: torch.Tensor, output: torch.Tensor) -> Any:
    """Token ids of the mask's size are bound before it."""
    return mean_loss(mask, output)


def picked_loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    """Picks tokens, works in place and reports under another key; weights are 0 or 1."""
    losses = output.view(-1)
    losses *= 2
    total = losses[mask.view(-1) != 0].sum() / 2
    return total, mask.sum().int(), {"loss": torch.stack([total.detach(), mask.sum()])}


def loss_functions(mask: torch.Tensor) -> dict[str, LossFunc]:
    labels = batch()[1]
    found: dict[str, LossFunc] = {
        "position": functools.partial(host_loss, mask),
        "keyword": functools.partial(keyword_loss, labels, scale=mask),
        "closure": lambda output: host_loss(mask, output),
        "class": LossOfAClass(mask),
        "mean": functools.partial(mean_loss, mask),
        "labels": functools.partial(labels_loss, labels, mask),
    }
    if not (mask % 1).any():
        found["picked"] = functools.partial(picked_loss, mask)
    return found


def check_gradient_and_report_are_of_the_hosts_own_mask() -> None:
    """Each form, each step, each normalisation, against float64."""
    names = loss_functions(torch.ones(B, S))
    for normalize in ("global", "local", "official", "none"):
        config = ObjectiveConfig("mile", gamma=2.0, normalize=normalize)
        for name in names:
            model = build_model()
            logits = forward(model, None).detach()
            attach(model, config)
            step = wrap_forward_step(_step, config)
            for number in range(4):
                mask = masks(torch.distributed.get_rank())[number]
                if name in loss_functions(mask):
                    _check_step(model, logits, step, config, name, number)


def _step(data: tuple[torch.Tensor, LossFunc], model: Any) -> Step:
    """A forward step that is given the logits [s, b, V], so that their gradient can be seen."""
    logits, loss_func = data
    return getattr(model, METHOD)(batch()[1], logits * 1), loss_func


def _check_step(
    model: Any, logits: torch.Tensor, step: Any, config: ObjectiveConfig, name: str, number: int
) -> None:
    mask = masks(torch.distributed.get_rank())[number]
    truth = helpers.oracle(logits, batch()[1], config)
    leaf = logits.transpose(0, 1).contiguous().requires_grad_()
    output, loss_func = step((leaf, loss_functions(mask)[name]), model)
    assert helpers.error(output, truth.nll) < SAME  # plain cross-entropy
    loss, *_, report = loss_func(output)
    loss.backward()
    alpha = _alpha(config.normalize, truth.weight, number)
    is_mean = name in ("mean", "labels")
    upstream = alpha * mask / (mask.sum() if is_mean else 1)
    assert helpers.error(loss, (upstream * truth.loss).sum()) < SAME, (name, number)
    gradient = (upstream.unsqueeze(-1) * truth.grad).transpose(0, 1)
    assert helpers.error(leaf.grad, gradient) < SAME, (name, number)
    nll_alone = loss_functions(mask)[name](truth.nll.float())[-1]
    for key, figure in nll_alone.items():
        assert helpers.error(report[key], figure) < SAME, (name, number, key)


def _alpha(normalize: str, weight: torch.Tensor, number: int) -> torch.Tensor:
    """From the definitions; the weights are the same on both ranks."""
    sums = [(mask[number].sum(), (mask[number] * weight).sum()) for mask in map(masks, range(2))]
    each = [count / weighted for count, weighted in sums]
    return {
        "none": torch.tensor(1.0),
        "local": each[torch.distributed.get_rank()],
        "official": sum(each) / 2,
        "global": sum(count for count, _ in sums) / sum(weighted for _, weighted in sums),
    }[normalize]


def check_a_loss_that_is_not_linear_is_refused() -> None:
    def step_with(loss: Callable[[torch.Tensor], Any]) -> Callable[[Any, Any], Step]:
        return lambda iterator, model: (forward(model, batch()[1]), loss)

    def report(loss: torch.Tensor) -> Any:
        return loss, {"lm loss": loss.detach().clone()}

    refused = {
        "not linear": lambda output: report((output**2).mean()),
        "without a gradient": lambda output: report(output.detach().mean()),
        "weights a token negatively": lambda output: report(output[0].sum() - output[1].sum()),
        "not made of the losses": lambda output: report(torch.ones((), requires_grad=True) * 2),
        "loss of shape (3, 8)": report,
        "returned (Tensor); expected (loss, num_tokens, report)": torch.mean,
        "returned (NoneType); expected": lambda output: None,
        "returned (Tensor, Tensor); expected": lambda output: (output.mean(), output.mean()),
    }
    install(MILE)
    for text, loss in refused.items():
        output, loss_func = wrap_forward_step(step_with(loss), MILE)(None, build_model())
        raises(MileError, text, loss_func, output)


def check_a_loss_that_the_host_adds_is_trained() -> None:
    """With its value and its gradient, beside the objective; a report may hold any shape."""
    model, extra, found = build_model(), torch.tensor(3.0, requires_grad=True), []

    def step_with(added: torch.Tensor) -> Callable[[Any, Any], Step]:
        def loss_func(output: torch.Tensor) -> Any:
            return (output * MASK).sum() / 15 + added, {"each": output.detach().mean(1)}

        return lambda iterator, model: (forward(model, batch()[1]), loss_func)

    install(MILE)
    for added in (torch.tensor(0.0), extra**2 / 2):
        model.zero_grad()
        output, loss_func = wrap_forward_step(step_with(added), MILE)(None, model)
        total, report = loss_func(output)
        total.backward()
        assert report["each"].shape == (B,)
        assert report["mile loss"].shape == ()
        found.append((total.detach(), model.output_layer.weight.grad.clone()))
    assert torch.equal(found[0][1], found[1][1])
    assert helpers.error(found[1][0] - found[0][0], torch.tensor(4.5)) < SAME
    assert extra.grad == 3


def check_a_token_that_counts_has_a_target() -> None:
    """In the first step by name; later as NaN, for which a GPU need not be waited for."""
    install(MILE)
    for label in (-100, V, -1):
        labels = batch()[1]
        model = build_model()

        def step(
            iterator: Any, model: Any, labels: torch.Tensor = labels
        ) -> tuple[torch.Tensor, Any]:
            return forward(model, labels), functools.partial(host_loss, MASK)

        wrapped = wrap_forward_step(step, MILE)
        labels[0, 7] = label  # masked
        output, loss_func = wrapped(None, model)
        total, _, report = loss_func(output)
        assert total.isfinite()
        assert report["lm loss"].isfinite().all()
        labels[0, 0] = label  # counted
        output, loss_func = wrapped(None, model)
        total = loss_func(output)[0]
        total.backward()
        assert total.isnan()
        assert model.output_layer.weight.grad.isnan().any()
        output, loss_func = wrap_forward_step(step, MILE)(None, model)
        raises(MileError, "its label is -100 or outside the vocabulary", loss_func, output)


def check_a_negative_weight_after_the_first_step_ends_in_nan() -> None:
    signs = [torch.ones(B, S), -torch.ones(B, S)]
    install(MILE)

    def step(iterator: Any, model: Any) -> Step:
        return forward(model, batch()[1]), functools.partial(host_loss, signs.pop(0))

    wrapped, totals = wrap_forward_step(step, MILE), []
    for _ in range(2):
        output, loss_func = wrapped(None, build_model())
        totals.append(loss_func(output)[0])
    assert [bool(total.isnan()) for total in totals] == [False, True]


def check_each_mistake_has_a_remedy_of_its_own() -> None:
    def changed_step(iterator: Any, model: Any) -> Step:
        output, loss_func = forward_step(iterator, model)
        return output * MASK, loss_func

    def overwriting_step(iterator: Any, model: Any) -> Step:
        output, loss_func = forward_step(iterator, model)
        return output.mul_(MASK), loss_func

    model = build_model()
    output, loss_func = wrap_forward_step(forward_step, MILE)(None, model)
    raises(MileError, "no objective is installed on GPTModel", loss_func, output)
    install(MILE)
    output, loss_func = wrap_forward_step(forward_step, MILE)(None, model)
    loss_func(output)
    raises(MileError, "was called twice", loss_func, output)
    for step in (changed_step, overwriting_step):
        output, loss_func = wrap_forward_step(step, MILE)(None, model)
        raises(MileError, "forward_step changed the losses", loss_func, output)


def check_a_wrapped_step_inside_another_works() -> None:
    def outer_step(iterator: Any, model: Any) -> Step:
        return inner(iterator, model)

    install(MILE)
    model, inner = build_model(), wrap_forward_step(forward_step, MILE)
    output, loss_func = inner(None, model)
    expected = loss_func(output)[0]
    output, loss_func = wrap_forward_step(outer_step, MILE)(None, model)
    assert torch.equal(loss_func(output)[0], expected)
    other = wrap_forward_step(outer_step, ObjectiveConfig("ce"))
    raises(MileError, "runs inside one wrapped for", other, None, model)


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
