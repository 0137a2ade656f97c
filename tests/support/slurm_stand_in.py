#!/usr/bin/env python3
"""Stands in for srun, scancel and scontrol on one machine; which one, its file's name says.

srun starts its command once for each "node", all of them here. scancel sends a signal to each of
these and its process group, twice, as when Slurm does so by itself as well; what is below, Slurm's
tracking by cgroups reaches with SIGKILL only. scontrol notes what is requeued. What they share lies
in the folder that SLURM_STAND_IN names. What real Slurm does besides (limits, preemption, --wait,
containers) is not here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["SLURM_STAND_IN"])


def srun(words: list[str]) -> int:
    while words[0].startswith("-"):
        words.pop(0)
    tasks = [
        subprocess.Popen(
            words, env={**os.environ, "SLURM_PROCID": str(rank)}, start_new_session=True
        )
        for rank in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
    ]
    (FOLDER / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    return max(abs(task.wait()) for task in tasks)


def scancel(words: list[str]) -> int:
    assert words == ["--signal=TERM", os.environ["SLURM_JOB_ID"]]
    for group in (FOLDER / "tasks").read_text().split() * 2:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGTERM)
        time.sleep(0.1)
    return 0


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("127.0.0.1")
    else:
        (FOLDER / "requeued").write_text(" ".join(words))
    return 0


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](sys.argv[1:]))
