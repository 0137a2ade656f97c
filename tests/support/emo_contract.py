"""What every implementation of EMO's statistics must do with a block of rows, whatever the device.

As `token_stats_contract`: the truth is float64 and written from the definitions.
"""

from types import ModuleType

import pytest
import torch

from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats import reference
from support.helpers import error

# Sums of up to 32000 terms, measured 1.3e-7 at most in fp32; gradients are rounded once.
SUMS = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7}
GRADIENT = {torch.float64: 1e-14, torch.float32: 6e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# One column; one tile, with idle lanes, and several; more rows than a cache holds at once.
SHAPES = [(9, 1), (9, 127), (5, 9001), (3, 32000)]


def true_block(
    logits: torch.Tensor,
    products: torch.Tensor,
    scale: torch.Tensor,
    targets: torch.Tensor,
    m: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e^(z-m) and c, fp64 [n, V], both as they count in the sums."""
    finite = m.double().masked_fill(m == -torch.inf, 0).unsqueeze(-1)
    columns = torch.arange(logits.size(-1), device=logits.device)
    at_target = columns == targets.unsqueeze(-1)
    exps = torch.exp(logits.double() - finite)
    return exps.masked_fill(at_target, 0), (1 - products.double() * scale.double()).clamp(0, 2)


class EmoContract:
    """Tests of one implementation, of the dtypes that it takes."""

    implementation: ModuleType
    dtypes: tuple[torch.dtype, ...]
    device = "cpu"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test with an argument `dtype` for all dtypes."""
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    def block(self, count: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return logits, products, scale, targets and m; every third target is elsewhere.

        Some of the cosines are beyond 1 or -1, and one row of cost has the scale 0.
        """
        random = torch.Generator(self.device).manual_seed(count * vocab)
        shape = (count, vocab)
        logits = (4 * torch.randn(shape, generator=random, device=self.device)).to(dtype)
        cosines = 2.1 * torch.rand(shape, generator=random, device=self.device) - 1.05
        norms = 1 + 9 * torch.rand(vocab, generator=random, device=self.device)
        logits[0, : vocab // 2] = -torch.inf
        targets = torch.randint(vocab, (count,), generator=random, device=self.device)
        targets[::3] = -1
        wide = torch.promote_types(dtype, torch.float32)
        products, scale = (cosines * norms).to(dtype), norms.to(wide).reciprocal()
        scale[vocab // 3] = 0
        return logits, products, scale, targets, logits.amax(-1).to(wide)

    @pytest.mark.parametrize(("count", "vocab"), SHAPES)
    def test_sums_match_the_definition(self, count: int, vocab: int, dtype: torch.dtype) -> None:
        block = self.block(count, vocab, dtype)
        before = block[0].clone(), block[1].clone()
        found = self.implementation.emo_stats(*block[:4])
        exps, costs = true_block(*block)
        assert found.dtype == torch.float64
        stats = reference.token_stats(block[0], block[3])
        torch.testing.assert_close(found[:4], stats.double(), rtol=2e-6, atol=2e-6, equal_nan=True)
        sums = found[4:]
        assert error(sums, torch.stack([exps.sum(-1), (exps * costs).sum(-1)])) <= SUMS[dtype]
        assert (sums >= 0).all()
        assert torch.equal(block[0], before[0])
        assert torch.equal(block[1], before[1])

    def test_rows_without_a_finite_logit_have_no_mass(self, dtype: torch.dtype) -> None:
        block = self.block(3, 127, dtype)
        block[0].fill_(-torch.inf)
        sums = self.implementation.emo_stats(*block[:4])[4:]
        assert torch.equal(sums, torch.zeros_like(sums))

    def test_a_product_that_is_nan_shows_in_the_sum(self, dtype: torch.dtype) -> None:
        block = self.block(3, 127, dtype)
        block[1][1, 5] = torch.nan
        cost = self.implementation.emo_stats(*block[:4])[5]
        assert cost.isnan().tolist() == [False, True, False]

    # Where the gradient lies: beside both, over the logits, over the products.
    @pytest.mark.parametrize("place", [None, 0, 1])
    @pytest.mark.parametrize(("count", "vocab"), SHAPES)
    def test_gradient_matches_the_definition(
        self, count: int, vocab: int, place: int | None, dtype: torch.dtype
    ) -> None:
        block = self.block(count, vocab, dtype)
        logits, products, scale, targets, m = block
        flat, peak, tilt, distance = torch.randn(4, count, device=self.device, dtype=m.dtype)
        exps, costs = true_block(logits, products, scale, torch.full_like(targets, -1), m)
        pull = (costs - distance.double().unsqueeze(-1)) * tilt.double().unsqueeze(-1)
        expected = exps * (pull + flat.double().unsqueeze(-1))
        held = (targets >= 0).nonzero(as_tuple=True)
        expected[held[0], targets[held]] = peak[held].double()
        out = torch.full_like(logits, torch.nan) if place is None else block[place]
        self.implementation.emo_stats_backward(
            *block, distance, Coefficients(flat, peak, tilt), out
        )
        assert error(out, expected) <= GRADIENT[dtype]

    def test_gradient_is_zero_for_zero_coefficients(self, dtype: torch.dtype) -> None:
        logits, products, scale, targets, m = self.block(4, 127, dtype)
        logits[1:] = torch.nan
        coefficients = torch.zeros(3, 4, device=self.device, dtype=m.dtype)
        coefficients[2, 3] = 1
        out, distance = torch.empty_like(logits), torch.ones_like(m)
        self.implementation.emo_stats_backward(
            logits, products, scale, targets, m, distance, Coefficients(*coefficients), out
        )
        assert torch.equal(out[:3], torch.zeros_like(out[:3]))
        assert out[3, targets[3] - 1].isnan()
