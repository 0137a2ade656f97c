"""What the quickstart is made of: its corpus, its folder, and how it runs and ends steps."""

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from _corpus import HELD_OUT, Document, QuickstartError, read_corpus, split
from _folder import MARKER, check_folder, prepare_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
NOWHERE = Path("/nonexistent")


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
    command = [sys.executable, "-c", STEP, str(EXAMPLES), str(log), *child]
    result = subprocess.run(command, capture_output=True, text=True)
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
    parent = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, a shell has set it to be ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
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
