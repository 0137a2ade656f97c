"""The launch scripts start real training: the 468M model itself, and a job that Slurm stops."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from training_runs import HERE, REPOSITORY, TIMEOUT_S, environment, read_scalars

SCRIPT = "examples/sizes/468m.sh"
# What wins over the script's own flags: a model of no size, or less work for the whole one.
STEPS = 60
TINY = (
    "--mile-cpu --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 "
    "--seq-length 64 --max-position-embeddings 64 --vocab-size 256 --micro-batch-size 2 "
    f"--global-batch-size 2 --train-iters {STEPS} --lr-warmup-iters 1 --log-interval 1 "
    "--eval-iters 0 --num-workers 1"
)
REDUCED = (
    "--mile-cpu --seq-length 64 --global-batch-size 1 --train-iters 2 --lr-warmup-iters 1 "
    "--log-interval 1 --eval-iters 0 --num-workers 0 --save= --load="
)
NEEDED_GIB = 12

pytestmark = pytest.mark.slow


@contextmanager
def started(*words: str, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in the repository; whatever it has started ends with the test."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env={**environment(), "PYTHON": sys.executable, **variables},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the log of a running process has a text."""
    end = time.monotonic() + TIMEOUT_S
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(
    psutil.virtual_memory().available < NEEDED_GIB * 2**30,
    reason=f"less than {NEEDED_GIB} GiB of memory are free",
)
def test_the_468m_script_trains_at_tp_2(tmp_path: Path) -> None:
    # Measured in fp32 on two busy cores: 36 s, and 8.7 GiB of memory at the peak.
    log = tmp_path / "log"
    settings = {"TP": "2", "MICRO_BATCH": "1", "PRECISION": "fp32", "RUN_DIR": str(tmp_path)}
    with started(SCRIPT, *REDUCED.split(), log=log, **settings) as job:
        assert job.wait(TIMEOUT_S) == 0, log.read_text()[-3000:]
    counts = re.findall(r"number of parameters on .* rank \(\d, 0, 0\): (\d+)", log.read_text())
    norms = 49 * 1024
    assert sum(map(int, counts)) - norms == 468_239_360
    losses = read_scalars(tmp_path / "tensorboard")["lm loss"]
    assert sorted(losses) == [1, 2]
    # The first weights are narrow: close to a uniform guess among 32000.
    assert losses[1] == pytest.approx(10.37, abs=0.1)
    assert losses[2] < losses[1]


def _free_job_id() -> str:
    """A job number whose port, 20000 more, nobody listens at."""
    for number in range(os.getpid() % 10_000, 20_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20_000 + number)):
                return str(number)
    raise AssertionError("no free port")


def test_slurm_job_saves_requeues_and_resumes(tmp_path: Path) -> None:
    """Two "nodes" of one rank each; srun, scancel and scontrol are stand-ins, all else is real."""
    for name in ("srun", "scancel", "scontrol"):
        shutil.copy(HERE / "slurm_stand_in.py", tmp_path / name)
        (tmp_path / name).chmod(0o755)
    job = {
        "PATH": f"{tmp_path}:{environment()['PATH']}",
        "SLURM_STAND_IN": str(tmp_path),
        "SLURM_JOB_ID": _free_job_id(),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_GPUS_ON_NODE": "1",
        "TP": "2",
        "PRECISION": "fp32",
        "RUN_DIR": str(tmp_path / "run"),
    }
    words = ("examples/slurm.sbatch", SCRIPT, *TINY.split())
    log, requeued = tmp_path / "log", tmp_path / "requeued"
    with started(*words, log=log, **job) as first:
        wait_for(f"iteration        3/{STEPS:8}", log, first)
        first.send_signal(signal.SIGUSR1)
        first.wait(TIMEOUT_S)
    assert requeued.read_text() == f"requeue {job['SLURM_JOB_ID']}", log.read_text()[-3000:]
    saved = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert 3 <= saved < STEPS
    requeued.unlink()
    with started(*words, log=log, **job) as second:
        assert second.wait(TIMEOUT_S) == 0, log.read_text()[-3000:]
    assert not requeued.exists()
    text = log.read_text()
    assert f"iteration {saved:8}/" not in text
    assert f"iteration {saved + 1:8}/{STEPS:8}" in text
    losses = read_scalars(tmp_path / "run/tensorboard")["lm loss"]
    assert sorted(losses) == [*range(1, STEPS + 1)]
