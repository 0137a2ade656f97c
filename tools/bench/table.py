"""A benchmark's table: a CSV file with fixed columns that each run appends to."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.common.cli import ToolError
from tools.common.files import write_whole


def append(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to the CSV file, which is at every moment whole.

    Raises:
        ToolError: the file has other columns.
    """
    before = read_whole(path, columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    write_whole(path, before + text.getvalue())


def read_whole(path: Path, columns: Sequence[str]) -> str:
    """Return the file's text, "" if there is none.

    Raises:
        ToolError: it has other columns.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and text.splitlines()[0] != ",".join(columns):
        raise ToolError(f"--output {path} has other columns than this tool; name another file")
    return text


def _cell(value: Any) -> Any:
    """Return what is written: four digits of a measured number, nothing for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return value
