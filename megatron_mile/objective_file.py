"""An objective of the user's own: one record in a Python file, loaded by path and name.

The file is run, so it is named by the user alone: on the command line, or in a call of
`load_objective`. What a checkpoint stores of it is the record's name and the file's sha256, which
nothing here ever reads as a path.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import sys
import types
from typing import Any, NamedTuple

import torch

from megatron_mile.config import SETTINGS
from megatron_mile.objectives import OBJECTIVES, Objective

FORM = "FILE.py:NAME"
# Nats: certain, nearly so, usual, hopeless; the last entropy is that of 2^20 equal tokens.
_NLL = (0.0, 1e-9, 0.3, 2.0, 10.4, 200.0)
_ENTROPY = (0.0, 1e-9, 0.7, 3.0, 10.4, 13.8)


class Source(NamedTuple):
    """Where an objective of the user's own comes from."""

    word: str
    """What was asked for, FILE.py:NAME."""
    sha256: str
    """Of the file, as it was run."""


SOURCES: dict[str, Source] = {}
"""Those of this process, by the name of the objective."""


def load_objective(source: str) -> str:
    """Run a Python file and make its objective known to this process.

    The file is written as those in `megatron_mile/objectives`, but stands alone: what it imports is
    not part of its hash. Its settings are some of those of `ObjectiveConfig`; what else it needs
    are constants in it. Its functions are tried on a few values whenever a configuration is made.

    Args:
        source: FILE.py:NAME, the path of the file and the name of an `Objective` in it. The same
            source is run once.

    Returns:
        The objective's own name, for `ObjectiveConfig(objective=...)`.

    Raises:
        ValueError: There is no such file or name, the file fails, the record is none, its name
            exists already, or it has settings of its own or a mix.
    """
    known = [name for name, found in SOURCES.items() if found.word == source]
    if known:
        return known[0]
    path, _, name = source.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"objective {source!r}: expected {FORM}, such as mine.py:OBJECTIVE")
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise ValueError(f"objective file {path}: {error.strerror}") from error
    record = _record(path, name, getattr(_run(path, text), name, None))
    SOURCES[record.name] = Source(source, hashlib.sha256(text).hexdigest())
    OBJECTIVES[record.name] = dataclasses.replace(
        record, check=functools.partial(_try, f"{path}:{name}", record)
    )
    return record.name


def _run(path: str, text: bytes) -> types.ModuleType:
    """Run the text of a file as a module of its own."""
    # A module that is known by its name, as dataclasses in it ask for.
    module = types.ModuleType("megatron_mile_objective_" + hashlib.sha256(text).hexdigest()[:12])
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise ValueError(f"objective file {path}: {_one_line(error)}") from error
    return module


def _record(path: str, name: str, record: Any) -> Objective:
    """Return a record that may be used as an objective; raise ValueError for another."""
    problem = None
    if record is None:
        problem = "no such name in the file; expected an Objective"
    elif not isinstance(record, Objective):
        problem = f"a {type(record).__name__}; expected an Objective"
    elif record.name == "none" or not re.fullmatch("[a-z][a-z0-9_]*", record.name):
        problem = f"its name is {record.name!r}; expected a word in small letters, and not none"
    elif record.name in OBJECTIVES:
        problem = f"an objective named {record.name} exists already; give it another name"
    elif record.weight is None or record.mix is not None:
        problem = "expected an objective with a weight, and without a mix"
    elif record.value is not None and record.weight_slope is not None:
        problem = "it has a value and a weight_slope, which is that of w * nll; leave one out"
    elif own := [setting.name for setting in record.settings if setting not in SETTINGS]:
        problem = (
            f"its setting {own[0]} is not one of this library's; make it a constant of the file"
        )
    if problem:
        raise ValueError(f"objective {path}:{name}: {problem}")
    assert isinstance(record, Objective)
    return record


def _try(where: str, record: Objective, **own: Any) -> None:
    """Raise ValueError unless the functions do on a grid of values what a training needs."""
    if record.check is not None:
        record.check(**own)
    grid = torch.meshgrid(*(torch.tensor(x).double() for x in (_NLL, _ENTROPY)), indexing="ij")
    nll, entropy = (x.clone() for x in grid)
    # What a job gives beside settings: sum p^2, at least e^-H, and shares of the data.
    own |= {"squares": torch.exp(-entropy)} if record.needs_squares else {}
    own |= {name: torch.exp(-nll) for name in record.inputs}
    for name in ("weight", "weight_slope", "value"):
        function = getattr(record, name)
        if function is None:
            continue
        try:
            result = function(nll, entropy, **own)
        except Exception as error:
            raise ValueError(
                f"objective {where}: {name}(nll, entropy{''.join(', ' + x for x in own)}) ended in "
                f"{_one_line(error)}"
            ) from error
        if problem := _problem(result, nll, entropy, is_slope=name == "weight_slope"):
            raise ValueError(f"objective {where}: {name} returned {problem}")


def _problem(result: Any, nll: torch.Tensor, entropy: torch.Tensor, is_slope: bool) -> str | None:
    """Say what is wrong with what a function returned, if anything is."""
    if not isinstance(result, torch.Tensor):
        return f"a {type(result).__name__}; expected a tensor"
    kind = (result.dtype, tuple(result.shape), str(result.device))
    expected = (nll.dtype, tuple(nll.shape), str(nll.device))
    if kind != expected:
        said, wanted = (f"{dtype} {shape} on {device}" for dtype, shape, device in (kind, expected))
        return f"{said}; expected what it was given, {wanted}"
    if result.requires_grad:
        return "a tensor that requires a gradient; weights are constants"
    # A slope may be negative, and have no bound where check_slope refuses it.
    bad = result.isnan() if is_slope else ~(result.isfinite() & (result >= 0))
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        found, at, beside = (x.flatten()[row].item() for x in (result, nll, entropy))
        limit = "a number" if is_slope else "a finite number >= 0"
        return f"{found:g} for nll {at:g} and entropy {beside:g}; expected {limit}"
    return None


def _one_line(error: BaseException) -> str:
    """Name an error, with the line of the file where Python has it, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
