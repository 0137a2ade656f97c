"""How much memory a rank of a training job needs, part by part, by Megatron's formulas.

Megatron's formulas (`megatron.training.theoretical_memory_usage`) are for bf16, attention that
keeps no score matrix (flash attention), and the fullest pipeline stage. Taken from them: the
parameters of that stage and the activations of its layers. Added here: the parts they do not tell
apart, fp32, the second half of a gated MLP, recomputation of whole layers, logits with loss, and
what the cost matrix of EMO needs. Not counted: what CUDA, NCCL and the allocator need for
themselves.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import torch

from megatron_mile.integration.arguments import OUTPUT_LAYER
from megatron_mile.integration.cost_files import read_matrix
from megatron_mile.integration.emo_rows import TABLE_BYTES
from megatron_mile.linear import block_tokens
from megatron_mile.objectives import NEED_COST
from tools.common.cli import ToolError, library_errors
from tools.common.megatron import megatron_module

# Of Megatron's formula without the distributed optimizer.
_BYTES_A_PARAMETER = 18


class Memory(NamedTuple):
    """Bytes on the fullest rank, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    """Logits, their gradient, and what the loss adds."""
    cost_rows: float
    """What EMO keeps of its cost matrix, and the rows of a micro-batch's targets."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self)


def memory(args: argparse.Namespace) -> Memory:
    """Estimate the memory of the rank that needs the most.

    Args:
        args: what `job.parse` returned.

    Raises:
        ToolError: recomputation by another method than uniform, or a cost matrix that cannot be
            read.
    """
    weights, gradients, optimizer = (shard_parameters(args) * size for size in _state_bytes(args))
    first, loss = _activations(args), (_logits(args), _cost_rows(args))
    if args.pipeline_model_parallel_size == 1:
        return Memory(weights, gradients, optimizer, first, *loss)
    # The first stage keeps a micro-batch for each stage behind it; the last one has the logits.
    last = first / min(args.pipeline_model_parallel_size, micro_batches(args))
    stages = (first, 0.0, 0.0), (last, *loss)
    return Memory(weights, gradients, optimizer, *max(stages, key=sum))


def micro_batches(args: argparse.Namespace) -> int:
    """Micro-batches of a step on one rank."""
    return int(args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))


def shard_parameters(args: argparse.Namespace) -> float:
    """Parameters on the fullest rank, by Megatron's formula."""
    changes = {"use_distributed_optimizer": False}
    return _formula("compute_weight_and_optimizer_memory", args, changes) / _BYTES_A_PARAMETER


def _state_bytes(args: argparse.Namespace) -> tuple[float, float, float]:
    """Bytes for each parameter: weights, gradients, optimizer."""
    weight = torch.finfo(args.params_dtype).bits // 8
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else weight
    # Adam's two moments, and in low precision the weights in fp32.
    optimizer = 8.0 if weight == 4 else 12.0
    if args.use_distributed_optimizer:
        optimizer /= args.data_parallel_size * args.context_parallel_size
    return weight, gradient, optimizer


def _activations(args: argparse.Namespace) -> float:
    """Bytes that the layers of the first stage keep for the backward pass."""
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    changes = {
        "padded_vocab_size": 0,  # the logits are a part of their own
        "seq_length": args.seq_length // cp,
        # Megatron counts the MLP's middle before and after its activation; a gate is a third.
        "ffn_hidden_size": args.ffn_hidden_size * (1.5 if args.swiglu else 1),
    }
    split = args.sequence_parallel or tp == 1
    name = "compute_activation_memory" + ("" if split else "_without_sp")
    element = torch.finfo(args.params_dtype).bits / 16  # the formulas are for 2 bytes
    if args.recompute_granularity != "full":
        return element * _formula(name, args, changes, micro_batches(args))
    if args.recompute_method != "uniform":
        raise ToolError("--recompute-method: only uniform can be estimated")
    span = args.recompute_num_layers
    running = _formula(name, args, {**changes, "num_layers": span}, micro_batches(args))
    kept = 2 * changes["seq_length"] * args.micro_batch_size * args.hidden_size
    kept *= args.num_layers // span / (tp if args.sequence_parallel else 1)
    return element * (running + kept)


def _logits(args: argparse.Namespace) -> float:
    """Bytes of the logits and of what the loss makes of them at its peak.

    Megatron's loss makes an fp32 copy of bf16 logits and from it their gradient; ours writes the
    gradient over the logits, but not EMO's (`extra_mib` in tools/bench/results.csv).
    """
    tokens, size = _tokens(args), args.params_dtype.itemsize
    columns = args.padded_vocab_size // args.tensor_model_parallel_size
    if args.mile_objective == "none":
        size = 4 if size == 4 else 4 + size
    elif _needs_cost(args):
        size *= 2
    elif args.mile_fused_linear:
        tokens = min(tokens, block_tokens(columns, size, torch.device("cuda")))
    return tokens * columns * size


def _tokens(args: argparse.Namespace) -> int:
    """Tokens of a micro-batch on one rank."""
    return int(args.micro_batch_size * args.seq_length // args.context_parallel_size)


def _cost_rows(args: argparse.Namespace) -> float:
    """Bytes that EMO needs beside the logits.

    An fp32 scale for each cost row of the shard, and the rows themselves if they are a fixed
    matrix's. Then the products of all rows where they have room; else the rows of the targets, and
    in fp16 a copy of the shard's.
    """
    if not _needs_cost(args):
        return 0
    row = _cost_width(args) * args.params_dtype.itemsize
    table = _table(args)
    copies = _is_fixed(args) + (args.params_dtype == torch.float16 and not table)
    kept = args.padded_vocab_size / args.tensor_model_parallel_size * (4 + row * copies)
    return kept + (table or _tokens(args) * row)


def cost_flops(args: argparse.Namespace) -> int:
    """FLOPs of a step for EMO's product of target and cost rows; 0 where a table has it.

    Raises:
        ToolError: the cost matrix cannot be read.
    """
    if not _needs_cost(args) or _table(args):
        return 0
    tokens = args.global_batch_size * args.seq_length
    return int(2 * tokens * args.padded_vocab_size * _cost_width(args))


def _needs_cost(args: argparse.Namespace) -> bool:
    return args.mile_objective in NEED_COST


def _is_fixed(args: argparse.Namespace) -> bool:
    return bool(args.mile_emo_cost != OUTPUT_LAYER)


def _table(args: argparse.Namespace) -> int:
    """Bytes of the table of all products; 0 if there is none."""
    shard = args.padded_vocab_size // args.tensor_model_parallel_size
    table = args.padded_vocab_size * shard * args.params_dtype.itemsize
    return table if _is_fixed(args) and table <= TABLE_BYTES else 0


def _cost_width(args: argparse.Namespace) -> int:
    return _matrix_width(args.mile_emo_cost) if _is_fixed(args) else args.hidden_size


@functools.cache
def _matrix_width(path: str) -> int:
    with library_errors():
        return read_matrix(path).size(1)


def _formula(name: str, args: argparse.Namespace, changes: dict[str, Any], *more: Any) -> float:
    """Evaluate one of Megatron's formulas, in bytes, for changed arguments."""
    module = megatron_module("megatron.training.theoretical_memory_usage")
    return float(getattr(module, name)(argparse.Namespace(**{**vars(args), **changes}), *more))
