"""Plain torch and the rows in cache against the transport's contract, and over threads."""

import pytest
import torch
from helpers import error
from transport_contract import GRADIENT, SUMS, TransportContract

from megatron_mile.ops import blocks
from megatron_mile.ops.transport import chunked, reference

ALL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TestReference(TransportContract):
    implementation = reference
    dtypes = ALL


class TestChunked(TransportContract):
    implementation = chunked
    dtypes = ALL

    def test_threads_share_the_rows(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blocks, "_IN_CACHE", 150)  # a row at a time
        block = self.block(40, 127, dtype)
        m = block[-1]
        mean, coefficients = torch.rand_like(m), torch.randn(3, 40, dtype=m.dtype)
        grads = [torch.empty_like(block[0]) for _ in range(2)]
        reference.transport_block_backward(*block, mean, coefficients, grads[0])
        torch.set_num_threads(3)
        try:
            sums = chunked.transport_block(*block[:4])
            chunked.transport_block_backward(*block, mean, coefficients, grads[1])
        finally:
            torch.set_num_threads(1)
        assert error(sums[4:], reference.transport_block(*block[:4])[4:]) <= SUMS[dtype]
        assert error(grads[1], grads[0]) <= GRADIENT[dtype]
