"""The kernels for numbers per token against plain torch, which computes the same in float64.

The truth of plain torch itself is in tests/unit/test_loss.py and tests/parallel/test_vocab.py.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.helpers import error

from megatron_mile.ops.blocks import NOTHING, Extras
from megatron_mile.ops.per_token import kernel, reference
from megatron_mile.ops.token_stats import FOUR, Wanted

# The interpreter computes with numpy, which warns of infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Both sides are float64, and differ in the order of few operations: measured 4e-16 at most, but
# where e^x - 1 takes the place of expm1, 3e-13.
EXACT = 1e-12
SINGLE = 1.2e-7  # one rounding to fp32

# Around the block of 128 tokens and that of 1024, a single token, and none.
TOKENS = [0, 1, 127, 128, 1024, 1100]
WANTED = [FOUR, Wanted(shifts=True), Wanted(squares=True), Wanted(True, True)]
EXTRAS = [NOTHING, Extras(smoothing=0.1), Extras(z_loss=1e-3), Extras(0.3, 10.0)]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def same(ours: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    """Fail unless shape and dtype are equal, NaN and infinities too, and the rest is close."""
    assert (ours.shape, ours.dtype) == (truth.shape, truth.dtype)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=1e-300, equal_nan=True)


def shards_of(ranks: int, tokens: int, wanted: Wanted = FOUR) -> torch.Tensor:
    """Statistics [R, 4 to 7, N] in fp32: also shards without a finite logit, NaN, large shifts."""
    m = 20 * torch.randn(ranks, tokens, device=DEVICE)
    total = 1 + 1000 * torch.rand(ranks, tokens, device=DEVICE)
    moment = -total * 5 * torch.rand(ranks, tokens, device=DEVICE)
    z_y = torch.full((ranks, tokens), torch.nan, device=DEVICE)
    owner = torch.randint(ranks, (tokens,), device=DEVICE)
    z_y.scatter_(0, owner.unsqueeze(0), m.gather(0, owner.unsqueeze(0)) - 1)
    shards = torch.stack([m, total, moment, z_y], 1)
    certain = torch.tensor([[3.0], [1 + 2**-23], [-1e-6], [3.0]], device=DEVICE)
    empty = torch.tensor([[-torch.inf], [0.0], [0.0], [torch.nan]], device=DEVICE)
    for token, change in enumerate(
        (
            lambda x: x[0].copy_(empty[:, 0]),  # one shard of nothing but masked logits
            lambda x: x.copy_(empty.T.expand_as(x)),  # all of them
            lambda x: x[-1, 1:3].fill_(torch.nan),  # NaN among the logits
            lambda x: x[0, :3].fill_(torch.nan),
            lambda x: x[:, 3].fill_(torch.nan),  # nobody has the target
            lambda x: (x.copy_(empty.T.expand_as(x)), x[0].copy_(certain[:, 0])),  # p_y near 1
            lambda x: x[:, 0].add_(1e30),
        )
    ):
        if token < tokens:
            change(shards[..., token])
    return torch.cat([shards, *_more(shards, wanted)], 1)


def _more(shards: torch.Tensor, wanted: Wanted) -> Iterator[torch.Tensor]:
    """Yield U and n, and Q; the last of several shards has no columns where it has no mass."""
    m, total = shards[:, :1], shards[:, 1:2]
    if wanted.shifts:
        columns = 1000 + torch.arange(len(shards), device=DEVICE).view(-1, 1, 1)
        columns = torch.where(m == -torch.inf, 0, columns.to(m.dtype))
        columns[0] = 999
        shifts = torch.where(m == -torch.inf, -torch.inf, -7.3 * columns)
        yield torch.where(columns == 0, 0, shifts)
        yield columns
    if wanted.squares:
        yield total * 0.4


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_join_repeats_plain_torch(ranks: int, tokens: int, wanted: Wanted) -> None:
    shards = shards_of(ranks, tokens, wanted)
    same(kernel.join(shards, wanted), reference.join(shards, wanted), EXACT)


def test_join_keeps_the_shape_of_the_tokens() -> None:
    shards = shards_of(2, 12)
    joined = kernel.join(shards.view(2, 4, 3, 4))
    assert torch.equal(joined.view(6, 12).nan_to_num(), kernel.join(shards).nan_to_num())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sloped", [False, True])
@pytest.mark.parametrize("valued", [False, True])
@pytest.mark.parametrize("extras", EXTRAS)
def test_weigh_repeats_plain_torch(
    extras: Extras, valued: bool, weighted: bool, sloped: bool, tokens: int
) -> None:
    wanted = Wanted(shifts=extras.smoothing > 0)
    shards = shards_of(2, tokens, wanted)
    joined, maxima = reference.join(shards, wanted), shards[1, 0]
    weight = (1 + joined[5]).pow(1.7) if weighted else None
    slope = 1.7 * (1 + joined[5]).pow(0.7) if sloped else None
    value = torch.expm1(-0.3 * joined[4]) / -0.3 if valued else None
    valid = torch.rand(tokens, device=DEVICE) > 0.2
    given = (joined, maxima, weight, slope, valid, extras, value)
    for ours, truth, tolerance in zip(
        kernel.weigh(*given), reference.weigh(*given), (SINGLE, EXACT), strict=True
    ):
        same(ours, truth, tolerance)


def test_weigh_takes_weights_of_any_strides_and_dtype() -> None:
    shards = shards_of(2, 12)
    joined = reference.join(shards)
    valid = torch.ones(12, dtype=torch.bool, device=DEVICE)
    single = torch.ones(1, device=DEVICE).expand(12)  # as a weight that is a constant may be
    for weight in (single, torch.rand(24, device=DEVICE)[::2]):
        given = (joined, shards[0, 0], weight, None, valid)
        for ours, truth in zip(kernel.weigh(*given), reference.weigh(*given), strict=True):
            same(ours, truth, SINGLE)


@pytest.mark.parametrize("nll", [0, 1e-300, 1e-16, 1e-9, 9.9e-4, 1.1e-3, 0.1, 30, 1000, torch.inf])
def test_weigh_keeps_the_digits_of_a_likely_target(nll: float) -> None:
    joined = torch.tensor([[0.0], [1.0], [0.0], [0.0], [nll], [0.0]], dtype=torch.float64)
    valid, m = torch.ones(1, dtype=torch.bool), torch.zeros(1)
    given = (x if x is None else x.to(DEVICE) for x in (joined, m, None, None, valid))
    _, (_, peak) = kernel.weigh(*given)
    assert peak.item() == pytest.approx(torch.expm1(-joined[4]).item(), rel=EXACT, abs=0)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("tokens", TOKENS)
def test_scale_repeats_plain_torch(number: int, tokens: int) -> None:
    stacked = torch.randn(number, tokens, dtype=torch.float64, device=DEVICE)
    grad = torch.randn(tokens, device=DEVICE)
    stacked[:, :3], grad[1:5] = torch.nan, 0  # 0 * NaN must be 0, NaN * 1 stays
    for incoming in (grad, grad[:1].expand(tokens) if tokens else grad):  # a sum's is expanded
        ours = kernel.scale(stacked, incoming, torch.float32)
        truth = reference.scale(stacked, incoming, torch.float32)
        same(torch.stack(ours[:number]), torch.stack(truth[:number]), 0)
        assert (ours.tilt is None) == (number == 2)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_scale_adds_the_z_loss_to_flat_and_peak(smoothed: bool, tokens: int) -> None:
    stacked = torch.randn(4 + smoothed, tokens, dtype=torch.float64, device=DEVICE)
    grad, z_grad = torch.randn(2, tokens, device=DEVICE)
    stacked[-1, :3], stacked[0, 3:6], grad[2:5], z_grad[1:4] = torch.nan, torch.nan, 0, 0
    given = (stacked, grad, torch.float32, smoothed, z_grad)
    ours, truth = kernel.scale(*given), reference.scale(*given)
    assert (ours.tilt is None, ours.base is None) == (True, not smoothed)
    same(ours.stack(), truth.stack(), 0)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_locate_repeats_plain_torch(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    ids = [0, 9, 10, 11, 99, 100, 101, 127, limits.max, limits.min, max(-100, limits.min)]
    targets = torch.tensor(ids, dtype=dtype, device=DEVICE)
    for given in (targets, targets.expand(3, -1).T):  # contiguous, and not
        for ignored in (-100, 99):
            found = kernel.locate(given, 10, 101, ignored)
            for ours, truth in zip(found, reference.locate(given, 10, 101, ignored), strict=True):
                assert torch.equal(ours, truth)
                assert ours.is_contiguous()


@pytest.mark.parametrize("figures", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("tokens", TOKENS)
def test_sum_up_repeats_plain_torch(tokens: int, figures: int) -> None:
    mask = torch.rand(tokens, device=DEVICE) * (torch.rand(tokens, device=DEVICE) > 0.3)
    nll, entropy, *values = torch.randn(2 + figures, tokens, device=DEVICE)
    valid = torch.rand(tokens, device=DEVICE) > 0.1
    nll[3:9], entropy[5:9], mask[8:12] = torch.nan, torch.nan, 0
    mask[20:23] = -1
    for value in values:
        value[8:12] = torch.nan  # of masked tokens
    given = (mask, valid, nll, entropy, values)
    ours, truth = kernel.sum_up(*given), reference.sum_up(*given)
    assert ours.shape == truth.shape == (figures + 3,)
    # Sums of numbers of either sign, in another order.
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13 * max(tokens, 1))
    assert torch.equal(ours[-2:], truth[-2:])


def test_sum_up_takes_a_mask_that_is_one_number() -> None:
    mask, (nll, entropy, loss) = torch.ones(1, device=DEVICE).expand(9), torch.rand(3, 9).to(DEVICE)
    valid = torch.ones(9, dtype=torch.bool, device=DEVICE)
    ours = kernel.sum_up(mask, valid, nll, entropy, [loss])
    assert error(ours[1], loss.double().sum()) <= EXACT


# Prints the bytes of local memory of each kernel on each chip: 0 if the registers suffice.
COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_mile.ops.per_token import kernel

POINTERS = {"targets": "i64", "local": "i64", "valid": "i1", "joined": "fp64", "weights": "fp64"}
POINTERS |= {"slopes": "fp64", "values": "fp64", "stacked": "fp64", "sums": "fp64"}
NUMBERS = {"rows": "i32", "start": "i32", "end": "i32", "ignore_index": "i32"}
WEIGH = {"WEIGHTED": True, "SLOPED": True, "VALUED": True, "SMOOTHING": 0.0, "Z_LOSS": 0.0}
VARIANTS = [
    (kernel.locate_kernel, {}),
    (kernel.join_kernel, {"SHARDS": 8, "SHIFTS": False, "SQUARES": False}),
    (kernel.join_kernel, {"SHARDS": 8, "SHIFTS": True, "SQUARES": True}),
    (kernel.weigh_kernel, WEIGH),
    (kernel.weigh_kernel, {**WEIGH, "SMOOTHING": 0.1, "Z_LOSS": 1e-4}),
    (kernel.scale_kernel, {"NUMBER": 3, "Z_LOSS": False}),
    (kernel.scale_kernel, {"NUMBER": 4, "Z_LOSS": True}),
    (kernel.sums_kernel, {"NUMBER": 4}),
]
assert isinstance(kernel.join_kernel, triton.JITFunction)
for capability in (80, 90, 100):
    for function, constants in VARIANTS:
        block = kernel._SUM_BLOCK if function is kernel.sums_kernel else kernel._BLOCK
        constants = {**constants, "BLOCK": block}
        signature = {
            name: "constexpr" if name in constants
            else NUMBERS.get(name) or "*" + POINTERS.get(name, "fp32")
            for name in function.arg_names
        }
        source = ASTSource(function, signature, constants)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4})
        print(len(re.findall(r"(?:ld|st)\\.local", compiled.asm["ptx"])))
"""


@pytest.mark.skipif(torch.version.hip is not None, reason="no compiler for NVIDIA GPUs here")
def test_kernels_compile_for_three_generations(tmp_path: Path) -> None:
    pytest.importorskip("triton", minversion="3.4", reason="older compilers take other arguments")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = tmp_path / "compile.py"  # Triton reads the source of what it compiles
    script.write_text(COMPILE)
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0"] * 24
