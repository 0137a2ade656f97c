"""What every implementation of the token statistics must do, whatever the device.

`Contract` is a class of tests; a test file derives from it with the implementation in question.
The truth is float64 and written from the definitions. Uninitialised memory is filled with NaN, so
that an element which is never written fails the test that reads it.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import token_loss
from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats import FOUR, Wanted
from support.helpers import error, oracle

# Statistics: fp32 sums of up to 128256 terms, measured 2.1e-7 at most. Gradients: one rounding.
STATS = {torch.float64: 1e-14, torch.float32: 6e-7, torch.bfloat16: 6e-7, torch.float16: 6e-7}
GRADIENT = {torch.float64: 1e-14, torch.float32: 6e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Where both sides are right to the last place of their results, rounding decides who is closer.
# (In float64 the truth itself is that far off.) In bf16 and fp16 nothing is granted.
MARGIN = {torch.float64: 1e-13, torch.float32: 2**-23, torch.bfloat16: 0, torch.float16: 0}

# 1: a shard of one column; 127, 128, 1003: around and between powers of two; the others are real
# vocabularies (LLaMA 2, GPT-2, LLaMA 3): several tiles per row, aligned, odd, and long.
VOCABULARIES = [(9, 1), (9, 127), (9, 128), (9, 1003), (3, 32000), (2, 50257), (2, 128256)]

# Layouts of [2, 3, V]: whole, its leading dimensions swapped, a padded vocabulary, the last token
# of every sequence left out, every second column, the vocabulary outermost, four dimensions.
LAYOUTS = {
    "whole": lambda v: torch.empty(2, 3, v),
    "swapped": lambda v: torch.empty(3, 2, v).transpose(0, 1),
    "padded": lambda v: torch.empty(2, 3, v + 5)[..., :v],
    "shifted": lambda v: torch.empty(2, 4, v)[:, :-1],
    "strided": lambda v: torch.empty(2, 3, 2 * v)[..., ::2],
    "vocabulary first": lambda v: torch.empty(v, 2, 3).permute(1, 2, 0),
    "four dimensions": lambda v: torch.empty(2, 5, 3, v)[:, ::2, :1],
}


# What may be wanted beyond the four.
WANTED = [FOUR, Wanted(shifts=True), Wanted(squares=True), Wanted(True, True)]


def true_stats(logits: torch.Tensor, targets: torch.Tensor, wanted: Wanted = FOUR) -> torch.Tensor:
    """Return (m, S, T, z_y) and what is wanted, fp64 [4 to 7, ...], from their definitions."""
    z = logits.double()
    m = z.amax(-1)
    masked = z == -torch.inf
    shifted = torch.where(masked, 0, z - m.unsqueeze(-1))
    exps = torch.where(masked, 0, shifted.exp())
    z_y = z.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    z_y = torch.where(targets < 0, torch.nan, z_y)
    more = []
    if wanted.shifts:
        more += [torch.where(masked, z, shifted).sum(-1), torch.full_like(m, z.size(-1))]
    if wanted.squares:
        more += [torch.where(masked, 0, (2 * shifted).exp()).sum(-1)]
    return torch.stack([m, exps.sum(-1), (exps * shifted).sum(-1), z_y, *more])


def true_gradient(
    logits: torch.Tensor, targets: torch.Tensor, m: torch.Tensor, coefficients: Coefficients
) -> torch.Tensor:
    """Return the gradient, fp64 [..., V], from its definition."""
    flat, peak, tilt, base = coefficients.map(lambda x: x.double().unsqueeze(-1))
    shifted = (logits.double() - m.double().unsqueeze(-1)).clamp(min=-1e6)  # 0 * -inf is meant as 0
    value = torch.exp(shifted) * (flat + (0 if tilt is None else tilt * shifted))
    value = value + (0 if base is None else base)
    columns = torch.arange(logits.size(-1), device=logits.device)
    return torch.where(columns == targets.unsqueeze(-1), peak, value)


def plain_torch(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return nll, H and the gradient of (1 + H) nll as torch computes them in the logits' dtype."""
    z = logits.clone().requires_grad_()
    log_p = torch.log_softmax(z, -1)
    entropy = -(log_p.exp() * log_p).sum(-1).detach()
    nll = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    ((1 + entropy) * nll).sum().backward()
    assert z.grad is not None
    return nll, entropy, z.grad


def ours(
    logits: torch.Tensor, targets: torch.Tensor, backend: str, inplace: bool
) -> tuple[torch.Tensor, ...]:
    """Return the same from token_loss."""
    leaf = logits.clone().requires_grad_()
    out = token_loss(leaf * 1, targets, ObjectiveConfig(backend=backend), inplace=inplace)
    out.loss.sum().backward()
    assert leaf.grad is not None
    return out.nll, out.entropy, leaf.grad


