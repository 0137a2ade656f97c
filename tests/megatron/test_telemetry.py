"""What a job logs beside its losses: the losses per frequency bucket, in real training runs."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from support.training_runs import (
    JOBS,
    MILE,
    REPOSITORY,
    SAME,
    STOP,
    TP1,
    TP2,
    Run,
    TrainingRuns,
    furthest,
    mile_errors,
)

pytestmark = pytest.mark.slow

FREQUENCY = REPOSITORY / "tools" / "token_frequency.py"
BUCKETS = ("lm loss high", "lm loss medium", "lm loss low")
SHORT = "--eval-iters 2 --eval-interval 3 --train-iters 6"
VOCABULARY = 250


@pytest.fixture(scope="module")
def data(runs: TrainingRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of documents, and the frequencies of its tokens."""
    folder = tmp_path_factory.mktemp("frequencies")
    assert runs.call(JOBS / "write_documents.py", folder / "text").returncode == 0
    count(runs, folder / "text", folder / "frequency.json")
    return folder


def count(runs: TrainingRuns, prefix: Path, output: Path, size: int = VOCABULARY) -> None:
    """Make a frequency file by the tool itself."""
    flags = ("--data-prefix", prefix, "--vocab-size", size, "--output", output)
    done = runs.call(FREQUENCY, *flags)
    assert done.returncode == 0, done.stdout


def flags_of(data: Path, objective: str = MILE) -> str:
    """The flags of a job on these documents."""
    return objective.replace("--mock-data", f"--data-path {data}/text --split 90,10,0")


def counted(run: Run) -> set[str]:
    """Tags of what is logged beside what every job logs, without those by samples."""
    return {tag for tag in run.scalars if tag.startswith("lm loss ") and " vs " not in tag}


def test_buckets_are_logged_in_training_and_evaluation(runs: TrainingRuns, data: Path) -> None:
    plain = runs.train(2, TP2, flags_of(data), SHORT)
    flag = f"--mile-token-frequency {data}/frequency.json"
    run = runs.train(2, TP2, flags_of(data), SHORT, flag)
    validation = {f"{bucket} validation" for bucket in BUCKETS}
    assert counted(run) == {*BUCKETS, *validation, "lm loss validation"}
    for tag, figures in plain.scalars.items():  # what is there without the flag: the same bits
        if tag.startswith(("lm loss", "mile", "grad-norm")):
            assert run.scalars[tag] == figures, tag
    for tags in (("lm loss", *BUCKETS), ("lm loss validation", *sorted(validation))):
        for whole, *parts in zip(*(run[tag] for tag in tags), strict=True):
            assert min(parts) < whole < max(parts)
    step = next(line for line in run.logs[-1].splitlines() if " iteration        2/" in line)
    keys = ["lm loss", "mile loss", "mile entropy", "mile weight", *BUCKETS]
    assert re.findall(r"\| ((?:lm|mile) [a-z ]+):", step) == keys
    assert re.search(r"validation loss .* lm loss low value: [1-9]\.\d+E", run.logs[-1])
    assert f"{data}/frequency.json, sha256" in run.logs[0]


def test_buckets_are_the_same_at_every_layout_and_of_the_host(
    runs: TrainingRuns, data: Path
) -> None:
    flag = f"--mile-token-frequency {data}/frequency.json"
    ce = flags_of(data, MILE.replace("mile --mile-gamma 3", "ce"))
    host = runs.train(2, TP1, flags_of(data, "--mock-data --mile-cpu"), SHORT)
    wide, split = (runs.train(2, layout, ce, SHORT, flag) for layout in (TP1, TP2))
    for tag in (*BUCKETS, "lm loss validation", "lm loss high validation"):
        assert furthest(split[tag], wide[tag]) < SAME
    assert furthest(wide["lm loss"], host["lm loss"]) < SAME
    assert furthest(wide["lm loss validation"], host["lm loss validation"]) < SAME


def test_bucket_without_tokens_never_makes_nan(
    runs: TrainingRuns, data: Path, tmp_path: Path
) -> None:
    """Of a text of one token, high is that token, medium nothing, and low all others."""
    assert runs.call(JOBS / "write_documents.py", 1, tmp_path / "one").returncode == 0
    count(runs, tmp_path / "one", tmp_path / "one.json")
    flag = f"--mile-token-frequency {tmp_path}/one.json"
    run = runs.train(2, TP1, flags_of(data), SHORT, flag)
    for tag in counted(run):
        assert all(map(math.isfinite, run[tag]))
        assert any(run[tag]) == ("medium" not in tag)
    assert "number of nan iterations:   0" in run.logs[-1]
    assert not re.search(r"\bnan\b(?! iterations)", run.logs[-1])


