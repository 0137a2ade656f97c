"""Train the tests' usual tiny GPT by Megatron-Bridge, with the lines that docs/modes.md shows.

The flags of tests/support/training_runs.py are not parsed: what they say is said here in Bridge's
own words. Its last argument is the folder for TensorBoard.
"""

from __future__ import annotations

import functools
import os
import sys

import megatron.training  # noqa: F401  (all of Megatron, before there seem to be other packages)
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from support.stand_ins import stand_in_for

from megatron_mile import ObjectiveConfig, attach, wrap_forward_step
from megatron_mile.cpu_mode.device import _without_cuda
from megatron_mile.integration.job import skip_helper_build

skip_helper_build()
# Bridge imports these whatever it is to do. Transformer Engine needs a GPU, the resiliency
# extension is for clusters of them, and energon loads images and sound.
stand_in_for("transformer_engine", "nvidia_resiliency_ext", "megatron.energon")

from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec  # noqa: E402
from megatron.bridge.training import setup  # noqa: E402
from megatron.bridge.training.config import (  # noqa: E402
    CheckpointConfig,
    ConfigContainer,
    DistributedInitConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.gpt_step import forward_step  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402


def model() -> GPTModelProvider:
    """What MODEL of training_runs.py describes, with layers that need no Transformer Engine."""
    return GPTModelProvider(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        seq_length=64,
        vocab_size=256,
        transformer_layer_spec=local_layer_spec,
        tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]),
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        add_bias_linear=False,
        init_method_std=0.2,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        **dict.fromkeys(
            (
                "masked_softmax_fusion",
                "cross_entropy_loss_fusion",
                "gradient_accumulation_fusion",
                "bias_activation_fusion",
                "bias_dropout_fusion",
                "apply_rope_fusion",
                "persist_layer_norm",
            ),
            False,
        ),
    )


def settings(folder: str) -> ConfigContainer:
    """The rest of MODEL: four steps on Megatron's mock data."""
    return ConfigContainer(
        model=model(),
        train=TrainingConfig(train_iters=4, global_batch_size=4, micro_batch_size=2),
        validation=ValidationConfig(eval_interval=1000, eval_iters=0),
        optimizer=OptimizerConfig(
            optimizer="adam", lr=3e-3, min_lr=1e-4, weight_decay=0.1, clip_grad=1.0
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=1,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            weight_decay_incr_style="constant",
        ),
        ddp=DistributedDataParallelConfig(),
        dataset=MockGPTDatasetConfig(
            seq_length=64,
            random_seed=1234,
            split="969, 30, 1",
            dataloader_type="single",
            num_workers=0,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            skip_getting_attention_mask_from_dataset=False,
        ),
        logger=LoggerConfig(log_interval=1, tensorboard_dir=folder),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=250),
        checkpoint=CheckpointConfig(),
        rng=RNGConfig(seed=1234),
        dist=DistributedInitConfig(distributed_backend="gloo"),
    )


if __name__ == "__main__":
    setup.initialize_megatron = _without_cuda(setup.initialize_megatron)
    job = settings(sys.argv[-1])
    # Bridge draws weights on the GPU, from other numbers; the plain job draws them on the CPU.
    job.model.provide_distributed_model = functools.partial(
        job.model.provide_distributed_model, use_cpu_initialization=True
    )
    config = ObjectiveConfig("mile", gamma=3.0)
    job.model.register_pre_wrap_hook(lambda chunks: attach(chunks, config) or chunks)
    pretrain(job, forward_step_func=wrap_forward_step(forward_step, config))
