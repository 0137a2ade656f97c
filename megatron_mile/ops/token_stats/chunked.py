"""Token statistics on a CPU: every step works on a block of rows that stays in cache.

    block of z --> m --> z - m --> e^(z-m) --> S, T      one read of the logits from memory
    block of z, or of e^(z-m) --> gradient               one read, one write

Plain torch (`reference`) does the same steps on whole tensors and moves each intermediate result
through memory. Here each thread has scratch for one block, in fp32 (fp64 for fp64 logits), whatever
the number of tokens. Consumed logits become e^(z-m) in the forward, so that the backward only
scales them: one exponential per logit instead of two. In bf16 their gradient is rounded twice, by
2^-8 relative each; the target's entry, where p_y - 1 cancels, comes from its coefficient alone.
"""

import math
from collections.abc import Iterator

import torch

from megatron_mile.ops.threads import share_out
from megatron_mile.ops.token_stats import reference

# Elements of a block. 512 KiB of fp32 share a cache of 2 MiB with the logits they come from; blocks
# of a quarter (more calls) and four times larger (out of cache) took 1.4 and 1.5 times as long.
_BLOCK = 1 << 17

_Block = tuple[slice, tuple[torch.Tensor, ...]]


def token_stats(logits: torch.Tensor, targets: torch.Tensor, consume: bool = False) -> torch.Tensor:
    """Return (m, S, T, z_y), [4, ...]; see `megatron_mile.ops.token_stats.TokenStats`.

    With `consume`, e^(z-m) stands in place of the logits afterwards, except in fp16.
    """
    if logits.size(-1) == 0:
        return reference.token_stats(logits, targets)
    logits = logits.detach()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stats = logits.new_empty(4, targets.numel(), dtype=dtype)
    z_y = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).flatten()
    stats[3] = z_y.masked_fill(targets.flatten() < 0, torch.nan)
    consume = consume and _holds_exps(logits.dtype)

    def work(blocks: Iterator[_Block]) -> None:
        scratch = _scratch(logits, dtype)
        for rows, (block,) in blocks:
            parts = scratch[:, : len(block)]
            _block_stats(block, parts, block if consume else None, stats[:3, rows])

    share_out(work, _blocks(logits))
    return stats.view(4, *targets.shape)


def token_stats_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    coefficients: torch.Tensor,
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
    factors = coefficients.reshape(len(coefficients), -1, 1)

    def work(blocks: Iterator[_Block]) -> None:
        scratch = _scratch(logits, m.dtype)
        for rows, (block, grad) in blocks:
            parts = scratch[:, : len(block)]
            if consumed:
                _scale(_widened(block, parts[0]), factors[0, rows], grad, parts[0])
            else:
                _block_gradient(block, anchor[rows], factors[:, rows], grad, parts)

    share_out(work, _blocks(logits, out))
    _correct_rows(out.unsqueeze(0), targets.unsqueeze(0), coefficients.unsqueeze(1))
    return out


def _holds_exps(dtype: torch.dtype) -> bool:
    """Tell whether e^(z-m) fits the dtype: fp16 ends at 6e-8, where a gradient may still count."""
    return dtype != torch.float16


def _rows_per_block(columns: int) -> int:
    return max(1, _BLOCK // columns)


def _scratch(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return two uninitialised blocks, [2, rows, V]."""
    columns = logits.size(-1)
    rows = min(_rows_per_block(columns), logits.numel() // columns)
    return logits.new_empty(2, rows, columns, dtype=dtype)


def _blocks(*tensors: torch.Tensor) -> Iterator[_Block]:
    """Yield which rows, counted over all leading dimensions, and their views [rows, V]."""
    size, start = _rows_per_block(tensors[0].size(-1)), 0
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


def _anchor(m: torch.Tensor) -> torch.Tensor:
    """Return m with a finite number for -inf, because -inf - -inf would be NaN."""
    return m.clamp(min=torch.finfo(m.dtype).min)


def _widened(block: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """Return the block in the scratch's dtype: itself, or copied into the scratch."""
    return block if block.dtype == scratch.dtype else scratch.copy_(block)


def _block_stats(
    block: torch.Tensor, scratch: torch.Tensor, kept: torch.Tensor | None, stats: torch.Tensor
) -> None:
    """Write (m, S, T) to `stats` [3, rows] and e^(z-m) to `kept`, which may be the block."""
    m, total, moment = stats
    logits = _widened(block, scratch[0])
    torch.amax(logits, -1, out=m)
    shifted = torch.sub(logits, _anchor(m).unsqueeze(-1), out=scratch[0])
    direct = kept is not None and kept.dtype == shifted.dtype
    exps = torch.exp(shifted, out=kept if direct else scratch[1])
    if kept is not None and not direct:
        kept.copy_(exps)
    torch.sum(exps, -1, out=total)
    products = shifted.mul_(exps)
    torch.sum(products, -1, out=moment)
    if math.isnan(moment.sum()):  # 0 * -inf of masked logits
        torch.sum(products.masked_fill_(exps == 0, 0), -1, out=moment)


def _block_gradient(
    block: torch.Tensor,
    anchor: torch.Tensor,
    coefficients: torch.Tensor,
    grad: torch.Tensor,
    scratch: torch.Tensor,
) -> None:
    """Write e^(z-m) * (flat + tilt * (z-m)) of a block to `grad`, which may be the block."""
    flat, _, *tilt = coefficients
    shifted = torch.sub(_widened(block, scratch[0]), anchor, out=scratch[0])
    exps = torch.exp(shifted, out=scratch[1])
    factor = flat
    if tilt:
        factor = shifted.clamp_(min=reference.FLOOR).mul_(tilt[0]).add_(flat)
    _scale(exps, factor, grad, exps)


def _scale(
    exps: torch.Tensor, factor: torch.Tensor, grad: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Write exps * factor to `grad`, rounded once if it is narrower than the scratch."""
    if grad.dtype == scratch.dtype:
        torch.mul(exps, factor, out=grad)
    else:
        grad.copy_(torch.mul(exps, factor, out=scratch))


def _correct_rows(grad: torch.Tensor, targets: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Write the peaks at the targets, and 0 to the rows that get no gradient."""
    # By index: scatter_ takes as long for bf16, and a mask for any dtype, as a pass over all.
    held = (targets >= 0).nonzero(as_tuple=True)
    cells = (*held, targets[held])
    grad[cells] = coefficients[1][held].to(grad.dtype)
    # A write, because 0 * NaN of a row's logits is NaN.
    grad[(coefficients == 0).all(0).nonzero(as_tuple=True)] = 0
