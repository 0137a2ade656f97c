"""EMO's statistics in plain torch: the truth that every other implementation is held to."""

import torch

from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats.reference import token_stats


def _exps(logits: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Return e^(z-m) as a new [n, V] tensor in m's dtype; 0 where no logit is finite."""
    anchor = m.masked_fill(m == -torch.inf, 0)  # -inf - -inf would be NaN
    return torch.sub(logits, anchor.unsqueeze(-1)).exp_()


def _costs(products: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return c as a new [n, V] tensor in the dtype of `scale`; a cosine may be rounded beyond 1."""
    return products.to(scale.dtype, copy=True).mul_(scale).neg_().add_(1).clamp_(0, 2)


def emo_stats(
    logits: torch.Tensor,
    products: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Return (m, S, T, z_y, R, C), [6, n]; see `megatron_mile.ops.emo.EmoStats`."""
    stats = token_stats(logits, targets)
    exps = _exps(logits, stats[0])
    column = targets.clamp(min=0).unsqueeze(-1)
    # Without a target here all entries stay; else both sums leave it out.
    kept = torch.where(targets.unsqueeze(-1) < 0, exps.gather(-1, column), 0)
    exps.scatter_(-1, column, kept)
    rest = exps.sum(-1, dtype=torch.float64)
    cost = exps.mul_(_costs(products, scale)).sum(-1, dtype=torch.float64)
    return torch.stack([*stats.double(), rest, cost])


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
    flat, peak, tilt, _ = coefficients.map(lambda x: x.unsqueeze(-1))
    assert tilt is not None
    grad = _costs(products, scale).sub_(distance.unsqueeze(-1)).mul_(tilt).add_(flat)
    grad.mul_(_exps(logits, m))
    column = targets.clamp(min=0).unsqueeze(-1)
    grad.scatter_(-1, column, torch.where(targets.unsqueeze(-1) < 0, grad.gather(-1, column), peak))
    # A select, because 0 * NaN of a row's logits is NaN.
    grad.masked_fill_(coefficients.are_zero().unsqueeze(-1), 0)
    out.copy_(grad)
