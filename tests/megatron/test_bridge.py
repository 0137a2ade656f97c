"""Megatron-Bridge with an objective, by the lines of docs/modes.md, beside plain Megatron."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.run_every_version import CACHE, FRAMEWORKS
from support.training_runs import FIGURES, JOBS, MILE, SAME, TP2, TrainingRuns, furthest

NAME = "megatron-bridge"
FOLDER = CACHE / FRAMEWORKS[NAME].folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER.is_dir(), reason=f"needs {FOLDER}: make test-compat ARGS={NAME} installs it"
    ),
]


@pytest.fixture
def bridge_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainingRuns]:
    """Training runs that find Megatron-Bridge, and the packages that it asks for."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    runs = TrainingRuns(tmp_path)
    yield runs
    runs.close()


def test_bridge_trains_what_megatron_trains(runs: TrainingRuns, bridge_runs: TrainingRuns) -> None:
    plain = runs.train(2, TP2, MILE, "--train-iters 4 --split 969,30,1")
    bridge = bridge_runs.train(2, script=JOBS / "pretrain_bridge.py")
    assert len(bridge["mile loss"]) == 4
    for figure in FIGURES:
        assert furthest(bridge[figure], plain[figure]) <= SAME, figure
