"""The Triton kernels against the contract, compiled on a GPU or interpreted without one."""

import pytest
import torch
from support.helpers import error
from support.token_stats_contract import (
    GRADIENT,
    STATS,
    Contract,
    true_gradient,
    true_stats,
)

from megatron_mile.ops.token_stats import kernel


# Rows with NaN or infinity; the interpreter computes with numpy.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
class TestKernel(Contract):
    implementation = kernel
    backend = "triton"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def test_token_stats_of_many_tiles_rescales_its_lanes(self) -> None:
        # The maximum rises from tile to tile, by so much that the earlier sums vanish at the end.
        steps = torch.tensor([-90.0, -60, -5, 0, 40], device=self.device).repeat_interleave(8192)
        logits = (torch.randn(3, len(steps), device=self.device) + steps).roll(100, -1)
        logits[1] = logits[1].flip(-1)  # falls
        logits[2, :20000] = -torch.inf  # two tiles and a half are masked
        targets = torch.tensor([0, 5, 40000], device=self.device)
        stats = kernel.token_stats(logits, targets)
        assert error(stats, true_stats(logits, targets)) <= STATS[torch.float32]

    # Around the ends of pieces of 16 bytes and of tiles, of 2048 fp32 or 4096 bf16 and fp16.
    @pytest.mark.parametrize("columns", [1, 8, 23, 2048, 4096, 4097, 8199])
    @pytest.mark.parametrize("offset", [0, 1, 7])
    def test_rows_may_begin_and_end_anywhere(
        self, offset: int, columns: int, dtype: torch.dtype
    ) -> None:
        buffer = torch.full((3 * (columns + 11) + 16,), torch.nan, device=self.device, dtype=dtype)
        logits = buffer[8 + offset :].as_strided((3, columns), (columns + 11, 1), 8 + offset)
        logits.copy_(self.rows(3, columns, dtype)[0])
        last = (columns - 1) // 2048 * 2048  # where the last tile, or half of it, begins
        targets = torch.tensor([0, columns - 1, last], device=self.device)
        stats = kernel.token_stats(logits, targets)
        assert error(stats, true_stats(logits, targets)) <= STATS[dtype]
        coefficients = self.coefficients(3, stats, True)
        expected = true_gradient(logits, targets, stats[0], coefficients)
        kernel.token_stats_backward(logits, targets, stats[0], coefficients, logits)
        assert error(logits, expected) <= GRADIENT[dtype]
        logits.fill_(torch.nan)
        assert buffer.isnan().all()

    def test_output_may_lie_otherwise_than_the_logits(self, dtype: torch.dtype) -> None:
        logits, targets = self.rows(3, 4103, dtype)
        out = torch.empty(3, 4110, device=self.device, dtype=dtype)[:, 5:-2]
        m = kernel.token_stats(logits, targets)[0]
        coefficients = self.coefficients(3, m, False)
        kernel.token_stats_backward(logits, targets, m, coefficients, out)
        assert error(out, true_gradient(logits, targets, m, coefficients)) <= GRADIENT[dtype]

    @pytest.mark.parametrize("place", [0, 7, 8, 4095, 9000])
    def test_a_single_finite_logit_is_the_sum(self, place: int, dtype: torch.dtype) -> None:
        logits = torch.full((2, 9001), -torch.inf, device=self.device, dtype=dtype)
        logits[:, place] = torch.tensor([-300.0, 40])
        stats = kernel.token_stats(logits, torch.tensor([place, -1], device=self.device))
        assert stats[:3].tolist() == [[-300, 40], [1, 1], [0, 0]]

    @pytest.mark.parametrize("multiprocessors", [1, 4, 132])
    def test_programs_may_share_a_row(
        self, multiprocessors: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernel, "_multiprocessors", lambda device: multiprocessors)
        logits, targets = self.rows(5, 20003, dtype)
        logits[1, :9000] = -torch.inf  # whole parts of it
        logits[3] = -torch.inf
        stats = kernel.token_stats(logits, targets)
        assert error(stats, true_stats(logits, targets)) <= STATS[dtype]
        coefficients = self.coefficients(5, stats, True)
        finite = stats[0].masked_fill(stats[0] == -torch.inf, 0)
        expected = true_gradient(logits, targets, finite, coefficients)
        grad = kernel.token_stats_backward(logits, targets, stats[0], coefficients)
        assert error(grad, expected) <= GRADIENT[dtype]
        logits[4, 19000] = torch.nan
        bad = kernel.token_stats(logits, targets)
        assert bad[1:3, 4].isnan().all()
        torch.testing.assert_close(bad[:, :4], stats[:, :4], rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("rows", [1, 100, 8192])
    @pytest.mark.parametrize("columns", [1, 64, 4096, 4097, 31999, 131072])
    def test_tiling_covers_a_row_and_fills_a_gpu(
        self, columns: int, rows: int, dtype: torch.dtype
    ) -> None:
        logits = torch.empty(1, 1, 1, dtype=dtype).expand(rows, 1, columns)
        tiling = kernel._Tiling.of(logits)
        assert tiling.block * tiling.tiles >= columns > tiling.block * (tiling.tiles - 1)
        for most in (None, 4):
            tiles, parts = tiling.shared(rows, 132, most)
            assert tiles * parts >= tiling.tiles > tiles * (parts - 1)
            assert most is None or tiles <= most
            busy = rows * parts * tiling.warps >= 132 * 32
            assert busy or parts == tiling.tiles


def test_rows_are_alike_only_where_each_begins_as_far_from_16_bytes() -> None:
    # On a GPU, wide stores to others would be an error that the interpreter cannot show.
    memory = torch.empty(4096, dtype=torch.bfloat16)

    def rows(offset: int, outer: int, inner: int) -> torch.Tensor:
        return memory.as_strided((2, 3, 5), (outer, inner, 1), offset)

    logits = rows(0, 1000, 31)
    assert kernel._are_alike(logits, logits)
    assert kernel._are_alike(logits, rows(8, 1024 - 24, 31 + 16))
    assert not kernel._are_alike(logits, rows(1, 1000, 31))
    assert not kernel._are_alike(logits, rows(0, 1001, 31))
    assert not kernel._are_alike(logits, rows(0, 1000, 32))
    assert not kernel._are_alike(logits, torch.empty(2, 3, 5))
    # The stride of a dimension of one row means nothing.
    assert kernel._are_alike(memory.as_strided((1, 1, 5), (3, 7, 1)), memory.view(1, 1, -1))
