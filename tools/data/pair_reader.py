"""Opens .bin/.idx pairs of Megatron's after looking whether they are whole."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tools.common.cli import ToolError
from tools.common.megatron import megatron_module

SUFFIXES = (".idx", ".bin", ".info")
_BLOCK = 1 << 20


def files_of(prefix: str) -> list[Path]:
    """List the files of a pair, which need not be there."""
    return [Path(prefix + suffix) for suffix in SUFFIXES]


def open_pair(prefix: str) -> tuple[Any, int]:
    """Open a pair.

    Args:
        prefix: path of the pair without suffix.

    Returns:
        Megatron's IndexedDataset, read without a memory map, and its number of tokens.

    Raises:
        ToolError: a file is missing, damaged or cut short, or holds no whole numbers.
    """
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            raise ToolError(
                f"no file {prefix}{suffix}; --data-prefix is the path without .bin or .idx, and an"
                " interrupted preprocessing leaves no .idx"
            )
    _check_index(Path(prefix + ".idx"))
    module = megatron_module("megatron.core.datasets.indexed_dataset")
    # Plain reads instead of a memory map: memory stays at one block.
    dataset = module.IndexedDataset(prefix, mmap=False)
    tokens = int(dataset.index.sequence_lengths.sum(dtype=np.int64))
    held, expected = os.path.getsize(prefix + ".bin"), tokens * dataset.index.dtype_size
    if held != expected:
        raise ToolError(
            f"{prefix}.bin: {held} bytes, but its .idx describes {expected}; preprocess it again"
        )
    return dataset, tokens


def _check_index(path: Path) -> None:
    """Refuse an index that Megatron's reader would fail on at length, or read as something else."""
    from megatron_mile.run_record.data_files import INDEX_HEAD_BYTES

    dtype, sequences, documents = _header(path)
    content, start = np.memmap(path, mode="r"), INDEX_HEAD_BYTES
    lengths = np.frombuffer(content, np.int32, sequences, start)
    starts = np.frombuffer(content, np.int64, sequences, start + 4 * sequences)
    borders = np.frombuffer(content, np.int64, documents, start + 12 * sequences)
    if not (_follow(lengths, starts, dtype.itemsize) and _divide(borders, sequences)):
        raise ToolError(f"{path}: damaged; preprocess the data again")


def _header(path: Path) -> tuple[np.dtype, int, int]:
    """Read the type of the tokens, the number of sequences, and that of documents plus 1."""
    from megatron_mile.run_record.data_files import INDEX_HEAD_BYTES, IndexHead

    broken = ToolError(f"{path}: not a whole Megatron index; preprocess the data again")
    try:
        with path.open("rb") as file:
            head = IndexHead.read(file)
    except struct.error:
        raise broken from None
    if head is None or head.version != 1 or not head.borders:
        raise broken
    size = INDEX_HEAD_BYTES + head.sequences * (4 + 8) + head.borders * 8
    # A multimodal index has one more byte for each sequence.
    if path.stat().st_size not in (size, size + head.sequences):
        raise broken
    kinds = megatron_module("megatron.core.datasets.indexed_dataset").DType
    known = {kind.value: kind.name for kind in kinds if "int" in kind.name}
    if head.kind not in known:
        names = ", ".join(f"{value} for {name}" for value, name in sorted(known.items()))
        raise ToolError(
            f"{path}: the type of its tokens is {head.kind}; expected {names}; preprocess it again"
        )
    return np.dtype(known[head.kind]), head.sequences, head.borders


def _follow(lengths: np.ndarray, starts: np.ndarray, token: int) -> bool:
    """Whether each sequence begins where the one before it ends, in bytes."""
    end = 0
    for first in range(0, len(lengths), _BLOCK):
        block = slice(first, first + _BLOCK)
        ends = end + np.cumsum(lengths[block], dtype=np.int64) * token
        if lengths[block].min() < 0 or starts[first] != end:
            return False
        if not np.array_equal(starts[block][1:], ends[:-1]):
            return False
        end = ends[-1]
    return True


def _divide(borders: np.ndarray, sequences: int) -> bool:
    """Whether the borders of documents go from the first sequence to the last, and never back."""
    blocks = range(0, len(borders), _BLOCK)
    rising = all((np.diff(borders[first : first + _BLOCK + 1]) >= 0).all() for first in blocks)
    return (borders[0], borders[-1]) == (0, sequences) and rising
