"""ObjectiveConfig: defaults, what it refuses and how it says so, and its texts."""

import dataclasses
import math
from typing import Any

import pytest

from megatron_mile.config import ObjectiveConfig, _checked, defining_settings
from megatron_mile.integration.telemetry import describe
from megatron_mile.objectives import OBJECTIVES, Setting

FIELDS = {field.name: field for field in dataclasses.fields(ObjectiveConfig)}


def test_config_has_its_fields_in_order_with_the_papers_setting() -> None:
    assert [*dataclasses.asdict(ObjectiveConfig()).items()] == [
        ("objective", "mile"),
        ("gamma", 1.0),
        ("sigma", 1.0),
        ("normalize", "global"),
        ("entropy_grad", False),
        ("backend", "auto"),
        ("eaft_scale", 3.0),
        ("eaft_exponent", 1.0),
        ("emo_mode", "1"),
        ("emo_gt_q", False),
        ("emo_cap", 0.0),
        ("frequency_exponent", 1.0),
        ("frequency_eps", 1e-7),
        ("power_q", 1.0),
        ("label_smoothing", 0.0),
        ("z_loss", 0.0),
    ]


# Each kind of mistake once per kind of field: not a number, a number out of range, the wrong type.
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", math.nan),
        ("gamma", -0.5),
        ("gamma", True),
        ("gamma", "1.0"),
        ("gamma", None),
        ("sigma", math.inf),
        ("sigma", -1),
        ("sigma", False),
        ("objective", "MILE"),
        ("objective", None),
        ("normalize", "mean"),
        ("backend", 1),
        ("entropy_grad", 1),
        ("entropy_grad", "true"),
        ("emo_mode", "3"),
        ("emo_mode", True),
        ("emo_cap", -3),
        ("label_smoothing", 1),
        ("label_smoothing", -0.1),
        ("z_loss", -1e-4),
        ("z_loss", math.inf),
    ],
)
def test_config_refuses_with_field_value_and_expectation(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} is ") as caught:
        ObjectiveConfig(**{name: value})
    message = str(caught.value)
    assert repr(value) in message
    assert "expected" in message
    assert "\n" not in message


def test_config_takes_integers_as_numbers() -> None:
    config = ObjectiveConfig(gamma=2, sigma=0)
    assert (type(config.gamma), config.gamma) == (float, 2.0)
    assert (type(config.sigma), config.sigma) == (float, 0.0)


def test_config_takes_the_numbers_of_the_emo_modes() -> None:
    assert ObjectiveConfig("emo", emo_mode=2) == ObjectiveConfig("emo", emo_mode="2")


def test_a_number_stays_in_the_range_of_its_setting() -> None:
    share = Setting(name="share", default=0.5, text="", low=0.1, high=1)
    assert (_checked(share, 0.1), _checked(share, 1)) == (0.1, 1.0)
    for value in (0, 1.5):
        with pytest.raises(
            ValueError, match=r"expected a finite number >= 0\.1 and <= 1, such as 0"
        ):
            _checked(share, value)


def test_a_number_may_have_to_stay_below_its_bound() -> None:
    with pytest.raises(ValueError, match=r"expected a finite number >= 0 and < 1, such as 0\.0"):
        ObjectiveConfig(label_smoothing=1.0)
    assert ObjectiveConfig(label_smoothing=1 - 2**-53).label_smoothing < 1


def test_config_refuses_what_an_objective_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"^z_loss=0\.1 with objective emo, which takes no such"):
        ObjectiveConfig("emo", z_loss=0.1)
    both = r"label_smoothing=0\.1 and z_loss=0\.1 with objective emo"
    with pytest.raises(ValueError, match=both):
        ObjectiveConfig("emo", label_smoothing=0.1, z_loss=0.1)
    # The value of power is not made of nll.
    with pytest.raises(
        ValueError, match=r"^label_smoothing=0\.1 with objective power, .* use ce, "
    ):
        ObjectiveConfig("power", label_smoothing=0.1, z_loss=0.1)
    assert ObjectiveConfig("power", z_loss=0.1).z_loss == 0.1
    with pytest.raises(ValueError, match=r"^z_loss=0\.1 with normalize=batch, .* leave it out$"):
        ObjectiveConfig(z_loss=0.1, normalize="batch")
    assert ObjectiveConfig("ce", z_loss=0.1, normalize="batch").alpha_mode == "none"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_label_smoothing_and_z_loss_define_a_run_where_they_make_a_difference(name: str) -> None:
    taken = {"emo": set(), "power": {"z_loss"}}.get(name, {"label_smoothing", "z_loss"})
    assert {"label_smoothing", "z_loss"} & {*defining_settings(name)} == taken


