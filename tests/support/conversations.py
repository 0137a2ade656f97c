"""Conversations for Megatron's --sft, and a tokenizer for its default prompt format."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch

WORDS = [f"w{index}" for index in range(200)]
# Of the format nemotron-h-aligned: the heads of turns, roles, padding.
SPECIAL = ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_233>", "<unk>", "</s>"]
ROLES = ["System", "User", "Assistant"]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *ROLES, *WORDS])}


def write_tokenizer(folder: Path) -> None:
    """Write a Hugging Face folder: one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[:3],
    ).save_pretrained(folder)


def write_conversations(path: Path, lines: int, seed: int = 0) -> None:
    """Write one to three conversations a line, of 11 to 21 tokens each.

    The assistant repeats what it was asked.
    """
    draw = random.Random(seed)

    def conversation() -> list[dict[str, str]]:
        words = " ".join(draw.choices(WORDS, k=draw.randint(2, 7)))
        said = {"system": draw.choice(WORDS), "user": words, "assistant": words}
        return [{"role": role, "content": text} for role, text in said.items()]

    with path.open("w") as file:
        for _ in range(lines):
            pack = [turn for _ in range(draw.randint(1, 3)) for turn in conversation()]
            print(json.dumps({"messages": pack}), file=file)


def split(batch: dict[str, torch.Tensor], padding: int) -> Iterator[torch.Tensor]:
    """Yield the tokens of each conversation of a packed batch, without the padding behind them."""
    for tokens in batch["tokens"]:
        words = tokens[tokens != padding]
        starts = (words == VOCABULARY["<SPECIAL_10>"]).nonzero().flatten().tolist()
        yield from words.tensor_split(starts[1:])
