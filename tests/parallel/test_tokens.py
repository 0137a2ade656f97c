"""The normaliser over tokens on two real gloo ranks with unequal entropies and masks."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.collectives import CommDebugMode
from support.helpers import error, oracle, run_ranks

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import reduce_loss, token_loss
from megatron_mile.parallel.tokens import normaliser

MODES = ("global", "local", "none", "official")
VOCAB = 23
# Per rank and token. "unequal": other counts, entropies and fractions on the ranks; "full": nothing
# masked, where the authors' formula is exact; "one masked": a rank without a token; "all masked".
MASKS = {
    "unequal": ([1, 1, 0, 0.5, 1, 1], [0, 0, 1, 0, 0.25, 0]),
    "full": ([1] * 6, [1] * 6),
    "one masked": ([1, 1, 0, 1, 1, 1], [0] * 6),
    "all masked": ([0] * 6, [0] * 6),
}


class Batch(NamedTuple):
    """One rank's micro-batch."""

    logits: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def _batch(rank: int, masks: str) -> Batch:
    """Return float64 logits, flat on rank 0 and peaked on rank 1."""
    random = torch.Generator().manual_seed(rank)
    scale = (0.5, 6.0)[rank]
    logits = scale * torch.randn(2, 3, VOCAB, generator=random, dtype=torch.float64)
    targets = torch.randint(VOCAB, (2, 3), generator=random)
    return Batch(logits, targets, torch.tensor(MASKS[masks][rank]).view(2, 3))


def _reduce(
    masks: str, mode: str, group: dist.ProcessGroup | None, objective: str = "mile"
) -> dict[str, Any]:
    """Return this rank's alpha, loss and gradient, and the number of collectives for the loss."""
    batch, config = _batch(dist.get_rank(), masks), ObjectiveConfig(objective, normalize=mode)
    leaf = batch.logits.clone().requires_grad_()
    out = token_loss(leaf, batch.targets, config)
    alpha = normaliser(out.weight, batch.mask, mode, group)
    with CommDebugMode() as counter:
        loss = reduce_loss(out, batch.mask, config, group)
    (grad,) = torch.autograd.grad(loss, leaf)
    counts = counter.get_total_counts()
    return {"alpha": alpha, "loss": loss.detach(), "grad": grad, "collectives": counts}


def _work() -> dict[Any, Any]:
    groups = {"both": dist.group.WORLD, "alone": None}
    results: dict[Any, Any] = {
        (masks, mode, name): _reduce(masks, mode, group)
        for masks in MASKS
        for mode in MODES
        for name, group in groups.items()
    }
    for mode in MODES:
        results["ce", mode] = _reduce("unequal", mode, dist.group.WORLD, "ce")
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """What the two ranks found: one spawn for the whole file."""
    return run_ranks(2, _work)


def _sums(rank: int, masks: str) -> tuple[float, float, float]:
    """Return sum(M), sum(M w), sum(M w nll) of a rank, by the oracle."""
    batch = _batch(rank, masks)
    truth, mask = oracle(batch.logits, batch.targets), batch.mask.double()
    return mask.sum().item(), (mask * truth.weight).sum().item(), (mask * truth.loss).sum().item()


def _alpha(rank: int, masks: str, mode: str, together: bool) -> float:
    """Return alpha from its definition."""
    sums = [_sums(r, masks) for r in range(2)]
    chosen = sums if together else [sums[rank]]
    each = [m / mw if m else None for m, mw, _ in chosen]
    if mode == "global":
        m, mw = sum(s[0] for s in chosen), sum(s[1] for s in chosen)
        return m / mw if m else 1.0
    if mode == "local":
        return (each[rank] if together else each[0]) or 1.0
    some = [alpha for alpha in each if alpha is not None]
    return sum(some) / len(some) if some and mode == "official" else 1.0


@pytest.mark.parametrize("name", ["both", "alone"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masks", MASKS)
def test_reduce_loss_matches_oracle(
    ranks: list[dict[Any, Any]], masks: str, mode: str, name: str
) -> None:
    for rank in range(2):
        result, batch = ranks[rank][masks, mode, name], _batch(rank, masks)
        alpha = _alpha(rank, masks, mode, together=name == "both")
        count, _, weighted = _sums(rank, masks)
        scale = alpha / count if count else 0.0
        expected = oracle(batch.logits, batch.targets).grad * batch.mask.unsqueeze(-1) * scale
        assert result["alpha"].item() == pytest.approx(alpha, rel=1e-14)
        assert result["loss"].item() == pytest.approx(scale * weighted, rel=1e-14, abs=0)
        assert error(result["grad"], expected) <= 1e-14


def test_normaliser_modes_differ_on_unequal_ranks(ranks: list[dict[Any, Any]]) -> None:
    for result in ranks:
        alphas = sorted(result["unequal", mode, "both"]["alpha"].item() for mode in MODES)
        assert min(b / a for a, b in pairwise(alphas)) > 1.02


def test_normaliser_global_is_one_for_all_ranks(ranks: list[dict[Any, Any]]) -> None:
    for mode in ("global", "official"):
        first, second = (result["unequal", mode, "both"]["alpha"] for result in ranks)
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["both", "alone"])
def test_normaliser_official_is_the_authors_formula(ranks: list[dict[Any, Any]], name: str) -> None:
    # Theirs: each rank's 1 / mean(w) over all of its tokens, summed over ranks and divided by them.
    weights = []
    for rank in range(2):
        p = _batch(rank, "full").logits.softmax(-1)
        weights.append((1 - (p * p.log()).sum(-1)).mean().item())
    for rank in range(2):
        theirs = [1 / w for w in (weights if name == "both" else weights[rank : rank + 1])]
        alpha = ranks[rank]["full", "official", name]["alpha"].item()
        assert alpha == pytest.approx(sum(theirs) / len(theirs), rel=1e-14)


def test_reduce_loss_of_a_fully_masked_rank_is_exactly_zero(ranks: list[dict[Any, Any]]) -> None:
    for mode in MODES:
        result = ranks[1]["one masked", mode, "both"]
        assert result["loss"].item() == 0
        assert torch.equal(result["grad"], torch.zeros(2, 3, VOCAB, dtype=torch.float64))


def test_reduce_loss_uses_one_collective_where_alpha_is_shared(ranks: list[dict[Any, Any]]) -> None:
    for result in ranks:
        counts = {mode: result["unequal", mode, "both"]["collectives"] for mode in MODES}
        assert counts == {"global": 1, "local": 0, "none": 0, "official": 1}
        assert all(result["unequal", mode, "alone"]["collectives"] == 0 for mode in MODES)
        assert all(result["ce", mode]["collectives"] == 0 for mode in MODES)  # alpha is 1


def test_normaliser_sums_keep_their_digits_in_fp32() -> None:
    # 2^24 + 1 tokens cannot be counted in fp32; the weight is representable.
    mask = torch.ones((1 << 24) + 1, dtype=torch.bool)
    weight = torch.ones(mask.shape)
    weight[-1] = 1 << 24
    alpha = normaliser(weight, mask, "local")
    assert alpha.dtype == torch.float32
    assert alpha.item() == pytest.approx(((1 << 24) + 1) / (1 << 25), rel=6e-8)


def test_normaliser_carries_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert not any(normaliser(weight, torch.ones(3), mode).requires_grad for mode in MODES)


def test_normaliser_refuses_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="mode is 'mean'; expected global"):
        normaliser(torch.ones(3), torch.ones(3), "mean")
