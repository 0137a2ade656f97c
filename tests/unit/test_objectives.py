"""Weights and slopes against their equations, with the powers of zero; what a definition holds."""

import math
from pathlib import Path

import pytest
import torch
from support.helpers import VALUES, WEIGHTED, WEIGHTS, variations

from megatron_mile import objectives
from megatron_mile.config import ObjectiveConfig
from megatron_mile.objectives import OBJECTIVES

# 0 is where powers are delicate, 1e-20 where 1 - p_y underflows unless expm1 is used, ln 32000 the
# largest entropy at that vocabulary, 200 a hopeless target.
NATS = [0.0, 1e-20, 1e-9, 0.3, 1.0, 10.3735, 200.0]
GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]
WITH_WEIGHT = [name for name in WEIGHTED if OBJECTIVES[name].weight is not None]


def _squares(name: str, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return sum p^2 for an objective that needs it: from nearly flat to certain."""
    needed = OBJECTIVES[name].needs_squares
    return {"squares": torch.linspace(1e-4, 1, like.numel(), dtype=like.dtype)} if needed else {}


def _weight(config: ObjectiveConfig, nll: float, entropy: float) -> float:
    row = torch.tensor([[nll], [entropy]], dtype=torch.float64)
    assert config.definition.weight is not None
    return config.definition.weight(row[0], row[1], **config.own).item()


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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_definition_is_whole(name: str) -> None:
    objective = OBJECTIVES[name]
    folder = Path(str(objectives.__file__)).parent
    assert (folder / f"{name}.py").is_file()
    assert objective.label
    assert objective.equation
    # A mix has no weight of its own, and a slope belongs to a weight.
    assert not (objective.mix and objective.weight)
    assert objective.weight or not (objective.weight_slope or objective.check_slope)
    assert not objective.value or (objective.weight and not objective.weight_slope)
    assert ObjectiveConfig(name).alpha_mode == ("global" if objective.weight else "none")


def test_every_file_of_the_folder_is_an_objective_and_cross_entropy_is_first() -> None:
    folder = Path(str(objectives.__file__)).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert set(OBJECTIVES) == files
    first, *others = OBJECTIVES.values()
    assert first.is_cross_entropy
    assert [objective.name for objective in others] == sorted(files - {first.name})


def test_every_weight_has_its_equation_in_the_oracle() -> None:
    assert set(WEIGHTS) == set(WEIGHTED)
    assert set(VALUES) == {name for name in WEIGHTED if OBJECTIVES[name].value}


@pytest.mark.parametrize("name", WITH_WEIGHT)
def test_weight_is_the_oracles_and_not_one(name: str) -> None:
    nll = torch.tensor(NATS, dtype=torch.float64).repeat(len(NATS))
    entropy = torch.tensor(NATS, dtype=torch.float64).repeat_interleave(len(NATS))
    weights = []
    for config in variations(name):
        weight = OBJECTIVES[name].weight
        assert weight is not None
        squares = _squares(name, nll)
        weights.append(weight(nll, entropy, **config.own, **squares))
        expected = WEIGHTS[name](nll, entropy, config, **squares)
        torch.testing.assert_close(weights[-1], expected, rtol=1e-14, atol=1e-9)
    assert any((weight != 1).any() for weight in weights)


@pytest.mark.parametrize("name", WITH_WEIGHT)
def test_weight_slope_is_the_derivative(name: str) -> None:
    weight, slope = OBJECTIVES[name].weight, OBJECTIVES[name].weight_slope
    assert weight is not None
    for config in variations(name):
        entropy = torch.tensor(NATS, dtype=torch.float64, requires_grad=True)
        nll = torch.full_like(entropy, 0.7)
        value = weight(nll, entropy, **config.own, **_squares(name, nll))
        if slope is None:
            assert not value.requires_grad
            continue
        (expected,) = torch.autograd.grad(value.sum(), entropy)
        found = slope(nll, entropy, **config.own).detach()
        kept = expected.isfinite()  # at 0 to the power of 0, autograd has NaN
        assert kept[1:].all()
        torch.testing.assert_close(found[kept], expected[kept], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", VALUES)
def test_value_has_the_weight_as_its_slope(name: str) -> None:
    weight, value = OBJECTIVES[name].weight, OBJECTIVES[name].value
    assert weight is not None
    assert value is not None
    for config in variations(name):
        nll = torch.tensor(NATS, dtype=torch.float64, requires_grad=True)
        loss = value(nll, nll.detach(), **config.own)
        (slope,) = torch.autograd.grad(loss.sum(), nll)
        # autograd takes e^-x from 1 + (e^-x - 1)
        torch.testing.assert_close(slope, weight(nll, nll, **config.own), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("q", [1e-6, 1e-3, 0.5, 1.0, 10.0])
def test_power_is_its_equation_and_cross_entropy_for_small_q(q: float) -> None:
    own = ObjectiveConfig("power", power_q=q).own
    value = OBJECTIVES["power"].value
    assert value is not None
    nll = torch.tensor(NATS, dtype=torch.float64)
    found = value(nll, nll, **own).tolist()
    assert found == pytest.approx([-math.expm1(-q * x) / q for x in NATS], rel=1e-15)
    if q == 1e-6:  # (1 - e^-x) / q = nll (1 - x / 2 + ...) with x = q nll <= 2e-4
        assert found == pytest.approx(NATS, rel=1.01e-4)


def test_eaft_refuses_a_slope_without_bound_and_weights_that_fp32_cannot_hold() -> None:
    for exponent in (0, 1, 2.5):
        ObjectiveConfig("eaft", eaft_exponent=exponent, entropy_grad=True)
    with pytest.raises(ValueError, match=r"entropy_grad=True with eaft_exponent=0\.5"):
        ObjectiveConfig("eaft", eaft_exponent=0.5, entropy_grad=True)
    ObjectiveConfig("eaft", eaft_exponent=40)  # (13.9 / 3)^40 = 4e26
    ObjectiveConfig("eaft", eaft_exponent=1000, eaft_scale=14)
    with pytest.raises(ValueError, match=r"eaft_exponent=50\.0 with eaft_scale=3\.0: a weight may"):
        ObjectiveConfig("eaft", eaft_exponent=50)
    with pytest.raises(ValueError, match=r"eaft_scale is 0; expected a finite number >= 0\.001"):
        ObjectiveConfig("eaft", eaft_scale=0)


# At sigma + H = 0: gamma = 0 is a constant weight, 1 has slope 0^0 = 1, larger ones start flat.
@pytest.mark.parametrize(
    ("gamma", "weight", "slope"), [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (2.0, 0.0, 0.0)]
)
def test_mile_weight_slope_at_zero_entropy(gamma: float, weight: float, slope: float) -> None:
    mile, zero = OBJECTIVES["mile"], torch.zeros(1)
    assert mile.weight is not None
    assert mile.weight_slope is not None
    assert mile.weight(zero, zero, gamma=gamma, sigma=0.0).item() == weight
    assert mile.weight_slope(zero, zero, gamma=gamma, sigma=0.0).item() == slope


@pytest.mark.parametrize("name", WITH_WEIGHT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_keeps_shape_and_dtype(name: str, dtype: torch.dtype) -> None:
    nats = torch.rand(2, 3, dtype=dtype)
    own = ObjectiveConfig(objective=name, gamma=2).own
    for function in (OBJECTIVES[name].weight, OBJECTIVES[name].weight_slope):
        if function is not None:
            squares = {key: x.view(2, 3) for key, x in _squares(name, nats).items()}
            result = function(nats, nats, **own, **squares)
            assert (result.shape, result.dtype) == (nats.shape, dtype)
