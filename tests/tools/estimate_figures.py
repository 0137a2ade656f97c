"""Counts and estimates for the size scripts, in one process, printed as JSON for test_estimate.py.

CPU mode is for the life of a process and comes before the first import of Megatron, so it cannot
be the tests' own process.
"""

import contextlib
import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import estimate
from _footprint import memory, shard_parameters
from _job import SIZES, build_shard, count_parameters, parse, size_flags

# More of the same flags, to see each branch of the memory estimate.
VARIANTS = {
    "fp32": ["--mile-objective", "ce"],
    "host's loss": ["--mile-objective", "none"],
    "fused": ["--mile-fused-linear"],
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
REFUSED = (
    ["--size", "468m", "--no-such-flag"],
    ["--size", "468m", "--gpus", "3"],
    ["--size", "468m", "--tensor-model-parallel-size", "3", "--gpus", "6"],
    ["--num-layers", "2"],
    ["--size", "468m", "--hybrid-layer-pattern", "*-*-"],
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


if __name__ == "__main__":
    logging.getLogger("megatron").setLevel(logging.ERROR)
    figures = {
        "counts": {size: {tp: counts(size, tp) for tp in (1, 2, 4, 8)} for size in SIZES},
        "variants": {name: variant(name, flags) for name, flags in VARIANTS.items()},
        "json": {size: json.loads(said("--size", size, *AUTHORS[size])[0]) for size in SIZES},
        "table": said("--size", "468m", "--gpus", "16")[0],
        "refused": [said(*words)[1] for words in REFUSED],
    }
    Path(sys.argv[1]).write_text(json.dumps(figures))
