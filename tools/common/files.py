"""Files that a tool reads and writes: JSON, and output that is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name to write under, which becomes `path` when the block ends without an error."""
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file, which is whole or not there."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(content: Mapping[str, Any]) -> str:
    """Write JSON as it stands in files that people read."""
    return json.dumps(content, indent=2) + "\n"


@contextmanager
def folder_beside(output: Path) -> Iterator[Path]:
    """Give a folder to write into, from which all or nothing is moved to `output`.

    What is left in it at the end is removed, and so are parents of `output` that were made for it,
    if they are empty.
    """
    partial = partial_path(output.absolute())
    made = [folder for folder in partial.parents if not folder.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
