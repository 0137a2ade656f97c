"""EMO on one rank beyond its numbers: logits kept or consumed, cost rows, refusals, memory."""

from typing import Any

import pytest
import torch
from support.emo_oracle import emo_oracle
from support.emo_runs import EMO, assert_close, run
from torch.profiler import ProfilerActivity, profile

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.linear import linear_token_loss
from megatron_mile.loss import token_loss
from megatron_mile.ops import blocks
from megatron_mile.ops.emo import blocked


def test_token_loss_keeps_logits_and_repeats_its_backward() -> None:
    logits, targets = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 3, 8, 1])
    before, version = logits.detach().clone(), logits._version
    rows = torch.randn(9, 3, requires_grad=True)
    loss = token_loss(logits, targets, EMO, cost=CostRows(rows)).loss.sum()
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0].clone() for _ in range(2)]
    assert torch.equal(*grads)
    assert torch.equal(logits, before)
    assert logits._version == version
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(loss, rows)


def test_token_loss_inplace_consumes_the_logits() -> None:
    source = torch.randn(2, 5, requires_grad=True)
    logits, cost = source.exp(), CostRows(torch.randn(5, 3))
    token_loss(logits, torch.tensor([0, 1]), EMO, inplace=True, cost=cost)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()
    loss = token_loss(source * 1, torch.tensor([0, 1]), EMO, inplace=True, cost=cost).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False to run the backward twice"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_cost_rows_are_those_of_the_moment(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(4, 9), torch.tensor([0, 3, 8, 1])
    weight = torch.nn.Parameter(torch.randn(9, 3).to(dtype))
    cost = CostRows(weight)
    for _ in range(2):
        ours = run(logits, targets, EMO, cost)
        assert_close(
            ours, emo_oracle(logits, targets, weight), 2e-6 if dtype.itemsize > 2 else 2e-3
        )
        weight.data.exp_()  # as optimizers write, past the version counter


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cost_rows_too_small_to_square_count_as_zeros(dtype: torch.dtype) -> None:
    rows = torch.randn(9, 3, dtype=torch.float64)
    rows[3] *= 1e-180 if dtype == torch.float64 else 1e-25
    rows[4] *= 1e-156 if dtype == torch.float64 else 1e-20  # the square is subnormal
    cost = CostRows(rows.to(dtype)).fetch(torch.tensor([0]))
    norms = cost.matrix.double().norm(dim=-1) * cost.scale
    assert not norms[3:5].any()
    assert (norms[[0, 8]] - 1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cost": None}, "objective emo with no cost; expected cost=CostRows"),
        ({"config": ObjectiveConfig()}, "objective mile with a CostRows"),
        ({"cost": CostRows(torch.ones(8, 2))}, "cost has 8 rows on cpu for 9 columns"),
        (
            {"cost": CostRows(torch.ones(9, 2)).fetch(torch.tensor([0]))},
            r"fetched for targets \(1,\); expected those of this call, \(4,\)",
        ),
    ],
)
def test_token_loss_refuses_what_does_not_fit(change: dict[str, Any], text: str) -> None:
    given = {"config": EMO, "cost": CostRows(torch.ones(9, 2))}
    with pytest.raises(ValueError, match=text):
        token_loss(torch.ones(4, 9), torch.tensor([0, 3, 8, 1]), **{**given, **change})


def test_cost_rows_and_the_fused_projection_refuse() -> None:
    with pytest.raises(ValueError, match=r"cost rows are torch.int64 \(3, 2\)"):
        CostRows(torch.ones(3, 2).long())
    with pytest.raises(ValueError, match="emo has no form without logits"):
        linear_token_loss(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]), EMO)


def _peak_bytes(
    logits: torch.Tensor,
    targets: torch.Tensor,
    config: ObjectiveConfig,
    inplace: bool,
    rows: torch.Tensor | None,
) -> int:
    """Return the peak of one step beyond what was there, by torch's allocator."""
    given = logits * 1 if inplace else logits
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cost = None if rows is None else CostRows(rows)
        loss = token_loss(given, targets, config, inplace=inplace, cost=cost).loss.sum()
        torch.autograd.grad(loss, given)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, size in memory:
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_token_loss_needs_little_more_memory_than_plain(dtype: torch.dtype, inplace: bool) -> None:
    logits = torch.randn(512, 32000).to(dtype).requires_grad_()
    targets = torch.randint(32000, (512,))
    rows = torch.randn(32000, 512).to(dtype)
    plain = _peak_bytes(logits, targets, ObjectiveConfig(), inplace, None)
    ours = _peak_bytes(logits, targets, EMO, inplace, rows)
    # A block and what is in cache, in fp32, and all target rows.
    block = (blocked._BLOCK + 4 * blocks._IN_CACHE) * 4 + 512 * 512 * dtype.itemsize
    assert plain >= (0 if inplace else logits.nbytes)
    # Measured: 1.04 (fp32) and 1.09 (bf16) of plain; in place 0.95 and 0.61 of what is added.
    assert ours <= 1.1 * plain + inplace * block
