"""Real text and real tokenizers for the tests of the data tools."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.tool_forker import ToolForker

from tools import preprocess_data, train_tokenizer

# Cut into about 1000 documents: more than the batches that two workers may have in flight.
SOURCES = ("argparse.py", "ast.py", "difflib.py", "enum.py", "inspect.py", "pickle.py", "typing.py")
DOCUMENT_LINES = 14
# Text that careless reading changes: other line ends, no line end, other scripts, U+2028, nothing.
ODD_TEXTS = ("a\r\nb\rc\n", "no newline", "π ≈ 3.14159 ☕ 語\u2028x\x85y", "", " \n\t ")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 1000 pieces of the running Python's standard library, and some odd ones."""
    lines = [
        line
        for name in SOURCES
        for line in Path(os.__file__).with_name(name).read_text("utf-8").splitlines(keepends=True)
    ]
    starts = range(0, len(lines), DOCUMENT_LINES)
    return ["".join(lines[start : start + DOCUMENT_LINES]) for start in starts] + list(ODD_TEXTS)


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts as one .jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 512 tokens trained on the corpus."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    flags = ["--input", str(corpus), "--vocab-size", "512", "--output", str(folder)]
    train_tokenizer.main(flags)
    return folder


@pytest.fixture(scope="session")
def hf_flags(tokenizer_folder: Path) -> list[str]:
    """The tokenizer's flags, as preprocessing takes them."""
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_folder)]


@pytest.fixture(scope="session")
def whole(corpus: Path, hf_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of the pair that one undisturbed process makes of the corpus."""
    prefix = tmp_path_factory.mktemp("whole") / "c"
    preprocess_data.main(
        ["--input", str(corpus), "--output-prefix", str(prefix), "--append-eod", *hf_flags]
    )
    return prefix


@pytest.fixture(scope="session")
def llama_checkpoint(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron's checkpoint of a model with a SentencePiece tokenizer of 600 tokens beside it."""
    from support.llama_models import (  # the import takes seconds
        convert,
        save_llama,
        train_sentencepiece,
    )

    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder, vocab_size=600)
    train_sentencepiece(texts, folder)
    return convert("megatron", folder, folder / "megatron")


@pytest.fixture(scope="session")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolForker]:
    """Runs tools as processes of their own."""
    forker = ToolForker(tmp_path_factory.mktemp("forker"))
    yield forker
    forker.close()


@pytest.fixture(scope="session")
def sample(texts: list[str], forker: ToolForker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an input of every kind, see `samples`; not to be changed."""
    from support import samples  # the import takes seconds

    return samples.make(tmp_path_factory.mktemp("sample") / "sample", texts, forker)


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a tool that must fail, and return its error after the name of the tool.

    It must be one line on stderr (after the usage lines where the flags are wrong), with the exit
    status given (default 1).
    """

    def run(main: Callable[[list[str]], None], *flags: object, status: int = 1) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(flag) for flag in flags])
        assert exit_.value.code == status
        *usage, line = capsys.readouterr().err.splitlines()
        assert not usage or status == 2, usage
        start, _, message = line.partition(": error: ")
        assert start == main.__module__.replace(".", "/") + ".py"
        return message

    return run
