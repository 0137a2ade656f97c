r"""Pretrain a GPT on `megatron.training` from PyPI, with MiLe Loss or any other objective.

The wheels of megatron-core hold the training loop but no entry point; this is one. It takes every
flag of Megatron, and the --mile flags:

    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --mile-objective mile \
        --tensor-model-parallel-size 2 --mock-data ... [--mile-cpu]
    python examples/pretrain_gpt.py --help

With --hybrid-layer-pattern, such as "*-*-" for two layers of attention and two MLPs, the model is
Megatron's HybridModel instead of its GPTModel. With --sft, --data-path names a file of JSON lines
with conversations, and the loss is that of the tokens that Megatron's SFT dataset leaves unmasked.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A clone that is not installed is found too; CPU mode must come before any import of megatron.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_mile.cpu_mode import WITHOUT_APEX, WITHOUT_TE, missing_flags
    from megatron_mile.launch import one_line_errors, prepare_script

    prepare_script()
    arguments = sys.argv[1:]
    if not any(word.startswith("--transformer-impl") for word in arguments) and (
        importlib.util.find_spec("transformer_engine") is None
    ):
        has_apex = importlib.util.find_spec("apex") is not None
        added = missing_flags(arguments, WITHOUT_TE + (() if has_apex else WITHOUT_APEX))
        print("> no Transformer Engine here, flags added:", *added)
        arguments += added
    sys.argv[1:] = arguments

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_mile.errors import MileError
from megatron_mile.integration.job import skip_helper_build

BATCH = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
# Where the conversations begin that --sft packs into a sequence, and the length of the longest.
PACKED = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None) -> list[Any]:
    """Return this rank's (tokens, labels, loss_mask, position_ids, attention_mask), each [b, s/cp].

    And the packing of the sequences, None without --sft; the attention mask is [b, 1, s, s]. TP
    rank 0 reads, the others receive; middle pipeline stages need nothing but the packing.
    """
    args = get_args()
    if not (args.sft or is_first_or_last_pipeline_stage(vp_stage)):
        return [None] * (len(BATCH) + 1)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        names = (*BATCH, *PACKED)
        batch = {name: sample[name].cuda() if name in sample else None for name in names}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=args.sft,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=args.mtp_num_layers is not None,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    packing = keep_apart(batch) if args.sft else None
    if is_first_or_last_pipeline_stage(vp_stage):
        batch = get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )
    return [*(batch[name] for name in BATCH), packing]


def keep_apart(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Let no token of a packed sequence see another conversation than its own.

    Transformer Engine's attention takes the batch as one sequence, and the bounds in it, which are
    returned; Megatron's own takes a mask, which is put into the batch.
    """
    args = get_args()
    if args.transformer_impl == "local":
        batch["attention_mask"] = conversation_mask(batch["cu_seqlens"], args.seq_length)
        return None
    flatten_batch_for_packed_sequences(batch)
    bounds, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].max())
    update_seqlen_stats_from_cu_seqlens(bounds)  # for the throughput in the log
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=args.seq_length,
    )


def conversation_mask(bounds: torch.Tensor, length: int) -> torch.Tensor:
    """Mask of causal attention within each conversation, [b, 1, s, s], True for what is not seen.

    Args:
        bounds: where conversations begin and end, [b, n], ascending.
        length: s, in tokens.
    """
    positions = torch.arange(length, device=bounds.device)
    conversation = torch.searchsorted(bounds, positions.repeat(len(bounds), 1), right=True)
    others = conversation[:, None, :, None] != conversation[:, None, None, :]
    return others | (positions > positions[:, None])


