"""Runs the command-line tools in forks of a process that has imported them once.

Each run is a process of its own with the exit status and the output that a user would see, but
without the seconds that the imports take.

Jobs come as lines of JSON on stdin, {"tool", "flags", "folder", "out", "err", "limits"}; the tool
runs in the folder, with its stdout and stderr in those files. Each is answered on stdout by its
exit status, -9 where it was killed for taking too long.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

TOOLS = Path(__file__).parents[2] / "tools"
NAMES = (
    *("convert_checkpoint", "estimate", "evaluate", "pile_blend", "plot_runs"),
    *("preprocess_data", "token_frequency", "train_tokenizer"),
)
# What the tools import when they need it.
_LATER = (
    *("megatron.training.argument_utils", "megatron.training.global_vars"),
    *("megatron.training.models", "megatron.core.tokenizers.text", "megatron.core.models.gpt"),
    *(
        "megatron.core.tokenizers.utils.build_tokenizer",
        "tools.evaluation.perplexity",
        "tools.evaluation.comparison_picture",
    ),
    *("transformers", "tokenizers"),
)
TIMEOUT_S = 60
MEMORY = 6 << 30
"""Bytes that a run may take; far less than a size that was believed would."""
CUT_OFF = "|"
"""In place of a file: a pipe whose reader has gone."""


class Finished(NamedTuple):
    """How a tool ended."""

    code: int
    out: str
    err: str


class ToolForker:
    """The process that forks, as its user sees it."""

    def __init__(self, folder: Path) -> None:
        """Start it; `folder` is for the output of the tools."""
        self.out, self.err = folder / "out", folder / "err"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "log").open("w"),
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )

    def run(
        self,
        tool: str,
        flags: Sequence[object],
        folder: Path,
        out: str | None = None,
        **limits: int,
    ) -> Finished:
        """Run a tool in a folder.

        Args:
            tool: one of `NAMES`.
            flags: its command line.
            folder: where it runs.
            out: file for its stdout, or `CUT_OFF`; None for one that is read afterwards.
            limits: resource limits by name, such as RLIMIT_FSIZE.
        """
        assert self.process.stdin
        assert self.process.stdout
        self.out.write_text("")
        files = {"out": out or str(self.out), "err": str(self.err)}
        words = [str(flag) for flag in flags]
        job = {"tool": tool, "flags": words, "folder": str(folder), "limits": limits, **files}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Finished(code, *(p.read_text(errors="replace") for p in (self.out, self.err)))

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def main() -> None:
    """Serve jobs until stdin ends; in a fork, run the tool and return."""
    sys.path.insert(0, str(TOOLS.parent))
    from tools.checkpoint.megatron_model import choose_device

    choose_device(cpu=True)
    for name in (*_LATER, *(f"tools.{name}" for name in NAMES)):
        importlib.import_module(name)
    for name in ("", "megatron"):  # set to INFO by the import of training
        logging.getLogger(name).setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(job)
        print(_wait(pid), flush=True)


def _run(job: dict[str, Any]) -> NoReturn:
    """Run the tool and end as Python would, but for the second in which it takes modules apart."""
    code = 1
    try:
        _become(job)
        atexit._clear()
        importlib.import_module(f"tools.{job['tool']}").main(job["flags"])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    gc.collect()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:  # in Python's words
        print(f"Exception ignored in: {sys.stdout!r}\n{error!r}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    os._exit(code)


def _become(job: dict[str, Any]) -> None:
    """Take the place of a process that a shell has started."""
    os.setsid()
    os.chdir(job["folder"])
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(_opened(path), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", errors="backslashreplace")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for name, value in job["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))


def _opened(path: str) -> int:
    if path != CUT_OFF:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _wait(pid: int) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            deadline += TIMEOUT_S
        time.sleep(0.003)


if __name__ == "__main__":
    main()
