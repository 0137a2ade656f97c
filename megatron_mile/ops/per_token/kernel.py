"""Numbers per token as five small Triton kernels, one launch each where plain torch has dozens.

    locate    targets [N]                           -->  column in the shard, valid
    join      (m, S, T, z_y, ..) [R, 4 to 7, N]     -->  (m, S, T, z_y, nll, H, ..) [6 to 9, N] fp64
    weigh     those, weight, slope, value [N]       -->  fields [4 or 5, N], stacked [2 to 6, N]
    scale     stacked, incoming gradients [N]       -->  coefficients of the backward, fp32
    sum_up    mask and figures [N]                  -->  sums of blocks of tokens, which torch adds

A token is a lane. Arithmetic is fp64, as in `reference`: there are a few numbers per token, so the
time is that of the launch. There is no atomic operation, and nothing waits for the device.

With TRITON_INTERPRET=1 in the environment when Triton is first imported, the same code runs on CPU
tensors, slowly.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megatron_mile.ops.blocks import NOTHING, Coefficients, Extras
from megatron_mile.ops.operators import operator
from megatron_mile.ops.token_stats import FOUR, Wanted

_MINUS_INF = tl.constexpr(-torch.inf)
_NAN = tl.constexpr(torch.nan)

_BLOCK = 128
_SUM_BLOCK = 1024
_MOST_FIGURES = 4


@triton.jit
def _lanes(rows: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the tokens of this program, int64, and which of them there are."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return tokens, tokens < rows


@triton.jit(do_not_specialize=["start", "end", "ignore_index", "rows"])
def locate_kernel(
    targets: tl.tensor,  # [N] of integers, read-only
    local: tl.tensor,  # [N] int64, written
    valid: tl.tensor,  # [N] bool, written
    start: tl.tensor,
    end: tl.tensor,
    ignore_index: tl.tensor,
    rows: tl.tensor,  # N
    BLOCK: tl.constexpr,
) -> None:
    """Write the target's column in the shard, -1 where it has none, and whether it counts."""
    tokens, inside = _lanes(rows, BLOCK)
    target = tl.load(targets + tokens, mask=inside, other=0).to(tl.int64)
    held = (target >= start) & (target < end)
    tl.store(local + tokens, tl.where(held, target - start, -1), mask=inside)
    tl.store(valid + tokens, target != ignore_index, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def join_kernel(
    shards: tl.tensor,  # [R, 4 to 7, N] fp32, read-only: m, S, T, z_y, U and n, Q
    joined: tl.tensor,  # [6 to 9, N] fp64, written: m, S, T, z_y, nll, H, G and V, sum p^2
    rows: tl.tensor,  # N
    SHARDS: tl.constexpr,  # R
    SHIFTS: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Merge the shards in their order, and write nll and entropy."""
    number: tl.constexpr = 4 + 2 * SHIFTS + SQUARES
    tokens, inside = _lanes(rows, BLOCK)
    m = tl.full([BLOCK], _MINUS_INF, tl.float64)
    for shard in range(SHARDS):
        of_shard = tl.load(shards + number * shard * rows + tokens, mask=inside).to(tl.float64)
        m = tl.where((of_shard > m) | (of_shard != of_shard), of_shard, m)  # NaN stays
    total = tl.zeros([BLOCK], tl.float64)
    moment = tl.zeros([BLOCK], tl.float64)
    z_y = tl.full([BLOCK], _NAN, tl.float64)
    shifts = tl.zeros([BLOCK], tl.float64)
    columns = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for shard in range(SHARDS):
        place = shards + number * shard * rows + tokens
        of_shard = tl.load(place, mask=inside).to(tl.float64)
        # A shard without a finite logit has S = T = 0: any finite shift leaves it out.
        shift = tl.where(of_shard == _MINUS_INF, 0.0, of_shard - m)
        part = tl.load(place + rows, mask=inside).to(tl.float64)
        moment_part = tl.load(place + 2 * rows, mask=inside).to(tl.float64)
        total += tl.exp(shift) * part
        moment += tl.exp(shift) * (moment_part + shift * part)
        z = tl.load(place + 3 * rows, mask=inside).to(tl.float64)
        z_y = tl.where(z_y == z_y, z_y, z)
        if SHIFTS:
            count = tl.load(place + 5 * rows, mask=inside).to(tl.float64)
            moved = tl.load(place + 4 * rows, mask=inside).to(tl.float64) + count * (of_shard - m)
            shifts += tl.where(count == 0, 0.0, moved)  # 0 * -inf of no columns is NaN
            columns += count
        if SQUARES:
            part = tl.load(place + (number - 1) * rows, mask=inside).to(tl.float64)
            squares += tl.exp(shift) * tl.exp(shift) * part
    log_total = tl.log(total)
    entropy = log_total - moment / total
    out = joined + tokens
    tl.store(out, m, mask=inside)
    tl.store(out + rows, total, mask=inside)
    tl.store(out + 2 * rows, moment, mask=inside)
    tl.store(out + 3 * rows, z_y, mask=inside)
    tl.store(out + 4 * rows, log_total - (z_y - m), mask=inside)
    tl.store(out + 5 * rows, tl.where(entropy < 0, 0.0, entropy), mask=inside)  # NaN stays
    if SHIFTS:
        tl.store(out + 6 * rows, log_total - shifts / columns, mask=inside)
        tl.store(out + 7 * rows, columns, mask=inside)
    if SQUARES:
        tl.store(out + (number + 1) * rows, squares / (total * total), mask=inside)


@triton.jit
def _expm1(x: tl.tensor) -> tl.tensor:
    """Return e^x - 1 for x <= 0, fp64; by its series where the difference loses digits."""
    series = x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5))))
    return tl.where(x > -1e-3, series, tl.exp(x) - 1.0)


@triton.jit
def _store_z_loss(
    m: tl.tensor,
    total: tl.tensor,
    z_y: tl.tensor,
    shift: tl.tensor,
    counts: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    Z_LOSS: tl.constexpr,
) -> tl.tensor:
    """Write flat and peak of the z-loss, and return its value."""
    log_sum = m + tl.log(total)
    rise = 2 * Z_LOSS * log_sum / total
    peak = rise * tl.exp(z_y - m)
    tl.store(out, tl.where(counts, tl.exp(shift) * rise, 0.0), mask=inside)
    tl.store(out + rows, tl.where(counts, peak, 0.0), mask=inside)
    return tl.where(counts, Z_LOSS * log_sum * log_sum, 0.0)


@triton.jit(do_not_specialize=["rows"])
def weigh_kernel(
    joined: tl.tensor,  # [6 to 9, N] fp64, read-only
    maxima: tl.tensor,  # [N] fp32, read-only: m of this shard
    weights: tl.tensor,  # [N], read-only; not read unless WEIGHTED
    slopes: tl.tensor,  # [N], read-only; not read unless SLOPED
    values: tl.tensor,  # [N], read-only; not read unless VALUED
    valid: tl.tensor,  # [N] bool, read-only
    fields: tl.tensor,  # [4 or 5, N] fp32, written: loss, nll, H, w, z-loss
    stacked: tl.tensor,  # [2 to 6, N] fp64, written: flat, peak, tilt, base, of the z-loss
    rows: tl.tensor,  # N
    WEIGHTED: tl.constexpr,
    SLOPED: tl.constexpr,
    VALUED: tl.constexpr,
    SMOOTHING: tl.constexpr,  # eps; 0 for none
    Z_LOSS: tl.constexpr,  # c; 0 for none
    BLOCK: tl.constexpr,
) -> None:
    """Write the loss and the coefficients of this shard's gradient, 0 for tokens without loss."""
    tokens, inside = _lanes(rows, BLOCK)
    source = joined + tokens
    m = tl.load(source, mask=inside)
    total = tl.load(source + rows, mask=inside)
    nll = tl.load(source + 4 * rows, mask=inside)
    weight = tl.full([BLOCK], 1.0, tl.float64)
    if WEIGHTED:
        weight = tl.load(weights + tokens, mask=inside).to(tl.float64)
    counts = tl.load(valid + tokens, mask=inside, other=0) != 0
    # A weight may be finite where no shard held the target; the gradient must not be.
    height = tl.where(nll == nll, weight, _NAN)
    flat = height / total
    peak = height * _expm1(-nll)
    shift = tl.load(maxima + tokens, mask=inside).to(tl.float64) - m
    shift = tl.where(shift > _MINUS_INF, shift, 0.0)  # no finite logit: any finite shift
    out = stacked + tokens
    smoothed = nll
    if SMOOTHING > 0:
        smoothed = (1 - SMOOTHING) * nll + SMOOTHING * tl.load(source + 6 * rows, mask=inside)
        base = -height * SMOOTHING / tl.load(source + 7 * rows, mask=inside)
        peak += height * SMOOTHING + base
        tl.store(out + (2 + SLOPED) * rows, tl.where(counts, base, 0.0), mask=inside)
    if SLOPED:
        slope = tl.load(slopes + tokens, mask=inside).to(tl.float64)
        reach = tl.load(source + 3 * rows, mask=inside) - m
        spread = -tl.load(source + 2 * rows, mask=inside) / total
        tilt = tl.where(slope == 0, 0.0, -smoothed * slope / total)
        flat += tilt * spread
        peak += tilt * tl.exp(reach) * (reach + spread)
        flat += tilt * shift
        tl.store(out + 2 * rows, tl.where(counts, tl.exp(shift) * tilt, 0.0), mask=inside)
    tl.store(out, tl.where(counts, tl.exp(shift) * flat, 0.0), mask=inside)
    tl.store(out + rows, tl.where(counts, peak, 0.0), mask=inside)
    if Z_LOSS > 0:
        z_y = tl.load(source + 3 * rows, mask=inside)
        out += (2 + SLOPED + (SMOOTHING > 0)) * rows
        value = _store_z_loss(m, total, z_y, shift, counts, out, rows, inside, Z_LOSS)
        tl.store(fields + 4 * rows + tokens, value, mask=inside)
    out = fields + tokens
    entropy = tl.load(source + 5 * rows, mask=inside)
    loss = tl.where(height == 0, 0.0, weight * smoothed)  # 0 * inf is NaN
    if VALUED:
        loss = tl.load(values + tokens, mask=inside).to(tl.float64)
    tl.store(out, tl.where(counts, loss, 0.0), mask=inside)
    tl.store(out + rows, tl.where(counts, nll, 0.0), mask=inside)
    tl.store(out + 2 * rows, tl.where(counts, entropy, 0.0), mask=inside)
    tl.store(out + 3 * rows, tl.where(counts, weight, 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def scale_kernel(
    stacked: tl.tensor,  # [K, N] fp64, read-only, and [2, N] of the z-loss behind them
    gradient: tl.tensor,  # [N] fp32, read-only
    scaled: tl.tensor,  # [K, N] fp32, written
    rows: tl.tensor,  # N
    z_gradient: tl.tensor,  # [N] fp32, read-only; not read unless Z_LOSS
    NUMBER: tl.constexpr,  # K
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the coefficients times the gradient, exactly 0 where it is 0."""
    tokens, inside = _lanes(rows, BLOCK)
    gradient = tl.load(gradient + tokens, mask=inside, other=0.0).to(tl.float64)
    if Z_LOSS:
        z_gradient = tl.load(z_gradient + tokens, mask=inside, other=0.0).to(tl.float64)
    for number in tl.static_range(NUMBER):
        cell = number * rows + tokens
        value = tl.load(stacked + cell, mask=inside, other=0.0) * gradient
        value = tl.where(gradient == 0, 0.0, value)  # 0 * NaN is NaN
        if Z_LOSS and number < 2:
            of_z = tl.load(stacked + NUMBER * rows + cell, mask=inside, other=0.0) * z_gradient
            value += tl.where(z_gradient == 0, 0.0, of_z)
        tl.store(scaled + cell, value.to(tl.float32), mask=inside)


@triton.jit
def _add_up(
    place: tl.tensor, figure: tl.tensor, mask: tl.tensor, tokens: tl.tensor, inside: tl.tensor
) -> None:
    """Store the sum of mask * figure; 0 where the mask is 0, because 0 * NaN is NaN."""
    value = tl.load(figure + tokens, mask=inside, other=0.0).to(tl.float64)
    tl.store(place, tl.sum(tl.where(mask != 0, value, 0.0) * mask, 0))


@triton.jit(do_not_specialize=["rows"])
def sums_kernel(
    masks: tl.tensor,  # [N], read-only, as all that follows
    valid: tl.tensor,  # [N] bool
    nlls: tl.tensor,  # [N]
    entropies: tl.tensor,  # [N]
    first: tl.tensor,  # [N]; of these four as many are read as NUMBER says
    second: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
    sums: tl.tensor,  # [blocks, NUMBER + 3] fp64, written
    rows: tl.tensor,  # N
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the sums of one block of tokens."""
    tokens, inside = _lanes(rows, BLOCK)
    out = sums + tl.program_id(0) * (NUMBER + 3)
    mask = tl.load(masks + tokens, mask=inside, other=0.0).to(tl.float64)
    tl.store(out, tl.sum(mask, 0))
    nll = tl.load(nlls + tokens, mask=inside, other=0.0)
    entropy = tl.load(entropies + tokens, mask=inside, other=0.0)
    ignored = tl.load(valid + tokens, mask=inside, other=1) == 0
    broken = (mask != 0) & (ignored | ((nll != nll) & (entropy == entropy)))
    tl.store(out + NUMBER + 1, tl.sum(broken.to(tl.float64), 0))
    tl.store(out + NUMBER + 2, tl.sum((mask < 0).to(tl.float64), 0))
    if NUMBER > 0:
        _add_up(out + 1, first, mask, tokens, inside)
    if NUMBER > 1:
        _add_up(out + 2, second, mask, tokens, inside)
    if NUMBER > 2:
        _add_up(out + 3, third, mask, tokens, inside)
    if NUMBER > 3:
        _add_up(out + 4, fourth, mask, tokens, inside)


def _fake_locate(
    targets: torch.Tensor, start: int, end: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    local = targets.new_empty(targets.shape, dtype=torch.int64)
    return local, targets.new_empty(targets.shape, dtype=torch.bool)


@operator("locate", _fake_locate)
def locate(
    targets: torch.Tensor, start: int, end: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (local, valid); see `megatron_mile.ops.per_token.PerToken`."""
    local, valid = _fake_locate(targets, start, end, ignore_index)
    rows = targets.numel()
    if rows:
        with torch.cuda.device_of(targets):
            locate_kernel[(triton.cdiv(rows, _BLOCK),)](
                targets.contiguous(), local, valid, start, end, ignore_index, rows, BLOCK=_BLOCK
            )
    return local, valid


def _fake_join(shards: torch.Tensor, shifts: bool, squares: bool) -> torch.Tensor:
    number = Wanted(shifts, squares).number + 2
    return shards.new_empty(number, *shards.shape[2:], dtype=torch.float64)


@operator("join", _fake_join)
def _joined(shards: torch.Tensor, shifts: bool, squares: bool) -> torch.Tensor:
    joined = _fake_join(shards, shifts, squares)
    rows = joined[0].numel()
    if rows:
        with torch.cuda.device_of(shards):
            join_kernel[(triton.cdiv(rows, _BLOCK),)](
                shards.contiguous(),
                joined,
                rows,
                SHARDS=len(shards),
                SHIFTS=shifts,
                SQUARES=squares,
                BLOCK=_BLOCK,
            )
    return joined


def join(shards: torch.Tensor, wanted: Wanted = FOUR) -> torch.Tensor:
    """Return (m, S, T, z_y, nll, H, ...); see `megatron_mile.ops.per_token.PerToken`."""
    return _joined(shards, *wanted)


def _fake_weigh(
    joined: torch.Tensor,
    maxima: torch.Tensor,
    weight: torch.Tensor | None,
    slope: torch.Tensor | None,
    valid: torch.Tensor,
    smoothing: float,
    z_loss: float,
    value: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    number = 2 + (slope is not None) + (smoothing > 0) + 2 * (z_loss > 0)
    fields = maxima.new_empty(4 + (z_loss > 0), *valid.shape)
    return fields, joined.new_empty(number, *valid.shape)


@operator("weigh", _fake_weigh)
def _weighed(
    joined: torch.Tensor,
    maxima: torch.Tensor,
    weight: torch.Tensor | None,
    slope: torch.Tensor | None,
    valid: torch.Tensor,
    smoothing: float,
    z_loss: float,
    value: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    fields, stacked = _fake_weigh(joined, maxima, weight, slope, valid, smoothing, z_loss, value)
    rows = valid.numel()
    if rows:
        with torch.cuda.device_of(joined):
            weigh_kernel[(triton.cdiv(rows, _BLOCK),)](
                joined,
                maxima,
                joined if weight is None else weight.contiguous(),
                joined if slope is None else slope.contiguous(),
                joined if value is None else value.contiguous(),
                valid,
                fields,
                stacked,
                rows,
                WEIGHTED=weight is not None,
                SLOPED=slope is not None,
                VALUED=value is not None,
                SMOOTHING=smoothing,
                Z_LOSS=z_loss,
                BLOCK=_BLOCK,
            )
    return fields, stacked


def weigh(
    joined: torch.Tensor,
    maxima: torch.Tensor,
    weight: torch.Tensor | None,
    slope: torch.Tensor | None,
    valid: torch.Tensor,
    extras: Extras = NOTHING,
    value: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (fields, coefficients); see `megatron_mile.ops.per_token.PerToken`."""
    return _weighed(joined, maxima, weight, slope, valid, *extras, value)


def _fake_scaled(
    stacked: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype, z_grad: torch.Tensor | None
) -> torch.Tensor:
    number = len(stacked) - 2 * (z_grad is not None)
    return stacked.new_empty(number, *stacked.shape[1:], dtype=dtype)


@operator("scale", _fake_scaled)
def _scaled(
    stacked: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype, z_grad: torch.Tensor | None
) -> torch.Tensor:
    scaled = _fake_scaled(stacked, grad, dtype, z_grad)
    rows = grad.numel()
    if rows:
        with torch.cuda.device_of(stacked):
            scale_kernel[(triton.cdiv(rows, _BLOCK),)](
                stacked,
                grad.contiguous(),
                scaled,
                rows,
                (grad if z_grad is None else z_grad).contiguous(),
                NUMBER=len(scaled),
                Z_LOSS=z_grad is not None,
                BLOCK=_BLOCK,
            )
    return scaled


def scale(
    stacked: torch.Tensor,
    grad: torch.Tensor,
    dtype: torch.dtype,
    smoothed: bool = False,
    z_grad: torch.Tensor | None = None,
) -> Coefficients:
    """Return the coefficients times grad; see `megatron_mile.ops.per_token.PerToken`."""
    return Coefficients.unstack(_scaled(stacked, grad, dtype, z_grad), smoothed)


def _fake_sums(
    mask: torch.Tensor,
    valid: torch.Tensor,
    nll: torch.Tensor,
    entropy: torch.Tensor,
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    third: torch.Tensor | None,
    fourth: torch.Tensor | None,
) -> torch.Tensor:
    number = sum(figure is not None for figure in (first, second, third, fourth))
    blocks = triton.cdiv(mask.numel(), _SUM_BLOCK)
    return mask.new_empty(blocks, number + 3, dtype=torch.float64)


@operator("sum_up", _fake_sums)
def _sums_of_blocks(
    mask: torch.Tensor,
    valid: torch.Tensor,
    nll: torch.Tensor,
    entropy: torch.Tensor,
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    third: torch.Tensor | None,
    fourth: torch.Tensor | None,
) -> torch.Tensor:
    """Return the sums of each block of tokens; not a list of figures, which torch 2.4 refuses."""
    figures = (first, second, third, fourth)
    sums = _fake_sums(mask, valid, nll, entropy, *figures)
    if len(sums):
        given = (mask, valid, nll, entropy, *(mask if x is None else x for x in figures))
        with torch.cuda.device_of(mask):
            sums_kernel[(len(sums),)](
                *(x.contiguous() for x in given),
                sums,
                mask.numel(),
                NUMBER=sums.size(1) - 3,
                BLOCK=_SUM_BLOCK,
            )
    return sums


def sum_up(
    mask: torch.Tensor,
    valid: torch.Tensor,
    nll: torch.Tensor,
    entropy: torch.Tensor,
    figures: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the sums, [n + 3]; see `megatron_mile.ops.per_token.PerToken`."""
    first, rest = figures[:_MOST_FIGURES], figures[_MOST_FIGURES:]
    padded = (*first, *[None] * (_MOST_FIGURES - len(first)))
    sums = _sums_of_blocks(mask, valid, nll, entropy, *padded).sum(0)
    if not rest:
        return sums
    more = sum_up(mask, valid, nll, entropy, rest)
    return torch.cat([sums[:-2], more[1:]])
