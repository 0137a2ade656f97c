"""What the user sees: report keys in Megatron's log and TensorBoard, and the start block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.integration.models import data_group
from megatron_mile.parallel.tokens import sum_over_ranks

LM_LOSS = "lm loss"
OWN_FIGURES = ("mile loss", "mile entropy", "mile weight", "mile emo")


def report_with_objective(
    report: dict[str, Any],
    count: torch.Tensor,
    figures: Sequence[torch.Tensor],
    model: Any,
    loss_count: torch.Tensor,
    gamma: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Add the objective's own figures to the host's report of plain cross-entropy.

    All are in the form in which the host reports, and which its training loop therefore reads:
    [sum, count] of this rank (from 0.13), the pair (sum, count) of all DP x CP ranks (0.12), or a
    mean, then that of all DP x CP ranks; an empty report is one of means, because some ranks alone
    may report those. None of ours can be negative, because Megatron's log leaves negative values
    out.

    Args:
        report: What the host's loss function reported of plain cross-entropy.
        count: Sum of this rank's mask, fp64 0-d, as each figure.
        figures: Sums over this rank's tokens, times the mask, in the order of `OWN_FIGURES`: what
            is differentiated, the entropy, the weight, and the distance if there is one.
        model: The model that was run, wrapped or not.
        loss_count: What the first figure's sum is divided by: `count`, or with normalize batch the
            sum of weights.
        gamma: The one of this step where a schedule sets it, 0-d; None elsewhere.

    Returns:
        The report as it was, followed by "mile loss" (what is differentiated), "mile entropy"
        (nats), "mile weight", and "mile emo", the distance, and "mile gamma", if there is one.
    """
    host = report.get(LM_LOSS, next(iter(report.values()), None))
    # In pairs, so that [sum, count] of all figures are made at once.
    counts = [loss_count, *[count] * (len(figures) - 1)]
    named = dict(zip(OWN_FIGURES, zip(figures, counts, strict=True), strict=False))
    if gamma is not None and gamma.dim() == 0:
        named["mile gamma"] = gamma.double(), torch.ones_like(count)
    pairs = torch.stack([x for pair in named.values() for x in pair])
    if not _is_sum_of_this_rank(host):
        pairs = sum_over_ranks(pairs, data_group(model))
    ours = (_in_form_of(host, pair) for pair in pairs.float().view(-1, 2).unbind())
    return {**report, **dict(zip(named, ours, strict=True))}


def _is_sum_of_this_rank(host: Any) -> bool:
    return isinstance(host, torch.Tensor) and host.numel() == 2


def _in_form_of(host: Any, pair: torch.Tensor) -> Any:
    """Return [sum, count] as the host reports it."""
    if _is_sum_of_this_rank(host):
        return pair
    total, count = pair.unbind()
    if isinstance(host, (tuple, list)):
        return total, count
    mean = total / torch.where(count == 0, 1, count)
    return mean.view_as(host) if isinstance(host, torch.Tensor) and host.numel() == 1 else mean


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


def alpha_scope(args: Mapping[str, Any], normalize: str) -> str:
    """Say over how many tokens a job's alpha is formed.

    Args:
        args: Megatron's arguments, of this job or stored with a checkpoint.
        normalize: `ObjectiveConfig.alpha_mode`.
    """
    if normalize == "none":
        return "1 for every token"
    if normalize == "batch":
        sequences, length = (args.get(name) or 1 for name in ("global_batch_size", "seq_length"))
        return f"formed over the whole global batch of {sequences} sequences of {length} tokens"
    micro_batch, length, ranks = (
        args.get(name) or 1 for name in ("micro_batch_size", "seq_length", "data_parallel_size")
    )
    parts = args.get("context_parallel_size") or 1
    tokens = micro_batch * length // parts
    here = f"{tokens} tokens (micro-batch {micro_batch} x sequence {length // parts})"
    ranks *= parts
    return {
        "global": f"formed over {tokens * ranks} tokens in each micro-batch: "
        f"{ranks} DP x CP ranks of {here}",
        "local": f"formed over the {here} of each rank in each micro-batch",
        "official": f"the mean over {ranks} DP x CP ranks, each formed over {here} in each "
        "micro-batch",
    }[normalize]


def start_block(lines: Sequence[tuple[str, str]]) -> str:
    """Lay (name, text) pairs out as the block that rank 0 prints once."""
    width = max(len(name) for name, _ in lines)
    rows = [f"  {name:<{width}}  {text}" for name, text in lines]
    return "\n".join(["> megatron_mile", *rows])
