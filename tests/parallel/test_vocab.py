"""token_loss over vocabulary shards: real gloo ranks against the float64 oracle."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.collectives import CommDebugMode
from support.helpers import (
    assert_close,
    error,
    gradients_of,
    hard_rows,
    oracle,
    run_ranks,
    smoothed_configs,
    true_z_loss,
    weighted_configs,
)

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import token_loss
from megatron_mile.ops.per_token.reference import columns_of, merge
from megatron_mile.ops.token_stats.reference import token_stats
from megatron_mile.parallel import group_size
from megatron_mile.parallel.vocab import VocabShard, gather_stats

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
CONFIGS = {
    **weighted_configs(),
    **smoothed_configs(),
    "mile 5": ObjectiveConfig(gamma=5, sigma=0),
}
# Borders of the shards. "equal" is what Megatron makes of a padded vocabulary; the others have the
# maximum and the target anywhere, one column, a shard without columns, and one shard of all.
SPLITS = {
    1: {"equal": [0, 128], "ragged": [0, 127]},
    2: {"equal": [0, 64, 128], "ragged": [0, 100, 127], "empty": [0, 0, 127]},
    4: {
        "equal": [0, 32, 64, 96, 128],
        "ragged": [0, 1, 40, 40, 127],
        "last": [0, 50, 70, 127, 127],
    },
}
CASES = [
    (dtype, size, split, name)
    for dtype in TOLERANCE
    for size, splits in SPLITS.items()
    for split in splits
    for name in CONFIGS
]


def _rows(dtype: torch.dtype, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hard rows as [3, 5, V], with one masked in all but its target's column."""
    logits, targets = hard_rows(vocab, dtype)
    masked = torch.full((3, vocab), -torch.inf, dtype=dtype)
    masked[0, 0], masked[1, vocab - 1], masked[2, 40:60] = 3.0, -3.0, 1.0
    targets = torch.cat([targets, torch.tensor([0, vocab - 1, 55])])
    return torch.cat([logits, masked]).view(3, 5, vocab), targets.view(3, 5)


def _shard(case: tuple[Any, ...], group: dist.ProcessGroup | None) -> tuple[torch.Tensor, ...]:
    """Return the fields and this rank's part of the gradient; equal shards find their own range."""
    dtype, size, split, name = case
    borders = SPLITS[size][split]
    rank = dist.get_rank(group) if group is not None else 0
    start, end = borders[rank : rank + 2]
    logits, targets = _rows(dtype, borders[-1])
    shard = logits[..., start:end].clone().requires_grad_()
    vocab_range = None if split == "equal" else (start, end)
    out = token_loss(shard, targets, CONFIGS[name], tp_group=group, vocab_range=vocab_range)
    (grad,) = gradients_of(out, shard)
    given_up = shard * 1
    again = token_loss(given_up, targets, CONFIGS[name], group, vocab_range, inplace=True)
    (inplace,) = gradients_of(again, given_up)
    assert error(inplace, grad) <= TOLERANCE[dtype]
    if out.z_loss is not None:
        exact = true_z_loss(logits, CONFIGS[name]).masked_fill(~out.valid, 0)
        assert error(out.z_loss, exact) <= TOLERANCE[dtype]
    return (*(field.detach() for field in out[:5]), grad)


# Padded on one rank, and on four, where one shard has some padding and one has nothing else.
PADDED = {1: [0, 64], 4: [0, 20, 40, 60, 80]}
WORDS = {1: 60, 4: 50}


def _padded(size: int, inplace: bool) -> None:
    """Compare this rank's fields and gradient with the oracle of the real columns alone."""
    words = WORDS[size]
    start, end = PADDED[size][dist.get_rank() :][:2]
    for dtype, tolerance in TOLERANCE.items():
        for name in ("mile", "mile through entropy", *smoothed_configs()):
            config = CONFIGS[name]
            logits, targets = hard_rows(words, dtype)
            padding = torch.full((12, PADDED[size][-1] - words), torch.nan, dtype=dtype)
            shard = torch.cat([logits, padding], -1)[:, start:end].clone().requires_grad_()
            out = token_loss(
                shard * 1, targets, config, dist.group.WORLD, inplace=inplace, vocab_size=words
            )
            (grad,) = gradients_of(out, shard)
            truth = oracle(logits, targets, config)
            pad = truth.grad.new_zeros(padding.shape)
            whole = truth._replace(grad=torch.cat([truth.grad, pad], -1)[:, start:end])
            assert_close((*out[:4], grad), whole, tolerance)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("size", PADDED)
def test_token_loss_leaves_padding_out(size: int, inplace: bool) -> None:
    # NaN in the padding: it is not read. A target in the padding is outside the vocabulary.
    run_ranks(size, _padded, size, inplace)


