"""tools/train_tokenizer.py: the tokenizer it trains, as Megatron loads it, and what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tool_forker import ToolForker
from tokenizers import Tokenizer, pre_tokenizers

from tools.common.megatron import megatron_module
from tools.train_tokenizer import END_OF_TEXT, PADDING, main

TOOL = Path(sys.modules["tools.train_tokenizer"].__file__ or "")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    """The trained folder as a Megatron run loads it; a warning is an error."""
    core = megatron_module("megatron.core.tokenizers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return core.MegatronTokenizer.from_pretrained(
            str(tokenizer_folder), metadata_path={"library": "huggingface"}
        )


def test_train_special_tokens_are_the_first_two_ids(tokenizer: Any) -> None:
    # Megatron warns, or masks the end of documents, where pad equals eod or eos.
    assert (tokenizer.eod, tokenizer.eos, tokenizer.pad) == (0, 0, 1)
    assert tokenizer.tokenize(END_OF_TEXT) == [0]
    assert tokenizer.vocab_size == 512


# Any text, so that no byte is missing from the alphabet; a surrogate alone is no text.
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_train_decoding_returns_the_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert all(2 <= token < 512 for token in ids)


def test_train_long_text_gives_no_warning(
    tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    # The slice a document of a book would be: no maximum length is set that it could exceed.
    assert len(tokenizer.tokenize("word " * 200_000)) > 100_000
    assert capfd.readouterr().err == ""


def _most_frequent_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """The pairs of neighbouring bytes within words that occur most often."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = (word for text in texts for word, _ in split.pre_tokenize_str(text))
    pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
    largest = max(pairs.values())
    return [pair for pair, count in pairs.items() if count == largest]


def test_train_first_merge_is_the_most_frequent_pair(
    tokenizer_folder: Path, texts: list[str]
) -> None:
    model = json.loads((tokenizer_folder / "tokenizer.json").read_text())["model"]
    assert tuple(model["merges"][0]) in _most_frequent_pairs(texts)
    assert len(model["merges"]) == 512 - 258


def test_main_repeats_byte_for_byte_on_any_number_of_threads(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    flags = ["--input", str(corpus), "--vocab-size", "512", "--output", str(tmp_path / "again")]
    environment = {**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, str(TOOL), *flags], check=True, env=environment)
    assert contents(tmp_path / "again") == contents(tokenizer_folder)
    assert len(contents(tokenizer_folder)) == 2


def test_main_small_corpus_gives_a_smaller_vocabulary_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("aa " * 4 + "bb " * 3)
    flags = ["--input", str(tmp_path / "in.txt"), "--min-frequency", "4", "--output"]
    main([*flags, str(tmp_path / "out")])
    loaded = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert loaded.get_vocab_size() == 259  # bytes, special tokens and "aa"; " a" and "bb" are rarer
    assert loaded.encode("aa").tokens == ["aa"]
    assert "259 tokens (the corpus gives no more than these of 4,096)" in capsys.readouterr().out


def test_main_json_keys_and_formats_are_those_of_preprocessing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"a": "xyxyxy", "b": ["zwzw", "zwzw"]}\n')
    flags = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out")]
    main([*flags, "--json-keys", "a", "b"])
    vocabulary = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab()
    assert {"xy", "zw", END_OF_TEXT, PADDING} <= set(vocabulary)


def test_main_existing_folder_is_replaced_only_when_asked(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, failure: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is nobody's
    flags = ["--input", str(corpus), "--output", str(out), "--vocab-size"]
    main([*flags, "300"])
    earlier = contents(out)
    assert "holds a tokenizer; give --overwrite" in failure(main, *flags, 512)
    assert contents(out) == earlier
    main([*flags, "512", "--overwrite"])
    assert contents(out) == contents(tokenizer_folder) != earlier
    (out / "notes.md").write_text("mine")
    assert "holds other files (notes.md)" in failure(main, *flags, 300, "--overwrite")
    assert len(contents(out)) == 3
    assert list(tmp_path.iterdir()) == [out]


def test_main_unusable_input_is_named_and_writes_nothing(
    tmp_path: Path, corpus: Path, failure: Callable[..., str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    before = sorted(tmp_path.rglob("*"))
    out = ["--output", tmp_path / "out"]
    for expected, flags in {
        "no input file at": ["--input", tmp_path / "none", *out],
        "empty corpus: no text in": ["--input", tmp_path / "empty.txt", *out],
        "bad.jsonl:2: malformed JSON": ["--input", tmp_path / "bad.jsonl", *out],
        "latin.txt: not UTF-8": ["--input", tmp_path / "latin.txt", *out],
        "--vocab-size 257: expected 258 to": ["--input", corpus, *out, "--vocab-size", 257],
        "empty.txt: Not a directory": ["--input", corpus, "--output", tmp_path / "empty.txt"],
        "empty.txt is no folder": ["--input", corpus, "--output", tmp_path / "empty.txt" / "out"],
    }.items():
        assert expected in failure(main, *flags)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--vocab-size", -1, "258 to 16777216"),
        ("--vocab-size", 257, "258 to 16777216"),
        ("--vocab-size", 2**24 + 1, "258 to 16777216"),
        ("--vocab-size", 2**63 - 1, "258 to 16777216"),
        ("--vocab-size", 10**30, "258 to 16777216"),
        ("--min-frequency", -1, "1 to 2147483647"),
        ("--min-frequency", 0, "1 to 2147483647"),
        ("--min-frequency", 2**64, "1 to 2147483647"),
    ],
)
def test_main_numbers_out_of_range_are_named(
    flag: str, value: int, expected: str, corpus: Path, tmp_path: Path, failure: Callable[..., str]
) -> None:
    message = failure(main, "--input", corpus, "--output", tmp_path / "out", flag, value)
    assert message == f"{flag} {value}: expected {expected}"
    assert list(tmp_path.iterdir()) == []


def test_main_takes_the_largest_numbers(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("aa " * 4)
    flags = ["--vocab-size", str(2**24), "--min-frequency", str(2**31 - 1)]
    main(["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out"), *flags])
    assert len(contents(tmp_path / "out")) == 2


def _mounted(folder: Path, size: str) -> bool:
    """Put a file system of this size at the folder, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_main_full_disk_is_one_line_and_leaves_nothing(
    corpus: Path, tmp_path: Path, forker: ToolForker
) -> None:
    disk, flags = tmp_path / "disk", ("--input", corpus, "--vocab-size", 512)
    disk.mkdir()
    mounted = _mounted(disk, "16k")
    try:
        # Where nothing can be mounted, no file may be larger than a part of the tokenizer.
        limits = {} if mounted else {"RLIMIT_FSIZE": 16000}
        done = forker.run("train_tokenizer", (*flags, "--output", disk / "new"), tmp_path, **limits)
        left = list(disk.iterdir())
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
    assert (done.code, done.out, left) == (1, "", [])
    reason = "No space left on device" if mounted else "File too large"
    (line,) = done.err.splitlines()
    assert line.startswith("tools/train_tokenizer.py: error: ")
    assert line.endswith(reason)


def test_main_file_size_limit_keeps_an_earlier_tokenizer(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, forker: ToolForker
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "new")
    flags = ("--input", corpus, "--vocab-size", 300, "--output", "new", "--overwrite")
    done = forker.run("train_tokenizer", flags, tmp_path, RLIMIT_FSIZE=5000)
    assert done.code == 1
    assert done.err.endswith("File too large\n")
    assert contents(tmp_path / "new") == contents(tokenizer_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
