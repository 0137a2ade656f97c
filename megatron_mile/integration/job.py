"""Hook a whole Megatron job: its flags, its forward step, its checkpoint check, its start block.

Everything is reached through module attributes that `megatron.training` looks up at call time, so
the user's script stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.integration import arguments, versions
from megatron_mile.integration.arguments import Namespace
from megatron_mile.integration.errors import MileError
from megatron_mile.integration.install import METHOD, install, installed_config, resolve
from megatron_mile.integration.loss_func import unwrap, wrap_forward_step
from megatron_mile.integration.telemetry import describe, start_block
from megatron_mile.ops import dispatch


def hook_job(settings: Namespace, notes: Sequence[tuple[str, str]]) -> None:
    """Prepare this process for a Megatron training script.

    Args:
        settings: What `arguments.parse` read from the command line.
        notes: Lines for the start block, about CPU mode.

    Raises:
        MileCompatError: Megatron is not as expected.
    """
    config = arguments.config_from_namespace(settings)
    skip_helper_build()
    _replace(versions.ADD_ARGUMENTS, _with_arguments)
    _replace(versions.SETUP, functools.partial(_with_checks, config, list(notes)))
    watch_resume()
    if config is not None:
        try:
            install(config)
        except ValueError as error:
            raise MileError(f"--mile flags: {error}") from error
        _replace(versions.PRETRAIN, functools.partial(_with_forward_step, config))


def watch_resume() -> None:
    """Compare the objective of a checkpoint with the job's when one is loaded."""
    _replace(versions.CHECK_CHECKPOINT, _with_objective_check)


def skip_helper_build() -> None:
    """Skip the build of the dataset helpers where they are built already.

    The wheels hold the compiled helper but no Makefile, so that `compile_helpers`
    (megatron/core/datasets/utils.py) would end the process on every machine, with a GPU or without.
    """
    from megatron.core.datasets import utils

    with contextlib.suppress(ImportError):
        import megatron.core.datasets.helpers_cpp  # noqa: F401

        utils.compile_helpers = lambda: None


def _replace(symbol: versions.Symbol, wrapper: Callable[[Any], Any]) -> None:
    """Wrap a function of Megatron wherever `megatron.training` has bound it."""
    host = resolve(symbol)
    if getattr(host, "__megatron_mile_job__", False):
        return
    wrapped: Any = functools.wraps(host)(wrapper(host))
    wrapped.__megatron_mile_job__ = True
    for module in (symbol.module, "megatron.training", "megatron.training.training"):
        module_object = importlib.import_module(module)
        if getattr(module_object, symbol.name, None) is host:
            setattr(module_object, symbol.name, wrapped)


def _with_arguments(host: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: Any) -> Any:
        parser = arguments.add_arguments(host(parser))
        for action in parser._actions:
            # 0.19.2 has a bare "10%" in a help text, and argparse dies of it on --help.
            action.help = re.sub(r"(?<!%)%(?![(%])", "%%", action.help) if action.help else None
        return parser

    return add_megatron_arguments


def _with_forward_step(config: ObjectiveConfig, host: Callable[..., Any]) -> Callable[..., Any]:
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(host).bind(*args, **kwargs)
        step = bound.arguments["forward_step_func"]
        bound.arguments["forward_step_func"] = wrap_forward_step(step, config)
        return host(*bound.args, **bound.kwargs)

    return pretrain


def _with_checks(
    config: ObjectiveConfig | None, notes: list[tuple[str, str]], host: Callable[..., Any]
) -> Callable[..., Any]:
    """Refuse before the model is built, look at the model once it is, then say what runs."""

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, print_rank_0

        refuse_settings(get_args(), config)
        built = host(*args, **kwargs)
        if config is not None:
            refuse_models(built[0])
        print_rank_0(start_block([*_objective_lines(get_args(), config), *notes]))
        return built

    return setup_model_and_optimizer


def _objective_lines(args: Namespace, config: ObjectiveConfig | None) -> list[tuple[str, str]]:
    """Describe objective, backend with its reason, layout and patched symbols."""
    import megatron.core

    if config is None:
        return [("objective", "none: the host's own loss")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shard = args.padded_vocab_size // args.tensor_model_parallel_size
    return [
        ("objective", describe(config)),
        ("backend", dispatch.select(config.backend, device)[1]),
        ("vocabulary", f"{args.padded_vocab_size} padded, {shard} on each TP rank"),
        ("evaluation", "plain cross-entropy by the host"),
        (
            "patched",
            f"megatron.core {megatron.core.__version__.split('+')[0]}: LanguageModule.{METHOD}, "
            "pretrain, setup_model_and_optimizer, check_checkpoint_args",
        ),
    ]


def refuse_settings(args: Namespace, config: ObjectiveConfig | None) -> None:
    """Stop a job whose settings the objective cannot serve exactly.

    Raises:
        MileError: With the flag and the reason.
    """
    refuse_unreadable_optimizer(args)
    if config is None:
        return
    refuse_unequal_microbatches(args, config)
    for name, reason in (
        ("overlap_moe_expert_parallel_comm", "its schedule runs the loss outside forward_step"),
        ("logits_load_dir", "distillation from cached logits replaces the loss"),
        ("logits_save_dir", "logit saving replaces the loss"),
        ("modelopt_enabled", "ModelOpt replaces model and loss"),
    ):
        if getattr(args, name, None):
            raise MileError(f"{name} cannot be combined with --mile-objective: {reason}")


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
    found = os.path.isfile(os.path.join(args.load, "latest_checkpointed_iteration.txt"))
    if found and not distrib_optimizer.HAVE_APEX_OR_TE:
        raise MileError(
            f"cannot resume from {args.load} with the distributed optimizer: megatron-core needs "
            "Transformer Engine or apex to load its state; install one, or resume with "
            "--no-load-optim, or train without --use-distributed-optimizer"
        )


def refuse_unequal_microbatches(args: Namespace, config: ObjectiveConfig) -> None:
    """Stop where a per-micro-batch all-reduce of alpha would hang or count other tokens."""
    if config.normalize not in ("global", "official"):
        return
    reason = None
    if getattr(args, "hybrid_context_parallel", False):
        reason = "--hybrid-context-parallel: ranks may run different numbers of micro-batches"
    elif (getattr(args, "gtp_weight_remat_size", 1) or 1) > 1:
        reason = "GTP weight rematerialisation: Megatron counts tokens over another group"
    if reason:
        raise MileError(
            f"--mile-normalize {config.normalize} cannot be combined with {reason}; use "
            "--mile-normalize local or none"
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
        if module.pg_collection.tp.size() > 1 and not getattr(module, "parallel_output", True):
            raise MileError(
                f"{name} gathers its logits (parallel_output=False) at TP "
                f"{module.pg_collection.tp.size()}; build it with parallel_output=True"
            )


def _with_objective_check(host: Callable[..., Any]) -> Callable[..., Any]:
    def check_checkpoint_args(checkpoint_args: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        current = vars(get_args())
        changes = arguments.changed_settings(vars(checkpoint_args), current)
        allowed = current.get("mile_allow_change", False)
        if changes and not allowed:
            raise MileError(
                f"the checkpoint was trained with another objective: {'; '.join(changes)}; "
                "resume with the same --mile flags, or add --mile-allow-change"
            )
        return host(checkpoint_args, *args, **kwargs)

    return check_checkpoint_args
