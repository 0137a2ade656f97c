"""Each command of `samples` succeeds on the undamaged folder, and changes nothing else there."""

from __future__ import annotations

from pathlib import Path

import pytest
import samples
from tool_forker import ToolForker


@pytest.mark.parametrize("name", samples.COMMANDS)
def test_command_succeeds(name: str, sample: Path, tmp_path: Path, forker: ToolForker) -> None:
    command = samples.COMMANDS[name]
    folder = samples.copy(sample, tmp_path / "s")
    before = samples.state_of(folder)
    done = samples.run(forker, command, folder)
    assert (done.code, done.err.count("Traceback")) == (0, 0), done.err
    after = samples.state_of(folder)
    print(done.out, done.err)
    print(
        {k for k in after if after.get(k) != before.get(k)}, {k for k in before if k not in after}
    )
