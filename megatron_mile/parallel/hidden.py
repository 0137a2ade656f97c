"""Hidden states before a vocabulary-parallel projection: what each rank must gather and reduce.

Every rank of the tensor-parallel group projects all tokens onto its part of the vocabulary, so the
gradient of the hidden states is a sum over the group. With sequence parallel each rank holds a part
of the first dimension only. The same collectives as around Megatron's `ColumnParallelLinear`
(megatron/core/tensor_parallel/layers.py).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_mile.parallel import ProcessGroup, all_gather, group_size, reduce_scatter


def gather_sequence(hidden: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """Return the hidden states of all ranks, joined in rank order along the first dimension."""
    size = group_size(group)
    if size == 1:
        return hidden
    whole = hidden.new_empty(size * hidden.size(0), *hidden.shape[1:])
    all_gather(whole, hidden.contiguous(), group=group)
    return whole


def start_reduce(
    grad: torch.Tensor, group: ProcessGroup | None, sequence_parallel: bool
) -> Callable[[], torch.Tensor]:
    """Start to add the gradient up over the group, and return what waits for the sum.

    Args:
        grad: This rank's part of the sum, contiguous, shape of the gathered hidden states.
        group: Tensor-parallel group; None for this rank alone.
        sequence_parallel: The sum is scattered along the first dimension, else all ranks get it.
    """
    size = group_size(group)
    if size == 1:
        return lambda: grad
    out = grad
    if sequence_parallel:
        out = grad.new_empty(grad.size(0) // size, *grad.shape[1:])
        work = reduce_scatter(out, grad, group=group, async_op=True)
    else:
        work = dist.all_reduce(out, group=group, async_op=True)

    def wait() -> torch.Tensor:
        work.wait()
        return out

    return wait
