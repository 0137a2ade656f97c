"""The quickstart: its parts, what it refuses, and one short run of the whole way."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

from _corpus import HELD_OUT, Document, QuickstartError, read_corpus, split  # noqa: E402
from _folder import MARKER, check_folder, prepare_folder  # noqa: E402

NOWHERE = Path("/nonexistent")
STEPS = 3
ENTRY_KEYS = {"first_lm_loss", "final_lm_loss", "checkpoint"}
PPL_KEYS = {"ppl", "ppl_high", "ppl_medium", "ppl_low"}
SUMMARY_KEYS = {
    "objectives",
    "tp",
    "steps",
    "train_tokens",
    "corpus_bytes",
    "vocab_size",
    "padded_vocab_size",
    "megatron_core",
    "torch",
    "device",
    "seconds",
}


def _python(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)


def _state(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with about 120 modules of the standard library, without its packages."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(os.__file__).parent.glob("[a-s]*.py")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the whole way: two objectives, few steps, tensor parallel 2."""
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    flags = ("--corpus", corpus, "--out", out, "--steps", str(STEPS), "--tp", "2")
    result = _python(EXAMPLES / "quickstart.py", *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "not evidence" in result.stdout
    return out


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((finished / "summary.json").read_text())
    return content


def test_read_corpus_is_the_standard_library_by_default() -> None:
    documents = read_corpus(None, NOWHERE)
    origins = [document.origin for document in documents]
    assert sum(len(document.text.encode()) for document in documents) >= 5_000_000
    assert "pydoc_data/topics.py" in origins
    assert not [origin for origin in origins if "site-packages" in origin]
    assert origins == [document.origin for document in read_corpus(None, NOWHERE)]


# Twenty documents and more: enough that one fits into the share that is held out.
@pytest.mark.parametrize("count", [20, 500])
def test_split_holds_out_its_share_whatever_the_order(count: int) -> None:
    documents = [Document(f"folder/{i}.txt", "word " * (50 + i % 7)) for i in range(count)]
    training, held = split(documents)
    share = sum(len(d.text) for d in held) / sum(len(d.text) for d in documents)
    assert 0 < share <= HELD_OUT
    assert share > HELD_OUT - 2 / count
    assert sorted(training + held) == sorted(documents)
    again = split(documents[::-1])
    assert [set(part) for part in again] == [set(training), set(held)]


def test_split_of_two_documents_leaves_neither_side_empty() -> None:
    long, short = Document("a", "x" * 9), Document("b", "x" * 3)
    assert split([long, short]) == ([long], [short])


# Cut at blank lines; at line ends where there are none; lines of .jsonl.
@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_read_corpus_cuts_a_single_text_without_loss(tmp_path: Path, separator: str) -> None:
    text = separator.join(f"line {i} " + "x" * 700 for i in range(40)) + "\n"
    (tmp_path / "book.txt").write_text(text)
    documents = read_corpus(tmp_path / "book.txt", NOWHERE)
    assert len(documents) == 14
    assert "".join(document.text for document in documents) == text
    # The file alone in a folder is cut alike.
    assert read_corpus(tmp_path, NOWHERE) == documents


def test_read_corpus_takes_lines_of_jsonl_and_leaves_out_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "eins"}\n\n{"text": "zwei\\u2028"}\n{"text": " "}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.txt").write_text("a run's own file")
    expected = [Document("a.jsonl:1", "eins"), Document("a.jsonl:3", "zwei\u2028")]
    assert read_corpus(tmp_path, tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "0 documents"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl:1: expected a JSON object"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: expected a JSON object"),
        ("a.jsonl.zst", b"", "decompress it first"),
    ],
)
def test_read_corpus_refuses(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QuickstartError, match=message):
        read_corpus(tmp_path / name, NOWHERE)


