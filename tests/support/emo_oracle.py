"""EMO's oracle, dense and in float64 from its equations, and cost rows that are hard to compute.

It uses nothing of the library.
"""

from typing import NamedTuple

import torch

from support.helpers import IGNORED


class EmoTruth(NamedTuple):
    """What the oracle gives: per-token fields, and the gradient [..., V]; all float64."""

    loss: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    emo: torch.Tensor
    grad: torch.Tensor


def emo_oracle(
    logits: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    mode: str = "1",
    gt_q: bool = False,
    cap: float = 0.0,
    upstream: torch.Tensor | None = None,
) -> EmoTruth:
    """Compute EMO's loss per token and, by autograd, its gradient.

    Ignored tokens are 0 throughout; other targets outside the vocabulary are NaN. `rows` is the
    whole cost matrix [V, d]; `upstream` is the gradient that reaches the loss, 1 if not given.
    """
    z = logits.detach().double().requires_grad_()
    valid = targets != IGNORED
    known = (targets >= 0) & (targets < z.size(-1))
    y = torch.where(known, targets, 0).long().unsqueeze(-1)
    log_q = torch.log_softmax(z, -1)
    q = log_q.exp()
    entropy = -(q * torch.where(q > 0, log_q, 0.0)).sum(-1)
    distance = (q * costs(rows)[y.squeeze(-1)]).sum(-1)
    nll = -log_q.gather(-1, y).squeeze(-1)
    emo = distance + q.gather(-1, y).squeeze(-1).detach() * gt_q
    ratio = (nll / (emo + 1e-10)).detach()
    ratio = ratio.clamp(max=cap) if cap else ratio
    loss = {
        "1": 0.5 * (nll + ratio * emo),
        "2": (emo / (nll + 1e-10)).detach() * nll + emo,
        "alone": distance,
    }[mode]
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    (grad,) = torch.autograd.grad(loss[known], z, upstream[known], materialize_grads=True)

    def settled(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return values.detach().masked_fill(~mask, torch.nan)

    fields = [settled(x, known) for x in (loss, nll)] + [entropy.detach(), settled(distance, known)]
    fields = [x.masked_fill(~valid, 0) for x in fields]
    grad = settled(grad, known.unsqueeze(-1)).masked_fill(~valid.unsqueeze(-1), 0)
    return EmoTruth(*fields, grad)


def costs(rows: torch.Tensor) -> torch.Tensor:
    """Return 1 - cos of all pairs, float64 [V, V]; 1 for rows of zeros, 0 on the diagonal."""
    rows = rows.double()
    norms = rows.norm(dim=-1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms, 0)
    found = (1 - unit @ unit.t()).clamp(min=0)
    return found.fill_diagonal_(0)


def hard_cost_rows(vocab: int, width: int, dtype: torch.dtype, seed: int = 5) -> torch.Tensor:
    """Return cost rows [V, d], correlated, some of them zero, parallel, opposite, long or short."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(vocab, width, generator=random, dtype=torch.float64) + 0.5
    if vocab > 12:
        rows[3] = 0
        rows[5], rows[6] = 2 * rows[4], -rows[4]
        rows[7] *= 1e4
        rows[8] *= 1e-4
    return rows.to(dtype)


def certain_rows(count: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return fp32 logits [T, V], targets and cost rows: all mass on some wrong token or two.

    nll is up to 100 and more, and so is the tilt of mode 1, times a difference that vanishes.
    """
    random = torch.Generator().manual_seed(3)
    logits = 20 * torch.randn(count, vocab, generator=random)
    targets = torch.randint(vocab, (count,), generator=random)
    return logits, targets, torch.randn(vocab, 32, generator=random) + 0.5
