"""The record beside a run's checkpoints, and the data that a resume compares."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training_runs import (
    EXAMPLE,
    JOBS,
    MILE,
    STOP,
    TP1,
    TP2,
    Run,
    TrainingRuns,
    mile_errors,
)

from megatron_mile.errors import MileError
from megatron_mile.run_record.data import changed_data, fingerprint, tokenizer_of
from megatron_mile.run_record.data_files import check_pairs
from megatron_mile.run_record.record import git_state, write_record


def starts(run: Run) -> list[dict[str, Any]]:
    content = json.loads((run.checkpoint / "run_record.json").read_text())
    found: list[dict[str, Any]] = content["starts"]
    return found


@pytest.mark.slow
def test_resume_adds_a_start_and_refuses_other_data(runs: TrainingRuns, tmp_path: Path) -> None:
    prefix = runs.train(1, script=JOBS / "write_documents.py").folder
    vocabulary = tmp_path / "vocab.json"  # which NullTokenizer does not read
    vocabulary.write_text("one")
    flags = MILE.replace("--mock-data", f"--data-path {prefix} --split 100,0,0")
    flags += f" --vocab-file {vocabulary}"
    half = runs.train(2, TP2, flags, STOP, save=True)
    (start,) = starts(half)
    ((pair,),) = start["data"]["blends"]
    assert start["data"]["split"] == "100,0,0"
    digest = hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest()
    size = Path(f"{prefix}.bin").stat().st_size
    assert (pair["prefix"], pair["bin"]) == (str(prefix), f"{size}:{digest}")
    (known,) = start["data"]["tokenizer"]["files"].values()
    assert known == f"3:{hashlib.sha256(b'one').hexdigest()}"
    assert (start["iteration"], start["processes"]) == (0, 2)
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert f"--data-path {prefix}" in start["command"]
    assert shlex.split(start["command"])[0].endswith("pretrain_gpt.py")
    here = git_state(str(EXAMPLE))
    checkouts = start["checkouts"]
    assert checkouts["script"] == here
    assert checkouts["megatron-mile"] == git_state(str(EXAMPLE), "megatron_mile")
    again = f"--load {half.checkpoint} --save {half.checkpoint}"
    vocabulary.write_text("two")
    other = runs.run(2, TP2, flags.replace("100,0,0", "99,1,0"), again)
    (error,) = mile_errors("\n".join(other.logs))
    assert (
        f"trained with other data or tokenizer: {prefix}: content, weights or --split changed; "
        in error
    )
    assert f"tokenizer NullTokenizer {vocabulary}: content changed; resume with the same" in error
    assert "--mile-allow-change" in error
    vocabulary.write_text("one")
    assert other.code != 0
    assert len(starts(half)) == 1
    runs.train(2, TP2, flags, again)
    assert [start["iteration"] for start in starts(half)] == [0, 6]
    runs.train(2, TP2, MILE, f"--load {half.checkpoint} --mile-allow-change")


@pytest.mark.slow
def test_a_job_whose_record_is_a_pipe_stops_at_its_start(
    runs: TrainingRuns, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "run_record.json")
    job = runs.run(1, TP1, MILE, f"--save {tmp_path}")
    (error,) = mile_errors(job.logs[0])
    assert f"{tmp_path}/run_record.json: not a run's record (no regular file)" in error
    assert (job.code != 0, os.listdir(tmp_path)) == (True, ["run_record.json"])


@pytest.mark.slow
def test_record_takes_what_a_script_reads_in_its_own_way(
    runs: TrainingRuns, tmp_path: Path
) -> None:
    """A dataset provider and data loaders of its own; a pair, a file, a folder and nothing."""
    pair = runs.train(1, script=JOBS / "write_documents.py").folder
    text, folder = tmp_path / "text.jsonl", tmp_path / "shards"
    text.write_text("one")
    folder.mkdir()
    names = [str(pair), str(text), str(folder), str(tmp_path / "absent")]
    data = "--data-path " + " ".join(f"{weight} {name}" for weight, name in enumerate(names))
    flags = (MILE.replace("--mock-data", data), "--dataloader-type external --train-iters 2")
    script = JOBS / "launch_tiny.py"
    run = runs.train(1, TP1, *flags, save=True, script=script)
    (blend,) = starts(run)[0]["data"]["blends"]
    assert [entry["prefix"] for entry in blend] == names
    assert [set(entry) - {"prefix", "weight"} for entry in blend] == [
        {"bin", "idx"}, {"file"}, set(), set()
    ]  # fmt: skip
    assert blend[1]["file"] == f"3:{hashlib.sha256(b'one').hexdigest()}"
    text.write_text("two")
    other = runs.run(1, TP1, *flags, f"--load {run.checkpoint}", script=script)
    assert other.code != 0
    (error,) = mile_errors(other.logs[0])
    assert "trained with other data or tokenizer: " in error
    assert not other.scalars


@pytest.mark.slow
def test_no_rank_waits_for_the_data_in_a_collective(runs: TrainingRuns) -> None:
    runs.train(2, script=JOBS / "slow_storage.py")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", "[" * 10**5, '{"starts": 5}', '{"starts": {"a": 1}}', "{}", None],
)
def test_a_record_of_another_shape_ends_in_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "run_record.json"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(MileError, match=rf"^{path}: not a run's record \(.+\); move it away$"):
        write_record(argparse.Namespace(save=str(tmp_path)))
    assert os.listdir(tmp_path) == ["run_record.json"]
    assert content is None or path.read_text() == content


@pytest.mark.parametrize("link", [False, True])
def test_a_record_that_is_a_pipe_does_not_hang_the_start(tmp_path: Path, link: bool) -> None:
    """To open it would wait for a writer; the alarm would end the test."""
    path = tmp_path / "run_record.json"
    os.mkfifo(tmp_path / "pipe" if link else path)
    if link:
        path.symlink_to("pipe")
    signal.alarm(20)
    try:
        with pytest.raises(MileError, match=rf"^{path}: not a run's record \(no regular file"):
            write_record(argparse.Namespace(save=str(tmp_path)))
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_save_that_cannot_be_written_ends_in_one_line(tmp_path: Path, place: str) -> None:
    """Not by permissions, which the superuser of a container would not notice."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        MileError, match=r"/run_record.json: .+; --save needs a folder to write to$"
    ):
        write_record(argparse.Namespace(save=str(tmp_path / place)))
    assert os.listdir(tmp_path) == ["file"]


