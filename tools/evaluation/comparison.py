"""Sets evaluations side by side: perplexities, and scores of the harness's tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.common.cli import ToolError
from tools.common.files import read_json
from tools.data.frequency_buckets import BUCKETS

# A task's score is the first of these that it has; the others stay in the JSON.
METRICS = ("acc", "exact_match", "acc_norm", "f1")
PERPLEXITIES = {"ppl": "all tokens", **{f"ppl_{name}": f"{name} frequency" for name in BUCKETS}}
AVERAGE = "average"


class Evaluation(NamedTuple):
    """One evaluation and its name."""

    name: str
    content: dict[str, Any]
    """As tools/evaluate.py writes it."""


class Score(NamedTuple):
    """One task's score; both fields are shares, 0 to 1."""

    value: float
    error: float | None
    """Standard error, where the harness gives one."""


def read_evaluations(paths: Sequence[Path]) -> list[Evaluation]:
    """Read the JSON files of tools/evaluate.py.

    Args:
        paths: the files; each is named by its folder, and by its path where two folders agree.

    Raises:
        ToolError: a file is not an evaluation.
    """
    contents = [read_evaluation(path) for path in paths]
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [Evaluation(*pair) for pair in zip(names, contents, strict=True)]


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read the JSON file of tools/evaluate.py.

    Raises:
        ToolError: it is not an evaluation.
        OSError: it cannot be read.
    """
    try:
        content = read_json(path)
        if _is_whole(content):
            return dict(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ToolError(f"{path}: not an evaluation; make it with tools/evaluate.py --output")


def _is_whole(content: Mapping[str, Any]) -> bool:
    """Whether there are perplexities or scores, and all of them are numbers."""
    found = [content[key] for key in PERPLEXITIES if content.get(key) is not None]
    scores = content["harness"]["scores"] if "harness" in content else {}
    tasks = [task for tasks in scores.values() for task in tasks.values()]
    metrics = [metric for task in tasks for metric in task.items()]
    return (
        ("ppl" in content or bool(scores))
        and all(_is_number(value) and value > 0.5 for value in found)  # rounding apart, at least 1
        and all(int(shots) >= 0 for shots in scores)
        and all(_is_number(value) for _, value in metrics)
        and all(value >= 0 for name, value in metrics if name.endswith("_stderr"))
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that can be drawn, so no infinity either."""
    return type(value) in (int, float) and abs(value) < 1e300


def shots_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """List the numbers of shots at which any evaluation has a score, smallest first."""
    found = {number for one in evaluations for number in _all_scores(one) if scores_of(one, number)}
    return sorted(found, key=int)


def _all_scores(evaluation: Evaluation) -> dict[str, Any]:
    scores: dict[str, Any] = evaluation.content.get("harness", {}).get("scores", {})
    return scores


def scores_of(evaluation: Evaluation, shots: str) -> dict[str, Score]:
    """Return the score of each task at a number of shots."""
    scores = {}
    for task, metrics in _all_scores(evaluation).get(shots, {}).items():
        metric = next((name for name in METRICS if name in metrics), None)
        if metric:
            scores[task] = Score(metrics[metric], metrics.get(f"{metric}_stderr"))
    return scores


def common_scores(evaluations: Sequence[Evaluation], shots: str) -> list[dict[str, Score]]:
    """Return the scores of each evaluation, and last the mean over the tasks that all have."""
    scores = [scores_of(one, shots) for one in evaluations]
    shared = [task for task in scores[0] if all(task in found for found in scores)]
    if len(shared) > 1:
        for found in scores:
            found[AVERAGE] = Score(sum(found[task].value for task in shared) / len(shared), None)
    return scores


def table(evaluations: Sequence[Evaluation]) -> str:
    """Lay the evaluations out for people, one column each; scores in percent."""
    lines = [["", *(one.name for one in evaluations)]]
    for key, text in PERPLEXITIES.items():
        values = [one.content.get(key) for one in evaluations]
        if any(value is not None for value in values):
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            lines.append([f"perplexity, {text}", *cells])
    for shots in shots_of(evaluations):
        scores = common_scores(evaluations, shots)
        for task in dict.fromkeys(task for found in scores for task in found):
            cells = [_cell(found.get(task)) for found in scores]
            lines.append([f"{shots}-shot, {task} (%)", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    error = "" if score.error is None else f" ± {100 * score.error:.2f}"
    return f"{100 * score.value:.2f}{error}"
