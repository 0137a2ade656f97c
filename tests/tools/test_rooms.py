"""How the files of tools/ depend on each other, and what a command finds when it is run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").rglob("*.py"))
SCRIPTS = [
    *(file for file in FILES if file.count("/") == 1 and not file.endswith("__init__.py")),
    *(f"tools/bench/{name}.py" for name in ("gpu", "paired_steps", "plot", "run", "train_step")),
]


def module(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(source: str) -> set[str]:
    """The modules that a file imports anywhere, and the names from them."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def path_edits(source: str) -> list[str]:
    """The statements that change sys.path."""
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    simple = (node for node in statements if isinstance(node, ast.Assign | ast.Expr))
    return [text for text in map(ast.unparse, simple) if text.startswith("sys.path")]


@pytest.mark.parametrize("file", FILES)
def test_file_imports_no_script_and_nothing_of_examples_or_tests(file: str) -> None:
    found = imports((ROOT / file).read_text(encoding="utf-8"))
    assert not found & set(map(module, SCRIPTS))
    assert not {name.split(".")[0] for name in found} & {"examples", "tests"}
    own = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert not found & own


@pytest.mark.parametrize("file", FILES)
def test_file_changes_sys_path_in_one_way(file: str) -> None:
    edits = path_edits((ROOT / file).read_text(encoding="utf-8"))
    depth = file.count("/")
    expected = [f"sys.path[0] = str(Path(__file__).resolve().parents[{depth}])"]
    if file == "tools/bench/paired_steps.py":  # which becomes the script that it runs
        expected.append("sys.path[0] = str(SCRIPT.parent)")
    assert edits == (expected if file in SCRIPTS else [])


def test_the_checks_find_each_kind() -> None:
    assert "tools.evaluate" in imports("def f():\n    from tools import evaluate")
    assert "_toy" in imports("from _toy import MODEL")
    source = "import sys\nif True:\n    sys.path.insert(0, 'x')\nsys.path[:0] = ['y']"
    assert len(path_edits(source)) == 2


def test_a_command_runs_from_any_folder_and_hides_no_package(tmp_path: Path) -> None:
    # Ends as --help does, and tells then what the names of two commands import.
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit\n"
        "def tell():\n"
        "    import importlib.util\n"
        "    for name in ('evaluate', 'estimate'):\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        print(name, spec and spec.origin)\n"
        "atexit.register(tell)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "pile_blend.py"), "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    *_, evaluate, estimate = done.stdout.splitlines()
    assert evaluate.startswith("evaluate ")
    assert evaluate.endswith("/evaluate/__init__.py")  # Hugging Face's
    assert estimate == "estimate None"
