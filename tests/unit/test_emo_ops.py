"""Plain torch and the rows in cache against the contract of EMO's statistics, and over threads."""

import pytest
import torch
from support.emo_contract import GRADIENT, SUMS, EmoContract
from support.helpers import error

from megatron_mile.ops import blocks
from megatron_mile.ops.emo import chunked, reference

ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TestReference(EmoContract):
    implementation = reference
    dtypes = ALL


class TestChunked(EmoContract):
    implementation = chunked
    dtypes = ALL

    def test_threads_share_the_rows(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blocks, "_IN_CACHE", 150)  # a row at a time
        block = self.block(40, 127, dtype)
        m = block[-1]
        distance = torch.rand_like(m)
        coefficients = blocks.Coefficients(*torch.randn(3, 40, dtype=m.dtype))
        grads = [torch.empty_like(block[0]) for _ in range(2)]
        reference.emo_stats_backward(*block, distance, coefficients, grads[0])
        torch.set_num_threads(3)
        try:
            sums = chunked.emo_stats(*block[:4])
            chunked.emo_stats_backward(*block, distance, coefficients, grads[1])
        finally:
            torch.set_num_threads(1)
        assert error(sums[4:], reference.emo_stats(*block[:4])[4:]) <= SUMS[dtype]
        assert error(grads[1], grads[0]) <= GRADIENT[dtype]
