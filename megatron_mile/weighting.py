"""From joined token statistics to loss per token and the coefficients of its gradient."""

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.objectives import OBJECTIVES, emo
from megatron_mile.parallel import ProcessGroup
from megatron_mile.parallel.vocab import join_stats


def weigh_shard(
    shard: torch.Tensor, valid: torch.Tensor, config: ObjectiveConfig, group: ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss per token and the coefficients of this shard's gradient; one all_gather.

    Args:
        shard: (m, S, T, z_y) of this shard, [4, ...].
        valid: bool [...]; other tokens get 0 throughout.
        config: The objective.
        group: Tensor-parallel group; None for this rank alone.

    Returns:
        (loss, nll, entropy, weight), [4, ...] in the dtype of `shard`; and (flat, peak) or (flat,
        peak, tilt) as `TokenStats.token_stats_backward` takes them, fp64 [2 or 3, ...].
    """
    stats = join_stats(shard, group)
    fields, coefficients = weigh(stats, config)
    coefficients = rebase(coefficients, shard[0] - stats[0])
    return fields.masked_fill(~valid, 0).to(shard.dtype), coefficients.masked_fill(~valid, 0)


def scale_coefficients(
    coefficients: torch.Tensor, grad: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return coefficients * grad [...] in `dtype`, exactly 0 where grad is, whatever they hold."""
    return (coefficients * grad).masked_fill(grad == 0, 0).to(dtype)


def weigh(stats: torch.Tensor, config: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, nll, H, w) and the gradient's coefficients at an incoming gradient of 1.

    With p = e^(z-m) / S the gradient w (p - 1_y) - nll w'(H) p (ln p + H) is
    e^(z-m) (flat + tilt (z-m)) - w 1_y; tilt is 0 and left out where w is held constant. At the
    target it is one number per token, peak, so that no rounding of a logit's exponential enters
    p_y - 1. Everything is fp64, because a large gamma amplifies the rounding of H.

    Args:
        stats: (m, S, T, z_y) of the whole vocabulary, fp64 [4, ...].
        config: The objective.

    Returns:
        fp64 [4, ...], and (flat, peak) or (flat, peak, tilt), fp64 [2 or 3, ...].
    """
    m, total, moment, z_y = stats
    log_total, spread = total.log(), -moment / total
    nll = log_total - (z_y - m)
    entropy = (log_total + spread).clamp(min=0)
    objective = OBJECTIVES[config.objective]
    weight = objective.weight(nll, entropy, config)
    loss = weight * nll
    # A weight may be finite where no shard held the target; the gradient must not be.
    height = weight.masked_fill(nll.isnan(), torch.nan)
    flat, peak, tilts = height / total, height * torch.expm1(-nll), []
    if config.entropy_grad:
        tilt = -nll * objective.weight_slope(nll, entropy, config) / total
        flat = flat + tilt * spread
        peak = peak + tilt * torch.exp(z_y - m) * (z_y - m + spread)
        tilts = [tilt]
    return torch.stack([loss, nll, entropy, weight]), torch.stack([flat, peak, *tilts])


def rebase(coefficients: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Make coefficients of e^(z-m) those of e^(z-m_r), with m_r the maximum of this shard alone.

    Args:
        coefficients: (flat, peak) or (flat, peak, tilt), fp64 [2 or 3, ...].
        shift: m_r - m, fp64 [...]; -inf or NaN where the shard has no finite logit.
    """
    flat, peak, *tilts = coefficients
    shift = torch.where(shift > -torch.inf, shift, 0)  # e^(z-m_r) is 0 there: any finite shift
    scale = shift.exp()
    flat = scale * (flat + tilts[0] * shift if tilts else flat)
    return torch.stack([flat, peak, *(scale * tilt for tilt in tilts)])


def weigh_transport(
    shard: torch.Tensor,
    valid: torch.Tensor,
    config: ObjectiveConfig,
    group: ProcessGroup | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return EMO's loss per token and the coefficients of this shard's gradient; one all_gather.

    With q = e^(z-m) / S, and a and b the factors of `emo.mix`, the gradient is
    a (q - 1_y) + b q (c - DEMD) = e^(z-m) (flat + slope (c - DEMD)) - a 1_y. nll is made of R, the
    mass beside the target, because mode 2 divides by it where it is small.

    Args:
        shard: (m, S, T, z_y, R, D) of this shard, fp64 [6, ...].
        valid: bool [...]; other tokens get 0 throughout.
        config: The objective.
        group: Tensor-parallel group; None for this rank alone.
        dtype: Of the fields.

    Returns:
        (loss, nll, entropy, weight, DEMD), [5, ...]; and (flat, peak, slope) as
        `Transport.transport_block_backward` takes them, fp64 [3, ...].
    """
    m, total, moment, z_y, rest, paid = join_stats(shard, group)
    nll = torch.logaddexp(rest.log() - (z_y - m), torch.zeros_like(m))
    entropy = (total.log() - moment / total).clamp(min=0)
    total = rest + torch.exp(z_y - m)
    distance = paid / total
    mixed = emo.mix(nll, distance, config)
    weight = emo.weight(nll, entropy, config)
    fields = torch.stack([mixed.loss, nll, entropy, weight, distance])
    flat, slope = mixed.of_nll / total, mixed.of_distance / total
    peak = mixed.of_nll * torch.expm1(-nll) - mixed.of_distance * torch.exp(-nll) * distance
    shift = shard[0] - m
    scale = torch.where(shift > -torch.inf, shift, 0).exp()  # no finite logit: any finite shift
    # The backward takes DEMD as rounded here: the large slopes must not meet what that leaves out.
    flat = flat - slope * (distance - distance.to(dtype))
    coefficients = torch.stack([scale * flat, peak, scale * slope])
    return fields.masked_fill(~valid, 0).to(dtype), coefficients.masked_fill(~valid, 0)
