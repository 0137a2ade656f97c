"""Writes a Hugging Face folder as a Megatron checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_mile.integration.checkpoint_folder import RELEASE, TRACKER
from tools.checkpoint import hf_folder, llama
from tools.checkpoint.hf_config import from_hugging_face
from tools.checkpoint.llama_config import args_of, choose_dtype
from tools.checkpoint.run_tokenizer import build_from, type_of
from tools.checkpoint.torch_dist import COMMON, write_checkpoint
from tools.common.cli import ToolError
from tools.common.outputs import new_folder

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
    source, form = Path(args.load), llama.FORMS[args.model]
    settings = from_hugging_face(hf_folder.read_config(source))
    model, tensors = settings.model, hf_folder.open_weights(source)
    llama.check_layers(source, tensors.sizes, model)
    unpadded = {weight.key: weight for weight in llama.weights(model, form)}
    parts = {name: size for weight in unpadded.values() for name, size in weight.parts().items()}
    llama.check_names(source, tensors.sizes, parts)
    dtype = choose_dtype(args.dtype, tensors.dtypes)
    padding = _padding(source, model, dtype)
    padded = model._replace(vocab=model.vocab + len(padding[llama.EMBEDDING]))
    trained = args_of(settings, form, padded.vocab, dtype)
    if tokenizer := hf_folder.find_tokenizer(source):
        trained.tokenizer_type = type_of(tokenizer)
        trained.tokenizer_model = str(tokenizer.resolve())
    found = llama.weights(padded, form)
    common = {"args": trained, "iteration": 0, "checkpoint_version": 3.0, "content_metadata": {}}
    objects = {**dict.fromkeys(llama.extra_states(model, form)), COMMON: common}
    with new_folder(Path(args.output)) as folder, llama.progress(found) as bar:

        def make(key: str) -> torch.Tensor:
            tensor = unpadded[key].join(tensors.__getitem__).to(dtype)
            tensor = torch.cat([tensor, padding[key]]) if key in padding else tensor
            bar.update(tensor.numel())
            return tensor

        sizes = {weight.key: weight.size for weight in found}
        write_checkpoint(folder / RELEASE, sizes, dtype, make, objects)
        (folder / TRACKER).write_text(RELEASE)
    flag = f"--norm-epsilon {trained.layernorm_epsilon:g}"
    note = f"{model.vocab} tokens, padded to {padded.vocab}; train with {flag}"
    return note + (_other_size(tokenizer, trained) if tokenizer else "")


def _other_size(tokenizer: Path, trained: argparse.Namespace) -> str:
    """Say so where the folder's tokenizer has not as many tokens as the model."""
    try:
        tokens = build_from(tokenizer, trained).vocab_size
    except ToolError as error:
        return f"; {error}"
    return f"; the tokenizer has {tokens} tokens" if tokens != trained.vocab_size else ""


def _padding(source: Path, model: llama.Llama, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Give the rows that pad the vocabulary, by Megatron's key: as they were, or zeros."""
    keys = (llama.EMBEDDING,) if model.tied else (llama.EMBEDDING, llama.OUTPUT)
    kept = hf_folder.open_padding(source)
    if not kept.sizes:
        return dict.fromkeys(keys, torch.zeros(-model.vocab % PADDED_TO, model.hidden, dtype=dtype))
    rows = max((size[0] for size in kept.sizes.values() if size), default=0)
    expected = {llama.TABLES[key]: (rows, model.hidden) for key in keys}
    llama.check_names(source / hf_folder.PADDING, kept.sizes, expected)
    return {key: kept[llama.TABLES[key]].to(dtype) for key in keys}
