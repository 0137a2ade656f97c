"""EMO's statistics as two Triton kernels, for fp32, bf16 and fp16 logits.

    torch      target rows [n, d] x cost rows [d, V] --GEMM--> products P [n, V]
    forward    z, P [n, V], scale [V]  --one read-->  (R, C) [2, n] fp64         one program per row
    backward   z, P [n, V], scale [V], 3 coefficients [n]  --one read, one write-->  grad [n, V]
                                                           one program per row and a few tiles

The product stays with torch: cuBLAS reaches the speed of the machine, and fused into the kernel it
would have to be done twice, because a row's gradient needs D of all shards, or P be written anyway.
What is left waits for memory alone. Both kernels compute in fp32, add the lanes of a row up in
fp64, and round once, when the gradient is stored; there is no atomic operation.

With TRITON_INTERPRET=1 in the environment when Triton is first imported, the same code runs on CPU
tensors, slowly.
"""

import torch
import triton
import triton.language as tl

from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats.kernel import token_stats

_MINUS_INF = tl.constexpr(-torch.inf)
_PROPAGATE = tl.constexpr(tl.PropagateNan.ALL)
_LOG2_E = tl.constexpr(1.4426950408889634)
_TILES = 4  # of a program of the backward: enough to pay for its start
# They may differ from step to step; a kernel must not be compiled again then.
_INTEGERS = ("rows", "columns", "tiles")


