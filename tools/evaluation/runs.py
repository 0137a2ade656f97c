"""Reads training runs: TensorBoard curves, what tools/evaluate.py says of them, their records."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import errors
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from tools.common.cli import ToolError
from tools.common.files import read_json
from tools.evaluation.comparison import PERPLEXITIES, read_evaluation

EVALUATION = "evaluation.json"
_EVENTS = "events.out.tfevents.*"
# Flags that differ between runs whatever they are.
_PLACES = ("--save", "--load", "--tensorboard-dir", "--data-cache-path")


class NoCurve(ToolError):
    """A run that has no values for the tag, such as one that ended before its first step."""


class Run(NamedTuple):
    """What is drawn of one run."""

    name: str
    steps: np.ndarray
    """[n], int64."""
    losses: np.ndarray
    """[n], fp64, nats."""
    evaluation: dict[str, float] | None
    """The `PERPLEXITIES` that evaluation.json has, if there is one."""


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """List the run folders that the given folders name.

    Args:
        folders: run folders, or folders of run folders.

    Returns:
        The run folders in the given order, those within one folder sorted by name.

    Raises:
        ToolError: a folder is missing, or holds no run.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise ToolError(f"no folder {folder}; expected the folder of a run")
        below = sorted(path for path in folder.iterdir() if path.is_dir() and _events(path))
        found = [folder] if _events(folder) else below
        if not found:
            raise ToolError(
                f"no TensorBoard events in {folder}, its tensorboard/ or its folders; train with "
                "--tensorboard-dir"
            )
        runs += found
    return list(dict.fromkeys(runs))


def _events(run: Path) -> Path | None:
    """Return the folder that holds a run's event files."""
    for folder in (run / "tensorboard", run):
        if any(folder.glob(_EVENTS)):
            return folder
    return None


def files_of(run: Path) -> list[Path]:
    """List what `read_run` and `read_record` read of a run."""
    events = sorted((_events(run) or run).glob(_EVENTS))
    return [*events, run / EVALUATION, *_records(run)]


def read_run(folder: Path, tag: str) -> Run:
    """Read one run.

    Args:
        folder: from `find_runs`.
        tag: TensorBoard tag of the curve.

    Raises:
        NoCurve: the run has no such tag.
        ToolError: its events or its evaluation.json are damaged.
    """
    from megatron_mile.objectives import OBJECTIVES

    for file in files_of(folder):
        if file.match(_EVENTS):
            _check_records(file)
    events = EventAccumulator(str(_events(folder)), size_guidance={"scalars": 0}).Reload()
    tags = sorted(events.Tags()["scalars"])
    if tag not in tags:
        has = ", ".join(tags) or "none"
        raise NoCurve(f"{folder}: no values for the tag {tag!r}; its tags: {has}")
    # A resumed run has steps twice: the later value is the one that the training went on with.
    values = {scalar.step: scalar.value for scalar in events.Scalars(tag)}
    steps = np.array(sorted(values))
    name = folder.resolve().name  # the quickstart names a run like its objective
    losses = np.array([values[step] for step in steps])
    name = OBJECTIVES[name].label if name in OBJECTIVES else name
    return Run(name, steps, losses, _evaluation(folder))


def _check_records(path: Path) -> None:
    """Refuse a damaged file of events: TensorBoard takes what comes before and is silent.

    A last record that is not whole is left by a run that goes on, or was killed.
    """
    try:
        reader = PyRecordReader_New(str(path))
        while True:
            reader.GetNext()
    except errors.OutOfRangeError:
        return
    except errors.NotFoundError as error:  # a link that leads nowhere
        raise ToolError(f"{path}: no such file") from error
    except errors.DataLossError as error:
        if "crc32" in str(error):
            raise ToolError(f"{path}: damaged; remove it, or take it from a backup") from error


def _evaluation(folder: Path) -> dict[str, float] | None:
    """Read the evaluation of a run, if it has one."""
    path = folder / EVALUATION
    if not path.is_file():
        return None
    content = read_evaluation(path)
    return {key: content[key] for key in PERPLEXITIES if content.get(key) is not None}


def _records(run: Path) -> list[Path]:
    from megatron_mile.run_record.record import RECORD  # the import takes seconds

    return [path for path in (run / RECORD, *run.glob(f"*/{RECORD}")) if path.is_file()]


def read_record(folder: Path) -> dict[str, str]:
    """Read what a run was: the last start in the record beside its checkpoints.

    Args:
        folder: from `find_runs`.

    Returns:
        Values by flag, package and other name; empty without a record.

    Raises:
        ToolError: the record is damaged.
    """
    found = _records(folder)
    if not found:
        return {}
    try:
        start = read_json(found[0])["starts"][-1]
        blends = start["data"]["blends"]
        record = {
            **_flags(shlex.split(start["command"])[1:]),
            **start["versions"],
            "device": start["device"],
            "processes": start["processes"],
            **{f"commit of {name}": _commit(state) for name, state in start["checkouts"].items()},
            "data": ", ".join(_data_name(pair) for blend in blends for pair in blend),
            "tokenizer": _tokenizer_name(start["data"]["tokenizer"]),
        }
        return {name: str(value) for name, value in record.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ToolError(f"{found[0]}: not a run's record ({error!r})") from error


def _flags(words: Sequence[str]) -> dict[str, str]:
    """Take a command line apart: what stands behind each flag, the last of a name."""
    flags, name = {}, ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = value
        else:
            flags[name] = f"{flags.get(name, '')} {word}".strip()
    return flags


def _commit(state: Mapping[str, Any] | None) -> str:
    """The start of a commit, and whether it says all."""
    return state["commit"][:12] + ", changed since" * bool(state["dirty"]) if state else "none"


def _tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """A tokenizer's type, and the ends of its files' hashes, or its names if it has no files."""
    ends = [digest[-8:] for digest in tokenizer["files"].values()]
    return " ".join([str(tokenizer["type"]), *(ends or tokenizer["names"])])


def _data_name(pair: Mapping[str, Any]) -> str:
    """A file's name, and the end of its hash, which tells it from another of that name."""
    content = pair.get("bin") or pair.get("file", "")
    return f"{Path(pair['prefix']).name} {content[-8:]}".strip()


def differences(records: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """Compare what runs were.

    Args:
        records: from `read_record`, by name of the run.

    Returns:
        Rows of a table, its head first: what differs, and its value in each run; no row if nothing
        does. A flag without a value is "set", one that is absent "-".
    """
    names = dict.fromkeys(name for record in records.values() for name in record)
    rows = [
        [name, *("-" if name not in r else r[name] or "set" for r in records.values())]
        for name in names
        if name not in _PLACES
    ]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return [["differs", *records], *rows] if rows else []
