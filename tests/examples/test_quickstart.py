"""The quickstart as a command: what it refuses, and one short run of the whole way."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quickstart
from _corpus import QuickstartError
from _folder import prepare_folder
from _toy import HYBRID, VOCABULARY, Layout

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
STEPS = 3
OBJECTIVES = ["ce", "mile", "emo"]
ENTRY_KEYS = {"first_lm_loss", "final_lm_loss", "checkpoint"}
PPL_KEYS = {"ppl", "ppl_high", "ppl_medium", "ppl_low"}
SUMMARY_KEYS = {
    "objectives",
    "tp",
    "steps",
    "train_tokens",
    "corpus_bytes",
    "vocab_size",
    "padded_vocab_size",
    "megatron_core",
    "torch",
    "device",
    "seconds",
}


def _python(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


def _state(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 50 modules of the standard library, without its packages."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(os.__file__).parent.glob("[a-h]*.py")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the whole way: three objectives, few steps, tensor parallel 2."""
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    flags = ("--corpus", corpus, "--out", out, "--steps", str(STEPS), "--tp", "2")
    flags += ("--objectives", ",".join(OBJECTIVES))
    result = _python(EXAMPLES / "quickstart.py", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not evidence" in result.stdout
    return out


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((finished / "summary.json").read_text())
    return content


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objectives", "ce,mule"), "no objective 'mule'; expected one or more of ce, deft"),
        (("--objectives", ""), "no objective ''"),
        (("--steps", "0"), "--steps 0: expected at least 1"),
        (("--tp", "3"), "--tp 3: expected 1"),
        (("--tp", "0"), "--tp 0: expected 1"),
        (("--corpus", "/nonexistent"), "0 documents"),
        (("--overwrite",), "holds other files (keep.txt)"),
    ],
)
def test_quickstart_refuses_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    out = tmp_path if "--overwrite" in flags else tmp_path / "out"
    with pytest.raises(QuickstartError, match=re.escape(message)) as refused:
        quickstart.quickstart(quickstart.parse_args(["--out", str(out), *flags]))
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


@pytest.mark.slow
def test_quickstart_summary_holds_what_it_promises(summary: dict[str, Any], corpus: Path) -> None:
    assert set(summary) == SUMMARY_KEYS
    assert list(summary["objectives"]) == OBJECTIVES
    for name, entry in summary["objectives"].items():
        assert set(entry) == PPL_KEYS | ENTRY_KEYS
        assert entry["ppl_high"] < entry["ppl"] < entry["ppl_low"]
        record = json.loads((Path(entry["checkpoint"]) / "run_record.json").read_text())
        assert f"--mile-objective {name} " in record["starts"][0]["command"]
    assert (summary["tp"], summary["steps"]) == (2, STEPS)
    assert summary["train_tokens"] == STEPS * 4096
    assert summary["corpus_bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    assert summary["padded_vocab_size"] == summary["vocab_size"] == 4096


@pytest.mark.slow
def test_quickstart_trains_the_same_model_on_the_same_data(summary: dict[str, Any]) -> None:
    ce, *others = summary["objectives"].values()
    assert ce["final_lm_loss"] < ce["first_lm_loss"]
    for other in others:
        assert ce["first_lm_loss"] == pytest.approx(other["first_lm_loss"], rel=1e-6)
        assert ce["final_lm_loss"] != other["final_lm_loss"]
        assert other["final_lm_loss"] < other["first_lm_loss"]


@pytest.mark.slow
def test_quickstart_evaluates_each_checkpoint_on_the_held_out_text(
    finished: Path, summary: dict[str, Any]
) -> None:
    for name, entry in summary["objectives"].items():
        evaluation = json.loads((finished / name / "evaluation.json").read_text())
        assert evaluation["checkpoint"] == str(finished / name / "checkpoints")
        assert evaluation["iteration"] == STEPS
        assert evaluation["data"] == str(finished / "data" / "heldout_text_document")
        assert {key: evaluation[key] for key in PPL_KEYS} == {key: entry[key] for key in PPL_KEYS}


@pytest.mark.slow
def test_quickstart_trains_nothing_on_held_out_text(finished: Path) -> None:
    origins = {
        name: {json.loads(line)["origin"] for line in (finished / "data" / name).open()}
        for name in ("train.jsonl", "heldout.jsonl")
    }
    assert origins["heldout.jsonl"]
    assert not origins["train.jsonl"] & origins["heldout.jsonl"]


@pytest.mark.slow
def test_quickstart_leaves_a_finished_run_alone(finished: Path, corpus: Path) -> None:
    before = _state(finished)
    assert {"quickstart.png", "summary.json"} <= set(before)
    result = _python(EXAMPLES / "quickstart.py", "--corpus", corpus, "--out", finished)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("examples/quickstart.py: error: ")
    assert "give --overwrite or a new --out" in line
    assert _state(finished) == before


@pytest.mark.slow
def test_hybrid_trains_the_same_layers_as_a_hybrid_model(finished: Path, tmp_path: Path) -> None:
    prepare_folder(tmp_path, ["mile"])
    shutil.copytree(finished / "data", tmp_path / "data", dirs_exist_ok=True)
    run = quickstart.Quickstart(tmp_path, ["mile"], 1, Layout(2), HYBRID)
    run.train("mile")
    log = (tmp_path / "logs" / "train_mile.log").read_text()
    assert re.search(r"hybrid_layer_pattern \.+ \*-\*-\*-\*-\*-\*-\n", log)
    assert run.losses("mile")[0] == pytest.approx(math.log(VOCABULARY), abs=0.5)
    assert quickstart.parse_args(["--hybrid"]).hybrid


@pytest.mark.slow
def test_continue_with_emo_goes_on_from_the_checkpoint(
    finished: Path, summary: dict[str, Any], tmp_path: Path
) -> None:
    start, data = summary["objectives"]["mile"]["checkpoint"], finished / "data"
    flags = f"--data-path {data}/train_text_document --data-cache-path {data}/cache --split 100,0,0"
    flags += " --train-iters 2 --micro-batch-size 2 --global-batch-size 2 --num-workers 0"
    flags += " --mile-cpu" * (summary["device"] == "cpu")
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    env = {**os.environ, "TP": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [EXAMPLES / "continue_with_emo.sh", start, tmp_path / "emo", *flags.split()],
        env={**env, "GLOO_SOCKET_IFNAME": loopback, "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"cost rows    {start}, sha256 " in result.stdout
    assert f"successfully loaded checkpoint from {start}" in result.stdout
    steps = re.findall(r"lm loss: (\S+) .*mile emo: (\S+)", result.stdout)
    assert len(steps) == 2
    for loss, distance in steps:
        # Near where the checkpoint's training ended, and far from its beginning; [0, 2].
        first, final = (summary["objectives"]["mile"][f"{x}_lm_loss"] for x in ("first", "final"))
        assert float(loss) < (first + final) / 2 + 0.5
        assert 0 < float(distance) < 2
    assert (tmp_path / "emo" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_continue_with_emo_explains_itself() -> None:
    result = subprocess.run([EXAMPLES / "continue_with_emo.sh"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "TP=2 examples/continue_with_emo.sh CHECKPOINT OUT" in result.stderr
