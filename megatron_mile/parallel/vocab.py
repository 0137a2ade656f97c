"""Vocabulary split over the tensor-parallel group: who has what, and what is joined over it."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
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

    def local(self, targets: torch.Tensor) -> torch.Tensor:
        """Return int64 [...]: the target's column in the shard, -1 where it has none."""
        wide = targets.long()
        # Compared before the subtraction, which may overflow for garbage targets.
        return torch.where((wide >= self.start) & (wide < self.end), wide - self.start, -1)


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


def join_stats(stats: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Join the token statistics of all shards, with one all_gather (none for one rank).

    The shards are added in rank order, so that all ranks hold the same bits, and in fp64, which
    costs little for some numbers per token.

    Args:
        stats: This shard's (m, S, T, z_y), contiguous [4, ...], and any further sums of e^(z-m)
            times something, [4 + n, ...].
        group: Tensor-parallel group; None for this rank alone.

    Returns:
        The same of the whole vocabulary, fp64; z_y is NaN where no shard holds the target.
    """
    size = group_size(group)
    if size == 1:
        return stats.double()
    gathered = stats.new_empty(size * stats.size(0), *stats.shape[1:])
    all_gather(gathered, stats, group=group)
    return merge_stats(gathered.view(size, *stats.shape))


def merge_stats(shards: torch.Tensor) -> torch.Tensor:
    """Merge the statistics of shards: [R, 4 + n, ...] to fp64 [4 + n, ...], added in order of R.

    With a_r = e^(m_r - m): m = max m_r, S = sum a_r S_r, T = sum a_r (T_r + (m_r - m) S_r), and
    further sums as S.
    """
    m_r, s_r, t_r, z_r, *more_r = shards.double().unbind(1)
    m = m_r.amax(0)
    # A shard without a finite logit has S_r = T_r = 0: any finite shift leaves it out.
    shift = (m_r - m).masked_fill(m_r == -torch.inf, 0)
    scale = shift.exp()
    total = reduce(torch.add, (scale * s_r).unbind())
    moment = reduce(torch.add, (scale * (t_r + shift * s_r)).unbind())
    z_y = reduce(lambda known, z: torch.where(known.isnan(), z, known), z_r.unbind())
    more = [reduce(torch.add, (scale * x_r).unbind()) for x_r in more_r]
    return torch.stack([m, total, moment, z_y, *more])


def start_lookup(
    rows: torch.Tensor, scale: torch.Tensor, targets: torch.Tensor, shard: VocabShard
) -> Callable[[], torch.Tensor]:
    """Start to bring the targets' scaled rows to every rank, and return what waits for them.

    One all_reduce of [T, d], in which all ranks but one add exact zeros; none for one rank.

    Args:
        rows: The shard's rows of a matrix that is split like the vocabulary, [V/tp, d].
        scale: Their factors, [V/tp].
        targets: Ids in the whole vocabulary, [T].
        shard: What this rank has of it.

    Returns:
        What returns [T, d] in the dtype of `rows`; zeros where no shard holds the row.
    """
    columns = shard.local(targets)
    if len(rows) == 0:
        found = rows.new_zeros(len(columns), rows.size(1))
    else:
        held = columns.clamp(min=0)
        found = rows.index_select(0, held).mul_(scale.index_select(0, held).unsqueeze(-1))
        found.masked_fill_((columns < 0).unsqueeze(-1), 0)
    if group_size(shard.group) == 1:
        return lambda: found
    work = dist.all_reduce(found, group=shard.group, async_op=True)

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
