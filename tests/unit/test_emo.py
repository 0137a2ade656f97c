"""token_loss with the objective emo on one rank against the float64 oracle."""

import itertools
from collections.abc import Callable

import pytest
import torch
from support.emo_oracle import certain_rows, emo_oracle, hard_cost_rows
from support.emo_runs import EMO, MIXES, TOLERANCE, assert_close, mixed, run
from support.helpers import IGNORED, error, hard_rows

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.loss import token_loss
from megatron_mile.ops.emo import blocked
from megatron_mile.ops.emo import chunked as emo_chunked
from megatron_mile.ops.emo import reference as emo_reference


def test_oracle_matches_a_row_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    truth = emo_oracle(logits, torch.tensor([0]), rows, "alone")
    assert truth.emo.item() == pytest.approx(0.25 * 1 + 0.25 * 2, abs=1e-15)
    # q_k (c_k - D), and so -q_y D at the target.
    assert truth.grad.tolist()[0] == pytest.approx([-0.375, 0.0625, 0.3125], abs=1e-15)
    nll = torch.tensor(2.0, dtype=torch.float64).log().item()
    for mode, value in (("1", nll), ("2", 2 * 0.75)):
        found = emo_oracle(logits, torch.tensor([0]), rows, mode).loss.item()
        assert found == pytest.approx(value, abs=1e-9)


