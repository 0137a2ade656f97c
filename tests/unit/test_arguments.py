"""The --mile flags that users rely on, and what their help says."""

import argparse
from typing import Any

import pytest

from megatron_mile.integration.arguments import add_arguments
from megatron_mile.integration.checkpoints import changed_settings

# A flag that goes or changes its default breaks jobs: say so in CHANGELOG.md.
FLAGS = {
    "--mile-objective": "none",
    "--mile-gamma": 1.0,
    "--mile-sigma": 1.0,
    "--mile-normalize": "global",
    "--mile-entropy-grad": False,
    "--mile-backend": "auto",
    "--mile-eaft-scale": 3.0,
    "--mile-eaft-exponent": 1.0,
    "--mile-emo-mode": "1",
    "--mile-emo-gt-q": False,
    "--mile-emo-cap": 0.0,
    "--mile-frequency-exponent": 1.0,
    "--mile-frequency-eps": 1e-7,
    "--mile-power-q": 1.0,
    "--mile-label-smoothing": 0.0,
    "--mile-z-loss": 0.0,
    "--mile-mask-padded-vocab": False,
    "--mile-fused-linear": False,
    "--mile-emo-cost": "output-layer",
    "--mile-token-frequency": None,
    "--mile-report": None,
    "--mile-gamma-warmup": 0,
    "--mile-gamma-decay-iters": 0,
    "--mile-allow-change": False,
    "--mile-cpu": False,
}


def _actions() -> list[argparse.Action]:
    return add_arguments(argparse.ArgumentParser(add_help=False))._actions


def test_flags_are_frozen() -> None:
    assert [(x.option_strings[0], x.default) for x in _actions()] == [*FLAGS.items()]


def test_help_of_each_flag_gives_default_and_of_numbers_unit_and_range() -> None:
    for action in _actions():
        assert action.help is not None
        assert action.help.endswith(f"(default {action.default})")
        if isinstance(action.default, float):
            assert ">= 0" in action.help
            assert "nats" in action.help or "no unit" in action.help
        for choice in action.choices or ():
            assert choice in action.help


# From one checkpoint to the next: what an objective is made of must stay, the rest may change.
@pytest.mark.parametrize(
    ("objective", "defining"),
    [
        ("ce", []),
        ("mile", ["gamma", "sigma", "normalize", "entropy_grad"]),
        ("focal", ["gamma", "normalize"]),
        ("dft", ["normalize"]),
        ("eaft", ["normalize", "entropy_grad", "eaft_scale", "eaft_exponent"]),
        ("power", ["normalize", "power_q"]),
        ("emo", ["emo_mode", "emo_gt_q", "emo_cap"]),
        (
            "frequency",
            ["normalize", "frequency_exponent", "frequency_eps", "token_frequency_digest"],
        ),
    ],
)
def test_changed_settings_are_those_that_define_the_objective(
    objective: str, defining: list[str]
) -> None:
    others: dict[str, Any] = {"gamma": 3.0, "sigma": 0.5, "normalize": "local"}
    others |= {"entropy_grad": True, "backend": "torch"}
    others |= {"eaft_scale": 2.0, "eaft_exponent": 2.0, "power_q": 0.5}
    others |= {"emo_mode": "2", "emo_gt_q": True, "emo_cap": 3.0}
    others |= {"frequency_exponent": 2.0, "frequency_eps": 0.1, "token_frequency_digest": "1f"}
    stored = {"mile_objective": objective}
    found = [
        name
        for name in others
        if changed_settings(stored, {**stored, f"mile_{name}": others[name]})
    ]
    assert found == defining


def test_cross_entropy_is_the_same_by_the_host_and_by_us() -> None:
    ce, mile = {"mile_objective": "ce"}, {"mile_objective": "mile"}
    for plain in ({}, {"mile_objective": "none"}, ce):
        assert changed_settings(plain, ce) == changed_settings(ce, plain) == []
        assert len(changed_settings(plain, mile)) == len(changed_settings(mile, plain)) == 1
    assert changed_settings({"mile_objective": "gone"}, mile) == ["objective gone -> mile"]


def test_masked_padding_is_part_of_the_objective_and_of_no_host() -> None:
    masked = {"mile_objective": "ce", "mile_mask_padded_vocab": True}
    assert changed_settings(masked, {"mile_objective": "ce"}) == ["mask_padded_vocab True -> False"]
    assert changed_settings(masked, {}) == ["mask_padded_vocab True -> False"]
    # Without an objective the flag does nothing, so that nothing has changed.
    idle = {"mile_objective": "none", "mile_mask_padded_vocab": True}
    assert changed_settings(idle, {"mile_objective": "ce"}) == []
