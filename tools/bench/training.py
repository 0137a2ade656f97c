"""The training that train_step.py times: the quickstart's model, and a child process that runs it.

The child is never left behind: where the tool fails or is interrupted, it is asked to end (torchrun
then ends its workers), and killed if it does not.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from tools.common.cli import ToolError

VOCABULARY = 4096
# examples/quickstart.py trains this. The figures of a table can be compared as long as it stays.
MODEL = shlex.split("""
--num-layers 6 --hidden-size 192 --ffn-hidden-size 512 --num-attention-heads 4
--swiglu --normalization RMSNorm --position-embedding-type rope --disable-bias-linear
--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--seq-length 256 --max-position-embeddings 256
--init-method-std 0.04 --embedding-init-method-std 0.2
""")
SCHEDULE = shlex.split("""
--micro-batch-size 16 --global-batch-size 16 --seed 1234
--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
--log-interval 1 --eval-iters 0 --eval-interval 1000000000 --num-workers 0
""")
# So small a model does not get faster with more.
_MOST_THREADS = 8
# A step takes seconds and ends with a line of Megatron's; so does each part of the start.
_SILENCE_S = 300.0
# Longer than torchrun gives its workers before it kills them.
_GRACE_S = 45.0


def layout_flags() -> list[str]:
    """Return the flags that say where to compute: on up to two GPUs, or on CPUs with two ranks."""
    cpu = [] if torch.cuda.is_available() else ["--mile-cpu"]
    return ["--tensor-model-parallel-size", str(ranks()), *cpu]


def ranks() -> int:
    """Return how many processes share the model: GPUs, or two where there are none."""
    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def torchrun() -> list[str]:
    """Return the words that start a script, named next, on all ranks of this machine."""
    # Loopback only; port 0 lets the system choose a free one.
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks())]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [*words, "--local-addr", "127.0.0.1"]


def environment() -> Mapping[str, str]:
    """Return what the ranks need; nothing leaves the machine."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks())
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(min(threads, _MOST_THREADS)),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads double the time on a busy machine
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron requires it for TP > 1
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
    }


def run_training(command: Sequence[str], log: Path, follow: Callable[[str], object]) -> None:
    """Run a training to its end.

    Args:
        command: program and arguments.
        log: file that receives all output.
        follow: called with each line of output soon after it is written.

    Raises:
        ToolError: it ended with a status other than 0, or hung.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        start_new_session=True,  # Ctrl-C reaches the tool alone, which ends the child
    )
    try:
        with log.open("wb") as sink:
            for line in _lines(child, sink):
                follow(line)
        status = child.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        raise ToolError(f"training does not end; its output is in {log}") from None
    except TimeoutError as error:
        raise ToolError(f"training {error}; its output is in {log}") from None
    finally:
        end(child)
    if status:
        raise ToolError(f"training failed with status {status}; its output is in {log}")


def _lines(child: subprocess.Popen[bytes], sink: BinaryIO) -> Iterator[str]:
    """Yield the lines that a child writes, and copy them.

    Raises:
        TimeoutError: it wrote nothing for `_SILENCE_S`.
    """
    assert child.stdout
    rest = b""
    while select.select([child.stdout], [], [], _SILENCE_S)[0]:
        new = os.read(child.stdout.fileno(), 1 << 16)
        if not new:
            return
        sink.write(new)
        sink.flush()
        *lines, rest = (rest + new).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    raise TimeoutError(f"wrote nothing for {_SILENCE_S:g} s")


def end(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs, and what belongs to its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            os.killpg(child.pid, number)
            try:
                child.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                continue
