"""Token statistics as two Triton kernels, for fp32, bf16 and fp16 logits.

    forward    z [N, V]  --one read-->  (m, S, T, z_y) [4, N] fp32        one program per row
                  the caller joins the shards of the vocabulary and forms the coefficients
    backward   z [N, V], 2 or 3 coefficients [N]  --one read, one write-->  gradient [N, V]
                                                                one program per row and tile

Two kernels, because a row's gradient needs the statistics of all shards. Both compute in fp32 and
round once, when the gradient is stored. There is no atomic operation, so that a result depends on
nothing but its row; nothing waits for the device, and no shape or block size depends on the data.

Rows may lie at two strides ([s, b, V] and slices of it are read where they are); other layouts are
made contiguous first. The launchers are custom operators, so that torch.compile passes over them
and functionalises the one that writes.

With TRITON_INTERPRET=1 in the environment when Triton is first imported, the same code runs on CPU
tensors, slowly.
"""

import torch
import triton
import triton.language as tl

from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats import reference

_FLOOR = tl.constexpr(reference.FLOOR)
_MINUS_INF = tl.constexpr(-torch.inf)


@triton.jit
def _row_start(
    pointer: tl.tensor,
    row: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
) -> tl.tensor:
    """Return the address of row `row` of [outer, inner, V]; 64 bits, as logits pass 2^31."""
    outer = (row // inner).to(tl.int64)
    return pointer + outer * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def token_stats_fwd_kernel(
    logits: tl.tensor,  # [outer, inner, V] fp32, bf16 or fp16, read-only
    outer_stride: tl.tensor,  # in elements, as inner_stride; the last dimension has stride 1
    inner_stride: tl.tensor,
    targets: tl.tensor,  # [N = outer * inner] int64, read-only; negative: not in this shard
    stats: tl.tensor,  # [4, N] fp32, written: m, S, T, z_y
    rows: tl.tensor,  # N
    inner: tl.tensor,
    columns: tl.tensor,  # V
    BLOCK: tl.constexpr,
) -> None:
    """Write (m, S, T, z_y) of one row, tile after tile.

    Lane j keeps S and T of the columns j, j + BLOCK, ... and all lanes share the running maximum:
    one reduction per tile, one exponential per logit. The lanes are added once, at the end.
    """
    row = tl.program_id(0)
    start = _row_start(logits, row, inner, outer_stride, inner_stride)
    lanes = tl.arange(0, BLOCK)
    m = tl.full([], _MINUS_INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        inside = lanes < columns - first
        z = tl.load(start + first + lanes, mask=inside, other=_MINUS_INF).to(tl.float32)
        new_m = tl.maximum(m, tl.max(z, 0))
        if new_m > m:
            # Sums of nothing but masked logits are 0: any finite shift keeps them.
            shift = tl.where(m == _MINUS_INF, 0.0, m - new_m)
            moment = tl.exp(shift) * (moment + shift * total)
            total *= tl.exp(shift)
            m = new_m
        shifted = z - tl.where(m == _MINUS_INF, 0.0, m)
        exps = tl.exp(shifted)
        # The floor makes 0 * -inf of masked logits 0, and NaN stays in e^NaN.
        moment += exps * tl.maximum(shifted, _FLOOR)
        total += exps
    target = tl.load(targets + row)
    z_y = tl.load(start + target, mask=target >= 0, other=0.0).to(tl.float32)
    out = stats + row.to(tl.int64)
    tl.store(out, m)
    out += rows
    tl.store(out, tl.sum(total, 0))
    out += rows
    tl.store(out, tl.sum(moment, 0))
    out += rows
    tl.store(out, tl.where(target >= 0, z_y, float("nan")))


@triton.jit
def token_stats_bwd_kernel(
    logits: tl.tensor,  # [outer, inner, V] fp32, bf16 or fp16, read-only unless it is grad
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    grad: tl.tensor,  # [outer, inner, V] in the logits' dtype, written; may be the logits
    grad_outer_stride: tl.tensor,
    grad_inner_stride: tl.tensor,
    targets: tl.tensor,  # [N] int64, read-only
    maxima: tl.tensor,  # [N] fp32, read-only: m of the forward
    flats: tl.tensor,  # [N] fp32, read-only, as peaks and tilts
    peaks: tl.tensor,
    tilts: tl.tensor,  # not read unless TILTED
    inner: tl.tensor,
    columns: tl.tensor,  # V
    BLOCK: tl.constexpr,
    TILTED: tl.constexpr,
) -> None:
    """Write one tile of a row: e^(z-m) * (flat + tilt * (z-m)), and peak at the target."""
    row = tl.program_id(0)
    number = row.to(tl.int64)
    cells = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < columns
    m = tl.load(maxima + number)
    flat = tl.load(flats + number)
    peak = tl.load(peaks + number)
    start = _row_start(logits, row, inner, outer_stride, inner_stride)
    z = tl.load(start + cells, mask=inside, other=_MINUS_INF).to(tl.float32)
    shifted = z - tl.where(m == _MINUS_INF, 0.0, m)
    is_zero = (flat == 0) & (peak == 0)
    factor = flat
    if TILTED:
        tilt = tl.load(tilts + number)
        is_zero = is_zero & (tilt == 0)
        factor = flat + tilt * tl.maximum(shifted, _FLOOR)
    value = tl.exp(shifted) * factor
    value = tl.where(cells == tl.load(targets + number), peak, value)
    # A select, because 0 * NaN of a row's logits is NaN.
    value = tl.where(is_zero, 0.0, value)
    out = _row_start(grad, row, inner, grad_outer_stride, grad_inner_stride)
    tl.store(out + cells, value.to(grad.dtype.element_ty), mask=inside)


# Whether the kernels run in Triton's interpreter, on tensors of any device.
INTERPRETED = not isinstance(token_stats_fwd_kernel, triton.JITFunction)


def token_stats(logits: torch.Tensor, targets: torch.Tensor, consume: bool = False) -> torch.Tensor:
    """Return (m, S, T, z_y), [4, ...]; see `megatron_mile.ops.token_stats.TokenStats`.

    Consumed logits stay as they are until the backward, which reads them anyway.
    """
    return _forward(logits.detach(), targets)


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
    _backward(logits, targets, m, *coefficients, out)
    return out


@torch.library.custom_op("megatron_mile::token_stats", mutates_args=())
def _forward(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    stats = _forward_result(logits, targets)
    rows = targets.numel()
    if rows == 0:
        return stats
    logits = _in_rows(logits)
    block, warps = _launch_size(logits.size(-1))
    with torch.cuda.device_of(logits):
        token_stats_fwd_kernel[(rows,)](
            logits,
            *logits.stride()[:2],
            targets.contiguous(),
            stats,
            rows,
            *logits.shape[1:],
            BLOCK=block,
            num_warps=warps,
        )
    return stats


@_forward.register_fake
def _forward_result(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(4, *targets.shape, dtype=torch.float32)


@torch.library.custom_op("megatron_mile::token_stats_backward", mutates_args=("out",))
def _backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    flat: torch.Tensor,
    peak: torch.Tensor,
    tilt: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if logits.numel() == 0:
        return
    # The interpreter cuts off to bf16 where a GPU rounds, so torch does it there.
    wide = INTERPRETED and out.dtype == torch.bfloat16
    grad = _in_rows(torch.empty_like(out, dtype=torch.float32) if wide else out)
    logits = _in_rows(logits)
    block, warps = _launch_size(logits.size(-1))
    with torch.cuda.device_of(logits):
        token_stats_bwd_kernel[(targets.numel(), triton.cdiv(logits.size(-1), block))](
            logits,
            *logits.stride()[:2],
            grad,
            *grad.stride()[:2],
            targets.contiguous(),
            m.contiguous(),
            flat.contiguous(),
            peak.contiguous(),
            (flat if tilt is None else tilt).contiguous(),
            *logits.shape[1:],
            BLOCK=block,
            TILTED=tilt is not None,
            num_warps=warps,
        )
    if grad.data_ptr() != out.data_ptr():
        out.copy_(grad.view_as(out))


@_backward.register_fake
def _nothing(
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    flat: torch.Tensor,
    peak: torch.Tensor,
    tilt: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    return None


def _in_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return [outer, inner, V] with stride 1 in V: a view where the strides allow, else a copy."""
    if tensor.dim() != 3:
        tensor = tensor.reshape(tensor.shape[:-1].numel(), 1, tensor.size(-1))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _launch_size(columns: int) -> tuple[int, int]:
    """Return (BLOCK, num_warps) for a row of V columns.

    Both kernels should wait for memory alone: 16 logits per thread are two to four loads of 16
    bytes in flight, and 8 warps of at most 80 registers each (as compiled for an H100) let three
    programs share a multiprocessor, so that two load while one reduces. Not timed on a GPU yet.
    """
    block = min(4096, triton.next_power_of_2(max(columns, 64)))
    return block, max(4, block // 512)
