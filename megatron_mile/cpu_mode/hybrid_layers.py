"""HybridModel's layers, and every model's prediction heads, where there is no Transformer Engine.

Megatron has only one set of them, of Transformer Engine's modules (hybrid_layer_specs.py), and
hybrid_block.py takes its final norm from there too. Attention, MLP and prediction heads are given
here as GPTModel's local layers are; Mamba, MoE and the others stay as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any


def use_local_layers() -> bool:
    """Put local layers into Megatron's `hybrid_stack_spec`, unless there is Transformer Engine.

    Returns:
        Whether it did; there is nothing to do for a Megatron without HybridModel.
    """
    try:
        from megatron.core.extensions.transformer_engine import HAVE_TE
        from megatron.core.models.hybrid import hybrid_block, hybrid_layer_specs
    except ImportError:
        return False
    if HAVE_TE:
        return False
    _let_heads_be_built()
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    hybrid_block.TENorm = WrappedTorchNorm
    _replace_layers(hybrid_layer_specs.hybrid_stack_spec.submodules)
    return True


def _let_heads_be_built() -> None:
    """Say no where 0.20 asks whether the projection of a prediction head is for inference.

    It asks with `isinstance`, of classes that are none without Transformer Engine
    (core/tensor_parallel/inference_layers.py of Megatron-LM's main, August 2026).
    """
    from megatron.core.transformer import multi_token_prediction

    if hasattr(multi_token_prediction, "is_inference_column_parallel_linear"):
        multi_token_prediction.is_inference_column_parallel_linear = lambda module: False


def _replace_layers(stack: Any) -> None:
    """Change the stack's submodules; norms come before attention and MLP instead of inside."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    attention = stack.attention_layer.submodules
    attention.input_layernorm = WrappedTorchNorm
    inside = attention.self_attention.submodules
    inside.linear_qkv, inside.linear_proj = ColumnParallelLinear, RowParallelLinear
    inside.core_attention = DotProductAttention
    mlp = stack.mlp_layer.submodules
    mlp.pre_mlp_layernorm = WrappedTorchNorm
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp.mlp = partial(MLP.as_mlp_submodule, submodules=linear)
    for layer in stack.mtp_block_spec.submodules.layer_specs:
        head = layer.submodules
        head.enorm = head.hnorm = head.layer_norm = WrappedTorchNorm
        head.eh_proj = ColumnParallelLinear
