"""What is asked of a built Megatron model: the module inside its wrappers, its process groups."""

from __future__ import annotations

from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration import versions
from megatron_mile.parallel import ProcessGroup


def unwrap(model: Any) -> Any:
    """The model inside DDP and precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def device_of(model: Any) -> torch.device:
    """Where a model's weights are; a pipeline stage may have none, and computes no loss then."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def installed_config(function: Any) -> ObjectiveConfig | None:
    """The objective of a function that is our hook, else None."""
    return getattr(function, "__megatron_mile__", None)


def tp_group(model: Any) -> ProcessGroup:
    """The tensor-parallel group that shares the vocabulary of this model, wrapped or not."""
    from megatron.core import parallel_state

    group = _own_group(model, "tp")
    return parallel_state.get_tensor_model_parallel_group() if group is None else group


def data_group(model: Any) -> ProcessGroup | None:
    """The DP x CP group over which Megatron averages the losses of this model; None if alone.

    Raises:
        MileError: There are other ranks, but no such group.
    """
    from megatron.core import parallel_state

    group = _own_group(model, "dp_cp")
    if group is None and parallel_state.model_parallel_is_initialized():
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if group is None and distributed:
        raise MileError(
            "a sum over ranks needs the data-parallel group, and neither the model's "
            "pg_collection.dp_cp nor parallel_state has one; set it up, or use normalize local or "
            "none"
        )
    return group


def _own_group(model: Any, name: str) -> ProcessGroup | None:
    """The group that the model itself was built with, if this Megatron lets it have any."""
    collections = (getattr(unwrap(model), held, None) for held in versions.GROUP_COLLECTIONS)
    groups = (getattr(collection, name, None) for collection in collections)
    return next((group for group in groups if group is not None), None)


def check_shard(
    model: Any, labels: torch.Tensor, logits: tuple[int, ...], group: ProcessGroup
) -> None:
    """Raise unless logits are [s, b, V/tp] of labels [b, s] and the model's padded vocabulary."""
    if len(logits) != 3 or logits[:2] != labels.shape[::-1]:
        raise MileError(
            f"logits are {logits} and labels {tuple(labels.shape)}; expected [s, b, V/tp] and "
            "[b, s]"
        )
    vocabulary = getattr(model, "vocab_size", None)
    if vocabulary is not None and logits[2] * group.size() != vocabulary:
        raise MileError(
            f"a logits shard of {logits[2]} columns on each of {group.size()} "
            f"tensor-parallel ranks does not make the padded vocabulary of {vocabulary}; build "
            "the model with parallel_output=True and a vocabulary padded to a multiple of TP"
        )


def check_vocab_size(model: Any, vocab_size: int | None) -> None:
    """Raise if a tokenizer's size is given and not within the model's vocabulary."""
    if vocab_size is None:
        return
    padded = getattr(model, "vocab_size", vocab_size)
    if not 1 <= vocab_size <= padded:
        raise MileError(
            f"vocab_size is {vocab_size}, but the model has {padded} columns; expected the "
            "tokenizer's size, from 1 to that"
        )


def logits_are_read(model: Any) -> bool:
    """Whether somebody has hooked the output layer, and may read its logits after the loss."""
    layer: Any = getattr(model, "output_layer", None)
    everywhere = torch.nn.modules.module._global_forward_hooks
    return bool(getattr(layer, "_forward_hooks", None) or everywhere)


def mtp_heads(model: Any, ran: bool | None) -> int:
    """How many multi-token-prediction losses come before the main one in a forward.

    GPTModel computes them on the last stage wherever its MTP layers are. HybridModel computes them
    only where they are, and from 0.20 only in a forward that runs them: `compute_mtp_loss` may be
    False (`_postprocess` and `forward` of 0.19.2, and of Megatron-LM's main in August 2026).

    Args:
        model: Unwrapped, on the last pipeline stage.
        ran: Whether its MTP layers have run in this forward; None if nobody looked.
    """
    is_gpt = "GPTModel" in {base.__name__ for base in type(model).__mro__}
    here = getattr(model, "mtp_process", False) if ran is None else ran
    return (model.config.mtp_num_layers or 0) if here or is_gpt else 0
