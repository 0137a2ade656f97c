"""A LLaMA model's settings: Megatron's arguments, and Hugging Face's config.json."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from _cli import ToolError
from _llama import Form, Llama
from _megatron import megatron_module

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARCHITECTURE = "LlamaForCausalLM"
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
# The same in config.json, with Hugging Face's defaults for what is absent.
_HUGGING_FACE = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "pretraining_tp": 1,
}


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


def from_megatron(args: argparse.Namespace) -> Llama:
    """Read the sizes of a model that Megatron trained.

    Args:
        args: of the training run, from its checkpoint.

    Raises:
        ToolError: Hugging Face's LLaMA computes something else; the argument is named.
    """
    for name, needed in _MEGATRON.items():
        if (value := getattr(args, name, needed)) != needed:
            raise ToolError(f"the model is not LLaMA's: {name} is {value!r}; expected {needed!r}")
    heads = args.num_attention_heads
    return Llama(
        layers=_pairs(args.hybrid_layer_pattern) if is_hybrid(args) else args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=heads,
        groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=args.kv_channels,
        vocab=args.padded_vocab_size,
        tied=not args.untie_embeddings_and_output_weights,
    )


def is_hybrid(args: argparse.Namespace) -> bool:
    """Whether a run trained HybridModel."""
    return bool(getattr(args, "hybrid_layer_pattern", None))


def _pairs(pattern: str) -> int:
    """Count the LLaMA layers of a hybrid pattern; "|" stands between pipeline stages."""
    if not re.fullmatch(r"(\*-)+", layers := pattern.replace("|", "")):
        raise ToolError(
            f'the model is not LLaMA\'s: its layers are {pattern!r}; expected "*-*-..."'
        )
    return len(layers) // 2


def config_of(
    model: Llama, args: argparse.Namespace, dtype: torch.dtype, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """Make config.json.

    Args:
        model: with the vocabulary that the folder will have.
        args: of the training run.
        dtype: of the weights.
        tokens: "bos_token_id" and "eos_token_id".
    """
    base = float(args.rotary_base)
    return {
        **_HUGGING_FACE,
        "architectures": [ARCHITECTURE],
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": args.max_position_embeddings,
        "rms_norm_eps": _epsilon(args),
        # transformers 5 reads the second, older ones the first.
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "attention_dropout": 0.0,
        "use_cache": True,
        **tokens,
    }


def _epsilon(args: argparse.Namespace) -> float:
    """The norm's epsilon, which older Megatron calls norm_epsilon."""
    names = ("layernorm_epsilon", "norm_epsilon")
    return float(next(getattr(args, name) for name in names if hasattr(args, name)))


def from_hugging_face(config: Mapping[str, Any]) -> Llama:
    """Read the sizes of a Hugging Face model.

    Args:
        config: of config.json.

    Raises:
        ToolError: it is not a LLaMA model, or has what Megatron's does not; the key is named.
    """
    for name, needed in _HUGGING_FACE.items():
        if (value := config.get(name, needed)) != needed:
            raise ToolError(f"config.json: {name} is {value!r}; expected {needed!r}")
    kind = _rope(config).get("rope_type", "default")
    if kind != "default":
        raise ToolError(f"config.json: rope_type is {kind!r}; expected 'default'")
    try:
        heads = config["num_attention_heads"]
        return Llama(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            ffn=config["intermediate_size"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ToolError(f"config.json: {error.args[0]} is missing") from None


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    return rope


def args_of(
    model: Llama, form: Form, config: Mapping[str, Any], dtype: torch.dtype
) -> argparse.Namespace:
    """Make the arguments that a Megatron checkpoint holds, for `--use-checkpoint-args` and others.

    Args:
        model: with the vocabulary that the checkpoint will have, padding included.
        form: of the weights.
        config: of config.json.
        dtype: of the weights.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    megatron_module("megatron.training.arguments").add_megatron_arguments(parser)
    args = parser.parse_args([])
    length = config.get("max_position_embeddings", 2048)
    base = _rope(config).get("rope_theta", config.get("rope_theta", 10000.0))
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
        padded_vocab_size=model.vocab,
        vocab_size=config["vocab_size"],
        untie_embeddings_and_output_weights=not model.tied,
        max_position_embeddings=length,
        seq_length=length,
        rotary_base=int(base) if base == int(base) else base,  # an integer in Megatron's parser
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        attention_dropout=0.0,
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
