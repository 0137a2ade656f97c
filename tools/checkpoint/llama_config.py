"""A LLaMA model's settings, and how Megatron's arguments say them."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import NamedTuple

import torch

from tools.checkpoint.llama import Form, Llama
from tools.checkpoint.values import shown
from tools.common.cli import ToolError
from tools.common.megatron import megatron_module

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What Hugging Face's LLaMA computes, in Megatron's arguments; one that is absent is like this.
_MEGATRON = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "no_rope_freq": None,
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "num_experts": None,
    "mtp_num_layers": None,
    "use_mup": False,
    "heterogeneous_layers_config_encoded_json": None,
}


class Settings(NamedTuple):
    """All that a conversion keeps of a model beside its weights."""

    model: Llama
    """With the vocabulary without padding, where that is known."""
    length: int
    """Most positions of a sequence."""
    rope_base: float
    epsilon: float
    """Of the norms."""
    attention_dropout: float


def checked(settings: Settings) -> Settings:
    """Check that sizes fit each other as both sides need it.

    Raises:
        ToolError: they do not.
    """
    model = settings.model
    if model.heads % model.groups:
        reason = f"{model.heads} attention heads are no multiple of {model.groups} key-value heads"
    elif model.hidden % model.heads:  # transformers 5 loads no such model
        reason = f"a hidden size of {model.hidden} is no multiple of {model.heads} attention heads"
    elif model.head_dim % 2:
        reason = f"heads of {model.head_dim} are odd; RoPE turns pairs"
    else:
        return settings
    raise ToolError(f"the model's sizes do not fit: {reason}")


def choose_dtype(asked: str | None, found: Collection[object]) -> torch.dtype:
    """Choose the dtype to write: what --dtype asks for, or else that of the tensors.

    Raises:
        ToolError: without --dtype, they have several, or another than it offers.
    """
    if asked:
        return DTYPES[asked]
    dtype = next(iter(found))
    if len(found) > 1 or not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise ToolError(f"the weights are {', '.join(sorted(map(str, found)))}; give --dtype")
    return dtype


def from_megatron(args: argparse.Namespace) -> Settings:
    """Read the settings of a model that Megatron trained; nothing else reads them from `args`.

    Args:
        args: of the training run, as `check_common` let them pass.

    Returns:
        The settings; the vocabulary with its padding.

    Raises:
        ToolError: Hugging Face's LLaMA computes something else; the argument is named.
    """
    for name, needed in _MEGATRON.items():
        value = getattr(args, name, needed)
        # A tensor, or what else may be stored, does not compare like a number.
        if not (isinstance(value, float | int | str | None) and value == needed):
            raise ToolError(
                f"the model is not LLaMA's: {name} is {shown(value)}; expected {needed!r}"
            )
    grouped = args.group_query_attention
    model = Llama(
        layers=_pairs(args) if is_hybrid(args) else args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        groups=args.num_query_groups if grouped else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
    )
    numbers = map(float, (args.rotary_base, args.layernorm_epsilon, args.attention_dropout))
    return checked(Settings(model, args.max_position_embeddings, *numbers))


def is_hybrid(args: argparse.Namespace) -> bool:
    """Whether a run trained HybridModel."""
    return bool(getattr(args, "hybrid_layer_pattern", None))


def _pairs(args: argparse.Namespace) -> int:
    """Count the LLaMA layers of a hybrid pattern; "|" stands between pipeline stages."""
    layers = args.hybrid_layer_pattern.replace("|", "")
    pairs = len(layers) // 2
    if layers != "*-" * pairs or 2 * pairs != args.num_layers:
        raise ToolError(
            f"the model is not LLaMA's: its layers are {shown(args.hybrid_layer_pattern)}; "
            f'expected "*-*-...", {args.num_layers} in all'
        )
    return pairs


def args_of(settings: Settings, form: Form, rows: int, dtype: torch.dtype) -> argparse.Namespace:
    """Make the arguments that a Megatron checkpoint holds, for `--use-checkpoint-args` and others.

    Args:
        settings: of the model.
        form: of the weights.
        rows: of the vocabulary, padding included.
        dtype: of the weights.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    megatron_module("megatron.training.arguments").add_megatron_arguments(parser)
    args = parser.parse_args([])
    model, base = settings.model, settings.rope_base
    vars(args).update(
        {name: needed for name, needed in _MEGATRON.items() if hasattr(args, name)},
        num_layers=2 * model.layers if form.hybrid else model.layers,
        hybrid_layer_pattern="*-" * model.layers if form.hybrid else None,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        group_query_attention=model.groups != model.heads,
        num_query_groups=model.groups,
        kv_channels=model.head_dim,
        padded_vocab_size=rows,
        vocab_size=model.vocab,
        untie_embeddings_and_output_weights=not model.tied,
        max_position_embeddings=settings.length,
        seq_length=settings.length,
        rotary_base=int(base) if base == int(base) else base,  # an integer in Megatron's parser
        layernorm_epsilon=settings.epsilon,
        attention_dropout=settings.attention_dropout,
        hidden_dropout=0.0,
        add_position_embedding=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        ckpt_format="torch_dist",
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
    return args
