"""Token statistics as Triton kernels, for fp32, bf16 and fp16 logits.

    forward    z [N, V]  --one read-->  (m, S, T, z_y, ...) [4 to 7, N] fp32    one program per row
                  the caller joins the shards of the vocabulary and forms the coefficients
    backward   z [N, V], 2 to 4 coefficients [N]  --one read, one write-->  gradient [N, V]
                                                           one program per row and a few tiles

Two kernels, because a row's gradient needs the statistics of all shards. Where there are too few
rows to keep a GPU busy, several programs share a row in the forward, and a third kernel joins them.
All compute in fp32 and round once, when the gradient is stored. There is no atomic operation, so
that a result depends on its row, where that begins within 16 bytes, the shape and the GPU alone;
nothing waits for the device, and no shape or block size depends on the data.

A program takes a row in tiles. Tiles begin at a multiple of 16 bytes, wherever the row begins, so
that each thread loads pieces of 16 bytes. The first and the last tile may hold entries of other
rows or none, and leave these out; the tiles between need no mask.

Rows may lie at two strides ([s, b, V] and slices of it are read where they are); other layouts are
made contiguous first. The launchers are operators for torch.compile, which passes over
them and functionalises the one that writes. Integers do not specialise the kernels: each is
compiled once for a dtype, not again for another number of tokens.

With TRITON_INTERPRET=1 in the environment when Triton is first imported, the same code runs on CPU
tensors, slowly.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.operators import operator
from megatron_mile.ops.token_stats import FOUR, Wanted, reference

_FLOOR = tl.constexpr(reference.FLOOR)
_MINUS_INF = tl.constexpr(-torch.inf)
_LOG2_E = tl.constexpr(1.4426950408889634)
# From the machine code, not timed on a GPU yet: with two pieces a thread and at most 48 registers,
# five programs of eight warps or more share a multiprocessor, each warp with 1 KiB on its way.
_LOADS = tl.constexpr(2)
_WARPS = 8
_REGISTERS = {} if torch.version.hip else {"maxnreg": 48}
_TILES = 4  # of a program of the backward: enough to pay for its start
# They may differ from step to step; a kernel must not be compiled again then.
_INTEGERS = (
    "outer_stride",
    "inner_stride",
    "grad_outer_stride",
    "grad_inner_stride",
    "rows",
    "inner",
    "columns",
    "tiles",
    "parts",
)


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
def _aligned(start: tl.tensor, PIECE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the multiple of 16 bytes at or before an address, and how many entries before.

    What lies between belongs to no other page of memory than the address: it can be read.
    """
    skew = (start.to(tl.int64) % 16 * PIECE // 16).to(tl.int32)
    return tl.multiple_of(start - skew, 16), skew


@triton.jit
def _pieces(first: tl.tensor, BLOCK: tl.constexpr, PIECE: tl.constexpr) -> tl.tensor:
    """Return where the pieces of the tile from `first` on begin, [loads, threads, 1]."""
    threads: tl.constexpr = BLOCK // (_LOADS * PIECE)
    number = tl.arange(0, _LOADS)[:, None, None] * threads + tl.arange(0, threads)[None, :, None]
    return first + number * PIECE


@triton.jit
def _entries(PIECE: tl.constexpr) -> tl.tensor:
    """Return the numbers of a piece's entries, [1, 1, PIECE].

    What compares a cell compares these with a number of the piece, which takes no register each.
    """
    return tl.arange(0, PIECE)[None, None, :]


@triton.jit
def _load_edge(
    base: tl.tensor,
    pieces: tl.tensor,
    skew: tl.tensor,
    end: tl.tensor,
    wanted: tl.tensor,
    PIECE: tl.constexpr,
) -> tl.tensor:
    """Return a tile with -inf outside of the row, and everywhere if it is not wanted.

    Read are whole pieces that hold an entry of the row.
    """
    entries = _entries(PIECE)
    place = base + pieces + entries
    z = tl.load(place, mask=(pieces < end) & wanted, other=_MINUS_INF).to(tl.float32)
    return tl.where((entries >= skew - pieces) & (entries < end - pieces), z, _MINUS_INF)


@triton.jit
def _store_edge(
    base: tl.tensor,
    value: tl.tensor,
    pieces: tl.tensor,
    skew: tl.tensor,
    end: tl.tensor,
    PIECE: tl.constexpr,
) -> None:
    """Write what of a tile is in the row: whole pieces as such, the others entry by entry."""
    entries = _entries(PIECE)
    place, value = base + pieces + entries, value.to(base.dtype.element_ty)
    whole = (pieces >= skew) & (pieces + PIECE <= end)
    inside = (entries >= skew - pieces) & (entries < end - pieces)
    tl.store(place, value, mask=whole)
    tl.store(place, value, mask=inside & (whole == 0))


@triton.jit
def _scaled(
    m: tl.tensor, total: tl.tensor, moment: tl.tensor, new_m: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return sums S and T over e^(z-m) as sums over e^(z-new_m), of a maximum that is not below."""
    # Sums of nothing but masked logits are 0: any finite shift keeps them.
    shift = tl.maximum(m - tl.where(new_m == _MINUS_INF, 0.0, new_m), _FLOOR)
    scale = tl.exp2(shift * _LOG2_E)
    return scale * total, scale * (moment + shift * total)


@triton.jit
def _scaled_squares(m: tl.tensor, squares: tl.tensor, new_m: tl.tensor) -> tl.tensor:
    """Return the sum Q over e^(2 (z-m)) as the sum over e^(2 (z-new_m)), as `_scaled`."""
    shift = tl.maximum(m - tl.where(new_m == _MINUS_INF, 0.0, new_m), _FLOOR)
    scale = tl.exp2(shift * _LOG2_E)
    return scale * scale * squares


@triton.jit
def _sum_of_threads(values: tl.tensor) -> tl.tensor:
    """Return the sums [threads] of [loads, threads, PIECE], in pairs first.

    From left to right, an entry near 1 would round the same part away from each of the small ones
    that follow.
    """
    loads: tl.constexpr = values.shape[0]
    threads: tl.constexpr = values.shape[1]
    half: tl.constexpr = values.shape[2] // 2
    pairs = tl.sum(tl.reshape(values, [loads, threads, half, 2]), 3)
    return tl.sum(tl.sum(pairs, 2), 0)


@triton.jit
def _add_tile(
    z: tl.tensor,
    m: tl.tensor,
    total: tl.tensor,
    moment: tl.tensor,
    squares: tl.tensor,
    SQUARES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return (m, S, T, Q) of each thread with its entries of a tile; one exponential per entry."""
    new_m = tl.maximum(m, tl.max(tl.max(z, 2), 0))
    if SQUARES:
        squares = _scaled_squares(m, squares, new_m)
    total, moment = _scaled(m, total, moment, new_m)
    shifted = z - tl.where(new_m == _MINUS_INF, 0.0, new_m)[None, :, None]
    # exp2, unlike exp, spends no instruction on results below 2^-126, which become 0.
    exps = tl.exp2(shifted * _LOG2_E)
    # The floor makes 0 * -inf of masked logits 0, and NaN stays in e^NaN.
    products = exps * tl.maximum(shifted, _FLOOR)
    total += _sum_of_threads(exps)
    moment += tl.sum(tl.sum(products, 2), 0)
    if SQUARES:
        squares += _sum_of_threads(exps * exps)
    return new_m, total, moment, squares


@triton.jit
def _shifts_of_edge(
    z: tl.tensor,
    anchor: tl.tensor,
    pieces: tl.tensor,
    skew: tl.tensor,
    end: tl.tensor,
    PIECE: tl.constexpr,
) -> tl.tensor:
    """Return the sums [threads] of z - anchor over what of a tile is in the row."""
    entries = _entries(PIECE)
    inside = (entries >= skew - pieces) & (entries < end - pieces)
    return _sum_of_threads(tl.where(inside, z - anchor, 0.0))


@triton.jit
def _maximum_of_tile(
    base: tl.tensor,
    first: tl.tensor,
    skew: tl.tensor,
    end: tl.tensor,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
) -> tl.tensor:
    """Return the maximum of what of a tile is in the row; 0 where that is -inf.

    From it U is summed up: from a maximum that rises, each thread would have to count its entries.
    """
    z = _load_edge(base, _pieces(first, BLOCK, PIECE), skew, end, True, PIECE)
    maximum = tl.max(tl.max(tl.max(z, 2), 0), 0)
    return tl.where(maximum == _MINUS_INF, 0.0, maximum)


@triton.jit
def _store_wanted(
    m: tl.tensor,
    shifts: tl.tensor,
    anchor: tl.tensor,
    count: tl.tensor,
    squares: tl.tensor,
    out: tl.tensor,
    step: tl.tensor,
    SHIFTS: tl.constexpr,
    SQUARES: tl.constexpr,
) -> None:
    """Join what is wanted of all threads and write it behind the four, `step` numbers apart."""
    new_m = tl.max(m, 0)
    if SHIFTS:
        moved = count * (anchor - tl.where(new_m == _MINUS_INF, 0.0, new_m))
        tl.store(out + 4 * step, tl.sum(shifts, 0) + moved)
        tl.store(out + 5 * step, count)
    if SQUARES:
        number: tl.constexpr = 6 if SHIFTS else 4
        tl.store(out + number * step, tl.sum(_scaled_squares(m, squares, new_m), 0))


@triton.jit
def _store_joined(
    m: tl.tensor,
    total: tl.tensor,
    moment: tl.tensor,
    z_y: tl.tensor,
    out: tl.tensor,
    step: tl.tensor,
    mask: tl.tensor,
) -> None:
    """Join (m, S, T) along axis 0 and write them and z_y, `step` numbers apart."""
    new_m = tl.max(m, 0)
    total, moment = _scaled(m, total, moment, new_m)
    tl.store(out, new_m, mask=mask)
    tl.store(out + step, tl.sum(total, 0), mask=mask)
    tl.store(out + 2 * step, tl.sum(moment, 0), mask=mask)
    tl.store(out + 3 * step, z_y, mask=mask)


@triton.jit(do_not_specialize=_INTEGERS)
def token_stats_fwd_kernel(
    logits: tl.tensor,  # [outer, inner, V] fp32, bf16 or fp16, read-only
    outer_stride: tl.tensor,  # in elements, as inner_stride; the last dimension has stride 1
    inner_stride: tl.tensor,
    targets: tl.tensor,  # [N = outer * inner] int64, read-only; negative: not in this shard
    stats: tl.tensor,  # [4 to 7, parts, N] fp32, written: m, S, T of a part, z_y, U and n, Q
    rows: tl.tensor,  # N
    inner: tl.tensor,
    columns: tl.tensor,  # V
    tiles: tl.tensor,  # of a part
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,  # entries in 16 bytes
    SHIFTS: tl.constexpr,
    SQUARES: tl.constexpr,
) -> None:
    """Write (m, S, T, z_y) and what is wanted of one row, or of a part of it, tile after tile.

    Each thread keeps m, S and T of its entries, so that none waits for another before the end.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    start = _row_start(logits, row, inner, outer_stride, inner_stride)
    base, skew = _aligned(start, PIECE)
    target = tl.load(targets + row)
    first, end = part * tiles * BLOCK, skew + columns
    stop = tl.minimum(first + tiles * BLOCK, end)
    threads: tl.constexpr = BLOCK // (_LOADS * PIECE)
    m = tl.full([threads], _MINUS_INF, tl.float32)
    total = tl.zeros([threads], tl.float32)
    moment = tl.zeros([threads], tl.float32)
    squares = tl.zeros([threads], tl.float32)
    shifts = tl.zeros([threads], tl.float32)
    z_y = tl.load(start + target, mask=target >= 0, other=float("nan")).to(tl.float32)
    count, anchor = tl.maximum(stop - tl.maximum(first, skew), 0).to(tl.float32), 0.0
    if SHIFTS:
        anchor = _maximum_of_tile(base, first, skew, end, BLOCK, PIECE)
    if first < skew:
        pieces = _pieces(first, BLOCK, PIECE)
        z = _load_edge(base, pieces, skew, end, True, PIECE)
        m, total, moment, squares = _add_tile(z, m, total, moment, squares, SQUARES)
        if SHIFTS:
            shifts += _shifts_of_edge(z, anchor, pieces, skew, end, PIECE)
        first += BLOCK
    full = first + tl.maximum(stop - first, 0) // BLOCK * BLOCK
    for cell in range(first, full, BLOCK):
        place = base + cell + _pieces(0, BLOCK, PIECE) + _entries(PIECE)
        z = tl.load(place).to(tl.float32)
        m, total, moment, squares = _add_tile(z, m, total, moment, squares, SQUARES)
        if SHIFTS:
            shifts += _sum_of_threads(z - anchor)
    if full < stop:
        pieces = _pieces(full, BLOCK, PIECE)
        z = _load_edge(base, pieces, skew, end, True, PIECE)
        m, total, moment, squares = _add_tile(z, m, total, moment, squares, SQUARES)
        if SHIFTS:
            shifts += _shifts_of_edge(z, anchor, pieces, skew, end, PIECE)
    parts = tl.num_programs(1)
    out = stats + part.to(tl.int64) * rows + row
    step = rows.to(tl.int64) * parts
    _store_joined(m, total, moment, z_y, out, step, True)
    _store_wanted(m, shifts, anchor, count, squares, out, step, SHIFTS, SQUARES)


@triton.jit(do_not_specialize=_INTEGERS)
def token_stats_join_kernel(
    partial: tl.tensor,  # [4 to 7, parts, N] fp32, read-only: as the forward wrote it
    stats: tl.tensor,  # [4 to 7, N] fp32, written: m, S, T, z_y, U and n, Q
    rows: tl.tensor,  # N
    parts: tl.tensor,
    PARTS: tl.constexpr,  # a power of two, at least `parts`
    BLOCK: tl.constexpr,
    SHIFTS: tl.constexpr,
    SQUARES: tl.constexpr,
) -> None:
    """Write (m, S, T, z_y) and what is wanted of some rows from those of their parts."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)[:, None]
    place = partial + part * rows + row[None, :]
    step = rows.to(tl.int64) * parts
    there = row < rows
    inside = (part < parts) & there[None, :]
    m = tl.load(place, mask=inside, other=_MINUS_INF)
    total = tl.load(place + step, mask=inside, other=0.0)
    moment = tl.load(place + 2 * step, mask=inside, other=0.0)
    z_y = tl.load(partial + 3 * step + row, mask=there)
    wide, out = rows.to(tl.int64), stats + row
    _store_joined(m, total, moment, z_y, out, wide, there)
    new_m = tl.max(m, 0)
    if SHIFTS:
        shifts = tl.load(place + 4 * step, mask=inside, other=0.0)
        count = tl.load(place + 5 * step, mask=inside, other=0.0)
        moved = shifts + count * (m - tl.where(new_m == _MINUS_INF, 0.0, new_m)[None, :])
        # 0 * -inf of a part without entries is NaN.
        tl.store(out + 4 * wide, tl.sum(tl.where(count == 0, 0.0, moved), 0), mask=there)
        tl.store(out + 5 * wide, tl.sum(count, 0), mask=there)
    if SQUARES:
        number: tl.constexpr = 6 if SHIFTS else 4
        squares = tl.load(place + number * step, mask=inside, other=0.0)
        joined = tl.sum(_scaled_squares(m, squares, new_m[None, :]), 0)
        tl.store(out + number * wide, joined, mask=there)


@triton.jit
def _gradient(
    z: tl.tensor,
    anchor: tl.tensor,
    flat: tl.tensor,
    peak: tl.tensor,
    tilt: tl.tensor,
    lift: tl.tensor,
    target: tl.tensor,
    first: tl.tensor,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    TILTED: tl.constexpr,
    BASED: tl.constexpr,
) -> tl.tensor:
    """Return the gradient of the tile from `first` on."""
    shifted = z - anchor
    factor = flat
    if TILTED:
        factor = flat + tilt * tl.maximum(shifted, _FLOOR)
    value = tl.exp2(shifted * _LOG2_E) * factor
    if BASED:
        value += lift
    if (target >= first) & (target < first + BLOCK):  # all threads go the same way
        place = target - _pieces(first, BLOCK, PIECE)
        value = tl.where(_entries(PIECE) == place, peak, value)
    return value


@triton.jit
def _number(numbers: tl.tensor, row: tl.tensor, other: tl.tensor, GIVEN: tl.constexpr) -> tl.tensor:
    """Return a row's coefficient, or the other where there is none."""
    number = other
    if GIVEN:
        number = tl.load(numbers + row)
    return number


@triton.jit(do_not_specialize=_INTEGERS)
def token_stats_bwd_kernel(
    logits: tl.tensor,  # [outer, inner, V] fp32, bf16 or fp16, read-only unless it is grad
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    grad: tl.tensor,  # [outer, inner, V] in the logits' dtype, written; may be the logits
    grad_outer_stride: tl.tensor,
    grad_inner_stride: tl.tensor,
    targets: tl.tensor,  # [N] int64, read-only
    maxima: tl.tensor,  # [N] fp32, read-only: m of the forward
    flats: tl.tensor,  # [N] fp32, read-only, as peaks, tilts and bases
    peaks: tl.tensor,
    tilts: tl.tensor,  # not read unless TILTED
    inner: tl.tensor,
    columns: tl.tensor,  # V
    tiles: tl.tensor,  # of a program
    bases: tl.tensor,  # not read unless BASED
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    TILTED: tl.constexpr,
    BASED: tl.constexpr,
    ALIKE: tl.constexpr,  # the rows of grad begin as far from a multiple of 16 bytes as the logits'
) -> None:
    """Write a part of a row: e^(z-m) * (flat + tilt * (z-m)) + base, and peak at the target."""
    row = tl.program_id(0)
    m = tl.load(maxima + row)
    flat = tl.load(flats + row)
    peak = tl.load(peaks + row)
    tilt = _number(tilts, row, flat, TILTED)
    lift = _number(bases, row, flat, BASED)
    is_zero = (flat == 0) & (peak == 0) & (tilt == 0) & (lift == 0)
    # Where all are 0 the logits are not read; 0 * NaN of them would be NaN.
    wanted = is_zero == 0
    anchor = tl.where(is_zero | (m == _MINUS_INF), 0.0, m)
    start = _row_start(logits, row, inner, outer_stride, inner_stride)
    base, skew = _aligned(start, PIECE)
    out = _row_start(grad, row, inner, grad_outer_stride, grad_inner_stride) - skew
    if ALIKE:
        out = tl.multiple_of(out, 16)
    y = tl.load(targets + row).to(tl.int32)
    y = tl.where(y < 0, -1, y + skew)
    first, end = tl.program_id(1) * tiles * BLOCK, skew + columns
    stop = tl.minimum(first + tiles * BLOCK, end)
    if first < skew:
        pieces = _pieces(first, BLOCK, PIECE)
        z = _load_edge(base, pieces, skew, end, wanted, PIECE)
        value = _gradient(z, anchor, flat, peak, tilt, lift, y, first, BLOCK, PIECE, TILTED, BASED)
        _store_edge(out, value, pieces, skew, end, PIECE)
        first += BLOCK
    full = first + tl.maximum(stop - first, 0) // BLOCK * BLOCK
    for cell in range(first, full, BLOCK):
        lanes = _pieces(0, BLOCK, PIECE) + _entries(PIECE)
        z = tl.load(base + cell + lanes, mask=wanted, other=_MINUS_INF).to(tl.float32)
        value = _gradient(z, anchor, flat, peak, tilt, lift, y, cell, BLOCK, PIECE, TILTED, BASED)
        tl.store(out + cell + lanes, value.to(grad.dtype.element_ty))
    if full < stop:
        pieces = _pieces(full, BLOCK, PIECE)
        z = _load_edge(base, pieces, skew, end, wanted, PIECE)
        value = _gradient(z, anchor, flat, peak, tilt, lift, y, full, BLOCK, PIECE, TILTED, BASED)
        _store_edge(out, value, pieces, skew, end, PIECE)


# Whether the kernels run in Triton's interpreter, on tensors of any device.
INTERPRETED = not isinstance(token_stats_fwd_kernel, triton.JITFunction)


def token_stats(
    logits: torch.Tensor, targets: torch.Tensor, consume: bool = False, wanted: Wanted = FOUR
) -> torch.Tensor:
    """Return (m, S, T, z_y) and what is wanted; see `megatron_mile.ops.token_stats.TokenStats`.

    Consumed logits stay as they are until the backward, which reads them anyway.
    """
    if logits.size(-1) == 0:
        return reference.token_stats(logits, targets, wanted=wanted)
    return _forward(logits.detach(), targets, *wanted)


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


def _forward_result(
    logits: torch.Tensor, targets: torch.Tensor, shifts: bool, squares: bool
) -> torch.Tensor:
    number = Wanted(shifts, squares).number
    return logits.new_empty(number, *targets.shape, dtype=torch.float32)


@operator("token_stats", _forward_result)
def _forward(
    logits: torch.Tensor, targets: torch.Tensor, shifts: bool, squares: bool
) -> torch.Tensor:
    stats = _forward_result(logits, targets, shifts, squares)
    rows = targets.numel()
    if rows == 0:
        return stats
    logits = _in_rows(logits)
    tiling = _Tiling.of(logits)
    tiles, parts = tiling.shared(rows, _multiprocessors(logits.device))
    partial = stats if parts == 1 else stats.new_empty(len(stats), parts, rows)
    wanted = {"SHIFTS": shifts, "SQUARES": squares}
    with torch.cuda.device_of(logits):
        token_stats_fwd_kernel[(rows, parts)](
            logits,
            *logits.stride()[:2],
            targets.contiguous(),
            partial,
            rows,
            *logits.shape[1:],
            tiles,
            BLOCK=tiling.block,
            PIECE=tiling.piece,
            **wanted,
            num_warps=tiling.warps,
            **_REGISTERS,
        )
        if parts > 1:
            padded = triton.next_power_of_2(parts)
            block = max(1, 1024 // padded)
            token_stats_join_kernel[(triton.cdiv(rows, block),)](
                partial, stats, rows, parts, PARTS=padded, BLOCK=block, **wanted
            )
    return stats


def _nothing(
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    flat: torch.Tensor,
    peak: torch.Tensor,
    tilt: torch.Tensor | None,
    base: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    return None


@operator("token_stats_backward", _nothing, mutates=("out",))
def _backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    flat: torch.Tensor,
    peak: torch.Tensor,
    tilt: torch.Tensor | None,
    base: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if logits.numel() == 0:
        return
    # The interpreter cuts off to bf16 where a GPU rounds, so torch does it there.
    wide = INTERPRETED and out.dtype == torch.bfloat16
    grad = _in_rows(torch.empty_like(out, dtype=torch.float32) if wide else out)
    logits = _in_rows(logits)
    tiling, rows = _Tiling.of(logits), targets.numel()
    tiles, parts = tiling.shared(rows, _multiprocessors(logits.device), _TILES)
    with torch.cuda.device_of(logits):
        token_stats_bwd_kernel[(rows, parts)](
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
            tiles,
            (flat if base is None else base).contiguous(),
            BLOCK=tiling.block,
            PIECE=tiling.piece,
            TILTED=tilt is not None,
            BASED=base is not None,
            ALIKE=_are_alike(logits, grad),
            num_warps=tiling.warps,
            **_REGISTERS,
        )
    if grad.data_ptr() != out.data_ptr():
        out.copy_(grad.view_as(out))


def _in_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return [outer, inner, V] with stride 1 in V: a view where the strides allow, else a copy."""
    if tensor.dim() != 3:
        tensor = tensor.reshape(tensor.shape[:-1].numel(), 1, tensor.size(-1))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return where the rows of [outer, inner, V] begin: bytes of the first, and between two."""
    size = tensor.element_size()
    outer, inner = (
        stride * size if length > 1 else 0
        for length, stride in zip(tensor.shape, tensor.stride()[:2], strict=False)
    )
    return tensor.data_ptr(), outer, inner


def _are_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether rows of a and b begin equally far from a multiple of 16 bytes."""
    offsets = zip(_offsets(a), _offsets(b), strict=True)
    return a.dtype == b.dtype and all((x - y) % 16 == 0 for x, y in offsets)


def _multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; a CPU counts as one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Tiling(NamedTuple):
    """How rows are cut: entries of a tile, of 16 bytes, warps of a program, tiles of a row."""

    block: int
    piece: int
    warps: int
    tiles: int

    @classmethod
    def of(cls, logits: torch.Tensor) -> "_Tiling":
        """Return that of logits [outer, inner, V]; a short row takes fewer warps."""
        piece, columns = 16 // logits.element_size(), logits.size(-1)
        of_a_warp = 32 * piece * _LOADS.value
        warps = min(_WARPS, triton.next_power_of_2(triton.cdiv(columns, of_a_warp)))
        skew = 0 if all(offset % 16 == 0 for offset in _offsets(logits)) else piece - 1
        block = warps * of_a_warp
        return cls(block, piece, warps, triton.cdiv(columns + skew, block))

    def shared(self, rows: int, multiprocessors: int, most: int | None = None) -> tuple[int, int]:
        """Return the tiles of a program and the programs of a row.

        Every multiprocessor gets 32 warps, half of what it holds, as far as there are tiles; and a
        program gets `most` tiles at most.
        """
        programs = triton.cdiv(multiprocessors * 32, self.warps * rows)
        tiles = max(1, self.tiles // programs)
        tiles = tiles if most is None else min(tiles, most)
        return tiles, triton.cdiv(self.tiles, tiles)
