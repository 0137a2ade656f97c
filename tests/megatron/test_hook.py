"""The hook on a real GPTModel, in one process: the checks of several scripts, one test each."""

import json
import re
from pathlib import Path

import pytest
from training_runs import HERE, TrainingRuns

pytestmark = pytest.mark.slow

# Read as text: importing the scripts would import Megatron into this process.
CHECKS = [
    pytest.param(script, check, id=check)
    for script in sorted(HERE.glob("*_checks.py"))
    for check in re.findall(r"^def (check_\w+)", script.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_hook(runs: TrainingRuns, script: Path, check: str) -> None:
    run = runs.train(1, script=script)
    failure = json.loads((run.folder / "checks.json").read_text())[check]
    assert not failure, failure
