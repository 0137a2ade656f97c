"""EMO's statistics on a CPU: every step works on a few rows that stay in cache.

As `token_stats.chunked`, with scratch of a few rows for each thread in fp32 (fp64 for fp64 logits),
instead of intermediate results as large as the block of rows that is given.
"""

from collections.abc import Iterator

import torch

from megatron_mile.ops.blocks import (
    Block,
    Coefficients,
    correct_rows,
    row_blocks,
    rows_in_cache,
    widened,
)
from megatron_mile.ops.threads import share_out
from megatron_mile.ops.token_stats.chunked import block_stats, target_logits, write_product

# Sum of e^(z-m) from which on no token has more than a quarter of the mass.
_SPREAD = 4


def emo_stats(
    logits: torch.Tensor,
    products: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Return (m, S, T, z_y, R, C), [6, n]; see `megatron_mile.ops.emo.EmoStats`."""
    stats = target_logits(logits, targets)
    sums, exact = torch.empty_like(stats[:2]), dict[int, float]()  # exact: C of some rows
    size = rows_in_cache(logits)
    # Rows without a target here leave out a column of the scratch that no sum counts.
    left_out = torch.where(targets < 0, logits.size(-1), targets).unsqueeze(-1)

    def work(blocks: Iterator[Block]) -> None:
        scratch = _scratch(logits, stats.dtype, size)
        for rows, (block, given) in blocks:
            parts = scratch[:, : len(block)]
            costs, exps = parts[..., :-1]
            block_stats(block, parts[..., :-1], None, stats[:3, rows])
            parts[1].scatter_(-1, left_out[rows], 0)
            terms = _costs(given, scale, costs).mul_(exps)
            torch.sum(exps, -1, out=sums[0, rows])
            torch.sum(terms, -1, out=sums[1, rows])
            certain = [i for i, rest in enumerate(sums[0, rows].tolist()) if 1 <= rest < _SPREAD]
            if certain:
                found = _cost(sums[:, rows][:, certain], exps[certain], terms[certain])
                exact.update(zip([rows.start + i for i in certain], found, strict=True))

    share_out(work, row_blocks(size, logits, products))
    wide = torch.cat([stats, sums]).double()
    wide[5, [*exact]] = wide.new_tensor([*exact.values()])
    return wide


def emo_stats_backward(
    logits: torch.Tensor,
    products: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    distance: torch.Tensor,
    coefficients: Coefficients,
    out: torch.Tensor,
) -> None:
    """Write the gradient, [n, V]; see `megatron_mile.ops.emo.EmoStats`."""
    anchor, size = _anchor(m), rows_in_cache(logits)
    flat, _, tilt, _ = coefficients.map(lambda x: x.unsqueeze(-1))
    assert tilt is not None

    def work(blocks: Iterator[Block]) -> None:
        scratch = _scratch(logits, m.dtype, size)
        for rows, (block, given, grad) in blocks:
            exps, factors = scratch[:, : len(block), :-1]
            # Not addcmul_, which takes three times as long as both.
            _costs(given, scale, factors).sub_(distance[rows].unsqueeze(-1))
            factors.mul_(tilt[rows]).add_(flat[rows])
            torch.sub(widened(block, exps), anchor[rows], out=exps).exp_()
            write_product(exps, factors, grad, exps)

    share_out(work, row_blocks(size, logits, products, out))
    correct_rows(out, targets, coefficients)


def _cost(sums: torch.Tensor, exps: torch.Tensor, terms: torch.Tensor) -> list[float]:
    """Return C of rows [n, V] whose mass may lie on one token, exact in its ratio to the rounded R.

    It is about that token's cost times R, and what is left of the sum is small.
    """
    rest, total = sums
    mean = total / rest
    left = torch.sub(terms, exps * mean.unsqueeze(-1)).sum(-1)
    found: list[float] = (rest.double() * mean.double() + left).tolist()
    return found


def _anchor(m: torch.Tensor) -> torch.Tensor:
    """Return m as [n, 1], 0 for -inf, because -inf - -inf would be NaN."""
    return m.masked_fill(m == -torch.inf, 0).unsqueeze(-1)


def _scratch(logits: torch.Tensor, dtype: torch.dtype, rows: int) -> torch.Tensor:
    """Return two uninitialised blocks, [2, rows, V + 1]."""
    return logits.new_empty(2, min(rows, len(logits)), logits.size(-1) + 1, dtype=dtype)


def _costs(products: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Return c in `out`, [n, V]; a cosine may be rounded beyond 1."""
    given = widened(products, out)
    return torch.addcmul(out.new_ones(1), given, scale, value=-1, out=out).clamp_(0, 2)
