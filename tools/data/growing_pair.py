"""One Megatron dataset, PREFIX.bin and PREFIX.idx, while it grows and when it is published."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tools.common.cli import ToolError
from tools.common.megatron import megatron_module

_BLOCK = 1 << 20


class Part(NamedTuple):
    """Some documents of a pair."""

    ids: np.ndarray
    """Tokens of all sequences, [n], in the type of the .bin."""
    lengths: np.ndarray
    """Tokens of each sequence, int32; Megatron draws its samples from sequences."""
    sequences: np.ndarray
    """Sequences of each document, int32: normally 1."""


class Sizes(NamedTuple):
    """How much a pair holds."""

    tokens: int = 0
    sequences: int = 0
    documents: int = 0


class GrowingPair:
    """A pair in the making: three files that only grow, until they become .bin and .idx.

    STEM.bin holds the tokens, STEM.lengths and STEM.sequences the other fields of `Part`. Whatever
    has been written after the last `flush` that the caller took note of is cut off by the next
    start.
    """

    def __init__(self, stem: Path, dtype: type[np.number], sizes: Sizes) -> None:
        """Open the files.

        Args:
            stem: path of the files without suffix.
            dtype: of the tokens.
            sizes: what the files are known to hold; anything behind it is cut off.

        Raises:
            ToolError: a file holds less.
        """
        self.sizes = sizes
        self._files = [_open_at(*file) for file in _bytes_by_file(stem, dtype, sizes).items()]

    def add(self, part: Part) -> None:
        """Append documents."""
        for file, values in zip(self._files, part, strict=True):
            file.write(values.tobytes())
        self.sizes = Sizes(*(have + len(new) for have, new in zip(self.sizes, part, strict=True)))

    def flush(self) -> None:
        """Bring the files to disk."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _bytes_by_file(stem: Path, dtype: type[np.number], sizes: Sizes) -> dict[Path, int]:
    """Return how much each file of a `GrowingPair` holds, in the order of `Part`."""
    each = {".bin": np.dtype(dtype).itemsize, ".lengths": 4, ".sequences": 4}
    names = (stem.with_name(stem.name + suffix) for suffix in each)
    bytes_ = (count * size for count, size in zip(sizes, each.values(), strict=True))
    return dict(zip(names, bytes_, strict=True))


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for appending after `size` bytes."""
    file = path.open("ab")
    held = os.fstat(file.fileno()).st_size
    if held < size:
        file.close()
        raise ToolError(
            f"{path}: {held} bytes, but {size} were finished; remove {path.parent} and start anew"
        )
    file.truncate(size)
    return file


def publish(stem: Path, prefix: str, dtype: type[np.number], sizes: Sizes, info: str) -> None:
    """Turn the closed files of a `GrowingPair` into PREFIX.bin, .idx and .info, or finish doing so.

    The .idx comes last and an earlier one goes first, so that at every moment .idx and .bin belong
    together, or there is no .idx. A publication that was killed is completed by another call.

    Args:
        stem: path of the growing files without suffix.
        prefix: path of the pair without suffix, on the same file system.
        dtype: of the tokens.
        sizes: what the files hold.
        info: content of PREFIX.info.

    Raises:
        ToolError: a file of the `GrowingPair` is missing or damaged.
    """
    grown, index = stem.with_name(stem.name + ".bin"), stem.with_name(stem.name + ".idx")
    final = Path(prefix + ".idx")
    if grown.exists():
        for path, size in _bytes_by_file(stem, dtype, sizes).items():
            if path.stat().st_size != size:
                raise _damaged(path)
        _write_index(stem, index, dtype, sizes)
        final.unlink(missing_ok=True)
        sync_folder(final.parent)
        grown.replace(prefix + ".bin")
    if index.exists():
        note = stem.with_name(stem.name + ".info")
        note.write_text(info, encoding="utf-8")
        note.replace(prefix + ".info")
        sync_folder(final.parent)
        index.replace(final)
        sync_folder(final.parent)
    if not final.exists():
        raise _damaged(grown)


def _damaged(path: Path) -> ToolError:
    return ToolError(f"{path}: damaged or lost; remove {path.parent} and start anew")


def _write_index(stem: Path, index: Path, dtype: type[np.number], sizes: Sizes) -> None:
    """Write an .idx block by block; raise `ToolError` where lengths and sizes contradict."""
    from megatron_mile.run_record.data_files import IndexHead  # the import takes seconds

    kinds = megatron_module("megatron.core.datasets.indexed_dataset").DType
    lengths, sequences = (stem.with_name(stem.name + end) for end in (".lengths", ".sequences"))
    head = IndexHead(kinds.code_from_dtype(dtype), sizes.sequences, sizes.documents + 1)
    with index.open("wb") as file:
        file.write(head.pack())
        for block in _blocks(lengths):
            file.write(block.tobytes())
        start = 0
        for block in _blocks(lengths):
            ends = start + np.cumsum(block, dtype=np.int64) * np.dtype(dtype).itemsize
            file.write(np.concatenate(([start], ends[:-1])).tobytes())
            start = int(ends[-1])
        if start != sizes.tokens * np.dtype(dtype).itemsize:
            raise _damaged(lengths)
        file.write(np.int64(0).tobytes())
        start = 0
        for block in _blocks(sequences):
            ends = start + np.cumsum(block, dtype=np.int64)
            file.write(ends.tobytes())
            start = int(ends[-1])
        if start != sizes.sequences:
            raise _damaged(sequences)
        file.flush()
        os.fsync(file.fileno())


def _blocks(path: Path) -> Iterator[np.ndarray]:
    """Read the int32 values of a file a block at a time."""
    with path.open("rb") as file:
        while content := file.read(4 * _BLOCK):
            yield np.frombuffer(content, dtype=np.int32)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
