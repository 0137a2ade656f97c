"""Label smoothing over shards against torch's own cross_entropy, which sees the whole vocabulary.

In float64 and to 1e-12, at TP 1, 2 and 4: with equal shards, with padding columns, with shards of
any width and without a column.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.helpers import error, run_ranks

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import token_loss

EPS = 0.1
WORDS = 90
# Borders of the shards and the tokenizer's size where the rest is padding.
SPLITS = {
    1: {"equal": ([0, 96], None), "padded": ([0, 96], WORDS)},
    2: {
        "equal": ([0, 48, 96], None),
        "padded": ([0, 48, 96], WORDS),
        "ragged": ([0, 0, 96], None),
    },
    4: {
        "equal": ([0, 24, 48, 72, 96], None),
        "padded": ([0, 32, 64, 96, 128], WORDS),  # a shard of some padding, one of nothing else
        "ragged": ([0, 1, 40, 40, 96], None),
    },
}
CASES = [(size, split) for size, splits in SPLITS.items() for split in splits]


def _whole() -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [7, 128], of which a case takes the first columns, and targets [7]."""
    random = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(7, 128, generator=random, dtype=torch.float64)
    logits[1] += 1000
    logits[2, 3] += 200
    logits[3] = 2.0
    targets = torch.randint(WORDS, (7,), generator=random)
    targets[4] = -100
    return logits, targets


def _torchs(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits, targets = _whole()
    leaf = logits[:, :columns].clone().requires_grad_()
    loss = F.cross_entropy(leaf, targets, label_smoothing=EPS, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad


def _ours(case: tuple[int, str], group: Any, inplace: bool) -> tuple[torch.Tensor, torch.Tensor]:
    size, split = case
    borders, words = SPLITS[size][split]
    start, end = borders[dist.get_rank(group) :][:2]
    logits, targets = _whole()
    if words is not None:
        logits[:, words:] = torch.nan  # it is not read
    leaf = logits[:, start:end].clone().requires_grad_()
    config = ObjectiveConfig("ce", label_smoothing=EPS)
    out = token_loss(
        leaf * 1, targets, config, group, (start, end), inplace=inplace, vocab_size=words
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    return out.loss.detach(), grad


def _work() -> dict[Any, Any]:
    """Run every case on 4 ranks: as one group, as two groups of two, and alone."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {1: dist.new_subgroups(1)[0], 2: pairs[rank // 2], 4: dist.group.WORLD}
    cases = [(*case, inplace) for case in CASES for inplace in (False, True)]
    return {case: _ours(case[:2], groups[case[0]], case[2]) for case in cases}


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """What the four ranks found."""
    return run_ranks(4, _work)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_smoothed_cross_entropy_over_shards_is_torchs(
    ranks: list[dict[Any, Any]], case: tuple[int, str], inplace: bool
) -> None:
    size, split = case
    borders, words = SPLITS[size][split]
    columns = words or borders[-1]
    loss, expected = _torchs(columns)
    parts = [ranks[rank][(*case, inplace)] for rank in range(size)]
    grad = torch.cat([part[1] for part in parts], -1)
    for part in parts:
        assert torch.equal(part[0], parts[0][0])
    # Measured 1.3e-16 and 2.5e-16.
    assert error(parts[0][0], loss) <= 1e-12
    assert error(grad[:, :columns], expected) <= 1e-12
    assert not grad[:, columns:].any()
