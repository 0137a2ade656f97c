"""The Triton kernels of EMO's statistics against their contract, EMO on them against the oracle."""

import itertools

import pytest
import torch
from support.emo_contract import EmoContract
from support.emo_oracle import certain_rows, emo_oracle, hard_cost_rows
from support.helpers import error, hard_rows

from megatron_mile.config import ObjectiveConfig
from megatron_mile.emo import CostRows
from megatron_mile.loss import token_loss
from megatron_mile.ops import dispatch
from megatron_mile.ops.emo import kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# Rows with NaN or infinity; the interpreter computes with numpy.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
class TestKernel(EmoContract):
    implementation = kernel
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    device = DEVICE


def test_emo_beside_the_kernel_is_the_kernel() -> None:
    statistics, _ = dispatch.select("triton", torch.device(DEVICE))
    assert dispatch.emo_beside(statistics) is kernel


@pytest.mark.parametrize(
    ("mode", "inplace", "certain"),
    [*itertools.product(("1", "2", "alone"), (False, True), (False,)), ("1", False, True)],
)
def test_token_loss_matches_oracle(mode: str, inplace: bool, certain: bool) -> None:
    logits, targets = hard_rows(1003, torch.float32)
    rows = hard_cost_rows(1003, 24, torch.float32)
    if certain:
        logits, targets, rows = certain_rows(256, 1003)
    truth = emo_oracle(logits, targets, rows, mode)
    # The vocabulary outermost: strides that the kernel must follow.
    leaf = logits.t().contiguous().t().to(DEVICE).requires_grad_()
    config = ObjectiveConfig("emo", emo_mode=mode, backend="triton")
    cost = CostRows(rows.to(DEVICE))
    out = token_loss(leaf * 1, targets.to(DEVICE), config, inplace=inplace, cost=cost)
    (grad,) = torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))
    assert out.emo is not None
    fields = (out.loss, out.nll, out.entropy, out.emo, grad)
    for name, ours, exact in zip(truth._fields, fields, truth, strict=True):
        # Measured 2.8e-7; 6.6e-7 for the certain rows, 8e-6 with sums in fp32.
        assert error(ours.cpu(), exact) <= 2e-6, name
