"""tools/evaluate.py on checkpoints of real training runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.training_runs import JOBS, MILE, REPOSITORY, TP2, TrainingRuns, python

EVALUATE = REPOSITORY / "tools" / "evaluate.py"
FREQUENCY = REPOSITORY / "tools" / "token_frequency.py"
LENGTH = 64  # --seq-length of the runs
VOCABULARY = 251

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def held_out(runs: TrainingRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of documents, and the frequencies of its tokens."""
    folder = tmp_path_factory.mktemp("held_out")
    assert runs.call(JOBS / "write_documents.py", folder / "text").returncode == 0
    count = ("--data-prefix", folder / "text", "--vocab-size", str(VOCABULARY))
    done = runs.call(FREQUENCY, *count, "--output", folder / "frequency.json")
    assert done.returncode == 0, done.stdout
    return folder


def test_evaluate_equals_a_plain_loop_over_logits_and_repeats_itself(
    runs: TrainingRuns, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = held_out
    checkpoint = runs.train(2, MILE, TP2, save=True).checkpoint
    command = f"--load {checkpoint} --data-prefix {folder}/text --cpu --micro-batch-size 7".split()
    command += ["--token-frequency", str(folder / "frequency.json"), "--output"]
    # A Hugging Face folder whose tasks have no data here: the rest must run all the same.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")
    harness = ("--hf", folder / "hf", "--tasks", "piqa")
    done = python(EVALUATE, *command, folder / "first.json", *harness)
    assert done.returncode == 0, done.stderr
    assert "cross-entropy" in done.stdout
    assert "left out: no data for piqa (" in done.stderr
    done = runs.call(EVALUATE, *command, folder / "second.json")
    assert done.returncode == 0, done.stdout
    results = [json.loads((folder / name).read_text()) for name in ("first.json", "second.json")]
    for result in results:
        del result["seconds"]
    assert results[0].pop("harness")["missing"]
    assert results[0] == results[1]
    oracle_run = runs.call(
        JOBS / "evaluate_oracle.py", checkpoint, folder / "text", folder / "frequency.json", LENGTH
    )
    assert oracle_run.returncode == 0, oracle_run.stdout
    oracle = json.loads(oracle_run.stdout.splitlines()[-1])
    assert results[0]["tokens"] == sum(oracle["counts"]) > 10 * LENGTH
    assert (results[0]["vocab_size"], results[0]["padded_vocab_size"]) == (VOCABULARY, 256)
    expected = sum(oracle["sums"]) / sum(oracle["counts"])
    # The host sums each token in fp32, the oracle in fp64; over 12,000 tokens measured 6e-11.
    assert results[0]["cross_entropy"] == pytest.approx(expected, rel=1e-8)
    for index, name in enumerate(("high", "medium", "low")):
        mean = oracle["sums"][index] / oracle["counts"][index]
        assert results[0][f"tokens_{name}"] == oracle["counts"][index]
        assert results[0][f"cross_entropy_{name}"] == pytest.approx(mean, rel=1e-6)


def test_evaluate_refuses_what_does_not_fit(
    runs: TrainingRuns, held_out: Path, tmp_path: Path
) -> None:
    folder = held_out
    checkpoint = runs.train(2, MILE, TP2, save=True).checkpoint
    small = tmp_path / "small.json"
    counts = {"tokens": 100, "counts": [80, 0, 15, 0, 5], "bucket": [0, 2, 1, 2, 2]}
    small.write_text(json.dumps({"vocab_size": 5, **counts}))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "latest_checkpointed_iteration.txt").write_text("12")
    cases = (
        (tmp_path, folder / "text", None, "no Megatron checkpoint in"),
        (broken, folder / "text", None, "no torch_dist checkpoint at"),
        (checkpoint, folder / "nothing", None, "no file"),
        (checkpoint, folder / "text", small, "do not fit the vocabulary of 5"),
        (checkpoint, folder / "text", tmp_path / "absent.json", "No such file"),
    )
    for load, data, frequency, message in cases:
        words = ["--load", load, "--data-prefix", data, "--output", tmp_path / "out.json"]
        words += ["--token-frequency", frequency] if frequency else []
        done = runs.call(EVALUATE, *words)
        assert done.returncode == 1
        (line,) = [row for row in done.stdout.splitlines() if row.startswith("tools/evaluate.py")]
        assert message in line
        assert "Traceback" not in done.stdout
    assert not (tmp_path / "out.json").exists()