@triton.jit
def _tile(
    logits: tl.tensor,
    step: tl.tensor,
    products: tl.tensor,
    products_step: tl.tensor,
    scale: tl.tensor,
    anchor: tl.tensor,
    cells: tl.tensor,
    inside: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Return e^(z-m) and c of a row's cells; 0 and 1 where not inside, and nothing is read."""
    place = logits + cells.to(tl.int64) * step
    z = tl.load(place, mask=inside, other=_MINUS_INF).to(tl.float32)
    place = products + cells.to(tl.int64) * products_step
    product = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    cosine = product * tl.load(scale + cells, mask=inside, other=0.0)
    exps = tl.exp2((z - anchor) * _LOG2_E)
    return exps, tl.clamp(1.0 - cosine, 0.0, 2.0, propagate_nan=_PROPAGATE)


@triton.jit
def _without_target(
    exps: tl.tensor, target: tl.tensor, first: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return the exponentials of the tile from `first` on, 0 at the target."""
    if (target >= first) & (target < first + BLOCK):  # all threads go the same way
        exps = tl.where(tl.arange(0, BLOCK) == target - first, 0.0, exps)
    return exps


@triton.jit(do_not_specialize=_INTEGERS)
def emo_fwd_kernel(
    logits: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only
    row_step: tl.tensor,  # between rows, in elements, as all steps
    step: tl.tensor,  # between columns
    products: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only
    products_row_step: tl.tensor,
    products_step: tl.tensor,
    scale: tl.tensor,  # [V] fp32, read-only
    targets: tl.tensor,  # [n] int64, read-only; negative: not in this shard
    maxima: tl.tensor,  # [n] fp32, read-only: m
    sums: tl.tensor,  # [2, n] fp64, written: R, C
    rows: tl.tensor,  # n
    columns: tl.tensor,  # V
    BLOCK: tl.constexpr,
) -> None:
    """Write (R, C) of one row, tile after tile; lanes are added once, at the end, in fp64."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    products += row * products_row_step
    lanes = tl.arange(0, BLOCK)
    m = tl.load(maxima + row)
    anchor = tl.where(m == _MINUS_INF, 0.0, m)
    target = tl.load(targets + row).to(tl.int32)
    rest = tl.zeros([BLOCK], tl.float32)
    cost = tl.zeros([BLOCK], tl.float32)
    full = columns // BLOCK * BLOCK
    for first in range(0, full, BLOCK):
        cells = first + lanes
        exps, costs = _tile(logits, step, products, products_step, scale, anchor, cells, True)
        exps = _without_target(exps, target, first, BLOCK)
        rest += exps
        cost += exps * costs
    if full < columns:
        cells = full + lanes
        inside = cells < columns
        exps, costs = _tile(logits, step, products, products_step, scale, anchor, cells, inside)
        exps = _without_target(exps, target, full, BLOCK)
        rest += exps
        cost += exps * costs
    tl.store(sums + row, tl.sum(rest.to(tl.float64), 0))
    tl.store(sums + rows + row, tl.sum(cost.to(tl.float64), 0))


@triton.jit
def _gradient(
    exps: tl.tensor,
    costs: tl.tensor,
    distance: tl.tensor,
    flat: tl.tensor,
    peak: tl.tensor,
    tilt: tl.tensor,
    target: tl.tensor,
    first: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the gradient of the tile from `first` on."""
    value = exps * (flat + tilt * (costs - distance))
    if (target >= first) & (target < first + BLOCK):
        value = tl.where(tl.arange(0, BLOCK) == target - first, peak, value)
    return value


@triton.jit(do_not_specialize=_INTEGERS)
def emo_bwd_kernel(
    logits: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only unless it is grad
    row_step: tl.tensor,
    step: tl.tensor,  # between columns
    products: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only unless it is grad
    products_row_step: tl.tensor,
    products_step: tl.tensor,
    scale: tl.tensor,  # [V] fp32, read-only
    grad: tl.tensor,  # [n, V] in the logits' dtype, written; may be the logits or the products
    grad_row_step: tl.tensor,
    grad_step: tl.tensor,
    targets: tl.tensor,  # [n] int64, read-only
    maxima: tl.tensor,  # [n] fp32, read-only: m
    distances: tl.tensor,  # [n] fp32, read-only: D
    flats: tl.tensor,  # [n] fp32, read-only, as peaks and tilts
    peaks: tl.tensor,
    tilts: tl.tensor,
    columns: tl.tensor,  # V
    tiles: tl.tensor,  # of a program
    BLOCK: tl.constexpr,
) -> None:
    """Write a part of a row: e^(z-m) * (flat + tilt * (c - D)), and peak at the target."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    products += row * products_row_step
    grad += row * grad_row_step
    lanes = tl.arange(0, BLOCK)
    m = tl.load(maxima + row)
    flat = tl.load(flats + row)
    peak = tl.load(peaks + row)
    tilt = tl.load(tilts + row)
    is_zero = (flat == 0) & (peak == 0) & (tilt == 0)
    # Where all are 0 nothing is read; 0 * NaN of it would be NaN.
    wanted = is_zero == 0
    anchor = tl.where(is_zero | (m == _MINUS_INF), 0.0, m)
    distance = tl.where(is_zero, 0.0, tl.load(distances + row))
    target = tl.load(targets + row).to(tl.int32)
    begin = tl.program_id(1) * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, columns)
    full = begin + (end - begin) // BLOCK * BLOCK
    for first in range(begin, full, BLOCK):
        cells = first + lanes
        exps, costs = _tile(logits, step, products, products_step, scale, anchor, cells, wanted)
        value = _gradient(exps, costs, distance, flat, peak, tilt, target, first, BLOCK)
        place = grad + cells.to(tl.int64) * grad_step
        tl.store(place, value.to(grad.dtype.element_ty))
    if full < end:
        cells = full + lanes
        inside = cells < columns
        read = inside & wanted
        exps, costs = _tile(logits, step, products, products_step, scale, anchor, cells, read)
        value = _gradient(exps, costs, distance, flat, peak, tilt, target, full, BLOCK)
        place = grad + cells.to(tl.int64) * grad_step
        tl.store(place, value.to(grad.dtype.element_ty), mask=inside)


# Whether the kernels run in Triton's interpreter, on tensors of any device.
INTERPRETED = not isinstance(emo_fwd_kernel, triton.JITFunction)


def emo_stats(
    logits: torch.Tensor,
    products: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Return (m, S, T, z_y, R, C), [6, n]; see `megatron_mile.ops.emo.EmoStats`."""
    rows, columns = logits.shape
    stats = token_stats(logits, targets)
    sums = stats.new_empty(2, rows, dtype=torch.float64)
    block, warps = _launch_size(columns)
    with torch.cuda.device_of(logits):
        emo_fwd_kernel[(rows,)](
            logits,
            *logits.stride(),
            products,
            *products.stride(),
            scale.contiguous(),
            targets.contiguous(),
            stats[0],
            sums,
            rows,
            columns,
            BLOCK=block,
            num_warps=warps,
        )
    return torch.cat([stats.double(), sums])


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
    # The interpreter cuts off to bf16 where a GPU rounds, so torch does it there.
    wide = INTERPRETED and out.dtype == torch.bfloat16
    grad = torch.empty_like(out, dtype=torch.float32) if wide else out
    rows, columns = logits.shape
    block, warps = _launch_size(columns)
    with torch.cuda.device_of(logits):
        emo_bwd_kernel[(rows, triton.cdiv(columns, _TILES * block))](
            logits,
            *logits.stride(),
            products,
            *products.stride(),
            scale.contiguous(),
            grad,
            *grad.stride(),
            targets.contiguous(),
            m.contiguous(),
            distance.contiguous(),
            *coefficients.map(torch.Tensor.contiguous)[:3],
            columns,
            _TILES,
            BLOCK=block,
            num_warps=warps,
        )
    if grad is not out:
        out.copy_(grad)


def _launch_size(columns: int) -> tuple[int, int]:
    """Return (BLOCK, num_warps) for a row of V columns, as `token_stats.kernel` has them.

    Two tensors are read for one there, so that each thread loads 8 elements of each instead of 16.
    """
    block = min(2048, triton.next_power_of_2(max(columns, 64)))
    return block, max(4, block // 256)
