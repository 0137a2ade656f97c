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


def ranks_of(script: ast.Module) -> int:
    """The number that the script assigns to RANKS."""
    (ranks,) = [
        ast.literal_eval(node.value)
        for node in script.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RANKS"
    ]
    return int(ranks)


def checks_of(script: ast.Module) -> list[str]:
    """The names of the checks that the script defines."""
    functions = [node.name for node in script.body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("check_")]


SCRIPTS = {path: ast.parse(path.read_text("utf-8")) for path in sorted(JOBS.glob("*_checks.py"))}
CHECKS = [
    pytest.param(path, ranks_of(script), check, id=f"{path.stem}-{check}")
    for path, script in SCRIPTS.items()
    for check in checks_of(script)
]


@pytest.mark.parametrize(("path", "ranks", "check"), CHECKS)
def test_hook(runs: TrainingRuns, path: Path, ranks: int, check: str) -> None:
    run = runs.train(ranks, script=path)
    failure = json.loads((run.folder / "checks.json").read_text())[check]
    assert not failure, failure
