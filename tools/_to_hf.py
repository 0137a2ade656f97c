"""Writes a Megatron checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _checkpoint import checkpoint_folder
from _cli import ToolError, new_folder
from _hf_folder import (
    CONFIG,
    GENERATION,
    PADDING,
    Writer,
    copy_tokenizer,
    has_tokenizer,
    read_tokenizer,
    save,
    write_json,
)
from _llama import EMBEDDING, TABLES, Weight, check_names, form_of, is_optimizer, progress, weights
from _llama_config import choose_dtype, config_of, from_megatron, is_hybrid
from _torch_dist import Checkpoint

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf(args: argparse.Namespace) -> str:
    """Convert a Megatron checkpoint.

    Args:
        args: parsed flags of tools/convert_checkpoint.py.

    Returns:
        What was done, for people.

    Raises:
        ToolError: the checkpoint cannot be read, or its model is not LLaMA's.
    """
    checkpoint = Checkpoint(checkpoint_folder(args.load, args.ckpt_step))
    if (trained := checkpoint.common().get("args")) is None:
        raise ToolError(f"{checkpoint.folder}: holds no training arguments")
    stored = {key: entry for key, entry in checkpoint.tensors.items() if not is_optimizer(key)}
    model = from_megatron(trained)
    found = weights(model, form_of(stored, is_hybrid(trained)))
    sizes = {key: tuple(entry.size) for key, entry in stored.items()}
    check_names(checkpoint.folder, sizes, {weight.key: weight.size for weight in found})
    dtype = choose_dtype(args.dtype, {entry.properties.dtype for entry in stored.values()})
    source = _tokenizer_folder(args.tokenizer_model, trained)
    tokenizer = read_tokenizer(source) if source else None
    vocab = _vocabulary(args.vocab_size, tokenizer, model.vocab)
    tokens = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    with new_folder(Path(args.output)) as folder:
        _write_weights(folder, checkpoint, found, vocab, dtype)
        if source:
            copy_tokenizer(source, folder)
        write_json(folder / GENERATION, tokens)
        config = config_of(model._replace(vocab=vocab), trained, dtype, tokens)
        write_json(folder / CONFIG, config)
    missing = "" if source else "; without a tokenizer, which --tokenizer-model would name"
    return f"{vocab} tokens, {model.vocab - vocab} rows of padding apart{missing}"


def _tokenizer_folder(asked: str | None, trained: argparse.Namespace) -> Path | None:
    """Find the tokenizer: what --tokenizer-model names, or that of the training, if it is here."""
    if asked and not has_tokenizer(Path(asked)):
        raise ToolError(f"no Hugging Face tokenizer in --tokenizer-model {asked}")
    if not asked and trained.tokenizer_type == "HuggingFaceTokenizer":
        asked = trained.tokenizer_model
    return Path(asked) if asked and has_tokenizer(Path(asked)) else None


def _vocabulary(asked: int | None, tokenizer: Any, rows: int) -> int:
    """The number of tokens: --vocab-size, or the tokenizer's, or all rows that the model has."""
    vocab = asked or (len(tokenizer) if tokenizer is not None else rows)
    if not 1 <= vocab <= rows:
        raise ToolError(f"a vocabulary of {vocab} does not fit the model, which has {rows} rows")
    return vocab


def _write_weights(
    folder: Path, checkpoint: Checkpoint, found: Sequence[Weight], vocab: int, dtype: torch.dtype
) -> None:
    """Write the weights and, apart from them, the rows that pad the vocabulary."""
    writer, padding = Writer(folder), {}
    with progress(found) as bar:
        for weight in found:
            tensor = checkpoint.tensor(weight.key)
            parts = weight.split(tensor.to(dtype))
            if name := TABLES.get(weight.key):
                padding[name] = parts[name][vocab:].clone()
                parts[name] = parts[name][:vocab]
            writer.add(parts)
            bar.update(tensor.numel())
    writer.finish()
    if padding[TABLES[EMBEDDING]].numel():
        save(padding, folder / PADDING)
