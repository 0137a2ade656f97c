"""The schedule of gamma: its formula, and gamma as a tensor in the objectives."""

from fractions import Fraction

import pytest
import torch
from support.helpers import error, oracle

from megatron_mile import GammaSchedule, ObjectiveConfig, token_loss
from megatron_mile.objectives import mile


def oracle_gamma(gamma: float, warmup: int, decay: int, length: int, done: int) -> float:
    """What the iteration has after `done`, by cases and exactly."""
    if done < warmup:
        return float(Fraction(gamma) * Fraction(done, warmup))
    left = length - done - 1  # iterations that follow
    return float(Fraction(gamma) * Fraction(left, decay)) if left < decay else gamma


@pytest.mark.parametrize(
    ("warmup", "decay", "length"),
    [(0, 0, 5), (4, 0, 9), (0, 3, 9), (4, 3, 9), (5, 4, 9), (9, 0, 9), (0, 9, 9), (1, 1, 2)],
)
def test_schedule_follows_its_formula(warmup: int, decay: int, length: int) -> None:
    config = ObjectiveConfig("mile", gamma=1.5)
    schedule = GammaSchedule(config, warmup, decay, length)
    tensor = schedule.inputs()["gamma"]
    assert tensor == schedule.at(0)
    for done in range(length):
        schedule.update(done)
        expected = oracle_gamma(1.5, warmup, decay, length, done)
        assert tensor.item() == pytest.approx(expected, rel=3e-16)
        assert schedule.inputs()["gamma"] is tensor
        assert (tensor.dtype, tensor.shape) == (torch.float64, ())


def test_schedule_needs_no_length_without_a_decay() -> None:
    assert GammaSchedule(ObjectiveConfig("focal"), 2).at(10**9) == 1.0


@pytest.mark.parametrize(
    ("settings", "ramps", "message"),
    [
        ({"objective": "ce"}, (1,), "objective ce, which has none"),
        ({"objective": "emo"}, (1,), "objective emo, which has none"),
        ({}, (-1,), "expected iterations >= 0"),
        ({}, (0, -1, 5), "expected iterations >= 0"),
        ({}, (0, 1), "without train_iters"),
        ({}, (3, 3, 5), "warmup 3 and decay 3 do not fit into 5 iterations"),
        ({}, (6, 0, 5), "do not fit into 5 iterations"),
        ({"sigma": 0.0, "entropy_grad": True}, (2,), "slope has no bound"),
    ],
    ids=str,
)
def test_schedule_refuses_what_does_not_fit(
    settings: dict[str, object], ramps: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GammaSchedule(ObjectiveConfig(**settings), *ramps)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("objective", ["mile", "focal"])
def test_token_loss_takes_gamma_as_a_tensor(objective: str, entropy_grad: bool) -> None:
    random = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(7, 19, generator=random, dtype=torch.float64)
    targets = torch.randint(19, (7,), generator=random)
    schedule = GammaSchedule(ObjectiveConfig(objective, gamma=2.5, entropy_grad=entropy_grad), 4)
    for done in range(6):
        schedule.update(done)
        leaf = logits.clone().requires_grad_()
        out = token_loss(leaf, targets, schedule.config, inputs=schedule.inputs(targets))
        (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
        now = ObjectiveConfig(objective, gamma=schedule.at(done), entropy_grad=entropy_grad)
        truth = oracle(logits, targets, now)
        assert error(out.weight, truth.weight) <= 1e-14
        assert error(grad, truth.grad) <= 1e-14
    schedule.update(0)
    out = token_loss(logits, targets, schedule.config, inputs=schedule.inputs(targets))
    assert (out.weight == 1).all()
    assert torch.equal(out.loss, out.nll)


def test_weight_and_slope_of_mile_at_gamma_zero_and_no_entropy() -> None:
    """Where a power of 0 would make NaN of the slope."""
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert (mile.weight(zero, zero, 0 * one, 0.0) == 1).all()
    assert (mile.weight_slope(zero, zero, 0 * one, 0.0) == 0).all()
    assert (mile.weight_slope(zero, zero, one, 0.0) == 1).all()
