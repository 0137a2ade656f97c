"""What the user sees: report keys in Megatron's log and TensorBoard, and the start block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.integration.models import data_group
from megatron_mile.loss import TokenLoss
from megatron_mile.parallel.tokens import masked, sum_over_ranks

LM_LOSS = "lm loss"
OWN_FIGURES = ("mile loss", "mile entropy", "mile weight", "mile emo")


def report_with_objective(
    report: dict[str, Any],
    stats: TokenLoss,
    objective: torch.Tensor,
    mask: torch.Tensor,
    model: Any,
) -> dict[str, Any]:
    """Make "lm loss" plain cross-entropy again and add the objective's own figures.

    All are in the form in which the host reports, and which its training loop therefore reads:
    [sum, count] of this rank (from 0.13), the pair (sum, count) of all DP x CP ranks (0.12), or a
    mean. None of ours can be negative, because Megatron's log leaves negative values out.

    Args:
        report: What the host's loss function reported of the objective.
        stats: Statistics of this micro-batch, fields [b, s].
        objective: Loss per token that is differentiated, [b, s].
        mask: Loss mask [b, s].
        model: The model that was run, wrapped or not.

    Returns:
        The report with its "lm loss" replaced, followed by "mile loss" (what is differentiated),
        "mile entropy" (nats), "mile weight", and "mile emo", the distance, if there is one.
    """
    figures = [stats.nll, objective, stats.entropy, stats.weight]
    figures += [] if stats.emo is None else [stats.emo]
    sums = torch.stack([*(masked(values, mask).sum() for values in figures), mask.double().sum()])
    host = report.get(LM_LOSS, next(iter(report.values()), None))
    if isinstance(host, (tuple, list)):
        sums = sum_over_ranks(sums, data_group(model))
    *totals, count = sums.float()
    plain, *ours = (_in_form_of(host, total, count) for total in totals)
    others = {key: value for key, value in report.items() if key != LM_LOSS}
    return {LM_LOSS: plain, **others, **dict(zip(OWN_FIGURES, ours, strict=False))}


def _in_form_of(host: Any, total: torch.Tensor, count: torch.Tensor) -> Any:
    if isinstance(host, (tuple, list)):
        return total, count
    if isinstance(host, torch.Tensor) and host.numel() == 1:
        return (total / count.clamp(min=1)).view_as(host)
    return torch.stack([total, count])


def token_count(figure: Any) -> float | None:
    """The count of a reported (sum, count) in either form; None if there is none."""
    if isinstance(figure, (tuple, list)):
        return float(figure[1])
    if isinstance(figure, torch.Tensor) and figure.numel() == 2:
        return float(figure.view(-1)[1])
    return None


def describe(config: ObjectiveConfig) -> str:
    """One line that says what is optimised."""
    objective = config.definition
    if objective.is_cross_entropy:
        return f"{objective.name} (plain cross-entropy through megatron_mile)"
    parts = [setting.describe(config.own[setting.name]) for setting in objective.settings]
    if objective.weight is not None:
        through = config.entropy_slope is not None
        parts += [f"alpha {config.normalize}"]
        parts += ["gradient through the entropy" if through else "weights detached"]
    return f"{objective.name} ({', '.join(filter(None, parts))})"


def start_block(lines: Sequence[tuple[str, str]]) -> str:
    """Lay (name, text) pairs out as the block that rank 0 prints once."""
    width = max(len(name) for name, _ in lines)
    rows = [f"  {name:<{width}}  {text}" for name, text in lines]
    return "\n".join(["> megatron_mile", *rows])
