"""Counts and estimates for the size scripts, in one process, printed as JSON for test_estimate.py.

CPU mode is for the life of a process and comes before the first import of Megatron, so it cannot
be the tests' own process.
"""

import contextlib
import io
import json
import logging
import math
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from megatron_mile import cpu_mode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `tools`

from tools import estimate
from tools.estimation.footprint import cost_flops, memory, shard_parameters
from tools.estimation.job import (
    SIZES,
    _named_ranks,
    build_shard,
    count_parameters,
    parse,
    size_flags,
)

EMO = ("--mile-objective", "emo")
# More of the same flags, to see each branch of the memory estimate.
VARIANTS = {
    "fp32": ["--mile-objective", "ce"],
    "host's loss": ["--mile-objective", "none"],
    "emo": [*EMO],
    "fused": ["--mile-fused-linear", "--micro-batch-size", "16"],
    "pipeline": ["--pipeline-model-parallel-size", "4"],
    "recompute": ["--recompute-granularity", "full", "--recompute-method", "uniform"],
    "context": ["--context-parallel-size", "2"],
}
# The authors' numbers of GPUs.
AUTHORS = {
    "468m": ("--gpus", "16", "--json"),
    "1.2b": ("--gpus", "32", "--json"),
    "6.7b": ("--gpus", "128", "--json"),
}
SMALL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --vocab-size 250 "
    "--max-position-embeddings 64 --micro-batch-size 1 --global-batch-size 16 --lr 1e-3"
)
REFUSED = (
    ["--size", "468m", "--no-such-flag"],
    ["--size", "468m", "--gpus", "3"],
    ["--size", "468m", "--tensor-model-parallel-size", "3", "--gpus", "6"],
    ["--num-layers", "2"],
    ["--size", "468m", "--hybrid-layer-pattern", "*-*-"],
    ["--size", "468m", *EMO, "--mile-emo-cost", "/no.npy"],
    ["--size", "468m", "--num-layers", "0"],
    ["--size", "468m", "--num-layers", "1000000000000"],
    ["--size", "468m", "--hidden-size", "-1024"],
    ["--size", "468m", "--num-attention-heads", "0"],
    ["--size", "468m", "--vocab-size", "0"],
    ["--size", "468m", "--padded-vocab-size", "-128"],
    ["--size", "468m", "--seq-length", "0"],
    ["--size", "468m", "--train-iters", "-3"],
    [*SMALL.split(), "--train-iters", "0"],
    SMALL.split(),
    ["--size", "468m", "--mfu", "inf"],
    ["--size", "468m", "--mfu", "1.5"],
    ["--size", "468m", "--peak-tflops", "inf"],
    ["--size", "468m", "--gpu-memory", "nan"],
    ["--size", "468m", "--group-query-attention", "--num-query-groups", "3"],
)
# What a flag may be, and what it should not.
GOOD = {
    "--num-layers": ("1", "2", "6"),
    "--hidden-size": ("64", "1000000"),
    "--num-attention-heads": ("1", "4", "8"),
    "--ffn-hidden-size": ("1", "256"),
    "--kv-channels": ("16", "64"),
    "--num-query-groups": ("1", "2"),
    "--vocab-size": ("1", "250", "1000000000000"),
    "--padded-vocab-size": ("256",),
    "--make-vocab-size-divisible-by": ("1", "128"),
    "--seq-length": ("1", "64"),
    "--max-position-embeddings": ("64", "1000000000000"),
    "--micro-batch-size": ("1", "2"),
    "--global-batch-size": ("16", "1000000000000"),
    "--train-iters": ("1", "1000000000000"),
    "--tensor-model-parallel-size": ("1", "2"),
    "--pipeline-model-parallel-size": ("1", "2"),
    "--context-parallel-size": ("1", "2"),
    "--recompute-num-layers": ("1",),
    "--gpus": ("1", "8", "10000000"),
    "--gpu-memory": ("0.5", "80"),
    "--mfu": ("0.000001", "1"),
    "--peak-tflops": ("0.001", "989"),
}
BAD = (
    "0",
    "-1",
    "-0",
    "3",
    "1.5",
    "inf",
    "-inf",
    "nan",
    "1e400",
    "9" * 30,
    "9" * 5000,
    "",
    "x",
    "\n",
)


def counts(size: str, tp: int) -> dict[str, Any]:
    job = parse([*size_flags(size), "--tensor-model-parallel-size", str(tp)], 8)
    shard = build_shard(job)
    return {
        "parameters": count_parameters(shard, tp),
        "shard": sum(parameter.numel() for parameter in shard.parameters()),
        "formula": shard_parameters(job),
        "columns": job.padded_vocab_size,
        "devices": sorted({str(parameter.device) for parameter in shard.parameters()}),
    }


def variant(name: str, flags: list[str]) -> dict[str, float]:
    base = [*size_flags("6.7b"), "--recompute-num-layers", "1"]
    base = [word for word in base if name != "fp32" or word != "--bf16"]
    return memory(parse([*base, *flags], 16))._asdict()


