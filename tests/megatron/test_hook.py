"""The hook on a real GPTModel: the checks of several scripts, one test each.

A script holds functions called check_* and the number of RANKS that it runs on. It is parsed and
not imported, because that would import Megatron into this process.
"""

import ast
import json
from pathlib import Path

import pytest
from support.training_runs import JOBS, TrainingRuns

pytestmark = [pytest.mark.slow, pytest.mark.compat]


def ranks_of(script: Path) -> int:
    """The number that a script assigns to RANKS."""
    ranks = [
        ast.literal_eval(node.value)
        for node in ast.parse(script.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RANKS"
    ]
    assert len(ranks) == 1, f"{script.name} must assign RANKS once, the ranks of its checks"
    return int(ranks[0])


def checks_of(script: Path) -> list[str]:
    """The names of the checks that a script defines."""
    body = ast.parse(script.read_text()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if name.startswith("check_")]


CHECKS = [
    pytest.param(script, ranks_of(script), check, id=f"{script.stem}-{check}")
    for script in sorted(JOBS.glob("*_checks.py"))
    for check in checks_of(script)
]


@pytest.mark.parametrize(("script", "ranks", "check"), CHECKS)
def test_hook(runs: TrainingRuns, script: Path, ranks: int, check: str) -> None:
    run = runs.train(ranks, script=script)
    failure = json.loads((run.folder / "checks.json").read_text())[check]
    assert not failure, failure
