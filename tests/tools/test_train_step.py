"""tools/bench/train_step.py: both kinds of step are real, the statistic is right; no speed."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mile import ObjectiveConfig, wrap_forward_step
from tools.bench import train_step, training
from tools.bench.paired_steps import PairedSteps

MILE = {"mile loss", "mile entropy", "mile weight"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A real run with one pair of warm-up: its table, and what its rank 0 has written."""
    table = tmp_path_factory.mktemp("steps") / "train_steps.csv"
    results = []
    with pytest.MonkeyPatch.context() as patch:
        real = train_step.train
        patch.setattr(train_step, "WARM_UP_PAIRS", 1)
        patch.setattr(
            train_step, "train", lambda *given: results.append(real(*given)) or results[0]
        )
        train_step.main(["--pairs", "2", "--precision", "bf16", "--output", str(table)])
    return table, results[0]


@pytest.mark.slow
def test_steps_are_the_hosts_and_the_hooks_in_one_training(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    steps = finished[1]["steps"]
    assert [step["kind"] for step in steps] == train_step.draw_order(3)
    for step in steps:
        expected = {"kind", "seconds", "lm loss"} | (MILE if step["kind"] == "hook" else set())
        assert set(step) == expected
        assert step["seconds"] > 0
    losses = [step["lm loss"] for step in steps]
    # One model goes through all steps: its loss falls with those of either kind (8.46 to 4.22).
    assert losses == sorted(losses, reverse=True)
    assert abs(losses[0] - math.log(train_step.VOCABULARY)) < 1


@pytest.mark.slow
def test_table_has_the_counted_pairs_and_the_conditions(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    table, result = finished
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert tuple(row) == train_step.COLUMNS
    assert not [key for key, value in row.items() if not value]
    figures = train_step.figures(result["steps"][2:])
    assert {key: row[key] for key in figures} == {k: f"{v:.4g}" for k, v in figures.items()}
    assert [row[key] for key in ("objective", "precision", "pairs")] == ["mile", "bf16", "2"]
    assert [row[key] for key in ("layers", "hidden", "tokens", "vocab")] == [
        *("6", "192", "4096", "4096")
    ]
    assert row["tp"] == str(training.ranks())
    assert row["threads"] == training.environment()["OMP_NUM_THREADS"]


def test_figures_are_those_of_a_case_done_by_hand() -> None:
    # Twelve pairs in either order, on a machine that gets ten times slower; half have the ratio 4.
    steps = []
    for index in range(12):
        seconds = 0.1 * (10 if index > 5 else 1)
        pair = [
            {"kind": "host", "seconds": seconds},
            {"kind": "hook", "seconds": seconds * (4 if index % 2 else 1)},
        ]
        steps += pair if index % 3 else reversed(pair)
    found = train_step.figures(steps)
    # A resample's mean log-ratio is ln 4 * K / 12 with K binomial(12, 1/2): P(K <= 8) = 0.927 and
    # P(K <= 9) = 0.981, so that the 95 % bound is 4^(9/12).
    expected = {"host_ms": 550, "hook_ms": 700, "ratio_mean": 2, "ratio_bound": 4**0.75}
    expected |= {"ratio_p20": 1, "ratio_p50": 2, "ratio_p80": 4}
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pairs", [2, 7, 64])
def test_draw_order_is_balanced(pairs: int) -> None:
    order = train_step.draw_order(pairs)
    drawn = list(zip(order[::2], order[1::2], strict=True))
    assert len(drawn) == pairs
    assert {frozenset(pair) for pair in drawn} == {frozenset({"host", "hook"})}
    blocks = zip(drawn[::2], drawn[1::2], strict=False)
    assert all(a != b for a, b in blocks)
    assert order == train_step.draw_order(pairs)
    assert pairs < 8 or len(set(drawn[::2])) == 2  # not ABBA all the way


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("kind", "key"), [("host", "mile loss"), ("hook", "lm loss")])
def test_a_step_of_the_other_kind_stops_the_run(
    kind: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is made up, because Megatron's does not report what the step was not."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # as CPU mode does in a rank
    forward_step = wrap_forward_step(lambda data, model: None, ObjectiveConfig())
    steps = PairedSteps(lambda *given: ({key: torch.ones(())},), [kind], Path("unused"))
    with pytest.raises(RuntimeError, match=f"meant for the {kind}'s loss reported {key}"):
        steps(forward_step, None)


@pytest.mark.slow
def test_training_that_fails_is_one_line_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_step, "MODEL", ["--mile-gama", "2"])  # before Megatron is imported
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    output = tmp_path / "train_steps.csv"
    error = _failure(["--output", str(output)], capsys)
    message, _, log = error.partition("; its output is in ")
    assert message == "tools/bench/train_step.py: error: training failed with status 1"
    assert "unknown flag --mile-gama" in Path(log).read_text()
    assert not output.exists()


def test_flags_are_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(train_step, "train")
    output = tmp_path / "train_steps.csv"
    error = _failure(["--pairs", "1", "--output", str(output)], capsys)
    assert error == "tools/bench/train_step.py: error: --pairs is 1; expected 2 or more"
    assert not output.exists()
    output.write_text("a,b\n1,2\n")
    assert "has other columns than this tool" in _failure(["--output", str(output)], capsys)
    assert output.read_text() == "a,b\n1,2\n"


def _failure(flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on stderr of the tool, which must end with status 1."""
    with pytest.raises(SystemExit) as exit_:
        train_step.main(flags)
    assert exit_.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line
