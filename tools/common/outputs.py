"""Looks, before any work is done, at the place where a tool is to write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.common.cli import ToolError
from tools.common.files import folder_beside, partial_path


def output_file(flag: str, path: str | Path, inputs: Iterable[str | Path]) -> Path:
    """Check that a file can be written, and that it is none of the tool's inputs.

    Args:
        flag: that names the file, for messages.
        path: the file, which `write_whole` will make or replace.
        inputs: files that the tool reads, and folders, which stand for every file below them.

    Returns:
        The path without symbolic links: the file behind a link is written, the link stays.

    Raises:
        ToolError: it is a folder, a device or an input by whatever name, or cannot be made there.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        raise ToolError(f"{flag} {path} is a folder; name a file")
    if os.path.lexists(real) and not real.is_file():
        raise ToolError(f"{flag} {path} is no regular file; name another")
    keep_inputs(flag, [real], inputs)
    if not real.parent.is_dir():
        raise ToolError(f"no folder for {flag} {path}; make it first")
    _try(flag, real)
    return real


def output_place(flag: str, path: str | Path) -> None:
    """Check that a file or a folder can be made whose parents may still be missing.

    Raises:
        ToolError: a file stands where a folder is needed, or nothing can be made there.
    """
    place = Path(os.path.abspath(path)).parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ToolError(f"{flag} {path}: {place} is no folder; choose another place")
    _try(flag, place / Path(path).name)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `output` when the block ends without an error.

    Raises:
        ToolError: `output` exists, or it or its parents cannot be made.
    """
    if os.path.lexists(output):
        raise ToolError(f"--output {output} exists; choose a new folder")
    output_place("--output", output)
    with folder_beside(output) as folder:
        yield folder
        folder.rename(output)


def keep_inputs(flag: str, outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Check that no output is an input, neither by its own name nor through a link.

    Args:
        flag: that names the outputs, for messages.
        outputs: files to be written.
        inputs: as for `output_file`.

    Raises:
        ToolError: one is.
    """
    written = {_identity(path): path for path in outputs if path.exists()}
    for file in _files(inputs) if written else ():
        if file.exists() and (path := written.get(_identity(file))):
            raise ToolError(f"{flag} would write over the input {file} (as {path}); name another")


def _identity(path: Path) -> tuple[int, int]:
    """What all names of one file have in common: its device and inode."""
    state = path.stat()
    return state.st_dev, state.st_ino


def _files(inputs: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, inputs):
        if not path.is_dir():
            yield path
        for folder, _, names in os.walk(path):
            yield from (Path(folder, name) for name in names)


def _try(flag: str, path: Path) -> None:
    """Make a file beside `path`, which has no name and so cannot be left there."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        with suppress(FileNotFoundError):
            partial_path(path).lstat()  # its name may be too long
    except OSError as error:
        reason = f"{path.parent} ({error.strerror})"
        raise ToolError(f"{flag}: no file can be made in {reason}; choose another place") from error
