"""token_loss on the Triton kernels: against the oracle, in place, compiled, captured."""

from typing import Any

import pytest
import torch
from support.helpers import (
    assert_close,
    error,
    gradients_of,
    hard_rows,
    oracle,
    smoothed_configs,
    weighted_configs,
)
from torch import library

from megatron_mile.config import ObjectiveConfig
from megatron_mile.linear import linear_token_loss
from megatron_mile.loss import token_loss
from megatron_mile.ops import dispatch
from megatron_mile.ops.blocks import Coefficients
from megatron_mile.ops.token_stats import chunked, kernel

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU; the interpreter cannot show it")

CONFIGS = weighted_configs(backend="triton")
CONFIGS |= smoothed_configs(backend="triton")
CONFIGS["mile 5"] = ObjectiveConfig(gamma=5, sigma=0, backend="triton")


def _case(vocab: int = 1003) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [12, V], which are no leaf, and their targets."""
    logits, targets = hard_rows(vocab, torch.float32)
    return logits.to(DEVICE).requires_grad_() * 1, targets.to(DEVICE)


def _run(
    logits: torch.Tensor, targets: torch.Tensor, config: ObjectiveConfig, inplace: bool
) -> tuple[torch.Tensor, ...]:
    out = token_loss(logits, targets, config, inplace=inplace)
    return (*out[:4], *gradients_of(out, logits))


def test_select_gives_the_kernel() -> None:
    implementation, reason = dispatch.select("triton", DEVICE, torch.bfloat16)
    assert implementation is kernel
    assert reason == f"Triton kernel on {DEVICE.type}: asked for"
    assert dispatch.select("auto", DEVICE)[0] is (kernel if GPU else chunked)


# 127: one tile with idle lanes; 9001: several tiles.
@pytest.mark.parametrize("vocab", [127, 9001])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_token_loss_matches_oracle(name: str, inplace: bool, vocab: int) -> None:
    logits, targets = _case(vocab)
    truth = oracle(logits, targets, CONFIGS[name])
    assert_close(_run(logits, targets, CONFIGS[name], inplace), truth, 2e-6)


@pytest.mark.parametrize("shape", [(12,), (3, 4), (3, 2, 2)])
@pytest.mark.parametrize("inplace", [False, True])
def test_token_loss_leaves_padding_out(inplace: bool, shape: tuple[int, ...]) -> None:
    logits, targets = _case(127)
    padded = torch.full((12, 140), torch.nan, device=DEVICE)
    padded[:, :127] = logits.detach()
    leaf = padded.view(*shape, 140).requires_grad_()
    labels = targets.view(shape)
    out = token_loss(leaf * 1, labels, CONFIGS["mile"], inplace=inplace, vocab_size=127)
    (grad,) = torch.autograd.grad(out.loss, leaf, torch.ones_like(out.loss))
    fields = [field.flatten() for field in out[:4]]
    truth = oracle(logits, targets, CONFIGS["mile"])
    assert_close((*fields, grad.reshape(12, 140)[:, :127]), truth, 2e-6)
    assert not grad[..., 127:].any()


def test_linear_token_loss_repeats_plain_torch() -> None:
    hidden, weight = torch.randn(9, 16, device=DEVICE), torch.randn(127, 16, device=DEVICE)
    hidden.requires_grad_()
    weight.requires_grad_()
    targets = torch.arange(9, device=DEVICE)
    results = []
    for backend in ("triton", "torch"):
        config = ObjectiveConfig(backend=backend)
        out = linear_token_loss(hidden, weight, targets, config, chunk_tokens=4)
        grads = torch.autograd.grad(out.loss.sum(), (hidden, weight))
        results.append([*out[:4], *grads])
    for ours, plain in zip(*results, strict=True):
        assert error(ours, plain) <= 2e-6  # measured 2.3e-7


@pytest.mark.parametrize("name", ["mile", "mile through entropy"])
def test_token_loss_never_changes_kept_logits(name: str) -> None:
    logits, targets = _case()
    before, version = logits.detach().clone(), logits._version
    first = _run(logits, targets, CONFIGS[name], False)
    second = _run(logits, targets, CONFIGS[name], False)
    assert torch.equal(logits, before)
    assert logits._version == version
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_token_loss_inplace_consumes_the_logits() -> None:
    source = torch.randn(3, 50, device=DEVICE, requires_grad=True)
    logits = source.exp()  # saves its result
    version = logits._version
    token_loss(logits, torch.arange(3, device=DEVICE), CONFIGS["mile"], inplace=True)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_token_loss_inplace_refuses_a_second_backward() -> None:
    logits, targets = _case()
    loss = token_loss(logits, targets, CONFIGS["mile"], inplace=True).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False to run the backward twice"):
        loss.backward()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["mile", "mile through entropy", "deft smoothed z"])
def test_token_loss_compiles_as_one_graph(name: str, inplace: bool) -> None:
    targets = torch.randint(50, (6,), device=DEVICE)

    def loss(leaf: torch.Tensor) -> torch.Tensor:
        out = token_loss(leaf * 2, targets, CONFIGS[name], inplace=inplace)
        return (out.loss if out.z_loss is None else out.loss + out.z_loss).sum()

    grads = []
    # Without a GPU the compiler's own code generation is left out: it needs a C++ compiler.
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    values = torch.randn(6, 50, device=DEVICE)
    for function in (loss, compiled):
        leaf = values.clone().requires_grad_()
        function(leaf).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert error(grads[1], grads[0]) <= 5e-7


@pytest.mark.parametrize("name", ["token_stats", "token_stats_backward"])
def test_operators_keep_their_declarations(name: str) -> None:
    # Schemas, fake results and functionalisation, checked by torch's own test.
    logits, targets = torch.randn(2, 3, 40, device=DEVICE), torch.randint(40, (2, 3), device=DEVICE)
    arguments: tuple[Any, ...] = (logits, targets, True, True)
    if name == "token_stats_backward":
        coefficients = torch.randn(4, 2, 3, device=DEVICE)
        arguments = (logits, targets, logits.amax(-1), *coefficients, torch.empty_like(logits))
    library.opcheck(getattr(torch.ops.megatron_mile, name).default, arguments)


@needs_gpu
def test_token_loss_runs_without_waiting_for_the_device() -> None:
    logits, targets = _case()
    _run(logits.detach().requires_grad_(), targets, CONFIGS["mile"], False)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _run(logits, targets, CONFIGS["mile"], True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_token_loss_is_captured_by_a_graph() -> None:
    targets = torch.randint(9001, (6,), device=DEVICE)
    leaf = torch.zeros(6, 9001, device=DEVICE, requires_grad=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        _run(leaf, targets, CONFIGS["mile"], False)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(leaf, targets, CONFIGS["mile"], False)
    values = torch.randn(6, 9001, device=DEVICE)
    with torch.no_grad():
        leaf.copy_(values)
    graph.replay()
    for a, b in zip(captured, _run(leaf, targets, CONFIGS["mile"], False), strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_token_stats_reaches_beyond_32_bits() -> None:
    logits = torch.zeros(17, 1 << 27, device=DEVICE, dtype=torch.bfloat16)  # 2^31 and more logits
    logits[-1, -1] = 3
    targets = torch.full((17,), (1 << 27) - 1, device=DEVICE)
    stats = kernel.token_stats(logits, targets)
    assert stats[3].tolist() == [0.0] * 16 + [3.0]
    assert stats[0].tolist() == [0.0] * 16 + [3.0]
    coefficients = Coefficients(*stats[:2] * 0 + 1)
    kernel.token_stats_backward(logits, targets, stats[0], coefficients, logits)
    assert logits[0, 0] == 1
    assert logits[-1, -1] == 1
