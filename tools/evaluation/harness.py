"""Runs lm-evaluation-harness on a Hugging Face model folder, as far as the tasks' data is there."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tools.common.cli import ToolError

# The harness's own names. That the paper reports MMLU, commonsense reasoning and closed-book
# question answering, at 0 and 5 shots, is known from notes on it; the single tasks are what the
# authors' copy of the harness points to, and not confirmed.
PAPER_TASKS = (
    *("boolq", "hellaswag", "lambada_openai", "openbookqa", "piqa", "social_iqa"),
    *("storycloze_2016", "winogrande", "triviaqa", "webqs", "mmlu"),
)
PAPER_SHOTS = (0, 5)
_ENDPOINT = "https://huggingface.co"
_SECONDS_TO_ANSWER = 5

# Shots -> task -> metric -> value, such as {"0": {"piqa": {"acc": 0.7, "acc_stderr": 0.01}}}.
Scores = dict[str, dict[str, dict[str, float]]]


def run_harness(
    folder: Path,
    tasks: Sequence[str],
    shots: Sequence[int],
    *,
    task_folder: Path | None,
    batch_size: int,
    cpu: bool,
) -> dict[str, Any]:
    """Score a model on tasks.

    Args:
        folder: a Hugging Face model with its tokenizer.
        tasks: names or groups of the harness.
        shots: numbers of examples in the prompt; a task that fixes its own keeps it.
        task_folder: more task definitions (YAML), None for the harness's own alone.
        batch_size: requests at a time.
        cpu: use the CPU even where there is a GPU.

    Returns:
        `folder`, `lm_eval` (its version), `scores` as `Scores`, and `missing`, the reason for each
        task whose data could not be loaded.

    Raises:
        ToolError: the harness is not installed, there is no such model or no such task.
    """
    if not (folder / "config.json").is_file():
        raise ToolError(
            f"{folder}: no config.json; --hf is a Hugging Face folder, see "
            "tools/convert_checkpoint.py"
        )
    _go_offline_without_network()
    manager = _task_manager(task_folder)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ToolError(
            f"no task {unknown[0]!r} in the harness; `lm-eval ls tasks` lists its own, and "
            "--task-folder adds yours"
        )
    loaded, missing = _load(manager, tasks)
    scores: Scores = {}
    if loaded:
        model = _model(folder, batch_size, cpu)
        for number in shots:
            scores[str(number)] = {task: _score(model, manager, task, number) for task in loaded}
    return {
        "folder": str(folder),
        "lm_eval": metadata.version("lm_eval"),
        "scores": scores,
        "missing": missing,
    }


def _go_offline_without_network() -> None:
    """Let the Hugging Face libraries use what they have cached instead of waiting for the network.

    They read the variables when they are imported first.
    """
    try:
        urllib.request.urlopen(
            os.environ.get("HF_ENDPOINT", _ENDPOINT), timeout=_SECONDS_TO_ANSWER
        ).close()
    except urllib.error.HTTPError:
        return  # an answer
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@contextlib.contextmanager
def _guest() -> Iterator[None]:
    """Keep the harness's notices out of stdout."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _task_manager(task_folder: Path | None) -> Any:
    if task_folder is not None and not task_folder.is_dir():
        raise ToolError(f"no folder at --task-folder {task_folder}")
    try:
        with _guest():
            from lm_eval.tasks import TaskManager

            return TaskManager(include_path=task_folder)
    except ModuleNotFoundError as error:
        raise ToolError(
            f"--hf needs lm-evaluation-harness ({error.name} is missing): pip install '.[eval]' "
            "in a clone of megatron_mile"
        ) from error


def _load(manager: Any, tasks: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Sort the tasks into those whose data can be loaded and the reasons of the others."""
    loaded, missing = [], {}
    for task in tasks:
        try:
            with _guest():
                manager.load([task])
            loaded.append(task)
        except Exception as error:  # of datasets, huggingface_hub, requests, or a YAML's own
            missing[task] = " ".join(str(error).split())[:200] or type(error).__name__
    return loaded, missing


def _model(folder: Path, batch_size: int, cpu: bool) -> Any:
    with _guest():
        from lm_eval.models.huggingface import HFLM

        try:
            return HFLM(str(folder), device="cpu" if cpu else None, batch_size=batch_size)
        except (OSError, ValueError) as error:
            raise ToolError(f"{folder}: transformers cannot load it ({error})") from error


def _score(model: Any, manager: Any, task: str, shots: int) -> dict[str, float]:
    """Run one task, loaded anew: a task object keeps the shots of its first run."""
    with _guest():
        from lm_eval import simple_evaluate

        found = simple_evaluate(
            model=model,
            tasks=[task],
            num_fewshot=shots,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,  # for standard errors of perplexities alone
        )
    results = found["results"][task] if found else {}
    # `acc,none`: metric and filter; no task here has a metric under two filters.
    return {
        name.partition(",")[0]: float(value)
        for name, value in results.items()
        if "," in name and isinstance(value, int | float) and math.isfinite(value)
    }
