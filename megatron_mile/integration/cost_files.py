"""Reads EMO's cost matrix from a file or folder, without unpickling what could run code.

A .npy or .safetensors file, a Hugging Face folder with .safetensors, or a checkpoint folder of
Megatron (torch_dist) or the folder of one of its iterations. In a folder the output layer's weight
is taken, or where there is none the word embeddings, which are then tied to it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from megatron_mile.errors import MileError
from megatron_mile.integration.checkpoint_folder import (
    LAST_FILE,
    OF_THE_OPTIMIZER,
    TRACKER,
    latest_name,
)
from megatron_mile.integration.hf_folder import WHOLE, weight_files

# Endings of the names that output layers, then word embeddings have.
_NAMES: tuple[str, ...] = ("lm_head.weight", "embed_out.weight", "output_layer.weight")
_NAMES += ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def read_matrix(path: str) -> torch.Tensor:
    """Return the whole matrix [V, d] on the CPU, floating; a .npy file stays on disk.

    Raises:
        MileError: There is no such matrix.
    """
    place = Path(path)
    try:
        matrix = _read(place)
    except MileError:
        raise
    except Exception as error:  # zip, pickle, numpy and safetensors raise their own kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise MileError(f"--mile-emo-cost {path} cannot be read: {first}") from error
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise MileError(
            f"--mile-emo-cost {path} holds {matrix.dtype} {tuple(matrix.shape)}; expected a "
            "floating matrix, a row for each token"
        )
    return matrix


def digest(matrix: torch.Tensor) -> str:
    """Return the SHA-256 of the matrix's dtype, shape and numbers, wherever they are stored."""
    found = hashlib.sha256(f"{matrix.dtype} {tuple(matrix.shape)}".encode())
    for rows in matrix.split(4096):
        found.update(rows.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _read(path: Path) -> torch.Tensor:
    if path.suffix == ".npy":
        import numpy

        return torch.from_numpy(numpy.load(path, mmap_mode="c", allow_pickle=False))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if (path / TRACKER).is_file() or (path / LAST_FILE).is_file():
        return _read_checkpoint(path)
    if path.is_dir():
        return _read_folder(path)
    raise MileError(
        f"--mile-emo-cost {path}: expected output-layer, a .npy or .safetensors file, a Hugging "
        "Face folder or a Megatron checkpoint folder"
    )


def _choose(names: list[str], path: Path) -> str:
    """Return the name of the matrix: the only one there is, or one of `_NAMES` in their order."""
    endings = [name for ending in _NAMES for name in names if name.endswith(ending)]
    if not endings and len(names) != 1:
        raise MileError(f"--mile-emo-cost {path} holds no {', '.join(_NAMES)}")
    return endings[0] if endings else names[0]


def _read_safetensors(path: Path, name: str | None = None) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(name or _choose(list(file.keys()), path))
    return found


def _read_folder(path: Path) -> torch.Tensor:
    """Read a Hugging Face folder, of one file or of several with an index."""
    try:
        files = weight_files(path)
    except FileNotFoundError:
        raise MileError(
            f"--mile-emo-cost {path} holds neither {WHOLE} nor its index, and no {TRACKER}; save "
            "the model with safe_serialization=True"
        ) from None
    name = _choose(list(files), path)
    return _read_safetensors(files[name], name)


def _read_checkpoint(path: Path) -> torch.Tensor:
    """Read one tensor of a torch_dist checkpoint, which holds it whole whatever layout wrote it."""
    from megatron_mile.integration.torch_dist import Reader  # the import takes a second

    reader = Reader(path / latest_name(path) if (path / TRACKER).is_file() else path)
    weights = [name for name in reader.tensors if not name.startswith(OF_THE_OPTIMIZER)]
    return reader.tensor(_choose(weights, path))
