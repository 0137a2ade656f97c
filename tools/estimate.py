r"""Estimates a training job before it runs: parameters, memory, steps, compute, GPU-hours, layouts.

    python tools/estimate.py --size 6.7b --gpus 128
    TP=4 OBJECTIVE=none python tools/estimate.py --size 6.7b --recompute-granularity selective
    python tools/estimate.py --gpus 8 --num-layers 12 --hidden-size 768 ...   (flags of Megatron)

--size takes the flags that examples/sizes/SIZE.sh would start a job with, under the same
environment variables; all other flags are Megatron's and win over them. Parameters are counted on
Megatron's own model; FLOPs and the memory of weights and activations are by Megatron's own formulas
(for flash attention, without what CUDA, NCCL and the allocator need). GPU-hours are FLOPs at the
stated share of the stated peak. EMO's product with its cost rows and what it keeps of them are
counted. Nothing here was measured on a GPU.

The JSON: `size`, `parameters`, `gpus`, `layout` (`tp`, `pp`, `cp`, `dp`, `micro_batch`,
`micro_batches`), `tokens_per_step`, `steps`, `tokens`, `flops_per_step`, `flops`, `mfu`,
`peak_tflops`, `gpu_hours`, `hours`, `memory_gib` (`weights`, `gradients`, `optimizer`,
`activations`, `logits`, `cost_rows`, `total`), `gpu_memory_gib`, `layouts` (a list of `tp`, `pp`,
`dp`, `micro_batches`, `total_gib`, `fits`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.common.cli import ToolError, UsageError, new_parser, run_tool
from tools.common.megatron import megatron_module
from tools.estimation.footprint import Memory, cost_flops, memory, micro_batches
from tools.estimation.job import SIZES, build_shard, count_parameters, parse, refusals, size_flags

PROG = "tools/estimate.py"
SIZES_OF_A_GROUP = (1, 2, 4, 8)
# What is left is for CUDA, NCCL, the allocator, and errors of the estimate.
USABLE = 0.9
GIB = 2**30
# Of the tool's own flags: with these, no figure is 0 or infinite.
_RANGES = {
    "gpus": (1, 1e7),
    "gpu_memory": (1e-3, 1e6),
    "mfu": (1e-6, 1),
    "peak_tflops": (1e-3, 1e9),
}


def estimation(args: argparse.Namespace) -> dict[str, Any]:
    """Estimate a job.

    Args:
        args: parsed flags; `flags` are the job's, Megatron's.

    Returns:
        What --json prints.

    Raises:
        ToolError: the flags make no job.
    """
    flags = [*(size_flags(args.size) if args.size else ()), *args.flags]
    job = parse(flags, args.gpus)
    with refusals(args.gpus):
        parameters = count_parameters(build_shard(job), job.tensor_model_parallel_size)
    return {
        "size": args.size,
        "parameters": parameters,
        "gpus": args.gpus,
        "layout": _layout(job, cp=job.context_parallel_size, micro_batch=job.micro_batch_size),
        **_work(job, args),
        "memory_gib": _in_gib(memory(job)),
        "gpu_memory_gib": args.gpu_memory,
        "layouts": list(_layouts(flags, args.gpus, args.gpu_memory)),
    }


def _layout(job: argparse.Namespace, **more: Any) -> dict[str, Any]:
    return {
        "tp": job.tensor_model_parallel_size,
        "pp": job.pipeline_model_parallel_size,
        **more,
        "dp": job.data_parallel_size,
        "micro_batches": micro_batches(job),
    }


def _work(job: argparse.Namespace, args: argparse.Namespace) -> dict[str, Any]:
    """Count tokens, FLOPs and hours.

    Raises:
        ToolError: the job has no step.
    """
    count = megatron_module("megatron.training.training").num_floating_point_operations
    tokens = job.global_batch_size * job.seq_length
    steps = job.train_iters or (job.train_samples or 0) // job.global_batch_size
    if not steps:
        raise ToolError(
            f"no step to estimate: give --train-iters, or --train-samples of at least "
            f"{job.global_batch_size}, the global batch"
        )
    flops = count(job, job.global_batch_size) + cost_flops(job)
    gpu_hours = flops * steps / (args.mfu * args.peak_tflops * 1e12) / 3600
    return {
        "tokens_per_step": tokens,
        "steps": steps,
        "tokens": tokens * steps,
        "flops_per_step": flops,
        "flops": flops * steps,
        "mfu": args.mfu,
        "peak_tflops": args.peak_tflops,
        "gpu_hours": gpu_hours,
        "hours": gpu_hours / args.gpus,
    }


def _in_gib(used: Memory) -> dict[str, float]:
    parts = {name: size / GIB for name, size in used._asdict().items()}
    return {**parts, "total": used.total / GIB}


def _layouts(flags: Sequence[str], gpus: int, gpu_memory: float) -> Iterator[dict[str, Any]]:
    """Estimate the job at each tensor and pipeline parallel size that Megatron takes."""
    for tp, pp in itertools.product(SIZES_OF_A_GROUP, repeat=2):
        sizes = f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}"
        try:
            job = parse([*flags, *sizes.split()], gpus)
        except ToolError:
            continue
        total = memory(job).total / GIB
        yield {**_layout(job), "total_gib": total, "fits": total <= USABLE * gpu_memory}


def report(result: dict[str, Any]) -> str:
    """Lay the estimate out for people."""
    job = result["layout"]
    parts = result["memory_gib"]
    name = f"{result['size']}: " if result["size"] else ""
    layout = f"TP {job['tp']}, PP {job['pp']}, CP {job['cp']}, DP {job['dp']}"
    return "\n".join(
        [
            f"{name}{result['parameters'] / 1e6:,.1f}M parameters",
            f"schedule  {result['tokens_per_step']:,} tokens a step, {result['steps']:,} steps, "
            f"{result['tokens'] / 1e9:,.2f}B tokens",
            f"compute   {result['flops_per_step']:.3g} FLOPs a step, {result['flops']:.3g} in all: "
            f"{result['gpu_hours']:,.0f} GPU-hours, {result['hours']:,.1f} h on {result['gpus']} "
            f"GPUs,",
            f"          at {result['mfu']:.0%} of {result['peak_tflops']:g} TFLOP/s",
            f"layout    {layout}; micro-batch {job['micro_batch']}, {job['micro_batches']} a step",
            "",
            "GiB on the fullest GPU",
            "".join(f"{part:>13}" for part in parts),
            "".join(f"{size:13.2f}" for size in parts.values()),
            "",
            f"layouts on {result['gpus']} GPUs of {result['gpu_memory_gib']:g} GiB "
            f"(it fits when at most {USABLE:.0%} are used)",
            *_layout_rows(result["layouts"]),
        ]
    )


def _layout_rows(layouts: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"{'TP':>4}{'PP':>4}{'DP':>6}{'micro-batches':>15}{'GiB':>9}  fits"
    for row in layouts:
        yield (
            f"{row['tp']:>4}{row['pp']:>4}{row['dp']:>6}{row['micro_batches']:>15}"
            f"{row['total_gib']:>9.1f}  {'yes' if row['fits'] else 'no'}"
        )


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the tool's own flags."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, help="script below examples/sizes (default: none)")
    add("--gpus", type=int, default=8, help="GPUs of the job (default: %(default)s)")
    add("--gpu-memory", type=float, default=80, help="GiB of a GPU (default: %(default)s)")
    add("--mfu", type=float, default=0.4, help="share of the peak reached (default: %(default)s)")
    add(
        "--peak-tflops",
        type=float,
        default=989,
        help="peak of a GPU, TFLOP/s (default: %(default)s, an H100 SXM in dense bf16)",
    )
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of which no estimate can be made.

    Raises:
        UsageError: there is no job, or a number is out of its range.
    """
    if not (args.size or args.flags):
        raise UsageError("give --size or the flags of a Megatron job")
    for name, (least, most) in _RANGES.items():
        if not least <= getattr(args, name) <= most:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} {getattr(args, name)}: expected a number from {least:g} to {most:g}"
            )


def estimate(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags; `flags` are the job's.

    Raises:
        ToolError: the flags make no job.
    """
    check_flags(args)
    result = estimation(args)
    print(json.dumps(result, indent=2) if args.json else report(result))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), estimate, argv, others="flags")


if __name__ == "__main__":
    main()
