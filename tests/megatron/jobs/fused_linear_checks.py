"""Checks of the fused output projection and of masked padding on real models, run by test_hook.py.

The truth is the same step with the logits formed, which hook_loss_checks.py holds to float64.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from support import helpers
from support.hook_model import (
    HAS_HYBRID,
    MASK,
    MILE,
    B,
    S,
    V,
    batch,
    build_hybrid,
    build_model,
    forward,
    forward_step,
    host_loss,
    raises,
    run_checks,
)

from megatron_mile import ObjectiveConfig, attach, install, uninstall, wrap_forward_step
from megatron_mile.errors import MileCompatError, MileError
from megatron_mile.integration.hook import METHOD, installed_config

RANKS = 1
# Measured: 2.4e-7 of the loss, 1.1e-6 of the gradients; another order of summation.
SAME = 5e-6
WORDS = 90  # of the V = 96 columns, where padding is masked


def _step(model: Any) -> dict[str, torch.Tensor]:
    """Loss, report and gradients of one training step of the model as it is."""
    model.zero_grad()
    output, loss_func = wrap_forward_step(forward_step, MILE)(None, model)
    total, _, report = loss_func(output)
    total.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return {"total": total.detach(), **report, **gradients}


def check_fused_step_repeats_the_plain_step() -> None:
    hybrid = [build_hybrid()] if HAS_HYBRID else []
    for model in (build_model(), build_model(tied=True), *hybrid):
        attach(model, MILE)
        expected = _step(model)
        attach(model, MILE, fused_linear=True)
        found = _step(model)
        assert [*found] == [*expected]
        for name, value in expected.items():
            assert helpers.error(found[name], value) < SAME, name


def check_fused_step_never_forms_the_logits() -> None:
    """The layer's own forward is not called in training, and is called otherwise."""
    model, called = build_model(), []
    host = ColumnParallelLinear.forward

    def counted(
        self: Any, input_: Any, weight: Any = None, runtime_gather_output: Any = None
    ) -> Any:
        called.append(self is model.output_layer)
        return host(self, input_, weight, runtime_gather_output)

    ColumnParallelLinear.forward = counted
    try:
        attach(model, MILE, fused_linear=True)
        _step(model)
        assert called
        assert not any(called)
        forward(model.eval(), batch()[1])
        assert any(called)
    finally:
        ColumnParallelLinear.forward = host


def check_fused_model_evaluates_and_infers_as_before() -> None:
    model, labels = build_model(), batch()[1]
    expected, logits = forward(model, labels), forward(model, None)
    attach(model, MILE, fused_linear=True)
    with torch.no_grad():
        assert torch.equal(forward(model, labels), expected)
    assert torch.equal(forward(model, None), logits)  # training, but outside a forward step
    step = wrap_forward_step(forward_step, MILE)
    with torch.no_grad():
        output, _ = step(None, model.eval())
    assert torch.equal(output, expected)


def check_fused_projection_adds_to_main_grad() -> None:
    """Under Megatron's DDP with gradient accumulation fusion, two micro-batches, tied and not."""
    for tied in (False, True):
        gradients = []
        for fused in (False, True):
            model = build_model(tied)
            ddp = DistributedDataParallel(
                model.config, DistributedDataParallelConfig(overlap_grad_reduce=False), model
            )
            attach(ddp, MILE, fused_linear=fused)
            # The flag itself needs apex to build the layer; what it sets is this.
            model.output_layer.gradient_accumulation_fusion = fused
            for _ in range(2):
                output, loss_func = wrap_forward_step(forward_step, MILE)(None, ddp)
                loss_func(output)[0].backward()
            weights = dict(model.named_parameters())
            weight = weights[f"{'embedding.word_embeddings' if tied else 'output_layer'}.weight"]
            assert weight.grad_added_to_main_grad == fused
            assert all(weight.grad is None for weight in model.parameters())
            gradients.append({n: w.main_grad.clone() for n, w in model.named_parameters()})
        for name, value in gradients[0].items():
            assert value.any(), name
            assert helpers.error(gradients[1][name], value) < 2 * SAME, name


def check_uninstall_restores_the_layer() -> None:
    model = build_model()
    attach(model, MILE, fused_linear=True)
    attach(model, MILE)
    assert "forward" not in model.output_layer.__dict__
    attach(model, MILE, fused_linear=True)
    uninstall()
    assert "forward" not in model.output_layer.__dict__
    assert forward(model, None).shape == (B, S, V)


