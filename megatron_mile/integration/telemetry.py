"""What the user sees: report keys in Megatron's log and TensorBoard, and the start block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.models import data_group
from megatron_mile.integration.token_frequencies import BUCKETS
from megatron_mile.parallel.tokens import sum_over_ranks

LM_LOSS = "lm loss"
# Ours, as "mile loss" and so on: all but accuracy are reported where nobody says otherwise.
FIGURES = ("loss", "entropy", "weight", "emo", "accuracy")
_OF_DISTANCE = ("emo",)
OF_BUCKETS = tuple(f"{LM_LOSS} {bucket}" for bucket in BUCKETS)
# Takes the place of a count of 0, by which the host would divide; any other count is the same
# number with and without it, in fp32 and fp64, so that figures are 0 where there is no token.
_NO_TOKENS = 1e-30


class Report(NamedTuple):
    """Which of `FIGURES` are reported."""

    trained: tuple[str, ...] = FIGURES[:-1]
    """In training, where there are such; in this order."""
    evaluated: tuple[str, ...] = ()
    """In evaluation, for which its logits are read once more."""

    @property
    def accuracy(self) -> bool:
        """Whether a training step needs it."""
        return "accuracy" in self.trained

    @classmethod
    def of(cls, names: str | None, config: ObjectiveConfig) -> Report:
        """Read a list with commas between; None is the default.

        Entropy and accuracy that are asked for are reported in evaluation too.

        Raises:
            MileError: A name is unknown, or the objective has no such figure.
        """
        if names is None:
            return cls()
        wanted = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
        known = [x for x in FIGURES if x not in _OF_DISTANCE or config.definition.needs_cost]
        if unknown := [name for name in wanted if name not in known]:
            raise MileError(
                f"--mile-report {names}: {config.objective} has no {unknown[0]!r}; expected some "
                f"of {', '.join(known)}, with commas between"
            )
        return cls(wanted, tuple(name for name in wanted if name in ("entropy", "accuracy")))


def report_with_objective(
    report: dict[str, Any],
    count: torch.Tensor,
    figures: Mapping[str, torch.Tensor],
    model: Any,
    buckets: torch.Tensor | None = None,
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
        figures: Sums over this rank's tokens, times the mask, by their names in `FIGURES`.
        model: The model that was run, wrapped or not.
        buckets: Sum of plain cross-entropy and of the mask in each of `BUCKETS`, fp64 [3, 2].

    Returns:
        The report as it was, followed by the figures, as "mile loss" (what is differentiated),
        "mile entropy" (nats), "mile weight", "mile emo" (the distance), "mile accuracy"; then "lm
        loss high" and so on, with their own counts, if there are buckets, 0 for one without tokens.
    """
    host = report.get(LM_LOSS, next(iter(report.values()), None))
    # In pairs, so that [sum, count] of all figures are made at once.
    given = [value for total in figures.values() for value in (total, count)]
    names = tuple(f"mile {name}" for name in figures)
    if buckets is not None:
        given += torch.stack([buckets[:, 0], buckets[:, 1].clamp(min=_NO_TOKENS)], 1).view(-1)
        names += OF_BUCKETS
    if not given:
        return report
    pairs = torch.stack(given)
    if not _is_sum_of_this_rank(host):
        pairs = sum_over_ranks(pairs, data_group(model))
    ours = (_in_form_of(host, pair) for pair in pairs.float().view(-1, 2).unbind())
    return {**report, **dict(zip(names, ours, strict=True))}


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
