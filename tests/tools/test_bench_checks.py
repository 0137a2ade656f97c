"""tools/bench: data, truth and errors of both workloads, and who is refused; memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.helpers import oracle

from megatron_mile.config import ObjectiveConfig
from tools.bench.case import Case, Inputs
from tools.bench.inputs import make_inputs
from tools.bench.measure import Call, extra_mib, make_buffers
from tools.bench.provider import Provider
from tools.bench.providers import providers
from tools.bench.rounds import _check

CPU = torch.device("cpu")
HIDDEN = 24
# Of each workload, one that is right.
RIGHT = {0: "ours-chunked", HIDDEN: "ours-linear"}


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def _inputs(dtype: str = "fp32", tp: int = 1, hidden: int = 0) -> tuple[Case, Inputs]:
    case = Case(dtype, 37, 514, tp, 1, "cpu", hidden)
    return case, make_inputs(case, tp - 1, CPU)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["ce", "mile"])
def test_make_inputs_holds_the_truth_of_the_shard(dtype: str, objective: str) -> None:
    case, whole = _inputs(dtype)
    _, shard = _inputs(dtype, tp=2)
    truth = oracle(
        whole.leaves["logits"], whole.targets, ObjectiveConfig(objective), whole.upstream
    )
    rows = shard.checked["logits"]
    # Two ways to write the same in fp64: 1e-15 apart.
    torch.testing.assert_close(
        shard.truths[objective]["loss"], truth.loss[rows], rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(
        shard.truths[objective]["logits"],
        truth.grad[rows, case.vocab // 2 :],
        rtol=1e-13,
        atol=1e-15,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["ce", "mile"])
def test_make_inputs_holds_the_truth_behind_the_output_layer(dtype: str, objective: str) -> None:
    # More tokens and ids than are checked at once: blocks are added up, rows are picked.
    case = Case(dtype, 301, 1202, 2, 1, "cpu", HIDDEN)
    first, last = (make_inputs(case, rank, CPU) for rank in range(2))
    hidden = last.leaves["hidden"].double()
    weight = torch.cat([x.leaves["weight"] for x in (first, last)]).double()
    truth = oracle(hidden @ weight.t(), last.targets, ObjectiveConfig(objective), last.upstream)
    wanted = {
        "loss": truth.loss,
        "hidden": truth.grad @ weight,
        "weight": (truth.grad.t() @ hidden)[case.vocab // 2 :],
    }
    for name, tensor in wanted.items():
        assert len(last.checked[name]) == 256
        torch.testing.assert_close(
            last.truths[objective][name], tensor[last.checked[name]], rtol=1e-11, atol=1e-12
        )


# A narrow layer raises other logits with the target's: their vectors are not orthogonal.
@pytest.mark.parametrize("hidden", [0, 512])
def test_likely_and_unlikely_targets_alternate(hidden: int) -> None:
    _, inputs = _inputs(hidden=hidden)
    loss = inputs.truths["ce"]["loss"]  # of all 37 tokens
    assert loss[::2].max() < 2 < loss[1::2].median()


@pytest.mark.parametrize(
    ("hidden", "leaf"), [(0, "logits"), (HIDDEN, "hidden"), (HIDDEN, "weight")]
)
def test_errors_see_one_wrong_small_entry_and_nan(hidden: int, leaf: str) -> None:
    case, inputs = _inputs(hidden=hidden)
    loss, gradients = _placed(inputs, "mile")
    assert set(inputs.errors("mile", loss, gradients)) == {0}
    place = list(inputs.leaves).index(leaf)
    row = gradients[place][inputs.checked[leaf][3]]
    entry = row.abs().argmin()
    row[entry] += row.abs().mean()
    assert inputs.errors("mile", loss, gradients)[1 + place] > 0.5
    row[entry] = torch.nan
    assert not inputs.errors("mile", loss, gradients)[1 + place] <= case.tolerances[1]


def _placed(inputs: Inputs, objective: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return loss and gradients that are right where they are checked."""
    truth = inputs.truths[objective]
    gradients = tuple(torch.zeros_like(leaf.double()) for leaf in inputs.leaves.values())
    for name, gradient in zip(inputs.leaves, gradients, strict=True):
        gradient[inputs.checked[name]] = truth[name]
    return truth["loss"].clone(), gradients


@pytest.mark.parametrize("hidden", [0, HIDDEN])
@pytest.mark.parametrize(
    ("factor", "status"),
    [(1.0, "timed"), (1.001, "failed: loss error"), (float("nan"), "failed: loss error nan")],
)
def test_check_refuses_a_wrong_loss(
    hidden: int, factor: float, status: str, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, _ = providers(hidden)[RIGHT[hidden]].build()
    result, call = _checked(hidden, lambda *given: factor * right(*given), monkeypatch)
    assert result["status"].startswith(status)
    assert (call is None) == (status != "timed")


@pytest.mark.parametrize(
    ("hidden", "leaf"), [(0, "logits"), (HIDDEN, "hidden"), (HIDDEN, "weight")]
)
def test_check_refuses_a_wrong_gradient(
    hidden: int, leaf: str, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, _ = providers(hidden)[RIGHT[hidden]].build()

    def wrong(*given: Any) -> torch.Tensor:
        leaves = dict(zip(_inputs(hidden=hidden)[1].leaves, given, strict=False))
        # The same value with a gradient that is larger by a thousandth.
        x = leaves[leaf]
        leaves[leaf] = 1.001 * x - (0.001 * x).detach()
        return right(*leaves.values(), *given[len(leaves) :])

    result, call = _checked(hidden, wrong, monkeypatch)
    assert result["status"].startswith(f"failed: d({leaf}) error ")
    assert call is None


@pytest.mark.parametrize("hidden", [0, HIDDEN])
def test_check_reports_a_loss_that_raises(
    hidden: int, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    result, call = _checked(hidden, broken, monkeypatch)
    assert result == {"status": "failed: RuntimeError: no kernel image"}
    assert call is None


def _checked(
    hidden: int, loss: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], Call | None]:
    """Check `loss` as if it were a provider."""
    case, inputs = _inputs(hidden=hidden)
    provider = Provider("mile", lambda: (loss, ""), lambda _: "")
    monkeypatch.setitem(providers(hidden), RIGHT[hidden], provider)
    return _check(case, RIGHT[hidden], inputs, make_buffers(inputs))


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_extra_mib_sees_memory_of_other_threads() -> None:
    _, inputs = _inputs()

    def loss(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        thread = threading.Thread(target=lambda: torch.ones(48 * 2**18).sum())
        thread.start()
        thread.join()
        return logits.sum(-1)

    call = Call(loss, inputs, make_buffers(inputs), None)
    extra_mib(call)
    # The kernel counts pages in batches; ten runs gave 47.9.
    assert extra_mib(call) == pytest.approx(48, abs=4)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_extra_mib_leaves_out_the_gradients_of_the_output_layer(group: Any) -> None:
    # 48 MiB of logits, and 48 MiB of gradient in d(weight): each a mapping of its own.
    case = Case("fp32", 512, 24576, 1, 1, "cpu", 512)
    inputs = make_inputs(case, 0, CPU)
    result, _ = _check(case, "gemms", inputs, make_buffers(inputs))
    assert result["status"] == "timed (no loss: nothing to check)"
    assert "loss_error" not in result
    assert result["extra_mib"] == pytest.approx(48, abs=4)
