"""Transport on a CPU: every step works on a few rows that stay in cache.

As `token_stats.chunked`, with scratch of a few rows for each thread in fp32 (fp64 for fp64 logits),
instead of intermediate results as large as the block of rows that is given.
"""

from collections.abc import Iterator

import torch

from megatron_mile.ops.blocks import Block, correct_rows, row_blocks, rows_in_cache
from megatron_mile.ops.threads import share_out


def transport_block(
    logits: torch.Tensor,
    products: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
) -> torch.Tensor:
    """Return (R, D), [2, n]; see `megatron_mile.ops.transport.Transport`."""
    sums = m.new_empty(2, len(m), dtype=torch.float64)
    anchor, size = _anchor(m), rows_in_cache(logits)
    # Rows without a target here leave out a column of the scratch that no sum counts.
    left_out = torch.where(targets < 0, logits.size(-1), targets).unsqueeze(-1)

    def work(blocks: Iterator[Block]) -> None:
        scratch = _scratch(logits, m.dtype, size)
        for rows, (block, given) in blocks:
            whole, distances = scratch[:, : len(block)]
            exps = whole[:, :-1]
            torch.sub(block, anchor[rows], out=exps).exp_()
            whole.scatter_(-1, left_out[rows], 0)
            torch.sum(exps, -1, dtype=torch.float64, out=sums[0, rows])
            paid = _distances(given, scale, distances[:, :-1]).mul_(exps)
            torch.sum(paid, -1, dtype=torch.float64, out=sums[1, rows])

    share_out(work, row_blocks(size, logits, products))
    return sums


def transport_block_backward(
    logits: torch.Tensor,
    products: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    mean: torch.Tensor,
    coefficients: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the gradient, [n, V]; see `megatron_mile.ops.transport.Transport`."""
    anchor, size = _anchor(m), rows_in_cache(logits)
    flat, _, slope = coefficients.unsqueeze(-1)
    high, low = mean.unsqueeze(-1)

    def work(blocks: Iterator[Block]) -> None:
        scratch = _scratch(logits, m.dtype, size)
        for rows, (block, given, grad) in blocks:
            exps, factors = scratch[:, : len(block), :-1]
            # Not addcmul_, which takes three times as long as both.
            _distances(given, scale, factors).sub_(high[rows]).sub_(low[rows])
            factors.mul_(slope[rows]).add_(flat[rows])
            torch.sub(block, anchor[rows], out=exps).exp_()
            grad.copy_(exps.mul_(factors))

    share_out(work, row_blocks(size, logits, products, out))
    correct_rows(out, targets, coefficients)


def _anchor(m: torch.Tensor) -> torch.Tensor:
    """Return m as [n, 1], 0 for -inf, because -inf - -inf would be NaN."""
    return m.masked_fill(m == -torch.inf, 0).unsqueeze(-1)


def _scratch(logits: torch.Tensor, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """Return two uninitialised blocks, [2, rows, V + 1]."""
    return logits.new_empty(2, min(rows, len(logits)), logits.size(-1) + 1, dtype=dtype)


def _distances(products: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return c in `out`, [n, V]; a cosine may be rounded beyond 1."""
    out.copy_(products)  # operations on bf16 and fp32 take longer than this and those on fp32
    return torch.addcmul(out.new_ones(1), out, scale, value=-1, out=out).clamp_(0, 2)
