"""Jobs that the objective cannot serve exactly, stopped at their start with the reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration import versions
from megatron_mile.integration.arguments import MASK_FLAG, Namespace
from megatron_mile.integration.checkpoint_folder import TRACKER
from megatron_mile.integration.host import METHOD, release
from megatron_mile.integration.models import installed_config, tp_group, unwrap

# Settings of Megatron under which the model's loss is not what is trained, with the reason.
_MODELOPT = "ModelOpt replaces model and loss"
REPLACED_LOSSES = {
    "overlap_moe_expert_parallel_comm": "its schedule runs the loss outside forward_step",
    "use_legacy_models": "legacy models compute their loss in a way of their own",
    "logits_load_dir": "distillation from cached logits replaces the loss",
    "logits_save_dir": "logit saving replaces the loss",
    # What `modelopt_args_enabled` of 0.12 to 0.14 looks at; later ones set the last in get_model.
    "export_kd_teacher_load": _MODELOPT,
    "export_quant_cfg": _MODELOPT,
    "export_real_quant_cfg": _MODELOPT,
    "export_num_medusa_heads": _MODELOPT,
    "export_num_eagle_layers": _MODELOPT,
    "modelopt_enabled": _MODELOPT,
}


# Losses that Megatron adds below the model, and multiplies by the tokens that it divides by.
LOSSES_BY_TOKENS = {
    "moe_aux_loss_coeff": "the router's auxiliary loss",
    "moe_z_loss_coeff": "the router's z-loss",
    "mtp_num_layers": "the loss of multi-token prediction",
    "dsa_indexer_loss_coeff": "the indexer's loss",
}


def refuse_settings(args: Namespace, config: ObjectiveConfig | None) -> None:
    """Stop a job whose settings the objective cannot serve exactly.

    Raises:
        MileError: With the flag and the reason.
    """
    refuse_unreadable_optimizer(args)
    if config is None:
        return
    refuse_unequal_microbatches(args, config.alpha_mode)
    if config.alpha_mode == "batch":
        refuse_batch_alpha(args)
    refuse_replaced_loss(args)


def refuse_replaced_loss(args: Namespace) -> None:
    """Stop where Megatron trains another loss than the model's; ask before and after building."""
    for name, reason in REPLACED_LOSSES.items():
        value = getattr(args, name, None)
        if value not in (None, False, 0, "None"):
            raise MileError(
                f"--{name.replace('_', '-')} {value} cannot be combined with --mile-objective: "
                f"{reason}; "
                "leave one of them out"
            )


def refuse_unreadable_optimizer(args: Namespace) -> None:
    """Stop before a resume that megatron-core itself cannot do.

    Without Transformer Engine and apex, `DistributedOptimizer.state_dict` (0.19.2,
    core/optimizer/distrib_optimizer.py) asserts that the inner optimizer has taken a step, and one
    that is about to be loaded has not.
    """
    from megatron.core.optimizer import distrib_optimizer

    reads_optimizer = args.load and not (args.no_load_optim or args.finetune)
    if not (args.use_distributed_optimizer and reads_optimizer):
        return
    found = os.path.isfile(os.path.join(args.load, TRACKER))
    if found and not distrib_optimizer.HAVE_APEX_OR_TE:
        raise MileError(
            f"cannot resume from {args.load} with the distributed optimizer: megatron-core needs "
            "Transformer Engine or apex to load its state; install one, or resume with "
            "--no-load-optim, or train without --use-distributed-optimizer"
        )


def refuse_unequal_microbatches(settings: Any, normalize: str) -> None:
    """Stop where a per-micro-batch all-reduce of alpha would hang or count other tokens.

    Args:
        settings: Megatron's args, or a model's config.
        normalize: `ObjectiveConfig.alpha_mode`.
    """
    if normalize not in ("global", "official"):
        return
    reason = None
    resized = [name for name in versions.UNEQUAL_MICROBATCHES if getattr(settings, name, False)]
    if resized:
        flag = "--" + resized[0].replace("_", "-")
        reason = f"{flag}: ranks may run different numbers of micro-batches"
    elif (getattr(settings, "gtp_weight_remat_size", 1) or 1) > 1:
        reason = "GTP weight rematerialisation: Megatron counts tokens over another group"
    if reason:
        raise MileError(
            f"--mile-normalize {normalize} cannot be combined with {reason}; use "
            "--mile-normalize local or none"
        )


def refuse_smoothed_padding(config: ObjectiveConfig, columns: int, words: int) -> None:
    """Stop where label smoothing would give a part of the target to padding columns.

    Args:
        config: The objective.
        columns: Of the vocabulary that the softmax counts.
        words: The tokenizer's size.
    """
    if config.label_smoothing and columns > words:
        raise MileError(
            f"--mile-label-smoothing {config.label_smoothing:g} would spread over {columns} "
            f"columns, of which {columns - words} are padding; add {MASK_FLAG}"
        )


def refuse_batch_alpha(settings: Any) -> None:
    """Stop where Megatron's division by the number of tokens cannot be that by the weights.

    Args:
        settings: Megatron's args, or a model's config.
    """
    asked = "--mile-normalize batch (normalize batch)"
    if not settings.calculate_per_token_loss:
        raise MileError(
            f"{asked} without --calculate-per-token-loss (calculate_per_token_loss), with which "
            "Megatron divides by the whole global batch; add it, or use --mile-normalize global"
        )
    for name, what in LOSSES_BY_TOKENS.items():
        value = getattr(settings, name, None)
        if any(value) if isinstance(value, (list, tuple)) else value:
            raise MileError(
                f"{asked} cannot be combined with --{name.replace('_', '-')} {value}: Megatron "
                f"scales {what} by the number of tokens, and batch divides by the weights; use "
                "--mile-normalize global, local or none"
            )
    if release() < versions.TOKENS_OVER_CP and (settings.context_parallel_size or 1) > 1:
        raise MileError(
            f"{asked} with context parallelism: this Megatron adds tokens up over the "
            "data-parallel ranks alone; use --mile-normalize global, or megatron-core "
            f"{'.'.join(map(str, versions.TOKENS_OVER_CP))} or later"
        )


def refuse_models(chunks: Sequence[Any]) -> None:
    """Stop if the built model would train with another loss than the objective.

    Raises:
        MileError: A model on the last pipeline stage bypasses the hook, or has gathered logits.
    """
    for module in map(unwrap, chunks):
        if not getattr(module, "post_process", True):
            continue
        name = type(module).__name__
        hooked = installed_config(getattr(module, METHOD, None)) is not None
        bases = {base.__name__ for base in type(module).__mro__}
        if not hooked or bases & set(versions.UNSUPPORTED_MODELS):
            raise MileError(
                f"objective not applied: {name} does not take its loss from "
                f"LanguageModule.{METHOD}; use a GPTModel or HybridModel, or --mile-objective none"
            )
        fusion = getattr(module.config, "cross_entropy_fusion_impl", None)
        if module.config.cross_entropy_loss_fusion and fusion == "linear":
            raise MileError(
                f"objective not applied: {name} computes projection and loss in one "
                "(--cross-entropy-fusion-impl linear); use native, and --mile-fused-linear for "
                "the same saving"
            )
        tp_size = tp_group(module).size()
        if tp_size > 1 and not getattr(module, "parallel_output", True):
            raise MileError(
                f"{name} gathers its logits (parallel_output=False) at TP {tp_size}; build it with "
                "parallel_output=True"
            )
