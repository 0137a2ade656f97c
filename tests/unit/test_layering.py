"""The library's import rules and the length of its functions, checked on its syntax trees."""

import ast
from pathlib import Path

import pytest

from megatron_mile.objectives import OBJECTIVES

LIBRARY = Path(__file__).parents[2] / "megatron_mile"
FILES = sorted(path.relative_to(LIBRARY).as_posix() for path in LIBRARY.rglob("*.py"))

SCREEN = 64  # lines of a function, its docstring included; of a kernel 72
ENTRY_POINTS = ("launch.py", "__main__.py")
# Package -> where it may be imported; a folder ends with "/".
PERMITS = {
    "megatron": ("integration/", "run_record/", "cpu_mode/"),
    "triton": ("kernel.py",),
    "torch.distributed": ("parallel/", "integration/", "run_record/", *ENTRY_POINTS),
    "argparse": ("integration/arguments.py", *ENTRY_POINTS),
    "megatron_mile.integration": (
        *("integration/", "run_record/", "cpu_mode/"),
        *("__init__.py", *ENTRY_POINTS),
    ),
    "megatron_mile.run_record": ("run_record/", "integration/"),
    "megatron_mile.cpu_mode": ("cpu_mode/", *ENTRY_POINTS),
    "examples": (),
    "tools": (),
    "tests": (),
}
# Folder -> what of this package its files may import.
OWN_IMPORTS = {
    "objectives/": ("megatron_mile.objectives",),
    "ops/": ("megatron_mile.ops",),
    "parallel/": ("megatron_mile.parallel",),
}


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _names(tree: ast.AST) -> set[str]:
    """Return the dotted names that a module imports, or reaches as attributes of an import."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import; write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


def _may_import(file: str, package: str) -> bool:
    if package == "triton":  # any kernel.py below ops/
        return file.startswith("ops/") and file.endswith("/kernel.py")
    return any(file == p or (p.endswith("/") and file.startswith(p)) for p in PERMITS[package])


def violations(file: str, source: str) -> list[str]:
    """Return the names that `file` (relative to the library) must not import."""
    found = []
    for name in sorted(_names(ast.parse(source))):
        if any(_within(name, package) and not _may_import(file, package) for package in PERMITS):
            found.append(name)
        for folder, allowed in OWN_IMPORTS.items():
            own = file.startswith(folder) and _within(name, "megatron_mile")
            if own and not any(_within(name, package) for package in allowed):
                found.append(name)
    return found


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_the_import_rules(file: str) -> None:
    assert violations(file, (LIBRARY / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("loss.py", "from megatron.core import parallel_state"),
        ("loss.py", "import torch.distributed as dist"),
        ("loss.py", "from torch import distributed"),
        ("loss.py", "import torch\ntorch.distributed.get_rank()"),
        ("loss.py", "from megatron_mile.integration import hook"),
        ("loss.py", "import argparse"),
        ("ops/token_stats/reference.py", "import triton.language as tl"),
        ("ops/dispatch.py", "from megatron_mile.config import ObjectiveConfig"),
        ("objectives/mile.py", "from megatron_mile import ops"),
        ("objectives/mile.py", "from megatron_mile.config import ObjectiveConfig"),
        ("parallel/vocab.py", "import megatron_mile.objectives"),
        ("integration/hook.py", "import tools.estimate"),
    ],
)
def test_violations_finds_each_kind(file: str, source: str) -> None:
    assert len(violations(file, source)) >= 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("integration/hook.py", "from megatron.core import parallel_state"),
        ("ops/token_stats/kernel.py", "import triton"),
        ("parallel/tokens.py", "import torch.distributed as dist"),
        ("objectives/mile.py", "from megatron_mile.objectives._objective import Objective"),
        ("loss.py", "from megatron_mile.ops import dispatch"),
    ],
)
def test_violations_finds_nothing_in_fair_imports(file: str, source: str) -> None:
    assert violations(file, source) == []


def _tree(file: str) -> ast.Module:
    return ast.parse((LIBRARY / file).read_text(encoding="utf-8"))


def _module(file: str) -> str:
    parts = ("megatron_mile", *Path(file).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Return modules that import one another, the first and the last the same; [] if none do.

    `imports` has the names that each module imports at its top, in functions and for type checks.
    """
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        done.add(module)
        for name in sorted(imports[module]):
            owners = [owner for owner in imports if _within(name, owner)]
            if owners and (found := visit(max(owners, key=len), [*path, module])):
                return found
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


def test_library_has_no_circle_of_imports() -> None:
    assert circle({_module(file): _names(_tree(file)) for file in FILES}) == []


def test_circle_finds_two_modules_and_three() -> None:
    config = {"p.config": {"p.objectives.OBJECTIVES"}}
    assert circle({**config, "p.objectives": {"torch", "p.loss.x"}, "p.loss": set()}) == []
    assert circle({**config, "p.objectives": {"p.config.ObjectiveConfig"}}) == [
        "p.config",
        "p.objectives",
        "p.config",
    ]
    through = {"p.objectives": {"p.objectives.mile.weight"}, "p.objectives.mile": {"p.config"}}
    assert len(circle({**config, **through})) == 4


@pytest.mark.parametrize("file", FILES)
def test_functions_fit_a_screen_and_the_file_introduces_itself(file: str) -> None:
    tree = _tree(file)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    most = SCREEN + 8 * file.endswith("kernel.py")
    long = [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= most]
    assert long == []
    assert ast.get_docstring(tree)


def compared_names(source: str) -> list[str]:
    """Return the objectives' names that code compares with something."""
    compared = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare)]
    constants = (x for node in compared for x in ast.walk(node) if isinstance(x, ast.Constant))
    return [x.value for x in constants if x.value in OBJECTIVES]


def test_nobody_asks_for_an_objective_by_name() -> None:
    root = LIBRARY.parent
    files = (
        path
        for room in ("megatron_mile", "tools", "examples")
        for path in (root / room).rglob("*.py")
    )
    asking = {str(path): compared_names(path.read_text(encoding="utf-8")) for path in files}
    assert {path: names for path, names in asking.items() if names} == {}


def test_compared_names_finds_each_kind() -> None:
    source = 'a == "emo"; "mile" != b; c in ("ce", "none"); d = {"focal": 1}; f("mile")'
    assert compared_names(source) == ["emo", "mile", "ce"]
