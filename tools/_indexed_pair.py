"""Writes a Megatron dataset, PREFIX.bin and PREFIX.idx, as a pair that is whole or not there."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from _megatron import megatron_module


class IndexedPairWriter:
    """Context manager around megatron.core's IndexedDatasetBuilder that survives interruption.

    Megatron takes a dataset for whole when both files exist, so while this writer is at work there
    is no PREFIX.idx: one of an earlier run is set aside on entry. Tokens go to a temporary file in
    the same folder; `commit` brings both to disk and renames them, the .idx last. Leaving without
    `commit` removes what was written and puts the earlier .idx back beside its untouched .bin.
    After `kill -9` there is none, and the next writer clears the temporary files away.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        """Name the files.

        Args:
            prefix: path of the pair without suffix.
            vocab_size: number of token ids; below 65500 Megatron stores 2 bytes a token, else 4.
        """
        self.prefix = prefix
        self.tokens = 0
        self.documents = 0
        self._dataset = megatron_module("megatron.core.datasets.indexed_dataset")
        self.dtype: type[np.number] = self._dataset.DType.optimal_dtype(vocab_size)
        self._bin, self._idx = Path(prefix + ".bin"), Path(prefix + ".idx")
        # The process id keeps two runs with one prefix from writing into the same file.
        self._partial_bin = Path(f"{self._bin}.partial.{os.getpid()}")
        self._partial_idx = Path(f"{self._idx}.partial.{os.getpid()}")
        self._earlier_idx = Path(f"{self._idx}.earlier")
        self._builder: Any = None

    def __enter__(self) -> IndexedPairWriter:
        """Clear leftovers, open the temporary file and set an earlier .idx aside."""
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        for leftover in glob.glob(f"{glob.escape(self.prefix)}.???.partial.*"):
            os.unlink(leftover)
        self._builder = self._dataset.IndexedDatasetBuilder(str(self._partial_bin), self.dtype)
        if self._idx.exists():
            self._idx.replace(self._earlier_idx)
        return self

    def add(self, ids: np.ndarray, lengths: list[int]) -> None:
        """Append one document.

        Args:
            ids: token ids [n], every one below the vocabulary size.
            lengths: tokens of each of its sequences, summing to n; Megatron draws its samples from
                sequences, and a document normally is one.
        """
        self._builder.add_document(ids, lengths)
        self.tokens += len(ids)
        self.documents += 1

    def commit(self) -> None:
        """Make the pair whole; from here on it replaces an earlier one."""
        self._builder.finalize(str(self._partial_idx))
        _sync(self._partial_bin)
        _sync(self._partial_idx)
        # Belongs to the .bin that the next line replaces.
        self._earlier_idx.unlink(missing_ok=True)
        for partial, final in ((self._partial_bin, self._bin), (self._partial_idx, self._idx)):
            partial.replace(final)
            _sync(final.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove temporary files and, if there was no commit, bring back the earlier pair."""
        self._builder.data_file.close()
        self._partial_bin.unlink(missing_ok=True)
        self._partial_idx.unlink(missing_ok=True)
        if self._earlier_idx.exists() and self._bin.exists():
            self._earlier_idx.replace(self._idx)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
