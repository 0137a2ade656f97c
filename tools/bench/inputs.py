"""Makes the data of one case, and by definition, in fp64, what the answer must be."""

from __future__ import annotations

import math
from typing import Any

import torch

from tools.bench.case import DTYPES, GAMMA, SIGMA, Case, Inputs, config_of

OBJECTIVES = ("ce", "mile")
_CHECKED_ROWS = 256


def make_inputs(case: Case, rank: int, device: torch.device) -> Inputs:
    """Make the same data on every rank and keep the shard of `rank`.

    Half of the targets are likely and half are not, so that the losses differ.
    """
    width = case.vocab // case.tp
    shard = slice(rank * width, (rank + 1) * width)
    return (_with_output_layer if case.hidden else _with_logits)(case, shard, device)


def _with_logits(case: Case, shard: slice, device: torch.device) -> Inputs:
    random = torch.Generator(device).manual_seed(0)
    shape = (case.tokens, case.vocab)
    logits = torch.randn(shape, generator=random, device=device, dtype=DTYPES[case.dtype]).mul_(2)
    targets = torch.randint(case.vocab, shape[:1], generator=random, device=device)
    likely = torch.arange(0, case.tokens, 2, device=device)
    logits[likely, targets[likely]] = _likely_logit(case)
    upstream = torch.rand(case.tokens, generator=random, device=device) + 0.5
    rows = _spread(case.tokens, device)
    shape = (case.vocab, case.cost_width)
    cost = torch.randn(shape, generator=random, device=device).to(logits.dtype)
    truths = {}
    costs = {"ce": None, "emo": cost} if case.cost_width else dict.fromkeys(OBJECTIVES)
    costs |= {case.settings: None} if case.settings else {}
    for objective, rows_of_cost in costs.items():
        loss, gradient = oracle(
            logits[rows], targets[rows], objective, upstream[rows], rows_of_cost
        )
        truths[objective] = {"loss": loss, "logits": gradient[:, shard].clone()}
    checked = {"loss": rows, "logits": rows}
    leaves = {"logits": logits[:, shard].clone()}
    given = (cost[shard].clone(),) if case.cost_width else ()
    return Inputs(leaves, targets, upstream, checked, truths, given)


def _with_output_layer(case: Case, shard: slice, device: torch.device) -> Inputs:
    """Make weights and hidden states whose products have the spread of the given logits."""
    random = torch.Generator(device).manual_seed(0)
    weight = torch.randn((case.vocab, case.hidden), generator=random, device=device)
    weight.mul_(2 / math.sqrt(case.hidden))
    hidden = torch.randn((case.tokens, case.hidden), generator=random, device=device)
    targets = torch.randint(case.vocab, (case.tokens,), generator=random, device=device)
    likely = torch.arange(0, case.tokens, 2, device=device)
    wanted = weight[targets[likely]]
    missing = _likely_logit(case) - (hidden[likely] * wanted).sum(-1)
    hidden[likely] += (missing / wanted.square().sum(-1)).unsqueeze(-1) * wanted
    upstream = torch.rand(case.tokens, generator=random, device=device) + 0.5
    hidden, weight = (x.to(DTYPES[case.dtype]) for x in (hidden, weight))
    rows, ids = _spread(case.tokens, device), _spread(shard.stop - shard.start, device)
    checked = {"loss": rows, "hidden": rows, "weight": ids}
    truths = {
        objective: linear_oracle(
            hidden, weight, targets, objective, upstream, rows, ids + shard.start
        )
        for objective in OBJECTIVES
    }
    leaves = {"hidden": hidden, "weight": weight[shard].clone()}
    return Inputs(leaves, targets, upstream, checked, truths)


def _likely_logit(case: Case) -> float:
    """Return the logit of a probability of a half, where p_y - 1 cancels little.

    The others, of standard deviation 2, add up to about V e^2.
    """
    return math.log(case.vocab) + 2


def _spread(size: int, device: torch.device) -> torch.Tensor:
    """Return up to `_CHECKED_ROWS` of the numbers below `size`, int64."""
    count = min(size, _CHECKED_ROWS)
    return torch.linspace(0, size - 1, count, dtype=torch.float64, device=device).long()


def oracle(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: str,
    upstream: torch.Tensor,
    cost: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss [R] and gradient [R, V] in fp64: softmax, entropy and autograd by definition.

    Args:
        logits: [R, V], the whole vocabulary.
        targets: [R].
        objective: "ce", or "mile" for (1 + H) * nll with the weight held constant, or "emo" for
            (nll + (nll / D) * D) / 2 with the ratio held constant, or words for `config_of`.
        upstream: [R].
        cost: [V, d], the rows whose angles make the distance D of EMO; None for the others.
    """
    z = logits.double().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    nll = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    weights: dict[str, Any] = {"ce": 1, "mile": (SIGMA + entropy) ** GAMMA, "emo": 1}
    loss = weights[objective] * nll if objective in weights else _set_up(objective, z, log_p, nll)
    if cost is not None:
        unit = torch.nn.functional.normalize(cost.double(), dim=-1)
        distance = 1 - (log_p.exp() * (unit[targets] @ unit.t())).sum(-1)
        loss = 0.5 * (loss + (loss / distance).detach() * distance)
    (gradient,) = torch.autograd.grad(loss, z, upstream.double())
    return loss.detach(), gradient


def _set_up(settings: str, z: torch.Tensor, log_p: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """Return the loss of some settings, with its z-loss; the weight by its own function in fp64."""
    config = config_of(settings)
    weight: Any = 1
    if config.definition.weight is not None:
        p = log_p.exp()
        given = dict(config.own)
        if config.definition.needs_squares:
            given["squares"] = p.square().sum(-1).detach()
        entropy = -(p * log_p).sum(-1)
        entropy = entropy if config.entropy_slope else entropy.detach()
        weight = config.definition.weight(nll.detach(), entropy, **given)
        if config.definition.value is not None:
            value = config.definition.value(nll, entropy, **given)
            return value + config.z_loss * z.logsumexp(-1).square()
    eps = config.label_smoothing
    smoothed = (1 - eps) * nll - eps * log_p.mean(-1)
    return weight * smoothed + config.z_loss * z.logsumexp(-1).square()


def linear_oracle(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    objective: str,
    upstream: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return some rows of the loss [T], d(hidden) [T, H] and d(weight) [V, H], in fp64.

    Args:
        hidden: [T, H].
        weight: [V, H], the whole vocabulary.
        targets: [T].
        objective: as for `oracle`.
        upstream: [T].
        rows: tokens of the loss and of d(hidden).
        ids: rows of d(weight).
    """
    h, w = hidden.double(), weight.double()
    loss, d_logits = oracle(h[rows] @ w.t(), targets[rows], objective, upstream[rows])
    d_weight = w.new_zeros(len(ids), w.size(1))
    # All logits in fp64 would not fit where the timed ones just do.
    for part in torch.arange(len(h), device=h.device).split(_CHECKED_ROWS):
        _, d_part = oracle(h[part] @ w.t(), targets[part], objective, upstream[part])
        d_weight += d_part[:, ids].t() @ h[part]
    return {"loss": loss, "hidden": d_logits @ w, "weight": d_weight}
