"""A LLaMA model's settings in Hugging Face's config.json, read by an allow-list.

Each key is honoured, or has a value with which Megatron computes the same, or changes nothing that
LlamaForCausalLM computes, or is refused by name. Known is what transformers 4.31 to 5.23 and
published folders write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tools.checkpoint.llama import Llama
from tools.checkpoint.llama_config import Settings, checked
from tools.checkpoint.values import DROPOUT, EPSILON, ROPE_BASE, SIZE, Kind, shown
from tools.common.cli import ToolError

ARCHITECTURE = "LlamaForCausalLM"
HONOURED = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"),
    *("max_position_embeddings", "rms_norm_eps", "attention_dropout"),
    *("rope_theta", "rope_parameters", "rope_scaling"),
)
_NO_PART = "Megatron's LLaMA has nothing like it"
_ROPE_LOST = "a Megatron checkpoint does not keep it, so training would go on without it"
# The values with which Megatron computes the same, and what is to be known about others.
_SAME: dict[str, tuple[tuple[object, ...], str]] = {
    "model_type": (("llama",), "other models are not converted"),
    "architectures": (([ARCHITECTURE], None), "other models are not converted"),
    "auto_map": ((None,), "the folder's own code would be the model; it is not run"),
    "quantization_config": ((None,), "load it with transformers, dequantize() and save it"),
    "hidden_act": (("silu",), _NO_PART),
    "attention_bias": ((False,), _NO_PART),
    "mlp_bias": ((False,), _NO_PART),
    "sliding_window": ((None,), _NO_PART),
    "layer_types": ((None,), _NO_PART),
    "per_layer_config": ((None,), _NO_PART),
    "partial_rotary_factor": ((1.0, 1, None), _NO_PART),
    "rope_interleaved": ((False,), "its weights are in another order than transformers' own"),
    "is_encoder_decoder": ((False,), _NO_PART),
}
_SAME_IN_ROPE: dict[str, tuple[tuple[object, ...], str]] = {
    "rope_type": (("default",), _ROPE_LOST),
    "type": (("default",), _ROPE_LOST),
    "partial_rotary_factor": _SAME["partial_rotary_factor"],
}
# What changes nothing that the model computes, by the reason.
HARMLESS = {
    "notes on the folder": (
        *("_name_or_path", "_commit_hash", "transformers_version", "transformers.js_config"),
        *("is_llama_config", "max_sequence_length", "unsloth_fixed", "unsloth_version"),
    ),
    "the weights are there, and have a dtype": ("dtype", "torch_dtype", "initializer_range"),
    "tokens, which the tokenizer's files say too": (
        *("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"),
    ),
    "how it is run and what it returns": (
        *("use_cache", "output_attentions", "output_hidden_states", "torchscript"),
        *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
        "pretraining_tp",  # up to version 4, the same products in so many slices
    ),
    "how tokens are drawn from its probabilities": (
        *("max_length", "max_new_tokens", "min_length", "do_sample", "num_beams", "temperature"),
        *("top_k", "top_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    ),
    "heads that LlamaForCausalLM has not": ("id2label", "label2id", "num_labels", "problem_type"),
}
_KNOWN = {*HONOURED, *_SAME, *(name for names in HARMLESS.values() for name in names)}
# transformers' value where a key is absent; other sizes are always there.
_DEFAULT_LENGTH, _DEFAULT_EPSILON, _DEFAULT_ROPE_BASE = 2048, 1e-6, 10000.0


def from_hugging_face(config: Mapping[str, Any]) -> Settings:
    """Read the settings of a Hugging Face model.

    Args:
        config: of config.json.

    Raises:
        ToolError: it is not a LLaMA model, has what Megatron's does not, or a key or value that is
            unknown; the key is named.
    """
    _check_keys(config)
    hidden, heads = _value(config, "hidden_size", SIZE), _value(config, "num_attention_heads", SIZE)
    model = Llama(
        layers=_value(config, "num_hidden_layers", SIZE),
        hidden=hidden,
        ffn=_value(config, "intermediate_size", SIZE),
        heads=heads,
        groups=_value_or(config, "num_key_value_heads", SIZE, heads),
        head_dim=_value_or(config, "head_dim", SIZE, hidden // heads),
        vocab=_value(config, "vocab_size", SIZE),
        tied=config.get("tie_word_embeddings", False),
    )
    length = _value(config, "max_position_embeddings", SIZE, _DEFAULT_LENGTH)
    epsilon = _value(config, "rms_norm_eps", EPSILON, _DEFAULT_EPSILON)
    dropout = float(_value_or(config, "attention_dropout", DROPOUT, 0.0))
    return checked(Settings(model, length, _rope_base(config), epsilon, dropout))


def _check_keys(config: Mapping[str, Any]) -> None:
    """Refuse keys that are unknown, and values with which Megatron computes something else."""
    if "model_type" not in config:
        raise ToolError("config.json: model_type is missing; expected 'llama'")
    _check_values("", config, _SAME)
    if unknown := sorted(config.keys() - _KNOWN):
        raise ToolError(
            f"config.json: {shown(unknown[0])} is unknown; take it out if transformers' "
            f"{ARCHITECTURE} does not read it"
        )
    _check_values("", config, {"tie_word_embeddings": ((False, True), "it is a switch")})


def _check_values(
    prefix: str, config: Mapping[str, Any], same: Mapping[str, tuple[tuple[object, ...], str]]
) -> None:
    """Compare what is there with the values that it may have, of which 0 is not False."""
    for name, (values, advice) in same.items():
        value = config.get(name, values[0])
        if not any(type(value) is type(known) and value == known for known in values):
            expected = "null" if values[0] is None else repr(values[0])
            raise ToolError(
                f"config.json: {prefix}{name} is {shown(value)}; expected {expected}: {advice}"
            )


def _value(config: Mapping[str, Any], name: str, kind: Kind, default: Any = None) -> Any:
    """Read a number; without a default it must be there."""
    if name not in config and default is None:
        raise ToolError(f"config.json: {name} is missing")
    value = config.get(name, default)
    kind.check(f"config.json: {name}", value)
    return value


def _value_or(config: Mapping[str, Any], name: str, kind: Kind, default: float) -> Any:
    """Read a number that may be null; its default need not fit, and is refused with others."""
    return default if config.get(name) is None else _value(config, name, kind)


def _rope_base(config: Mapping[str, Any]) -> float:
    """Read RoPE's base: from rope_parameters (transformers 5), or rope_theta and rope_scaling.

    Raises:
        ToolError: they contradict each other, or say another RoPE.
    """
    ropes = {name: _rope(config, name) for name in ("rope_parameters", "rope_scaling")}
    if all(ropes.values()) and ropes["rope_parameters"] != ropes["rope_scaling"]:
        raise ToolError("config.json: rope_parameters and rope_scaling differ; keep the right one")
    places = {"rope_theta": config, **{f"{name}.rope_theta": rope for name, rope in ropes.items()}}
    bases = {name: place["rope_theta"] for name, place in places.items() if "rope_theta" in place}
    for name, base in bases.items():
        ROPE_BASE.check(f"config.json: {name}", base)
    if len(set(bases.values())) > 1:
        said = " and ".join(f"{name} {base:g}" for name, base in bases.items())
        raise ToolError(f"config.json: {said} contradict each other; keep the right one")
    return float(next(iter(bases.values()), _DEFAULT_ROPE_BASE))


def _rope(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Read an object that says which RoPE, and refuse any other than the default one."""
    rope = config.get(name)
    if rope is None:
        return {}
    if not isinstance(rope, dict):
        raise ToolError(f"config.json: {name} is {shown(rope)}; expected an object")
    _check_values(f"{name}.", rope, _SAME_IN_ROPE)
    if unknown := sorted(rope.keys() - {"rope_theta", *_SAME_IN_ROPE}):
        raise ToolError(
            f"config.json: {name} has {shown(unknown[0])}, which is for another RoPE; {_ROPE_LOST}"
        )
    return rope


def config_of(
    settings: Settings, dtype: torch.dtype, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """Make config.json.

    Args:
        settings: with the vocabulary that the folder will have.
        dtype: of the weights.
        tokens: "bos_token_id" and "eos_token_id".
    """
    model, base = settings.model, settings.rope_base
    return {
        "model_type": "llama",
        "architectures": [ARCHITECTURE],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": settings.length,
        "rms_norm_eps": settings.epsilon,
        # transformers 5 reads the last, older ones the others.
        "rope_scaling": None,
        "rope_theta": base,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "attention_dropout": settings.attention_dropout,
        "use_cache": True,
        "pretraining_tp": 1,
        **tokens,
    }
