"""What a checkpoint remembers of its training, compared with the job that resumes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_mile.config import ADDED, defining_settings
from megatron_mile.errors import MileError
from megatron_mile.integration.arguments import (
    NO_OBJECTIVE,
    OUTPUT_LAYER,
    Namespace,
    config_from_namespace,
    has_gamma,
    objective_settings,
)
from megatron_mile.integration.telemetry import alpha_scope
from megatron_mile.objectives import NEED_COST, OBJECTIVES
from megatron_mile.run_record.data import changed_data


def with_resume_check(host: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's own comparison: another objective or other data is an error of ours.

    Unless the job has --mile-allow-change.
    """

    def check_checkpoint_args(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        stored, current = vars(checkpoint_args), vars(get_args())
        for changes, what, same in (
            (changed_settings(stored, current), "another objective", "--mile flags"),
            (changed_data(stored, current), "other data or tokenizer", "ones"),
        ):
            if changes and not current.get("mile_allow_change", False):
                raise MileError(
                    f"the checkpoint was trained with {what}: {'; '.join(changes)}; "
                    f"resume with the same {same}, or add --mile-allow-change"
                )
        _note_other_alpha(stored, current)
        return host(checkpoint_args, *args, **kwargs)

    return check_checkpoint_args


def _note_other_alpha(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Say that a resume forms alpha over other tokens: that weights sequences differently."""
    from megatron.training import print_rank_0

    config = config_from_namespace(Namespace(**current))
    if config is None:
        return
    before, now = (alpha_scope(args, config.alpha_mode) for args in (stored, current))
    if before != now:
        print_rank_0(f"> megatron_mile: alpha was {before}; it is now {now}")


def _resumed_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Read what must not change on resume."""
    settings = objective_settings(stored)
    is_ours = settings["objective"] != NO_OBJECTIVE
    if not is_ours:  # the host itself counts the padding, and adds nothing
        settings |= {name: setting.default for name, setting in ADDED.items()}
    mask = is_ours and stored.get("mile_mask_padded_vocab", False)
    cost = stored.get("mile_emo_cost_digest") or OUTPUT_LAYER
    return {
        **settings,
        **_resumed_ramps(stored),
        "mask_padded_vocab": mask,
        "emo_cost": cost,
        "objective_file": (stored.get("mile_objective_sha256") or "none")[:12],
        "token_frequency": stored.get("mile_token_frequency_digest"),
    }


def _resumed_ramps(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Read gamma's schedule; a decay ends with the run, so that its length is part of it."""
    decay = stored.get("mile_gamma_decay_iters", 0)
    end = f" of {stored.get('train_iters')}" if decay else ""
    return {
        "gamma_warmup": stored.get("mile_gamma_warmup", 0),
        "gamma_decay_iters": f"{decay}{end}",
    }


def changed_settings(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name the settings in which a checkpoint's objective differs from this job's."""
    before, now = _resumed_settings(stored), _resumed_settings(current)
    objective = before["objective"]
    plain = {NO_OBJECTIVE, *(name for name, kind in OBJECTIVES.items() if kind.is_cross_entropy)}
    if {objective, now["objective"]} <= plain:
        names = [*ADDED]
    elif objective != now["objective"]:
        return [f"objective {objective} -> {now['objective']}"]
    else:
        names = defining_settings(objective) + ["emo_cost"] * (objective in NEED_COST)
        names += ["token_frequency"] * bool(OBJECTIVES[objective].inputs)
        names += ["gamma_warmup", "gamma_decay_iters"] if has_gamma(objective) else []
    return [
        f"{name} {before[name]} -> {now[name]}"
        for name in (*names, "objective_file", "mask_padded_vocab")
        if before[name] != now[name]
    ]
