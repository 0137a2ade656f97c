"""Reads Megatron's torch_dist checkpoints by the library's rules, and writes them."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_mile.integration.checkpoint_folder import LAST_FILE, OF_THE_OPTIMIZER
from megatron_mile.integration.torch_dist import Reader, load_object, one_process
from tools.checkpoint.stored_args import check_common
from tools.common.cli import ToolError
from tools.common.megatron import megatron_module

# Objects of the run, which no model asks for.
_OF_THE_RUN = (*OF_THE_OPTIMIZER, "rng_state/", "rerun_state_machine_state/")
COMMON, _COMMON_BEFORE_0_19 = "common_state/shard_0_1", "common.pt"


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
            self.reader = Reader(folder)
            self.tensors = self.reader.tensors
            """Size and dtype by key, of weights and optimizer."""
            self.weights = {
                key: tuple(map(int, entry.size))
                for key, entry in self.tensors.items()
                if not key.startswith(_OF_THE_RUN)
            }
            """Sizes of the model's tensors by key."""

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor whole, in its own dtype, onto the CPU."""
        with self._errors():
            return self.reader.tensor(key)

    def common(self) -> dict[str, Any]:
        """Read what Megatron stores beside the tensors: "args", "iteration" and others.

        Raises:
            ToolError: it cannot be read, or is not what `check_common` expects.
        """
        with self._errors():
            if COMMON in self.reader.objects:
                shards = self.reader.object(COMMON)
                common = shards[0] if isinstance(shards, list) and shards else None
            else:
                common = load_object((self.folder / _COMMON_BEFORE_0_19).read_bytes())
        return check_common(self.folder, common, self.weights)

    def check_weights(self) -> None:
        """Compare the checksums of the model's tensors, which Megatron does not.

        Raises:
            ToolError: one is wrong.
        """
        with self._errors():
            self.reader.check(self.weights)

    def check_objects(self) -> None:
        """Read what a model may ask for, so that Megatron may read it after this.

        The name tells nothing: `.metadata` can call an object by the name of a weight.

        Raises:
            ToolError: an object asks for a class that is not safe.
        """
        for key in self.reader.objects:
            if not key.startswith(_OF_THE_RUN):
                with self._errors():
                    self.reader.object(key)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Name the folder in every error; torch, zip and pickle raise their own kinds."""
        try:
            yield
        except Exception as error:
            reason = str(error) or repr(error)
            # torch's own text goes on with the advice to read the object without this guard.
            asked = re.search(r"GLOBAL (\S+)", reason)
            if isinstance(error, pickle.UnpicklingError) and asked:
                reason = f"it asks for {asked[1]}"
            raise ToolError(f"{self.folder}: cannot be read ({reason})") from error


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
    with one_process():
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    content = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (folder / LAST_FILE).write_text(json.dumps(content))
