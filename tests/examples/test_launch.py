"""The shell scripts: their syntax, their help, and the command that they would run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
LAUNCH = EXAMPLES / "launch.sh"
SIZES = sorted((EXAMPLES / "sizes").glob("*.sh"))
SCRIPTS = [LAUNCH, *SIZES, EXAMPLES / "slurm.sbatch", EXAMPLES / "continue_with_emo.sh"]
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
# Nothing of the machine that runs the tests: no GPU, no virtual environment of the clone.
PLAIN = {"PATH": "/usr/bin:/bin", "PYTHON": "python3"}


def launch(script: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *flags],
        env={**PLAIN, **variables},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def command(script: Path, *flags: str, **variables: str) -> list[str]:
    """The words of the command that a script would run."""
    result = launch(script, "--dry-run", *flags, **variables)
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


def value(words: list[str], flag: str) -> str:
    """What the last `flag` is followed by: the one that counts."""
    return words[len(words) - words[::-1].index(flag)]


@pytest.mark.parametrize(
    "script", [*SCRIPTS, *(ROOT / "tools").rglob("*.sh")], ids=lambda path: path.name
)
def test_script_is_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_help_names_every_variable_that_is_read() -> None:
    text = launch(LAUNCH, "--help").stdout
    assert launch(SIZES[0], "--train-iters", "3", "--help").stdout == text
    source = LAUNCH.read_text(encoding="utf-8").partition("set -euo pipefail")[2]
    read = set(re.findall(r"\$\{([A-Z][A-Z_]+)", source))
    named = set(re.findall(r"^  ([A-Z].*?)  ", text, flags=re.M))
    inherited = {"PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}
    assert read - inherited - {"BASH_SOURCE"} == set(", ".join(named).split(", "))


@pytest.mark.parametrize("script", SIZES, ids=lambda path: path.stem)
def test_size_starts_one_node_on_mock_data(script: Path) -> None:
    words = command(script)
    start = words.index("-m")
    assert words[start : start + 2] == ["-m", "torch.distributed.run"]
    assert value(words, "--nnodes") == "1"
    assert value(words, "--rdzv-endpoint") == "127.0.0.1:0"
    assert value(words, "megatron_mile.launch") == str(EXAMPLES / "pretrain_gpt.py")
    assert "--mock-data" in words
    assert "--bf16" in words
    run = f"runs/{script.stem}-mile"
    assert value(words, "--save") == value(words, "--load") == f"{run}/checkpoints"
    assert value(words, "--mile-objective") == "mile"


def test_launch_takes_the_objective_as_a_flag_or_a_variable() -> None:
    for words in (
        command(SIZES[0], "--mile-objective", "ce"),
        command(SIZES[0], "--mile-objective=ce"),
        command(SIZES[0], OBJECTIVE="ce"),
        command(SIZES[0], "--mile-objective", "ce", OBJECTIVE="focal"),
    ):
        assert words.count("--mile-objective") == 1
        assert value(words, "--mile-objective") == "ce"
        assert value(words, "--save").endswith("-ce/checkpoints")


def test_launch_names_the_run_of_a_users_own_objective_by_its_name() -> None:
    words = command(SIZES[0], "--mile-objective", "path/to/mine.py:FLOORED")
    assert value(words, "--mile-objective") == "path/to/mine.py:FLOORED"
    assert value(words, "--save") == f"runs/{SIZES[0].stem}-FLOORED/checkpoints"


def test_launch_passes_flags_on_and_lets_them_win() -> None:
    words = command(
        SIZES[0], "--log-interval", "1", "--train-iters", "7", "--wandb-exp-name", "a b"
    )
    assert words[-6:] == ["--log-interval", "1", "--train-iters", "7", "--wandb-exp-name", "a b"]
    assert words.index("--log-interval") < len(words) - 6


def test_launch_takes_layout_precision_and_paths_from_variables() -> None:
    words = command(
        SIZES[0], TP="2", PP="4", CP="8", MICRO_BATCH="3", PRECISION="fp32", RUN_DIR="/r"
    )
    for flag, expected in {
        "--tensor-model-parallel-size": "2",
        "--pipeline-model-parallel-size": "4",
        "--context-parallel-size": "8",
        "--micro-batch-size": "3",
        "--nproc-per-node": "64",
        "--tensorboard-dir": "/r/tensorboard",
    }.items():
        assert value(words, flag) == expected
    assert "--bf16" not in words
    assert value(command(SIZES[0], TP="2", GPUS_PER_NODE="8"), "--nproc-per-node") == "8"


def test_launch_leaves_out_what_needs_a_gpu_in_cpu_mode() -> None:
    on_gpu, on_cpu = command(SIZES[0]), command(SIZES[0], "--mile-cpu")
    assert set(on_gpu) - set(on_cpu) == {
        "--sequence-parallel",
        "--use-distributed-optimizer",
        "--overlap-grad-reduce",
        "--overlap-param-gather",
    }
    assert set(on_cpu) - set(on_gpu) == {"--mile-cpu"}


def test_launch_reads_a_blend_of_data() -> None:
    words = command(SIZES[0], DATA_PATH="0.3 /d/a\n0.7 /d/b", TOKENIZER_MODEL="/d/llama.model")
    start = words.index("--data-path")
    assert words[start : start + 6] == ["--data-path", "0.3", "/d/a", "0.7", "/d/b", "--split"]
    assert value(words, "--tokenizer-type") == "Llama2Tokenizer"
    assert "--mock-data" not in words
    # Megatron would take the mock data and not say so.
    words = command(SIZES[0], "--data-args-path", "blend.txt")
    assert not {"--mock-data", "NullTokenizer"} & set(words)


def test_launch_joins_several_nodes() -> None:
    words = command(SIZES[0], NNODES="4", NODE_RANK="2", MASTER_ADDR="node0", GPUS_PER_NODE="8")
    start = words.index("--nnodes")
    assert words[start : words.index("megatron_mile.launch") - 1] == shlex.split(
        "--nnodes 4 --nproc-per-node 8 --node-rank 2 --master-addr node0 --master-port 29500"
    )


def test_launch_runs_the_script_of_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "pretrain_gpt.py").touch()
    words = command(SIZES[0], MEGATRON_LM_DIR=str(tmp_path))
    assert value(words, "megatron_mile.launch") == str(tmp_path / "pretrain_gpt.py")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PRECISION": "fp8"}, "PRECISION=fp8: expected bf16 or fp32"),
        ({"DATA_PATH": "/d/a"}, "DATA_PATH is set; set TOKENIZER_MODEL too"),
        # What is no number must not reach the shell's arithmetic, which would run a command in it.
        ({"TP": "PATH[$(kill $$)]"}, "TP=PATH[$(kill $$)]: expected a whole number from 1"),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: expected a whole number from 1"),
        ({"NNODES": "2"}, "NNODES=2: set MASTER_ADDR to the address of node 0"),
        ({"MEGATRON_LM_DIR": "/no"}, "no /no/pretrain_gpt.py; set MEGATRON_LM_DIR to"),
    ],
    ids=lambda case: "" if isinstance(case, str) else next(iter(case)),
)
def test_launch_refuses_in_one_line(variables: dict[str, str], message: str) -> None:
    result = launch(SIZES[0], **variables)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"examples/launch.sh: error: {message}")


def test_launch_wants_an_objective_after_its_flag() -> None:
    result = launch(SIZES[0], "--mile-objective")
    assert (result.returncode, result.stderr) == (
        2, "examples/launch.sh: error: --mile-objective: expected a name, such as mile\n"
    )  # fmt: skip


def test_continue_with_emo_resumes_where_there_is_something_to_resume(tmp_path: Path) -> None:
    script, out, start = EXAMPLES / "continue_with_emo.sh", tmp_path / "out", tmp_path / "start"
    refused = launch(script, str(start), str(out), PYTHON="echo")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"CHECKPOINT is {start} and OUT {out}; expected a folder" in refused.stderr
    start.mkdir()
    assert launch(script, str(start), f"{start}/.", PYTHON="echo").returncode == 2
    for exists in (False, True):
        if exists:
            out.mkdir()
            (out / "latest_checkpointed_iteration.txt").write_text("2")
        words = launch(script, str(start), str(out), "--mile-cpu", PYTHON="echo").stdout.split()
        assert value(words, "--load") == str(out if exists else start)
        assert ("--finetune" in words) is not exists
        assert (value(words, "--save"), value(words, "--mile-emo-cost")) == (str(out), str(start))
        assert words[-1] == "--mile-cpu"


def test_slurm_script_asks_for_a_script() -> None:
    result = launch(EXAMPLES / "slurm.sbatch")
    assert result.returncode == 2
    assert result.stderr.startswith("examples/slurm.sbatch: error: name a script")


def _flag(words: list[str], flag: str) -> float:
    return float(value(words, "--" + flag))


def test_readme_table_is_what_the_scripts_say() -> None:
    rows = {
        row[0].strip(" `"): [cell.strip() for cell in row[1:]]
        for row in (line.strip("|").split("|") for line in README.splitlines() if "| `" in line)
    }
    columns = ("num-layers", "hidden-size", "num-attention-heads", "ffn-hidden-size", "seq-length")
    for script in SIZES:
        words = command(script)
        batch, sequence = _flag(words, "global-batch-size"), _flag(words, "seq-length")
        tokens = batch * sequence * _flag(words, "train-iters")
        assert [float(cell) for cell in rows[script.stem][1:6]] == [
            _flag(words, c) for c in columns
        ]
        assert rows[script.stem][6:9] == [
            f"{tokens / 1e9:.2f}B", f"{batch:.0f}", f"{_flag(words, 'train-iters'):,.0f}"
        ]  # fmt: skip


def test_readme_commands_parse() -> None:
    """Commands name files that exist, and those of a size script pass its own checks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    named = [word for line in lines for word in line.split() if re.match("(examples|tools)/", word)]
    assert [name for name in named if not (ROOT / name).exists()] == []
    starts = [line for line in lines if re.match(r'([A-Z_]+=("[^"]*"|\S+) )*examples/', line)]
    assert len(starts) == 5
    for line in starts:
        dry_run = re.sub(r"(  #.*)?$", " --dry-run", line, count=1)
        words = ["bash", "-c", dry_run]
        result = subprocess.run(words, cwd=ROOT, env=PLAIN, capture_output=True, check=False)
        assert result.stdout.startswith(b"env PYTHONPATH="), (line, result.stderr)
