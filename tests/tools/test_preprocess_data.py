"""tools/preprocess_data.py: what it writes and what it refuses."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from support.pair_files import files_below, pair_bytes

from tools.common.megatron import megatron_module
from tools.data import encoder
from tools.preprocess_data import main

# The tool forks; so does Megatron's own. What pytest has loaded beside it starts threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def test_main_ids_decode_to_the_texts(
    whole: Path, texts: list[str], tokenizer_folder: Path
) -> None:
    dataset = megatron_module("megatron.core.datasets.indexed_dataset").IndexedDataset(
        f"{whole}_text_document"
    )
    from_pretrained = megatron_module("megatron.core.tokenizers").MegatronTokenizer.from_pretrained
    tokenizer = from_pretrained(str(tokenizer_folder), metadata_path={"library": "huggingface"})
    rows = [dataset[index].tolist() for index in range(len(dataset))]
    assert all(row[-1] == tokenizer.eod and tokenizer.eod not in row[:-1] for row in rows)
    # The empty document has no sequence, as with Megatron's own tool.
    assert [tokenizer.detokenize(row[:-1]) for row in rows] == [text for text in texts if text]
    assert len(dataset.document_indices) == len(texts) + 1


def _folder_of_text(folder: Path, texts: list[str]) -> None:
    """Number the files so that sorted order is document order across subfolders."""
    for number, text in enumerate(texts):
        path = folder / f"{number // 100:03d}" / f"{number:05d}{('.txt', '.py')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "skipped.png").write_bytes(b"\x89PNG\xff")
    (folder / ".skipped.txt").write_text("hidden")


def _make_format(kind: str, folder: Path, corpus: Path, texts: list[str]) -> str:
    """Write the corpus in one of the input formats and return the value of --input."""
    lines = corpus.read_bytes()
    half = lines.index(b"\n", len(lines) // 2) + 1
    folder.mkdir()
    if kind == "folder of text":
        _folder_of_text(folder, texts)
        return str(folder)
    if kind == "glob of gz, two members":
        (folder / "a.jsonl.gz").write_bytes(
            gzip.compress(lines[:5000]) + gzip.compress(lines[5000:half])
        )
        (folder / "b.jsonl").write_bytes(lines[half:])
        return str(folder / "*.jsonl*")
    if kind == "zst, two frames":
        frames = zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
        (folder / "c.jsonl.zst").write_bytes(frames)
    else:  # "json, empty lines, no last newline"
        (folder / "c.json").write_bytes(lines.replace(b"\n", b"\r\n\n").rstrip())
    return str(next(folder.iterdir()))


@pytest.mark.parametrize(
    "kind",
    [
        "folder of text",
        "glob of gz, two members",
        "zst, two frames",
        "json, empty lines, no last newline",
    ],
)
def test_main_every_format_gives_the_same_pair(
    kind: str, tmp_path: Path, corpus: Path, texts: list[str], hf_flags: list[str], whole: Path
) -> None:
    given = _make_format(kind, tmp_path / "in", corpus, texts)
    flags = ["--input", given, "--output-prefix", str(tmp_path / "new" / "c"), "--append-eod"]
    main([*flags, *hf_flags])
    assert pair_bytes(tmp_path / "new" / "c") == pair_bytes(whole)


# 2 keeps a full window of batches in flight, 3 shares them unevenly.
@pytest.mark.parametrize("workers", [2, 3])
def test_main_workers_do_not_change_the_pair(
    workers: int,
    tmp_path: Path,
    corpus: Path,
    hf_flags: list[str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(workers))
    flags = ["--input", str(corpus), "--output-prefix", str(tmp_path / "c"), "--append-eod"]
    main([*flags, "--workers", str(workers), *hf_flags])
    assert pair_bytes(tmp_path / "c") == pair_bytes(whole)


@pytest.mark.parametrize("asked", [3, 100_000, 10**30])
def test_main_workers_are_bounded_by_the_cores(
    asked: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []
    pool = encoder.ProcessPoolExecutor
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(
        "tools.data.encoder.ProcessPoolExecutor",
        lambda workers, *args, **more: started.append(workers) or pool(workers, *args, **more),
    )
    (tmp_path / "in.txt").write_text("1 2")
    flags = ["--input", str(tmp_path / "in.txt"), "--output-prefix", str(tmp_path / "c")]
    main(
        [*flags, "--tokenizer-type", "NullTokenizer", "--vocab-size", "9", "--workers", str(asked)]
    )
    said = f"tools/preprocess_data.py: --workers {asked}: using 2, one for each core\n"
    assert said in capsys.readouterr().err
    assert started == [2]


def test_main_list_of_strings_makes_sequences_of_one_document(tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text('{"a": ["1 2", "", "3"], "b": "4"}\n{"a": "5 6 7", "b": "8 9"}\n')
    prefix = tmp_path / "c"
    flags = ["--input", str(given), "--output-prefix", str(prefix), "--json-keys", "a", "b"]
    main([*flags, "--append-eod", "--tokenizer-type", "NullTokenizer", "--vocab-size", "70000"])
    reader = megatron_module("megatron.core.datasets.indexed_dataset").IndexedDataset
    a, b = reader(f"{prefix}_a_document"), reader(f"{prefix}_b_document")
    assert [row.tolist() for row in a] == [[1, 2], [3, 69999], [5, 6, 7, 69999]]
    assert a.document_indices.tolist() == [0, 2, 3]
    assert [row.tolist() for row in b] == [[4, 69999], [8, 9, 69999]]
    assert a.index.dtype == np.int32  # 70000 ids do not fit 16 bits


def test_main_sentencepiece_ids_equal_the_library(tmp_path: Path, texts: list[str]) -> None:
    stem = tmp_path / "spm"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(stem), vocab_size=400, minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=f"{stem}.model")
    (tmp_path / "in.txt").write_text(texts[0], encoding="utf-8")
    flags = ["--input", str(tmp_path / "in.txt"), "--output-prefix", str(tmp_path / "c")]
    kind = ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", f"{stem}.model"]
    main([*flags, *kind, "--append-eod"])
    ids = np.frombuffer(pair_bytes(tmp_path / "c")[0], dtype=np.uint16).tolist()
    assert ids == [*model.encode(texts[0]), model.eos_id()]


GOOD = b'{"text": "1 2 3"}\n'
BROKEN_INPUT = {
    # name of the file: its content, what the message must say
    "half.jsonl": (b'{"text": "a \\ud800"}\n', "half.jsonl:1: the value of 'text' holds half of a"),
    "malformed.jsonl": (GOOD + b"\n" + b'{"text": "1', "malformed.jsonl:3: malformed JSON"),
    "list.jsonl": (b'["1"]\n', "list.jsonl:1: a JSON list; expected an object"),
    "key.jsonl": (GOOD + b'{"body": "1"}\n', "key.jsonl:2: no key 'text', only ['body']"),
    "number.jsonl": (b'{"text": 1}\n', "number.jsonl:1: the value of 'text' is not text"),
    "latin.txt": ("1 é".encode("latin-1"), "latin.txt: not UTF-8"),
    "latin.jsonl": (GOOD + b'{"text": "\xe9"}', "latin.jsonl:2: not UTF-8"),
    "cut.jsonl.zst": (zstandard.compress(GOOD * 99)[:-4], "cut.jsonl.zst: broken or truncated"),
    "no.jsonl.zst": (GOOD, "no.jsonl.zst: broken or truncated .zst"),
    "nothing.jsonl.zst": (b"", "nothing.jsonl.zst: broken or truncated .zst"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:-4], "cut.jsonl.gz: broken or truncated"),
    "no.txt.gz": (b"1 2 3", "no.txt.gz: broken or truncated .gz"),
    "empty.txt": (b"", "empty corpus: no token under 'text'"),
    "empty.jsonl": (b'{"text": ""}\n\n', "empty corpus: no token under 'text'"),
    "word.txt": (b"1 two", "word.txt: the tokenizer cannot encode it"),
    "large.jsonl": (GOOD + b'{"text": "1 10"}', "large.jsonl:2: token ids 1 to 10 do not fit"),
    "negative.txt": (b"-1 2", "negative.txt: token ids -1 to 2 do not fit the vocabulary of 10"),
}


# With workers the error crosses a process border, and other batches are under way.
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", BROKEN_INPUT)
def test_main_broken_input_is_named_and_loses_nothing(
    name: str, workers: int, tmp_path: Path, failure: Callable[..., str]
) -> None:
    content, expected = BROKEN_INPUT[name]
    out = tmp_path / "out"
    flags = ["--output-prefix", str(out / "c"), "--tokenizer-type", "NullTokenizer"]
    flags += ["--vocab-size", "10", "--workers", str(workers)]
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    main(["--input", str(tmp_path / "good.jsonl"), *flags])
    earlier = files_below(out)
    given = tmp_path / "in" / name
    given.parent.mkdir()
    given.write_bytes(content)
    assert expected in failure(main, "--input", given, *flags)
    assert files_below(out) == earlier
    assert len(earlier) == 3


def test_main_failure_without_earlier_pair_leaves_nothing(
    tmp_path: Path, failure: Callable[..., str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD * 5000 + b"{")
    flags = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    prefix = tmp_path / "out" / "c"
    failure(main, "--input", tmp_path / "in.jsonl", "--output-prefix", prefix, *flags)
    assert list(prefix.parent.iterdir()) == []


def _without_eos(folder: Path, tokenizer_folder: Path) -> Path:
    shutil.copytree(tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_main_unusable_flags_are_named_and_write_nothing(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, failure: Callable[..., str]
) -> None:
    inputs = ["--input", corpus]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    hf = ["--append-eod", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]
    (tmp_path / "empty").mkdir()
    no_eos = _without_eos(tmp_path / "no_eos", tokenizer_folder)
    out = ["--output-prefix", tmp_path / "out" / "c"]
    before = files_below(tmp_path)
    for expected, flags in {
        "no input file at": ["--input", tmp_path / "*.jsonl", *out, *null],
        "or a folder with files named": ["--input", tmp_path / "empty", *out, *null],
        "--vocab-size 0: expected 1 to 16777216": [*inputs, *out, *null, "--vocab-size", 0],
        "--vocab-size 99999999999: expected": [*inputs, *out, *null, "--vocab-size", 99999999999],
        "NullTokenizer needs --vocab-size": [*inputs, *out, "--tokenizer-type", "NullTokenizer"],
        "needs --tokenizer-model": [*inputs, *out, "--tokenizer-type", "Llama2Tokenizer"],
        "no tokenizer at": [*inputs, *out, *hf, tmp_path / "nowhere"],
        "could not be read as HuggingFaceTokenizer": [*inputs, *out, *hf, tmp_path / "empty"],
        "has no end-of-document token": [*inputs, *out, *hf, no_eos],
        "no_eos/tokenizer.json": [
            *inputs,
            "--output-prefix",
            no_eos / "tokenizer.json" / "c",
            *null,
        ],
    }.items():
        assert expected in failure(main, *flags)
        assert files_below(tmp_path) == before
    assert "0 is not positive" in failure(main, *inputs, *out, *null, "--workers", 0, status=2)


def test_main_skip_bad_lines_names_and_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failure: Callable[..., str]
) -> None:
    bad = [b"{", b"[1]", b'{"text": "\xff"}', b'{"text": "a \\ud800"}']
    given = tmp_path / "in.jsonl"
    given.write_bytes(b"\n".join([*bad[:2], GOOD.strip(), b"", *bad[2:], GOOD.strip()]))
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10", "--workers", "2"]
    flags = ["--input", str(given), "--output-prefix", str(tmp_path / "c"), *null]
    assert "in.jsonl:1: malformed JSON" in failure(main, *flags)
    main([*flags, "--skip-bad-lines"])
    *skipped, count = [line for line in capsys.readouterr().err.splitlines() if "bar" not in line]
    assert [line.split(": ")[:2] for line in skipped] == [
        ["skipped", f"{given}:{number}"] for number in (1, 2, 5, 6)
    ]
    assert count == "4 bad lines skipped"
    assert np.frombuffer(pair_bytes(tmp_path / "c")[0], dtype=np.uint16).tolist() == [1, 2, 3] * 2
    assert json.loads((tmp_path / "c_text_document.info").read_text())["skipped_lines"] == 4


def test_main_missing_text_is_an_error_even_where_bad_lines_are_skipped(
    tmp_path: Path, failure: Callable[..., str]
) -> None:
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10", "--skip-bad-lines"]
    for name in ("key.jsonl", "number.jsonl"):
        content, expected = BROKEN_INPUT[name]
        (tmp_path / name).write_bytes(content)
        out = tmp_path / "out" / "c"
        assert expected in failure(main, "--input", tmp_path / name, "--output-prefix", out, *null)
        assert list(out.parent.iterdir()) == []


def test_main_split_domains_equals_one_run_for_each_domain(
    tmp_path: Path, texts: list[str], hf_flags: list[str], failure: Callable[..., str]
) -> None:
    names = ("Pile-CC", "Gutenberg (PG-19)", "Wikipedia (en)")
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": names[index % 3]}}) + "\n"
        for index, text in enumerate(texts)
    ]
    common = ["--append-eod", *hf_flags, "--input"]
    (tmp_path / "all.jsonl").write_text("".join(lines))
    split = ["--split-domains", "--workers", "2", "--output-prefix", str(tmp_path / "pile")]
    main([*common, str(tmp_path / "all.jsonl"), *split])
    for index, name in enumerate(("Pile-CC", "Gutenberg_PG-19", "Wikipedia_en")):
        given = tmp_path / f"{index}.jsonl"
        given.write_text("".join(lines[index::3]))
        main([*common, str(given), "--output-prefix", str(tmp_path / f"{index}")])
        assert pair_bytes(tmp_path / f"pile_{name}") == pair_bytes(tmp_path / f"{index}")
    assert len(list(tmp_path.glob("pile*"))) == 9
    flags = ["--split-domains", "--output-prefix", tmp_path / "x", *hf_flags, "--input"]
    for line, message in (
        ('{"text": "1"}', "bad.jsonl:1: no domain; --split-domains expects"),
        ('{"text": "1", "meta": {"pile_set_name": 3}}', "bad.jsonl:1: no domain"),
        (
            '{"text": "1", "meta": {"pile_set_name": "A B"}}\n'
            '{"text": "1", "meta": {"pile_set_name": "A_B"}}',
            "the domains 'A_B' and 'A B' would share the files",
        ),
    ):
        (tmp_path / "bad.jsonl").write_text(line)
        assert message in failure(main, *flags, tmp_path / "bad.jsonl")
