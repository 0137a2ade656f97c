"""An objective of the user's own, from a file: what is loaded, what is refused, what never is."""

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_mile import ObjectiveConfig, load_objective, objective_file, token_loss
from megatron_mile.errors import MileError
from megatron_mile.integration.arguments import config_from_namespace, parse
from megatron_mile.integration.checkpoints import changed_settings
from megatron_mile.objectives import OBJECTIVES

FILE = """
import torch
from megatron_mile.objectives import Objective
from megatron_mile.objectives.mile import GAMMA

def weight(nll, entropy, gamma):
    return torch.exp(-nll) ** gamma

MINE = Objective(
    name="mine", label="mine", equation="w = p_y^gamma", settings=(GAMMA,), weight=weight
)
"""


@pytest.fixture(autouse=True)
def _known_before() -> Iterator[None]:
    """Forget what a test has loaded."""
    known = dict(OBJECTIVES)
    yield
    for name in set(OBJECTIVES) - set(known):
        del OBJECTIVES[name]
    objective_file.SOURCES.clear()


def write(folder: Path, text: str = FILE) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return f"{path}:MINE"


def test_objective_of_a_file_is_one_like_the_others(tmp_path: Path) -> None:
    config = ObjectiveConfig(load_objective(write(tmp_path)), gamma=2, normalize="none")
    logits, targets = torch.randn(9, 50).double().requires_grad_(), torch.arange(9)
    out = token_loss(logits, targets, config)
    torch.testing.assert_close(out.weight, torch.exp(-2 * out.nll), rtol=1e-14, atol=0)
    assert torch.equal(out.loss, out.weight * out.nll)


def test_a_file_may_take_sums_of_squares_and_frequencies(tmp_path: Path) -> None:
    text = FILE.replace("entropy, gamma)", "entropy, gamma, squares, frequency)")
    text = text.replace("** gamma", "** gamma * squares / frequency")
    text = text.replace("weight=weight", 'weight=weight, needs_squares=True, inputs=("frequency",)')
    config = ObjectiveConfig(load_objective(write(tmp_path, text)))
    logits, targets = torch.randn(9, 50).double(), torch.arange(9)
    share = torch.rand(9, dtype=torch.float64)
    out = token_loss(logits, targets, config, inputs={"frequency": share})
    squares = logits.softmax(-1).square().sum(-1)
    truth = torch.exp(-out.nll) * squares / share
    torch.testing.assert_close(out.weight, truth, rtol=1e-13, atol=0)
    digests = [{"mile_objective": "mine", "mile_token_frequency_digest": x} for x in "ab"]
    assert changed_settings(*digests) == ["token_frequency a -> b"]


def test_a_source_is_run_once_and_a_name_belongs_to_one(tmp_path: Path) -> None:
    source = write(tmp_path)
    assert load_objective(source) == load_objective(source) == "mine"
    other = tmp_path / "other.py"
    other.write_text(FILE)
    with pytest.raises(ValueError, match="an objective named mine exists already"):
        load_objective(f"{other}:MINE")


def test_flags_name_a_file_and_take_the_settings_that_it_uses(tmp_path: Path) -> None:
    text = FILE.replace("mile import GAMMA", "eaft import OBJECTIVE as EAFT")
    text = text.replace("(GAMMA,)", "EAFT.settings[1:]").replace("gamma", "eaft_exponent")
    source = write(tmp_path, text)
    namespace = parse(["--mile-objective", source, "--mile-eaft-exponent", "2"])
    assert namespace.mile_objective == "mine"
    config = config_from_namespace(namespace)
    assert config is not None
    assert (config.objective, config.own) == ("mine", {"eaft_exponent": 2.0})
    with pytest.raises(MileError, match="--mile-emo-cap with --mile-objective mine"):
        parse(["--mile-objective", source, "--mile-emo-cap", "2"])


def test_what_a_checkpoint_stores_is_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    source = write(tmp_path, f"open({str(ran)!r}, 'w')\n{FILE}")
    stored, mile = {"mile_objective": source}, {"mile_objective": "mile"}
    assert changed_settings(stored, mile) == [f"objective {source} -> mile"]
    with pytest.raises(MileError, match=r"objective is .*; expected one of ce, "):
        config_from_namespace(Namespace(**stored))
    with pytest.raises(ValueError, match=r"objective is .*; expected one of ce, "):
        ObjectiveConfig(source)
    assert not ran.exists()
    load_objective(source)
    assert ran.exists()


