"""Start the ranks of Megatron jobs by fork, from a process that has imported Megatron once.

The import takes longer than a dozen steps of a tiny model. Each rank is a process of its own that
runs the script as `torchrun` would: same environment, gloo over loopback, ordinary exit.

Jobs come as lines of JSON on stdin, {"argv": [script, ...], "logs": [path of each rank],
"timeout_s"}; each is answered on stdout by its exit code, that of the first rank that failed.
"""

from __future__ import annotations

import contextlib
import gc
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

PRELOADED = (
    "megatron.training",
    "megatron.core.models.gpt",
    "megatron.core.tokenizers.text",  # and with it transformers
    "torch.utils.tensorboard",
)
TIMED_OUT = 124
# Long enough for the other ranks to fail by themselves with the same error.
GRACE_S = 1.0


def main() -> None:
    """Serve jobs until stdin ends; in a rank, run its script and return."""
    tests = Path(__file__).resolve().parents[1]
    sys.path[0] = str(tests.parent)
    sys.path.append(str(tests))  # for tests/support
    from megatron_mile import cpu_mode

    cpu_mode.enable()
    for name in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # wheels before 0.17 lack megatron.training
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the ranks would touch, and so copy, all that was imported
    for line in sys.stdin:
        job = json.loads(line)
        if start(job):
            sys.argv = job["argv"]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            if "--save" in sys.argv:
                fork_save_helper()
            runpy.run_path(sys.argv[0], run_name="__main__")
            return


def start(job: dict[str, Any]) -> bool:
    """Fork the ranks and answer with their exit code; True in a rank, False in this process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = set()
    for rank in range(len(job["logs"])):
        pid = os.fork()
        if pid == 0:
            become(rank, job["logs"], port)
            return True
        running.add(pid)
    print(wait(running, job["timeout_s"]), flush=True)
    return False


def become(rank: int, logs: list[str], port: int) -> None:
    """Give this process a session and the environment of a rank, its log for stdout and stderr."""
    os.setsid()
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(rank)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(len(logs))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(logs[rank], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)


def fork_save_helper() -> None:
    """Fork the process that holds a queue for Megatron's saves; a spawned one imports all again."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async.get_write_results_queue("fork")


def wait(running: set[int], timeout_s: float) -> int:
    """Wait for all ranks; once one has failed, or time is up, end the others."""
    code, deadline = 0, time.monotonic() + timeout_s
    try:
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                running.discard(pid)
                end(pid)  # what a killed rank has left behind
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
    finally:
        for alive in running:  # after Ctrl-C
            end(alive)
    return code


def end(rank: int) -> None:
    """Kill all processes of a rank's session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank, signal.SIGKILL)


if __name__ == "__main__":
    main()
