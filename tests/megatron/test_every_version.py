"""What holds of a whole job on every version: `make test-compat` runs this beside test_hook.py.

The script is a user's, without a word of megatron_mile; the flags decide.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from support.training_runs import (
    EVALUATE,
    HOST,
    JOBS,
    MILE,
    REPOSITORY,
    TP2,
    TrainingRuns,
    command_line,
    furthest,
    mile_errors,
    python,
    read_scalars,
    torchrun,
)

from megatron_mile.integration import versions
from megatron_mile.integration.arguments import add_arguments

pytestmark = [pytest.mark.slow, pytest.mark.compat]
with_training = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="wheels of megatron-core before 0.17 have no megatron.training",
)

SCRIPT, LAUNCHED = JOBS / "pretrain_tiny.py", JOBS / "launch_tiny.py"
STEPS = "--train-iters 4"
# Measured: 1.6e-7 on each version, a rounding of an fp32 loss near 6.
ROUNDING = 1e-6


def test_megatron_is_imported_from_one_place(
    runs: TrainingRuns, record_testsuite_property: Callable[[str, object], None]
) -> None:
    # The wheels' `megatron` is a namespace: what one version lacks would come from another.
    folder = runs.train(1, script=JOBS / "list_modules.py").folder
    found = json.loads((folder / "modules.json").read_text())
    version = found["version"].split("+")[0]
    record_testsuite_property("megatron_core", version)
    assert version == metadata.version("megatron-core")
    home = Path(str(metadata.distribution("megatron-core").locate_file("megatron"))).resolve()
    strangers = [
        file for file in found["files"].values() if not Path(file).resolve().is_relative_to(home)
    ]
    assert not strangers
    assert ("megatron.training" in found["files"]) == (home / "training").is_dir()


def test_report_finds_what_a_job_needs() -> None:
    done = python("-m", "megatron_mile")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    (found,) = [line.split()[1] for line in lines if line.startswith("megatron-core")]
    assert found == metadata.version("megatron-core")
    rows = [line.split(maxsplit=1) for line in lines if "megatron." in line]
    absent = [name for name, state in rows if state.startswith("absent")]
    has_training = importlib.util.find_spec("megatron.training") is not None
    assert len(rows) == len(versions.CORE) + len(versions.TRAINING)
    assert len(absent) == (0 if has_training else len(versions.TRAINING))
    assert all(state == "ok" or name in absent for name, state in rows)


def test_core_loop_trains_without_megatron_training() -> None:
    loop = REPOSITORY / "examples" / "core_loop.py"
    done = torchrun(2, loop, "--tensor-model-parallel-size", "2", "--cpu", "--steps", "12")
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [
        dict(part.rsplit(": ", 1) for part in line.split(" | ")[1:])
        for line in done.stdout.splitlines()
        if line.startswith("step ")
    ]
    first, last = ({key: float(x) for key, x in steps[at].items()} for at in (0, -1))
    assert len(steps) == 12
    assert last["lm loss"] < first["lm loss"] - 1
    # w = 1 + H, and the model starts near the uniform distribution over 256 bytes.
    assert first["mile weight"] == pytest.approx(1 + first["mile entropy"], abs=2e-4)
    assert math.log(256) - 0.1 < first["mile entropy"] < math.log(256)
    assert last["mile loss"] != last["lm loss"]


@with_training
def test_arguments_are_in_the_help() -> None:
    done = python("-m", "megatron_mile.launch", SCRIPT, "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    for action in add_arguments(argparse.ArgumentParser(add_help=False))._actions:
        assert action.option_strings[0] in done.stdout
    assert "--tensor-model-parallel-size" in done.stdout


@with_training
def test_arguments_are_kept_with_the_checkpoint(runs: TrainingRuns) -> None:
    saved = runs.train(2, TP2, EVALUATE, MILE, STEPS, save=True, script=LAUNCHED)
    other = f"--mile-gamma 2 --load {saved.checkpoint}"
    refused = runs.run(2, TP2, EVALUATE, MILE, STEPS, other, script=LAUNCHED)
    assert refused.code != 0
    (error,) = mile_errors("\n".join(refused.logs))
    assert "trained with another objective: gamma 3.0 -> 2.0" in error


@with_training
def test_launcher_leaves_the_host_alone_with_ce(runs: TrainingRuns) -> None:
    host = runs.train(2, TP2, EVALUATE, HOST, STEPS, script=LAUNCHED)
    ours = runs.train(2, TP2, EVALUATE, MILE, STEPS, "--mile-objective ce", script=LAUNCHED)
    assert not [tag for tag in host.scalars if "mile" in tag]
    for figure in ("lm loss", "lm loss validation", "grad-norm"):
        assert furthest(ours[figure], host[figure]) <= ROUNDING, figure
    assert furthest(ours["mile loss"], host["lm loss"]) <= ROUNDING
    assert set(ours["mile weight"]) == {1.0}


@with_training
def test_launcher_trains_an_unmodified_script(runs: TrainingRuns, tmp_path: Path) -> None:
    # Through torchrun itself; forked ranks repeat it to the bit.
    flags = command_line(tmp_path, TP2, EVALUATE, MILE, STEPS)
    done = torchrun(2, "-m", "megatron_mile.launch", SCRIPT, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "objective    mile (gamma 3" in done.stdout
    launched = read_scalars(tmp_path)
    forked = runs.train(2, TP2, EVALUATE, MILE, STEPS, save=True, script=LAUNCHED)
    host = runs.train(2, TP2, EVALUATE, HOST, STEPS, script=LAUNCHED)
    for figure in ("lm loss", "mile loss", "mile entropy", "mile weight", "lm loss validation"):
        assert launched[figure] == forked.scalars[figure], figure
    assert furthest(forked["lm loss"][:1], host["lm loss"][:1]) <= ROUNDING
    assert furthest(forked["mile loss"], forked["lm loss"]) > 1000 * ROUNDING
    assert min(forked["mile weight"]) > 100
    assert not [tag for tag in launched if "mile" in tag and "validation" in tag]
