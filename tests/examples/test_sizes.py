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
from support.training_runs import REPOSITORY, environment, read_scalars

SCRIPT = "examples/sizes/468m.sh"
# What wins over the script's own flags: a model of no size, or less work for the whole one.
STEPS = 40
TINY = (
    "--mile-cpu --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 "
    "--seq-length 64 --max-position-embeddings 64 --vocab-size 256 --micro-batch-size 2 "
    f"--global-batch-size 2 --train-iters {STEPS} --lr-warmup-iters 1 --log-interval 1 "
    "--eval-iters 0 --num-workers 1 --save-interval 3"
)
REDUCED = (
    "--mile-cpu --seq-length 64 --global-batch-size 1 --train-iters 2 --lr-warmup-iters 1 "
    "--log-interval 1 --eval-iters 0 --num-workers 0 --save= --load="
)
NEEDED_GIB = 12
PATIENCE_S = 180


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
    end = time.monotonic() + PATIENCE_S
    while text not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_the_468m_script_trains_at_tp_2(tmp_path: Path) -> None:
    # Measured in fp32 on two busy cores: 36 s, and 8.7 GiB of memory at the peak.
    if psutil.virtual_memory().available < NEEDED_GIB * 2**30:
        pytest.skip(f"less than {NEEDED_GIB} GiB of memory are free")
    log = tmp_path / "log"
    settings = {"TP": "2", "MICRO_BATCH": "1", "PRECISION": "fp32", "RUN_DIR": str(tmp_path)}
    with started(SCRIPT, *REDUCED.split(), log=log, **settings) as job:
        assert job.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
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


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """What a job of two "nodes" finds in its environment; stand-ins are all of Slurm."""
    for name in ("srun", "scancel", "scontrol"):
        shutil.copy(REPOSITORY / "tests" / "support" / "slurm_stand_in.py", tmp_path / name)
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{environment()['PATH']}",
        "SLURM_STAND_IN": str(tmp_path),
        "SLURM_JOB_ID": _free_job_id(),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_GPUS_ON_NODE": "1",
    }


def test_slurm_job_ends_with_the_status_of_its_ranks(slurm: dict[str, str], tmp_path: Path) -> None:
    script = 'echo "$NODE_RANK of $NNODES at $MASTER_ADDR"; exit $((3 * NODE_RANK))'
    words = ("examples/slurm.sbatch", "bash", "-c", script)
    with started(*words, log=tmp_path / "log", SRUN_FLAGS="--label --quiet", **slurm) as job:
        assert job.wait(PATIENCE_S) == 3
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == ["0 of 2 at 127.0.0.1", "1 of 2 at 127.0.0.1"]
    assert not (tmp_path / "requeued").exists()


def test_slurm_job_that_is_taken_away_waits_for_its_end(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    slurm["SLURM_JOB_NUM_NODES"] = "1"
    script = "trap 'echo saved; exit 1' TERM; echo ready; while true; do sleep 0.1; done"
    with started("examples/slurm.sbatch", "bash", "-c", script, log=log, **slurm) as job:
        wait_for("ready", log, job)
        job.send_signal(signal.SIGTERM)
        wait_for("saved", log, job)
        with pytest.raises(subprocess.TimeoutExpired):
            job.wait(2)
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_slurm_job_saves_requeues_and_resumes(slurm: dict[str, str], tmp_path: Path) -> None:
    settings = {**slurm, "TP": "2", "PRECISION": "fp32", "RUN_DIR": str(tmp_path / "run")}
    words = ("examples/slurm.sbatch", SCRIPT, *TINY.split())
    log, requeued = tmp_path / "log", tmp_path / "requeued"
    with started(*words, log=log, **settings) as first:
        # After a first save: from then on Megatron has a helper process that SIGTERM would end.
        wait_for(f"iteration        4/{STEPS:8}", log, first)
        first.send_signal(signal.SIGUSR1)
        first.wait(PATIENCE_S)
    # The ranks ended by themselves, and before the job did.
    assert "[exiting program after receiving" in log.read_text()
    assert requeued.read_text() == f"requeue {slurm['SLURM_JOB_ID']}", log.read_text()[-3000:]
    saved = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text())
    assert 4 <= saved < STEPS
    requeued.unlink()
    with started(*words, log=log, **settings) as second:
        assert second.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    assert not requeued.exists()
    assert f"iteration {saved:8}/" not in log.read_text()
    # Both parts, and no step twice or not at all.
    losses = read_scalars(tmp_path / "run/tensorboard")["lm loss"]
    assert sorted(losses) == [*range(1, STEPS + 1)]