def test_a_save_in_object_storage_leaves_no_record_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_record(argparse.Namespace(save="msc://bucket/run"))
    assert not os.listdir(tmp_path)


def test_short_bin_cut_idx_and_mixed_tokenizers_are_named(tmp_path: Path) -> None:
    # Here, because this file is collected where a Megatron is broken on purpose, too.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    pairs = [str(tmp_path / name) for name in "ab"]
    for prefix in pairs:
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for length in (3, 5):
            builder.add_document(np.arange(length), [length])
        builder.finalize(f"{prefix}.idx")
    check_pairs(pairs)
    one, two = (Path(f"{prefix}.info") for prefix in pairs)
    one.write_text('{"tokenizer": "x"}')
    check_pairs(pairs)
    two.write_text('{"tokenizer": "y"}')
    with pytest.raises(MileError, match=f"^{two}: made with another tokenizer than {one}.*remove"):
        check_pairs(pairs)
    one.write_text("of another tool")
    check_pairs(pairs)
    one.unlink()
    check_pairs([*pairs, str(tmp_path / "absent"), str(tmp_path)])
    os.truncate(f"{pairs[0]}.bin", 15)
    with pytest.raises(MileError, match=f"^{pairs[0]}.bin: 15 bytes, but its .idx describes 16"):
        check_pairs(pairs[:1])
    index = Path(f"{pairs[1]}.idx")
    whole = index.read_bytes()
    for damaged in (whole[:40], whole[:18] + b"\xff" * 16 + whole[34:]):
        index.write_bytes(damaged)
        with pytest.raises(MileError, match=f"^{index}: cut short"):
            check_pairs(pairs[1:])
    index.write_bytes(whole)
    for pipe in (two, index):  # to open one waits for whoever writes into it
        pipe.unlink()
        os.mkfifo(pipe)
        check_pairs(pairs[1:])