def check_fused_refuses_what_lies_between_projection_and_loss() -> None:
    def refused(text: str, **settings: Any) -> None:
        model = build_model()
        for name, value in settings.items():
            setattr(model.config, name, value)
        raises(MileError, f"cannot be combined with {text}", attach, model, MILE, None, True)
        assert "forward" not in model.output_layer.__dict__

    refused("muP", use_mup=True)
    refused("multi-token prediction", mtp_num_layers=1)
    refused("--config-logger-dir", config_logger_dir="/tmp")
    refused("--defer-embedding-wgrad-compute", defer_embedding_wgrad_compute=True)
    model = build_model()
    model.output_layer.bias = torch.nn.Parameter(torch.zeros(V))
    raises(MileError, "a bias in the output layer", attach, model, MILE, None, True)
    model = build_model()
    model.output_layer = type("Adapter", (ColumnParallelLinear,), {})(
        32, V, config=model.config, init_method=torch.nn.init.zeros_, bias=False
    )
    raises(
        MileError,
        ".Adapter (expected ColumnParallelLinear itself)",
        attach,
        model,
        MILE,
        None,
        True,
    )


def check_fused_refuses_an_output_layer_that_somebody_changed() -> None:
    def adapter(*args: Any, **kwargs: Any) -> Any:
        output, bias = ColumnParallelLinear.forward(model.output_layer, *args, **kwargs)
        return output * 2, bias

    for change, text in (
        (lambda layer: setattr(layer, "forward", adapter), "forward somebody has replaced"),
        (lambda layer: setattr(layer, "_forward_impl", adapter), "forward somebody has replaced"),
        (lambda layer: layer.register_forward_hook(lambda *_: None), "hooks on the output layer"),
        (lambda layer: setattr(layer, "disable_grad_reduce", True), "LoRA, experts"),
        (lambda layer: setattr(layer, "output_dtype", torch.float32), "--output-logit-dtype"),
    ):
        model = build_model()
        change(model.output_layer)
        raises(MileError, text, attach, model, MILE, None, True)
        assert METHOD not in model.__dict__  # nothing is left half done
        attach(model, MILE)
        uninstall()
        assert (
            text != "forward somebody has replaced" or adapter in vars(model.output_layer).values()
        )


def check_attach_refuses_a_vocabulary_that_is_not_the_models() -> None:
    for size in (0, V + 1):
        raises(MileError, f"vocab_size is {size}", attach, build_model(), MILE, size)


def check_install_leaves_attached_models_alone() -> None:
    model = build_model()
    attach(model, MILE, WORDS, True)
    install(ObjectiveConfig("ce"))
    assert installed_config(getattr(model, METHOD)) == MILE
    assert "forward" in model.output_layer.__dict__


def check_fused_refuses_a_changed_host() -> None:
    """A moved parameter, set up by hand: no release has it."""
    host = ColumnParallelLinear.forward
    ColumnParallelLinear.forward = lambda self, input_, weight=None: host(self, input_, weight)
    try:
        attach(build_model(), MILE)
        raises(MileCompatError, "runtime_gather_output", attach, build_model(), MILE, None, True)
    finally:
        ColumnParallelLinear.forward = host


def check_fused_step_that_reads_its_logits_is_stopped() -> None:
    def step(iterator: Any, model: Any) -> Any:
        return forward(model, None), functools.partial(host_loss, MASK)

    model = build_model()
    attach(model, MILE, fused_linear=True)
    text = "a training step read .transpose of its logits"
    raises(MileError, text, wrap_forward_step(step, MILE), None, model)


def check_masked_padding_is_left_out() -> None:
    """Loss, report and output weights' gradient against float64 of the real columns alone."""
    labels = batch()[1] % WORDS

    def step(iterator: Any, model: Any) -> Any:
        return forward(model, labels), functools.partial(host_loss, MASK)

    for fused in (False, True):
        model = build_model()
        hidden: list[torch.Tensor] = []
        logits = forward(model, None).detach()
        attach(model, MILE, vocab_size=WORDS, fused_linear=fused)
        model.decoder.final_layernorm.register_forward_hook(
            lambda _, args, out, hidden=hidden: hidden.append(out.detach().double())
        )
        output, loss_func = wrap_forward_step(step, MILE)(None, model)
        total, _, report = loss_func(output)
        total.backward()
        truth = helpers.oracle(logits[..., :WORDS], labels, MILE)
        alpha = MASK.sum() / (MASK * truth.weight).sum()
        assert helpers.error(total, (MASK * alpha * truth.loss).sum()) < 1e-6
        assert helpers.error(report["mile entropy"][0], (MASK * truth.entropy).sum()) < 1e-6
        upstream = alpha * MASK.unsqueeze(-1) * truth.grad
        gradient = torch.einsum("bsv,sbh->vh", upstream, hidden[0])
        found = model.output_layer.weight.grad
        assert helpers.error(found[:WORDS], gradient) < SAME
        assert torch.equal(found[WORDS:], torch.zeros_like(found[WORDS:]))


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
