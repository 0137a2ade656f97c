"""What the user sees: report keys in Megatron's log and TensorBoard, and the start block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import TokenLoss
from megatron_mile.parallel.tokens import masked

LM_LOSS = "lm loss"


def report_with_objective(
    report: dict[str, Any], stats: TokenLoss, objective: torch.Tensor, mask: torch.Tensor
) -> dict[str, Any]:
    """Make "lm loss" plain cross-entropy again and add the objective's own figures.

    Megatron sums each [sum, count] over micro-batches and ranks and prints the quotient; none of
    ours can be negative, because its log leaves negative values out.

    Args:
        report: What the host's loss function reported of the objective.
        stats: Statistics of this micro-batch, fields [b, s].
        objective: Loss per token that is differentiated, [b, s].
        mask: Loss mask [b, s].

    Returns:
        The report with "lm loss" in the form the host gave it ([sum, count], or a mean), followed
        by "mile loss" (what is differentiated), "mile entropy" (nats) and "mile weight".
    """
    count = mask.double().sum()

    def pair(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([masked(values, mask).sum(), count]).float()

    plain = pair(stats.nll)
    host = report.get(LM_LOSS)
    if isinstance(host, torch.Tensor) and host.numel() == 1:
        plain = (plain[0] / plain[1].clamp(min=1)).view_as(host)
    return {
        LM_LOSS: plain,
        **{key: value for key, value in report.items() if key != LM_LOSS},
        "mile loss": pair(objective),
        "mile entropy": pair(stats.entropy),
        "mile weight": pair(stats.weight),
    }


def describe(config: ObjectiveConfig) -> str:
    """One line that says what is optimised."""
    if config.objective == "ce":
        return "ce (plain cross-entropy through megatron_mile)"
    settings = [f"gamma {config.gamma:g}"]
    if config.objective == "mile":
        settings.append(f"sigma {config.sigma:g} nats")
    settings.append(f"alpha {config.normalize}")
    through = config.entropy_grad and config.objective == "mile"
    settings.append("gradient through the entropy" if through else "weights detached")
    return f"{config.objective} ({', '.join(settings)})"


def start_block(lines: Sequence[tuple[str, str]]) -> str:
    """Lay (name, text) pairs out as the block that rank 0 prints once."""
    width = max(len(name) for name, _ in lines)
    rows = [f"  {name:<{width}}  {text}" for name, text in lines]
    return "\n".join(["> megatron_mile", *rows])
