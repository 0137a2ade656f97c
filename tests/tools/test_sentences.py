"""tools/preprocess_data.py --split-sentences, with a Punkt model that the test makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nltk
import pytest
from nltk.tokenize.punkt import PunktParameters, save_punkt_params
from support.pair_files import files_below

from tools.common.megatron import megatron_module
from tools.preprocess_data import main

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
DOCUMENTS = [
    ["Dr. Su left.", "Was it late?", "No: 9 p.m. at most!"],
    [],
    ["One."],
    ["No end", "Two lines."],
]


@pytest.fixture
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only NLTK data there is: a model that knows two abbreviations."""
    data = tmp_path / "nltk_data"
    data.mkdir(mode=0o700)
    monkeypatch.setattr(nltk.data, "path", [str(data)])
    parameters = PunktParameters()
    parameters.abbrev_types |= {"dr", "p.m"}
    (data / "tokenizers" / "punkt_tab").mkdir(parents=True, mode=0o700)
    save_punkt_params(parameters, str(data / "tokenizers" / "punkt_tab" / "english"))
    return data


@pytest.fixture
def flags(tmp_path: Path, hf_flags: list[str]) -> list[str]:
    """The documents as input."""
    given = tmp_path / "in.jsonl"
    texts: list[object] = [" ".join(sentences) for sentences in DOCUMENTS]
    texts[3] = DOCUMENTS[3]  # already in pieces
    given.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "out" / "c"
    return ["--input", str(given), "--output-prefix", str(out), "--split-sentences", *hf_flags]


@pytest.mark.usefixtures("punkt")
def test_main_split_sentences_makes_sequences_of_documents(
    flags: list[str], tmp_path: Path, tokenizer_folder: Path
) -> None:
    main([*flags, "--append-eod", "--workers", "2"])
    dataset = megatron_module("megatron.core.datasets.indexed_dataset").IndexedDataset(
        f"{tmp_path}/out/c_text_sentence"
    )
    from_pretrained = megatron_module("megatron.core.tokenizers").MegatronTokenizer.from_pretrained
    tokenizer = from_pretrained(str(tokenizer_folder), metadata_path={"library": "huggingface"})
    rows = [row.tolist() for row in dataset]
    ends = dataset.document_indices[1:].tolist()
    assert ends == [3, 3, 4, 6]
    eod = [index + 1 for index, row in enumerate(rows) if row[-1] == tokenizer.eod]
    assert eod == [3, 4, 6]
    found = [tokenizer.detokenize([i for i in row if i != tokenizer.eod]) for row in rows]
    assert found == [sentence for document in DOCUMENTS for sentence in document]


def test_main_without_the_model_says_how_to_get_it(
    punkt: Path, flags: list[str], tmp_path: Path, failure: Callable[..., str]
) -> None:
    for language in ("german", "../english"):
        message = failure(main, *flags, "--lang", language)
        assert f"NLTK has no punkt_tab model {language!r} here" in message
        assert "python -m nltk.downloader -d FOLDER punkt_tab" in message
    assert not files_below(tmp_path / "out")
