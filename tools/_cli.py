"""What the command-line tools of this folder share: how they parse, write and fail.

A tool that is given something it cannot use ends with one line on stderr and a non-zero exit
status: 2 for wrong flags (argparse), 130 after Ctrl-C, 1 for everything else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ToolError(ValueError):
    """Input that a tool cannot use; the message says what is wrong, where, and what to do."""


def new_parser(prog: str, text: str | None) -> argparse.ArgumentParser:
    """Make a parser that shows a module's docstring as it is, and takes whole flag names only."""
    return argparse.ArgumentParser(
        prog=prog,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file under a temporary name and rename it, so that it is whole or not there."""
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `output` when the block ends without an error.

    Raises:
        ToolError: `output` exists, or its parent does not.
    """
    if output.exists():
        raise ToolError(f"--output {output} exists; choose a new folder")
    if not output.absolute().parent.is_dir():
        raise ToolError(f"no folder for --output {output}; make it first")
    partial = output.absolute().with_name(f"{output.name}.partial.{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn `ToolError`, `OSError` and Ctrl-C into one line on stderr and an exit status.

    Any other exception is a defect of the tool and keeps its traceback.

    Args:
        prog: name that the line starts with, such as `tools/preprocess_data.py`.

    Raises:
        SystemExit: with 1 for an error, 130 for Ctrl-C.
    """
    try:
        yield
    except ToolError as error:
        message, status = str(error), 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"{where}{error.strerror or error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return
    print(f"{prog}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(status)
