"""Checks of the hooked loss of a real GPTModel at tensor parallel 2, run by test_hook.py."""

from __future__ import annotations

import copy
import sys
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from support import helpers
from support.emo_oracle import emo_oracle
from support.hook_model import (
    MASK,
    MILE,
    V,
    batch,
    build_model,
    forward,
    forward_step,
    gradients,
    raises,
    run_checks,
)

from megatron_mile import CostRows, ObjectiveConfig, attach, install, uninstall, wrap_forward_step
from megatron_mile.errors import MileError
from megatron_mile.integration.emo_rows import RowsAhead, check_matrix, fixed_rows, output_rows

RANKS = 2
# Measured on every version of megatron-core, the same digits: 9.6e-7, in the embedding's gradient.
SAME = 2e-6


def train(
    model: Any, config: ObjectiveConfig | None, fused: bool = False, cost: CostRows | None = None
) -> tuple[torch.Tensor, Any]:
    """Loss sum and report of one step, by the host or ours; leaves the gradients in the model."""
    uninstall()
    step = forward_step
    if config:
        install(config)
        if fused or cost:
            attach(model, config, fused_linear=fused, cost=cost)
        step = wrap_forward_step(step, config)
    output, loss_func = step(None, model)
    total, _, report = loss_func(output)
    total.backward()
    return total.detach(), report


def dense_logits(model: Any) -> torch.Tensor:
    """Logits [b, s, V] of both shards."""
    return gathered(forward(model, None).detach(), -1)


def gathered(shard: torch.Tensor, dim: int) -> torch.Tensor:
    """Both ranks' parts of a tensor."""
    shards = [torch.empty_like(shard) for _ in range(2)]
    torch.distributed.all_gather(
        shards, shard, group=parallel_state.get_tensor_model_parallel_group()
    )
    return torch.cat(shards, dim)


def check_ce_teaches_every_weight_as_the_host() -> None:
    model = build_model()
    host_total, host_report = train(model, None)
    host = gradients(model)
    total, report = train(model, ObjectiveConfig("ce"))
    ours = gradients(model)
    assert helpers.error(total, host_total) < SAME
    assert helpers.error(report["lm loss"], host_report["lm loss"]) < SAME
    for name, grad in host.items():
        assert helpers.error(ours[name], grad) < SAME, name


def check_mile_teaches_every_weight_as_the_oracle() -> None:
    """Loss, report, and each gradient beside what the oracle's gradient of the logits makes it."""
    model, labels = build_model(), batch()[1]
    truth = helpers.oracle(dense_logits(model), labels, MILE)
    alpha = MASK.sum() / (MASK * truth.weight).sum()
    total, report = train(model, MILE)
    ours = gradients(model)
    assert helpers.error(total, (MASK * alpha * truth.loss).sum()) < SAME
    for name, values in (
        ("lm loss", truth.nll),
        ("mile loss", alpha * truth.loss),
        ("mile entropy", truth.entropy),
        ("mile weight", truth.weight),
    ):
        expected = torch.stack([(MASK * values).sum(), MASK.sum()])
        assert helpers.error(report[name], expected) < SAME, name
    shards = (alpha * MASK.unsqueeze(-1) * truth.grad).float().chunk(2, -1)
    forward(model, None).backward(shards[parallel_state.get_tensor_model_parallel_rank()])
    for name, grad in gradients(model).items():
        assert helpers.error(ours[name], grad) < SAME, name


def check_mile_leaves_prediction_heads_to_the_host() -> None:
    """Weights that only a multi-token-prediction head has get the host's gradient, bit for bit."""
    model = build_model(mtp_num_layers=1, mtp_loss_scaling_factor=0.1)
    train(model, None)
    host = gradients(model)
    train(model, MILE)
    ours = gradients(model)
    heads = {name for name in host if name.startswith("mtp.")}
    assert heads
    assert {name for name in host if torch.equal(ours[name], host[name])} == heads


def check_emo_teaches_every_weight_as_the_oracle() -> None:
    """Each mode, with the output layer's rows, tied and not, and with fixed rows of another width.

    The padding of the fixed matrix is rows of zeros.
    """
    labels = batch()[1]
    rank = parallel_state.get_tensor_model_parallel_rank()
    fixed = torch.randn(V, 20, generator=torch.Generator().manual_seed(4))
    fixed[90:] = 0
    for mode, tied, rows in (("1", False, None), ("2", True, None), ("alone", False, fixed)):
        model, config = build_model(tied), ObjectiveConfig("emo", emo_mode=mode)
        layer = model.embedding.word_embeddings if tied else model.output_layer
        whole = gathered(layer.weight.detach(), 0) if rows is None else rows
        truth = emo_oracle(dense_logits(model), labels, whole, mode)
        cost = None if rows is None else fixed_rows(rows[:90], 90, model)
        total, report = train(model, config, cost=cost)
        ours = gradients(model)
        assert helpers.error(total, (MASK * truth.loss).sum()) < SAME
        assert [*report][-1] == "mile emo"
        for name, values in (
            ("lm loss", truth.nll),
            ("mile loss", truth.loss),
            ("mile entropy", truth.entropy),
            ("mile weight", torch.ones_like(truth.nll)),
            ("mile emo", truth.emo),
        ):
            expected = torch.stack([(MASK * values).sum(), MASK.sum()])
            assert helpers.error(report[name], expected) < SAME, name
        shards = (MASK.unsqueeze(-1) * truth.grad).float().chunk(2, -1)
        forward(model, None).backward(shards[rank])
        for name, grad in gradients(model).items():
            assert helpers.error(ours[name], grad) < SAME, (mode, name)


