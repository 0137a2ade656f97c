"""The schedule of gamma in a job: made when the run's length is known, set before each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.arguments import DECAY_FLAG, WARMUP_FLAG, Namespace
from megatron_mile.schedule import GammaSchedule

_running: GammaSchedule | None = None


def has_schedule(args: Namespace) -> bool:
    """Whether a job's flags ask for a schedule."""
    return bool(args.mile_gamma_warmup or args.mile_gamma_decay_iters)


def start_schedule(
    args: Namespace, config: ObjectiveConfig, device: torch.device
) -> GammaSchedule | None:
    """Make the schedule that a job's flags ask for, in the place of an earlier job's.

    Args:
        args: Megatron's, with the run's length.
        config: The objective.
        device: The model's.

    Raises:
        MileError: It does not fit the run.
    """
    global _running
    _running = None
    if has_schedule(args):
        ramps = args.mile_gamma_warmup, args.mile_gamma_decay_iters
        try:
            _running = GammaSchedule(config, *ramps, args.train_iters, device)
        except ValueError as error:
            raise MileError(f"{WARMUP_FLAG}, {DECAY_FLAG}: {error}") from error
    return _running


def with_gamma(host: Callable[..., Any]) -> Callable[..., Any]:
    """Set gamma before a training step, outside of what CUDA graphs capture.

    The iteration is Megatron's: it goes on from the checkpoint's, counts steps that are skipped,
    and stays where the rerun state machine repeats a step. Evaluation makes no training step.
    """

    def train_step(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        if _running is not None:
            _running.update(get_args().curr_iteration)
        return host(*args, **kwargs)

    return train_step


def schedule_lines(schedule: GammaSchedule | None) -> list[tuple[str, str]]:
    """Say in the start block how gamma runs."""
    if schedule is None:
        return []
    parts = [f"0 to {schedule.config.gamma:g} over the first {schedule.warmup}"]
    parts = parts if schedule.warmup else []
    if schedule.decay:
        parts.append(f"to 0 over the last {schedule.decay} of {schedule.train_iters}")
    return [("gamma", ", ".join(parts) + " iterations")]
