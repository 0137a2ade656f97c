"""The blocks on a CPU against the contract, and what only they have: threads, little scratch."""

from typing import Any

import pytest
import torch
from support.helpers import error
from support.token_stats_contract import (
    GRADIENT,
    STATS,
    WANTED,
    Contract,
    true_gradient,
    true_stats,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import token_loss
from megatron_mile.ops import blocks
from megatron_mile.ops.token_stats import FOUR, chunked, reference

ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TestChunked(Contract):
    implementation = chunked
    backend = "auto"
    dtypes = ALL


class TestReference(Contract):
    implementation = reference
    backend = "torch"
    dtypes = ALL


# 1 row per block, 1 of 2 that would fit, and 3 with a rest of 1: always more blocks than threads.
@pytest.mark.parametrize("size", [1, 99, 150])
@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_token_stats_over_threads_and_blocks(
    size: int, consume: bool, based: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_IN_CACHE", size)
    logits = (4 * torch.randn(5, 8, 50)).to(dtype).transpose(0, 1)
    logits[3, 2, ::2] = -torch.inf
    targets = torch.randint(-1, 50, (8, 5))
    m = logits.amax(-1).to(torch.promote_types(dtype, torch.float32))
    stacked = torch.randn(2 + based, 8, 5, dtype=m.dtype)
    coefficients = blocks.Coefficients.unstack(stacked, based)
    wanted = WANTED[-1] if based else FOUR
    expected = true_stats(logits, targets, wanted), true_gradient(logits, targets, m, coefficients)
    torch.set_num_threads(3)
    try:
        stats = chunked.token_stats(logits, targets, consume, wanted)
        grad = chunked.token_stats_backward(logits, targets, m, coefficients, logits, consume)
    finally:
        torch.set_num_threads(1)
    assert error(stats, expected[0]) <= STATS[dtype]
    assert error(grad, expected[1]) <= (1 + consume) * GRADIENT[dtype]


class _Allocations(TorchDispatchMode):
    """Adds up the bytes of all new storages, however short they live."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in given}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.total += x.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_loss_inplace_allocates_little(dtype: torch.dtype) -> None:
    # 4000 rows of 16000 columns: 250 blocks, so that their scratch counts little.
    logits = torch.zeros(4000, 16000, dtype=dtype, requires_grad=True) * 1
    targets = torch.randint(16000, (4000,))
    with _Allocations() as allocations:
        loss = token_loss(logits, targets, ObjectiveConfig(), inplace=True).loss.sum()
        torch.autograd.grad(loss, logits)
    assert 0 < allocations.total <= 0.05 * logits.nbytes
