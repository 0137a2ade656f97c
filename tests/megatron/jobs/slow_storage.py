"""Look at data that takes longer to read than a collective may wait; the folder is the last word.

A script of test_run_record.py, with real files, hashes and process groups. Only the slowness of
the storage is made: each file takes DELAY_S more, since no folder of a test is slow by itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mile.run_record import data as run_data
from megatron_mile.run_record.record import data_on_all_ranks

TIMEOUT_S, DELAY_S, PAIRS = 1.0, 0.1, 120
_fingerprint = run_data.fingerprint


def slow_fingerprint(path: str) -> str:
    time.sleep(DELAY_S)
    return _fingerprint(path)


def job(folder: Path) -> argparse.Namespace:
    """A job's --data-path of many pairs."""
    names = [str(folder / str(index)) for index in range(PAIRS)]
    for name in names:
        for end in ("bin", "idx"):
            Path(f"{name}.{end}").write_text(name)
    others = ("data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    nothing: dict[str, Any] = dict.fromkeys((*others, "per_split_data_args_path"))
    return argparse.Namespace(data_path=names, split="1,0,0", **nothing)


def main(folder: Path) -> None:
    """Let rank 0 alone know the data, with ranks that wait for a second at most."""
    run_data.fingerprint = slow_fingerprint
    dist.init_process_group("gloo")
    args = job(folder) if dist.get_rank() == 0 else argparse.Namespace()
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S))
    start = time.monotonic()
    data = data_on_all_ranks(args)
    seconds = time.monotonic() - start
    # Longer than the timeout, and less than one file after the other would take.
    assert TIMEOUT_S < seconds < 2 * PAIRS * DELAY_S, seconds
    (blend,) = data["blends"]
    assert [blend[0]["bin"], len(blend)] == [_fingerprint(f"{folder}/0.bin"), PAIRS]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