# 1: nothing to choose; 3: a right, a wrong and another; 127, 1003: ragged, with hard cost rows.
@pytest.mark.parametrize("vocab", [1, 3, 127, 1003])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_token_loss_matches_oracle(vocab: int, dtype: torch.dtype) -> None:
    logits, targets = hard_rows(vocab, dtype)
    rows = hard_cost_rows(vocab, 24, dtype)
    cost, table = CostRows(rows), CostRows(rows).tabulate()
    upstream = torch.linspace(-2, 2, 12)
    for mix in MIXES:
        truth = emo_oracle(logits, targets, rows, *mix, upstream)
        for inplace in (False, True):
            ours = run(logits, targets, mixed(*mix), cost, inplace, upstream)
            assert_close(ours, truth, TOLERANCE[dtype])
        assert_close(
            run(logits, targets, mixed(*mix), table, upstream=upstream),
            truth,
            TOLERANCE[dtype],
        )
        ours = run(logits, targets, mixed(*mix, "torch"), cost, upstream=upstream)
        assert_close(ours, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_token_loss_keeps_the_digits_of_certain_and_wrong_rows(backend: str) -> None:
    logits, targets, rows = certain_rows(256, 1003)
    truth = emo_oracle(logits, targets, rows)
    assert truth.nll.max() > 100
    ours = run(logits, targets, mixed("1", False, 0, backend), CostRows(rows))
    # Measured 6.4e-7; 1.9e-6 with D rounded to fp32, 8e-6 with sums in fp32.
    assert_close(ours, truth, 1.3e-6)


def test_token_loss_takes_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_BLOCK", 300)  # two rows
    monkeypatch.setattr(blocked, "_KEPT_BLOCK", 700)  # five
    logits, targets = hard_rows(127, torch.float64)
    rows = hard_cost_rows(127, 24, torch.float64)
    truth = emo_oracle(logits, targets, rows)
    for inplace in (False, True):
        assert_close(run(logits, targets, EMO, CostRows(rows), inplace), truth, 1e-12)


def test_blocks_of_a_gpu_are_large() -> None:
    logits = torch.empty(5000, 1 << 17, dtype=torch.bfloat16, device="meta")  # as on a GPU
    sizes = {
        (implementation, kept): blocked._block_size(implementation, logits, kept)
        for implementation in (emo_reference, emo_chunked)
        for kept in (False, True)
    }
    assert sizes.pop((emo_chunked, True)) == logits.numel()  # they lie in the gradient's place
    assert set(sizes.values()) == {1 << 28}
    on_cpu = torch.empty(5, 7)
    assert blocked._block_size(emo_chunked, on_cpu, False) == blocked._BLOCK
    assert blocked._block_size(emo_chunked, on_cpu, True) == blocked._KEPT_BLOCK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norms_are_taken_anew_unless_they_are_kept(dtype: torch.dtype) -> None:
    logits, targets = hard_rows(127, torch.float32)
    rows = hard_cost_rows(127, 24, dtype)
    taken, kept = CostRows(rows), CostRows(rows.clone()).keep_norms()
    first = run(logits, targets, EMO, taken)
    for ours, other in zip(first, run(logits, targets, EMO, kept), strict=True):
        assert torch.equal(ours.nan_to_num(), other.nan_to_num())
    # As optimizers and parameter gathers write: past the version that autograd counts.
    version = rows._version
    rows.data.copy_(torch.randn(127, 24))
    assert rows._version == version
    # Measured at most 7.2e-4, of rows in bf16; with the earlier norms 1.2e-2 and more.
    assert_close(run(logits, targets, EMO, taken), emo_oracle(logits, targets, rows), 2e-3)


@pytest.mark.parametrize("inplace", [False, True])
def test_token_loss_takes_fp16_rows_whose_products_would_overflow(inplace: bool) -> None:
    logits, targets = (3 * torch.randn(12, 127)).half(), torch.arange(12)
    rows = 2e4 + 1e4 * torch.randn(127, 64)
    # Products of bf16 rows do not fit in the logits' dtype either; measured 2.7e-3 and 2.0e-2.
    for dtype, tolerance in ((torch.float16, 8e-3), (torch.bfloat16, 6e-2)):
        truth = emo_oracle(logits, targets, rows.to(dtype))
        ours = run(logits, targets, EMO, CostRows(rows.to(dtype)), inplace)
        assert_close(ours, truth, tolerance)


@pytest.mark.parametrize("inplace", [False, True])
def test_token_loss_takes_rows_of_another_dtype(inplace: bool) -> None:
    logits, targets = hard_rows(127, torch.float32)
    rows = 1e60 * hard_cost_rows(127, 24, torch.float64)  # whose products are infinite in fp32
    truth = emo_oracle(logits, targets, rows)
    for cost in (CostRows(rows), CostRows(rows).tabulate()):
        assert_close(run(logits, targets, EMO, cost, inplace), truth, 2e-6)


def dense_emo(
    logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of EMO's equations and the gradient, all in the dtype of the logits."""
    z = logits.clone().requires_grad_()
    unit = rows / rows.norm(dim=-1, keepdim=True)
    nll = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    one_hot = torch.nn.functional.one_hot(targets, z.size(-1)).to(z.dtype)
    emo = 1 - ((one_hot @ unit) * (z.softmax(-1) @ unit)).sum(-1)
    loss = {
        "1": 0.5 * (nll + (nll / (emo + 1e-10)).detach() * emo),
        "2": (emo / (nll + 1e-10)).detach() * nll + emo,
        "alone": emo,
    }[mode]
    loss.sum().backward()
    assert z.grad is not None
    return loss.detach(), z.grad


@pytest.mark.parametrize("mode", ["1", "2", "alone"])
def test_token_loss_in_bf16_is_no_worse_than_the_dense_form_in_bf16(mode: str) -> None:
    random = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(64, 1003, generator=random)).bfloat16()
    targets = torch.randint(1003, (64,), generator=random)
    rows = torch.randn(1003, 32, generator=random).bfloat16()
    truth = emo_oracle(logits, targets, rows, mode)
    theirs = dense_emo(logits, targets, rows, mode)
    for inplace in (False, True):
        loss, *_, grad = run(
            logits, targets, ObjectiveConfig("emo", emo_mode=mode), CostRows(rows), inplace
        )
        assert error(loss, truth.loss) <= error(theirs[0], truth.loss)
        assert error(grad, truth.grad) <= error(theirs[1], truth.grad)


def test_token_loss_of_opposite_rows_keeps_the_distance_below_2() -> None:
    rows = torch.randn(64, 32).bfloat16()
    rows[1::2] = -rows[::2]
    targets = torch.arange(0, 64, 2)
    logits = torch.zeros(32, 64).bfloat16()
    logits[torch.arange(32), targets + 1] = 60  # all mass on the opposite
    *_, emo, _ = run(logits, targets, EMO, CostRows(rows))
    assert ((emo > 1.99) & (emo <= 2)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_token_loss_of_saturated_rows_is_never_negative_or_nan(dtype: torch.dtype) -> None:
    # Certain and right, from "just" to "nothing else left"; two words that mean the same.
    logits = torch.zeros(40, 129)
    logits[:, 40] = torch.linspace(0, 200, 40)
    logits[:, 41] = -3
    rows = torch.randn(129, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[41], rows[5] = rows[40], 0
    targets = torch.full((40,), 40)
    for mix in MIXES:
        loss, nll, _, emo, grad = run(logits.to(dtype), targets, mixed(*mix), CostRows(rows))
        assert (loss >= 0).all()
        assert ((emo >= 0) & (emo <= 2)).all()
        assert (emo.diff() <= 0).all()
        assert grad.isfinite().all()
        assert nll[-1] == emo[-1] == 0


@pytest.mark.parametrize("mode", ["1", "2", "alone"])
def test_token_loss_keeps_the_digits_of_small_distances(mode: str) -> None:
    # 1 - p_y from 1e-2 to 1e-30, where 1 - sum q K, and nll from fp32 sums, would be rounding.
    logits = torch.zeros(12, 300)
    logits[:, 7] = torch.linspace(10, 75, 12)
    rows, targets = torch.randn(300, 16), torch.full((12,), 7)
    # nll by its definition has none of these digits in float64 either.
    rest = logits.double().exp()
    rest[:, 7] = 0
    beside = rest.sum(-1) / logits[:, 7].double().exp()
    unit = rows.double() / rows.double().norm(dim=-1, keepdim=True)
    distance = (rest * (1 - unit @ unit[7])).sum(-1) / rest.sum(-1) * beside / (1 + beside)
    expected = {"1": beside.log1p(), "2": 2 * distance, "alone": distance}[mode]
    loss, nll, _, emo, _ = run(
        logits, targets, ObjectiveConfig("emo", emo_mode=mode), CostRows(rows)
    )
    for ours, truth in ((nll, beside.log1p()), (emo, distance)):
        assert ((ours.double() - truth) / truth).abs().max() <= 6e-7  # measured 1.9e-7
    large = beside > 1e-6  # where the 1e-10 of the ratios counts little: measured 1.5e-6
    assert ((loss.double() - expected) / expected).abs()[large].max() <= 5e-6


def test_token_loss_of_targets_with_no_probability() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64)
    logits[:, 2] = -torch.inf
    rows, targets = torch.randn(9, 3), torch.full((4,), 2)
    alone = emo_oracle(logits, targets, rows, "alone")
    loss, nll, _, emo, grad = run(logits, targets, mixed("2", False, 0), CostRows(rows.double()))
    assert (nll == torch.inf).all()
    assert error(emo, alone.emo) <= 1e-14
    assert error(loss, 2 * alone.emo) <= 1e-14  # the limit
    assert error(grad, alone.grad) <= 1e-14
    assert (run(logits, targets, EMO, CostRows(rows))[0] == torch.inf).all()


def test_token_loss_gives_ignored_tokens_exactly_zero() -> None:
    logits = torch.tensor([[torch.nan] * 4, [torch.inf, 1, 2, 3], [-torch.inf] * 4, [1, 2, 3, 4]])
    for mix in MIXES:
        fields = run(logits, torch.full((4,), IGNORED), mixed(*mix), CostRows(torch.randn(4, 3)))
        for field in fields:
            assert torch.equal(field, torch.zeros_like(field))


def test_token_loss_of_padding_columns_leaves_them_out() -> None:
    logits, targets = hard_rows(100, torch.float64)
    rows = hard_cost_rows(100, 24, torch.float64)
    truth = emo_oracle(logits, targets, rows)
    padded = torch.full((12, 128), torch.nan, dtype=torch.float64)
    padded[:, :100] = logits
    rows = torch.cat([rows, torch.full((28, 24), torch.nan, dtype=torch.float64)])
    fixed = CostRows(rows).tabulate()
    for inplace, cost in itertools.product((False, True), (CostRows(rows), fixed)):
        leaf = padded.clone().requires_grad_()
        out = token_loss(leaf * 1, targets, EMO, inplace=inplace, vocab_size=100, cost=cost)
        (grad,) = torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))
        assert out.emo is not None
        ours = (out.loss, out.nll, out.entropy, out.emo, grad[:, :100])
        assert_close(ours, truth, 1e-12)
        assert not grad[:, 100:].any()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.view(3, 4, 10).transpose(0, 1),
    "strided": lambda x: x.view(3, 4, 10)[:, ::2, 1::2],
    "vocabulary first": lambda x: x.view(10, 12).t(),
    "one token": lambda x: x[:10],
    "no token": lambda x: x.view(12, 10)[:0],
    "no column": lambda x: x.view(12, 10)[:, :0],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_token_loss_takes_any_strides(layout: str, inplace: bool) -> None:
    leaf = torch.randn(120, dtype=torch.float64, requires_grad=True)
    logits, values = LAYOUTS[layout](leaf * 1), LAYOUTS[layout](leaf.detach())
    columns = logits.size(-1)
    rows = torch.randn(columns, 5, dtype=torch.float64)
    targets = torch.randint(max(columns, 1), logits.shape[:-1])
    out = token_loss(logits, targets, EMO, inplace=inplace, cost=CostRows(rows))
    (grad,) = torch.autograd.grad(out.loss.sum(), leaf)
    if columns == 0:  # nobody holds the targets
        assert out.loss.isnan().all()
        return
    assert out.emo is not None
    truth = emo_oracle(values, targets, rows)
    assert_close((out.loss, out.nll, out.entropy, out.emo, LAYOUTS[layout](grad)), truth, 1e-12)
