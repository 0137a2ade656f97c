"""Every command that the documentation names explains itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import flags_by_script

ROOT = Path(__file__).parents[2]
DOCUMENTED = flags_by_script()
# Script -> flags (or words) that its help must name.
EXPECTED = {
    "examples/core_loop.py": ("--tensor-model-parallel-size", "--objective", "--steps", "--cpu"),
    "examples/pretrain_gpt.py": ("--tensor-model-parallel-size", "--mile-objective", "--mile-cpu"),
    "examples/quickstart.py": ("--objectives", "--steps", "--tp", "--out", "--corpus"),
    "tools/estimate.py": ("--size", "--gpus", "--gpu-memory", "--mfu", "--peak-tflops", "--json"),
    "tools/convert_checkpoint.py": ("--to", "--load", "--output", "--dtype", "--model"),
    "tools/evaluate.py": ("--load", "--token-frequency", "--hf", "--shots", "--compare"),
    "tools/pile_blend.py": ("folder", "--output", "--renormalize", "--data-args-path"),
    "tools/plot_runs.py": ("RUN", "--output", "--tag"),
    "tools/preprocess_data.py": ("--input", "--split-domains", "--skip-bad-lines", "--workers"),
    "tools/token_frequency.py": ("--data-prefix", "--tokenizer-type", "--output"),
    "tools/train_tokenizer.py": ("--input", "--vocab-size", "--output"),
}


def _help(*command: str) -> str:
    # One thread, and no GPU: the parser of Megatron needs neither.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    result = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_is_checked_for_every_script() -> None:
    scripts = [*ROOT.glob("examples/[!_]*.py"), *ROOT.glob("tools/[!_]*.py")]
    assert {script.relative_to(ROOT).as_posix() for script in scripts} == set(EXPECTED)


@pytest.mark.parametrize("script", sorted({*EXPECTED, *DOCUMENTED}))
def test_help_names_the_flags(script: str) -> None:
    text = _help(script)
    wanted = {*EXPECTED.get(script, ()), *DOCUMENTED.get(script, ())}
    missing = [flag for flag in wanted if not re.search(rf"{re.escape(flag)}(?![\w-])", text)]
    assert not missing, text


def test_help_of_the_launcher_shows_its_use() -> None:
    text = _help("-m", "megatron_mile.launch")
    assert "--mile-objective" in text
    assert "torchrun" in text
