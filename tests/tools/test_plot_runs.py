"""tools/plot_runs.py on real TensorBoard files; the bars are read back from the figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_mile.objectives import OBJECTIVES
from tools import plot_runs
from tools.common.cli import ToolError
from tools.evaluation.comparison import read_evaluation
from tools.evaluation.runs import Run, find_runs, read_run

Failure = Callable[..., str]
CE = {"ppl": 100.0, "ppl_high": 50.0, "ppl_medium": 400.0, "ppl_low": 1000.0}


def _write_run(
    folder: Path, losses: Sequence[float], first_step: int = 1, tag: str = "lm loss"
) -> Path:
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step, loss in enumerate(losses, start=first_step):
            writer.add_scalar(tag, loss, step)
    return folder


def _heights(axes: plt.Axes) -> list[float]:
    return [bar.get_height() for container in axes.containers for bar in container]


# Shorter than the window, as long, and longer; reach 0 leaves the values alone.
@pytest.mark.parametrize("length", [1, 5, 23])
@pytest.mark.parametrize("reach", [0, 2, 40])
def test_running_mean_equals_the_mean_of_each_window(length: int, reach: int) -> None:
    values = np.random.default_rng(0).standard_normal(length)
    expected = [values[max(i - reach, 0) : i + reach + 1].mean() for i in range(length)]
    np.testing.assert_allclose(plot_runs.running_mean(values, reach), expected, atol=1e-14)


def test_read_run_keeps_the_later_value_of_a_resumed_step(tmp_path: Path) -> None:
    # A reader orders event files by name, so by the time they were begun.
    _write_run(tmp_path / "mile", [8.0, 7.0, 6.0])
    first = next((tmp_path / "mile" / "tensorboard").iterdir())
    first.rename(first.with_name("events.out.tfevents.1000000000.first"))
    run = read_run(_write_run(tmp_path / "mile", [5.5, 5.0], first_step=3), "lm loss")
    assert run.name == "MiLe Loss"
    assert run.evaluation is None
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert run.losses.tolist() == [8.0, 7.0, 5.5, 5.0]


def test_read_run_names_a_run_like_its_objective_or_its_folder(tmp_path: Path) -> None:
    labels = {name: objective.label for name, objective in OBJECTIVES.items()}
    for name, label in {**labels, "longer": "longer"}.items():
        assert read_run(_write_run(tmp_path / name, [1.0]), "lm loss").name == label


def test_find_runs_takes_runs_and_folders_of_runs(tmp_path: Path) -> None:
    for name in ("mile", "ce", "focal"):
        _write_run(tmp_path / name, [1.0])
    (tmp_path / "logs").mkdir()
    ordered = [tmp_path / name for name in ("ce", "focal", "mile")]
    assert find_runs([tmp_path]) == ordered
    assert find_runs([tmp_path / "mile", tmp_path]) == [ordered[2], *ordered[:2]]


def test_draw_changes_is_the_percentage_against_the_first_run() -> None:
    steps, losses = np.arange(2), np.ones(2)
    mile = {**CE, "ppl": 110.0, "ppl_low": 750.0}
    runs = [Run("a", steps, losses, CE), Run("b", steps, losses, mile)]
    figure, axes = plt.subplots()
    plot_runs._draw_changes(axes, runs, {"a": "k", "b": "r"})
    np.testing.assert_allclose(_heights(axes), [10.0, 0.0, 0.0, -25.0], atol=1e-12)
    assert [text.get_text() for text in axes.texts] == ["+10.0 %", "+0.0 %", "+0.0 %", "-25.0 %"]
    plt.close(figure)


def test_draw_bars_leaves_out_a_bucket_without_tokens() -> None:
    known = {key: value for key, value in CE.items() if key != "ppl_low"}
    figure, axes = plt.subplots()
    plot_runs._draw_bars(axes, [Run("a", np.arange(1), np.ones(1), known)], {"a": "k"})
    np.testing.assert_equal(_heights(axes), [100.0, 50.0, 400.0, np.nan])
    plt.close(figure)


# With bars and comparison, with bars alone, with curves alone: three layouts of the figure.
@pytest.mark.parametrize("evaluated", [("ce", "mile"), ("ce",), ()])
def test_plot_runs_writes_a_picture(tmp_path: Path, evaluated: Sequence[str]) -> None:
    for name in ("ce", "mile"):
        _write_run(tmp_path / name, [8.0, 6.0, 5.0])
    for name in evaluated:
        (tmp_path / name / "evaluation.json").write_text(json.dumps(CE))
    output = tmp_path / "out" / "runs.png"
    output.parent.mkdir()
    plot_runs.main([str(tmp_path), "--output", str(output)])
    height, width = plt.imread(output).shape[:2]
    assert (width > 1500) == bool(evaluated)
    assert height > 700
    assert [path.name for path in output.parent.iterdir()] == ["runs.png"]


def test_plot_runs_names_runs_of_one_name_by_their_folders(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        _write_run(tmp_path / parent / "ce", [1.0])
    output = tmp_path / "runs.svg"
    plt.rcParams["svg.fonttype"] = "none"
    plot_runs.main([str(tmp_path / "x"), str(tmp_path / "y"), "--output", str(output)])
    for parent in ("x", "y"):
        assert f"{tmp_path / parent / 'ce'}: 1.000" in output.read_text()


def test_plot_runs_leaves_out_a_run_without_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_run(tmp_path / "ce", [2.0, 1.0])
    _write_run(tmp_path / "mile", [])  # ended before its first step
    output = tmp_path / "runs.svg"
    plt.rcParams["svg.fonttype"] = "none"
    plot_runs.main([str(tmp_path), "--output", str(output)])
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"tools/plot_runs.py: left out {tmp_path / 'mile'}: no values for")
    assert line.endswith("its tags: none")
    assert said.out == f"{output}: 1 runs\n"
    assert "cross-entropy: 1.500" in output.read_text()


def test_plot_runs_refuses_what_it_cannot_draw(tmp_path: Path, failure: Failure) -> None:
    run = _write_run(tmp_path / "ce", [1.0], tag="mile loss")
    (tmp_path / "empty").mkdir()
    picture = tmp_path / "runs.png"
    flags = ("--output", picture)
    assert "no folder" in failure(plot_runs.main, tmp_path / "gone", *flags)
    assert "no TensorBoard events" in failure(plot_runs.main, tmp_path / "empty", *flags)
    assert "'lm loss'; its tags: mile loss" in failure(plot_runs.main, run, *flags)
    (run / "evaluation.json").write_text("[1")
    tagged = ("--tag", "mile loss", *flags)
    assert "not an evaluation" in failure(plot_runs.main, run, *tagged)
    (run / "evaluation.json").unlink()
    bad = ("--tag", "mile loss", "--output", tmp_path / "runs.docx")
    assert "docx" in failure(plot_runs.main, run, *bad)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ce", "empty"]


# TensorBoard itself would draw what comes before, without a word.
@pytest.mark.parametrize("place", [0.3, 0.7])
def test_plot_runs_names_damaged_events(place: float, tmp_path: Path, failure: Failure) -> None:
    run = _write_run(tmp_path / "ce", [3.0, 2.0, 1.0])
    (path,) = (run / "tensorboard").iterdir()
    content = path.read_bytes()
    at = int(place * len(content))
    flags = (run, "--output", tmp_path / "runs.png")
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert failure(plot_runs.main, *flags).startswith(f"{path}: damaged; remove it")
    assert not (tmp_path / "runs.png").exists()
    path.write_bytes(content[:-3])  # by a run that goes on
    plot_runs.main([*map(str, flags)])
    path.unlink()
    path.symlink_to("nowhere")
    assert failure(plot_runs.main, *flags) == f"{path}: no such file"


@pytest.mark.parametrize(
    "content",
    [
        *("", "null", "[]", "{}", '{"ppl": "1"}', '{"ppl": NaN}', '{"ppl": 1e999}', '{"ppl": 0}'),
        *('{"ppl": true}', '{"ppl": 2, "harness": []}', '{"ppl": 2, "harness": {}}', "[" * 99999),
        '{"harness": {"scores": {}}}',
        '{"harness": {"scores": {"x": {"a": {"acc": 1}}}}}',
        '{"harness": {"scores": {"0": {"a": {"acc": "1"}}}}}',
        '{"harness": {"scores": {"-1": {"a": {"acc": "1"}}}}}',
        '{"harness": {"scores": {"-1": {"a": {"acc": 1}}}}}',
        '{"harness": {"scores": {"0": {"a": {"acc": 1, "acc_stderr": -1}}}}}',
    ],
)
def test_read_evaluation_refuses_other_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(ToolError, match=r"evaluation.json: not an evaluation; make it with"):
        read_evaluation(path)


def test_plot_runs_reads_the_records_before_it_draws(tmp_path: Path, failure: Failure) -> None:
    run = _write_run(tmp_path / "ce", [1.0])
    _record(run, "--lr 1", versions={"torch": 2})  # a number where a text belongs
    plot_runs.main([str(run), "--output", str(tmp_path / "runs.png")])
    (tmp_path / "runs.png").unlink()
    (run / "checkpoints" / "run_record.json").write_text("[" * 99999)
    message = failure(plot_runs.main, run, "--output", tmp_path / "runs.png")
    assert "run_record.json: not a run's record" in message
    assert not (tmp_path / "runs.png").exists()


def _data(prefix: str, digest: str, tokenizer: dict[str, str]) -> dict[str, object]:
    return {
        "split": None,
        "blends": [[{"prefix": prefix, "bin": digest}]],
        "tokenizer": {"type": "T", "names": ["of/hub"], "files": tokenizer},
    }


def _record(folder: Path, command: str, **others: object) -> None:
    start = {
        "command": f"train.py {command}",
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "processes": 2,
        "checkouts": {"script": {"commit": "0123456789abcdef", "dirty": True}},
        "data": _data("data/x", "9:0123456789", {"a/tokenizer.json": "5:000011112222"}),
    }
    old = {**start, "command": "train.py --lr 5"}  # of an earlier start, which does not count
    (folder / "checkpoints").mkdir()
    content = json.dumps({"starts": [old, {**start, **others}]})
    (folder / "checkpoints" / "run_record.json").write_text(content)


def test_plot_runs_prints_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [_write_run(tmp_path / name, [2.0, 1.0]) for name in ("one", "two", "three")]
    _record(runs[0], "--lr 1 --betas 0.9 0.95 --save a --swiglu")
    others = {"checkouts": {"script": None}, "data": _data("moved/x", "9:0123456780", {})}
    _record(runs[1], "--lr=2 --betas 0.9 0.99 --save b --data-cache-path c", **others)
    plot_runs.main([*map(str, runs), "--output", str(tmp_path / "runs.png")])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "differs           one                          two",
        "--lr              1                            2",
        "--betas           0.9 0.95                     0.9 0.99",
        "--swiglu          set                          -",
        "commit of script  0123456789ab, changed since  none",
        "data              x 23456789                   x 23456780",
        "tokenizer         T 11112222                   T of/hub",
    ]
    (runs[0] / "checkpoints" / "run_record.json").write_text('{"starts": []}')
    with pytest.raises(SystemExit):
        plot_runs.main([*map(str, runs), "--output", str(tmp_path / "runs.png")])
    assert "run_record.json: not a run's record" in capsys.readouterr().err
