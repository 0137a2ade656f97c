"""A Megatron training script as users have them, for every version that has `megatron.training`.

It knows nothing of megatron_mile: GPTModel on drawn text, a loss function with the report of
0.13 and later. The flags are Megatron's own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.training import arguments, get_args, pretrain


class DrawnText(torch.utils.data.Dataset):
    """Random words, each repeated once, so that half of them can be learnt; half a mask."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        args = get_args()
        random = torch.Generator().manual_seed(index)
        words = torch.randint(args.vocab_size, (args.seq_length,), generator=random)
        text = words.repeat_interleave(2)[: args.seq_length + 1]
        counts = torch.arange(args.seq_length) <= index % args.seq_length
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": counts.float()}


def datasets(samples: list[int], vp_stage: int | None = None) -> list[Any]:
    """The sets to train, validate and test; with --dataloader-type external, their batches."""
    args, drawn = get_args(), [DrawnText(count) for count in samples]
    if args.dataloader_type != "external":
        return drawn
    return [iter(torch.utils.data.DataLoader(text, args.micro_batch_size)) for text in drawn]


datasets.is_distributed = True


def model_provider(
    pre_process: bool = True, post_process: bool = True, config: Any = None, **others: Any
) -> GPTModel:
    args = get_args()
    return GPTModel(
        config or arguments.core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(normalization=args.normalization),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        **others,
    )


def loss_func(mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    loss, count = (output.float() * mask).sum(), mask.sum()
    report = torch.stack([loss.detach(), count])
    return loss, count.int(), {"lm loss": report}


def forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Any]:
    batch = {name: values.cuda() for name, values in next(iterator).items()}
    length = batch["tokens"].size(1)
    positions = torch.arange(length, device="cuda").expand_as(batch["tokens"])
    later = torch.ones(length, length, device="cuda").triu(1).bool()[None, None]
    output = model(batch["tokens"], positions, later, labels=batch["labels"])
    return output, functools.partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    job: dict[str, Any] = {
        "train_valid_test_dataset_provider": datasets,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
    }
    if "cfg_container" in inspect.signature(pretrain).parameters:  # from 0.18
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        job["cfg_container"] = pretrain_cfg_container_from_args(arguments.parse_and_validate_args())
    pretrain(**job)
