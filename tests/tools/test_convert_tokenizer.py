"""tools/convert_checkpoint.py --to hf: the training's SentencePiece model for transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from support.llama_models import convert, save_llama, train_sentencepiece, with_args
from tokenizers.normalizers import Strip
from transformers import AutoTokenizer, LlamaForCausalLM

from tools import convert_checkpoint

# What transformers' own LlamaTokenizer gives other ids for, and more.
ODD = (
    *(" a", "  a", "\n\n a  b", "a</s><s> <unk>", "<0x41>", "e\u0301 語 \u2581x\0", " " * 20 + "x"),
    *("====", "=" * 99, "\n" * 9, " " * 99, "0" * 9),
)


def test_ids_are_those_of_sentencepiece(
    llama_checkpoint: Path, tmp_path: Path, texts: list[str]
) -> None:
    folder = convert("hf", llama_checkpoint, tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape == (600, 32)
    assert (folder / "megatron_padding.safetensors").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    library = sentencepiece.SentencePieceProcessor(str(llama_checkpoint.parent / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 600
    for text in (*texts, *ODD):
        ids = library.encode(text)
        assert tokenizer(text).input_ids == ids, repr(text)
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def refusal(failure: Callable[..., str], *flags: object) -> str:
    return failure(convert_checkpoint.main, "--to", "hf", *flags)


def test_other_ids_are_refused(
    llama_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[..., str],
) -> None:
    # What LlamaTokenizer does, but to every text.
    monkeypatch.setattr("tokenizers.normalizers.Prepend", lambda _: Strip(left=True, right=False))
    line = refusal(failure, "--load", llama_checkpoint, "--output", tmp_path / "hf")
    assert line.startswith("transformers would give other tokens than Megatron for ")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "changes", [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}]
)
def test_models_of_other_kinds_are_refused(
    changes: dict[str, Any],
    llama_checkpoint: Path,
    tmp_path: Path,
    texts: list[str],
    failure: Callable[..., str],
) -> None:
    file = train_sentencepiece(texts, tmp_path, **changes)
    flags = ("--load", llama_checkpoint, "--output", tmp_path / "hf", "--tokenizer-model", file)
    assert "of LLaMA's kind only: BPE with byte fallback" in refusal(failure, *flags)
    assert not (tmp_path / "hf").exists()


def test_a_folder_of_transformers_is_copied_and_takes_no_sentencepiece_model(
    llama_checkpoint: Path, tmp_path: Path, tokenizer_folder: Path, failure: Callable[..., str]
) -> None:
    save_llama(tmp_path / "llama", 512)
    shutil.copytree(tokenizer_folder, tmp_path / "llama", dirs_exist_ok=True)
    there = convert("megatron", tmp_path / "llama", tmp_path / "megatron")
    back = convert("hf", there, tmp_path / "back")
    for file in tokenizer_folder.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes()
    assert len(AutoTokenizer.from_pretrained(back)) == 512
    model = llama_checkpoint.parent / "tokenizer.model"
    flags = ("--load", there, "--output", tmp_path / "hf", "--tokenizer-model", model)
    assert "but --tokenizer-type HuggingFaceTokenizer was trained with" in refusal(failure, *flags)


def test_special_tokens_of_the_flags_are_tokens_that_the_folder_lacks(
    tmp_path: Path, tokenizer_folder: Path, failure: Callable[..., str]
) -> None:
    save_llama(tmp_path / "llama", 513)
    shutil.copytree(tokenizer_folder, tmp_path / "llama", dirs_exist_ok=True)
    there = convert("megatron", tmp_path / "llama", tmp_path / "megatron")
    for special, tokens in ((None, 512), (["<a>"], 513)):
        changes = {"special_tokens": special, "vocab_size": None}
        more = with_args(there, tmp_path / f"{tokens}", **changes)
        flags = ("--load", more, "--output", tmp_path / f"hf {tokens}")
        if special:
            line = refusal(failure, *flags)
            assert "512 tokens, but the model was trained with 513; give the training's" in line
        else:
            convert("hf", more, tmp_path / f"hf {tokens}")


@pytest.fixture(scope="module")
def smaller(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 590 tokens: with padding, it would fit a model of 600."""
    return train_sentencepiece(texts, tmp_path_factory.mktemp("smaller"), vocab_size=590)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The conversion to Megatron noted the number; Megatron itself does not.
        ({"tokenizer_model": "/gone"}, "590 tokens, but the model was trained with 600"),
        ({"vocab_size": None}, "590 tokens, but the model was trained with 600"),
        (
            {"tokenizer_model": "/gone", "vocab_size": None, "make_vocab_size_divisible_by": 8},
            "590 tokens, but the model has 640 rows, and padding to a multiple of 8 does not",
        ),
    ],
)
def test_a_tokenizer_of_fewer_tokens_than_the_trainings_is_refused(
    changes: dict[str, Any],
    message: str,
    llama_checkpoint: Path,
    smaller: Path,
    tmp_path: Path,
    failure: Callable[..., str],
) -> None:
    there = with_args(llama_checkpoint, tmp_path / "megatron", **changes)
    flags = ("--load", there, "--output", tmp_path / "hf", "--tokenizer-model", smaller)
    line = refusal(failure, *flags)
    assert message in line
    assert "or the number of tokens to --vocab-size" in line
    assert not (tmp_path / "hf").exists()
    words = ("--tokenizer-model", str(smaller), "--vocab-size", "600")
    folder = convert("hf", there, tmp_path / "hf", *words)
    assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == 600


def test_a_folder_whose_tokenizer_has_other_tokens_is_told_of(
    smaller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "llama"
    save_llama(folder, vocab_size=600)
    convert("megatron", folder, tmp_path / "without")
    shutil.copy(smaller, folder)
    convert("megatron", folder, tmp_path / "megatron")
    before, after = capsys.readouterr().out.splitlines()
    assert before.endswith("padded to 640; train with --norm-epsilon 1e-06")
    assert after.endswith("; the tokenizer has 590 tokens")


def test_a_vocabulary_of_nothing_is_refused(
    llama_checkpoint: Path, tmp_path: Path, failure: Callable[..., str]
) -> None:
    for size in (0, -600):
        flags = ("--load", llama_checkpoint, "--output", tmp_path / "hf", "--vocab-size", size)
        assert f"a vocabulary of {size} does not fit" in refusal(failure, *flags)


def test_a_multiple_that_is_no_number_is_refused(
    llama_checkpoint: Path, smaller: Path, tmp_path: Path, failure: Callable[..., str]
) -> None:
    changes = {"tokenizer_model": None, "vocab_size": None, "make_vocab_size_divisible_by": "8"}
    there = with_args(llama_checkpoint, tmp_path / "megatron", **changes)
    flags = ("--load", there, "--output", tmp_path / "hf", "--tokenizer-model", smaller)
    assert "make_vocab_size_divisible_by is '8'; expected a whole" in refusal(failure, *flags)
