"""A fuzz of the data tools: damaged inputs, odd numbers, odd outputs.

Whatever is wrong, a tool ends in time with one line and a non-zero status, and leaves every file as
it was; or it succeeds, and then its result is the one that the undamaged input gives. Some damage
cannot be told from other content: a digit in a text, a token, a weight. `_ALIKE` names it.

`make test` runs some 100 cases; `pytest tests/tools/test_fuzz.py --hypothesis-profile long` 960,
others in every run.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from support import damages, samples
from support.damages import Case
from support.samples import COMMANDS, Command
from support.tool_forker import Finished, ToolForker

CASES = max(1, settings.default.max_examples * 8 // 100)
_SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
# Damage after which the content is one that could have been meant, by the file that it is in.
_ALIKE = re.compile(
    r"in\.jsonl|.*\.txt|.*\.zst|tok/.*|.*partial/.*\.bin|.*document\.bin|runs/.*\.json"
    r"|llama/.*"
)
# Flags with which another result is right.
_OTHER_RESULT = (
    *("--vocab-size", "--min-frequency", "--micro-batch-size"),
    "--tiktoken-num-special-tokens",  # a part of the .info
    "rotary_base",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each case has a folder for itself."""
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def expected(sample: Path, place: Path, forker: ToolForker) -> dict[str, dict[str, object]]:
    """What each command writes when nothing is wrong."""
    found = {}
    for name, command in COMMANDS.items():
        folder = samples.copy(sample, place / "undamaged")
        before = samples.state_of(folder)
        done = samples.run(forker, command, folder)
        assert (done.code, "Traceback" in done.err) == (0, False), done.err
        _assert_files_stay(before, command, [*command.output], folder)
        found[name] = _written(folder, command.output[1], command)
        shutil.rmtree(folder)
    return found


def _written(folder: Path, output: str, command: Command) -> dict[str, object]:
    """What a command wrote, by the name's end."""
    kind = Path(command.output[1]).suffix
    ends = {end: Path(f"{folder}/{output}{end}") for end in command.suffixes}
    return {end: _content(path, Path(end).suffix or kind) for end, path in ends.items()}


def _content(path: Path, kind: str) -> object:
    """What a file of this kind says, without what differs between two runs."""
    if kind == ".svg":
        return path.read_text().startswith("<?xml")
    if kind == ".distcp":
        return samples.checkpoint_content(path.parent)
    if kind not in (".json", ".info"):
        return path.read_bytes()
    content = json.loads(path.read_text())
    for name in ("seconds", "source", "data", "checkpoint"):
        content.pop(name, None)
    return content


def _assert_files_stay(
    before: dict[str, object], command: Command, flags: list[str], folder: Path
) -> None:
    """Every file is as it was, but for an earlier output and the folder of a run that goes on."""
    after = samples.state_of(folder)
    named = _named(command, flags)
    replaced = {named + end for end in command.suffixes} - {*command.inputs}
    for path, content in before.items():
        if path not in replaced and not path.startswith(f"{named}.partial"):
            assert after.get(path, "lost") == content, f"{path} was changed or removed"


def _named(command: Command, flags: list[str]) -> str:
    return flags[flags.index(command.output[0]) + 1]


def _assert_failed(done: Finished, command: Command) -> None:
    """A failure is one line, after the usage where a flag is wrong."""
    assert done.code in (1, 2), done
    (line,) = [line for line in done.err.splitlines() if ": error: " in line][-1:] or [""]
    assert line.startswith(f"tools/{command.tool}.py: error: "), done.err
    assert done.err.endswith(line + "\n"), done.err


def _assert_nothing_is_left(before: dict[str, object], folder: Path) -> None:
    """What is there and was not is a folder that the same command goes on from."""
    for path in samples.state_of(folder).keys() - before.keys():
        work = Path(*Path(path).parts[:1])
        assert work.suffix == ".partial", f"{path} was left"
        assert (folder / work / "progress").exists(), f"{path} was left"


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_wrong_is_silent_lost_or_a_traceback(
    name: str,
    sample: Path,
    place: Path,
    forker: ToolForker,
    expected: dict[str, dict[str, object]],
) -> None:
    command = COMMANDS[name]

    @settings(max_examples=CASES, deadline=None, suppress_health_check=_SLOW, print_blob=True)
    @given(case=damages.cases(command))
    def run(case: Case) -> None:
        with tempfile.TemporaryDirectory(dir=place) as own:
            folder = samples.copy(sample, Path(own) / "folder")
            flags = damages.apply(case, command, folder)
            before = samples.state_of(folder)
            done = forker.run(command.tool, flags, folder)
            for text in ("Traceback", "Exception ignored", "panicked"):
                assert text not in done.err, done.err
            _assert_files_stay(before, command, flags, folder)
            if done.code:
                _assert_failed(done, command)
                _assert_nothing_is_left(before, folder)
            else:
                _assert_right(case, command, folder, flags, expected[name])

    run()


def _assert_right(
    case: Case, command: Command, folder: Path, flags: list[str], expected: dict[str, object]
) -> None:
    """The result is that of the undamaged input, unless nobody can tell it is damaged."""
    written = _written(folder, _named(command, flags), command)
    if case.target in _OTHER_RESULT or _ALIKE.fullmatch(case.target):
        assert all(written.values())
    else:
        assert written == expected, f"silent: {case}"
    if case.target.endswith(".bin") and command.tool == "token_frequency":
        ids = np.fromfile(folder / case.target, np.uint16)
        counts = np.bincount(ids, minlength=samples.VOCABULARY).tolist()
        assert json.loads((folder / command.output[1]).read_text())["counts"] == counts
