"""Blocks of rows of tensors with any strides, and what implementations do alike with rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple

import torch

# Elements of a block, 1 MiB of fp32. On two cores with 2 MiB of cache each, blocks of a quarter and
# of half (more calls) and of twice that (out of cache) took up to 1.8, 1.3 and 1.2 times as long.
_IN_CACHE = 1 << 18

Block = tuple[slice, tuple[torch.Tensor, ...]]


class Coefficients(NamedTuple):
    """What makes the gradient of a row: e^(z - m) * (flat + tilt * x) + base, `peak` at the target.

    x is z - m where the gradient flows through the entropy, and c - D for EMO. base is there with
    label smoothing. All are of one shape, a number for each row.
    """

    flat: torch.Tensor
    peak: torch.Tensor
    tilt: torch.Tensor | None = None
    base: torch.Tensor | None = None

    @classmethod
    def unstack(cls, stacked: torch.Tensor, based: bool) -> Coefficients:
        """Return them of one tensor, [2 to 4, ...], the last of which is base if there is one."""
        flat, peak, *others = stacked.unbind()
        base = others.pop() if based else None
        return cls(flat, peak, others[0] if others else None, base)

    def present(self) -> list[torch.Tensor]:
        """Return those that are there."""
        return [x for x in self if x is not None]

    def stack(self) -> torch.Tensor:
        """Return those that are there as one tensor, [2 to 4, ...]."""
        return torch.stack(self.present())

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Coefficients:
        """Return them changed."""
        flat, peak, *others = self
        return Coefficients(
            change(flat), change(peak), *(x if x is None else change(x) for x in others)
        )

    def part(self, rows: slice) -> Coefficients:
        """Return those of some rows."""
        return self.map(lambda x: x[rows])

    def are_zero(self) -> torch.Tensor:
        """Return bool [...]: the token gets no gradient."""
        return reduce(torch.logical_and, [x == 0 for x in self.present()])


class Extras(NamedTuple):
    """What is added to w * nll."""

    smoothing: float = 0.0
    """eps of label smoothing, in [0, 1)."""
    z_loss: float = 0.0
    """c of the z-loss, >= 0."""


NOTHING = Extras()


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


def correct_rows(grad: torch.Tensor, targets: torch.Tensor, coefficients: Coefficients) -> None:
    """Write the peaks at the targets of [..., V], and 0 to the rows that get no gradient.

    Args:
        grad: [..., V].
        targets: Local columns, int64 [...]; negative: not in this shard.
        coefficients: Each [...]; a row where all are 0 gets no gradient.
    """
    grad, targets = grad.unsqueeze(0), targets.unsqueeze(0)  # a single token has no dimension
    # By index: scatter_ takes as long for bf16, and a mask for any dtype, as a pass over all.
    held = (targets >= 0).nonzero(as_tuple=True)
    cells = (*held, targets[held])
    grad[cells] = coefficients.peak.unsqueeze(0)[held].to(grad.dtype)
    # A write, because 0 * NaN of a row's logits is NaN.
    grad[coefficients.are_zero().unsqueeze(0).nonzero(as_tuple=True)] = 0
