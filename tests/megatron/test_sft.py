"""Megatron's own SFT dataset, tokenizer and mask: real training runs on the CPU."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support import conversations
from support.training_runs import JOBS, MILE, TP1, TP2, TrainingRuns, furthest, mile_errors

pytestmark = pytest.mark.slow

ORACLE = JOBS / "sft_oracle.py"
# Packed sequences as Transformer Engine's attention takes them, in a model that needs no attention.
MLPS = (
    "--hybrid-layer-pattern=---- --position-embedding-type none "
    "--transformer-impl transformer_engine"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flags of an SFT job instead of --mock-data."""
    folder = tmp_path_factory.mktemp("sft")
    conversations.write_tokenizer(folder / "tokenizer")
    conversations.write_conversations(folder / "talk.jsonl", lines=64)
    return (
        f"--sft --tokenizer-type SFTTokenizer --tokenizer-model {folder / 'tokenizer'} "
        f"--data-path {folder / 'talk.jsonl'} --split 100,0,0 --train-iters 4"
    )


@pytest.mark.parametrize("model", ["", MLPS], ids=["mask", "packed"])
def test_sft_trains_what_the_assistant_says(runs: TrainingRuns, data: str, model: str) -> None:
    job = MILE.replace("--mock-data", data)
    run = runs.train(1, TP1, job, model, save=True, script=ORACLE)
    truth = json.loads((run.folder / "expected.json").read_text())
    assert 0 < truth["tokens"] < truth["all"] / 3
    for figure in ("lm loss", "mile loss"):
        assert furthest(run[figure][:1], [truth[figure]]) < 1e-6  # measured 5.3e-8


def test_sft_with_ce_is_the_hosts_at_other_layouts(runs: TrainingRuns, data: str) -> None:
    start = runs.train(1, TP1, MILE.replace("--mock-data", data), "", save=True, script=ORACLE)
    job = f"{data} --mile-cpu --load {start.checkpoint} --finetune --mile-allow-change"
    host = runs.train(2, TP1, "--pipeline-model-parallel-size 2", job)
    ours = runs.train(2, TP2, job, "--mile-objective ce")
    for figure in ("lm loss", "grad-norm"):
        assert furthest(ours[figure], host[figure]) < 1e-6  # measured 2.0e-7


def test_sft_records_its_file_and_refuses_another(runs: TrainingRuns, data: str) -> None:
    job = MILE.replace("--mock-data", data)
    run = runs.train(1, TP1, job, "", save=True, script=ORACLE)
    record = json.loads((run.checkpoint / "run_record.json").read_text())
    (entry,) = record["starts"][0]["data"]["blends"][0]
    file = Path(entry["prefix"])
    content = file.read_bytes()
    assert entry["file"] == f"{len(content)}:{hashlib.sha256(content).hexdigest()}"
    conversations.write_conversations(file.with_name("other.jsonl"), lines=64, seed=1)
    other = job.replace("talk.jsonl", "other.jsonl")
    refused = runs.run(1, TP1, other, f"--load {run.checkpoint}")
    assert refused.code != 0
    (error,) = mile_errors(refused.logs[0])
    assert (
        f"trained with other data or tokenizer: {file} -> {file.with_name('other.jsonl')}" in error
    )


@pytest.mark.parametrize(
    ("world_size", "flags", "text"),
    [
        (1, "--data-path absent.jsonl", "absent.jsonl: no such file; check --data-path"),
        (2, "--context-parallel-size 2", "--context-parallel-size 2 needs Transformer Engine;"),
    ],
    ids=["file", "cp"],
)
def test_sft_refuses_in_one_line(
    runs: TrainingRuns, data: str, world_size: int, flags: str, text: str
) -> None:
    run = runs.run(world_size, TP1, MILE.replace("--mock-data", data), flags)
    assert run.code != 0
    (error,) = mile_errors("\n".join(run.logs))
    assert text in error
    assert "Traceback" not in "".join(run.logs)