def check_attached_emo_fetches_rows_ahead_of_the_logits() -> None:
    """Once a training step, before the output layer runs; for other labels once more."""
    model, emo, labels = build_model(), ObjectiveConfig("emo"), batch()[1]
    plain, _ = train(model, emo)
    expected = gradients(model)
    uninstall()
    events: list[str] = []
    model.output_layer.register_forward_hook(lambda *_: events.append("logits"))
    fetch = CostRows.fetch

    def recorded(*args: Any) -> Any:
        events.append("rows")
        return fetch(*args)

    with mock.patch.object(CostRows, "fetch", recorded):
        attach(model, emo)
        output, loss_func = wrap_forward_step(forward_step, emo)(None, model)
        total = loss_func(output)[0]
        total.backward()
        with torch.no_grad():
            forward(model.eval(), labels)
        uninstall()
        forward(model.train(), labels)
        assert events == ["rows", "logits", "logits", "logits"]
        ahead = RowsAhead(model, None)
        forward(model, labels)
        ahead.take(model, labels.clone())
        assert events[4:] == ["rows", "logits", "rows"]
        ahead.stop(model)
        attach(model, emo)
        attach(model, MILE)  # another objective: no row is fetched any more
        forward(model, labels)
        assert events[7:] == ["logits"]
    uninstall()
    assert torch.equal(total, plain)
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name]), name


def check_emo_takes_the_weight_that_a_hook_brings() -> None:
    """As DDP's with --overlap-param-gather, whose weights are whole when their layer runs."""
    model, emo = build_model(), ObjectiveConfig("emo", emo_mode="alone")
    expected, _ = train(model, emo)
    weight = model.output_layer.weight
    whole = weight.detach().clone()
    weight.data.zero_()

    def bring(*_: Any) -> None:
        weight.data.copy_(whole)

    model.output_layer.register_forward_pre_hook(bring)
    uninstall()
    attach(model, emo)
    output, loss_func = wrap_forward_step(forward_step, emo)(None, model)
    assert torch.equal(loss_func(output)[0].detach(), expected)


def check_emo_refuses_what_it_cannot_do() -> None:
    model, emo = build_model(), ObjectiveConfig("emo")
    raises(MileError, "cannot be combined with the objective emo", attach, model, emo, None, True)
    rows = CostRows(torch.ones(V // 2, 3))
    raises(MileError, "with the objective mile", attach, model, MILE, None, False, rows)
    matrix = torch.ones(V, 3)
    check_matrix(matrix, V - 6, V)
    raises(MileError, "96 rows, but the tokenizer 97 tokens", check_matrix, matrix, V + 1, 2 * V)
    raises(MileError, "the model 95 columns", check_matrix, matrix, 90, V - 1)
    matrix[7, 1] = torch.nan
    raises(MileError, "NaN or infinity in row 7", check_matrix, matrix, V, V)
    for weight in (None, torch.nn.Parameter(torch.ones(V // 4, 3))):
        model.output_layer.weight = weight
        raises(MileError, f"expected {V // 2} rows for --mile-emo-cost", output_rows, model)
    weight = torch.nn.Parameter(torch.ones(V // 2, 3))
    weight.__fsdp_param__ = True
    model.output_layer.weight = weight
    raises(MileError, "FSDP owns the weight of the output layer of GPTModel", output_rows, model)


def check_sequence_parallel_changes_nothing() -> None:
    """Sequences split between the ranks: same report, same gradients of the matrices.

    Gradients of norms and biases are those of a part, until Megatron joins them after the step.
    """
    plain = build_model(tensor_model_parallel_size=2)
    _, expected = train(plain, MILE)
    whole = gradients(plain)
    joined = [name for name in whole if name.endswith("weight") and "norm" not in name]
    joined.remove("embedding.position_embeddings.weight")
    for fused in (False, True):
        model = build_sequence_parallel()
        _, report = train(model, MILE, fused)
        ours = gradients(model)
        for name, figure in expected.items():
            assert helpers.error(report[name], figure) < SAME, (name, fused)
        for name in joined:
            assert helpers.error(ours[name], whole[name]) < SAME, (name, fused)


def build_sequence_parallel() -> Any:
    """The same model under sequence parallel.

    Megatron takes torch's norms without it only: with it, those of Transformer Engine and apex,
    which need a GPU. A norm looks at one token at a time, so torch's stand in for them here.
    """
    norm = WrappedTorchNorm.__new__

    def unaware(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        return norm(cls, plain, *args, **kwargs)

    with mock.patch.object(WrappedTorchNorm, "__new__", unaware):
        model = build_model(tensor_model_parallel_size=2, sequence_parallel=True)
    assert model.output_layer.sequence_parallel
    return model


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1], tensor_parallel=2)
