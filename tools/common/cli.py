"""What the command-line tools of this folder share: how they parse, write and fail.

A tool that is given something it cannot use ends with one line on stderr and a non-zero exit
status: 2 for wrong flags (argparse), 130 after Ctrl-C, 1 for everything else. One whose reader has
gone, as in `tool | head`, ends without a word and with 141, as if SIGPIPE had ended it.
"""

from __future__ import annotations

import argparse
import io
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

CUT_OFF = 141


class ToolError(ValueError):
    """Input that a tool cannot use; the message says what is wrong, where, and what to do."""


class UsageError(ToolError):
    """Flags that do not go together; the tool ends as argparse does."""


@contextmanager
def library_errors() -> Iterator[None]:
    """Turn a `MileError` of the library into a `ToolError`."""
    from megatron_mile.errors import MileError  # the import takes seconds

    try:
        yield
    except MileError as error:
        raise ToolError(str(error)) from error


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


def run_tool(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    *,
    others: str = "",
) -> None:
    """Run a tool from its command line to its end.

    Args:
        parser: from `new_parser`.
        run: takes the parsed flags. What it raises is told as the top of this module says.
        argv: command line; None for that of the process.
        others: name under which `run` gets the flags that the parser does not know; without it
            they are an error.

    Raises:
        SystemExit: the tool did not succeed.
    """
    args, unknown = parser.parse_known_args(argv)
    if others:
        setattr(args, others, unknown)
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    with one_line_errors(parser.prog):
        try:
            run(args)
        except UsageError as error:
            parser.error(str(error))


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
