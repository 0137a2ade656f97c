"""The hook on a real GPTModel: the checks of several scripts, one test each."""

import json
import re
from pathlib import Path

import pytest
from training_runs import HERE, TrainingRuns

pytestmark = [pytest.mark.slow, pytest.mark.compat]

TWO_RANKS = ("hook_shard_checks.py", "hook_data_checks.py", "hook_mask_checks.py")
# Read as text: importing the scripts would import Megatron into this process.
CHECKS = [
    pytest.param(script, check, id=f"{script.stem}-{check}")
    for script in sorted(HERE.glob("*_checks.py"))
    for check in re.findall(r"^def (check_\w+)", script.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_hook(runs: TrainingRuns, script: Path, check: str) -> None:
    run = runs.train(2 if script.name in TWO_RANKS else 1, script=script)
    failure = json.loads((run.folder / "checks.json").read_text())[check]
    assert not failure, failure
