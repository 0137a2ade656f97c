"""The kernels through Triton's compiler for an H100, which needs no GPU, unlike running them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="older compilers take other arguments")

# Prints how much of the per-thread stack each variant spills to: 0 if its registers suffice.
SCRIPT = """
import re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_mile.ops.token_stats import kernel
from megatron_mile.ops.emo import kernel as emo

def spilled(function, dtype, constants, module=kernel):
    pointers = {"logits": dtype, "products": dtype, "grad": dtype, "targets": "i64"}
    pointers |= {"sums": "fp64"} if module is emo else {}
    values = {name: "i64" for name in function.arg_names if "stride" in name}
    values |= {"rows": "i32", "inner": "i32", "columns": "i32"}
    signature = {
        name: "constexpr" if name in constants else values.get(name)
        or "*" + pointers.get(name, "fp32")
        for name in function.arg_names
    }
    source = ASTSource(function, signature, constants)
    block, warps = constants["BLOCK"], module._launch_size(constants["BLOCK"])[1]
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps})
    if module is emo:  # a cost that is NaN stays NaN, which the interpreter cannot show
        assert ".NaN.f32" in compiled.asm["ptx"], function
    return len(re.findall(r"(?:ld|st)\\.local", compiled.asm["ptx"]))

assert not kernel.INTERPRETED and not emo.INTERPRETED
block = kernel._launch_size(1 << 20)[0]
for dtype in ("fp32", "bf16", "fp16"):
    print(spilled(kernel.token_stats_fwd_kernel, dtype, {"BLOCK": block}))
    for tilted in (False, True):
        constants = {"BLOCK": block, "TILTED": tilted}
        print(spilled(kernel.token_stats_bwd_kernel, dtype, constants))
    for function in (emo.emo_fwd_kernel, emo.emo_bwd_kernel):
        constants = {"BLOCK": emo._launch_size(1 << 20)[0]}
        print(spilled(function, dtype, constants, emo))
"""


@pytest.mark.skipif(torch.version.hip is not None, reason="no compiler for NVIDIA GPUs here")
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = tmp_path / "compile.py"  # Triton reads the source of what it compiles
    script.write_text(SCRIPT)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["0"] * 15
