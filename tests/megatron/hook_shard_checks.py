"""Checks of the hooked loss of a real GPTModel at tensor parallel 2, run by test_hook.py."""

from __future__ import annotations

import copy
import sys
from typing import Any
from unittest import mock

import helpers
import torch
from hook_model import MASK, MILE, batch, build_model, forward, forward_step, gradients, run_checks
from megatron.core import parallel_state
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_mile import ObjectiveConfig, attach, install, uninstall, wrap_forward_step

# Measured on every version of megatron-core, the same digits: 9.6e-7, in the embedding's gradient.
SAME = 2e-6


def train(
    model: Any, config: ObjectiveConfig | None, fused: bool = False
) -> tuple[torch.Tensor, Any]:
    """Loss sum and report of one step, by the host or ours; leaves the gradients in the model."""
    uninstall()
    step = forward_step
    if config:
        install(config)
        if fused:
            attach(model, config, fused_linear=True)
        step = wrap_forward_step(step, config)
    output, loss_func = step(None, model)
    total, _, report = loss_func(output)
    total.backward()
    return total.detach(), report


def dense_logits(model: Any) -> torch.Tensor:
    """Logits [b, s, V] of both shards."""
    shard = forward(model, None).detach()
    shards = [torch.empty_like(shard) for _ in range(2)]
    torch.distributed.all_gather(
        shards, shard, group=parallel_state.get_tensor_model_parallel_group()
    )
    return torch.cat(shards, -1)


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
    truth = helpers.oracle(dense_logits(model), labels, "mile", MILE.gamma, MILE.sigma)
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
