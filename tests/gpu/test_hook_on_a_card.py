"""The hook and the loss function on a card: exact, and without waiting for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_hook_and_loss_function(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("hook_on_a_card.py"))]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [*command, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
