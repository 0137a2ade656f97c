"""tools/preprocess_data.py: kill -9 at every step, and what resuming refuses."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.pair_files import files_below, pair_bytes

from tools.data.pair_reader import open_pair
from tools.preprocess_data import main

# The tool forks; so does Megatron's own. What pytest has loaded beside it starts threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
# Every change that others can see goes through one of these, or through a file of `WorkFolder`
# between two of them.
STEPS = ("fsync", "replace", "rename", "unlink", "truncate", "rmdir", "mkdir")
DOCUMENTS = 40


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of documents of two domains, the first compressed."""
    folder = tmp_path_factory.mktemp("numbers")
    lines = [
        json.dumps(
            {"text": f"{i} {i + 1}" if i % 7 else "", "meta": {"pile_set_name": f"D {i % 2}"}}
        )
        for i in range(DOCUMENTS)
    ]
    (folder / "a.jsonl").write_text("\n\n".join(lines[: DOCUMENTS // 2]) + "\n")
    (folder / "b.jsonl").write_text("\n".join(lines[DOCUMENTS // 2 :]))
    return folder


def _run_killed(flags: list[str], step: int) -> int:
    """Run the tool in a child that kills itself before its n-th step; return the exit code."""

    def child() -> None:
        left = step

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **options: object) -> object:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        main(flags)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few documents make several shards."""
    monkeypatch.setattr("tools.data.encoder._BATCH_RECORDS", 4)


# With an earlier pair, which must stay whole until the new one takes its place, and without one.
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.usefixtures("small_batches")
def test_main_killed_at_any_step_goes_on_to_the_same_pairs(
    earlier: bool, numbers: Path, tmp_path: Path
) -> None:
    common = ["--input", str(numbers), "--split-domains", "--append-eod", *NULL]
    main([*common, "--output-prefix", str(tmp_path / "whole" / "c")])
    whole = {Path(name).name: held for name, held in files_below(tmp_path / "whole").items()}
    assert len(whole) == 6
    old = {name: b"old " + held for name, held in whole.items()} if earlier else {}
    resumed = 0
    for step in range(1000):
        out = tmp_path / str(step)
        out.mkdir()
        for name, held in old.items():
            (out / name).write_bytes(held)
        flags = [*common, "--output-prefix", str(out / "c"), "--shard-bytes", "500"]
        code = _run_killed(flags, step)
        for index in out.glob("*.idx"):
            pair = {end: index.with_suffix(end).read_bytes() for end in (".idx", ".bin")}
            names = {end: index.with_suffix(end).name for end in pair}
            assert pair in (
                {end: held[names[end]] for end in pair} for held in (whole, old) if held
            )
        if code == 0:
            break
        assert code == -signal.SIGKILL
        resumed += (out / "c.partial" / "progress").exists()
        main(flags)
        assert {Path(name).name: held for name, held in files_below(out).items()} == whole
        shutil.rmtree(out)
    # 60 steps, of which 45 come after the first of four shards.
    assert step > 40
    assert resumed > step // 2


@pytest.mark.usefixtures("small_batches")
def test_main_resume_encodes_nothing_twice(
    numbers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--input", str(numbers), "--output-prefix", str(tmp_path / "c"), *NULL]
    flags += ["--shard-bytes", "500"]
    step = next(n for n in range(1000) if _run_killed(flags, n) and _finished(tmp_path) > 20)
    finished = _finished(tmp_path)
    encoded: list[str] = []
    from tools.data import encoder

    class Counted(encoder.Encoder):
        def __call__(self, records: list) -> encoder.Batch:
            encoded.extend(record.origin for record in records)
            return super().__call__(records)

    monkeypatch.setattr("tools.preprocess_data.Encoder", Counted)
    main(flags)
    assert finished == 24, step
    assert len(encoded) == DOCUMENTS - finished
    assert f"going on after {finished} finished documents" in capsys.readouterr().err


def _finished(folder: Path) -> int:
    """Return the documents that the progress file counts."""
    path = folder / "c.partial" / "progress"
    return json.loads(path.read_text())["documents"] if path.exists() else 0


@pytest.fixture
def begun(tmp_path: Path, numbers: Path, failure: Callable[..., str]) -> list[object]:
    """Flags of a run that has finished a shard and then met a bad line, in a copy of the input."""
    given = tmp_path / "in.jsonl"
    given.write_bytes(((numbers / "b.jsonl").read_bytes() + b"\n") * 8 + b"{\n")
    out = tmp_path / "out" / "c"
    flags = ["--input", given, "--output-prefix", out, *NULL, "--shard-bytes", 100]
    assert "in.jsonl:161: malformed JSON" in failure(main, *flags)
    assert _finished(out.parent)
    return flags


def test_main_resume_with_other_settings_is_refused(
    begun: list[object], tmp_path: Path, failure: Callable[..., str], hf_flags: list[str]
) -> None:
    before = files_below(tmp_path / "out")
    other = begun[: begun.index("--tokenizer-type")]
    for message, flags in {
        "another tokenizer": [*other, *hf_flags],
        "another --append-eod": [*begun, "--append-eod"],
        "another --json-keys": [*begun, "--json-keys", "meta"],
    }.items():
        line = failure(main, *flags)
        assert f"c.partial: begun with {message}; finish it with the same command" in line
        assert files_below(tmp_path / "out") == before
    os.utime(tmp_path / "in.jsonl")
    assert "begun with another input" in failure(main, *begun)
    assert files_below(tmp_path / "out") == before


def test_main_resume_after_a_bad_line_may_skip_it(begun: list[object], tmp_path: Path) -> None:
    main([*map(str, begun), "--skip-bad-lines"])
    main([*map(str, begun), "--skip-bad-lines", "--output-prefix", str(tmp_path / "new" / "c")])
    assert pair_bytes(tmp_path / "out" / "c") == pair_bytes(tmp_path / "new" / "c")
    assert open_pair(f"{tmp_path}/out/c_text_document")[1] > 0


@pytest.mark.parametrize("suffix", [".bin", ".lengths", ".sequences"])
def test_main_resume_names_a_truncated_file(
    suffix: str, begun: list[object], tmp_path: Path, failure: Callable[..., str]
) -> None:
    path = tmp_path / "out" / "c.partial" / f"text_document{suffix}"
    os.truncate(path, path.stat().st_size - 1)
    line = failure(main, *begun, "--skip-bad-lines")
    assert line.startswith(f"{path}: ")
    assert "were finished; remove" in line


DAMAGED = {
    "empty": b"",
    "cut": b'{"settings": {"tokenizer": "65',
    "no text": b"\xff\xfe\0",
    "a list": b"[]",
    "a number": b"3",
    "of another version": b'{"settings": 3}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", [*DAMAGED, "position", "documents", "sizes", "complete"])
def test_main_resume_names_a_damaged_progress_file(
    kind: str, begun: list[object], tmp_path: Path, failure: Callable[..., str]
) -> None:
    path = tmp_path / "out" / "c.partial" / "progress"
    saved = json.loads(path.read_text())
    # Each is possible, and would give a pair with documents twice or not at all.
    saved["position"] = [0, 3] if kind == "position" else saved["position"]
    saved["documents"] += kind == "documents"
    saved["pairs"]["text_document"][2] -= kind == "sizes"
    saved["complete"] = kind == "complete"
    path.write_bytes(DAMAGED.get(kind, json.dumps(saved).encode()))
    before = files_below(tmp_path / "out")
    message = failure(main, *begun, "--skip-bad-lines")
    assert message == f"{path}: damaged; remove {path.parent} to start anew"
    assert files_below(tmp_path / "out") == before
    shutil.rmtree(path.parent)
    main([*map(str, begun), "--skip-bad-lines"])


@pytest.fixture
def complete(
    tmp_path: Path, numbers: Path, failure: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """Flags of a run that has encoded everything and was stopped before it was put in place."""

    def stop(*args: object) -> None:
        raise OSError("stopped")

    flags = ["--input", numbers, "--output-prefix", tmp_path / "out" / "c", *NULL]
    with monkeypatch.context() as patch:
        patch.setattr("tools.data.work_folder.publish", stop)
        assert failure(main, *flags) == "stopped"
    return flags


# A token more or less shows in the sizes; another token is as good as the one before.
@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        *itertools.product(["cut", "longer"], [".bin", ".lengths", ".sequences"]),
        *itertools.product(["other"], [".lengths", ".sequences"]),
    ],
)
def test_main_publishing_names_a_damaged_file(
    kind: str, suffix: str, complete: list[object], tmp_path: Path, failure: Callable[..., str]
) -> None:
    path = tmp_path / "out" / "c.partial" / f"text_document{suffix}"
    content = path.read_bytes()
    damaged = {"cut": content[:-1], "longer": content + b"\0", "other": b"\7" + content[1:]}
    path.write_bytes(damaged[kind])
    before = files_below(tmp_path / "out").keys()
    message = failure(main, *complete)
    assert message == f"{path}: damaged or lost; remove {path.parent} and start anew"
    assert files_below(tmp_path / "out").keys() - before <= {str(path.with_suffix(".idx"))}
    path.write_bytes(content)
    main([*map(str, complete)])
    assert open_pair(f"{tmp_path}/out/c_text_document")[1] > 0


def test_main_publishing_does_not_take_lost_files_for_done(
    complete: list[object], tmp_path: Path, failure: Callable[..., str]
) -> None:
    path = tmp_path / "out" / "c.partial" / "text_document.bin"
    path.unlink()
    assert failure(main, *complete).startswith(f"{path}: damaged or lost; remove")


def test_main_second_run_with_the_same_prefix_is_refused(
    begun: list[object], tmp_path: Path, failure: Callable[..., str]
) -> None:
    import fcntl

    ready, done = multiprocessing.get_context("fork").Pipe()

    def hold() -> None:
        with (tmp_path / "out" / "c.partial" / "lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            done.send(0)
            done.poll(60)

    holder = multiprocessing.get_context("fork").Process(target=hold)
    holder.start()
    ready.recv()
    try:
        message = failure(main, *begun, "--skip-bad-lines")
    finally:
        ready.send(0)
        holder.join()
    assert "c.partial: another run is writing there" in message
    main([*map(str, begun), "--skip-bad-lines"])


def test_main_index_equals_megatrons_own(numbers: Path, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    given = tmp_path / "in.jsonl"
    given.write_text('{"text": ["1 2", "3"]}\n{"text": ""}\n{"text": "4 5 6"}\n')
    main(["--input", str(given), "--output-prefix", str(tmp_path / "c"), *NULL])
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), np.uint16)
    for ids, lengths in (([1, 2, 3], [2, 1]), ([], []), ([4, 5, 6], [3])):
        builder.add_document(np.array(ids), lengths)
    builder.finalize(str(tmp_path / "m.idx"))
    assert pair_bytes(tmp_path / "c") == tuple(
        (tmp_path / f"m{end}").read_bytes() for end in (".bin", ".idx")
    )
