"""A training job as Megatron sees it: its flags, parsed and validated, and its model counted.

Everything is Megatron's own: the parser, the checks, and the model, which is built on torch's meta
device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.common.cli import ToolError
from tools.common.megatron import megatron_module, silence_megatron

_SIZES = Path(__file__).resolve().parents[2] / "examples" / "sizes"
SIZES = tuple(sorted(path.stem for path in _SIZES.glob("*.sh")))
# What the scripts check although no estimate needs it; with data there is no vocabulary size.
_IGNORED_VARIABLES = ("DATA_PATH", "MEGATRON_LM_DIR", "NNODES")
# Sizes and counts that an estimate is made of, and the largest: up to there Megatron builds its
# model in seconds, and every figure is finite.
_LARGEST = {
    **dict.fromkeys(("num_layers", "recompute_num_layers", "tensor_model_parallel_size"), 1024),
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "kv_channels"), 10**6),
    **dict.fromkeys(("num_attention_heads", "num_query_groups"), 10**6),
    **dict.fromkeys(
        (
            *("vocab_size", "padded_vocab_size", "make_vocab_size_divisible_by", "seq_length"),
            *("max_position_embeddings", "micro_batch_size", "global_batch_size", "train_iters"),
            *("train_samples", "pipeline_model_parallel_size", "context_parallel_size"),
            "expert_model_parallel_size",
        ),
        10**12,
    ),
}
# Every rank of the other kinds of parallelism holds the same parameters, or a part of them.
_TENSOR_PARALLEL_ONLY = {
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "sequence_parallel": False,
}


def size_flags(size: str) -> list[str]:
    """Ask the script of a size for the flags that it would give to Megatron.

    Args:
        size: one of `SIZES`; TP, PP, CP, MICRO_BATCH, OBJECTIVE of the environment count.

    Raises:
        ToolError: the script fails.
    """
    env = {name: os.environ[name] for name in os.environ if name not in _IGNORED_VARIABLES}
    script = ["bash", str(_SIZES / f"{size}.sh"), "--dry-run"]
    result = subprocess.run(script, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ToolError(f"examples/sizes/{size}.sh: {result.stderr.strip()}")
    words = shlex.split(result.stdout)
    start = next(i for i, word in enumerate(words) if word.endswith("/pretrain_gpt.py"))
    return words[start + 1 :]


def parse(flags: Sequence[str], ranks: int) -> argparse.Namespace:
    """Parse and validate a job's flags as Megatron does on so many ranks.

    Args:
        flags: Megatron's and --mile flags. Those that a machine without a GPU needs are added;
            none of them changes an estimate.
        ranks: the job's world size.

    Returns:
        Megatron's arguments, with `padded_vocab_size` set.

    Raises:
        ToolError: Megatron refuses them; the message is Megatron's.
    """
    from megatron_mile import cpu_mode
    from megatron_mile.integration import arguments

    silence_megatron()
    cpu_mode.enable()
    megatron = megatron_module("megatron.training.arguments")
    pad = megatron_module("megatron.training.vocab_utils").calculate_padded_vocab_size
    said = io.StringIO()
    try:
        with _command_line([*flags, *cpu_mode.missing_flags(flags)], ranks, said), refusals(ranks):
            args = megatron.parse_args(arguments.add_arguments)
            _check_sizes(args)
            megatron.validate_args(args)
            _check_sizes(args)  # some are set there
            _check(args)
    except SystemExit:
        message = said.getvalue().partition("error: ")[2].strip()
        raise ToolError(f"flags: {message}; see examples/pretrain_gpt.py --help") from None
    if args.padded_vocab_size is None:
        args.padded_vocab_size = pad(
            args.vocab_size,
            args.make_vocab_size_divisible_by,
            args.tensor_model_parallel_size,
            False,
        )
    return args


@contextlib.contextmanager
def refusals(ranks: int) -> Iterator[None]:
    """Turn what Megatron raises about flags into a `ToolError`; it has errors of every kind."""
    try:
        yield
    except ToolError:
        raise
    except Exception as error:
        # Some of Megatron's assertions have no message.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ToolError(f"Megatron refuses these flags on {ranks} GPUs: {reason}") from error


@contextlib.contextmanager
def _command_line(flags: list[str], ranks: int, output: io.StringIO) -> Iterator[None]:
    """Let this process look like rank 0 of a job, and keep what it prints."""
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [argv[0], *flags]
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks))
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)


def _check_sizes(args: argparse.Namespace) -> None:
    """Refuse sizes of nothing, which Megatron takes or fails at, and such as no job has.

    Raises:
        ToolError: the flag is named.
    """
    for name, largest in _LARGEST.items():
        if (value := getattr(args, name, None)) is not None and not 1 <= value <= largest:
            flag = "--" + name.replace("_", "-")
            raise ToolError(f"{flag} {value}: expected a whole number from 1 to {largest}")


def _check(args: argparse.Namespace) -> None:
    """Refuse what Megatron finds out after parsing, and what has no estimate.

    Raises:
        ValueError: the flags do not fit together.
    """
    if args.hybrid_layer_pattern or args.num_experts:
        raise ValueError("only dense GPT models can be estimated")
    if args.vocab_size is None and args.padded_vocab_size is None:
        raise ValueError("--vocab-size is missing")
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.num_attention_heads % groups:
        raise ValueError(
            f"{args.num_attention_heads} attention heads are no multiple of {groups} query groups"
        )
    if args.num_attention_heads % args.tensor_model_parallel_size:
        raise ValueError(
            f"{args.num_attention_heads} attention heads are no multiple of tensor parallel size "
            f"{args.tensor_model_parallel_size}"
        )


def build_shard(args: argparse.Namespace) -> Any:
    """Build what one tensor parallel rank holds of the whole model, on the meta device.

    Args:
        args: what `parse` returned; other kinds of parallelism are left out.

    Returns:
        A GPTModel of meta tensors.
    """
    args = argparse.Namespace(**{**vars(args), **_TENSOR_PARALLEL_ONLY})
    config = megatron_module("megatron.training.argument_utils").gpt_config_from_args(args)
    groups = megatron_module("megatron.core.process_groups_config").ProcessGroupCollection
    with _named_ranks(args.tensor_model_parallel_size), torch.device("meta"):
        builder = config.get_builder_cls()(config)
        return builder.build_model(
            groups.use_mpu_process_groups(), pre_process=True, post_process=True
        )


@contextlib.contextmanager
def _named_ranks(size: int) -> Iterator[None]:
    """Be rank 0 of a tensor parallel group whose other ranks exist in name only."""
    state = megatron_module("megatron.core.parallel_state")
    random = megatron_module("megatron.core.tensor_parallel.random")
    torch.distributed.init_process_group("fake", rank=0, world_size=size)
    try:
        state.initialize_model_parallel(size, create_gloo_process_groups=False)
        random.model_parallel_cuda_manual_seed(0)
        yield
    finally:
        state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def count_parameters(shard: Any, tensor_parallel: int) -> int:
    """Count the parameters of the whole model from one shard: sharded ones on all its ranks."""
    return sum(
        parameter.numel()
        * (tensor_parallel if getattr(parameter, "tensor_model_parallel", False) else 1)
        for parameter in shard.parameters()
    )
