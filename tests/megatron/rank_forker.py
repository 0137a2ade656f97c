"""Start the ranks of Megatron jobs by fork, from a process that has imported Megatron once.

The import takes longer than a dozen steps of a tiny model. Each rank is a process of its own that
runs the script as `torchrun` would: same environment, gloo over loopback, ordinary exit.

Jobs come as lines of JSON on stdin, {"argv": [script, ...], "world_size", "log": path,
"timeout_s"}; each is answered by its exit code on stdout, that of the first rank that failed.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PRELOADED = ("megatron.training", "megatron.core.models.gpt", "torch.utils.tensorboard")
TIMED_OUT = 124
# Long enough for the other ranks to print the same error.
GRACE_S = 1.0


def main() -> None:
    """Serve jobs until stdin ends; in a rank, run its script and return."""
    sys.path.insert(0, os.environ.get("MILE_UNDER_TEST", str(REPOSITORY)))
    from megatron_mile.integration import cpu

    cpu.enable()
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        rank = serve(job)
        if rank is not None:
            sys.argv = job["argv"]
            sys.path[0] = os.path.dirname(job["argv"][0])
            runpy.run_path(job["argv"][0], run_name="__main__")
            return


def serve(job: dict[str, Any]) -> int | None:
    """Fork the ranks and answer with their exit code; returns the rank in each of them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = set()
    for rank in range(job["world_size"]):
        pid = os.fork()
        if pid == 0:
            become(rank, job, port)
            return rank
        running.add(pid)
    print(wait(running, job["timeout_s"]), flush=True)
    return None


def become(rank: int, job: dict[str, Any], port: int) -> None:
    """Give this process the environment of a rank, and the job's log for its output."""
    size = str(job["world_size"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def wait(running: set[int], timeout_s: float) -> int:
    """Wait for all ranks; once one fails, or time is up, end the others."""
    code, deadline = 0, time.monotonic() + timeout_s
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                deadline = time.monotonic() + GRACE_S
        elif time.monotonic() > deadline:
            code = code or TIMED_OUT
            for alive in running:
                os.kill(alive, signal.SIGKILL)
            deadline += timeout_s
        else:
            time.sleep(0.02)
    return code


if __name__ == "__main__":
    main()
