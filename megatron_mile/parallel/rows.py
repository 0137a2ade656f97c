"""Rows of a matrix that is split over the tensor-parallel group like the vocabulary."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_mile.parallel import ProcessGroup, group_size


def start_lookup(
    rows: torch.Tensor, scale: torch.Tensor, columns: torch.Tensor, group: ProcessGroup | None
) -> Callable[[], torch.Tensor]:
    """Start to bring the tokens' scaled rows to every rank, and return what waits for them.

    One all_reduce of [T, d], in which all ranks but one add exact zeros; none for one rank.

    Args:
        rows: This shard's rows, [V/tp, d].
        scale: Their factors, [V/tp].
        columns: Which row of this shard each token asks for, int64 [T]; -1 for one of another.
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


def vocabulary_end(end: int, device: torch.device, group: ProcessGroup | None) -> int:
    """Return the size of the whole vocabulary: the largest `end` of the group's shards."""
    if group_size(group) == 1:
        return end
    largest = torch.tensor(end, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)
