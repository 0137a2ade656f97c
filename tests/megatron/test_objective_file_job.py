"""Real jobs with an objective of the user's own, from a file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support.documents import blocks, text_of
from support.training_runs import (
    EXAMPLE,
    MILE,
    STOP,
    TP2,
    TrainingRuns,
    furthest,
    mile_errors,
    python,
)

pytestmark = pytest.mark.slow

FILE = '''
from megatron_mile.objectives import Objective
from megatron_mile.objectives.mile import GAMMA

def weight(nll, entropy, gamma):
    return (1.0 + entropy).pow(gamma)

MINE = Objective(
    name="mine", label="mine", equation="w = (1 + H)^gamma", settings=(GAMMA,), weight=weight
)
'''  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(FILE)
    return path


def test_file_trains_resumes_and_is_recorded(runs: TrainingRuns, source: Path) -> None:
    flags = MILE.replace("--mile-objective mile", f"--mile-objective {source}:MINE")
    usual, whole = runs.train(2, TP2, MILE), runs.train(2, TP2, flags)
    for tag in ("lm loss", "mile loss", "mile weight", "grad-norm"):
        assert whole[tag] == usual[tag], tag  # the same weight, by the library's own file
    assert "mine (gamma 3, alpha global, weights detached)" in whole.logs[0]
    digest = hashlib.sha256(FILE.encode()).hexdigest()
    assert f"{source}:MINE, sha256 {digest[:12]}" in whole.logs[0]
    half = runs.train(2, TP2, flags, STOP, save=True)
    (start,) = json.loads((half.checkpoint / "run_record.json").read_text())["starts"]
    assert start["objective_file"] == {"word": f"{source}:MINE", "sha256": digest}
    load = f"--load {half.checkpoint}"
    resumed = runs.train(2, TP2, flags, load)
    assert resumed["mile loss"] == whole["mile loss"][6:]
    source.write_text(FILE.replace("1.0 +", "1.5 +"))
    try:
        other = runs.run(2, TP2, flags, load, repeat=1)
        (error,) = mile_errors("\n".join(other.logs))
        assert f"another objective: objective_file {digest[:12]} -> " in error
        assert other.code != 0
        allowed = runs.train(2, TP2, flags, load, "--mile-allow-change")
        assert allowed["lm loss"][0] == pytest.approx(whole["lm loss"][6], rel=2e-7)
        assert allowed["mile weight"][0] > 1.1 * whole["mile weight"][6]
    finally:
        source.write_text(FILE)
    dropped = runs.run(2, TP2, MILE, load)
    (error,) = mile_errors("\n".join(dropped.logs))
    assert "objective mine -> mile" in error


def test_the_file_of_the_design_trains(runs: TrainingRuns, tmp_path: Path) -> None:
    _, text = blocks(text_of("docs/design.md"), "python")
    (tmp_path / "mine.py").write_text(text)
    word = f"{tmp_path}/mine.py:FLOORED"
    flags = MILE.replace("--mile-objective mile --mile-gamma 3", f"--mile-objective {word}")
    floored, dft = (
        runs.train(2, TP2, job)
        for job in (flags, flags.replace(word, "dft"))
    )  # fmt: skip
    assert "floored (alpha global, weights detached)" in floored.logs[0]
    assert floored["lm loss"][0] == dft["lm loss"][0]
    assert furthest(floored["mile weight"], dft["mile weight"]) > 0.01
    assert min(floored["mile weight"]) >= 0.05


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("def weight", "def weight("), "SyntaxError"),
        (("MINE", "YOURS"), "no such name in the file; expected an Objective"),
        (('name="mine"', 'name="mile"'), "an objective named mile exists already"),
        (("entropy)", "entropy.sum())"), "weight returned torch.float64 () on cpu"),
        (("entropy)", "entropy / entropy)"), "weight returned nan for nll 0 and entropy 0"),
        (("", ""), None),
    ],
    ids=["syntax", "name", "existing", "shape", "nan", "missing"],
)
def test_launcher_refuses_a_file_in_one_line(
    tmp_path: Path, change: tuple[str, str], text: str | None
) -> None:
    path = tmp_path / "mine.py"
    if text:
        path.write_text(FILE.replace(*change))
    flags = ("--mile-cpu", "--mile-objective", f"{path}:MINE")
    done = python("-m", "megatron_mile.launch", EXAMPLE, *flags)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("megatron_mile: error: --mile")
    assert str(path) in line
    assert (text or "No such file or directory") in line