def cost_rows(folder: Path) -> dict[str, dict[str, float]]:
    """EMO's memory at TP 1: estimated, and as the real objects hold it.

    With fixed matrices of width 64, of too many tokens for a table and not; and with the output
    layer's weight, which is not counted, in two dtypes.
    """
    from megatron_mile.emo import CostRows
    from megatron_mile.integration.cost_files import read_matrix
    from megatron_mile.integration.emo_rows import fixed_rows

    found = {}
    for words in (32000, 1000):
        path = folder / f"{words}.npy"
        np.save(path, np.random.default_rng(0).standard_normal((words, 64), dtype=np.float32))
        job = small_job("--bf16", "--mile-emo-cost", str(path), "--vocab-size", str(words))
        model = torch.nn.Linear(1, 1, dtype=job.params_dtype)
        model.vocab_size = job.padded_vocab_size
        with _named_ranks(1):
            cost = fixed_rows(read_matrix(str(path)), words, model)
        found[f"{words}"] = compared(job, cost, model.weight)
    for precision in ("--bf16", "--fp16"):
        job = small_job(precision)
        weight = torch.ones(job.padded_vocab_size, job.hidden_size, dtype=job.params_dtype)
        found[precision] = compared(job, CostRows(weight), weight)
    return found


def small_job(*flags: str) -> Any:
    base = [word for word in size_flags("468m") if word != "--bf16"]
    sizes = ("--micro-batch-size", "4", "--make-vocab-size-divisible-by", "8")
    return parse([*base, *EMO, *sizes, *flags], 1)


def compared(job: Any, cost: Any, weight: torch.Tensor) -> dict[str, float]:
    """The estimate beside the bytes of the tensors that the cost rows and the targets' hold."""
    targets = cost.fetch(torch.zeros(job.micro_batch_size * job.seq_length, dtype=torch.long))
    targets.products(slice(0, 1), None)
    holders = [vars(cost), vars(targets) if cost.table is None else {}]
    given = [x for x in tree_leaves(holders) if isinstance(x, torch.Tensor)]
    tensors = {x.data_ptr(): x for x in given}.values()  # the rows are in both
    return {
        "estimated": memory(job).cost_rows,
        "held": sum(x.nbytes for x in tensors if x.data_ptr() != weight.data_ptr()),
        "flops": cost_flops(job),
    }


def said(*words: str) -> tuple[str, str]:
    """What a command line of the tool prints, on stdout and on stderr."""
    streams = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        contextlib.suppress(SystemExit),
    ):
        estimate.main(words)
    return streams[0].getvalue(), streams[1].getvalue()


@st.composite
def jobs(draw: st.DrawFn) -> list[str]:
    """A good job with up to four flags changed."""
    flags = [
        *SMALL.split(),
        "--train-iters",
        "10",
        *draw(st.sampled_from(([], ["--swiglu", "--bf16"]))),
    ]
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.sampled_from([*GOOD]))
        flags += [flag, draw(st.one_of(st.sampled_from(GOOD[flag]), st.sampled_from(BAD)))]
    grouped = draw(st.sampled_from(([], ["--group-query-attention"])))
    return [*flags, *grouped, *draw(st.sampled_from(([], EMO)))]


def fuzz() -> dict[str, Any]:
    """Estimate many jobs: how many ended in figures and in one line, and what did in neither."""
    ended = {"figures": 0, "line": 0}

    # A failing job is short as it is, and making it shorter takes minutes.
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(jobs())
    def check(flags: list[str]) -> None:
        output, errors = said(*flags, "--json")
        if output:
            check_figures(json.loads(output, parse_constant=float))
            ended["figures"] += 1
            return
        *usage, line = errors.splitlines()
        assert line.startswith("tools/estimate.py: error: "), errors
        assert not usage or usage[0].startswith("usage: "), errors
        ended["line"] += 1

    try:
        check()
    except Exception:
        return {"failure": traceback.format_exc(limit=-3), **ended}
    return {"failure": "", **ended}


def check_figures(found: dict[str, Any]) -> None:
    """Fail on a figure that is infinite or negative, or is 0 and no part of the memory."""
    parts = found.pop("memory_gib")
    assert parts["total"] > 0
    assert all(0 <= size < math.inf for size in parts.values()), parts
    layouts = found.pop("layouts")
    for values in (found, found.pop("layout"), *layouts):
        numbers = [value for value in values.values() if isinstance(value, int | float)]
        assert all(0 < value < math.inf for value in numbers if value is not False), values


def remember_help() -> None:
    """Read the help texts in Megatron's sources once: for each parser, it is most of the time."""
    cpu_mode.enable()
    from megatron.training.argument_utils import ArgumentGroupFactory

    read, texts = ArgumentGroupFactory._get_field_docstrings, {}

    def remembered(self: Any, source: type) -> dict[str, str]:
        if source not in texts:
            texts[source] = read(self, source)
        return texts[source]

    ArgumentGroupFactory._get_field_docstrings = remembered


if __name__ == "__main__":
    logging.getLogger("megatron").setLevel(logging.ERROR)
    remember_help()
    output = Path(sys.argv[1])
    found = {size: json.loads(said("--size", size, *AUTHORS[size])[0]) for size in SIZES}
    figures = {
        "counts": {size: {tp: counts(size, tp) for tp in (1, 2, 4, 8)} for size in SIZES},
        "variants": {name: variant(name, flags) for name, flags in VARIANTS.items()},
        "json": found,
        "emo": json.loads(said("--size", "6.7b", *AUTHORS["6.7b"], *EMO)[0]),
        "cost rows": cost_rows(output.parent),
        "table": estimate.report(found["468m"]),
        "refused": [said(*words)[1] for words in REFUSED],
        "fuzz": fuzz(),
    }
    output.write_text(json.dumps(figures))
