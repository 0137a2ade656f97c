#!/usr/bin/env python3
"""Stands in for srun, scancel and scontrol on one machine; which one, its file's name says.

srun starts its command once for each "node", all of them here. scancel sends a signal to every
process below srun, as Slurm does to a step. scontrol notes what is requeued. What they share lies
in the folder that SLURM_STAND_IN names. What real Slurm does besides (limits, preemption, --wait,
containers) is not here.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

FOLDER = Path(os.environ["SLURM_STAND_IN"])


def srun(words: list[str]) -> int:
    while words[0].startswith("-"):
        words.pop(0)
    (FOLDER / "srun.pid").write_text(str(os.getpid()))
    tasks = [
        subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(rank)})
        for rank in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
    ]
    return max(abs(task.wait()) for task in tasks)


def scancel(words: list[str]) -> int:
    assert words == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
    step = psutil.Process(int((FOLDER / "srun.pid").read_text()))
    for process in step.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    return 0


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1")
    else:
        (FOLDER / "requeued").write_text(" ".join(words))
    return 0


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](sys.argv[1:]))
