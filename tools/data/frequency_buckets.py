"""The frequency buckets of token ids: how they are made, and how their file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tools.common.cli import ToolError
from tools.common.files import read_json

BUCKETS = ("high", "medium", "low")
# Percent of all occurrences at which medium and low begin.
BORDERS = (80, 95)


def assign_buckets(counts: np.ndarray) -> np.ndarray:
    """Sort token ids into the three frequency buckets of tools/token_frequency.py.

    Args:
        counts: occurrences [V], int64, not all zero. Up to 9e16 in all, where 100 times the sum
            still fits; the borders are compared in integers, so nothing is rounded.

    Returns:
        Index into `BUCKETS` for each token id, [V], int8.
    """
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    bucket = np.empty(len(counts), dtype=np.int8)
    bucket[order] = sum(before * 100 >= border * counts.sum() for border in BORDERS)
    return bucket


def load_buckets(path: str | Path) -> np.ndarray:
    """Read the buckets that tools/token_frequency.py wrote.

    Args:
        path: the JSON file.

    Returns:
        Index into `BUCKETS` for each token id, [V], int8.

    Raises:
        ToolError: the file is not what that tool writes.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        if _is_whole(content):
            return np.array(content["bucket"], dtype=np.int8)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    raise ToolError(f"{path}: not a token frequency file; make it with tools/token_frequency.py")


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether there is a bucket for each token id, the one that its count gives."""
    bucket, counts = content["bucket"], content["counts"]
    numbers = (content["vocab_size"], content["tokens"], *bucket, *counts)
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and len(bucket) == len(counts) == content["vocab_size"] > 0
        and sum(counts) == content["tokens"] > 0
        and assign_buckets(np.array(counts, dtype=np.int64)).tolist() == bucket
    )
