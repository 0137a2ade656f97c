"""Reads and writes a Hugging Face model folder: config.json, safetensors files, tokenizer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_mile.integration.hf_folder import INDEX, WHOLE, weight_files
from tools.common.cli import ToolError, library_errors
from tools.common.files import json_text, read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
# The rows by which Megatron pads a vocabulary; transformers does not look at it.
PADDING = "megatron_padding.safetensors"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHARD_BYTES = 5 * 10**9
# RoPE's frequencies, in folders of LLaMA 1 and 2; transformers makes them anew.
_NOT_READ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


class Tensors:
    """The tensors of safetensors files, read when they are asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers of the files.

        Raises:
            ToolError: a file is missing, damaged or cut off, or a tensor is in two files.
        """
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ToolError(f"{path}: cannot be read ({error})") from error
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name in self._files:
                    raise ToolError(f"{path}: {name} is in another file too")
                if not _NOT_READ.fullmatch(name):
                    self._files[name] = file
        self.sizes = {n: tuple(f.get_slice(n).get_shape()) for n, f in self._files.items()}
        """Size by name."""
        kinds = {f.get_slice(n).get_dtype() for n, f in self._files.items()}
        self.dtypes = {_DTYPES.get(kind, kind) for kind in kinds}
        """The dtypes that there are; those that a model is not converted in, by name."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        ToolError: it is missing, or not a JSON object.
    """
    path = folder / CONFIG
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ToolError(f"no Hugging Face model in {folder}: {CONFIG} is missing") from None
    except ValueError as error:
        raise ToolError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ToolError(f"{path}: expected an object")
    return content


def open_weights(folder: Path) -> Tensors:
    """Open the model's safetensors files.

    Raises:
        ToolError: there are none, or they cannot be read.
    """
    try:
        with library_errors():
            files = weight_files(folder).values()
    except FileNotFoundError:
        raise ToolError(f"{folder}: neither {WHOLE} nor {INDEX}; convert to safetensors") from None
    except SafetensorError as error:
        raise ToolError(f"{folder / WHOLE}: cannot be read ({error})") from error
    return Tensors(sorted(set(files)))


def open_padding(folder: Path) -> Tensors:
    """Open the padding rows that a conversion from Megatron left; none is no error."""
    path = folder / PADDING
    return Tensors([path] if path.is_file() else [])


class Writer:
    """Writes weights in files of at most `SHARD_BYTES`, and the index last."""

    def __init__(
        self, folder: Path, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> None:
        """Plan the files.

        Args:
            folder: is there.
            sizes: by name, in the order in which the weights will come.
            dtype: of the weights.
        """
        self.folder = folder
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        meta = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
        self._plan = split_torch_state_dict_into_shards(meta, max_shard_size=SHARD_BYTES)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors; a file is written when it is full."""
        for name, tensor in tensors.items():
            file = self._plan.tensor_to_filename[name]
            waiting = self._waiting.setdefault(file, {})
            # A copy: a part of a larger tensor would keep all of it.
            waiting[name] = tensor.clone(memory_format=torch.contiguous_format)
            if len(waiting) == len(self._plan.filename_to_tensors[file]):
                save(self._waiting.pop(file), self.folder / file)

    def finish(self) -> None:
        """Write the index, if there is more than one file."""
        if self._plan.is_sharded:
            index = {"metadata": self._plan.metadata, "weight_map": self._plan.tensor_to_filename}
            write_json(self.folder / INDEX, index)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file(tensors, path, metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON file."""
    path.write_text(json_text(content), encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)


def find_tokenizer(path: Path) -> Path | None:
    """Find a tokenizer at a path.

    Returns:
        The path, as a folder that transformers reads; or a SentencePiece model, which is the path
        or all that the folder has (transformers 5 would leave out the space before a text); or
        None.
    """
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return path
    return next((file for file in (path, path / "tokenizer.model") if file.is_file()), None)


def read_tokenizer(folder: Path) -> Any:
    """Load a tokenizer with transformers, from files only, without code of the folder.

    Raises:
        ToolError: transformers cannot.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each tokenizer library has errors of its own
        raise ToolError(f"{folder}: no tokenizer that transformers reads ({error})") from error
