"""Builds the model of a Megatron checkpoint in one process, whatever layout trained it.

Megatron's torch_dist checkpoints hold every tensor whole, so one process can read what any number
of tensor- and pipeline-parallel ranks wrote. Nothing is unpickled beyond what torch's
`weights_only` loading and Megatron's list of safe classes allow.
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
from _cli import ToolError
from _megatron import megatron_module

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
    folder: Path
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
    if step is None and (load / "metadata.json").is_file():
        return load
    tracker = load / "latest_checkpointed_iteration.txt"
    try:
        name = f"iter_{step if step is not None else int(tracker.read_text()):07d}"
    except FileNotFoundError:
        raise ToolError(f"no Megatron checkpoint in {load}: {tracker.name} is missing") from None
    except ValueError:
        raise ToolError(f"{tracker}: expected the number of an iteration") from None
    if not (load / name / "metadata.json").is_file():
        raise ToolError(f"no torch_dist checkpoint at {load / name}")
    return load / name


def choose_device(cpu: bool) -> torch.device:
    """Decide where to run, and prepare Megatron for it; call it before megatron is imported.

    Args:
        cpu: run on the CPU even where there is a GPU.
    """
    if not cpu and torch.cuda.is_available():
        return torch.device("cuda")
    from megatron_mile.integration.cpu import enable

    enable()
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
    try:
        common = serialization.load_common_state_dict(str(folder))
    except Exception as error:  # torch, zip and Megatron raise their own kinds
        raise ToolError(f"{folder}: cannot be read ({error})") from error
    if "args" not in common:
        raise ToolError(f"{folder}: holds no training arguments; expected a megatron.training run")
    args = _single_process_args(common["args"], device.type == "cpu")
    _start_process_group(args)
    model = _build(args)
    state = model.sharded_state_dict()
    try:
        model.load_state_dict(serialization.load({"model": state}, str(folder))["model"])
    except Exception as error:
        raise ToolError(f"{folder}: the weights do not fit the model ({error})") from error
    return LoadedModel(model.to(device).eval(), args, int(common["iteration"]), folder, device)


def _single_process_args(trained: argparse.Namespace, on_cpu: bool) -> argparse.Namespace:
    args = argparse.Namespace(**{**vars(trained), **_SINGLE_PROCESS})
    if on_cpu or importlib.util.find_spec("transformer_engine") is None:
        args.transformer_impl = "local"
        args.masked_softmax_fusion = args.bias_dropout_fusion = False
        args.apply_rope_fusion = args.persist_layer_norm = False
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
    config = megatron_module("megatron.training.argument_utils").gpt_config_from_args(args)
    groups = megatron_module("megatron.core.process_groups_config").ProcessGroupCollection
    builder = config.get_builder_cls()(config)
    model = builder.build_model(
        groups.use_mpu_process_groups(), pre_process=True, post_process=True
    )
    return model.to(args.params_dtype)
