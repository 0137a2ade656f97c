"""Which implementation is picked, and what is said about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import assert_close, hard_rows, oracle, run_loss

from megatron_mile.config import ObjectiveConfig
from megatron_mile.loss import token_loss
from megatron_mile.ops import dispatch
from megatron_mile.ops.token_stats import chunked, reference

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton, and with it the kernels, impossible to import."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_mile.ops.token_stats.kernel", raising=False)
    monkeypatch.delattr("megatron_mile.ops.token_stats.kernel", raising=False)


def test_select_gives_blocks_for_auto_on_a_cpu() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        implementation, reason = dispatch.select("auto", CPU, dtype)
        assert implementation is chunked
        assert "cache-sized blocks on cpu" in reason


def test_select_gives_the_reference_for_torch() -> None:
    for device in (CPU, GPU):
        implementation, reason = dispatch.select("torch", device)
        assert implementation is reference
        assert reason == f"plain torch on {device.type}: asked for"


# In a process of its own, because the kernels of this one may be interpreted.
SELECT = """
import torch
from megatron_mile.ops import dispatch
print(dispatch.select("auto", torch.device("cuda"))[1])
dispatch.select("triton", torch.device("cuda"))
"""


@pytest.mark.parametrize("compiler", [None, "no-such-cc"])
def test_select_finds_a_missing_c_compiler(compiler: str | None, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("CC", None)
    if compiler is not None:
        environment["CC"] = compiler
    command = [sys.executable, "-c", SELECT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    names = compiler or "gcc, clang"
    obstacle = f"Triton finds no C compiler ({names}): install gcc, or set CC to one"
    assert run.stdout.strip() == f"plain torch on cuda: {obstacle}"
    assert f"ValueError: backend is 'triton', but {obstacle}; use auto or torch" in run.stderr


@pytest.mark.usefixtures("_no_triton")
def test_select_falls_back_with_its_reason_where_triton_is_missing() -> None:
    implementation, reason = dispatch.select("auto", GPU)
    assert implementation is reference
    assert reason.startswith("plain torch on cuda: Triton cannot be imported (")
    with pytest.raises(ValueError, match=r"backend is 'triton', but Triton cannot.*use auto"):
        dispatch.select("triton", GPU)


def test_select_falls_back_with_its_reason_for_fp64() -> None:
    implementation, reason = dispatch.select("auto", GPU, torch.float64)
    assert implementation is reference
    assert reason == "plain torch on cuda: the kernel has no fp64"
    with pytest.raises(ValueError, match="no fp64; use auto or torch"):
        dispatch.select("triton", GPU, torch.float64)


def test_select_refuses_triton_without_gpu_and_interpreter() -> None:
    with pytest.raises(ValueError, match=r"logits are on cpu and Triton needs a GPU"):
        dispatch.select("triton", CPU)


def test_select_refuses_an_unknown_backend() -> None:
    for device in (CPU, GPU):
        with pytest.raises(ValueError, match="backend is 'cuda'; expected auto, torch or triton"):
            dispatch.select("cuda", device)


# "triton" is in tests/kernels; with "auto" the other tests of token_loss run.
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_token_loss_with_the_reference_matches_oracle(entropy_grad: bool) -> None:
    config = ObjectiveConfig(backend="torch", entropy_grad=entropy_grad)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        logits, targets = hard_rows(127, dtype)
        out, grad = run_loss(logits, targets, config)
        assert_close((*out[:4], grad), oracle(logits, targets, config), tolerance)


def test_token_loss_compiles_on_a_cpu() -> None:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        targets = torch.tensor([0, 8, 1])
        return token_loss(logits, targets, ObjectiveConfig()).loss.sum()

    logits = torch.randn(3, 9)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, loss(logits), rtol=1e-6, atol=0)
