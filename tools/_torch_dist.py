"""Reads and writes Megatron's torch_dist checkpoints without unpickling arbitrary objects.

Such a folder is a distributed checkpoint of torch: `.metadata` lists tensors and objects, the
`.distcp` files hold them, and Megatron's `metadata.json`, written last, says that all is there.
torch 2.13 unpickles `.metadata` and the objects whatever they are. Here `.metadata` may name the
classes below and no others, and objects are what torch's `weights_only` loading and Megatron's list
of safe classes allow.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
import torch.distributed.checkpoint as dcp
from _cli import ToolError
from _megatron import megatron_module
from _stored_args import check_common
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

# Written last, so that a folder with it is whole; Megatron looks for it too.
LAST_FILE = "metadata.json"
EXTRA_STATE = "._extra_state/"
# Objects of the run, which no model asks for.
_OF_THE_RUN = ("optimizer.", "chained_", "rng_state/", "rerun_state_machine_state/")
COMMON, _COMMON_BEFORE_0_19 = "common_state/shard_0_1", "common.pt"
_DCP = "torch.distributed.checkpoint"
_METADATA_CLASSES = {
    "argparse": {"Namespace"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath"},
    "torch": {"Size", *(name for name, kind in vars(torch).items() if type(kind) is torch.dtype)},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorProperties"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's reader, with `.metadata` read once and by rule."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            self.metadata: Metadata = _Unpickler(file).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def check(self, keys: Collection[str]) -> None:
        """Compare the checksums of tensors or objects."""
        for index, part in self.metadata.storage_data.items():
            if index.fqn in keys:
                with (Path(self.path) / part.relative_path).open("rb") as file:
                    file.seek(part.offset)
                    _compare_checksums(file.read(part.length))


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """torch's planner, with objects read by rule."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = _load(value.read())


def _load(content: bytes) -> Any:
    """Read an object by torch's rules, after comparing checksums."""
    _compare_checksums(content)
    return torch.load(BytesIO(content), weights_only=True)


def _compare_checksums(content: bytes) -> None:
    """Refuse what is not as it was written; torch writes checksums and does not compare them."""
    with ZipFile(BytesIO(content)) as archive:
        if damaged := archive.testzip():
            raise pickle.UnpicklingError(f"the checksum of {damaged} is wrong")


class Checkpoint:
    """The tensors and objects of one iteration's folder."""

    def __init__(self, folder: Path) -> None:
        """Read what the folder holds.

        Raises:
            ToolError: it is not a whole torch_dist checkpoint, or asks for other classes.
        """
        self.folder = folder
        with self._errors():
            megatron_module("megatron.core.safe_globals").register_safe_globals()
            if json.loads((folder / LAST_FILE).read_text())["sharded_backend"] != "torch_dist":
                raise ToolError("expected --ckpt-format torch_dist")
            self._reader = _Reader(folder)
            entries = self._reader.metadata.state_dict_metadata.items()
            self.tensors = {k: e for k, e in entries if isinstance(e, TensorStorageMetadata)}
            """Size and dtype by key, of weights and optimizer."""
            self._objects = [key for key, _ in entries if key not in self.tensors]
            self.weights = {
                key: tuple(map(int, entry.size))
                for key, entry in self.tensors.items()
                if not key.startswith(_OF_THE_RUN)
            }
            """Sizes of the model's tensors by key."""

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor whole, in its own dtype, onto the CPU."""
        entry = self.tensors[key]
        with self._errors():
            self._reader.check([key])
            target = torch.empty(entry.size, dtype=entry.properties.dtype)
        self._read(key, target)
        return target

    def common(self) -> dict[str, Any]:
        """Read what Megatron stores beside the tensors: "args", "iteration" and others.

        Raises:
            ToolError: it cannot be read, or is not what `check_common` expects.
        """
        if COMMON in self._objects:
            shards = self._read(COMMON, None)
            common = shards[0] if isinstance(shards, list) and shards else None
        else:
            with self._errors():
                common = _load((self.folder / _COMMON_BEFORE_0_19).read_bytes())
        return check_common(self.folder, common, self.weights)

    def check_weights(self) -> None:
        """Compare the checksums of the model's tensors, which Megatron does not.

        Raises:
            ToolError: one is wrong.
        """
        with self._errors():
            self._reader.check(self.weights)

    def check_objects(self) -> None:
        """Read what a model may ask for, so that Megatron may read it after this.

        The name tells nothing: `.metadata` can call an object by the name of a weight.

        Raises:
            ToolError: an object asks for a class that is not safe.
        """
        for key in self._objects:
            if not key.startswith(_OF_THE_RUN):
                self._read(key, None)

    def _read(self, key: str, target: Any) -> Any:
        state, planner = {key: target}, _LoadPlanner()
        with self._errors(), _one_process():
            dcp.load(state, storage_reader=self._reader, planner=planner, no_dist=True)
        return state[key]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Name the folder in every error; torch, zip and pickle raise their own kinds."""
        try:
            yield
        except (Exception, CheckpointException) as error:
            cause = cause_of(error)
            reason = str(cause) or repr(cause)
            # torch's own text goes on with the advice to read the object without this guard.
            asked = re.search(r"GLOBAL (\S+)", reason)
            if isinstance(cause, pickle.UnpicklingError) and asked:
                reason = f"it asks for {asked[1]}"
            raise ToolError(f"{self.folder}: cannot be read ({reason})") from error


def cause_of(error: BaseException) -> BaseException:
    """The error in torch's report of errors by rank, which itself is no Exception."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


@contextmanager
def _one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class _SavePlanner(dcp.DefaultSavePlanner):
    """torch's planner, which makes a tensor when it is written and not before."""

    def __init__(self, make: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.make = make

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        return self.make(write_item.index.fqn)


def write_checkpoint(
    folder: Path,
    sizes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    make: Callable[[str], torch.Tensor],
    objects: Mapping[str, Any],
) -> None:
    """Write the folder of one iteration.

    Args:
        folder: made by this; its parent is there.
        sizes: of the tensors, by key.
        dtype: of the tensors.
        make: gives a tensor by its key; called for one after the other, so that they need not all
            be in memory.
        objects: what else there is, by key, with `COMMON` among it.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir()
    # On the meta device tensors have no data; Megatron stores an object as a list of its shards.
    tensors = {key: torch.empty(size, dtype=dtype, device="meta") for key, size in sizes.items()}
    state = {**tensors, **{key: [value] for key, value in objects.items()}}
    writer, planner = dcp.FileSystemWriter(folder), _SavePlanner(make)
    try:
        with _one_process():
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:
        raise cause_of(error) from error
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / LAST_FILE).write_text(json.dumps(content))
