"""EMO's statistics as two Triton kernels, for fp32, bf16 and fp16 logits.

    torch      target rows [n, d] x cost rows [d, V] --GEMM--> products P [n, V]
    forward    z, P [n, V], scale [V]  --one read-->  (R, C) [2, n] fp64         one program per row
    backward   z, P [n, V], scale [V], 3 coefficients [n]  --one read, one write-->  grad [n, V]
                                                                 one program per row and tile

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


@triton.jit
def emo_fwd_kernel(
    logits: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only
    row_stride: tl.tensor,  # in elements, as all strides
    column_stride: tl.tensor,
    products: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only
    products_row_stride: tl.tensor,
    products_column_stride: tl.tensor,
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
    lanes = tl.arange(0, BLOCK)
    m = tl.load(maxima + row)
    anchor = tl.where(m == _MINUS_INF, 0.0, m)
    target = tl.load(targets + row)
    rest = tl.zeros([BLOCK], tl.float32)
    cost = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        cells = (first + lanes).to(tl.int64)
        inside = cells < columns
        place = logits + row * row_stride + cells * column_stride
        z = tl.load(place, mask=inside, other=_MINUS_INF).to(tl.float32)
        place = products + row * products_row_stride + cells * products_column_stride
        product = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        cosine = product * tl.load(scale + cells, mask=inside, other=0.0)
        exps = tl.where(cells == target, 0.0, tl.exp(z - anchor))
        rest += exps
        cost += exps * tl.clamp(1.0 - cosine, 0.0, 2.0, propagate_nan=_PROPAGATE)
    tl.store(sums + row, tl.sum(rest.to(tl.float64), 0))
    tl.store(sums + rows + row, tl.sum(cost.to(tl.float64), 0))


@triton.jit
def emo_bwd_kernel(
    logits: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only unless it is grad
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    products: tl.tensor,  # [n, V] fp32, bf16 or fp16, read-only unless it is grad
    products_row_stride: tl.tensor,
    products_column_stride: tl.tensor,
    scale: tl.tensor,  # [V] fp32, read-only
    grad: tl.tensor,  # [n, V] in the logits' dtype, written; may be the logits or the products
    grad_row_stride: tl.tensor,
    grad_column_stride: tl.tensor,
    targets: tl.tensor,  # [n] int64, read-only
    maxima: tl.tensor,  # [n] fp32, read-only: m
    distances: tl.tensor,  # [n] fp32, read-only: D
    flats: tl.tensor,  # [n] fp32, read-only, as peaks and tilts
    peaks: tl.tensor,
    tilts: tl.tensor,
    columns: tl.tensor,  # V
    BLOCK: tl.constexpr,
) -> None:
    """Write one tile of a row: e^(z-m) * (flat + tilt * (c - D)), and peak at the target."""
    row = tl.program_id(0).to(tl.int64)
    cells = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = cells < columns
    m = tl.load(maxima + row)
    flat = tl.load(flats + row)
    peak = tl.load(peaks + row)
    tilt = tl.load(tilts + row)
    place = logits + row * row_stride + cells * column_stride
    z = tl.load(place, mask=inside, other=_MINUS_INF).to(tl.float32)
    place = products + row * products_row_stride + cells * products_column_stride
    product = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    cosine = product * tl.load(scale + cells, mask=inside, other=0.0)
    cost = tl.clamp(1.0 - cosine, 0.0, 2.0, propagate_nan=_PROPAGATE)
    value = tl.exp(z - tl.where(m == _MINUS_INF, 0.0, m))
    value *= flat + tilt * (cost - tl.load(distances + row))
    value = tl.where(cells == tl.load(targets + row), peak, value)
    # A select, because 0 * NaN of a row's logits is NaN.
    value = tl.where((flat == 0) & (peak == 0) & (tilt == 0), 0.0, value)
    place = grad + row * grad_row_stride + cells * grad_column_stride
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
        emo_bwd_kernel[(rows, triton.cdiv(columns, block))](
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
            *coefficients.map(torch.Tensor.contiguous),
            columns,
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
