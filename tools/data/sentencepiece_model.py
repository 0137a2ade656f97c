"""SentencePiece's BPE as LLaMA has it: which models are that, and their twins for transformers.

transformers' own LlamaTokenizer, given the .model file, leaves out the space that SentencePiece
puts before a text where the text begins with one; and takes `</s>` within a text for the end token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tools.common.cli import ToolError
from tools.common.files import json_text

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
# Beside the entries of the vocabulary, in the texts on which two tokenizers are compared.
_ODD = (" ", "  ", "\n", "\n\n", "\t", "\0", "e\u0301", "語", SPACE_MARK, "</s>")
_TEXTS = 300


def plain_bpe(library: Any) -> Any:
    """Parse the model of Megatron's SentencePieceTokenizer, if BPE's merges alone make the ids.

    Args:
        library: the tokenizer's `_tokenizer`.

    Returns:
        Its ModelProto; None where it normalizes, knows unknown characters, or is another kind.

    Raises:
        ImportError: protobuf is missing, which the sentencepiece package does not require.
    """
    formats: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    model = formats.ModelProto()
    model.ParseFromString(library.tokenizer.serialized_model_proto())
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    plain = (
        not library.legacy
        and trainer.model_type == formats.TrainerSpec.BPE
        and trainer.byte_fallback
        and normalizer.escape_whitespaces
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and not trainer.treat_whitespace_as_suffix
        and all(entry.type not in (entry.USER_DEFINED, entry.UNUSED) for entry in model.pieces)
    )
    return model if plain else None


def entries(model: Any) -> list[str]:
    """Return what BPE joins characters into: all but control symbols, bytes and the unknown one."""
    return [entry.piece for entry in model.pieces if entry.type == entry.NORMAL]


def write_for_transformers(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, from which AutoTokenizer gives the same ids.

    Args:
        tokenizer: from `build_tokenizer`, of a SentencePiece type.
        folder: to write into.

    Raises:
        ToolError: the model is not of LLaMA's kind, or transformers gives other ids.
    """
    try:
        model = plain_bpe(tokenizer._tokenizer)
    except ImportError:
        raise ToolError("reading a SentencePiece model needs `pip install protobuf`") from None
    if model is None:
        raise ToolError(
            "transformers gets a SentencePiece model of LLaMA's kind only: BPE with byte fallback,"
            " no normalizer, no extra white space removed, no symbols of the user; for others, give"
            " a folder that transformers reads to --tokenizer-model"
        )
    _tokenizers_bpe(model).save(str(folder / "tokenizer.json"))
    library = tokenizer._tokenizer.tokenizer
    ids = {name: getattr(library, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": library.id_to_piece(id_) for name, id_ in ids.items() if id_ >= 0},
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,  # `</s>` within a text is text
    }
    (folder / "tokenizer_config.json").write_text(json_text(config), encoding="utf-8")
    _compare(tokenizer, folder, entries(model))


def _tokenizers_bpe(model: Any) -> Any:
    """Build the `tokenizers.Tokenizer`.

    SentencePiece joins the neighbours that make the entry of the highest score, whichever they are:
    every way to cut an entry in two is a merge, in the order of the scores.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    known = set(entries(model))
    ranked = sorted(model.pieces, key=lambda entry: -entry.score)
    merges = [
        (word[:cut], word[cut:])
        for word in (entry.piece for entry in ranked if entry.piece in known)
        for cut in range(1, len(word))
        if word[:cut] in known and word[cut:] in known
    ]
    vocab = {entry.piece: number for number, entry in enumerate(model.pieces)}
    unknown = model.trainer_spec.unk_piece
    made = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", SPACE_MARK)]
    decode = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        spaces.insert(0, normalizers.Prepend(SPACE_MARK))
        decode.append(decoders.Strip(" ", 1, 0))
    made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence(decode)
    return made


def _compare(tokenizer: Any, folder: Path, words: Sequence[str]) -> None:
    """Check that transformers gives the ids of the training, on random texts of the vocabulary."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rng = random.Random(0)
    parts = [word.replace(SPACE_MARK, " ") for word in words]
    for number in range(_TEXTS):
        chosen = rng.choices(parts, k=number % 30) + rng.choices(_ODD, k=number % 4)
        rng.shuffle(chosen)
        text = "".join(chosen) + number % 8 * rng.choice(parts)[-1]
        if other(text).input_ids != tokenizer.tokenize(text):
            raise ToolError(f"transformers would give other tokens than Megatron for {text!r}")