def test_check_folder_lets_only_its_own_folder_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    check_folder(out, overwrite=False)
    prepare_folder(out, ["ce", "mile"])
    (out / "mile" / "file").write_text("old")
    with pytest.raises(QuickstartError, match="--overwrite"):
        check_folder(out, overwrite=False)
    check_folder(out, overwrite=True)
    prepare_folder(out, ["ce"])
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "ce", "data", "logs"]
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(QuickstartError, match=r"other files \(thesis.txt\)"):
        check_folder(out, overwrite=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objectives", "ce,mule"), "no objective 'mule'; expected one or more of ce, mile"),
        (("--objectives", ""), "no objective ''"),
        (("--steps", "0"), "--steps 0: expected at least 1"),
        (("--tp", "3"), "--tp 3: expected 1"),
        (("--tp", "0"), "--tp 0: expected 1"),
        (("--corpus", "/nonexistent"), "0 documents"),
        (("--overwrite",), "holds other files (keep.txt)"),
    ],
)
def test_quickstart_refuses_before_any_work(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    out = tmp_path if "--overwrite" in flags else tmp_path / "out"
    result = _python(EXAMPLES / "quickstart.py", "--out", out, *flags)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("examples/quickstart.py: error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


# A step that fails, and one that is interrupted with its workers in sessions of their own.
STEP = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from _steps import one_line_errors, run
with one_line_errors("test"):
    run(sys.argv[3:], Path(sys.argv[2]), {})
"""


def test_run_shows_the_end_of_the_log_of_a_step_that_fails(tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    child = (sys.executable, "-c", "print('first'); raise SystemExit('the cause')")
    result = _python("-c", STEP, EXAMPLES, log, *child)
    assert result.returncode == 1
    assert f"test: error: step failed with status 1; the end of {log}:\n" in result.stderr
    assert result.stderr.endswith("    first\n    the cause\n")


@pytest.mark.slow
def test_run_ends_torchrun_and_its_workers_when_interrupted(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import time; print('started', flush=True); time.sleep(600)")
    log = tmp_path / "step.log"
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    command = [sys.executable, "-c", STEP, str(EXAMPLES), str(log), sys.executable, *words]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count("started") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == 130
    assert errors.strip() == "test: error: interrupted; the run's folder is incomplete"
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [words for words in commands if str(script).encode() in words]


@pytest.mark.slow
def test_quickstart_summary_holds_what_it_promises(summary: dict[str, Any], corpus: Path) -> None:
    assert set(summary) == SUMMARY_KEYS
    assert list(summary["objectives"]) == ["ce", "mile"]
    for entry in summary["objectives"].values():
        assert set(entry) == PPL_KEYS | ENTRY_KEYS
        assert entry["ppl_high"] < entry["ppl"] < entry["ppl_low"]
    assert (summary["tp"], summary["steps"]) == (2, STEPS)
    assert summary["train_tokens"] == STEPS * 4096
    assert summary["corpus_bytes"] == sum(path.stat().st_size for path in corpus.iterdir())
    assert summary["padded_vocab_size"] == summary["vocab_size"] == 4096


@pytest.mark.slow
def test_quickstart_trains_the_same_model_on_the_same_data(summary: dict[str, Any]) -> None:
    ce, mile = summary["objectives"].values()
    assert ce["first_lm_loss"] == pytest.approx(mile["first_lm_loss"], rel=1e-6)
    assert ce["final_lm_loss"] != mile["final_lm_loss"]
    assert ce["final_lm_loss"] < ce["first_lm_loss"]


@pytest.mark.slow
def test_quickstart_evaluation_can_be_repeated(
    finished: Path, summary: dict[str, Any], tmp_path: Path
) -> None:
    entry, data = summary["objectives"]["mile"], finished / "data"
    again = tmp_path / "again.json"
    flags = ["--load", entry["checkpoint"], "--data-prefix", data / "heldout_text_document"]
    flags += ["--token-frequency", data / "token_frequency.json", "--output", again]
    flags += ["--cpu"] * (summary["device"] == "cpu")
    result = _python(ROOT / "tools" / "evaluate.py", *flags)
    assert result.returncode == 0, result.stderr
    repeated = json.loads(again.read_text())
    # The number of threads changes the order of sums.
    for key in PPL_KEYS:
        assert repeated[key] == pytest.approx(entry[key], rel=1e-5)


@pytest.mark.slow
def test_quickstart_trains_nothing_on_held_out_text(finished: Path) -> None:
    origins = {
        name: {json.loads(line)["origin"] for line in (finished / "data" / name).open()}
        for name in ("train.jsonl", "heldout.jsonl")
    }
    assert origins["heldout.jsonl"]
    assert not origins["train.jsonl"] & origins["heldout.jsonl"]


@pytest.mark.slow
def test_quickstart_leaves_a_finished_run_alone(finished: Path, corpus: Path) -> None:
    before = _state(finished)
    assert {"quickstart.png", "summary.json"} <= set(before)
    result = _python(EXAMPLES / "quickstart.py", "--corpus", corpus, "--out", finished)
    assert result.returncode == 1
    assert "give --overwrite or a new --out" in result.stderr
    assert _state(finished) == before
