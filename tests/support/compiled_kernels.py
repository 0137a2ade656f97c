"""What the Triton kernels become for a GPU: compiled for it, and read, without one.

The launchers of the library run as they are, on tensors whose memory nobody touches. In place of
Triton's driver stands one that knows the target alone, and a launch ends when its kernel has been
compiled. So signature, specialisation, block sizes and warps are the launcher's own.

    python tests/support/compiled_kernels.py            a table
    python tests/support/compiled_kernels.py --json     the same for a program
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROWS = 8192
CHIPS = [80, 90, 100]  # A100, H100 and H200, B200
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;", re.M)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\S+\.F64")


class Instruction(NamedTuple):
    """One line of machine code."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """The address of a branch."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if self.name.split(".")[0] == "BRA" and found else None


class Code(NamedTuple):
    """What a compiled kernel takes and does; `loop` is its longest innermost loop."""

    chip: int
    kernel: str
    dtype: str
    columns: int
    registers: int
    stack: int
    """Bytes a thread, with what it spills."""
    shared: int
    """Bytes a program."""
    warps: int
    barriers: int
    """In the loop."""
    loads: list[int]
    """Bits of each load from global memory in the loop, sorted."""
    stores: list[int]
    fp64: int
    """Instructions in fp64, in the loop."""
    nan: int
    """Instructions in the loop that pass NaN on where others would drop it."""
    per_logit: float
    """Instructions of a thread on the shortest way round the loop, by the logits it handles."""


def read(kernel: Any, chip: int, name: str, dtype: str, columns: int) -> Code:
    """Return what the disassembler tells about a compiled kernel."""
    registers, stack, shared, local, listing = _disassembled(kernel.asm["cubin"])
    code = [Instruction(int(a, 16), p, *rest) for a, p, *rest in _INSTRUCTION.findall(listing)]
    body, warps = _loop(code), kernel.metadata.num_warps
    block = kernel.src.constants[(kernel.src.fn.arg_names.index("BLOCK"),)]
    return Code(
        chip=chip,
        kernel=name,
        dtype=dtype,
        columns=columns,
        registers=registers,
        stack=stack + local,
        shared=shared,
        warps=warps,
        barriers=sum(i.name.startswith(("BAR", "WARPSYNC")) for i in body),
        loads=_widths(body, "LDG"),
        stores=_widths(body, "STG"),
        fp64=sum(bool(_FP64.match(i.name)) for i in body),
        nan=sum(".NAN" in i.name for i in body),
        per_logit=round(_shortest(body) * 32 * warps / block, 2),
    )


def disassembler() -> Path:
    """Return where Triton's own lies, if it has one."""
    spec = find_spec("triton.backends.nvidia")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "bin" / "cuobjdump"


