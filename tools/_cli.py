"""What the command-line tools of this folder share: how they parse, write and fail.

A tool that is given something it cannot use ends with one line on stderr and a non-zero exit
status: 2 for wrong flags (argparse), 130 after Ctrl-C, 1 for everything else. One whose reader has
gone, as in `tool | head`, ends without a word and with 141, as if SIGPIPE had ended it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

CUT_OFF = 141


class ToolError(ValueError):
    """Input that a tool cannot use; the message says what is wrong, where, and what to do."""


class _Parser(argparse.ArgumentParser):
    """argparse's, whose --help may be cut off."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _end_output()
        super().exit(status, message)


def new_parser(prog: str, text: str | None) -> argparse.ArgumentParser:
    """Make a parser that shows a module's docstring as it is, and takes whole flag names only."""
    return _Parser(
        prog=prog,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


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


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn `ToolError`, `OSError`, lack of memory and Ctrl-C into one line and an exit status.

    Any other exception is a defect of the tool and keeps its traceback.

    Args:
        prog: name that the line starts with, such as `tools/preprocess_data.py`.

    Raises:
        SystemExit: with 1 for an error, 130 for Ctrl-C, `CUT_OFF` where nobody reads the output.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files are any bytes
    try:
        yield
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()  # when Python does it, at its end, a failure is told at length
        return
    except ToolError as error:
        message, status = str(error), 1
    except MemoryError as error:
        message, status = f"out of memory: {error}".removesuffix(": "), 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"{where}{error.strerror or error}", 1
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            message, status = "", CUT_OFF
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    _end_output()
    if message:
        print(f"{prog}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(status)


def _end_output() -> None:
    """Bring out what was printed, or drop it: Python would try again and tell of it at length."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_has_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
