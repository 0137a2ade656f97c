"""The Triton kernels against the contract, compiled on a GPU or interpreted without one."""

import pytest
import torch
from support.helpers import error
from support.token_stats_contract import STATS, Contract, true_stats

from megatron_mile.ops.token_stats import kernel


# Rows with NaN or infinity; the interpreter computes with numpy.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
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

    def test_launch_size_covers_every_vocabulary(self) -> None:
        for columns in (0, 1, 64, 65, 4096, 4097, 1 << 20):
            block, warps = kernel._launch_size(columns)
            assert block & (block - 1) == 0
            assert min(columns, 4096) <= block
            assert warps in (4, 8)
