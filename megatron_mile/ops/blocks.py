"""Blocks of rows of tensors with any strides, and what implementations do alike with rows."""

from collections.abc import Iterator

import torch

# Elements of a block, 1 MiB of fp32. On two cores with 2 MiB of cache each, blocks of a quarter and
# of half (more calls) and of twice that (out of cache) took up to 1.8, 1.3 and 1.2 times as long.
_IN_CACHE = 1 << 18

Block = tuple[slice, tuple[torch.Tensor, ...]]


def row_blocks(size: int, *tensors: torch.Tensor) -> Iterator[Block]:
    """Yield which rows, counted over all leading dimensions, and their views, up to [size, V]."""
    start = 0
    for matrices in _matrices(*tensors):
        for block in zip(*(matrix.split(size) for matrix in matrices), strict=True):
            end = start + len(block[0])
            yield slice(start, end), block
            start = end


def _matrices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield views [n, V] that together are the tensors [..., V], of whatever strides, in order."""
    try:
        yield tuple(tensor.view(-1, tensor.size(-1)) for tensor in tensors)
    except RuntimeError:  # the leading dimensions have no common stride
        for parts in zip(*tensors, strict=True):
            yield from _matrices(*parts)


def rows_in_cache(logits: torch.Tensor) -> int:
    """Return how many rows of V >= 1 columns a CPU's cache holds together with their fp32 copy."""
    return max(1, _IN_CACHE // logits.size(-1))


def widened(block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Return the block in the scratch's dtype: itself, or copied into the scratch.

    An operation on bf16 and fp32 takes longer than this and the same on fp32.
    """
    return block if block.dtype == scratch.dtype else scratch.copy_(block)


def correct_rows(grad: torch.Tensor, targets: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Write the peaks at the targets of [..., V], and 0 to the rows that get no gradient.

    Args:
        grad: [..., V].
        targets: Local columns, int64 [...]; negative: not in this shard.
        coefficients: (flat, peak, ...), [n, ...]; a row where all are 0 gets no gradient.
    """
    grad, targets = grad.unsqueeze(0), targets.unsqueeze(0)  # a single token has no dimension
    # By index: scatter_ takes as long for bf16, and a mask for any dtype, as a pass over all.
    held = (targets >= 0).nonzero(as_tuple=True)
    cells = (*held, targets[held])
    grad[cells] = coefficients[1].unsqueeze(0)[held].to(grad.dtype)
    # A write, because 0 * NaN of a row's logits is NaN.
    grad[(coefficients == 0).all(0).unsqueeze(0).nonzero(as_tuple=True)] = 0