def test_fingerprint_is_of_the_whole_file_or_of_64_blocks(tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(bytes(range(256)) * 9000)  # more than two blocks, not a whole number of them
    whole = hashlib.sha256(file.read_bytes()).hexdigest()
    assert fingerprint(str(file)) == f"{256 * 9000}:{whole}"
    file, size = tmp_path / "large", 70 * 2**20 + 5
    with file.open("wb") as sparse:
        sparse.truncate(size)
    before = fingerprint(str(file))
    places = [(size - 2**20) * index // 63 for index in range(64)]
    for place, seen in ((0, True), (places[7] + 3, True), (size - 1, True), (places[7] - 1, False)):
        with file.open("r+b") as changed:
            changed.seek(place)
            changed.write(b"x")
        assert (fingerprint(str(file)) != before) == seen
        before = fingerprint(str(file))


PAIR = {"prefix": "a/x", "weight": 0.3, "bin": "1:a", "idx": "2:b"}


@pytest.mark.parametrize(
    ("pair", "split", "change"),
    [
        ({"prefix": "b/x"}, "9,1,0", []),
        ({"bin": "1:c"}, "9,1,0", ["a/x: content, weights or --split changed"]),
        ({"weight": 0.4, "prefix": "b"}, "9,1,0", ["a/x -> b"]),
        ({}, "8,2,0", ["a/x: content, weights or --split changed"]),
    ],
)
def test_changed_data_compares_content_and_not_places(
    pair: dict[str, Any], split: str, change: list[str]
) -> None:
    stored = {"mile_data": {"split": "9,1,0", "blends": [[PAIR]]}}
    current = {"mile_data": {"split": split, "blends": [[{**PAIR, **pair}]]}}
    assert changed_data(stored, current) == change
    assert changed_data({}, current) == changed_data(stored, {}) == []


def test_changed_data_knows_object_storage_by_name() -> None:
    one, two = (
        {"mile_data": {"split": None, "blends": [[{"prefix": f"s3://{name}", "weight": None}]]}}
        for name in "ab"
    )
    assert changed_data(one, one) == []
    assert changed_data(one, two) == ["s3://a -> s3://b"]


def test_changed_data_compares_names_where_content_is_not_known() -> None:
    named = {"prefix": "a", "weight": None}
    read, pair = {**named, "file": "1:x"}, {**named, "bin": "1:x", "idx": "1:x"}

    def changes(*blends: list[dict[str, Any]]) -> list[str]:
        one, other = ({"mile_data": {"split": None, "blends": [blend]}} for blend in blends)
        return changed_data(one, other)

    assert changes([named], [read]) == changes([read], [named]) == []
    assert changes([named], [{**read, "prefix": "b"}]) == ["a -> b"]
    changed = ["a: content, weights or --split changed"]
    assert changes([read], [{**read, "file": "1:y"}]) == changes([read], [pair]) == changed
    assert changes([read], [read, read]) == ["a -> a, a"]
    assert changes([read], []) == ["a -> mock data"]


ODD_FLAGS = """
import argparse, json, os, sys
from megatron_mile.run_record.data import data_of
folder = sys.argv[1]
os.mkfifo(os.path.join(folder, "pipe"))
names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
given = dict.fromkeys((*names, "per_split_data_args_path"))
for flags in (
    {},
    {**given, "data_args_path": os.path.join(folder, "absent")},
    {**given, "data_path": ["b", "c", "1", "a"]},
    {**given, "data_path": [os.path.join(folder, "pipe")]},
    {**given, "valid_data_path": [folder]},
):
    print(json.dumps(data_of(argparse.Namespace(**flags))["blends"]))
"""


def test_data_of_takes_flags_of_any_meaning(runs: TrainingRuns, tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "data"
    script.write_text(ODD_FLAGS)
    folder.mkdir()
    done = runs.call(script, folder)
    assert done.returncode == 0, done.stdout
    unread = [[{"prefix": name, "weight": None}] for name in (f"{folder}/pipe", str(folder))]
    blends = [json.loads(line) for line in done.stdout.splitlines()[-5:]]
    assert blends == [[], [], [], *([entry] for entry in unread)]


def data_with(kind: str, name: object) -> dict[str, Any]:
    flags = argparse.Namespace(tokenizer_type=kind, tokenizer_model=str(name))
    return {"mile_data": {"split": None, "blends": [], "tokenizer": tokenizer_of(flags)}}


def tokenizer_folder(folder: Path, text: str) -> dict[str, Any]:
    """The data of a job whose tokenizer lies in a folder with a model's weights."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text)
    (folder / "model.safetensors").write_text(str(folder))
    return data_with("HuggingFaceTokenizer", folder)


def test_changed_data_compares_the_files_of_a_tokenizer(tmp_path: Path) -> None:
    one = tokenizer_folder(tmp_path / "a", "x")
    assert list(one["mile_data"]["tokenizer"]["files"]) == [str(tmp_path / "a" / "tokenizer.json")]
    assert changed_data(one, tokenizer_folder(tmp_path / "b", "x")) == []
    assert changed_data(one, tokenizer_folder(tmp_path / "c", "y")) == [
        f"tokenizer HuggingFaceTokenizer {tmp_path}/a -> HuggingFaceTokenizer {tmp_path}/c"
    ]
    hub = data_with("HuggingFaceTokenizer", "known/to-the-hub")
    assert changed_data(hub, data_with("HuggingFaceTokenizer", "known/to-the-hub")) == []
    assert len(changed_data(hub, data_with("HuggingFaceTokenizer", "another"))) == 1
    assert len(changed_data(hub, data_with("SFTTokenizer", "known/to-the-hub"))) == 1
    assert changed_data({"mile_data": {"split": None, "blends": []}}, one) == []


def test_git_state_tells_a_changed_checkout(tmp_path: Path) -> None:
    file = str(tmp_path / "file")
    (tmp_path / "file").write_text("one")
    assert git_state(file) is None
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for words in (("init", "-q"), ("add", "file"), (*name, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    state = git_state(file)
    assert state is not None
    assert (len(state["commit"]), state["dirty"]) == (40, False)
    (tmp_path / "file").write_text("two")
    assert git_state(file) == {**state, "dirty": True}
    (tmp_path / "other").write_text("of nobody's commit")
    assert git_state(str(tmp_path / "other")) is None
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "note.txt").write_text("no code")
    assert git_state(file, "folder") == {**state, "dirty": False}
    (folder / "new.py").write_text("# an objective, say")
    assert git_state(file, "folder") == {**state, "dirty": True}
