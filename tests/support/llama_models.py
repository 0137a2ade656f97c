"""Small models and tokenizers of LLaMA's kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools import convert_checkpoint
from tools.checkpoint.megatron_model import checkpoint_folder
from tools.checkpoint.torch_dist import COMMON, Checkpoint, write_checkpoint

# How LLaMA's SentencePiece model was trained.
SETTINGS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}


def train_sentencepiece(
    texts: Sequence[str], folder: Path, vocab_size: int = 600, **changes: Any
) -> Path:
    """Train tokenizer.model in the folder with `SETTINGS`, but for the changes."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts[:300] for line in text.splitlines()]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        minloglevel=2,
        **{**SETTINGS, **changes},
    )
    return folder / "tokenizer.model"


def save_llama(folder: Path, vocab_size: int) -> None:
    """Write an untrained model of two layers as a Hugging Face folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # far from uniform, so that choices differ
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def convert(to: str, load: Path, output: Path, *flags: str) -> Path:
    """Run tools/convert_checkpoint.py; return the output."""
    convert_checkpoint.main(["--to", to, "--load", str(load), "--output", str(output), *flags])
    return output


def with_args(checkpoint: Path, output: Path, **changes: Any) -> Path:
    """Write a converted checkpoint again, as of a training with other arguments."""
    before = Checkpoint(checkpoint_folder(checkpoint))
    common = before.common()
    vars(common["args"]).update(changes)
    sizes = {key: tuple(entry.size) for key, entry in before.tensors.items()}
    write_checkpoint(output, sizes, torch.float32, before.tensor, {COMMON: common})
    return output
