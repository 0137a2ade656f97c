"""The size scripts through Megatron's own parser and model, and what tools/estimate.py makes of it.

Oracles are closed forms of the architecture, written here from the paper's shapes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

GIB = 2**30
V = 32000


class Shape(NamedTuple):
    """Layers, width, FFN, sequence; the paper's parameters in millions; sequences of a step."""

    layers: int
    h: int
    f: int
    s: int
    millions: float
    batch: int

    @property
    def matrices(self) -> int:
        """Entries of the layers' matrices: q, k, v, o and the three of a gated MLP."""
        return self.layers * (4 * self.h**2 + 3 * self.h * self.f)

    @property
    def norms(self) -> int:
        return (2 * self.layers + 1) * self.h


SHAPES = {
    "468m": Shape(24, 1024, 4096, 1024, 468.2, 1024),
    "1.2b": Shape(16, 2048, 8192, 1024, 1204.9, 1024),
    "6.7b": Shape(32, 4096, 11008, 2048, 6738.4, 2048),
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("estimate") / "figures.json"
    settings = ("TP", "PP", "CP", "MICRO_BATCH", "OBJECTIVE", "PRECISION", "DATA_PATH")
    env = {name: value for name, value in os.environ.items() if name not in settings}
    result = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "support" / "estimate_figures.py", output],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("tp", ["1", "2", "4", "8"])
@pytest.mark.parametrize("size", SHAPES)
def test_size_has_the_papers_parameters(figures: dict[str, Any], size: str, tp: str) -> None:
    shape, found = SHAPES[size], figures["counts"][size][tp]
    whole = shape.matrices + shape.norms + 2 * V * shape.h
    assert found["parameters"] == whole
    assert round(whole / 1e6, 1) == shape.millions
    assert found["columns"] == V
    # What one rank holds: everything but the norms is sharded.
    assert found["shard"] == (whole - shape.norms) / int(tp) + shape.norms == found["formula"]
    assert found["devices"] == ["meta"]


def test_every_size_is_checked(figures: dict[str, Any]) -> None:
    assert set(figures["counts"]) == set(SHAPES)


def test_estimate_counts_steps_tokens_and_flops(figures: dict[str, Any]) -> None:
    found, shape = figures["json"]["6.7b"], SHAPES["6.7b"]
    tokens = shape.batch * shape.s
    assert found["parameters"] == figures["counts"]["6.7b"]["1"]["parameters"]
    assert found["tokens_per_step"] == tokens == 4_194_304
    assert found["tokens"] == 25_000 * tokens
    # Forward and backward: 6 a weight, and half of the causal score matrix, twice.
    flops = tokens * (6 * (shape.matrices + V * shape.h) + 6 * shape.layers * shape.s * shape.h)
    assert found["flops_per_step"] == pytest.approx(flops, rel=1e-12)
    assert found["gpu_hours"] == pytest.approx(flops * 25_000 / (0.4 * 989e12) / 3600, rel=1e-12)
    assert found["hours"] == pytest.approx(found["gpu_hours"] / 128)


def test_estimate_splits_the_memory(figures: dict[str, Any]) -> None:
    found, shape = figures["json"]["6.7b"], SHAPES["6.7b"]
    assert found["layout"] == {
        "tp": 2, "pp": 1, "cp": 1, "dp": 64, "micro_batch": 4, "micro_batches": 8
    }  # fmt: skip
    shard = figures["counts"]["6.7b"]["2"]["shard"]
    # Of one layer and token, in units of the width: 18 bytes, and 6 a column of the MLP's middle.
    layer = 18 * shape.h + 6 * shape.f
    # Beside the layers: the embedding's ids and mask, input and output of the last norm.
    rest = 8 + shape.h + 4 * shape.h
    expected = {
        "weights": 2 * shard,
        "gradients": 4 * shard,
        "optimizer": 12 * shard / 64,
        "activations": 4 * shape.s * (shape.layers * layer + rest) / 2,
        "logits": 4 * shape.s * V / 2 * 2,
        "cost_rows": 0,
    }
    expected["total"] = sum(expected.values())
    assert {name: size * GIB for name, size in found["memory_gib"].items()} == pytest.approx(
        expected
    )


def test_estimate_knows_the_variants(figures: dict[str, Any]) -> None:
    found, shape = figures["variants"], SHAPES["6.7b"]
    shard = figures["counts"]["6.7b"]["2"]["shard"]
    plain = found["host's loss"]
    elements = 4 * shape.s * V / 2
    assert plain["logits"] == elements * 6  # an fp32 copy, and the gradient in bf16
    # Of 32768 tokens those whose logits fill 512 MiB, a multiple of 128.
    assert found["fused"]["logits"] == 131 * 128 * V / 2 * 2
    fp32 = found["fp32"]
    assert fp32["logits"] == elements * 4
    assert [fp32[part] for part in ("weights", "gradients", "optimizer")] == [
        4 * shard, 4 * shard, 8 * shard / 8
    ]  # fmt: skip
    assert fp32["activations"] == 2 * plain["activations"]
    # A quarter of the layers, for four micro-batches: the first stage is the fullest.
    assert found["pipeline"]["logits"] == 0
    assert found["pipeline"]["activations"] == pytest.approx(plain["activations"], rel=0.02)
    assert found["pipeline"]["weights"] < plain["weights"] / 3
    # Each layer's input, and all of one layer.
    inputs, layer = 2 * shape.h * shape.layers, 18 * shape.h + 6 * shape.f
    kept = 4 * shape.s * (inputs + layer + 8 + 5 * shape.h) / 2
    assert found["recompute"]["activations"] == pytest.approx(kept)
    assert found["context"]["activations"] == plain["activations"] / 2
    assert found["context"]["optimizer"] == plain["optimizer"]


