"""Token statistics on a CPU: every step works on a block of rows that stays in cache.

    block of z --> m --> z - m --> e^(z-m) --> S, T, ...   one read of the logits from memory
    block of z, or of e^(z-m) --> gradient                 one read, one write

Plain torch (`reference`) does the same steps on whole tensors and moves each intermediate result
through memory. Here each thread has scratch for one block, in fp32 (fp64 for fp64 logits), whatever
the number of tokens. Consumed logits become e^(z-m) in the forward, so that the backward only
scales them: one exponential per logit instead of two. In bf16 their gradient is rounded twice, by
2^-8 relative each; the target's entry, where p_y - 1 cancels, comes from its coefficient alone.
"""

import math
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
from megatron_mile.ops.token_stats import FOUR, Wanted, reference


def token_stats(
    logits: torch.Tensor, targets: torch.Tensor, consume: bool = False, wanted: Wanted = FOUR
) -> torch.Tensor:
    """Return (m, S, T, z_y) and what is wanted; see `megatron_mile.ops.token_stats.TokenStats`.

    With `consume`, e^(z-m) stands in place of the logits afterwards, except in fp16.
    """
    if logits.size(-1) == 0:
        return reference.token_stats(logits, targets, wanted=wanted)
    logits = logits.detach()
    stats = target_logits(logits, targets, wanted.number)
    if wanted.shifts:
        stats[5] = logits.size(-1)
    consume = consume and _holds_exps(logits.dtype)

    def work(blocks: Iterator[Block]) -> None:
        scratch = _scratch(logits, stats.dtype)
        for rows, (block,) in blocks:
            parts = scratch[:, : len(block)]
            kept = block if consume else None
            block_stats(block, parts, kept, stats[:3, rows], *_more(stats[4:, rows], wanted))

    share_out(work, row_blocks(rows_in_cache(logits), logits))
    return stats.view(wanted.number, *targets.shape)


def _more(stats: torch.Tensor, wanted: Wanted) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return where U and Q go."""
    return stats[0] if wanted.shifts else None, stats[-1] if wanted.squares else None


def token_stats_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    coefficients: Coefficients,
    out: torch.Tensor | None = None,
    consumed: bool = False,
) -> torch.Tensor:
    """Return the gradient, [..., V]; see `megatron_mile.ops.token_stats.TokenStats`."""
    logits = logits.detach()
    out = torch.empty_like(logits) if out is None else out
    if logits.size(-1) == 0:
        return out
    consumed = consumed and _holds_exps(logits.dtype)
    anchor = _anchor(m).reshape(-1, 1)
    factors = coefficients.map(lambda x: x.reshape(-1, 1))

    def work(blocks: Iterator[Block]) -> None:
        scratch = _scratch(logits, m.dtype)
        for rows, (block, grad) in blocks:
            parts = scratch[:, : len(block)]
            mine = factors.part(rows)
            if consumed:
                exps = widened(block, parts[0])
                write_product(exps, mine.flat, grad, parts[0], mine.base)
            else:
                _block_gradient(block, anchor[rows], mine, grad, parts)

    share_out(work, row_blocks(rows_in_cache(logits), logits, out))
    correct_rows(out, targets, coefficients)
    return out


def _holds_exps(dtype: torch.dtype) -> bool:
    """Tell whether e^(z-m) fits the dtype: fp16 ends at 6e-8, where a gradient may still count."""
    return dtype != torch.float16


def _scratch(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return two uninitialised blocks, [2, rows, V]."""
    columns = logits.size(-1)
    rows = min(rows_in_cache(logits), logits.numel() // columns)
    return logits.new_empty(2, rows, columns, dtype=dtype)


def _anchor(m: torch.Tensor) -> torch.Tensor:
    """Return m with a finite number for -inf, because -inf - -inf would be NaN."""
    return m.clamp(min=torch.finfo(m.dtype).min)


def target_logits(logits: torch.Tensor, targets: torch.Tensor, number: int = 4) -> torch.Tensor:
    """Return statistics of tokens, [number, T], of which only z_y is there yet."""
    stats = logits.new_empty(
        number, targets.numel(), dtype=torch.promote_types(logits.dtype, torch.float32)
    )
    z_y = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).flatten()
    stats[3] = z_y.masked_fill(targets.flatten() < 0, torch.nan)
    return stats


def block_stats(
    block: torch.Tensor,
    scratch: torch.Tensor,
    kept: torch.Tensor | None,
    stats: torch.Tensor,
    shifts: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> None:
    """Write (m, S, T) to `stats` [3, rows], and e^(z-m) to `kept`, which may be the block.

    U and Q go where there is a place [rows] for them. Without `kept` the exponentials are left in
    the second half of the scratch [2, rows, V].
    """
    m, total, moment = stats
    logits = widened(block, scratch[0])
    torch.amax(logits, -1, out=m)
    shifted = torch.sub(logits, _anchor(m).unsqueeze(-1), out=scratch[0])
    if shifts is not None:
        torch.sum(shifted, -1, out=shifts)
    direct = kept is not None and kept.dtype == shifted.dtype
    exps = torch.exp(shifted, out=kept if direct else scratch[1])
    if kept is not None and not direct:
        kept.copy_(exps)
    torch.sum(exps, -1, out=total)
    products = shifted.mul_(exps)
    torch.sum(products, -1, out=moment)
    if math.isnan(moment.sum()):  # 0 * -inf of masked logits
        torch.sum(products.masked_fill_(exps == 0, 0), -1, out=moment)
    if squares is not None:
        torch.sum(torch.mul(exps, exps, out=products), -1, out=squares)


def _block_gradient(
    block: torch.Tensor,
    anchor: torch.Tensor,
    coefficients: Coefficients,
    grad: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Write e^(z-m) * (flat + tilt * (z-m)) + base of a block to `grad`, which may be the block."""
    shifted = torch.sub(widened(block, scratch[0]), anchor, out=scratch[0])
    exps = torch.exp(shifted, out=scratch[1])
    factor = coefficients.flat
    if coefficients.tilt is not None:
        factor = shifted.clamp_(min=reference.FLOOR).mul_(coefficients.tilt).add_(factor)
    write_product(exps, factor, grad, exps, coefficients.base)


def write_product(
    exps: torch.Tensor,
    factor: torch.Tensor,
    grad: torch.Tensor,
    scratch: torch.Tensor,
    base: torch.Tensor | None = None,
) -> None:
    """Write exps * factor + base to `grad`, rounded once if it is narrower than the scratch."""
    out = grad if grad.dtype == scratch.dtype else scratch
    torch.mul(exps, factor, out=out)
    if base is not None:
        out.add_(base)
    if out is not grad:
        grad.copy_(out)
