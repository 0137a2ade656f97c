"""The frequency buckets of token ids, as the library reads them, for tools."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_mile.integration.token_frequencies import BUCKETS, assign_buckets, read_frequencies
from tools.common.cli import library_errors

__all__ = ["BUCKETS", "assign_buckets", "load_buckets"]


def load_buckets(path: str | Path) -> np.ndarray:
    """Read the buckets that tools/token_frequency.py wrote.

    Args:
        path: the JSON file.

    Returns:
        Index into `BUCKETS` for each token id, [V], int8.

    Raises:
        ToolError: the file is not what that tool writes, or cannot be read.
    """
    with library_errors():
        return np.array(read_frequencies(path).buckets, dtype=np.int8)