def test_help_of_the_z_loss_names_who_takes_it() -> None:
    help_text = FIELDS["z_loss"].metadata["help"]
    assert "power" in help_text
    assert "emo" not in help_text


def test_config_refuses_an_unbounded_slope() -> None:
    with pytest.raises(ValueError, match=r"entropy_grad=True with sigma=0 and gamma=0\.5"):
        ObjectiveConfig(sigma=0, gamma=0.5, entropy_grad=True)


@pytest.mark.parametrize(
    "fine",
    [
        {"sigma": 0, "gamma": 0.5},
        {"sigma": 0, "gamma": 0, "entropy_grad": True},
        {"sigma": 0, "gamma": 1, "entropy_grad": True},
        {"sigma": 0.1, "gamma": 0.5, "entropy_grad": True},
        {"sigma": 0, "gamma": 0.5, "entropy_grad": True, "objective": "focal"},
    ],
    ids=str,
)
def test_config_refuses_no_bounded_slope(fine: dict[str, Any]) -> None:
    ObjectiveConfig(**fine)


@pytest.mark.parametrize(("gamma", "sigma"), [(100.0, 1.0), (26.0, 1.0), (25.0, 3.0), (27.0, 0.0)])
def test_config_refuses_a_weight_that_fp32_cannot_hold(gamma: float, sigma: float) -> None:
    # (sigma + 20 ln 2)^gamma > 1e30; the focal weight is at most 1.
    with pytest.raises(ValueError, match=f"gamma={gamma} with sigma={sigma}: a weight may"):
        ObjectiveConfig(gamma=gamma, sigma=sigma)
    ObjectiveConfig(gamma=25.0)
    ObjectiveConfig("focal", gamma=gamma)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ObjectiveConfig().gamma = 2.0  # type: ignore[misc]


def test_config_names_every_registered_objective() -> None:
    assert FIELDS["objective"].metadata["choices"] == tuple(OBJECTIVES)


@pytest.mark.parametrize("name", FIELDS)
def test_config_documents_every_field(name: str) -> None:
    text = FIELDS[name].metadata["help"]
    folded = " ".join((ObjectiveConfig.__doc__ or "").split())
    assert f"{name} (default {FIELDS[name].default!r}): {text}." in folded
    for choice in FIELDS[name].metadata.get("choices", ()):
        assert choice in text


def test_config_docstring_fits_the_page() -> None:
    assert max(map(len, (ObjectiveConfig.__doc__ or "").splitlines())) <= 100


# What jobs print at their start, and people look for in old logs.
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "mile (gamma 1, sigma 1 nats, alpha global, weights detached)"),
        (
            {"gamma": 0, "sigma": 0.25, "entropy_grad": True, "normalize": "local"},
            "mile (gamma 0, sigma 0.25 nats, alpha local, gradient through the entropy)",
        ),
        (
            {"objective": "focal", "entropy_grad": True},
            "focal (gamma 1, alpha global, weights detached)",
        ),
        ({"objective": "ce", "gamma": 3}, "ce (plain cross-entropy through megatron_mile)"),
        ({"objective": "ce", "label_smoothing": 0.1}, "ce (label smoothing 0.1)"),
        (
            {"objective": "deft", "label_smoothing": 0.1, "z_loss": 1e-4},
            "deft (alpha global, weights detached, label smoothing 0.1, z-loss 0.0001)",
        ),
        ({"objective": "dft"}, "dft (alpha global, weights detached)"),
        (
            {"objective": "eaft", "normalize": "none"},
            "eaft (scale 3 nats, exponent 1, alpha none, weights detached)",
        ),
        ({"objective": "power"}, "power (q 1, alpha global, weights detached)"),
        ({"objective": "emo"}, "emo (mode 1)"),
        (
            {"objective": "emo", "emo_mode": "2", "emo_gt_q": True, "emo_cap": 3},
            "emo (mode 2, gt_q, ratio at most 3)",
        ),
    ],
    ids=str,
)
def test_start_block_describes_the_objective(settings: dict[str, Any], text: str) -> None:
    assert describe(ObjectiveConfig(**settings)) == text


def test_start_block_says_a_setting_that_has_no_words_of_its_own() -> None:
    assert Setting(name="share", default=0.5, text="").describe(0.25) == "share 0.25"
