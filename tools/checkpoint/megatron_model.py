"""Builds the model of a Megatron checkpoint in one process, whatever layout trained it.

Megatron's torch_dist checkpoints hold every tensor whole, so one process can read what any number
of tensor- and pipeline-parallel ranks wrote. What Megatron unpickles without a limit is read by the
rules of `Checkpoint` first.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mile.integration.checkpoint_folder import (
    LAST_FILE,
    TRACKER,
    iteration_name,
    latest_name,
)
from megatron_mile.integration.torch_dist import cause_of
from tools.checkpoint.torch_dist import Checkpoint
from tools.common.cli import ToolError
from tools.common.megatron import megatron_module, silence_megatron

# One process, plain PyTorch layers: settings of the training run that do not hold here.
_SINGLE_PROCESS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "data_parallel_size": 1,
    "world_size": 1,
    "rank": 0,
    "recompute_granularity": None,
    "gradient_accumulation_fusion": False,
}


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and the run that trained it."""

    model: Any
    """Takes (tokens, position_ids, attention_mask, labels), each [b, s]; gives the loss [b, s]."""
    args: argparse.Namespace
    """Megatron's arguments of the training run."""
    iteration: int
    device: torch.device


def checkpoint_folder(load: str | Path, step: int | None = None) -> Path:
    """Find the folder of one iteration below what --load names.

    Args:
        load: a run's checkpoint folder, or the folder of one iteration.
        step: iteration; None for the latest.

    Raises:
        ToolError: there is no checkpoint.
    """
    load = Path(load)
    if step is None and (load / LAST_FILE).is_file():
        return load
    try:
        name = latest_name(load) if step is None else iteration_name(step)
    except FileNotFoundError:
        raise ToolError(f"no Megatron checkpoint in {load}: {TRACKER} is missing") from None
    except ValueError:
        raise ToolError(f"{load / TRACKER}: expected the number of an iteration") from None
    if not (load / name / LAST_FILE).is_file():
        raise ToolError(f"no torch_dist checkpoint at {load / name}: no {LAST_FILE}")
    return load / name


def choose_device(cpu: bool) -> torch.device:
    """Decide where to run, and prepare Megatron for it; call it before megatron is imported.

    Args:
        cpu: run on the CPU even where there is a GPU.
    """
    if not cpu and torch.cuda.is_available():
        return torch.device("cuda")
    from megatron_mile.cpu_mode import enable
    from megatron_mile.cpu_mode.hybrid_layers import use_local_layers

    silence_megatron()
    enable()
    use_local_layers()
    return torch.device("cpu")


def load_model(folder: Path, device: torch.device) -> LoadedModel:
    """Build the model of a checkpoint and read its weights.

    Args:
        folder: what `checkpoint_folder` returned.
        device: what `choose_device` returned.

    Raises:
        ToolError: the checkpoint is damaged or of another kind of model.
    """
    serialization = megatron_module("megatron.core.dist_checkpointing.serialization")
    checkpoint = Checkpoint(folder)
    common = checkpoint.common()
    checkpoint.check_objects()
    checkpoint.check_weights()
    args = _single_process_args(common["args"], device.type == "cpu")
    _start_process_group(args)
    try:
        model = _build(args)
    except Exception as error:  # each setting is checked in a place of its own, and not always
        reason = f"{type(error).__name__}: {error}"
        raise ToolError(
            f"{folder}: Megatron builds no model from its stored arguments ({reason})"
        ) from error
    _check_all_used(checkpoint, model)
    state = model.sharded_state_dict()
    try:
        model.load_state_dict(serialization.load({"model": state}, str(folder))["model"])
    except (Exception, CheckpointException) as error:
        raise ToolError(
            f"{folder}: the weights do not fit the model ({cause_of(error)})"
        ) from error
    return LoadedModel(model.to(device).eval(), args, int(common["iteration"]), device)


def _check_all_used(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse a model that leaves weights of the checkpoint out: it is another one."""
    state = model.sharded_state_dict()
    # Some weights are stored in parts, whose keys only these factories know.
    megatron_module("megatron.core.dist_checkpointing.mapping").apply_factories(state)
    parts = megatron_module("megatron.core.dist_checkpointing.dict_utils").nested_values(state)
    if left_out := checkpoint.weights.keys() - {part.key for part in parts}:
        raise ToolError(
            f"{checkpoint.folder}: holds {min(left_out)}, which the model of its stored arguments "
            "does not have; take another checkpoint"
        )


def _single_process_args(trained: argparse.Namespace, on_cpu: bool) -> argparse.Namespace:
    args = argparse.Namespace(**{**vars(trained), **_SINGLE_PROCESS})
    if on_cpu or importlib.util.find_spec("transformer_engine") is None:
        args.transformer_impl = "local"
        args.masked_softmax_fusion = args.bias_dropout_fusion = False
        args.apply_rope_fusion = False
        args.no_persist_layer_norm = True
        args.bias_swiglu_fusion = args.bias_gelu_fusion = False
    args.use_cpu_initialization = on_cpu
    args.distributed_backend = "gloo" if on_cpu else "nccl"
    return args


def _start_process_group(args: argparse.Namespace) -> None:
    """Make the process group of one, over a file instead of a port."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = torch.distributed.FileStore(os.path.join(folder, "store"), 1)
    torch.distributed.init_process_group(
        args.distributed_backend, store=store, rank=0, world_size=1
    )
    megatron_module("megatron.core.parallel_state").initialize_model_parallel()
    seed = megatron_module("megatron.core.tensor_parallel.random").model_parallel_cuda_manual_seed
    seed(args.seed)
    megatron_module("megatron.training.global_vars").set_args(args)


def _build(args: argparse.Namespace) -> Any:
    utils = megatron_module("megatron.training.argument_utils")
    hybrid = getattr(args, "hybrid_layer_pattern", None)
    config = (utils.hybrid_config_from_args if hybrid else utils.gpt_config_from_args)(args)
    groups = megatron_module("megatron.core.process_groups_config").ProcessGroupCollection
    builder = config.get_builder_cls()(config)
    model = builder.build_model(
        groups.use_mpu_process_groups(), pre_process=True, post_process=True
    )
    return model.to(args.params_dtype)
