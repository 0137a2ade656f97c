"""Numbers per token in plain torch: the truth that the kernels are held to, and what CPUs run."""

from collections.abc import Sequence
from functools import reduce

import torch

from megatron_mile.ops.blocks import NOTHING, Coefficients, Extras
from megatron_mile.ops.token_stats import FOUR, Wanted


def locate(
    targets: torch.Tensor, start: int, end: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (local, valid); see `megatron_mile.ops.per_token.PerToken`."""
    wide = targets.long()  # as uint8, -100 would be 156
    return columns_of(wide, start, end), wide != ignore_index


def columns_of(targets: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return int64 [...]: the target's column in the shard [start, end), -1 where it has none."""
    wide = targets.long()
    # Compared before the subtraction, which may overflow for garbage targets.
    return torch.where((wide >= start) & (wide < end), wide - start, -1)


def join(shards: torch.Tensor, wanted: Wanted = FOUR) -> torch.Tensor:
    """Return (m, S, T, z_y, nll, H, ...); see `megatron_mile.ops.per_token.PerToken`."""
    m, total, moment, z_y = stats = merge(shards[:, :4])
    log_total, spread = total.log(), -moment / total
    nll = log_total - (z_y - m)
    entropy = (log_total + spread).clamp(min=0)
    found = [nll, entropy]
    if wanted.shifts:
        shifts, columns = _merge_shifts(shards, m)
        found += [log_total - shifts / columns, columns]
    if wanted.squares:
        found += [_merge_squares(shards, m) / total.square()]
    return torch.cat([stats, torch.stack(found)])


def _merge_shifts(shards: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U = sum U_r + n_r (m_r - m) and n = sum n_r of the whole vocabulary, fp64 [...]."""
    m_r, u_r, n_r = shards[:, 0].double(), shards[:, 4].double(), shards[:, 5].double()
    # A select, because 0 * -inf of a shard without columns is NaN.
    moved = torch.where(n_r == 0, 0, u_r + n_r * (m_r - m))
    return reduce(torch.add, moved.unbind()), reduce(torch.add, n_r.unbind())


def _merge_squares(shards: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Return Q = sum a_r^2 Q_r of the whole vocabulary, fp64 [...]."""
    m_r, q_r = shards[:, 0].double(), shards[:, -1].double()
    scale = (m_r - m).masked_fill(m_r == -torch.inf, 0).exp()
    return reduce(torch.add, (scale.square() * q_r).unbind())


def merge(shards: torch.Tensor) -> torch.Tensor:
    """Merge the statistics of shards: [R, 4 + n, ...] to fp64 [4 + n, ...], added in order of R.

    With a_r = e^(m_r - m): m = max m_r, S = sum a_r S_r, T = sum a_r (T_r + (m_r - m) S_r). What
    follows on m, S, T and z_y are further sums of e^(z-m) times something, which merge as S.
    """
    if len(shards) == 1:
        return shards[0].double()
    m_r, s_r, t_r, z_r, *more_r = shards.double().unbind(1)
    m = m_r.amax(0)
    # A shard without a finite logit has S_r = T_r = 0: any finite shift leaves it out.
    shift = (m_r - m).masked_fill(m_r == -torch.inf, 0)
    scale = shift.exp()
    total = reduce(torch.add, (scale * s_r).unbind())
    moment = reduce(torch.add, (scale * (t_r + shift * s_r)).unbind())
    z_y = reduce(lambda known, z: torch.where(known.isnan(), z, known), z_r.unbind())
    more = [reduce(torch.add, (scale * x_r).unbind()) for x_r in more_r]
    return torch.stack([m, total, moment, z_y, *more])


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
    m, total, moment, z_y, nll, entropy = joined[:6]
    weight = torch.ones_like(nll) if weight is None else weight
    # A weight may be finite where no shard held the target; the gradient must not be.
    height = weight.masked_fill(nll.isnan(), torch.nan)
    flat, peak, tilt, base = height / total, height * torch.expm1(-nll), None, None
    smoothed, eps = nll, extras.smoothing
    if eps:
        uniform, columns = joined[6:8]
        smoothed = (1 - eps) * nll + eps * uniform
        base = -height * eps / columns
        peak = peak + (height * eps + base)
    if slope is not None:
        spread = -moment / total
        tilt = (-smoothed * slope / total).masked_fill(slope == 0, 0)
        flat = flat + tilt * spread
        peak = peak + tilt * torch.exp(z_y - m) * (z_y - m + spread)
    stacked = _rebase(Coefficients(flat, peak, tilt, base), maxima - m).present()
    # What weighs nothing adds 0, also where nll is infinite: 0 * inf is NaN.
    loss = (weight * smoothed).masked_fill(height == 0, 0) if value is None else value
    fields = [loss, nll, entropy, weight]
    if extras.z_loss:
        log_sum = m + total.log()
        fields += [extras.z_loss * log_sum.square()]
        rise = 2 * extras.z_loss * log_sum / total
        of_z = Coefficients(rise, rise * torch.exp(z_y - m))
        stacked += _rebase(of_z, maxima - m).present()
    values, coefficients = (torch.stack(x).masked_fill(~valid, 0) for x in (fields, stacked))
    return values.to(maxima.dtype), coefficients


def _rebase(coefficients: Coefficients, shift: torch.Tensor) -> Coefficients:
    """Make coefficients of e^(z-m) those of e^(z-m_r), with m_r the maximum of this shard alone.

    Args:
        coefficients: fp64, [...] each.
        shift: m_r - m, fp64 [...]; -inf or NaN where the shard has no finite logit.
    """
    flat, peak, tilt, base = coefficients
    shift = torch.where(shift > -torch.inf, shift, 0)  # e^(z-m_r) is 0 there: any finite shift
    scale = shift.exp()
    if tilt is None:
        return Coefficients(scale * flat, peak, None, base)
    return Coefficients(scale * (flat + tilt * shift), peak, scale * tilt, base)


def scale(
    stacked: torch.Tensor,
    grad: torch.Tensor,
    dtype: torch.dtype,
    smoothed: bool = False,
    z_grad: torch.Tensor | None = None,
) -> Coefficients:
    """Return the coefficients times grad; see `megatron_mile.ops.per_token.PerToken`."""
    own = stacked if z_grad is None else stacked[:-2]
    scaled = (own * grad).masked_fill(grad == 0, 0)
    if z_grad is not None:
        scaled[:2] += (stacked[-2:] * z_grad).masked_fill(z_grad == 0, 0)
    return Coefficients.unstack(scaled.to(dtype), smoothed)


def sum_up(
    mask: torch.Tensor,
    valid: torch.Tensor,
    nll: torch.Tensor,
    entropy: torch.Tensor,
    figures: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return the sums, [n + 3]; see `megatron_mile.ops.per_token.PerToken`."""
    counts, wide = mask != 0, mask.double()
    broken = counts & (~valid | (nll.isnan() & ~entropy.isnan()))
    sums = [(torch.where(counts, values, 0) * wide).sum() for values in figures]
    troubles = [trouble.sum().double() for trouble in (broken, mask < 0)]
    return torch.stack([wide.sum(), *sums, *troubles])
