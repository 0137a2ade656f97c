"""Vocabulary split over the tensor-parallel group: who has what, and what is gathered over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_mile.parallel import ProcessGroup, all_gather, group_size


class VocabShard(NamedTuple):
    """What this rank has of the vocabulary: the ids [start, end), without padding."""

    group: ProcessGroup | None
    """Tensor-parallel group that shares the vocabulary; None for this rank alone."""
    start: int
    end: int

    @classmethod
    def of(
        cls,
        columns: int,
        vocab_range: tuple[int, int] | None,
        group: ProcessGroup | None,
        vocab_size: int | None = None,
    ) -> VocabShard:
        """Return this rank's shard.

        Args:
            columns: Size of the logits' last dimension.
            vocab_range: (start, end) of all columns; None for equal shards in rank order of
                `group`. The ranges of a group must tile the vocabulary without gap or overlap,
                which is not checked: it would cost a collective.
            group: Tensor-parallel group; None for this rank alone.
            vocab_size: Ids from here on are padding; None for no padding.

        Raises:
            ValueError: The range does not fit the logits, or the size is not positive.
        """
        start, end = _columns_range(columns, vocab_range, group)
        if vocab_size is None:
            return cls(group, start, end)
        if vocab_size < 1:
            raise ValueError(
                f"vocab_size is {vocab_size}; expected the tokenizer's size, 1 or more"
            )
        return cls(group, start, max(start, min(end, vocab_size)))

    @property
    def columns(self) -> int:
        """How many ids these are: the first columns of the logits, which may have padding."""
        return self.end - self.start


def _columns_range(
    columns: int, vocab_range: tuple[int, int] | None, group: ProcessGroup | None
) -> tuple[int, int]:
    """Return the ids of all columns, padding included."""
    if vocab_range is None:
        rank = dist.get_rank(group) if group_size(group) > 1 else 0
        return rank * columns, (rank + 1) * columns
    start, end = vocab_range
    if not 0 <= start <= end or end - start != columns:
        raise ValueError(
            f"vocab_range is {vocab_range}, but this rank has {columns} columns of the vocabulary; "
            f"expected 0 <= start and end = start + {columns}"
        )
    return start, end


def gather_stats(stats: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Gather the token statistics of all shards, with one all_gather (none for one rank).

    Args:
        stats: This shard's numbers per token, contiguous [n, ...].
        group: Tensor-parallel group; None for this rank alone.

    Returns:
        [R, n, ...] in the order of the ranks.
    """
    size = group_size(group)
    if size == 1:
        return stats.unsqueeze(0)
    gathered = stats.new_empty(size * stats.size(0), *stats.shape[1:])
    all_gather(gathered, stats, group=group)
    return gathered.view(size, *stats.shape)


def start_lookup(
    rows: torch.Tensor, scale: torch.Tensor, columns: torch.Tensor, group: ProcessGroup | None
) -> Callable[[], torch.Tensor]:
    """Start to bring the targets' scaled rows to every rank, and return what waits for them.

    One all_reduce of [T, d], in which all ranks but one add exact zeros; none for one rank.

    Args:
        rows: The shard's rows of a matrix that is split like the vocabulary, [V/tp, d].
        scale: Their factors, [V/tp].
        columns: The targets' rows of this shard, int64 [T], -1 where it has none.
        group: Tensor-parallel group; None for this rank alone.

    Returns:
        What returns [T, d] in the dtype of `rows`; zeros where no shard holds the row.
    """
    if len(rows) == 0:
        found = rows.new_zeros(len(columns), rows.size(1))
    else:
        held = columns.clamp(min=0)
        found = rows.index_select(0, held).mul_(scale.index_select(0, held).unsqueeze(-1))
        found.masked_fill_((columns < 0).unsqueeze(-1), 0)
    if group_size(group) == 1:
        return lambda: found
    work = dist.all_reduce(found, group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return found

    return wait


def vocabulary_end(shard: VocabShard, device: torch.device) -> int:
    """Return the size of the whole vocabulary: the largest end of the group's shards."""
    if group_size(shard.group) == 1:
        return shard.end
    largest = torch.tensor(shard.end, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shard.group)
    return int(largest)
