"""Reads EMO's cost matrix from a file or folder, without unpickling what could run code.

A .npy or .safetensors file, a Hugging Face folder with .safetensors, or a checkpoint folder of
Megatron (torch_dist) or the folder of one of its iterations. In a folder the output layer's weight
is taken, or where there is none the word embeddings, which are then tied to it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_mile.errors import MileError

# Endings of the names that output layers, then word embeddings have.
_NAMES: tuple[str, ...] = ("lm_head.weight", "embed_out.weight", "output_layer.weight")
_NAMES += ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_TRACKER = "latest_checkpointed_iteration.txt"
_DCP = "torch.distributed.checkpoint"
# What the metadata of a checkpoint is made of.
_DESCRIPTIONS = {
    "collections": ("OrderedDict", "defaultdict"),
    "pathlib": ("PosixPath",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    f"{_DCP}.metadata": (
        *("Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_DCP}.filesystem": ("_StorageInfo",),
    f"{_DCP}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}


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
    if (path / _TRACKER).is_file() or (path / "metadata.json").is_file():
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
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        name = _choose(list(files), path)
        return _read_safetensors(path / files[name], name)
    if not (path / "model.safetensors").is_file():
        raise MileError(
            f"--mile-emo-cost {path} holds neither model.safetensors nor its index, and no "
            f"{_TRACKER}; save the model with safe_serialization=True"
        )
    return _read_safetensors(path / "model.safetensors")


def _read_checkpoint(path: Path) -> torch.Tensor:
    """Read one tensor of a torch_dist checkpoint, which holds it whole whatever layout wrote it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if (path / _TRACKER).is_file():
        iteration = (path / _TRACKER).read_text(encoding="utf-8").strip()
        path /= f"iter_{int(iteration):07d}" if iteration != "release" else iteration

    class Reader(dcp.FileSystemReader):
        """Reads the metadata, which is a pickle, with the classes that it needs and no other."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / ".metadata").open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            return metadata

    reader = Reader(str(path))
    held = reader.read_metadata().state_dict_metadata
    tensors = {name: x for name, x in held.items() if isinstance(x, TensorStorageMetadata)}
    weights = [name for name in tensors if not name.startswith(("optimizer", "chained_"))]
    name = _choose(weights, path)
    state = {name: torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes in which torch describes a checkpoint, and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class by name.

        Raises:
            pickle.UnpicklingError: It is not one of those that describe a checkpoint.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata names {module}.{name}, which is refused")
