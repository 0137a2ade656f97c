"""tools/token_frequency.py: counts and buckets against plain Python, and damaged data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mile.run_record.data_files import INDEX_HEAD_BYTES
from tools import preprocess_data, token_frequency
from tools.common.cli import ToolError
from tools.common.megatron import megatron_module
from tools.data.frequency_buckets import BUCKETS, assign_buckets, load_buckets
from tools.token_frequency import main, summarize


def make_pair(prefix: Path, documents: list[list[int]], vocab_size: int) -> Path:
    """Write documents of token ids as a pair and return its prefix."""
    given_ = prefix.with_suffix(".jsonl")
    rows = [json.dumps({"text": " ".join(map(str, ids))}) for ids in documents]
    given_.write_text("\n".join(rows))
    flags = ["--input", str(given_), "--output-prefix", str(prefix)]
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size)]
    preprocess_data.main([*flags, *null])
    return Path(f"{prefix}_text_document")


def brute_force_buckets(counts: list[int]) -> list[int]:
    """Walk through the sorted tokens with exact fractions."""
    buckets, before, total = [2] * len(counts), Fraction(0), sum(counts)
    for token in sorted(range(len(counts)), key=lambda token: (-counts[token], token)):
        share = before / total
        buckets[token] = 0 if share < Fraction(80, 100) else 1 if share < Fraction(95, 100) else 2
        before += counts[token]
    return buckets


# Small counts make ties and zeros common; large ones would show rounding.
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 10**12)), min_size=1).filter(any))
def test_assign_buckets_equals_brute_force(counts: list[int]) -> None:
    assert assign_buckets(counts) == brute_force_buckets(counts)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([80, 15, 5], [0, 1, 2]),  # shares before: exactly 0, 0.80, 0.95
        ([79, 16, 5], [0, 0, 2]),  # 0.79 is still high
        ([5, 15, 80], [2, 1, 0]),  # the order of ids does not matter
        ([1, 1, 1, 1, 1], [0, 0, 0, 0, 1]),  # ties by id
        ([0, 7, 0], [2, 0, 2]),  # never seen is low
    ],
)
def test_assign_buckets_border_belongs_to_the_rarer_bucket(
    counts: list[int], expected: list[int]
) -> None:
    assert assign_buckets(counts) == expected


# 7: blocks end inside documents and the last is short; 2**22: one block. 65500: 4-byte tokens.
@pytest.mark.parametrize(("block", "vocab_size"), [(7, 40), (1 << 22, 40), (7, 65500)])
def test_main_counts_equal_plain_python(
    block: int, vocab_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_frequency, "_BLOCK_TOKENS", block)
    random = np.random.default_rng(0)
    documents = [
        [random.geometric(0.2, 5 + n).clip(max=39).tolist() for n in range(9)] for _ in "ab"
    ]
    documents[1].append([vocab_size - 1])
    pairs = [make_pair(tmp_path / str(i), d, vocab_size) for i, d in enumerate(documents)]
    output = tmp_path / "frequency.json"
    flags = ["--data-prefix", *map(str, pairs), "--output", str(output)]
    main([*flags, "--vocab-size", str(vocab_size)])
    expected = Counter(token for part in documents for ids in part for token in ids)
    content = json.loads(output.read_text())
    assert content["counts"] == [expected[token] for token in range(vocab_size)]
    assert content["bucket"] == brute_force_buckets(content["counts"])
    assert content["tokens"] == expected.total()
    assert content["source"] == [str(pair) for pair in pairs]
    for index, name in enumerate(BUCKETS):
        ids = [token for token, bucket in enumerate(content["bucket"]) if bucket == index]
        assert content["sizes"][name] == len(ids)
        share = sum(expected[token] for token in ids) / expected.total()
        assert content["shares"][name] == share
    loaded = load_buckets(output)
    assert loaded.dtype == np.int8
    assert loaded.tolist() == content["bucket"]


def test_main_takes_the_vocabulary_from_a_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_pair(tmp_path / "c", [[300, 301, 301]], 512)
    kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_folder)]
    capsys.readouterr()
    main(["--data-prefix", str(pair), *kind])
    bucket = load_buckets(f"{pair}_token_frequency.json")
    assert len(bucket) == 512
    assert (bucket[301], bucket[300], bucket[0]) == (0, 0, 2)
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == f"{pair}_token_frequency.json: 3 tokens"
    assert header.split() == ["bucket", "token", "ids", "share"]
    assert rows[0].split() == ["high", "2", "100.00%"]
    assert rows[2].split() == ["low", "510", "0.00%"]


def _with(path: Path, place: int, byte: int, count: int = 1) -> bytes:
    """The content of a file with other bytes at one place."""
    content = bytearray(path.read_bytes())
    content[place : place + count] = bytes([byte]) * count
    return bytes(content)


def _damage(pair: Path, kind: str) -> None:
    """Damage the pair in the way that `kind` names."""
    bin_, idx = Path(f"{pair}.bin"), Path(f"{pair}.idx")
    if kind == "bin missing":
        bin_.unlink()
    elif kind == "idx missing":
        idx.unlink()
    elif kind == "bin truncated":
        bin_.write_bytes(bin_.read_bytes()[:-2])
    elif kind == "bin of another pair":
        bin_.write_bytes(bin_.read_bytes() + b"\0\0")
    elif kind == "idx truncated":
        idx.write_bytes(idx.read_bytes()[:-8])
    elif kind == "idx header":
        idx.write_bytes(b"x" + idx.read_bytes()[1:])
    elif kind == "idx empty":
        idx.write_bytes(b"")
    elif kind == "idx content":  # the last document ends behind the last sequence
        idx.write_bytes(idx.read_bytes()[:-8] + (99).to_bytes(8, "little"))
    elif kind == "idx sequence":  # the second sequence begins elsewhere
        idx.write_bytes(_with(idx, INDEX_HEAD_BYTES + 2 * 4 + 8, 2))
    elif kind == "idx document":  # the second document begins before the first
        idx.write_bytes(_with(idx, idx.stat().st_size - 16, 0xF0, 8))
    elif kind.startswith("type"):
        idx.write_bytes(_with(idx, INDEX_HEAD_BYTES - 17, int(kind.split()[1])))
    elif kind == "no tokens":
        module = megatron_module("megatron.core.datasets.indexed_dataset")
        writer = module.IndexedDatasetBuilder(str(bin_), np.uint16)
        writer.add_document(np.array([]), [])
        writer.finalize(str(idx))


# Megatron's reader prints a traceback of its own when it is left half-built.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("bin missing", "no file {}.bin; --data-prefix is the path without"),
        ("idx missing", "no file {}.idx; --data-prefix is the path without"),
        ("bin truncated", "{}.bin: 8 bytes, but its .idx describes 10"),
        ("bin of another pair", "{}.bin: 12 bytes, but its .idx describes 10"),
        ("idx truncated", "{}.idx: not a whole Megatron index"),
        ("idx header", "{}.idx: not a whole Megatron index"),
        ("idx empty", "{}.idx: not a whole Megatron index"),
        ("idx content", "{}.idx: damaged; preprocess"),
        ("idx sequence", "{}.idx: damaged; preprocess"),
        ("idx document", "{}.idx: damaged; preprocess"),
        ("type 99", "{}.idx: the type of its tokens is 99; expected 1 for uint8, 2 for int8, 3"),
        ("type 0", "{}.idx: the type of its tokens is 0; expected"),
        ("type 7", "{}.idx: the type of its tokens is 7; expected"),  # a float
        ("type 4", "{}.idx: damaged; preprocess"),  # 4 bytes each
        ("no tokens", "no tokens in {}"),
        ("another tokenizer", "{}.bin: token ids 0 to 9 do not fit the vocabulary of 9"),
    ],
)
def test_main_damaged_data_is_named_and_writes_nothing(
    kind: str, expected: str, tmp_path: Path, failure: Callable[..., str]
) -> None:
    pair = make_pair(tmp_path / "c", [[0, 1, 2], [9, 3]], 10)
    _damage(pair, kind)
    before = sorted(tmp_path.iterdir())
    message = failure(main, "--data-prefix", pair, "--vocab-size", 9)
    assert message.startswith(expected.format(pair))
    assert sorted(tmp_path.iterdir()) == before


def test_main_wrong_flags_are_named(tmp_path: Path, failure: Callable[..., str]) -> None:
    assert "--vocab-size, or --tokenizer-type" in failure(main, "--data-prefix", "a", status=2)
    flags = ["--data-prefix", "a", "b", "--vocab-size", 9]
    assert "give --output with more than one" in failure(main, *flags, status=2)
    for size in (0, -5, 2**24 + 1, 10**9, 10**30):
        message = failure(main, "--data-prefix", tmp_path / "a", "--vocab-size", size)
        assert message == f"--vocab-size {size}: expected 1 to 16777216"


def _frequencies(**changes: object) -> str:
    """A file as `main` writes it, but for the changes; None leaves an entry out."""
    content = {**summarize(np.array([5, 90, 0, 5]), ["a"]), **changes}
    return json.dumps({key: value for key, value in content.items() if value is not None})


def test_load_buckets_reads_what_summarize_gives(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(_frequencies())
    assert load_buckets(tmp_path / "good.json").tolist() == [1, 0, 2, 2]


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "null", "[" * 100_000),
        _frequencies(bucket=[1, 0, 2]),
        _frequencies(bucket=[1, 0, 2, 3]),
        _frequencies(bucket=[1, 0, 2, 1]),  # of numbers that are possible, and wrong
        _frequencies(bucket=[1.0, 0.0, 2.0, 2.5]),
        _frequencies(bucket=["1", "0", "2", "2"]),
        _frequencies(bucket=[True, False, 2, 2]),
        _frequencies(bucket=None),
        _frequencies(counts=None),
        _frequencies(counts=[5, 90, 0, 6]),
        _frequencies(counts=[5, 90, 0, 10**30]),
        _frequencies(tokens=99),
        _frequencies(vocab_size=True),
        _frequencies(vocab_size=5),
    ],
)
def test_load_buckets_refuses_other_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "buckets.json"
    path.write_text(content)
    with pytest.raises(ToolError, match="not a token frequency file; make it with"):
        load_buckets(path)


def test_load_buckets_names_a_missing_file_and_a_negative_count(tmp_path: Path) -> None:
    path = tmp_path / "buckets.json"
    with pytest.raises(ToolError, match=r"buckets\.json: No such file or directory; make it with"):
        load_buckets(path)
    path.write_text(_frequencies(counts=[5, 90, -1, 6]))
    with pytest.raises(ToolError, match="token 2 has the count -1; expected 0 or more"):
        load_buckets(path)
