"""What the kernels take on an A100, an H100 and a B200: compiled for them, which needs no GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from support import compiled_kernels
from support.compiled_kernels import Code

pytest.importorskip("triton", minversion="3.7", reason="older compilers take more instructions")
pytestmark = [
    pytest.mark.skipif(torch.version.hip is not None, reason="no compiler for NVIDIA GPUs here"),
    pytest.mark.skipif(
        find_spec("triton.backends.nvidia") is None or not compiled_kernels.disassembler().exists(),
        reason="this Triton comes without a disassembler",
    ),
]

# Instructions a logit, in bf16: measured, and 4 % for another compiler.
INSTRUCTIONS = {
    80: {
        "forward": 10.3,
        "backward": 8.2,
        "backward, tilted": 10.3,
        "forward, smoothed": 12.4,
        "forward, squares": 11.9,
        "backward, smoothed": 8.2,
        "emo forward": 16.4,
        "emo backward": 19.7,
    },
    90: {
        "forward": 10.3,
        "backward": 8.2,
        "backward, tilted": 10.3,
        "forward, smoothed": 12.4,
        "forward, squares": 11.9,
        "backward, smoothed": 8.2,
        "emo forward": 16.7,
        "emo backward": 21,
    },
    100: {
        "forward": 9.3,
        "backward": 6.7,
        "backward, tilted": 9,
        "forward, smoothed": 12.3,
        "forward, squares": 10.2,
        "backward, smoothed": 6.7,
        "emo forward": 12.3,
        "emo backward": 16.6,
    },
}
# With 48 registers five programs of eight warps fit a multiprocessor, with 64 four.
REGISTERS = {"emo forward": 64, "emo backward": 64}

ONE_KERNEL = """
from support.compiled_kernels import cases, compiled
found = {}
for rows, columns in ((1, 32000), (16, 32000), (4099, 31999), (8192, 16384)):
    for name, kernel in compiled(90, cases("bf16", columns, rows)):
        found.setdefault((name, kernel.src.name), set()).add(kernel.hash)
print(len(found), max(len(kernels) for kernels in found.values()))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return that of a process in which Triton compiles, into an empty cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return environment


@pytest.fixture(scope="module")
def codes(environment: dict[str, str]) -> list[Code]:
    """Return every kernel as compiled for three chips, and for one of them in all dtypes."""
    command = [sys.executable, compiled_kernels.__file__, "--json", "--chips"]
    runs = [
        subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
        for arguments in (["80", "100"], ["90", "--dtypes", "bf16", "fp16", "fp32"])
    ]
    outputs = [run.communicate()[0] for run in runs]
    return [Code(**code) for output in outputs for code in json.loads(output)]


def test_every_case_is_compiled(codes: list[Code]) -> None:
    cases = {(code.chip, code.dtype, code.columns, code.kernel) for code in codes}
    assert len(cases) == len(codes) == 3 * (5 * 8)
    assert {code.columns for code in codes} == {32000, 31999, 16384}


def test_nothing_spills(codes: list[Code]) -> None:
    assert [code for code in codes if code.stack] == []


def test_registers_leave_room_for_other_programs(codes: list[Code]) -> None:
    assert [code for code in codes if code.registers > REGISTERS.get(code.kernel, 48)] == []


def test_every_access_takes_16_bytes(codes: list[Code]) -> None:
    assert [code for code in codes if {*code.loads, *code.stores} != {128}] == []
    # Two of the logits for a thread; in bf16 one of logits and products each, two of the scale.
    assert {len(code.loads) for code in codes if "emo" not in code.kernel} == {2}
    assert {len(code.loads) for code in codes if "emo" in code.kernel} == {4, 6}


def test_no_thread_waits_for_others_in_the_loop(codes: list[Code]) -> None:
    assert [code for code in codes if code.barriers] == []


def test_nothing_in_the_loop_is_fp64(codes: list[Code]) -> None:
    assert [code for code in codes if code.fp64] == []


def test_instructions_stay_few(codes: list[Code]) -> None:
    many = [code for code in codes if code.per_logit > INSTRUCTIONS[code.chip][code.kernel]]
    assert many == []


def test_a_cost_that_is_nan_stays_nan(codes: list[Code]) -> None:
    # The interpreter, which uses numpy's minimum, cannot show it.
    assert [code for code in codes if ("emo" in code.kernel) != (code.nan > 0)] == []


def test_other_shapes_compile_nothing_again(environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", ONE_KERNEL]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["13", "1"]
