"""tools/preprocess_data.py: what Ctrl-C, kill -9 and a dead worker leave behind."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pair_files import files_below, pair_bytes

from tools.common.cli import ToolError
from tools.data.documents import Position, Record
from tools.data.encoder import encode_all
from tools.preprocess_data import main

# The tool forks; so does Megatron's own. What pytest has loaded beside it starts threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
TOOL = Path(sys.modules[main.__module__].__file__ or "")
DOCUMENT = b'{"text": "1 2 3"}\n'


class _Killer:
    """An encoder whose process is killed, as the kernel does when memory runs out."""

    def __call__(self, records: list[Record]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_encode_all_dead_worker_is_an_error() -> None:
    records = [Record("a", b"a", False, Position(0, 1))]
    with pytest.raises(ToolError, match="a worker was killed"):
        list(encode_all(records, _Killer(), workers=2))


def test_encode_all_reads_no_further_than_its_window() -> None:
    read = 0

    def endless() -> Iterator[Record]:
        nonlocal read
        for read in itertools.count(1):
            yield Record(str(read), b"", False, Position(0, read))

    batches = encode_all(endless(), lambda batch: [record.origin for record in batch], workers=2)
    found = list(itertools.chain.from_iterable(itertools.islice(batches, 3)))
    assert found == [str(number) for number in range(1, 3 * 64 + 1)]
    batches.close()
    assert read <= (4 * 2 + 1 + 3) * 64


@contextlib.contextmanager
def _stalled(flags: list[str], fifo: Path, lines: bytes) -> Iterator[subprocess.Popen[str]]:
    """Run the tool on a pipe that gives half of the corpus, and wait for the first bytes out.

    The pipe ends with the block. A signal is sent inside it: one that comes just before the tool
    waits for the pipe is noticed by Python only after that.
    """
    os.mkfifo(fifo)
    command = [sys.executable, str(TOOL), "--input", str(fifo), *flags]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell has set it to be ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    feed = os.open(fifo, os.O_RDWR)  # both ends: opening does not wait, and the pipe never ends
    os.set_blocking(feed, False)
    rest = memoryview(lines[: len(lines) // 2])
    out = Path(flags[flags.index("--output-prefix") + 1]).parent
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in out.glob("*.partial/*.bin")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no output"
        with contextlib.suppress(BlockingIOError):
            rest = rest[os.write(feed, rest) :]
        time.sleep(0.02)
    yield process
    os.close(feed)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _running(pid: int) -> bool:
    """Whether the process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_main_killed_run_keeps_the_earlier_pair_and_can_be_repeated(
    tmp_path: Path, corpus: Path, hf_flags: list[str], whole: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{whole}_text_document{suffix}", out / f"c_text_document{suffix}")
    earlier = files_below(out)
    flags = ["--output-prefix", str(out / "c"), "--append-eod", "--workers", "2", *hf_flags]
    with _stalled(flags, tmp_path / "pipe.jsonl", corpus.read_bytes()) as process:
        workers = _children(process.pid)
        assert len(workers) == 2
        process.kill()
    process.wait()  # communicate would wait for workers that outlive it
    assert process.stderr
    process.stderr.close()
    assert earlier.items() <= files_below(out).items()
    assert (out / "c.partial").is_dir()
    deadline = time.monotonic() + 10
    while left := list(filter(_running, workers)):
        if time.monotonic() > deadline:
            for worker in left:
                os.kill(worker, signal.SIGKILL)
            pytest.fail("workers outlive a killed run")
        time.sleep(0.1)
    main(["--input", str(corpus), *flags])
    assert pair_bytes(out / "c") == pair_bytes(whole)
    assert len(list(out.iterdir())) == 3


def test_main_ctrl_c_keeps_the_earlier_pair(tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--output-prefix", str(out / "c"), "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", "10"]
    (tmp_path / "good.jsonl").write_bytes(DOCUMENT)
    main(["--input", str(tmp_path / "good.jsonl"), *flags])
    earlier = files_below(out)
    with _stalled(flags, tmp_path / "pipe.jsonl", DOCUMENT * 10000) as process:
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "tools/preprocess_data.py: error: interrupted\n"
    assert process.returncode == 130
    assert files_below(out) == earlier
