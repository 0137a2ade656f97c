"""Real Megatron training runs for the tests: start them, remember them, read their figures."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
JOBS = REPOSITORY / "tests" / "megatron" / "jobs"
EXAMPLE = REPOSITORY / "examples" / "pretrain_gpt.py"
TIMEOUT_S = 100

# Weights drawn ten times wider than usual, so that entropies differ between tokens from the start
# and a weighted loss is not close to cross-entropy; the first step has learning rate 0.
MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 "
    "--max-position-embeddings 64 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --init-method-std 0.2 --tokenizer-type NullTokenizer --vocab-size 250 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 12 --lr 3e-3 --min-lr 1e-4 "
    "--lr-decay-style cosine --lr-warmup-iters 1 --clip-grad 1.0 --weight-decay 0.1 "
    "--num-workers 0 --log-interval 1 --eval-iters 0 --eval-interval 1000 --save-interval 1000"
)
# 250 tokens, padded to 256 with either.
TP1 = "--make-vocab-size-divisible-by 256"
TP2 = "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 128"
HOST = "--mock-data --distributed-backend gloo"
# A large gamma, for the same reason as the wide weights.
MILE = "--mock-data --mile-cpu --mile-objective mile --mile-gamma 3"
EVALUATE = "--eval-iters 1 --eval-interval 1"
STOP = "--exit-interval 6"

FIGURES = ("lm loss", "mile loss", "mile entropy", "mile weight")
# Relative. Measured over 12 fp32 steps: runs that must agree differ by at most 4e-7, four
# roundings; another normaliser, or cross-entropy in place of the objective, by 2e-4 and more.
SAME = 2e-6


@dataclass(frozen=True)
class Run:
    """A finished run."""

    code: int
    logs: list[str]
    """stdout and stderr of each rank."""
    folder: Path
    scalars: dict[str, dict[int, float]]
    """Figure by TensorBoard tag and step, fp32."""

    def __getitem__(self, tag: str) -> list[float]:
        """The figures of a tag, in the order of the steps."""
        return [self.scalars[tag][step] for step in sorted(self.scalars[tag])]

    @property
    def checkpoint(self) -> Path:
        """Where a run with `save` leaves its checkpoints."""
        return self.folder / "checkpoint"


class TrainingRuns:
    """Runs one job at a time, and each job once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: dict[tuple[object, ...], Run] = {}
        self.forker = subprocess.Popen(
            [sys.executable, HERE / "rank_forker.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "forker.log").open("w"),
            text=True,
            env={**environment(), "HF_DATASETS_CACHE": str(folder / "datasets")},
        )

    def close(self) -> None:
        """End the forker; no rank is left when it has answered."""
        self.forker.communicate()

    def train(
        self,
        world_size: int,
        *flags: str,
        save: bool = False,
        repeat: int = 0,
        script: Path = EXAMPLE,
    ) -> Run:
        """Do what `run` does, and fail the test unless the job succeeds."""
        run = self.run(world_size, *flags, save=save, repeat=repeat, script=script)
        assert run.code == 0, f"exit code {run.code} of {flags}\n{run.logs[0][-3000:]}"
        return run

    def run(
        self,
        world_size: int,
        *flags: str,
        save: bool = False,
        repeat: int = 0,
        script: Path = EXAMPLE,
    ) -> Run:
        """Run a job, unless the same has been run before.

        Args:
            world_size: Number of ranks.
            flags: What follows MODEL on the command line, split at spaces; the last of a name wins.
            save: Write a checkpoint at the end, below `Run.checkpoint`.
            repeat: Another number runs the same job again.
            script: A script of Megatron's kind; its last argument is the run's folder.
        """
        key = (world_size, flags, save, repeat, script)
        if key not in self.finished:
            folder = self.folder / str(len(self.finished))
            folder.mkdir()
            self.finished[key] = self._start(folder, world_size, flags, save, script)
        return self.finished[key]

    def _start(
        self, folder: Path, world_size: int, flags: tuple[str, ...], save: bool, script: Path
    ) -> Run:
        logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
        where = f"--save {folder}/checkpoint" if save else ""
        code = self._fork([script, *command_line(folder, *flags, where)], logs)
        return Run(code, [log.read_text() for log in logs], folder, read_scalars(folder))

    def call(self, script: Path, *words: object) -> subprocess.CompletedProcess[str]:
        """Run any script in one process that has Megatron imported; stdout and stderr are one."""
        log = self.folder / "call.log"
        log.unlink(missing_ok=True)
        code = self._fork([script, *words], [log])
        return subprocess.CompletedProcess([script, *words], code, log.read_text())

    def _fork(self, argv: Sequence[object], logs: Sequence[Path]) -> int:
        """Let the forker run a script in as many ranks as there are logs; the exit code."""
        job = {"argv": [*map(str, argv)], "logs": [*map(str, logs)], "timeout_s": TIMEOUT_S}
        assert self.forker.stdin
        assert self.forker.stdout
        print(json.dumps(job), file=self.forker.stdin, flush=True)
        answer = self.forker.stdout.readline()
        assert answer, (self.folder / "forker.log").read_text()
        return int(answer)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a torch_dist checkpoint: weights and the optimizer's state."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def command_line(folder: Path, *flags: str) -> list[str]:
    """The arguments of a job that leaves its TensorBoard events in `folder`."""
    return " ".join([MODEL, *flags, f"--tensorboard-dir {folder}"]).split()


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Read all scalars of a TensorBoard folder.

    Megatron evaluates again after the training, under the last step's number and without flushing
    its writer: of each step the first value counts, which is always there.
    """
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: {event.step: event.value for event in reversed(events.Scalars(tag))}
        for tag in events.Tags()["scalars"]
    }


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a new Python process, and kill all of it when it takes too long."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def torchrun(world_size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `torchrun` itself, rendezvous on loopback."""
    rendezvous = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    ranks = f"--nproc-per-node={world_size}"
    return python("-m", "torch.distributed.run", *rendezvous, ranks, *arguments)


def environment() -> dict[str, str]:
    """One thread a rank, gloo on the loopback interface, and the commands of this Python.

    Those of the Python below a virtual environment too: Megatron's Makefile asks python3-config.
    """
    names = [name for _, name in socket.if_nameindex()]
    loopback = next(name for name in names if name.startswith("lo"))
    commands = (str(Path(sys.executable).parent), str(Path(sys.base_prefix, "bin")))
    path = os.pathsep.join([*commands, os.environ.get("PATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "PATH": path}


def mile_errors(text: str) -> set[str]:
    """The one-line errors of a log; ranks that met the same error count once."""
    return {line for line in text.splitlines() if line.startswith("megatron_mile: error: ")}


def fall(run: Run) -> float:
    """How far "lm loss" fell, from the mean of the first three steps to that of the last three."""
    losses = run["lm loss"]
    return (sum(losses[:3]) - sum(losses[-3:])) / 3


def furthest(ours: list[float], theirs: list[float]) -> float:
    """The largest difference of two curves of one length, relative to the second."""
    assert len(ours) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
