"""What a run was: `run_record.json` beside its checkpoints, and its data in each of them.

The record lists the starts of a run: command line, versions, git commit and data. The data is known
by its content, not by its path: size and SHA-256 of each .bin and .idx, of the whole file up to
64 MiB, and of 64 blocks of 1 MiB at equal distances, first and last included, in a larger one.
Of data in object storage only the name is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from megatron_mile.integration.arguments import Namespace
from megatron_mile.integration.data_files import check_pairs
from megatron_mile.integration.errors import MileError

RECORD = "run_record.json"
BLOCK, BLOCKS = 1 << 20, 64
_PACKAGES = ("megatron-core", "megatron-mile", "torch", "triton", "transformer-engine", "numpy")


def with_record(host: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `setup_model_and_optimizer`, which loads the checkpoint of a resumed run.

    The data is looked at before that, so that it can be compared; the record is written after it.
    """

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        get_args().mile_data = data_on_all_ranks(get_args())
        built = host(*args, **kwargs)
        if get_args().save and torch.distributed.get_rank() == 0:
            write_record(get_args())
        return built

    return setup_model_and_optimizer


def data_on_all_ranks(args: Namespace) -> Any:
    """Let rank 0 look at the data, and return what it found, on all ranks.

    Raises:
        MileError: A file cannot be read, or `check_pairs` refuses the data.
    """
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = data_of(args)
        except OSError as error:
            found[1] = f"{error.filename}: {error.strerror}; check --data-path"
        except MileError as error:
            found[1] = str(error)
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1]:
        raise MileError(found[1])
    return found[0]


def data_of(args: Namespace) -> dict[str, Any]:
    """Describe the data of a run.

    Returns:
        "split", and "blends": for each of one or three blends, a list of "prefix", "weight" and the
        `fingerprint` of the .bin and .idx. Mock data has no blends.

    Raises:
        OSError: A file cannot be read.
        MileError: `check_pairs` refuses it.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [part for part in (per_split or [blend]) if part]
    check_pairs([prefix for prefixes, _ in blends for prefix in prefixes if "://" not in prefix])
    return {"split": args.split, "blends": [list(_pairs(*part)) for part in blends]}


def _pairs(prefixes: list[str], weights: list[float] | None) -> Iterator[dict[str, Any]]:
    for index, prefix in enumerate(prefixes):
        ends = () if "://" in prefix else ("bin", "idx")
        files = {end: fingerprint(f"{prefix}.{end}") for end in ends}
        yield {"prefix": prefix, "weight": weights[index] if weights else None, **files}


def fingerprint(path: str) -> str:
    """Size in bytes and hash of a file, as the top of this module says.

    Raises:
        OSError: It cannot be read.
    """
    size = os.path.getsize(path)
    last, digest = size - BLOCK, hashlib.sha256()
    with open(path, "rb") as file:
        for index in range(BLOCKS):
            # Blocks follow each other without a gap in a file that is not larger than all of them.
            file.seek(index * BLOCK if size <= BLOCK * BLOCKS else last * index // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return f"{size}:{digest.hexdigest()}"


def changed_data(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Name what differs between the data of a checkpoint and this job's.

    Args:
        stored: Megatron's args in the checkpoint.
        current: those of this job.
    """
    before, now = stored.get("mile_data"), current.get("mile_data")
    if not before or not now or _content(before) == _content(now):
        return []
    names = [_names(data) for data in (before, now)]
    if names[0] == names[1]:
        return [f"{names[0]}: content, weights or --split have changed"]
    return [" -> ".join(names)]


def _content(data: Mapping[str, Any]) -> list[Any]:
    """What counts of the data: not where it lies, if its content is known; --split if it splits."""
    blends = [
        [{**pair, "prefix": None if "bin" in pair else pair["prefix"]} for pair in blend]
        for blend in data["blends"]
    ]
    return [blends, data["split"] if len(blends) == 1 else None]


def _names(data: Mapping[str, Any]) -> str:
    names = [pair["prefix"] for blend in data["blends"] for pair in blend]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "mock data"


def write_record(args: Namespace) -> None:
    """Add this start to the run's record, which is whole or as it was.

    Raises:
        MileError: The record that is there is damaged.
    """
    path = os.path.join(args.save, RECORD)
    starts = []
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                starts = json.load(file)["starts"]
        except (ValueError, KeyError, TypeError) as error:
            raise MileError(f"{path}: not a run's record ({error!r}); move it away") from error
    os.makedirs(args.save, exist_ok=True)
    partial = f"{path}.partial.{os.getpid()}"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump({"starts": [*starts, describe_start(args)]}, file, indent=2)
    os.replace(partial, path)


def describe_start(args: Namespace) -> dict[str, Any]:
    """What it takes to do this start again."""
    gpu = torch.cuda.get_device_name() if torch.version.cuda and torch.cuda.is_available() else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "iteration": args.iteration,
        "folder": os.getcwd(),
        "command": shlex.join(sys.argv),
        "processes": args.world_size,
        "device": gpu or "cpu",
        "versions": {"python": platform.python_version(), **_versions()},
        "git": git_state(os.path.dirname(os.path.abspath(sys.argv[0]))),
        "data": args.mile_data,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: str) -> dict[str, Any] | None:
    """Commit of the checkout that a folder is in, and whether files of it were changed since.

    Returns:
        "commit" and "dirty"; None where there is no checkout, or no git.
    """
    git = ("git", "-C", folder)
    try:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **options).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], **options).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}