def loss_func(
    loss_mask: torch.Tensor, output_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the loss per token [b, s] over the mask [b, s], as `megatron.training` wants it.

    Returns:
        (loss sum, number of tokens as int32, {"lm loss": [sum, count]}), all of this rank.
    """
    mask = loss_mask.view(-1).float()
    loss = (output_tensor.view(-1).float() * mask).sum()
    if get_args().check_for_nan_in_loss_and_grad:
        for bad, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=bad,
                message=f"{name} in the loss of this rank",
                tolerance=0.0,
                fatal=True,
            )
    count = mask.sum().to(torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.to(loss.dtype)])}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Any]:
    """Run the model on one micro-batch; return its loss per token and the function that sums it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    tokens, labels, loss_mask, position_ids, attention_mask, packing = get_batch(
        data_iterator, vp_stage
    )
    timers("batch-generator").stop()
    output = model(
        tokens,
        position_ids,
        attention_mask,
        labels=labels,
        loss_mask=loss_mask,
        packed_seq_params=packing,
    )
    return output, functools.partial(loss_func, loss_mask)


class CheckedGPTDataset(GPTDataset):
    """GPTDataset that refuses data which upstream would loop on or silently train on."""

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: Any,
        num_samples: int | None,
        index_split: Any,
        config: GPTDatasetConfig,
    ) -> None:
        if not indexed_dataset.sequence_lengths[indexed_indices].sum():
            raise MileError(
                f"{dataset_path}: --split {config.split} leaves no tokens for the "
                f"{index_split.name} set ({len(indexed_dataset)} documents in all); use another "
                "--split, or more data"
            )
        self._check_ids(indexed_dataset, dataset_path, indexed_indices, config)
        super().__init__(
            indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )

    @staticmethod
    def _check_ids(dataset: Any, path: str | None, indices: Any, config: GPTDatasetConfig) -> None:
        """Compare the ids of some documents with the tokenizer.

        An id outside the padded vocabulary that is met later makes the loss NaN.
        """
        largest = max(int(dataset[int(index)].max(initial=0)) for index in indices[:1000])
        if largest >= config.tokenizer.vocab_size:
            raise MileError(
                f"{path}: token id {largest} is outside the tokenizer's vocabulary of "
                f"{config.tokenizer.vocab_size}; give the tokenizer that the data was made with"
            )


def dataset_config() -> GPTDatasetConfig:
    """Collect what Megatron's GPT datasets need from the command line."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    for prefixes, _ in filter(None, blend_per_split or [blend]):
        check_files(prefixes)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        context_parallel_size=args.context_parallel_size,
    )


def check_files(names: list[str]) -> None:
    """Refuse local data that is not there: pairs by prefix, or with --sft files or patterns.

    Raises:
        MileError: With the first file that is missing.
    """
    ends = [""] if get_args().sft else [".bin", ".idx"]
    for path in (name + end for name in names for end in ends if "://" not in name):
        if not (os.path.isfile(path) or glob.glob(path)):
            raise MileError(f"{path}: no such file; check --data-path")


def builds_data(vp_stage: int | None = None) -> bool:
    """Whether this rank reads data: TP rank 0 of the first and last pipeline stage; --sft, of each.

    Attention needs to know the conversations in a sequence.
    """
    needed = get_args().sft or is_first_or_last_pipeline_stage(vp_stage)
    return needed and mpu.get_tensor_model_parallel_rank() == 0


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the train, validation and test datasets with the given numbers of samples."""
    args = get_args()
    kind = SFTDataset if args.sft else MockGPTDataset if args.mock_data else CheckedGPTDataset
    builder = BlendedMegatronDatasetBuilder(
        kind, samples, functools.partial(builds_data, vp_stage=vp_stage), dataset_config()
    )
    train, valid, test = builder.build()
    return train, valid, test


# Megatron reads this attribute: every rank calls the provider, not rank 0 alone.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def main() -> None:
    """Parse Megatron's flags and train."""
    skip_helper_build()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    for name in ("fim_data", "hybrid_context_parallel", "dataloader_inter_document_masking"):
        if getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise MileError(f"{flag} is not for this script; use Megatron-LM's own pretrain_gpt.py")
    if args.sft:
        if args.context_parallel_size > 1 and args.transformer_impl == "local":
            raise MileError(
                f"--sft with --context-parallel-size {args.context_parallel_size} needs "
                "Transformer Engine; install it, or use 1"
            )
        args.create_attention_mask_in_dataloader = False  # conversations have masks of their own
    model_config = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    config = pretrain_cfg_container_from_args(args, model_config(args))
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    with one_line_errors():
        main()