def _disassembled(cubin: bytes) -> tuple[int, int, int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler(), "-sass", "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = _RESOURCES.search(listing)
    assert found is not None, listing[:500]
    registers, stack, shared, local = (int(number) for number in found.groups())
    return registers, stack, shared, local, listing


def _loop(code: list[Instruction]) -> list[Instruction]:
    """Return the longest loop that contains no other; all of the code where there is none."""
    spans = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    inner = [
        span
        for span in spans
        if not any(span[0] <= s <= e <= span[1] for s, e in spans if (s, e) != span)
    ]
    start, end = max(inner, key=lambda span: span[1] - span[0], default=(0, 1 << 62))
    return [i for i in code if start <= i.address <= end]


def _shortest(body: list[Instruction]) -> int:
    """Return how many instructions the shortest way takes from the first to the last."""
    end = {i.name: i.address for i in body if i.name == "EXIT"}.get("EXIT", body[-1].address)
    ways = {body[0].address: 1}
    for here, after in zip(body, [*body[1:], None], strict=True):
        if here.address not in ways or here.address == end:
            continue
        nexts = [here.target]
        if after is not None and (here.target is None or here.predicate):
            nexts.append(after.address)
        for address in nexts:
            if address is not None and address > here.address:
                ways[address] = min(ways.get(address, 1 << 30), ways[here.address] + 1)
    return ways[end]


def _widths(body: list[Instruction], name: str) -> list[int]:
    found = (re.search(r"\.(U8|U16|S16|64|128|256)\b", i.name) for i in body if i.name[:3] == name)
    return sorted(int(width[1].lstrip("US")) if width else 32 for width in found)


def compiled(chip: int, cases: dict[str, Callable[[], None]]) -> Iterator[tuple[str, Any]]:
    """Yield (case, compiled kernel) of every launch that the cases make on such a chip."""
    found: list[Any] = []
    with _compiling_only(chip, found):
        for name, run in cases.items():
            run()
            for kernel in found:
                yield name, kernel
            found.clear()


@contextmanager
def _compiling_only(chip: int, found: list[Any]) -> Iterator[None]:
    """Let launches compile for a chip, collect what they compiled, and do nothing else."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Chip:
        get_current_device = staticmethod(lambda: chip)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", chip, 32))

    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(launch(self, *args, grid=grid, warmup=True, **options))

    before, JITFunction.run = driver._active, run
    driver.set_active(Chip)
    try:
        yield
    finally:
        JITFunction.run, driver._active = launch, before


def cases(dtype: str, columns: int, rows: int = ROWS) -> dict[str, Callable[[], Any]]:
    """Return calls of the launchers for [rows, columns] logits, whose last kernel is the case's."""
    from megatron_mile.ops.blocks import Coefficients
    from megatron_mile.ops.emo import kernel as emo
    from megatron_mile.ops.token_stats import Wanted, kernel

    logits = torch.empty(rows, columns, dtype=_DTYPES[dtype])
    # Megatron pads the vocabulary; the padding may be masked.
    padded = torch.empty(rows, -columns // 128 * -128, dtype=_DTYPES[dtype])[:, :columns]
    targets, scale = torch.empty(rows, dtype=torch.int64), torch.empty(columns)
    row = torch.empty(rows)
    pair, triple = Coefficients(row, row), Coefficients(row, row, row)
    smoothed = Coefficients(row, row, None, row)
    block = (padded, padded, scale, targets)

    def backward(coefficients: Coefficients) -> Callable[[], None]:
        return lambda: kernel.token_stats_backward(logits, targets, row, coefficients, logits)

    return {
        "forward": lambda: kernel.token_stats(logits, targets),
        "backward": backward(pair),
        "backward, tilted": backward(triple),
        "forward, smoothed": lambda: kernel.token_stats(logits, targets, False, Wanted(True)),
        "forward, squares": lambda: kernel.token_stats(logits, targets, False, Wanted(False, True)),
        "backward, smoothed": backward(smoothed),
        "emo forward": lambda: emo.emo_stats(*block),
        "emo backward": lambda: emo.emo_stats_backward(*block, row, row, triple, padded),
    }


def codes(chips: list[int], dtypes: list[str], columns: list[int]) -> Iterator[Code]:
    """Yield what each kernel becomes; one that serves several cases is read once."""
    known: dict[str, Code] = {}
    for chip, dtype, width in itertools.product(chips, dtypes, columns):
        for name, kernel in dict(compiled(chip, cases(dtype, width))).items():
            if kernel.hash not in known:
                known[kernel.hash] = read(kernel, chip, name, dtype, width)
            yield known[kernel.hash]._replace(kernel=name, columns=width)


def _table(found: Iterator[Code]) -> Iterator[str]:
    yield "| " + " | ".join(Code._fields) + " |"
    yield "|" + "---|" * len(Code._fields)
    for code in found:
        yield "| " + " | ".join(map(_cell, code)) + " |"


def _cell(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(f"{value.count(bits)} x {bits}" for bits in sorted(set(value), reverse=True))


def main() -> None:
    """Print the table, or a list of dictionaries."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS)
    parser.add_argument("--dtypes", nargs="+", choices=_DTYPES, default=["bf16"])
    parser.add_argument("--columns", type=int, nargs="+", default=[32000, 31999, 16384])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = codes(args.chips, args.dtypes, args.columns)
    if args.json:
        print(json.dumps([code._asdict() for code in found]))
    else:
        for line in _table(found):
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