def test_estimate_counts_emo(figures: dict[str, Any]) -> None:
    found, plain, shape = figures["emo"], figures["json"]["6.7b"], SHAPES["6.7b"]
    tokens = found["tokens_per_step"]
    extra = found["flops_per_step"] - plain["flops_per_step"]
    assert extra == pytest.approx(2 * tokens * V * shape.h, rel=1e-9)
    # The gradient beside the logits; fp32 scales of the shard's rows, and the targets' rows.
    micro_batch, parts = 4 * shape.s, figures["variants"]["emo"]
    assert parts["logits"] == micro_batch * V / 2 * 2 * 2
    assert parts["cost_rows"] == V / 2 * 4 + micro_batch * shape.h * 2
    assert found["memory_gib"]["cost_rows"] * GIB == parts["cost_rows"]
    rows = {(row["tp"], row["pp"]): row["total_gib"] for row in found["layouts"]}
    assert rows[2, 1] == pytest.approx(found["memory_gib"]["total"])


def test_estimate_counts_what_cost_rows_hold(figures: dict[str, Any]) -> None:
    found, tokens = figures["cost rows"], 4 * 1024
    expected = {
        "32000": 32000 * (2 * 64 + 4) + tokens * 2 * 64,
        "1000": 1000 * (2 * 64 + 4) + 1000 * 1000 * 2,
        "--bf16": 32000 * 4 + tokens * 2 * 1024,
        "--fp16": 32000 * (4 + 2 * 1024) + tokens * 2 * 1024,
    }
    assert {name: figure["estimated"] for name, figure in found.items()} == expected
    assert {name: figure["held"] for name, figure in found.items()} == expected
    assert found["32000"]["flops"] == 2 * 1024 * 1024 * 32000 * 64
    assert found["1000"]["flops"] == 0


def test_estimate_lists_the_layouts_that_fit(figures: dict[str, Any]) -> None:
    found = figures["json"]["6.7b"]
    rows = {(row["tp"], row["pp"]): row for row in found["layouts"]}
    assert len(rows) == 16
    assert not rows[1, 1]["fits"]
    assert all(row["fits"] for layout, row in rows.items() if layout != (1, 1))
    assert rows[2, 1]["total_gib"] == pytest.approx(found["memory_gib"]["total"])
    assert rows[8, 2]["dp"] == 8
    assert rows[8, 2]["micro_batches"] == 64


@pytest.mark.parametrize("size", SHAPES)
def test_readme_of_the_examples_has_the_estimates(figures: dict[str, Any], size: str) -> None:
    text = (Path(__file__).parents[2] / "examples" / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith(f"| `{size}` "))
    found = figures["json"][size]
    assert f"| {found['parameters'] / 1e6:.1f}M |" in row
    assert f"| {found['gpus']} | TP {found['layout']['tp']}, PP {found['layout']['pp']}, " in row
    assert f"micro-batch {found['layout']['micro_batch']}: " in row
    assert f"{found['memory_gib']['total']:.1f} GiB, {found['gpu_hours']:,.0f} h |" in row


def test_estimate_prints_a_table(figures: dict[str, Any]) -> None:
    lines = figures["table"].splitlines()
    assert lines[0] == "468m: 468.2M parameters"
    assert lines[1] == "schedule  1,048,576 tokens a step, 100,000 steps, 104.86B tokens"
    assert "203 GPU-hours, 12.7 h on 16 GPUs," in lines[2]
    assert "   1   1    16              2     36.6  yes" in lines
    # 16 GPUs are no more than TP x PP = 16 of them, and 24 layers are 8 stages of 3.
    assert len([line for line in lines if line.endswith(("yes", "no"))]) == 13
    assert max(map(len, lines)) <= 100


def test_estimate_refuses_in_one_line(figures: dict[str, Any]) -> None:
    reasons = [
        "flags: unrecognized arguments: --no-such-flag; see examples/pretrain_gpt.py --help",
        "(1024) must be divisible by eval_micro_batch_size (32) * data_parallel_size (3)",
        "16 attention heads are no multiple of tensor parallel size 3",
        "assert args.micro_batch_size is not None",
        "only dense GPT models can be estimated",
        "--mile-emo-cost /no.npy cannot be read: ",
        "--num-layers 0: expected a whole number from 1 to 1024",
        "--num-layers 1000000000000: expected a whole number from 1 to 1024",
        "--hidden-size -1024: expected a whole number from 1 to 1000000",
        "--num-attention-heads 0: expected",
        "--vocab-size 0: expected",
        "--padded-vocab-size -128: expected",
        "--seq-length 0: expected",
        "--train-iters -3: expected",
        "--train-iters 0: expected",
        "no step to estimate: give --train-iters, or --train-samples of at least 16, the global",
        "--mfu inf: expected a number from 1e-06 to 1",
        "--mfu 1.5: expected a number from 1e-06 to 1",
        "--peak-tflops inf: expected a number from 0.001 to 1e+09",
        "--gpu-memory nan: expected a number from 0.001 to 1e+06",
        "Megatron refuses these flags on 8 GPUs: 16 attention heads are no multiple of 3 query",
    ]
    for reason, text in zip(reasons, figures["refused"], strict=True):
        *usage, line = text.splitlines()
        assert line.startswith("tools/estimate.py: error: ")
        assert reason in line
        assert bool(usage) == ("expected a number" in line)  # argparse's, for flags of the tool


def test_any_job_ends_in_figures_or_one_line(figures: dict[str, Any]) -> None:
    found = figures["fuzz"]
    assert not found["failure"], found["failure"]
    assert found["figures"] > 5
    assert found["line"] > 15
