"""Checks of patching and refusing on a real GPTModel, run by test_hook.py."""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from support.hook_model import (
    HOST,
    MILE,
    B,
    S,
    Step,
    V,
    batch,
    build_model,
    forward_step,
    raises,
    run_checks,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from megatron_mile import (
    GammaSchedule,
    ObjectiveConfig,
    attach,
    install,
    uninstall,
    wrap_finalize_model_grads,
    wrap_forward_step,
)
from megatron_mile.errors import MileCompatError, MileError
from megatron_mile.integration import refusals
from megatron_mile.integration.host import METHOD
from megatron_mile.integration.models import installed_config
from megatron_mile.integration.window import TrainedLoss
from megatron_mile.loss import TokenLoss

RANKS = 1
# Spelled out, so that one that goes missing is missed.
REPLACED_LOSSES = (
    "overlap_moe_expert_parallel_comm",
    "use_legacy_models",
    "logits_load_dir",
    "logits_save_dir",
    "export_kd_teacher_load",
    "export_quant_cfg",
    "export_real_quant_cfg",
    "export_num_medusa_heads",
    "export_num_eagle_layers",
    "modelopt_enabled",
)


def check_install_twice_replaces_the_settings() -> None:
    install(ObjectiveConfig("ce"))
    install(MILE)
    hook = getattr(LanguageModule, METHOD)
    assert installed_config(hook) == MILE
    assert hook.__wrapped__ is HOST


def check_uninstall_restores_the_function() -> None:
    install(MILE)
    uninstall()
    uninstall()
    assert LanguageModule.__dict__[METHOD] is HOST


def check_install_refuses_an_unknown_host() -> None:
    GPTModel.compute_language_model_loss = lambda self, labels, logits: labels
    try:
        raises(MileCompatError, "GPTModel without a compute_language_model_loss", install, MILE)
    finally:
        del GPTModel.compute_language_model_loss


def check_attach_patches_one_instance() -> None:
    model, other = build_model(), build_model()
    attach(model, MILE)
    attach(model, MILE)
    assert getattr(model, METHOD).__wrapped__ is HOST
    assert LanguageModule.__dict__[METHOD] is HOST
    assert installed_config(getattr(other, METHOD)) is None
    uninstall()
    assert getattr(model, METHOD).__func__ is HOST


def check_attach_over_install_calls_the_host() -> None:
    install(ObjectiveConfig("ce"))
    model = build_model()
    attach(model, MILE)
    assert getattr(model, METHOD).__wrapped__ is HOST
    assert installed_config(getattr(model, METHOD)) == MILE


def check_attach_unwraps_and_refuses_other_models() -> None:
    wrapper, model = torch.nn.Module(), build_model()
    wrapper.module = model
    attach([wrapper], MILE)
    assert installed_config(getattr(model, METHOD)) == MILE
    raises(MileError, "Linear has no method", attach, torch.nn.Linear(2, 2), MILE)


def check_attach_refuses_a_loss_that_it_would_drop() -> None:
    class OwnLoss(GPTModel):
        def compute_language_model_loss(self, labels: torch.Tensor, logits: Any) -> Any:
            return super().compute_language_model_loss(labels, logits)

    model, other = build_model(), build_model()
    model.__class__ = OwnLoss
    raises(MileError, f"OwnLoss computes its loss in a {METHOD} of its own", attach, model, MILE)
    setattr(other, METHOD, lambda labels, logits: logits)  # as ModelOpt does
    raises(MileError, "GPTModel computes its loss", attach, other, MILE)


def check_hook_refuses_logits_that_do_not_fit() -> None:
    model, labels = build_model(), batch()[1]
    install(MILE)
    method = getattr(model, METHOD)
    for text, shape in (
        (f"padded vocabulary of {V}", (S, B, V // 2)),
        ("expected [s, b, V/tp]", (B, S, V)),
    ):
        raises(MileError, text, method, labels, torch.zeros(shape, requires_grad=True))


def check_wrap_forward_step_is_idempotent() -> None:
    once = wrap_forward_step(forward_step, MILE)
    assert wrap_forward_step(once, MILE) is once
    other = wrap_forward_step(once, ObjectiveConfig("mile", gamma=3.0))
    assert other.__wrapped__ is forward_step


def check_wrap_forward_step_finds_the_model_by_its_name() -> None:
    class Trainer:
        def forward_step(self, data_iterator: object, model: object) -> Step:
            return forward_step(data_iterator, model)

    def bridge_step(state: object, data_iterator: object, model: object) -> Step:
        return forward_step(data_iterator, model)

    def unnamed_step(state: object, data_iterator: object, gpt: object) -> Step:
        return forward_step(data_iterator, gpt)

    def any_step(*args: object, **kwargs: object) -> Step:
        return forward_step(*args[-2:], **kwargs)

    install(MILE)
    model = build_model()
    output, loss_func = wrap_forward_step(forward_step, MILE)(None, model)
    expected = loss_func(output)[0]
    Trainer.forward_step = wrap_forward_step(Trainer.forward_step, MILE)
    for step, given in (
        (functools.partial(wrap_forward_step(bridge_step, MILE), None), (None, model)),
        (Trainer().forward_step, (None, model)),
        (functools.partial(wrap_forward_step(forward_step, MILE), None), ()),
        (wrap_forward_step(unnamed_step, MILE), (None, None, model)),
        (wrap_forward_step(any_step, MILE), (None, None, model)),
        (functools.partial(wrap_forward_step(any_step, MILE), None), ()),
        (wrap_forward_step(functools.partial(forward_step, model=model), MILE), (None,)),
    ):
        output, loss_func = step(*given) if given else step(model=model)
        assert torch.equal(loss_func(output)[0], expected)
    nobody = wrap_forward_step(lambda *args: forward_step(None, model), MILE)
    raises(MileError, "forward_step(*args) was called without a model", nobody, None)


def check_alpha_over_ranks_needs_equal_micro_batches() -> None:
    """Without the launcher, which asks the flags, the built model is asked."""
    for name in ("hybrid_context_parallel", "dynamic_context_parallel", "gtp_weight_remat_size"):
        for objective, normalize in (("mile", "global"), ("mile", "local"), ("ce", "global")):
            config = ObjectiveConfig(objective, normalize=normalize)
            model = build_model()
            setattr(model.config, name, 2)
            attach(model, config)
            output, loss_func = wrap_forward_step(forward_step, config)(None, model)
            if (objective, normalize) == ("mile", "global"):
                raises(MileError, "normalize global cannot be combined", loss_func, output)
            else:
                loss_func(output)


def check_settings_of_hook_and_forward_step_must_agree() -> None:
    install(MILE)
    step = wrap_forward_step(forward_step, ObjectiveConfig("mile", gamma=3.0))
    output, loss_func = step(None, build_model())
    raises(MileError, "give both the same", loss_func, output)


def check_refuse_settings_names_the_flag() -> None:
    calm = {"load": None, "use_distributed_optimizer": False}
    refusals.refuse_settings(Namespace(**calm), MILE)
    unused = {"export_real_quant_cfg": "None", "export_num_medusa_heads": 0}  # their defaults
    refusals.refuse_settings(Namespace(**calm, **unused), MILE)
    for name in REPLACED_LOSSES:
        asked = Namespace(**calm, **{name: True})
        flag = "--" + name.replace("_", "-")
        raises(MileError, flag, refusals.refuse_settings, asked, MILE)
        refusals.refuse_settings(asked, None)
    for name in ("hybrid", "dynamic"):  # the development branch's name for it
        parallel = Namespace(**calm, **{f"{name}_context_parallel": True})
        flag = f"--{name}-context-parallel: ranks may"
        raises(MileError, flag, refusals.refuse_settings, parallel, MILE)
    remat = Namespace(**calm, gtp_weight_remat_size=2)
    raises(MileError, "--mile-normalize local", refusals.refuse_settings, remat, MILE)
    refusals.refuse_settings(remat, ObjectiveConfig("mile", normalize="local"))
    refusals.refuse_settings(remat, ObjectiveConfig("emo"))


def check_refuse_models_that_keep_their_loss() -> None:
    model = build_model()
    raises(MileError, "GPTModel does not take its loss", refusals.refuse_models, [model])
    attach(model, MILE)
    refusals.refuse_models([model])
    # A setting of the development branch, which the model reads: no release has the path.
    model.config.cross_entropy_loss_fusion = True
    model.config.cross_entropy_fusion_impl = "linear"
    raises(MileError, "use native", refusals.refuse_models, [model])


def check_refuse_bert_even_if_it_inherits_the_hook() -> None:
    install(MILE)
    bert = type("BertModel", (GPTModel,), {})
    model = build_model()
    model.__class__ = bert
    raises(MileError, "objective not applied: BertModel", refusals.refuse_models, [model])


def check_later_steps_never_wait_for_a_value() -> None:
    """As full-iteration CUDA graphs need it: a tensor without values raises where one is read."""
    for normalize in ("global", "batch"):
        # The blocks of the CPU's look at values.
        config = ObjectiveConfig("mile", backend="torch", normalize=normalize)
        later_step(config, GammaSchedule(config, 9) if normalize == "global" else None)
    through = ObjectiveConfig("mile", backend="torch", entropy_grad=True)
    later_step(through, GammaSchedule(through, 9))


def later_step(config: ObjectiveConfig, schedule: GammaSchedule | None) -> None:
    """Run the hook and the loss function of a second step, and its end, without values."""
    install(config)
    step, model = wrap_forward_step(forward_step, config), build_model()
    model.config.calculate_per_token_loss = True
    gamma: dict[str, torch.Tensor] = {}
    if schedule:
        gamma.update(schedule.inputs())
        attach(model, config, inputs=lambda labels: gamma)
    scaled = []
    own = {"scale_gradients": lambda self, scaling: scaled.append(scaling)}
    model.__class__ = type("Wrapped", (type(model),), own)

    def finalize(model: Any, num_tokens: torch.Tensor) -> None:
        model[0].scale_gradients(1.0 / torch.clamp(num_tokens, min=1))

    model.config.finalize_model_grads_func = wrap_finalize_model_grads(finalize, config)
    output, loss_func = step(None, model)
    loss_func(output)  # the first step looks for tokens without a target
    model.config.finalize_model_grads_func([model], torch.tensor(15))
    output, loss_func = step(None, model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if schedule:
            schedule.gamma = gamma["gamma"] = mode.from_tensor(schedule.gamma)
            schedule.update(3)
        logits = mode.from_tensor(torch.zeros(S, B, V, requires_grad=True))
        loss = getattr(model, METHOD)(mode.from_tensor(batch()[1]), logits * 1)
        assert isinstance(loss, FakeTensor)
        assert not schedule or loss_func.args[1].gamma is not None
        window, fake = loss_func.args[1], mode.from_tensor(output)
        stats = TokenLoss(*map(mode.from_tensor, window.trained.stats[:5]))
        window.trained = TrainedLoss(fake, stats, config)
        total, tokens, report = loss_func(fake)
        model.config.finalize_model_grads_func([model], tokens)
    assert [type(scaling) for scaling in scaled] == [torch.Tensor, FakeTensor]
    assert isinstance(total, FakeTensor)
    assert isinstance(report["mile loss"], FakeTensor)
    assert ("mile gamma" in report) == bool(schedule)


if __name__ == "__main__":
    run_checks(globals(), sys.argv[-1])
