"""The --mile flags that users rely on, and what their help says."""

import argparse

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
    "--mile-emo-mode": "1",
    "--mile-emo-gt-q": False,
    "--mile-emo-cap": 0.0,
    "--mile-mask-padded-vocab": False,
    "--mile-fused-linear": False,
    "--mile-emo-cost": "output-layer",
    "--mile-allow-change": False,
    "--mile-cpu": False,
}


def _actions() -> list[argparse.Action]:
    return add_arguments(argparse.ArgumentParser(add_help=False))._actions


def test_flags_are_frozen() -> None:
    assert {action.option_strings[0]: action.default for action in _actions()} == FLAGS


def test_help_of_each_flag_gives_default_and_of_numbers_unit_and_range() -> None:
    for action in _actions():
        assert action.help is not None
        assert action.help.endswith(f"(default {action.default})")
        if isinstance(action.default, float):
            assert ">= 0" in action.help
            assert "nats" in action.help or "no unit" in action.help
        for choice in action.choices or ():
            assert choice in action.help


def test_masked_padding_is_part_of_the_objective_and_of_no_host() -> None:
    masked = {"mile_objective": "ce", "mile_mask_padded_vocab": True}
    assert changed_settings(masked, {"mile_objective": "ce"}) == ["mask_padded_vocab True -> False"]
    assert changed_settings(masked, {}) == ["mask_padded_vocab True -> False"]
    # Without an objective the flag does nothing, so that nothing has changed.
    idle = {"mile_objective": "none", "mile_mask_padded_vocab": True}
    assert changed_settings(idle, {"mile_objective": "ce"}) == []
