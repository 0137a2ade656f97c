"""The --mile-* flags: generated from ObjectiveConfig, plus the few that concern the run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.telemetry import Report
from megatron_mile.objective_file import FORM, load_objective
from megatron_mile.objectives import NEED_COST, NEED_INPUTS, OBJECTIVES

Namespace = argparse.Namespace
NO_OBJECTIVE = "none"
MASK_FLAG = "--mile-mask-padded-vocab"
FUSED_FLAG = "--mile-fused-linear"
COST_FLAG = "--mile-emo-cost"
FREQUENCY_FLAG = "--mile-token-frequency"
REPORT_FLAG = "--mile-report"
WARMUP_FLAG = "--mile-gamma-warmup"
DECAY_FLAG = "--mile-gamma-decay-iters"
OUTPUT_LAYER = "output-layer"


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group of --mile-* flags to Megatron's parser, and return the parser."""
    group = parser.add_argument_group(title="megatron_mile", description="training objective")
    for setting in dataclasses.fields(ObjectiveConfig):
        options: dict[str, Any] = {"default": setting.default, "help": setting.metadata["help"]}
        choices = setting.metadata.get("choices")
        if setting.name == "objective":
            choices = None
            options |= {"default": NO_OBJECTIVE, "type": objective_name, "metavar": "OBJECTIVE"}
            options["help"] = (
                f"none leaves the host's own loss untouched; {options['help']}; or {FORM}, an "
                "objective of your own in a Python file, which is run"
            )
        elif isinstance(setting.default, bool):
            options["action"] = "store_true"
        elif choices:
            options["choices"] = choices
        else:
            options["type"] = type(setting.default)
        options["help"] = f"{options['help']} (default {options['default']})"
        group.add_argument(_flag(setting.name), **options)
    group.add_argument(
        MASK_FLAG,
        action="store_true",
        help="leave Megatron's padding columns of the vocabulary out of the softmax in training, "
        "so of nll and entropy, and give them no gradient; evaluation stays the host's, which "
        "counts them (default False)",
    )
    group.add_argument(
        FUSED_FLAG,
        action="store_true",
        help="compute output projection and loss in one, a block of tokens at a time as the start "
        "block says, so that the logits never exist as a whole in training; costs one matrix "
        "product more (default False)",
    )
    group.add_argument(
        COST_FLAG,
        default=OUTPUT_LAYER,
        metavar="SOURCE",
        help="rows whose angles give the distance: output-layer the model's own as it is in each "
        "step, or the path of a fixed matrix: a .npy or .safetensors file, a Hugging Face folder, "
        f"a Megatron checkpoint folder; of any width; used by {', '.join(NEED_COST)} "
        f"(default {OUTPUT_LAYER})",
    )
    _add_report_flags(group)
    _add_ramps(group)
    group.add_argument(
        "--mile-allow-change",
        action="store_true",
        help="resume a checkpoint that was trained with other objective settings or other data "
        "(default False)",
    )
    group.add_argument(
        "--mile-cpu",
        action="store_true",
        help="run on CPUs over gloo; also on with an explicit --distributed-backend gloo on a "
        "machine without a GPU (default False)",
    )
    return parser


def objective_name(word: str) -> str:
    """Return the name of the objective that a command line asks for; a file is run.

    Raises:
        MileError: There is no such objective, or the file has none.
    """
    if word == NO_OBJECTIVE or word in OBJECTIVES:
        return word
    if not (":" in word or word.endswith(".py")):
        names = ", ".join((NO_OBJECTIVE, *OBJECTIVES))
        raise MileError(f"--mile-objective {word!r}: expected one of {names}, or {FORM}")
    try:
        return load_objective(word)
    except ValueError as error:
        raise MileError(f"--mile-objective: {error}") from error


def _add_report_flags(group: Any) -> None:
    """Add the flags that change what is logged, and nothing of what is trained."""
    group.add_argument(
        FREQUENCY_FLAG,
        metavar="FILE",
        help="what tools/token_frequency.py wrote: adds the plain losses of its high, medium and "
        "low frequency tokens to log and TensorBoard, in training and evaluation; needed by "
        f"{', '.join(NEED_INPUTS)} (default None)",
    )
    group.add_argument(
        REPORT_FLAG,
        metavar="LIST",
        help="figures in log and TensorBoard, with commas between: loss, entropy, weight, emo, "
        "z loss, a schedule's gamma, accuracy the share of tokens whose target has the largest "
        "logit; entropy and accuracy that are named are reported in evaluation too, which then "
        "reads the logits once more; None is all but accuracy, in training (default None)",
    )


def _add_ramps(group: Any) -> None:
    """Add the flags of gamma's schedule to an argument group."""
    for flag, ramp in (
        (WARMUP_FLAG, "from 0 to its value over the first N: iteration t + 1 has gamma * t / N"),
        (DECAY_FLAG, "from its value to 0 over the last N before --train-iters: the last has 0"),
    ):
        group.add_argument(
            flag,
            type=_iterations,
            default=0,
            metavar="N",
            help=f"ramp gamma {ramp}; counts iterations, goes on from a checkpoint's; 0 is none; "
            f"used by {', '.join(filter(has_gamma, OBJECTIVES))} (default 0)",
        )


