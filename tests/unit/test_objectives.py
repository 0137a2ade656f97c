"""Weights and slopes against their equations, with the powers of zero."""

import math

import pytest
import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.objectives import OBJECTIVES, UNWEIGHTED

# 0 is where powers are delicate, 1e-20 where 1 - p_y underflows unless expm1 is used, ln 32000 the
# largest entropy at that vocabulary, 200 a hopeless target.
NATS = [0.0, 1e-20, 1e-9, 0.3, 1.0, 10.3735, 200.0]
GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def _weight(config: ObjectiveConfig, nll: float, entropy: float) -> float:
    row = torch.tensor([[nll], [entropy]], dtype=torch.float64)
    return OBJECTIVES[config.objective].weight(row[0], row[1], config).item()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_mile_weight_is_its_equation(gamma: float, sigma: float) -> None:
    config = ObjectiveConfig(gamma=gamma, sigma=sigma)
    for entropy in NATS:
        assert _weight(config, 3.0, entropy) == pytest.approx((sigma + entropy) ** gamma, rel=1e-15)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_weight_is_its_equation(gamma: float) -> None:
    config = ObjectiveConfig(objective="focal", gamma=gamma)
    for nll in NATS:
        expected = (-math.expm1(-nll)) ** gamma
        assert _weight(config, nll, 3.0) == pytest.approx(expected, rel=1e-15)


def test_focal_weight_is_never_nan_for_a_rounded_nll() -> None:
    config = ObjectiveConfig(objective="focal", gamma=0.5)
    assert _weight(config, -1e-7, 0.0) == 0


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_unweighted_objectives_have_weight_one(name: str) -> None:
    config = ObjectiveConfig(name, gamma=2.0)
    weights = {_weight(config, nll, entropy) for nll in NATS for entropy in NATS}
    assert (name in UNWEIGHTED) == (weights == {1})
    assert config.alpha_mode == ("none" if name in UNWEIGHTED else "global")


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_weight_slope_is_the_derivative(name: str, gamma: float) -> None:
    config = ObjectiveConfig(objective=name, gamma=gamma)
    entropy = torch.tensor(NATS, dtype=torch.float64, requires_grad=True)
    nll = torch.full_like(entropy, 0.7)
    weight = OBJECTIVES[name].weight(nll, entropy, config)
    slope = OBJECTIVES[name].weight_slope(nll, entropy, config)
    if weight.requires_grad:
        (expected,) = torch.autograd.grad(weight.sum(), entropy)
    else:
        expected = torch.zeros_like(entropy)
    torch.testing.assert_close(slope.detach(), expected, rtol=1e-14, atol=0)


# At sigma + H = 0: gamma = 0 is a constant weight, 1 has slope 0^0 = 1, larger ones start flat.
@pytest.mark.parametrize(
    ("gamma", "weight", "slope"), [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (2.0, 0.0, 0.0)]
)
def test_mile_weight_slope_at_zero_entropy(gamma: float, weight: float, slope: float) -> None:
    config = ObjectiveConfig(gamma=gamma, sigma=0)
    zero = torch.zeros(1)
    assert OBJECTIVES["mile"].weight(zero, zero, config).item() == weight
    assert OBJECTIVES["mile"].weight_slope(zero, zero, config).item() == slope


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_keeps_shape_and_dtype(name: str, dtype: torch.dtype) -> None:
    nats = torch.rand(2, 3, dtype=dtype)
    config = ObjectiveConfig(objective=name, gamma=2)
    for result in (
        OBJECTIVES[name].weight(nats, nats, config),
        OBJECTIVES[name].weight_slope(nats, nats, config),
    ):
        assert (result.shape, result.dtype) == (nats.shape, dtype)
