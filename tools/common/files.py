"""Files that a tool reads and writes: JSON, and output that is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tools.common.cli import ToolError


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON in UTF-8.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def partial_path(path: Path) -> Path:
    """Return the name beside `path` under which this process writes what becomes `path`."""
    return path.with_name(f"{path.name}.partial.{os.getpid()}")


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name and rename it, so that it is whole or not there."""
    partial = partial_path(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `output` when the block ends without an error.

    Raises:
        ToolError: `output` exists, or its parent does not.
    """
    if os.path.lexists(output):
        raise ToolError(f"--output {output} exists; choose a new folder")
    if not output.absolute().parent.is_dir():
        raise ToolError(f"no folder for --output {output}; make it first")
    partial = partial_path(output.absolute())
    partial.mkdir()
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