class Contract:
    """Tests of one implementation, of the dtypes that it takes and the backend that selects it."""

    implementation: ModuleType
    backend: str
    dtypes: tuple[torch.dtype, ...]
    device = "cpu"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test with an argument `dtype` for all dtypes."""
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    @pytest.fixture(autouse=True)
    def _poison(self) -> Iterator[None]:
        """Fill uninitialised memory with NaN."""
        torch.use_deterministic_algorithms(True)
        assert torch.empty(1).isnan().all()
        yield
        torch.use_deterministic_algorithms(False)

    def rows(self, count: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [count, V] and targets [count]; -1 for one target where there are three."""
        logits = 4 * torch.randn(count, vocab, device=self.device, dtype=torch.float64)
        targets = torch.randint(vocab, (count,), device=self.device)
        targets[2:3] = -1
        return logits.to(dtype), targets

    def hard(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return 8 rows of 131 logits: shifts, masked entries, nothing but masked entries."""
        logits, targets = self.rows(8, 131, dtype)
        logits[0] += 1000
        logits[1] -= 1000
        logits[3, ::2] = -torch.inf
        logits[4] = -torch.inf
        logits[5, :] = -torch.inf
        logits[5, 130] = -3
        logits[6] = 5
        logits[7, 1:] -= 200
        return logits, targets

    def coefficients(
        self, count: int, m: torch.Tensor, tilted: bool, based: bool = False
    ) -> Coefficients:
        number = 2 + tilted + based
        stacked = torch.randn(number, count, device=self.device, dtype=m.dtype)
        return Coefficients.unstack(stacked, based)

    @pytest.mark.parametrize("wanted", WANTED)
    @pytest.mark.parametrize(("count", "vocab"), VOCABULARIES)
    def test_token_stats_matches_definition(
        self, count: int, vocab: int, wanted: Wanted, dtype: torch.dtype
    ) -> None:
        logits, targets = self.rows(count, vocab, dtype)
        stats = self.implementation.token_stats(logits, targets, wanted=wanted)
        assert stats.dtype == torch.promote_types(dtype, torch.float32)
        assert stats.is_contiguous()
        assert error(stats, true_stats(logits, targets, wanted)) <= STATS[dtype]
        assert torch.equal(stats[0], logits.amax(-1).to(stats.dtype))

    @pytest.mark.parametrize("wanted", WANTED)
    def test_token_stats_of_hard_rows_matches_definition(
        self, wanted: Wanted, dtype: torch.dtype
    ) -> None:
        logits, targets = self.hard(dtype)
        stats = self.implementation.token_stats(logits, targets, wanted=wanted)
        assert error(stats, true_stats(logits, targets, wanted)) <= STATS[dtype]
        assert stats[:3, 4].tolist() == [-torch.inf, 0, 0]

    @pytest.mark.parametrize("wanted", WANTED[1:])
    def test_what_is_wanted_leaves_the_four_as_they_are(
        self, wanted: Wanted, dtype: torch.dtype
    ) -> None:
        logits, targets = self.hard(dtype)
        stats = self.implementation.token_stats(logits, targets, wanted=wanted)
        four = self.implementation.token_stats(logits, targets)
        torch.testing.assert_close(stats[:4], four, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_token_stats_of_a_bad_row_is_nan_in_its_sums(
        self, dtype: torch.dtype, bad: float
    ) -> None:
        logits, targets = self.rows(4, 131, dtype)
        good = self.implementation.token_stats(logits, targets, wanted=WANTED[-1])
        logits[1, 7] = bad
        stats = self.implementation.token_stats(logits, targets, wanted=WANTED[-1])
        assert stats[[1, 2, 4, 6], 1].isnan().all()
        others = torch.tensor([0, 2, 3], device=self.device)
        torch.testing.assert_close(
            stats[:, others], good[:, others], rtol=0, atol=0, equal_nan=True
        )

    @pytest.mark.parametrize("based", [False, True])
    @pytest.mark.parametrize("tilted", [False, True])
    @pytest.mark.parametrize(("count", "vocab"), VOCABULARIES)
    def test_token_stats_backward_matches_definition(
        self, count: int, vocab: int, tilted: bool, based: bool, dtype: torch.dtype
    ) -> None:
        logits, targets = self.rows(count, vocab, dtype)
        m = self.implementation.token_stats(logits, targets)[0]
        coefficients = self.coefficients(count, m, tilted, based)
        expected = true_gradient(logits, targets, m, coefficients)
        before = logits.clone()
        grad = self.implementation.token_stats_backward(logits, targets, m, coefficients)
        assert grad.dtype == dtype
        assert error(grad, expected) <= GRADIENT[dtype]
        assert torch.equal(logits, before)

    @pytest.mark.parametrize("based", [False, True])
    @pytest.mark.parametrize("tilted", [False, True])
    def test_token_stats_backward_of_hard_rows_matches_definition(
        self, tilted: bool, based: bool, dtype: torch.dtype
    ) -> None:
        logits, targets = self.hard(dtype)
        m = self.implementation.token_stats(logits, targets)[0]
        coefficients = self.coefficients(8, m, tilted, based)
        # A row without a finite logit: e^(z - m) is taken as 0.
        finite = m.masked_fill(m == -torch.inf, 0)
        expected = true_gradient(logits, targets, finite, coefficients)
        grad = self.implementation.token_stats_backward(logits, targets, m, coefficients)
        assert error(grad, expected) <= GRADIENT[dtype]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout_does_not_matter(self, layout: str, dtype: torch.dtype) -> None:
        vocab = 37
        logits = LAYOUTS[layout](vocab).to(self.device, dtype)
        values, _ = self.rows(logits[..., 0].numel(), vocab, dtype)
        logits.copy_(values.view(logits.shape))
        targets = torch.randint(-1, vocab, logits.shape[:-1], device=self.device)
        stats = self.implementation.token_stats(logits, targets)
        assert stats.shape == (4, *targets.shape)
        plain = self.implementation.token_stats(values, targets.flatten())
        assert error(stats.flatten(1), plain) <= STATS[dtype]

        coefficients = self.coefficients(len(values), plain, True)
        arguments = (targets, stats[0], coefficients.map(lambda x: x.view(targets.shape)))
        expected = self.implementation.token_stats_backward(
            values, targets.flatten(), plain[0], coefficients
        ).view(logits.shape)
        poisoned = torch.full_like(logits, torch.nan)
        backward = self.implementation.token_stats_backward
        assert error(backward(logits, *arguments), expected) <= GRADIENT[dtype]
        assert error(backward(logits, *arguments, out=poisoned), expected) <= GRADIENT[dtype]
        assert backward(logits, *arguments, out=logits) is logits
        assert error(logits, expected) <= GRADIENT[dtype]

    def test_token_stats_backward_writes_nothing_beside_its_output(
        self, dtype: torch.dtype
    ) -> None:
        logits, targets = self.rows(6, 131, dtype)
        buffer = torch.full((8, 140), torch.nan, device=self.device, dtype=dtype)
        m = self.implementation.token_stats(logits, targets)[0]
        coefficients = self.coefficients(6, m, False)
        out = buffer[1:7, 4:135]
        self.implementation.token_stats_backward(logits, targets, m, coefficients, out)
        assert not out.isnan().any()
        out.fill_(torch.nan)
        assert buffer.isnan().all()

    @pytest.mark.parametrize("consume", [False, True])
    def test_token_stats_backward_is_zero_for_zero_coefficients(
        self, consume: bool, dtype: torch.dtype
    ) -> None:
        logits, targets = self.rows(3, 131, dtype)
        logits[0] = torch.nan
        logits[1, 5] = torch.inf
        m = self.implementation.token_stats(logits, targets, consume)[0]
        grad = self.implementation.token_stats_backward(
            logits, targets, m, Coefficients(*m.new_zeros(2, 3)), logits, consume
        )
        assert torch.equal(grad, torch.zeros_like(grad))

    @pytest.mark.parametrize("based", [False, True])
    def test_token_stats_backward_is_not_zero_for_tilt_or_base_alone(
        self, based: bool, dtype: torch.dtype
    ) -> None:
        logits, targets = self.rows(3, 131, dtype)
        m = self.implementation.token_stats(logits, targets)[0]
        zero, one = torch.zeros_like(m), torch.ones_like(m)
        coefficients = Coefficients(zero, zero, *((None, one) if based else (one, None)))
        expected = true_gradient(logits, targets, m, coefficients)
        assert expected.any(1).all()
        grad = self.implementation.token_stats_backward(logits, targets, m, coefficients)
        assert error(grad, expected) <= GRADIENT[dtype]

    @pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (3, 0), (0, 0), (7,)])
    def test_empty_and_single_rows_have_their_shapes(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        logits = torch.zeros(shape, device=self.device, dtype=dtype)
        targets = torch.full(shape[:-1], -1, device=self.device)
        stats = self.implementation.token_stats(logits, targets, wanted=WANTED[-1])
        assert stats.shape == (7, *shape[:-1])
        if shape[-1] == 0:
            assert torch.equal(stats[0], torch.full_like(stats[0], -torch.inf))
            sums = stats[[1, 2, 4, 5, 6]]
            assert torch.equal(sums, torch.zeros_like(sums))
        grad = self.implementation.token_stats_backward(
            logits, targets, stats[0], Coefficients(*stats.new_ones(2, *shape[:-1]))
        )
        assert torch.equal(grad, torch.ones_like(logits))

    def test_two_runs_are_bitwise_equal(self, dtype: torch.dtype) -> None:
        logits, targets = self.rows(5, 9001, dtype)
        targets[2] = 0
        first, second = (self.implementation.token_stats(logits, targets) for _ in range(2))
        assert torch.equal(first, second)
        coefficients = self.coefficients(5, first, True)
        grads = [
            self.implementation.token_stats_backward(logits, targets, first[0], coefficients)
            for _ in range(2)
        ]
        assert torch.equal(*grads)

    @pytest.mark.parametrize("based", [False, True])
    @pytest.mark.parametrize("case", ["rows", "hard"])
    def test_consumed_logits_give_the_gradient(
        self, case: str, based: bool, dtype: torch.dtype
    ) -> None:
        logits, targets = self.hard(dtype) if case == "hard" else self.rows(8, 1003, dtype)
        wanted = WANTED[-1] if based else FOUR
        kept = self.implementation.token_stats(logits, targets, wanted=wanted)
        coefficients = self.coefficients(8, kept, False, based)
        finite = kept[0].masked_fill(kept[0] == -torch.inf, 0)
        expected = true_gradient(logits, targets, finite, coefficients)
        stats = self.implementation.token_stats(logits, targets, True, wanted)
        torch.testing.assert_close(stats, kept, rtol=0, atol=0, equal_nan=True)
        grad = self.implementation.token_stats_backward(
            logits, targets, stats[0], coefficients, logits, True
        )
        assert grad is logits
        # e^(z-m) may be rounded on its own.
        assert error(grad, expected) <= 2 * GRADIENT[dtype]
        held = (targets >= 0).nonzero().squeeze(1)
        assert torch.equal(grad[held, targets[held]], coefficients.peak[held].to(dtype))

    def test_consumed_logits_keep_small_exponentials(self, dtype: torch.dtype) -> None:
        # e^-20 is below what fp16 holds, but with a scaled loss its gradient is not.
        logits = torch.linspace(-20, 0, 41, device=self.device).to(dtype).repeat(2, 1)
        targets = torch.full((2,), -1, device=self.device)
        before = logits.clone()
        m = self.implementation.token_stats(logits, targets, True)[0]
        coefficients = Coefficients(*torch.full((2, 2), 1e4, device=self.device, dtype=m.dtype))
        expected = true_gradient(before, targets, m, coefficients)
        grad = self.implementation.token_stats_backward(
            logits, targets, m, coefficients, logits, True
        )
        assert ((grad - expected) / expected).abs().max() <= 2.1 * GRADIENT[dtype]

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize(("count", "vocab"), VOCABULARIES)
    def test_token_loss_error_is_not_above_plain_torch(
        self, count: int, vocab: int, inplace: bool, dtype: torch.dtype
    ) -> None:
        logits, targets = self.rows(count, vocab, dtype)
        targets.clamp_(min=0)
        logits[0] *= 3  # a row of low entropy
        _, nll, entropy, _, grad = oracle(logits, targets)
        results = ours(logits, targets, self.backend, inplace)
        baseline = plain_torch(logits, targets)
        for result, other, truth in zip(results, baseline, (nll, entropy, grad), strict=True):
            assert error(result, truth) <= error(other, truth) + MARGIN[dtype]

    @pytest.mark.parametrize("inplace", [False, True])
    def test_token_loss_gradient_of_a_confident_prediction_keeps_its_digits(
        self, inplace: bool, dtype: torch.dtype
    ) -> None:
        logits, targets = torch.zeros(1, 1001, dtype=dtype), torch.tensor([40])
        logits[0, 40] = 13.8125  # e^13.8125 = 1000 * 997: p_y = 0.999
        logits, targets = logits.to(self.device), targets.to(self.device)
        truth = oracle(logits, targets).grad[0, 40]
        assert 0.9e-3 < truth.abs() < 1.1e-3
        off = [
            ((grad[0, 40] - truth) / truth).abs().item()
            for *_, grad in (
                ours(logits, targets, self.backend, inplace),
                plain_torch(logits, targets),
            )
        ]
        # fp32 statistics see 1 - p_y as the difference of numbers of size 1, as torch does; in bf16
        # the result is the truth, rounded once. fp16 is fine enough to show the statistics'
        # rounding: the kernel's, of 2.5e-7, are a quarter of its last place.
        units = {torch.float64: 1e5, torch.float32: 1e4, torch.bfloat16: 0.51, torch.float16: 0.75}
        assert off[0] <= units[dtype] * torch.finfo(dtype).eps
        assert off[0] <= off[1] or dtype == torch.float64  # where torch is the truth
