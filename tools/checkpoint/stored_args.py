"""What the tools may rely on in the training arguments that a Megatron checkpoint holds.

`FIELDS` says of each argument that the tools read, or that Megatron builds the model from, what
kind of value it has. An argument that other versions of Megatron lack need not be there.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tools.checkpoint.llama import EMBEDDING
from tools.checkpoint.values import (
    DROPOUT,
    EPSILON,
    ROPE_BASE,
    SIZE,
    SWITCH,
    TEXT,
    TEXTS,
    Kind,
    number,
    or_none,
    shown,
    whole,
)
from tools.common.cli import ToolError

_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What is missing would get a default of Megatron's.
REQUIRED = {
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size"), SIZE),
    **dict.fromkeys(("num_attention_heads", "kv_channels", "padded_vocab_size"), SIZE),
    **dict.fromkeys(("seq_length", "max_position_embeddings"), SIZE),
    **dict.fromkeys(("vocab_size", "num_query_groups", "num_experts"), or_none(SIZE)),
    **dict.fromkeys(("untie_embeddings_and_output_weights", "swiglu"), SWITCH),
    **dict.fromkeys(("add_bias_linear", "add_qkv_bias", "group_query_attention"), SWITCH),
    **dict.fromkeys(("qk_layernorm", "rotary_interleaved"), SWITCH),
    **dict.fromkeys(("normalization", "position_embedding_type"), TEXT),
    "params_dtype": Kind(f"one of {', '.join(map(str, _DTYPES))}", lambda v: v in _DTYPES),
    "layernorm_epsilon": EPSILON,
    "rotary_base": ROPE_BASE,
    "rotary_percent": number(1e-6, 1),
    "attention_dropout": DROPOUT,
    "seed": whole(1, 2**32 - 1),
}
# Older versions lack these, or never set them.
OPTIONAL = {
    "mtp_num_layers": or_none(whole(0, 1000)),
    "hybrid_layer_pattern": or_none(TEXT),
    **dict.fromkeys(("tokenizer_type", "tokenizer_model", "tiktoken_pattern"), or_none(TEXT)),
    **dict.fromkeys(("vocab_file", "merge_file"), or_none(TEXT)),
    "special_tokens": or_none(TEXTS),
    "tiktoken_num_special_tokens": or_none(whole(0)),
    "tokenizer_sentencepiece_legacy": or_none(SWITCH),
    "tokenizer_hf_no_use_fast": or_none(SWITCH),
    "tokenizer_hf_no_include_special_tokens": or_none(SWITCH),
    **dict.fromkeys(("make_vocab_size_divisible_by", "tensor_model_parallel_size"), SIZE),
}


def check_common(
    folder: Path, common: Any, weights: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Check what Megatron stores beside the tensors.

    Args:
        folder: of the iteration, for messages.
        common: "args" and "iteration", and what the tools do not read.
        weights: sizes of the model's tensors by key.

    Returns:
        `common`, with the arguments under the names that they have now.

    Raises:
        ToolError: something is missing, of another kind, out of range, or contradicts the tensors.
    """
    if not isinstance(common, dict) or not isinstance(common.get("args"), argparse.Namespace):
        raise ToolError(f"{folder}: holds no training arguments; expected a megatron.training run")
    args: dict[str, Any] = common["args"].__dict__
    if "norm_epsilon" in args:  # its name before
        args.setdefault("layernorm_epsilon", args.pop("norm_epsilon"))
    for name, kind in REQUIRED.items():
        if name not in args:
            raise _refusal(folder, f"its stored arguments lack {name}", kind.text)
    kinds = {**REQUIRED, **OPTIONAL, "iteration": whole(0)}
    if args["group_query_attention"] is True:
        kinds["num_query_groups"] = SIZE
    values = {**args, "iteration": common.get("iteration")}
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            raise _refusal(folder, f"stored {name} is {shown(values[name])}", kind.text)
    _check_sizes(folder, args, weights)
    return common


def _check_sizes(
    folder: Path, args: Mapping[str, Any], weights: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare sizes with each other and with the tensors, before memory is taken for them."""
    if EMBEDDING not in weights:
        raise ToolError(f"{folder}: holds no {EMBEDDING}; expected a GPT or hybrid model")
    for name, size in zip(("padded_vocab_size", "hidden_size"), weights[EMBEDDING], strict=False):
        if args[name] != size:
            raise _refusal(folder, f"stored {name} is {args[name]}", f"{size} as in {EMBEDDING}")
    elements = max(map(math.prod, weights.values())), "the elements of its largest tensor"
    limits = {
        "seq_length": (args["max_position_embeddings"], "max_position_embeddings"),
        "vocab_size": (args["padded_vocab_size"], "padded_vocab_size"),
        "num_layers": (_layers(weights), "the layers of its tensors"),
        "num_experts": (max(map(max, weights.values())), "the largest side of its tensors"),
        **dict.fromkeys(("ffn_hidden_size", "kv_channels", "num_attention_heads"), elements),
        "num_query_groups": elements,
    }
    for name, (limit, text) in limits.items():
        if (args.get(name) or 0) > limit:
            message = f"stored {name} is {args[name]}"
            raise _refusal(folder, message, f"no more than {text}, {limit}")


def _layers(weights: Mapping[str, tuple[int, ...]]) -> int:
    """Count the layers of the tensors, which are numbered, or stacked in one tensor."""
    found = [0]
    for key, size in weights.items():
        if match := _LAYER.match(key):
            found.append(int(match[1]) + 1 if match[1] else size[0])
    return max(found)


def _refusal(folder: Path, found: str, expected: str) -> ToolError:
    return ToolError(f"{folder}: {found}; expected {expected}; take another checkpoint")
