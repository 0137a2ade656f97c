"""What a run was: `run_record.json` beside its checkpoints, a list of its starts.

Of each start: command line, versions, the commits of script, Megatron and this package where they
come from checkouts, and data and tokenizer (`data`), which are stored in the checkpoints too.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

import megatron_mile
from megatron_mile.errors import MileError
from megatron_mile.integration.arguments import Namespace
from megatron_mile.objective_file import SOURCES
from megatron_mile.run_record.data import data_of

RECORD = "run_record.json"
_DATA_READ, _POLL_S = "megatron_mile/data_read", 0.2
_PACKAGES = ("torch", "triton", "transformer-engine", "numpy")


def with_record(host: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's `setup_model_and_optimizer`, which loads the checkpoint of a resumed run.

    The data is looked at before that, so that it can be compared; the record is written after it.
    """

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        job = get_args()
        if not hasattr(job, "mile_data"):  # a script may build more than one model
            job.mile_data = data_on_all_ranks(job)
        built = host(*args, **kwargs)
        if job.save and torch.distributed.get_rank() == 0:
            write_record(job)
        return built

    return setup_model_and_optimizer


def data_on_all_ranks(args: Namespace) -> Any:
    """Let rank 0 look at the data, and return what it found, on all ranks.

    Once in a process group. To read thousands of files may take longer than a collective may wait:
    the other ranks enter one only when rank 0 has left word in the group's store. Rank 0 alone
    reads, because the others need not see the files; and before the training rather than beside
    it, so that changed data is refused before anything is computed, logged or saved.

    Raises:
        MileError: `check_pairs` refuses the data.
    """
    found: list[Any] = [None, None]
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = data_of(args)
        except MileError as error:
            found[1] = str(error)
        finally:
            store.set(_DATA_READ, b"")
    while not store.check([_DATA_READ]):  # not `wait`, which no signal would interrupt
        time.sleep(_POLL_S)
    torch.distributed.broadcast_object_list(found, src=0)
    if found[1]:
        raise MileError(found[1])
    return found[0]


def write_record(args: Namespace) -> None:
    """Add this start to the run's record, which is whole or as it was.

    Nothing is written where --save names object storage.

    Raises:
        MileError: The record that is there is damaged, or it cannot be written.
    """
    if "://" in args.save:
        return
    path = os.path.join(args.save, RECORD)
    partial = f"{path}.partial.{os.getpid()}"
    try:
        starts = _earlier_starts(path)
        os.makedirs(args.save, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"starts": [*starts, describe_start(args)]}, file, indent=2)
        os.replace(partial, path)
    except OSError as error:
        raise MileError(f"{path}: {error.strerror}; --save needs a folder to write to") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)


def _earlier_starts(path: str) -> list[Any]:
    """The starts in a record; none where there is no record.

    Raises:
        MileError: It is no record.
        OSError: It cannot be read.
    """
    problem = "no regular file"
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its other end
            with open(path, encoding="utf-8") as file:
                starts = json.load(file)["starts"]
            if isinstance(starts, list):
                return starts
            problem = f"starts is {starts!r:.40}"
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        problem = repr(error)
    raise MileError(f"{path}: not a run's record ({problem}); move it away")


def describe_start(args: Namespace) -> dict[str, Any]:
    """What it takes to do this start again."""
    import megatron.core

    source = SOURCES.get(getattr(args, "mile_objective", ""))
    gpu = torch.cuda.get_device_name() if torch.version.cuda and torch.cuda.is_available() else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "iteration": args.iteration,
        "folder": os.getcwd(),
        "command": shlex.join(sys.argv),
        "processes": args.world_size,
        "device": gpu or "cpu",
        "versions": {
            "python": platform.python_version(),
            # Of what was imported: a checkout's is not the one that is installed.
            "megatron-core": megatron.core.__version__.split("+")[0],
            "megatron-mile": megatron_mile.__version__,
            **_versions(),
        },
        "checkouts": {
            "script": git_state(sys.argv[0]),
            "megatron-core": git_state(megatron.core.__file__),
            "megatron-mile": git_state(__file__, "megatron_mile") or noted_commit(),
        },
        "objective_file": source and source._asdict(),
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


def noted_commit() -> dict[str, Any] | None:
    """The commit that the Dockerfile notes in the package, as its image has no checkout."""
    path = os.path.join(os.path.dirname(megatron_mile.__file__), "COMMIT")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return {"commit": file.read().strip(), "dirty": None}


def git_state(file: str, *paths: str) -> dict[str, Any] | None:
    """Commit of the checkout that holds a file, and whether it was changed since.

    Args:
        file: of the checkout.
        paths: what counts as a change, as patterns from its top, new Python files there too; all
            files that are under version control if none are given.

    Returns:
        "commit" and "dirty"; None for a file that is not under version control (as what pip has
        installed into a .venv of another's checkout), in a checkout that git does not trust
        because it is another user's, or without git.
    """
    folder, name = os.path.split(os.path.realpath(file))

    def git(*words: str) -> bytes:
        command = ("git", "--no-optional-locks", "-C", folder, *words)
        return subprocess.run(command, capture_output=True, check=True).stdout.strip()

    where = [f":(top){path}" for path in paths]
    try:
        git("ls-files", "--error-unmatch", "--", f":(literal){name}")
        changed = git("status", "--porcelain", "-uno", "--", *where)
        new = git("ls-files", "--others", "--exclude-standard", "--", *where) if where else b""
        is_new = any(line.endswith(b".py") for line in new.splitlines())
        return {"commit": git("rev-parse", "HEAD").decode(), "dirty": bool(changed) or is_new}
    except (OSError, subprocess.CalledProcessError):
        return None
