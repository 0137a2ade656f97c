"""Reads torch_dist checkpoints without unpickling arbitrary objects.

Such a folder is a distributed checkpoint of torch: `.metadata` lists tensors and objects, and the
`.distcp` files hold them. torch 2.13 unpickles `.metadata` and the objects whatever they are. Here
`.metadata` may name the classes below and no others, and objects are what torch's `weights_only`
loading allows.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_DCP = "torch.distributed.checkpoint"
# What the metadata of a checkpoint is made of; dtypes beside them.
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


class _Unpickler(pickle.Unpickler):
    """Knows the classes in which torch describes a checkpoint, and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")


class Reader(dcp.FileSystemReader):
    """torch's reader, with everything read by rule, and `.metadata` once.

    What it raises is of many kinds: those of torch, of zip files and of pickle.
    """

    def __init__(self, folder: Path) -> None:
        """Read `.metadata` of an iteration's folder."""
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            self.metadata: Metadata = _Unpickler(file).load()
        entries = self.metadata.state_dict_metadata.items()
        self.tensors = {k: e for k, e in entries if isinstance(e, TensorStorageMetadata)}
        """Size and dtype by key, of weights and optimizer."""
        self.objects = [key for key, _ in entries if key not in self.tensors]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what was read."""
        return self.metadata

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor whole, whatever layout wrote it, in its own dtype, onto the CPU."""
        self.check([key])
        entry = self.tensors[key]
        target = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._read(key, target)
        return target

    def check(self, keys: Collection[str]) -> None:
        """Compare the checksums of tensors or objects; a wrong one raises UnpicklingError."""
        for index, part in self.metadata.storage_data.items():
            if index.fqn in keys:
                with (Path(self.path) / part.relative_path).open("rb") as file:
                    file.seek(part.offset)
                    _compare_checksums(file.read(part.length))

    def object(self, key: str) -> Any:
        """Read what was stored under a key of `objects`."""
        return self._read(key, None)

    def _read(self, key: str, target: Any) -> Any:
        state = {key: target}
        with one_process():
            dcp.load(state, storage_reader=self, planner=_Planner(), no_dist=True)
        return state[key]


class _Planner(dcp.DefaultLoadPlanner):
    """torch's planner, with objects read by rule."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = load_object(value.read())


def load_object(content: bytes) -> Any:
    """Read an object by torch's rules, after comparing checksums."""
    _compare_checksums(content)
    return torch.load(BytesIO(content), weights_only=True)


def _compare_checksums(content: bytes) -> None:
    """Refuse what is not as it was written; torch writes checksums and does not compare them."""
    with ZipFile(BytesIO(content)) as archive:
        if damaged := archive.testzip():
            raise pickle.UnpicklingError(f"the checksum of {damaged} is wrong")


@contextmanager
def one_process() -> Iterator[None]:
    """Let torch read or write without a process group, and raise the error rather than its report.

    The report of errors by rank, `CheckpointException`, itself is no Exception.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise cause_of(error) from error


def cause_of(error: BaseException) -> BaseException:
    """The first error in torch's report of errors by rank; any other error itself."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error
