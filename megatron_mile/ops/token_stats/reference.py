"""Token statistics in plain torch: the truth that every other implementation is held to."""

import torch

from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats import FOUR, Wanted

# e^x is exactly 0 below -746 in fp64 (-104 in fp32), so raising z - m to this floor changes no sum,
# and the products with a masked logit (-inf) become 0 * finite.
FLOOR = -1000.0


def _shifted(logits: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Return z - m as a new [..., V] tensor in m's dtype."""
    anchor = m.masked_fill(m == -torch.inf, 0)  # -inf - -inf would be NaN
    return torch.sub(logits, anchor.unsqueeze(-1))


def token_stats(
    logits: torch.Tensor, targets: torch.Tensor, consume: bool = False, wanted: Wanted = FOUR
) -> torch.Tensor:
    """Return (m, S, T, z_y) and what is wanted; see `megatron_mile.ops.token_stats.TokenStats`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.size(-1) == 0:
        of_none = [-torch.inf, 0, 0, torch.nan] + [0] * (wanted.number - 4)
        empty = torch.tensor(of_none, dtype=dtype, device=logits.device)
        shape = targets.shape
        return empty.view(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()
    m = logits.amax(-1).to(dtype)
    shifted = _shifted(logits, m)
    more = []
    if wanted.shifts:
        more += [shifted.sum(-1), torch.full_like(m, logits.size(-1))]
    exps = shifted.clamp_(min=FLOOR).exp()
    total = exps.sum(-1)
    if wanted.squares:
        more += [exps.square().sum(-1)]
    moment = exps.mul_(shifted).sum(-1)
    z_y = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).to(dtype)
    return torch.stack([m, total, moment, z_y.masked_fill(targets < 0, torch.nan), *more])


def token_stats_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
    coefficients: Coefficients,
    out: torch.Tensor | None = None,
    consumed: bool = False,
) -> torch.Tensor:
    """Return the gradient, [..., V]; see `megatron_mile.ops.token_stats.TokenStats`."""
    if logits.size(-1) == 0:
        return torch.empty_like(logits) if out is None else out
    flat, peak, tilt, base = coefficients.map(lambda x: x.unsqueeze(-1))
    shifted = _shifted(logits, m).clamp_(min=FLOOR)
    grad = shifted.exp()
    grad.mul_(flat if tilt is None else shifted.mul_(tilt).add_(flat))
    if base is not None:
        grad.add_(base)
    column = targets.clamp(min=0).unsqueeze(-1)
    at_target = torch.where(targets.unsqueeze(-1) < 0, grad.gather(-1, column), peak)
    grad.scatter_(-1, column, at_target)
    # A select, because 0 * NaN of a row's logits is NaN.
    grad.masked_fill_(coefficients.are_zero().unsqueeze(-1), 0)
    return grad.to(logits.dtype) if out is None else out.copy_(grad)
