"""Hook a whole Megatron job: its flags, its forward step, its checkpoint check, its start block.

Everything is reached through module attributes that `megatron.training` looks up at call time, so
the user's script stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_mile.config import ObjectiveConfig
from megatron_mile.errors import MileError
from megatron_mile.integration import arguments, versions
from megatron_mile.integration.arguments import Namespace
from megatron_mile.integration.batch_alpha import BATCH, wrap_finalize_model_grads
from megatron_mile.integration.checkpoints import with_resume_check
from megatron_mile.integration.cost_files import digest, read_matrix
from megatron_mile.integration.emo_rows import check_matrix, fixed_rows
from megatron_mile.integration.forward import wrap_forward_step
from megatron_mile.integration.gamma import (
    has_schedule,
    schedule_lines,
    start_schedule,
    with_gamma,
)
from megatron_mile.integration.hook import BucketsOf, InputsOf, attach, install
from megatron_mile.integration.host import METHOD, replace, resolve
from megatron_mile.integration.models import device_of, unwrap
from megatron_mile.integration.refusals import (
    refuse_models,
    refuse_replaced_loss,
    refuse_settings,
    refuse_smoothed_padding,
)
from megatron_mile.integration.telemetry import alpha_scope, describe, start_block
from megatron_mile.integration.token_frequencies import (
    FrequencyTables,
    TokenFrequencies,
    check_vocabulary,
    read_frequencies,
)
from megatron_mile.linear import block_bytes, block_tokens
from megatron_mile.objective_file import SOURCES
from megatron_mile.ops import dispatch
from megatron_mile.run_record.record import with_record
from megatron_mile.schedule import GammaSchedule


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
    replace(versions.ADD_ARGUMENTS, _with_arguments)
    # Around Megatron's own function comes the record, and around that come our checks.
    replace(versions.SETUP, lambda host: _with_checks(config, list(notes), with_record(host)))
    watch_run()
    if config is not None:
        try:
            install(config)
        except ValueError as error:
            raise MileError(f"--mile flags: {error}") from error
        replace(
            versions.PRETRAIN, functools.partial(_with_forward_step, config, settings.mile_report)
        )
        if has_schedule(settings):
            replace(versions.TRAIN_STEP, with_gamma)
        if config.alpha_mode == BATCH:
            replace(versions.FINALIZE, lambda host: wrap_finalize_model_grads(host, config))


def watch_run() -> None:
    """Record what a run is, and compare a checkpoint's objective and data with it on resume."""
    replace(versions.SETUP, with_record)
    replace(versions.CHECK_CHECKPOINT, with_resume_check)


def skip_helper_build() -> None:
    """Skip the build of the dataset helpers where they are built already.

    The wheels hold the compiled helper but no Makefile, so that `compile_helpers`
    (megatron/core/datasets/utils.py) would end the process on every machine, with a GPU or without.
    """
    from megatron.core.datasets import utils

    with contextlib.suppress(ImportError):
        import megatron.core.datasets.helpers_cpp  # noqa: F401

        resolve(versions.COMPILE_HELPERS)
        utils.compile_helpers = lambda: None


def _with_arguments(host: Callable[..., Any]) -> Callable[..., Any]:
    def add_megatron_arguments(parser: Any) -> Any:
        parser = arguments.add_arguments(host(parser))
        for action in parser._actions:
            # 0.19.2 has a bare "10%" in a help text, and argparse dies of it on --help.
            action.help = re.sub(r"(?<!%)%(?![(%])", "%%", action.help) if action.help else None
        return parser

    return add_megatron_arguments


