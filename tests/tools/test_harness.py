"""tools/evaluate.py --hf and --compare: the real harness on a small model and a local task."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.llama_models import convert
from transformers import AutoTokenizer, LlamaForCausalLM

from tools.evaluate import main

ROOT = Path(__file__).parents[2]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {train: TRAIN, test: TEST}}
test_split: test
fewshot_split: train
fewshot_config: {sampler: first_n}
output_type: multiple_choice
doc_to_text: !function local_utils.text
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
# Some tasks of the harness import this package; it is not tools/evaluate.py.
TASK_CODE = """
from evaluate import load


def text(doc):
    return doc["question"]
"""
WORDS = ("self", "return", "import", "class", "value", "name", "None", "error", "string")


def _documents(number: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "question": " ".join(rng.choices(WORDS, k=4)),
            "choices": rng.sample(WORDS, 3),
            "answer": rng.randrange(3),
        }
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def model_folder(llama_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA of two layers, untrained, as Megatron's checkpoint of it is converted."""
    return convert("hf", llama_checkpoint, tmp_path_factory.mktemp("converted") / "hf")


def _oracle(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> float:
    """Share of the documents whose answer has the largest log-likelihood, in float64."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown = "".join(f"{doc['question']} {doc['choices'][doc['answer']]}\n\n" for doc in train)
    right = 0
    for doc in test:
        start = shown + doc["question"]
        sums = []
        for choice in doc["choices"]:
            ids = tokenizer(f"{start} {choice}", return_tensors="pt").input_ids
            size = len(tokenizer(start).input_ids)
            with torch.no_grad():
                log_p = torch.log_softmax(model(ids).logits[0, :-1], -1)
            sums.append(log_p.gather(1, ids[0, 1:, None])[size - 1 :].sum().item())
        right += max(range(3), key=sums.__getitem__) == doc["answer"]
    return right / len(test)


def _evaluate(*flags: object, home: Path) -> subprocess.CompletedProcess[str]:
    # Nothing listens on port 9: the Hub is not reached wherever the test runs.
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "evaluate.py"), *map(str, flags), "--cpu"],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_evaluate_hf_scores_equal_an_oracle_and_missing_data_is_named(
    model_folder: Path, tmp_path: Path
) -> None:
    train, test = _documents(2, seed=0), _documents(40, seed=1)
    (tmp_path / "tasks").mkdir()
    yaml = TASK
    for name, documents in (("TRAIN", train), ("TEST", test)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        yaml = yaml.replace(name, str(path))
    (tmp_path / "tasks" / "local_choice.yaml").write_text(yaml)
    (tmp_path / "tasks" / "local_utils.py").write_text(TASK_CODE)
    output = tmp_path / "evaluation.json"
    done = _evaluate(
        *("--hf", model_folder, "--tasks", "local_choice", "piqa", "--shots", 0, 2),
        *("--task-folder", tmp_path / "tasks", "--output", output),
        home=tmp_path / "home",
    )
    assert done.returncode == 0, done.stderr
    (line,) = [row for row in done.stderr.splitlines() if row.startswith("tools/evaluate.py")]
    assert line.startswith("tools/evaluate.py: left out: no data for piqa (")
    harness = json.loads(output.read_text())["harness"]
    assert list(harness["missing"]) == ["piqa"]
    expected = {"0": _oracle(model_folder, [], test), "2": _oracle(model_folder, train, test)}
    found = {shots: tasks["local_choice"]["acc"] for shots, tasks in harness["scores"].items()}
    assert found == expected
    assert len(set(expected.values())) == 2  # so that ignored shots would be seen
    assert f"2-shot, local_choice (%)  {100 * expected['2']:.2f} ± " in done.stdout


def test_evaluate_hf_without_any_data_is_one_line(model_folder: Path, tmp_path: Path) -> None:
    done = _evaluate("--hf", model_folder, home=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("tools/evaluate.py: error: no data for boolq, hellaswag, ")
    assert "webqs, mmlu (" in line
    assert "run once where the Hugging Face Hub can be reached" in line
    assert done.stdout == ""


def _evaluation(folder: Path, ppl: float | None, scores: dict[str, Any]) -> Path:
    folder.mkdir()
    content: dict[str, Any] = {"harness": {"scores": scores, "missing": {}}}
    if ppl:
        content |= {"ppl": ppl, "ppl_high": ppl / 2, "ppl_medium": 3 * ppl, "ppl_low": 9 * ppl}
    path = folder / "evaluation.json"
    path.write_text(json.dumps(content))
    return path


def test_compare_lays_out_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scores(add: float) -> dict[str, dict[str, float]]:
        return {
            "piqa": {"acc": 0.6 + add, "acc_stderr": 0.01, "acc_norm": 0.1},
            "webqs": {"exact_match": 0.05 + add, "exact_match_stderr": 0.002},
        }

    few = {"piqa": {"acc": 0.5}}
    files = [
        _evaluation(
            tmp_path / "ce", 12.5, {"0": {**scores(0), "more": {"acc": 0.9}}, "10": few, "5": few}
        ),
        _evaluation(tmp_path / "mile", None, {"0": {**scores(0.02), "extra": {"acc": 1}}}),
    ]
    picture = tmp_path / "out.png"
    main(["--compare", *map(str, files), "--picture", str(picture)])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: [cell.strip() for cell in line[1:] if cell] for line in lines}
    assert rows[""] == ["ce", "mile"]
    assert rows["perplexity, all tokens"] == ["12.500", "-"]
    assert rows["0-shot, piqa (%)"] == ["60.00 ± 1.00", "62.00 ± 1.00"]
    assert rows["0-shot, webqs (%)"] == ["5.00 ± 0.20", "7.00 ± 0.20"]
    assert rows["0-shot, average (%)"] == ["32.50", "34.50"]
    assert rows["0-shot, more (%)"] == ["90.00", "-"]
    assert rows["0-shot, extra (%)"] == ["-", "100.00"]
    order = [name for name in rows if "piqa" in name]
    assert order == [f"{shots}-shot, piqa (%)" for shots in (0, 5, 10)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [picture]


def test_evaluate_unusable_flags_are_named(
    tmp_path: Path, model_folder: Path, failure: Callable[..., str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "not an evaluation" in failure(main, "--compare", other)
    good = _evaluation(tmp_path / "good", 2.0, {})
    assert "--picture" in failure(main, "--compare", good, "--picture", tmp_path / "a.xyz")
    assert "no config.json" in failure(main, "--hf", tmp_path)
    for words in ([], ["--load", "x"], ["--load", "x", "--hf", "y", "--compare", good]):
        failure(main, *words, status=2)
