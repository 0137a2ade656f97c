"""What happens before the first step: the launcher, bad flags, models and machines that do not fit.

Each refusal is one line on stderr and a non-zero exit, before a step has been taken.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from support.training_runs import (
    EVALUATE,
    EXAMPLE,
    JOBS,
    MILE,
    MODEL,
    TP1,
    TP2,
    TrainingRuns,
    command_line,
    mile_errors,
    python,
    read_scalars,
    torchrun,
)

pytestmark = pytest.mark.slow

ASK = "--mile-cpu --mile-objective mile "
# A job's --mile flags, and what the one line about them must say.
BAD_FLAGS = {
    ASK + "--mile-gamma -1": ("gamma", "-1", ">= 0"),
    ASK + "--mile-gamma nan": ("gamma", "nan", "finite"),
    ASK + "--mile-gamma inf": ("gamma", "inf", "finite"),
    ASK + "--mile-gamma much": ("--mile-gamma", "'much'"),
    ASK + "--mile-gamma": ("--mile-gamma", "expected one argument"),
    ASK + "--mile-sigma -0.5": ("sigma", "-0.5", ">= 0"),
    ASK + "--mile-normalize tokens": ("--mile-normalize", "'tokens'", "global"),
    ASK + "--mile-gamma-warmup -1": ("--mile-gamma-warmup", "-1 is no number of iterations"),
    ASK + "--mile-gamma-decay-iters 1.5": ("--mile-gamma-decay-iters", "1.5 is no number"),
    "--mile-cpu --mile-objective ce --mile-gamma-warmup 3": (
        "--mile-gamma-warmup with --mile-objective ce, which has no gamma",
    ),
    "--mile-gamma-decay-iters 3": ("--mile-gamma-decay-iters", "--mile-objective mile"),
    ASK + "--mile-gama 2": ("--mile-gama", "did you mean --mile-gamma?"),
    ASK + "--mile-sigma 0 --mile-gamma 0.5 --mile-entropy-grad": ("entropy_grad", "sigma", "0.5"),
    ASK + "--mile-gamma 100": ("gamma=100.0 with sigma=1.0", "14.9^100", "gamma <= 25.6"),
    ASK + "--mile-emo-mode 2 --mile-emo-gt-q": ("--mile-emo-gt-q, --mile-emo-mode with", "mile"),
    ASK + "--mile-emo-cost here.npy": (
        "--mile-emo-cost with --mile-objective mile",
        "only emo has it",
    ),
    "--mile-objective none --mile-fused-linear": ("--mile-fused-linear without an objective",),
    "--mile-objective none --mile-mask-padded-vocab": ("--mile-mask-padded-vocab without",),
    "--mile-objective unlikelihood": ("--mile-objective", "'unlikelihood'", "focal"),
    "--mile-gamma 2": ("--mile-gamma", "--mile-objective mile"),
    "--mile-entropy-grad": ("--mile-entropy-grad", "--mile-objective mile"),
    "--mile-fused-linear": ("--mile-fused-linear", "--mile-objective mile"),
    "--mile-mask-padded-vocab": ("--mile-mask-padded-vocab", "--mile-objective mile"),
    # The default, but asked for: training without it would be silently something else.
    "--mile-gamma 1.0": ("--mile-gamma", "--mile-objective mile"),
}
TRY_FLAGS = """
import json, sys
from megatron_mile.errors import MileError
from megatron_mile.launch import prepare
for words in json.loads(sys.argv[1]):
    try:
        prepare(words.split())
        text = "accepted"
    except MileError as error:
        text = str(error)
    print(json.dumps([words, text, "megatron.core" in sys.modules]))
"""
NOTHING_PATCHED = """
import json, sys
import megatron.training.training
from megatron.core.models.gpt import GPTModel
from megatron_mile import cpu_mode
method = GPTModel.compute_language_model_loss
try:
    cpu_mode.enable()
    enabled = "enabled"
except RuntimeError as error:
    enabled = str(error)
print(json.dumps({
    "argv": sys.argv[1:],
    "modules": [method.__module__, megatron.training.training.pretrain.__module__],
    "wrapped": hasattr(method, "__wrapped__") or hasattr(megatron.training.pretrain, "__wrapped__"),
    "enabled": enabled,
}))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[str, bool]]:
    """What `prepare` says to each of BAD_FLAGS, and whether it had imported Megatron by then."""
    done = python("-c", TRY_FLAGS, json.dumps(list(BAD_FLAGS)))
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return {words: (text, imported) for words, text, imported in rows}


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_prepare_refuses_in_one_line(answers: dict[str, tuple[str, bool]], words: str) -> None:
    text, _ = answers[words]
    assert "\n" not in text
    assert all(part in text for part in BAD_FLAGS[words]), text


def test_prepare_refuses_before_importing_megatron(answers: dict[str, tuple[str, bool]]) -> None:
    refused = {words: late for words, (text, late) in answers.items() if text != "accepted"}
    assert not any(refused.values())


def test_torchrun_prints_one_line_and_fails_at_once() -> None:
    start = time.monotonic()
    flags = [*MODEL.split(), *TP2.split(), *MILE.split(), "--mile-gamma", "-1"]
    done = torchrun(2, "-m", "megatron_mile.launch", EXAMPLE, *flags)
    assert done.returncode != 0
    (error,) = mile_errors(done.stderr)
    assert "gamma is -1.0; expected a finite number >= 0" in error
    # torchrun itself tells of the failed rank afterwards.
    assert "Traceback" not in done.stderr[: done.stderr.index(error)]
    # Measured 6 s, nearly all of it torchrun's; a job that hangs is ended after 100 s.
    assert time.monotonic() - start < 60


