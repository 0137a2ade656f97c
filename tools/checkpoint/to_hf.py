"""Writes a Megatron checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

import torch

from tools.checkpoint import hf_folder, llama
from tools.checkpoint.hf_config import config_of
from tools.checkpoint.llama_config import choose_dtype, from_megatron, is_hybrid
from tools.checkpoint.megatron_model import checkpoint_folder
from tools.checkpoint.run_tokenizer import HUGGING_FACE_TYPE, build_from, own_source
from tools.checkpoint.torch_dist import Checkpoint
from tools.common.cli import ToolError
from tools.common.outputs import new_folder
from tools.data.sentencepiece_model import write_for_transformers

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
    trained, sizes = checkpoint.common()["args"], checkpoint.weights
    settings = from_megatron(trained)
    model = settings.model
    found = llama.weights(model, llama.form_of(sizes, is_hybrid(trained)))
    llama.check_names(checkpoint.folder, sizes, {weight.key: weight.size for weight in found})
    dtype = choose_dtype(args.dtype, {checkpoint.tensors[key].properties.dtype for key in sizes})
    source = _tokenizer_source(args.tokenizer_model, trained)
    with new_folder(Path(args.output)) as folder:
        tokenizer = _put_tokenizer(source, trained, folder) if source else None
        if tokenizer is not None and args.vocab_size is None:
            _check_tokens(len(tokenizer), model.vocab, source, trained)
        vocab = _vocabulary(args.vocab_size, tokenizer, model.vocab)
        tokens = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
        _write_weights(folder, checkpoint, found, vocab, dtype)
        hf_folder.write_json(folder / hf_folder.GENERATION, tokens)
        settings = settings._replace(model=model._replace(vocab=vocab))
        hf_folder.write_json(folder / hf_folder.CONFIG, config_of(settings, dtype, tokens))
    missing = "" if source else "; without a tokenizer, which --tokenizer-model would name"
    return f"{vocab} tokens, {model.vocab - vocab} rows of padding apart{missing}"


def _tokenizer_source(asked: str | None, trained: argparse.Namespace) -> Path | None:
    """Find the tokenizer: what --tokenizer-model names, or that of the training, if it is here.

    Returns:
        A folder that transformers reads, or SentencePiece's .model file.
    """
    found = hf_folder.find_tokenizer(Path(asked)) if asked else own_source(trained)
    if asked and not found:
        raise ToolError(f"no tokenizer at --tokenizer-model {asked}, nor a SentencePiece file")
    return found


def _put_tokenizer(source: Path, trained: argparse.Namespace, folder: Path) -> Any:
    """Copy a folder's tokenizer, or write SentencePiece's as transformers reads it; return that."""
    if source.is_dir():
        hf_folder.copy_tokenizer(source, folder)
        return hf_folder.read_tokenizer(source)
    if getattr(trained, "tokenizer_type", None) == HUGGING_FACE_TYPE:
        raise ToolError(
            f"{source}: a SentencePiece model, but --tokenizer-type HuggingFaceTokenizer was "
            "trained with; put a tokenizer_config.json beside it, for LLaMA's "
            '{"tokenizer_class": "LlamaTokenizer"}'
        )
    write_for_transformers(build_from(source, trained), folder)
    return hf_folder.read_tokenizer(folder)


def _check_tokens(known: int, rows: int, source: Path | None, trained: argparse.Namespace) -> None:
    """Refuse a tokenizer of fewer tokens than the training's.

    Raises:
        ToolError: the training had more tokens, or more rows are left than padding makes.
    """
    remedy = "give the training's to --tokenizer-model, or the number of tokens to --vocab-size"
    if tokens := _trained_tokens(rows, source, trained):
        if known < tokens:
            raise ToolError(
                f"{source}: {known} tokens, but the model was trained with {tokens}; {remedy}"
            )
        return
    sizes = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
    multiple = math.prod(getattr(trained, name, 1) for name in sizes)
    if rows - known >= multiple:
        raise ToolError(
            f"{source}: {known} tokens, but the model has {rows} rows, and padding to a multiple of"
            f" {multiple} does not explain the rest; {remedy}"
        )


def _trained_tokens(rows: int, source: Path | None, trained: argparse.Namespace) -> int:
    """The number of tokens of the training, if that is still known; else 0."""
    own, tokens = own_source(trained), trained.vocab_size or 0
    if own:
        with contextlib.suppress(ToolError):
            counted = build_from(own, trained).vocab_size  # with --tokenizer-special-tokens
            tokens = max(tokens, counted) if own == source else counted
    return tokens if tokens <= rows else 0


def _vocabulary(asked: int | None, tokenizer: Any, rows: int) -> int:
    """The number of tokens: --vocab-size, or the tokenizer's, or all rows that the model has."""
    known = len(tokenizer) if tokenizer is not None else 1
    unless_asked = rows if tokenizer is None else known
    vocab = unless_asked if asked is None else asked
    if not known <= vocab <= rows:
        raise ToolError(
            f"a vocabulary of {vocab} does not fit the tokenizer, which has {known} tokens, and "
            f"the model, which has {rows} rows"
        )
    return vocab


def _write_weights(
    folder: Path, checkpoint: Checkpoint, found: list[llama.Weight], vocab: int, dtype: torch.dtype
) -> None:
    """Write the weights and, apart from them, the rows that pad the vocabulary."""
    sizes = {name: size for weight in found for name, size in weight.parts().items()}
    cut = {name: (vocab, *sizes[name][1:]) for name in llama.TABLES.values() if name in sizes}
    writer, padding = hf_folder.Writer(folder, {**sizes, **cut}, dtype), {}
    with llama.progress(found) as bar:
        for weight in found:
            tensor = checkpoint.tensor(weight.key)
            parts = weight.split(tensor.to(dtype))
            if name := llama.TABLES.get(weight.key):
                padding[name] = parts[name][vocab:].clone()
                parts[name] = parts[name][:vocab]
            writer.add(parts)
            bar.update(tensor.numel())
    writer.finish()
    if padding[llama.TABLES[llama.EMBEDDING]].numel():
        hf_folder.save(padding, folder / hf_folder.PADDING)
