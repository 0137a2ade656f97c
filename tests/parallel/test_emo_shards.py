"""EMO over vocabulary shards: real gloo ranks against the float64 oracle."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.collectives import CommDebugMode
from support.emo_oracle import EmoTruth, certain_rows, emo_oracle, hard_cost_rows
from support.helpers import error, hard_rows, run_ranks

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.loss import token_loss

# Measured: fp64 5.1e-16, fp32 2.1e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
MIXES = [("1", False, 0), ("1", True, 3), ("2", False, 0), ("2", True, 0), ("alone", False, 0)]
# Borders of the shards, as in test_vocab: padded and equal, ragged, one without columns.
SPLITS = {
    1: {"equal": [0, 128]},
    2: {"equal": [0, 64, 128], "ragged": [0, 100, 127], "empty": [0, 0, 127]},
    4: {"equal": [0, 32, 64, 96, 128], "ragged": [0, 1, 40, 40, 127]},
}
WIDTH = 24
CERTAIN = [0, 1, 400, 400, 1003]


def _shard(
    dtype: torch.dtype, borders: list[int], equal: bool, mix: tuple[Any, ...], group: Any
) -> list[tuple[torch.Tensor, ...]]:
    """Return fields and this rank's gradient: rows fetched by the loss, ahead of it, from a table.

    The last is in place.
    """
    start, end = borders[dist.get_rank(group) :][:2]
    where = (group, None if equal else (start, end))
    logits, targets = hard_rows(borders[-1], dtype)
    rows = hard_cost_rows(borders[-1], WIDTH, dtype)[start:end]
    config = ObjectiveConfig("emo", emo_mode=mix[0], emo_gt_q=mix[1], emo_cap=mix[2])
    costs = [CostRows(rows), CostRows(rows).fetch(targets, *where), CostRows(rows).tabulate(*where)]
    results = []
    for cost, inplace in (
        (costs[0], False),
        (costs[1], False),
        (costs[2], False),
        (costs[0], True),
    ):
        shard = logits[:, start:end].clone().requires_grad_()
        out = token_loss(shard * 1, targets, config, *where, inplace=inplace, cost=cost)
        (grad,) = torch.autograd.grad(out.loss, shard, torch.ones_like(out.loss))
        assert out.emo is not None
        results.append((out.loss.detach(), out.nll, out.entropy, out.emo, grad))
    return results


def _collectives(group: Any) -> dict[str, tuple[list[str], int]]:
    """Return the collectives of fetch, and of forward and backward for each source of rows."""
    targets, cost = torch.tensor([0, 9, 15]), CostRows(torch.randn(8, 3))
    config, found = ObjectiveConfig("emo"), {}
    with CommDebugMode() as mode:
        ahead = cost.fetch(targets, group)
    found["fetch"] = (_names(mode), 0)
    table = CostRows(torch.randn(8, 3)).tabulate(group)
    for name, source in (("rows", cost), ("ahead", ahead), ("table", table)):
        shard = torch.randn(3, 8, requires_grad=True)
        with CommDebugMode() as forward:
            loss = token_loss(shard, targets, config, group, cost=source).loss
        with CommDebugMode() as backward:
            loss.sum().backward()
        found[name] = (_names(forward), backward.get_total_counts())
    return found


def _names(mode: CommDebugMode) -> list[str]:
    counts = mode.get_comm_counts().items()
    return sorted(str(op).rsplit(".", 1)[-1] for op, count in counts for _ in range(count))


def _work() -> dict[str, Any]:
    """Run every case on 4 ranks: as one group, as two groups of two, and alone."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[dist.get_rank() // 2]
    groups = {1: dist.new_subgroups(1)[0], 2: pair, 4: dist.group.WORLD}
    results: dict[str, Any] = {
        f"{dtype} {size} {split}": [
            _shard(dtype, borders, split == "equal", mix, groups[size]) for mix in MIXES
        ]
        for dtype in TOLERANCE
        for size, splits in SPLITS.items()
        for split, borders in splits.items()
    }
    start, end = CERTAIN[dist.get_rank() :][:2]
    logits, targets, rows = certain_rows(256, CERTAIN[-1])
    shard = logits[:, start:end].clone().requires_grad_()
    cost = CostRows(rows[start:end])
    out = token_loss(
        shard, targets, ObjectiveConfig("emo"), dist.group.WORLD, (start, end), cost=cost
    )
    (results["certain"],) = torch.autograd.grad(out.loss.sum(), shard)
    results["collectives"] = _collectives(pair)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What the four ranks found: one spawn for the whole file."""
    return run_ranks(4, _work)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("size", "split"), [(size, split) for size, splits in SPLITS.items() for split in splits]
)
def test_token_loss_over_shards_matches_oracle(
    ranks: list[dict[str, Any]], size: int, split: str, dtype: torch.dtype
) -> None:
    vocab = SPLITS[size][split][-1]
    logits, targets = hard_rows(vocab, dtype)
    rows = hard_cost_rows(vocab, WIDTH, dtype)
    parts = [ranks[rank][f"{dtype} {size} {split}"] for rank in range(size)]
    for i, mix in enumerate(MIXES):
        truth = emo_oracle(logits, targets, rows, *mix)
        for source in range(4):
            shards = [part[i][source] for part in parts]
            ours = (*shards[0][:4], torch.cat([shard[-1] for shard in shards], -1))
            for name, a, b in zip(EmoTruth._fields, ours, truth, strict=True):
                assert error(a, b) <= TOLERANCE[dtype], (mix, source, name, error(a, b))
            for other in shards[1:]:  # the same bits on all ranks
                torch.testing.assert_close(other[:4], shards[0][:4], rtol=0, atol=0, equal_nan=True)


def test_token_loss_uses_one_gather_and_the_exchange_of_rows(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        found = result["collectives"]
        (gather,) = found["ahead"][0]
        assert "gather" in gather
        assert found["table"] == found["ahead"] == ([gather], 0)
        (exchange,) = found["fetch"][0]
        assert "reduce" in exchange
        assert found["rows"] == (sorted([gather, exchange]), 0)


def test_token_loss_over_shards_keeps_the_digits_of_certain_rows(
    ranks: list[dict[str, Any]],
) -> None:
    grad = torch.cat([rank["certain"] for rank in ranks], -1)
    expected = emo_oracle(*certain_rows(256, CERTAIN[-1])).grad
    assert error(grad, expected) <= 1.3e-6  # measured 9.9e-7; 1.9e-6 with D rounded