def _collectives(group: dist.ProcessGroup | None, name: str) -> tuple[dict[str, int], int]:
    """Return how often which collective ran in a forward, and their number in its backward."""
    shard = torch.randn(3, 8, requires_grad=True)
    with CommDebugMode() as forward:
        loss = token_loss(shard, torch.tensor([0, 9, 31]), CONFIGS[name], tp_group=group).loss
    with CommDebugMode() as backward:
        loss.nan_to_num(0).sum().backward()
    counts = {str(op): count for op, count in forward.get_comm_counts().items()}
    return counts, backward.get_total_counts()


def _refusal(group: Any) -> str:
    with pytest.raises(ValueError, match="does not hold this rank") as caught:
        group_size(group)
    return str(caught.value)


def _work() -> dict[str, Any]:
    """Run every case on 4 ranks: as one group, as two groups of two, and alone."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: dist.new_subgroups(1)[0], 2: pairs[rank // 2], 4: dist.group.WORLD}
    results: dict[str, Any] = {str(case): _shard(case, groups[case[1]]) for case in CASES}
    results["collectives"] = {
        name: [_collectives(group, name) for group in (*(groups[n] for n in (4, 2, 1)), None)]
        for name in ("mile", "deft", "deft smoothed z")
    }
    results["refusal"] = _refusal(pairs[1 - rank // 2])
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What the four ranks found: one spawn for the whole file."""
    return run_ranks(4, _work)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_token_loss_over_shards_matches_oracle(
    ranks: list[dict[str, Any]], case: tuple[Any, ...]
) -> None:
    dtype, size, split, name = case
    parts = [ranks[rank][str(case)] for rank in range(size)]
    config = CONFIGS[name]
    logits, targets = _rows(dtype, SPLITS[size][split][-1])
    grad = torch.cat([part[-1] for part in parts], -1)
    assert grad.dtype == dtype
    assert_close((*parts[0][:4], grad), oracle(logits, targets, config), TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_token_loss_is_bitwise_equal_on_all_ranks(
    ranks: list[dict[str, Any]], case: tuple[Any, ...]
) -> None:
    first, *others = (ranks[rank][str(case)][:-1] for rank in range(4 if case[1] == 4 else 2))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["mile", "deft", "deft smoothed z"])
def test_token_loss_uses_one_collective_forward_and_none_backward(
    ranks: list[dict[str, Any]], name: str
) -> None:
    for result in ranks:
        four, two, one, none = result["collectives"][name]
        for counts, backward in (four, two):
            assert list(counts.values()) == [1]
            assert "gather" in next(iter(counts))
            assert backward == 0
        assert one == none == ({}, 0)


def test_group_size_refuses_a_group_of_others(ranks: list[dict[str, Any]]) -> None:
    assert all("None for this rank alone" in result["refusal"] for result in ranks)


# 1 to 64 shards of 131 columns, most of them ragged; 200 leaves shards without a column.
@pytest.mark.parametrize("shards", [1, 2, 7, 64, 200])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_merge_equals_the_whole(shards: int, dtype: torch.dtype) -> None:
    logits, targets = hard_rows(131, dtype)
    parts, start = [], 0
    for part in logits.tensor_split(shards, -1):
        end = start + part.size(-1)
        parts.append(token_stats(part, columns_of(targets, start, end)))
        start = end
    merged = merge(torch.stack(parts))
    whole = token_stats(logits.double(), columns_of(targets, 0, 131))
    assert merged.dtype == torch.float64
    assert error(merged, whole) <= (1e-14 if dtype == torch.float64 else 5e-7)
    assert torch.equal(merged[0], whole[0])


def test_merge_of_empty_shards_is_an_empty_shard() -> None:
    empty = token_stats(torch.empty(3, 0), torch.full((3,), -1))
    merged = merge(torch.stack([empty, empty]))
    torch.testing.assert_close(merged, empty.double(), rtol=0, atol=0, equal_nan=True)


def test_gather_stats_of_one_rank_needs_no_group() -> None:
    stats = torch.randn(4, 5)
    assert torch.equal(merge(gather_stats(stats, None)), stats.double())


def test_shard_of_one_rank_is_the_whole_without_its_padding() -> None:
    assert VocabShard.of(7, None, None) == (None, 0, 7)
    assert VocabShard.of(7, (10, 17), None) == (None, 10, 17)
    assert VocabShard.of(7, (10, 17), None, 12).columns == 2
    assert VocabShard.of(7, (10, 17), None, 4) == (None, 10, 10)


def test_local_targets_never_leave_the_shard() -> None:
    targets = torch.tensor([-(1 << 63), -1, 9, 10, 19, 20, (1 << 63) - 1])
    assert columns_of(targets, 10, 20).tolist() == [-1, -1, -1, 0, 9, -1, -1]