def test_launcher_repeats_the_script_run_directly(runs: TrainingRuns, tmp_path: Path) -> None:
    # The one run through torchrun itself, which also shows that the others are what it would do.
    flags = command_line(tmp_path, TP2, EVALUATE, MILE)
    done = torchrun(2, "-m", "megatron_mile.launch", EXAMPLE, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    direct, launched = runs.train(2, TP2, EVALUATE, MILE, save=True), read_scalars(tmp_path)
    assert launched.keys() == direct.scalars.keys()
    for tag, figures in direct.scalars.items():
        if "time" not in tag:
            assert launched[tag] == figures, tag


def test_launcher_patches_nothing_without_a_flag(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(NOTHING_PATCHED)
    done = python("-m", "megatron_mile.launch", script, "--lr", "1e-3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["argv"] == ["--lr", "1e-3"]
    assert all(name.startswith("megatron.") for name in found["modules"])
    assert not found["wrapped"]
    # Too late for CPU mode, which must come before the first import of megatron.core.
    assert "before megatron.core is imported" in found["enabled"]


@pytest.mark.parametrize("options", [(), ("-P",)], ids=["plain", "safe-path"])
def test_launcher_finds_imports_as_python_does(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Through a symlink, too: the folder in front is that of the file that it leads to."""
    for folder in ("real", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "real" / "script.py").write_text("import sys; print(sys.argv[0], sys.path)")
    link = tmp_path / "elsewhere" / "link.py"
    link.symlink_to(tmp_path / "real" / "script.py")
    ours = python(*options, "-m", "megatron_mile.launch", link)
    assert ours.stdout == python(*options, link).stdout
    assert (f"{tmp_path}/real'" in ours.stdout) is (not options)


RUN_IS_WATCHED = """
import json, sys
from argparse import Namespace
from megatron_mile.errors import MileError
from megatron_mile.launch import prepare
prepare([sys.argv[1], "somewhere"])
from megatron.core.models.gpt import GPTModel
from megatron.training import checkpointing, global_vars, training
global_vars.set_args(Namespace())
try:
    checkpointing.check_checkpoint_args(Namespace(mile_objective="mile", mile_gamma=2.0))
    text = "accepted"
except MileError as error:
    text = str(error)
loss = GPTModel.compute_language_model_loss
patched = hasattr(loss, "__wrapped__") or hasattr(training.pretrain, "__wrapped__")
print(json.dumps([text, patched, training.setup_model_and_optimizer.__code__.co_filename]))
"""


@pytest.mark.parametrize("flag", ["--load", "--save"])
def test_prepare_watches_a_resume_and_records_the_run_without_a_flag(
    runs: TrainingRuns, tmp_path: Path, flag: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(RUN_IS_WATCHED)
    done = runs.call(script, flag)
    assert done.returncode == 0, done.stdout
    text, patched, setup = json.loads(done.stdout.splitlines()[-1])
    assert "trained with another objective: objective mile -> none" in text
    assert not patched
    assert setup.endswith("record.py")


# For a process of the forker, which has called cpu_mode.enable().
CPU_MODE = """
import torch
x = torch.zeros(2, device="cuda")
moved = [x.to(0), torch.ones(2, device=0), x.cuda(), x.to("cuda:0"), x.to(torch.device("cuda"))]
assert all(tensor.device.type == "cpu" for tensor in moved)
assert x.type() == "torch.cuda.FloatTensor" and torch.equal(x.type(x.type()), x)
assert x.type(torch.float64).dtype == torch.float64
event = torch.cuda.Event(enable_timing=True)
assert event.query() is True and event.elapsed_time(event) == 0.0
assert not torch.cuda.is_available()
torch.manual_seed(1)
expected = torch.rand(3)
torch.manual_seed(1)
torch.rand(5, device="cuda")
torch.nn.functional.dropout(torch.ones(9), 0.5)
assert torch.equal(torch.rand(3), expected)
print("fine")
"""


def test_cpu_mode_answers_for_the_gpu_and_leaves_the_cpu_generator_alone(
    runs: TrainingRuns, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(CPU_MODE)
    assert runs.call(script).stdout.endswith("fine\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_script_without_gpu_fails_as_megatron_does() -> None:
    flags = [*MODEL.split(), *TP1.split(), *MILE.replace("--mile-cpu", "").split()]
    done = python(EXAMPLE, *flags)
    assert done.returncode != 0
    assert "Megatron requires CUDA" in done.stderr
    assert "cpu mode" not in done.stdout
    assert not mile_errors(done.stderr)


@pytest.mark.parametrize(
    ("kind", "world_size", "layout", "text"),
    [
        ("own-method", 1, TP1, "objective not applied: OwnMethod does not take its loss from"),
        ("own-forward", 1, TP1, "objective not applied: OwnForward computed its loss without"),
        ("gathered", 2, TP2, "Gathered gathers its logits (parallel_output=False) at TP 2"),
    ],
    ids=["own-method", "own-forward", "gathered"],
)
def test_job_refuses_a_model_that_the_objective_cannot_reach(
    runs: TrainingRuns, kind: str, world_size: int, layout: str, text: str
) -> None:
    script = JOBS / "models_that_bypass.py"
    run = runs.run(world_size, layout, MILE, f"--bypass {kind}", script=script)
    assert run.code != 0
    (error,) = mile_errors("\n".join(run.logs))
    assert text in error
    assert "Traceback" not in "".join(run.logs)
    assert not run.scalars