def test_named_figures_are_logged_in_training_and_evaluation(runs: TrainingRuns) -> None:
    plain = runs.train(2, TP2, MILE, SHORT)
    flag = "--mile-report accuracy,entropy,loss"
    run = runs.train(2, TP2, MILE, SHORT, flag)
    wide = runs.train(1, TP1, MILE, SHORT, flag)
    entropies = ["mile entropy", "mile entropy validation"]
    accuracies = ["mile accuracy", "mile accuracy validation"]
    ours = {tag for tag in run.scalars if tag.startswith("mile") and " vs " not in tag}
    assert ours == {*entropies, *accuracies, "mile loss"}
    for tag in ("lm loss", "mile entropy", "mile loss", "lm loss validation", "grad-norm"):
        assert run.scalars[tag] == plain.scalars[tag]
    for tag in entropies:
        assert furthest(run[tag], wide[tag]) < SAME
    for tag in accuracies:
        assert run[tag] == wide[tag]
        assert 0 < max(run[tag]) < 0.5  # of tokens that can be learnt


def test_frequency_trains_at_every_layout_and_resumes_with_its_file_alone(
    runs: TrainingRuns, data: Path, tmp_path: Path
) -> None:
    """The mean weight is that of the data, and another file is another objective."""
    settings = "--mile-frequency-exponent 2 --mile-frequency-eps 0.001"
    frequency = flags_of(data, f"--mock-data --mile-cpu --mile-objective frequency {settings}")
    flag = f"--mile-token-frequency {data}/frequency.json"
    wide = runs.train(1, TP1, frequency, flag)
    whole = runs.train(2, TP2, frequency, flag, save=True)
    half = runs.train(2, TP2, frequency, flag, STOP, save=True)
    fused = runs.train(2, TP2, frequency, flag, "--mile-fused-linear")
    resumed = runs.train(2, TP2, frequency, flag, f"--load {half.checkpoint}")
    for figure in ("lm loss", "mile loss", "mile weight"):
        assert half[figure] + resumed[figure] == whole[figure]
        assert furthest(wide[figure], whole[figure]) < SAME
        assert furthest(fused[figure], whole[figure]) < SAME
    assert furthest(whole["mile loss"], whole["lm loss"]) > 1e-4
    shares = torch.tensor(json.loads((data / "frequency.json").read_text())["counts"]) / 13950
    mean = (shares / (shares + 0.001) ** 2).sum().item()
    assert all(0.9 < weight / mean < 1.1 for weight in whole["mile weight"])

    assert runs.call(JOBS / "write_documents.py", 1, tmp_path / "one").returncode == 0
    count(runs, tmp_path / "one", tmp_path / "one.json")
    other = f"--mile-token-frequency {tmp_path}/one.json --load {half.checkpoint}"
    refused = runs.run(2, TP2, frequency, other)
    assert refused.code != 0
    (error,) = mile_errors("\n".join(refused.logs))
    assert "trained with another objective: token_frequency " in error
    assert not refused.scalars
    # With another objective the file is only reported by, and may change.
    reported = runs.train(2, TP2, flags_of(data), flag, STOP, save=True).checkpoint
    runs.train(2, TP2, flags_of(data), other.replace(str(half.checkpoint), str(reported)))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--mile-token-frequency {}/none.json", "none.json: No such file or directory; make it"),
        ("--mile-token-frequency {}/text.idx", "text.idx: not a token frequency file; make it"),
        ("--mile-token-frequency {}/other.json", "other.json: made for a vocabulary of 1000, but"),
        (
            "--mile-objective none --mile-token-frequency {}/frequency.json",
            "--mile-token-frequency without an objective",
        ),
        ("--mile-report loss,acc", "--mile-report loss,acc: mile has no 'acc'; expected some of"),
        (
            "--mile-objective frequency",
            "--mile-objective frequency needs --mile-token-frequency FILE; make the file with",
        ),
    ],
)
def test_refused_files_end_in_one_line(
    runs: TrainingRuns, data: Path, flags: str, expected: str
) -> None:
    if not (data / "other.json").exists():
        count(runs, data / "text", data / "other.json", 1000)
    run = runs.run(2, TP2, flags_of(data), flags.format(data))
    assert run.code != 0
    (error,) = mile_errors("\n".join(run.logs))
    assert expected in error
    assert "Traceback" not in "".join(run.logs)


def test_a_file_of_ones_own_gets_frequencies_and_a_schedule(
    runs: TrainingRuns, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from megatron_mile.objectives import Objective\n"
        "from megatron_mile.objectives.mile import GAMMA\n"
        "def weight(nll, entropy, gamma, frequency):\n"
        "    return (frequency + 1e-3) ** -gamma + 0 * nll\n"
        "MINE = Objective(name='mine', label='mine', equation='w', settings=(GAMMA,),\n"
        "                 inputs=('frequency',), weight=weight)\n"
    )
    own = flags_of(data).replace("objective mile", f"objective {tmp_path}/mine.py:MINE")
    flags = f"--mile-token-frequency {data}/frequency.json --mile-gamma-warmup 4 --train-iters 6"
    run = runs.train(1, TP1, own, flags)
    weights, gammas = run["mile weight"], run["mile gamma"]
    assert gammas == [gammas[-1] * part for part in (0, 0.25, 0.5, 0.75, 1, 1)]
    assert weights[0] == 1
    assert min(later / earlier for earlier, later in itertools.pairwise(weights[:5])) > 1.5
