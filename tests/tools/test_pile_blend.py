"""tools/pile_blend.py on pairs that preprocessing made, read back by Megatron's own parser."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.datasets.utils import get_blend_from_list

from tools.data.pair_reader import open_pair
from tools.pile_blend import WEIGHTS, main
from tools.preprocess_data import main as preprocess

NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size"]
# What the normalised weights are in percent, from the notes on the paper.
PERCENT = {"PubMed Central": 16.608, "ArXiv": 11.750, "Books3": 9.649, "Enron Emails": 0.174}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair for each domain, one of them twice."""
    folder = tmp_path_factory.mktemp("pile")
    line = '{"text": "%s", "meta": {"pile_set_name": "%s"}}\n'
    text = folder / "all.jsonl"
    text.write_text("".join(line % ("1 2 3", domain) for domain in WEIGHTS))
    more = folder / "more.jsonl"
    more.write_text(line % ("4 " * 8 + "4", "Pile-CC"))
    for given, name in ((text, "pile-00"), (more, "pile-01")):
        flags = ["--input", str(given), "--output-prefix", str(folder / "out" / name)]
        preprocess([*flags, "--split-domains", *NULL, "9"])
    return folder / "out"


@pytest.fixture
def pile(made: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(made, tmp_path / "pile"))


def _read(value: str) -> dict[str, float]:
    prefixes, weights = get_blend_from_list(value.split()) or ([], None)
    assert weights is not None
    return dict(zip(prefixes, weights, strict=True))


def test_blend_is_what_megatron_reads(
    pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for end in (".idx", ".bin"):  # another name that ends alike
        shutil.copy(
            f"{pile}/pile-00_ArXiv_text_document{end}", f"{pile}/NotArXiv_text_document{end}"
        )
    main([str(pile)])
    printed = capsys.readouterr()
    found = _read(printed.out)
    assert len(found) == len(WEIGHTS) + 1 == 23
    assert sum(found.values()) == pytest.approx(1, abs=1e-8)
    for domain, percent in PERCENT.items():
        (weight,) = [
            value
            for prefix, value in found.items()
            if f"_{domain.replace(' ', '_')}_text" in prefix
        ]
        assert 100 * weight == pytest.approx(percent, abs=5e-4)
        assert f"{domain:20}{weight:>9.3%}" in printed.err
    # Pile-CC has 3 and 9 tokens in its pairs, and 9.124 percent of the samples.
    shares = [found[f"{pile}/pile-0{n}_Pile-CC_text_document"] for n in (0, 1)]
    assert [100 * share for share in shares] == pytest.approx([2.281, 6.843], abs=5e-4)
    assert all(open_pair(prefix)[1] for prefix in found)
    main([str(pile), "--output", str(tmp_path / "blend.txt")])
    assert (tmp_path / "blend.txt").read_text() == printed.out
    assert capsys.readouterr().out == ""  # megatron.training reads the file as `_read` does


def test_blend_missing_domains_are_named_or_left_out(
    pile: Path, capsys: pytest.CaptureFixture[str], failure: Callable[..., str]
) -> None:
    for name in ("Github", "Wikipedia_en"):
        for path in pile.glob(f"*_{name}_text_document.*"):
            path.unlink()
    message = failure(main, pile)
    assert "no *_DOMAIN_text_document.idx for 2 of 22 domains: Github, Wikipedia (en);" in message
    main([str(pile), "--renormalize"])
    printed = capsys.readouterr()
    assert "left out: Github, Wikipedia (en)" in printed.err
    found = _read(printed.out)
    assert len(found) == 21
    assert sum(found.values()) == pytest.approx(1, abs=1e-8)
    rest = 1 - 0.05662 - 0.06597
    assert found[f"{pile}/pile-00_ArXiv_text_document"] == pytest.approx(0.1175 / rest, abs=1e-5)


def test_blend_refuses_damaged_and_mixed_pairs(
    pile: Path, tmp_path: Path, failure: Callable[..., str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert "for 22 of 22 domains" in failure(main, tmp_path / "empty", "--renormalize")
    info = pile / "pile-01_Pile-CC_text_document.info"
    whole = info.read_text()
    info.write_text(json.dumps({**json.loads(whole), "tokenizer": "other"}))
    message = failure(main, pile)
    assert message.startswith(f"{info}: made with another tokenizer than {pile}/pile-00_ArXiv")
    info.write_text(whole[:-9])
    assert failure(main, pile).startswith(f"{info}: damaged")
    info.unlink()
    main([str(pile)])  # as if Megatron's own tool had made it
    tokens = pile / "pile-00_ArXiv_text_document.bin"
    os.truncate(tokens, 5)
    assert failure(main, pile).startswith(f"{tokens}: 5 bytes, but its .idx describes 6")
    for path in (tokens, tokens.with_suffix(".info")):  # left by an interrupted preprocessing
        tokens.with_suffix(".idx").unlink(missing_ok=True)
        message = failure(main, pile, "--renormalize")
        assert message.startswith(f"no file {tokens.with_suffix('.idx')}; ")
        path.unlink()
    main([str(pile), "--renormalize"])
    spaced = pile.rename(tmp_path / "a pile")
    assert "Megatron splits blends at white space" in failure(main, spaced)
