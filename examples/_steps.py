"""Runs the quickstart's steps: child processes whose output goes to a log file each.

A child is never left behind: when the quickstart fails or is interrupted, the child that runs is
asked to end (torchrun then ends its workers), and killed if it does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from _corpus import QuickstartError

TAIL_LINES = 12
POLL_SECONDS = 0.2
# Longer than torchrun gives its workers before it kills them.
GRACE_SECONDS = 45.0
# Where torchrun begins to report that a worker failed; the worker's own words stand above.
_TORCHRUN_REPORT = "torch/distributed/elastic/multiprocessing/api.py"


class StepError(QuickstartError):
    """A step ended with an error; the message holds the end of its log."""


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn errors of the user's and of steps, and signals, into a line on stderr and a status.

    Args:
        prog: name that the line starts with.

    Raises:
        SystemExit: with 1 for an error, 130 for Ctrl-C and for a request to terminate.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        yield
        return
    except QuickstartError as error:
        message, status = str(error), 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message, status = f"{where}{error.strerror or error}", 1
    except KeyboardInterrupt:
        message, status = "interrupted; the run's folder is incomplete", 130
    print(f"\n{prog}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Let a signal end the process as Ctrl-C does, children first."""
    raise KeyboardInterrupt


class Stages:
    """Announces the stages of the quickstart by number, and how long each took."""

    def __init__(self, total: int) -> None:
        """Expect `total` stages."""
        self.total, self.begun = total, 0

    @contextmanager
    def __call__(self, title: str) -> Iterator[list[str]]:
        """Run one stage.

        Yields:
            A list; what is put into it is printed beside the time.
        """
        self.begun += 1
        notes: list[str] = []
        print(f"[{self.begun}/{self.total}] {title}", flush=True)
        started = time.monotonic()
        yield notes
        print("      " + "  ".join([f"{time.monotonic() - started:.1f} s", *notes]), flush=True)


def torchrun(processes: int) -> list[str]:
    """Return the words that start a script, named next, as so many ranks on this machine."""
    # Loopback only; port 0 lets the system choose a free one.
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [*words, "--local-addr", "127.0.0.1"]


def run(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    follow: Callable[[str], object] = lambda line: None,
) -> None:
    """Run one step to its end.

    Args:
        command: program and arguments.
        log: file that receives all output of the child.
        env: environment variables to add to the process's own.
        follow: called with each line of output soon after it is written.

    Raises:
        StepError: the child ended with a status other than 0.
    """
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches the quickstart alone, which ends the child
        )
    try:
        for line in _lines(child, log):
            follow(line)
    except BaseException:
        _end(child)
        raise
    if child.returncode:
        raise StepError(
            f"{log.stem} failed with status {child.returncode}; the end of {log}:\n" + _tail(log)
        )


def _lines(child: subprocess.Popen[bytes], log: Path) -> Iterator[str]:
    """Yield the lines of a log while its child writes them."""
    rest, running = "", True
    with log.open(encoding="utf-8", errors="replace") as file:
        while running:
            try:
                child.wait(POLL_SECONDS)
                running = False
            except subprocess.TimeoutExpired:
                pass
            *lines, rest = (rest + file.read()).split("\n")
            yield from lines


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child and what belongs to its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            os.killpg(child.pid, number)
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                continue


def _tail(log: Path) -> str:
    """Return the last lines of a log, without torchrun's report that a worker failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    report = next((i for i, line in enumerate(lines) if _TORCHRUN_REPORT in line), len(lines))
    return "\n".join("    " + line for line in lines[:report][-TAIL_LINES:])
