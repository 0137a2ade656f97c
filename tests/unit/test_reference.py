"""The reference implementation of the token statistics against its definition in float64."""

import pytest
import torch
from support.helpers import error

from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats import reference

# fp32 sums of up to 1003 terms: measured 1.2e-7 at most; fp64: 4e-16.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7}


def _definition(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return (m, S, T, z_y) term by term in float64; masked entries are left out of the sums."""
    columns = []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        finite = row[row > -torch.inf]
        m = finite.max() if finite.numel() else torch.tensor(-torch.inf, dtype=torch.float64)
        exps = torch.exp(finite - m)
        z_y = row[target] if target >= 0 else torch.tensor(torch.nan, dtype=torch.float64)
        columns.append(torch.stack([m, exps.sum(), (exps * (finite - m)).sum(), z_y]))
    return torch.stack(columns, 1)


# 1: a shard of one column; 3: fewer columns than rows; 127: ragged; 1003: sums that round.
@pytest.mark.parametrize("vocab", [1, 3, 127, 1003])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_token_stats_matches_definition(vocab: int, dtype: torch.dtype) -> None:
    logits = (5 * torch.randn(8, vocab, dtype=torch.float64)).to(dtype)
    logits[1] += 1000
    logits[2, 0] = -torch.inf
    logits[3] = -torch.inf
    targets = torch.randint(vocab, (8,))
    targets[4] = -1
    stats = reference.token_stats(logits, targets)
    assert (stats.dtype, stats.shape, stats.is_contiguous()) == (dtype, (4, 8), True)
    assert error(stats, _definition(logits, targets)) <= TOLERANCE[dtype]
    assert stats[:3, 3].tolist() == [-torch.inf, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_stats_of_half_precision_is_that_of_its_fp32_copy(dtype: torch.dtype) -> None:
    logits, targets = (9 * torch.randn(5, 64)).to(dtype), torch.randint(64, (5,))
    assert torch.equal(
        reference.token_stats(logits, targets), reference.token_stats(logits.float(), targets)
    )


def test_token_stats_of_no_columns_is_empty_shard() -> None:
    stats = reference.token_stats(torch.empty(2, 3, 0), torch.full((2, 3), -1))
    assert stats.is_contiguous()
    assert torch.equal(stats[0], torch.full((2, 3), -torch.inf))
    assert torch.equal(stats[1:3], torch.zeros(2, 2, 3))
    assert stats[3].isnan().all()


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_token_stats_backward_matches_definition(
    tilted: bool, based: bool, dtype: torch.dtype
) -> None:
    logits = torch.randn(6, 127).to(dtype)
    logits[0, 5] = -torch.inf
    logits[1, 5] = -300
    targets = torch.tensor([0, 126, 64, -1, 3, 5])
    m = logits.amax(-1) + torch.tensor([0, 0, 0, 0, 0.5, 0])  # another shard may hold the maximum
    coefficients = Coefficients(*torch.randn(2 + tilted, 6, dtype=dtype))
    if based:
        coefficients = coefficients._replace(base=torch.randn(6, dtype=dtype))
    grad = reference.token_stats_backward(logits, targets, m, coefficients)

    flat, peak, tilt, base = coefficients.map(lambda x: x.double().unsqueeze(-1))
    shifted = (logits.double() - m.double().unsqueeze(-1)).clamp(min=-1e6)  # 0 * -inf is meant as 0
    onehot = torch.arange(127) == targets.unsqueeze(-1)
    expected = torch.exp(shifted) * (flat + (0 if tilt is None else tilt * shifted))
    expected = expected + (0 if base is None else base)
    expected = torch.where(onehot, peak, expected)
    assert error(grad, expected) <= TOLERANCE[dtype]
    assert grad[0, 5] == (coefficients.base[0] if based else 0)


@pytest.mark.parametrize("columns", [0, 7])
def test_token_stats_backward_is_zero_for_zero_coefficients(columns: int) -> None:
    logits = torch.full((3, columns), torch.nan)
    targets = torch.tensor([-1, 0, 2]) if columns else torch.full((3,), -1)
    grad = reference.token_stats_backward(
        logits, targets, torch.full((3,), torch.nan), Coefficients(*torch.zeros(3, 3))
    )
    assert torch.equal(grad, torch.zeros(3, columns))


def test_token_stats_backward_writes_over_its_input() -> None:
    logits, targets = torch.randn(4, 9).bfloat16(), torch.tensor([0, 1, -1, 8])
    arguments = (logits.float().amax(-1), Coefficients(*torch.randn(2, 4)))
    expected = reference.token_stats_backward(logits, targets, *arguments)
    written = reference.token_stats_backward(logits, targets, *arguments, out=logits)
    assert written is logits
    assert torch.equal(written, expected)