def test_another_file_of_the_same_name_is_another_objective(tmp_path: Path) -> None:
    load_objective(write(tmp_path))
    before = {"mile_objective": "mine", "mile_objective_sha256": "a" * 64}
    after = {**before, "mile_objective_sha256": "b" * 64}
    assert changed_settings(before, before) == []
    assert changed_settings(before, after) == [f"objective_file {'a' * 12} -> {'b' * 12}"]
    assert changed_settings(before, {"mile_objective": "mine"}) != []


RECORD = 'Objective(name="mine", label="", equation="", weight=weight'
# What is put in the place of what, and what the one line says.
BAD = {
    "syntax": ("def weight", "def weight(", "SyntaxError", "mine.py, line 6"),
    "import": ("import torch", "import torch, no_such_module", "ModuleNotFoundError: No module"),
    "exit": ("MINE =", "raise SystemExit\nMINE =", "mine.py: SystemExit"),
    "no-name": ("MINE", "YOURS", "mine.py:MINE: no such name in the file; expected an Objective"),
    "other-kind": ("MINE =", "MINE = 3\nYOURS =", "mine.py:MINE: a int; expected an Objective"),
    "existing": ('name="mine"', 'name="mile"', "an objective named mile exists already"),
    "none": ('name="mine"', 'name="none"', "its name is 'none'; expected a word"),
    "no-weight": (", weight=weight", "", "expected an objective with a weight"),
    "mix": (", weight=weight", ", weight=weight, mix=weight", "without a mix"),
    "setting": ("mile import GAMMA", "mile import Setting\nGAMMA = Setting('slope', 1.0, '')",
                "its setting slope is not one of this library's; make it a constant"),
    "value-and-slope": (", weight=weight", ", weight=weight, value=weight, weight_slope=weight",
                        "it has a value and a weight_slope"),
    "raises": ("torch.exp(-nll)", "torch.ex(-nll)", "weight(nll, entropy, gamma) ended in Attrib"),
    "arguments": ("nll, entropy, gamma", "nll, gamma", "ended in TypeError: weight() got"),
    "shape": ("torch.exp(-nll)", "torch.exp(-nll).sum()",
              "weight returned torch.float64 () on cpu; expected what it was given, torch.float64"),
    "dtype": ("torch.exp(-nll)", "torch.exp(-nll.float())", "torch.float32 (6, 6) on cpu; expec"),
    "device": ("torch.exp(-nll)", "torch.exp(-nll.to('meta'))", "(6, 6) on meta; expected what"),
    "nan": ("torch.exp(-nll)", "(nll / nll)", "weight returned nan for nll 0 and entropy 0; exp"),
    "negative": ("torch.exp(-nll)", "(1 - nll)", "returned -1 for nll 2 and entropy 0; expected a"),
    "infinite": ("torch.exp(-nll)", "(1 / nll)", "weight returned inf for nll 0 and entropy 0;"),
    "no-tensor": ("torch.exp(-nll) ** gamma", "1.0", "returned a float; expected a tensor"),
    "gradient": ("torch.exp(-nll)", "torch.exp(-nll * torch.ones(1).double().requires_grad_())",
                 "a tensor that requires a gradient; weights are constants"),
    "value": (", weight=weight", ", weight=weight, value=lambda nll, entropy, gamma: -nll - 1",
              "value returned -1 for nll 0"),
    "slope": (", weight=weight",
              ", weight=weight, weight_slope=lambda nll, entropy, gamma: entropy / entropy",
              "weight_slope returned nan for nll 0 and entropy 0; expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_used_ends_in_one_line(tmp_path: Path, kind: str) -> None:
    old, new, *parts = BAD[kind]
    assert old in FILE
    with pytest.raises(MileError) as caught:
        parse(["--mile-objective", write(tmp_path, FILE.replace(old, new))])
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("--mile")
    assert all(part in message for part in [str(tmp_path / "mine.py"), *parts]), message


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("no/such.py:MINE", "objective file no/such.py: No such file or directory"),
        ("mine.py", "expected FILE.py:NAME, such as mine.py:OBJECTIVE"),
        ("mine.py:", "expected FILE.py:NAME"),
        ("mine:MINE", "expected FILE.py:NAME"),
        ("mine", "'mine': expected one of none, ce, "),
    ],
)
def test_a_word_that_is_no_file_ends_in_one_line(word: str, text: str) -> None:
    with pytest.raises(MileError, match=r"^--mile-objective") as caught:
        parse(["--mile-objective", word])
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