def _iterations(text: str) -> int:
    """Read a number of iterations."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number of iterations; expected 0 or more")
    return int(text)


def has_gamma(objective: str) -> bool:
    """Whether an objective has the setting gamma, so that it may have a schedule."""
    return any(setting.name == "gamma" for setting in OBJECTIVES[objective].settings)


def given(argv: Sequence[str]) -> list[str]:
    """The --mile-* words of a command line."""
    return [word for word in argv if word.startswith("--mile-")]


def parse(argv: Sequence[str]) -> Namespace:
    """Read the --mile-* flags of a job's command line and leave the rest to Megatron.

    Raises:
        MileError: A flag is unknown or has a value that does not fit.
    """
    parser = add_arguments(_OneLineParser(add_help=False, allow_abbrev=False))
    namespace, others = parser.parse_known_args(list(argv))
    for word in given(others):
        flag = word.split("=", 1)[0]
        known = [name for action in parser._actions for name in action.option_strings]
        close = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the flags are {', '.join(known)}"
        raise MileError(f"unknown flag {flag}; {hint}")
    config = config_from_namespace(namespace)
    flags = {word.split("=", 1)[0] for word in given(argv)}
    if config is None:
        _refuse_without_objective(flags)
    else:
        _refuse_combination(config, flags)
        report = Report.of(namespace.mile_report, config)
        has_ramps = namespace.mile_gamma_warmup or namespace.mile_gamma_decay_iters
        if namespace.mile_report and "gamma" in report.trained and not has_ramps:
            raise MileError(
                f"{REPORT_FLAG} {namespace.mile_report}: gamma stays as it is without "
                f"{WARMUP_FLAG} or {DECAY_FLAG}; leave it out"
            )
    return namespace


def config_from_namespace(namespace: Namespace) -> ObjectiveConfig | None:
    """Build the objective from parsed flags (Megatron's args or `parse`'s); None for "none".

    Raises:
        MileError: The settings do not fit.
    """
    values = objective_settings(vars(namespace))
    if values["objective"] == NO_OBJECTIVE:
        return None
    try:
        return ObjectiveConfig(**values)
    except ValueError as error:
        raise MileError(f"--mile flags: {error}") from error


def _refuse_combination(config: ObjectiveConfig, flags: set[str]) -> None:
    """Stop a job whose flags do not fit its objective."""
    objective = config.objective
    own = {_flag(setting.name) for setting in config.definition.settings}
    check_objective(config, FUSED_FLAG in flags)
    if config.definition.inputs and FREQUENCY_FLAG not in flags:
        raise MileError(
            f"--mile-objective {objective} needs {FREQUENCY_FLAG} FILE; make the file with "
            "tools/token_frequency.py"
        )
    ramps = sorted(flags & {WARMUP_FLAG, DECAY_FLAG})
    if ramps and not has_gamma(objective):
        raise MileError(
            f"{', '.join(ramps)} with --mile-objective {objective}, which has no gamma; leave it "
            "out"
        )
    for other in OBJECTIVES:
        unused = sorted(flag for flag in flags - own if flag.startswith(_flag(other) + "-"))
        if unused and other != objective:
            raise MileError(
                f"{', '.join(unused)} with --mile-objective {objective}, but only {other} has it; "
                f"leave it out, or add --mile-objective {other}"
            )


def check_objective(config: ObjectiveConfig, fused_linear: bool, has_rows: bool = False) -> None:
    """Raise unless the objective takes a fused projection or cost rows where they are given."""
    name, needs_cost = config.objective, config.definition.needs_cost
    if fused_linear and needs_cost:
        raise MileError(
            f"{FUSED_FLAG} (fused_linear=True) cannot be combined with the objective {name}, which "
            "reads the logits twice; leave it out"
        )
    if has_rows and not needs_cost:
        raise MileError(f"cost rows with the objective {name}; they are for {', '.join(NEED_COST)}")


def _flag(setting: str) -> str:
    """The flag of a setting of ObjectiveConfig."""
    return "--mile-" + setting.replace("_", "-")


def _refuse_without_objective(flags: set[str]) -> None:
    """Stop a job that sets up an objective without asking for one.

    With an explicit none, settings may stay as they are beside the job that has an objective.
    """
    of_a_run = {MASK_FLAG, FUSED_FLAG, COST_FLAG, FREQUENCY_FLAG, REPORT_FLAG}
    settings = {_flag(setting.name) for setting in dataclasses.fields(ObjectiveConfig)}
    settings |= {WARMUP_FLAG, DECAY_FLAG}
    useless = flags & (of_a_run if _flag("objective") in flags else of_a_run | settings)
    if useless:
        default = ObjectiveConfig().objective
        others = ", ".join(name for name in OBJECTIVES if name != default)
        raise MileError(
            f"{', '.join(sorted(useless))} without an objective; add --mile-objective {default} "
            f"(or {others}), or leave it out"
        )


def objective_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Read the mile_* entries of Megatron's args; absent ones have their defaults."""
    values = {
        setting.name: stored.get("mile_" + setting.name, setting.default)
        for setting in dataclasses.fields(ObjectiveConfig)
    }
    values["objective"] = stored.get("mile_objective", NO_OBJECTIVE)
    return values


class _OneLineParser(argparse.ArgumentParser):
    """argparse without its page of usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        raise MileError(message)
