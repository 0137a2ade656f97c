"""The output layer of a built model, swapped for one that leaves the projection to the loss.

Between output layer and loss Megatron's models only hand the logits on. In a training step the
swapped layer gives them a `DeferredLogits` instead, and the hook computes projection and loss in
one. Evaluation and inference run the layer's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration.arguments import FUSED_FLAG as FLAG
from megatron_mile.integration.window import current_window, differentiated
from megatron_mile.linear import linear_token_loss
from megatron_mile.loss import TokenLoss
from megatron_mile.parallel import ProcessGroup


class DeferredLogits:
    """Stands for logits [s, b, V/tp] that nobody has computed."""

    requires_grad = True

    def __init__(self, layer: Any, hidden: torch.Tensor, weight: torch.Tensor) -> None:
        self.layer, self.hidden, self.weight = layer, hidden, weight

    def shape(self, group: ProcessGroup) -> tuple[int, ...]:
        """The shape that the logits would have; `group` is the tensor-parallel one."""
        parts = group.size() if self.layer.sequence_parallel else 1
        s, b, _ = self.hidden.shape
        return s * parts, b, self.weight.size(0)

    def loss(
        self,
        targets: torch.Tensor,
        config: ObjectiveConfig,
        group: ProcessGroup,
        vocab_size: int | None,
        **given: Any,
    ) -> TokenLoss:
        """What `token_loss` would return with `given` of its arguments, fields [s, b]."""
        return linear_token_loss(
            self.hidden,
            self.weight,
            targets,
            config,
            group,
            vocab_size=vocab_size,
            sequence_parallel=self.layer.sequence_parallel,
            gradient_accumulation_fusion=self.layer.gradient_accumulation_fusion,
            **given,
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise MileError(
            f"a training step read .{name} of its logits, which {FLAG} never forms; train without "
            f"{FLAG}, or without reading the logits"
        )


def fuse_output_layer(model: Any, host: Callable[..., Any]) -> Callable[[Any], None]:
    """Swap the output layer of a language model.

    Args:
        model: Unwrapped, on the last pipeline stage, its output layer as Megatron built it.
        host: `ColumnParallelLinear.forward`, checked.

    Returns:
        What undoes it, given the model.

    Raises:
        MileError: Something lies between projection and loss, or the layer is of another kind.
    """
    reason = _obstacle(model, host)
    if reason:
        raise MileError(f"{FLAG} cannot be combined with {reason}; train without {FLAG}")
    model.output_layer.forward = functools.partial(_forward, host, model.output_layer)
    return _restore


def _restore(model: Any) -> None:
    """Undo `fuse_output_layer`."""
    del model.output_layer.forward


def _forward(
    host: Callable[..., Any],
    layer: Any,
    input_: torch.Tensor,
    weight: torch.Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[Any, torch.Tensor | None]:
    """Stand in for the layer's forward (megatron/core/tensor_parallel/layers.py)."""
    used = layer.weight if weight is None else weight
    if current_window() is None or not differentiated(input_, used) or runtime_gather_output:
        return host(layer, input_, weight, runtime_gather_output)
    return DeferredLogits(layer, input_, used), None


def _obstacle(model: Any, host: Callable[..., Any]) -> str:
    """Return why the projection of this model cannot be left to the loss, "" if it can."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    layer: Any = getattr(model, "output_layer", None)
    config = model.config
    if type(layer) is not ColumnParallelLinear:
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        return f"an output layer of class {kind} (expected ColumnParallelLinear itself)"
    obstacles = {
        "muP, which scales the logits": getattr(config, "use_mup", False),
        "a bias in the output layer": layer.bias is not None,
        "multi-token prediction, which reads logits of its own": config.mtp_num_layers,
        "gathered logits (parallel_output=False)": layer.gather_output
        and layer.tp_group.size() > 1,
        "--config-logger-dir, which writes the logits": getattr(config, "config_logger_dir", ""),
        "an output layer whose forward somebody has replaced": (
            hasattr(host, "__wrapped__") or _has_foreign_forward(layer)
        ),
        "hooks on the output layer, which read its logits": (
            layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks
        ),
        "an output layer that does not reduce its input's gradient (LoRA, experts)": (
            any(
                getattr(layer, name, False)
                for name in ("disable_grad_reduce", "explicit_expert_comm")
            )
        ),
        "--defer-embedding-wgrad-compute, which computes this layer's weight gradient later": (
            config.defer_embedding_wgrad_compute
        ),
        "--output-logit-dtype, which has the product's sums in another dtype": (
            getattr(layer, "output_dtype", None) is not None
        ),
        "GTP weight rematerialisation": getattr(layer, "gtp_remat_size", 1) > 1,
        "Megatron-FSDP, which owns the weight's gradient": any(
            hasattr(weight, "__fsdp_param__") for weight in model.parameters()
        ),
    }
    return next((name for name, found in obstacles.items() if found), "")


def _has_foreign_forward(layer: Any) -> bool:
    """Whether the instance has a forward that Megatron has not given it (0.12 sets one itself)."""
    own = type(layer).__module__
    found = (vars(layer).get(name) for name in ("forward", "_forward_impl"))
    return any(function and function.__module__ != own for function in found)