def _with_forward_step(
    config: ObjectiveConfig, report: str | None, host: Callable[..., Any]
) -> Callable[..., Any]:
    def pretrain(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(host).bind(*args, **kwargs)
        step = bound.arguments["forward_step_func"]
        bound.arguments["forward_step_func"] = wrap_forward_step(step, config, report)
        return host(*bound.args, **bound.kwargs)

    return pretrain


def _with_checks(
    config: ObjectiveConfig | None, notes: list[tuple[str, str]], host: Callable[..., Any]
) -> Callable[..., Any]:
    """Refuse before the model is built, look at the model once it is, then say what runs."""

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args, print_rank_0

        refuse_settings(get_args(), config)
        if source := SOURCES.get(get_args().mile_objective):
            get_args().mile_objective_sha256 = source.sha256  # stored with the checkpoint
        matrix = _read_cost(get_args())
        frequencies = _read_frequencies(get_args())
        built = host(*args, **kwargs)
        schedule = None
        if config is not None:
            refuse_replaced_loss(get_args())
            refuse_models(built[0])
            schedule = start_schedule(get_args(), config, device_of(built[0][-1]))
            _attach(built[0], config, get_args(), matrix, frequencies, schedule)
        lines = _objective_lines(get_args(), built[0][-1], config)
        print_rank_0(start_block([*lines, *schedule_lines(schedule), *notes]))
        return built

    return setup_model_and_optimizer


def _read_cost(args: Namespace) -> torch.Tensor | None:
    """Read EMO's fixed matrix, if there is one, and note what it is with the job's settings."""
    if args.mile_emo_cost == arguments.OUTPUT_LAYER:
        return None
    matrix = read_matrix(args.mile_emo_cost)
    args.mile_emo_cost_digest = digest(matrix)  # Megatron stores its args with the checkpoint
    return matrix


def _read_frequencies(args: Namespace) -> TokenFrequencies | None:
    """Read the token frequencies, if there are any, and note them as the matrix above."""
    if args.mile_token_frequency is None:
        return None
    frequencies = read_frequencies(args.mile_token_frequency)
    args.mile_token_frequency_digest = frequencies.digest
    return frequencies


def _attach(
    chunks: Sequence[Any],
    config: ObjectiveConfig,
    args: Namespace,
    matrix: torch.Tensor | None,
    frequencies: TokenFrequencies | None,
    schedule: GammaSchedule | None,
) -> None:
    """Set up what concerns the built models rather than their class."""
    from megatron.training import get_tokenizer

    smoothed = bool(config.label_smoothing)
    needs_size = args.mile_mask_padded_vocab or smoothed
    needs_size = needs_size or matrix is not None or frequencies is not None
    words: Any = get_tokenizer().vocab_size if needs_size else None
    vocab_size = words if args.mile_mask_padded_vocab else None
    for chunk in chunks:
        if smoothed and not vocab_size:
            refuse_smoothed_padding(config, unwrap(chunk).vocab_size, words)
        cost = None
        if matrix is not None:
            check_matrix(matrix, words, unwrap(chunk).vocab_size)
            if getattr(unwrap(chunk), "post_process", True):
                cost = fixed_rows(matrix, words, chunk)
        buckets: BucketsOf | None = None
        inputs: InputsOf | None = schedule.inputs if schedule else None
        if frequencies is not None:
            columns = unwrap(chunk).vocab_size
            check_vocabulary(frequencies, args.mile_token_frequency, words, columns)
            tables = FrequencyTables(frequencies, columns, device_of(chunk))
            buckets = tables.buckets
            if config.definition.inputs:
                inputs = _joined(tables.inputs, inputs)
        if (
            config.definition.needs_cost
            or vocab_size
            or args.mile_fused_linear
            or buckets
            or inputs
        ):
            attach(chunk, config, vocab_size, args.mile_fused_linear, cost, inputs, buckets)


def _joined(first: InputsOf, second: InputsOf | None) -> InputsOf:
    """Give the inputs of both, as of token frequencies and of a schedule."""
    return first if second is None else lambda labels: {**first(labels), **second(labels)}


def _objective_lines(
    args: Namespace, model: Any, config: ObjectiveConfig | None
) -> list[tuple[str, str]]:
    """Describe objective, backend with its reason, layout and patched symbols."""
    import megatron.core

    if config is None:
        return [("objective", "none: the host's own loss")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = args.padded_vocab_size or unwrap(model).vocab_size
    shard = columns // args.tensor_model_parallel_size
    padding = "left out in training" if args.mile_mask_padded_vocab else "counted as by the host"
    tokens = block_tokens(shard, args.params_dtype.itemsize, device)
    block = f"{tokens} tokens ({block_bytes(device) >> 20} MiB)"
    fused = f"with the loss, up to {block} at a time in training"
    return [
        ("objective", describe(config)),
        *_source_lines(config),
        ("alpha", alpha_scope(vars(args), config.alpha_mode)),
        *_cost_lines(args, config),
        *_frequency_lines(args),
        ("backend", dispatch.select(config.backend, device)[1]),
        ("projection", fused if args.mile_fused_linear else "the host's"),
        ("vocabulary", f"{columns} padded, {shard} on each TP rank; padding {padding}"),
        ("evaluation", "plain cross-entropy by the host"),
        (
            "patched",
            f"megatron.core {megatron.core.__version__.split('+')[0]}: LanguageModule.{METHOD}, "
            "pretrain, setup_model_and_optimizer, check_checkpoint_args"
            + ", finalize_model_grads" * (config.alpha_mode == BATCH)
            + ", train_step" * has_schedule(args),
        ),
    ]


def _source_lines(config: ObjectiveConfig) -> list[tuple[str, str]]:
    """Say where an objective of the user's own comes from."""
    source = SOURCES.get(config.objective)
    return [("source", f"{source.word}, sha256 {source.sha256[:12]}")] if source else []


def _cost_lines(args: Namespace, config: ObjectiveConfig) -> list[tuple[str, str]]:
    """Say where EMO's cost rows come from."""
    if not config.definition.needs_cost:
        return []
    if args.mile_emo_cost == arguments.OUTPUT_LAYER:
        return [("cost rows", "the output layer's, as they are in each step")]
    return [("cost rows", f"{args.mile_emo_cost}, sha256 {args.mile_emo_cost_digest[:12]}")]


def _frequency_lines(args: Namespace) -> list[tuple[str, str]]:
    """Say which token frequencies there are."""
    if args.mile_token_frequency is None:
        return []
    digest = args.mile_token_frequency_digest[:12]
    return [("frequencies", f"{args.mile_token_frequency}, sha256 {digest}")]
