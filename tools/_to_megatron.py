"""Writes a Hugging Face folder as a Megatron checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _checkpoint import RELEASE, TRACKER
from _cli import new_folder
from _hf_folder import PADDING, Tensors, find_tokenizer, open_padding, open_weights, read_config
from _llama import (
    EMBEDDING,
    FORMS,
    OUTPUT,
    TABLES,
    Llama,
    check_names,
    extra_states,
    progress,
    weights,
)
from _llama_config import args_of, choose_dtype, from_hugging_face
from _megatron import SENTENCEPIECE_TYPES
from _torch_dist import COMMON, write_checkpoint

PADDED_TO = 128  # as by default in Megatron


def to_megatron(args: argparse.Namespace) -> str:
    """Convert a Hugging Face folder.

    Args:
        args: parsed flags of tools/convert_checkpoint.py.

    Returns:
        What was done, for people.

    Raises:
        ToolError: the folder cannot be read, or its model is not LLaMA's.
    """
    source, form = Path(args.load), FORMS[args.model]
    config = read_config(source)
    model = from_hugging_face(config)
    tensors = open_weights(source)
    unpadded = {weight.key: weight for weight in weights(model, form)}
    parts = {name: size for weight in unpadded.values() for name, size in weight.parts().items()}
    check_names(source, tensors.sizes, parts)
    dtype = choose_dtype(args.dtype, tensors.dtypes)
    padding = _padding(source, model, dtype)
    padded = model._replace(vocab=model.vocab + len(padding[EMBEDDING]))
    trained = args_of(padded, form, config, dtype)
    if tokenizer := find_tokenizer(source):
        kind = "HuggingFaceTokenizer" if tokenizer.is_dir() else SENTENCEPIECE_TYPES[0]
        trained.tokenizer_type, trained.tokenizer_model = kind, str(tokenizer.resolve())
    found = weights(padded, form)
    common = {"args": trained, "iteration": 0, "checkpoint_version": 3.0, "content_metadata": {}}
    objects = {**dict.fromkeys(extra_states(model, form)), COMMON: common}
    with new_folder(Path(args.output)) as folder, progress(found) as bar:

        def make(key: str) -> torch.Tensor:
            tensor = unpadded[key].join(tensors.__getitem__).to(dtype)
            tensor = torch.cat([tensor, padding[key]]) if key in padding else tensor
            bar.update(tensor.numel())
            return tensor

        sizes = {weight.key: weight.size for weight in found}
        write_checkpoint(folder / RELEASE, sizes, dtype, make, objects)
        (folder / TRACKER).write_text(RELEASE)
    flag = f"--norm-epsilon {trained.layernorm_epsilon:g}"
    return f"{model.vocab} tokens, padded to {padded.vocab}; train with {flag}"


def _padding(source: Path, model: Llama, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Give the rows that pad the vocabulary, by Megatron's key: as they were, or zeros."""
    keys = (EMBEDDING,) if model.tied else (EMBEDDING, OUTPUT)
    kept: Tensors = open_padding(source)
    if not kept.sizes:
        return dict.fromkeys(keys, torch.zeros(-model.vocab % PADDED_TO, model.hidden, dtype=dtype))
    rows = next(iter(kept.sizes.values()))[0]
    check_names(source / PADDING, kept.sizes, {TABLES[key]: (rows, model.hidden) for key in keys})
    return {key: kept[TABLES[key]].to(dtype) for key in keys}
