"""Where the tools write: never over an input, and looked at before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import samples
from support.tool_forker import ToolForker

from tools.common.cli import ToolError
from tools.common.outputs import keep_inputs, output_file, output_place

# Of each command, what it reads last: with that damaged, only an output that is looked at before
# the work can be what the error is about.
READ_LAST = {
    "count": "d_text_document.bin",
    "train": "in.jsonl.zst",
    "preprocess": "tok/tokenizer.json",
    "blend": "pile/p_Pile-CC_text_document.idx",
    "evaluate": "model/release/__0_0.distcp",
    "compare": "runs/mile/evaluation.json",
    "plot": "runs/mile/run_record.json",
}


@pytest.fixture
def folder(sample: Path, tmp_path: Path) -> Path:
    """A copy of the sample that may be changed."""
    return samples.copy(sample, tmp_path / "folder")


def _refused(forker: ToolForker, name: str, folder: Path, output: str) -> str:
    """Run a command that must refuse its output and change nothing; return the error."""
    command = samples.COMMANDS[name]
    before = samples.state_of(folder)
    done = forker.run(command.tool, [*command.flags, command.output[0], output], folder)
    assert (done.code, done.out) == (1, ""), done
    (line,) = done.err.splitlines()
    start, _, message = line.partition(": error: ")
    assert start == f"tools/{command.tool}.py"
    assert message.startswith(command.output[0])
    assert samples.state_of(folder) == before
    return message


# A name that the tool takes, which is a link to one of the inputs.
@pytest.mark.parametrize(
    ("name", "given", "link", "output"),
    [
        ("count", "d_text_document.bin", "out", "out"),
        ("count with a tokenizer", "tok/tokenizer.json", "out", "out"),
        ("preprocess", "in.jsonl", "out_text_document.bin", "out"),
        ("blend", "pile/p_ArXiv_text_document.info", "out", "out"),
        ("evaluate", "frequency.json", "out", "out"),
        ("evaluate", "model/release/.metadata", "out", "out"),
        ("compare", "runs/mile/evaluation.json", "out.svg", "out.svg"),
        ("plot", "runs/mile/run_record.json", "out.svg", "out.svg"),
    ],
)
def test_no_tool_writes_over_its_input(
    name: str, given: str, link: str, output: str, folder: Path, forker: ToolForker
) -> None:
    (folder / link).symlink_to(given)
    assert "would write over the input" in _refused(forker, name, folder, output)


def test_token_frequency_does_not_write_over_its_data(folder: Path, forker: ToolForker) -> None:
    message = _refused(forker, "count", folder, "d_text_document.bin")
    assert "over the input d_text_document.bin" in message


def test_training_a_tokenizer_keeps_an_input_in_its_folder(
    folder: Path, forker: ToolForker
) -> None:
    (folder / "new").mkdir()
    (folder / "in.jsonl").rename(folder / "new" / "tokenizer.json")
    before = samples.state_of(folder)
    # A name ending in .json is read as lines of JSON, so this would train.
    flags = ("--input", "new/tokenizer.json", "--output", "new", "--overwrite")
    done = forker.run("train_tokenizer", flags, folder)
    assert "would write over the input new/tokenizer.json" in done.err
    assert samples.state_of(folder) == before


@pytest.mark.parametrize("name", READ_LAST)
def test_an_output_is_checked_before_work(name: str, folder: Path, forker: ToolForker) -> None:
    for path in (folder / READ_LAST[name], folder / "in.jsonl"):
        path.write_bytes(b"{" + path.read_bytes()[1:])
    picture = samples.COMMANDS[name].output[1].endswith(".svg")
    output = "/proc/self/new" + ".svg" * picture
    assert "no file can be made in /proc" in _refused(forker, name, folder, output)
    (folder / "new.svg").mkdir()
    (folder / "new_text_document.idx").mkdir()
    (folder / "new").mkdir()
    (folder / "new" / "tokenizer.json").mkdir()
    expected = "holds a tokenizer" if name == "train" else "is a folder"
    assert expected in _refused(forker, name, folder, "new" + ".svg" * picture)


@pytest.mark.parametrize("name", ["compare", "plot"])
def test_a_picture_of_another_format_is_refused(
    name: str, folder: Path, forker: ToolForker
) -> None:
    for output in ("new", "new.docx", "new.json"):
        assert "ends in .png, .svg, .pdf" in _refused(forker, name, folder, output)


def test_preprocessing_takes_no_folder_of_others(folder: Path, forker: ToolForker) -> None:
    """PREFIX.partial is removed in the end, so nothing of others may lie in it."""
    (folder / "new.partial").mkdir()
    (folder / "new.partial" / "notes").write_text("mine")
    assert "holds other files (notes)" in _refused(forker, "preprocess", folder, "new")
    (folder / "new.partial" / "notes").rename(folder / "new.partial" / "weights.bin")
    assert "holds other files (weights.bin)" in _refused(forker, "preprocess", folder, "new")
    (folder / "new.partial" / "weights.bin").unlink()
    assert samples.run(forker, samples.COMMANDS["preprocess"], folder).code == 0  # nobody's
    assert not (folder / "new.partial").exists()
    (folder / "c.partial" / "in.bin").write_bytes((folder / "in.jsonl").read_bytes())
    flags = ("--input", "c.partial/in.bin", *samples.HF, "--output-prefix", "c")
    assert "would write over the input" in forker.run("preprocess_data", flags, folder).err


def test_an_earlier_output_is_replaced_and_a_link_written_through(
    folder: Path, forker: ToolForker
) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "new.json").symlink_to("elsewhere/new.json")  # which is not there yet
    for _ in range(2):
        assert samples.run(forker, samples.COMMANDS["count"], folder).code == 0
        assert os.readlink(folder / "new.json") == "elsewhere/new.json"
    frequencies = (folder / "elsewhere" / "new.json").read_bytes()
    assert frequencies == (folder / "frequency.json").read_bytes()
    assert len(list((folder / "elsewhere").iterdir())) == 1


def test_an_earlier_evaluation_in_the_models_folder_is_replaced(
    folder: Path, forker: ToolForker
) -> None:
    command = samples.COMMANDS["evaluate"]
    for _ in range(2):
        flags = [*command.flags, "--output", "model/release/evaluation.json"]
        assert forker.run("evaluate", flags, folder).code == 0
    message = _refused(forker, "evaluate", folder, "model/release/metadata.json")
    assert "would write over the input" in message


@pytest.mark.parametrize("kind", ["name", "link", "link to a link", "hard link", "from a link"])
@pytest.mark.parametrize("below", ["", "in", "in/deep"])
def test_an_input_is_known_by_every_name(kind: str, below: str, tmp_path: Path) -> None:
    given, output = tmp_path / "in" / "deep" / "a", tmp_path / "out"
    given.parent.mkdir(parents=True)
    given.write_text("text")
    inputs = [tmp_path / "missing", tmp_path / below if below else given]
    assert output_file("--output", output, inputs) == output
    if kind == "name":
        output = given
    elif kind == "hard link":
        output.hardlink_to(given)
    elif kind == "from a link":
        given.rename(output)
        given.symlink_to(output)
    else:
        output.symlink_to(given)
    if kind == "link to a link":
        output = tmp_path / "second"
        output.symlink_to("out")
    for check in (
        lambda: output_file("--output", output, inputs),
        lambda: keep_inputs("--output", [output], inputs),
    ):
        with pytest.raises(ToolError, match="--output would write over the input"):
            check()


def test_output_file_names_what_is_wrong_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    before = samples.state_of(tmp_path / "folder")
    for name, message in {
        "folder": "folder is a folder; name a file",
        "missing/a": "no folder for --output",
        "file/a": "no folder for --output",
        "pipe": "pipe is no regular file",
        "loop": "loop is no regular file",
        "x" * 250: "no file can be made in .* (File name too long)",
    }.items():
        with pytest.raises(ToolError) as error:
            output_file("--output", tmp_path / name, [])
        assert all(part in str(error.value) for part in message.split(" .* "))
    assert output_file("--output", tmp_path / "file", []) == tmp_path / "file"
    assert output_file("--output", tmp_path / "folder" / "a", []) == tmp_path / "folder" / "a"
    assert samples.state_of(tmp_path / "folder") == before == {}


def test_a_conversion_makes_the_folders_above_its_output(folder: Path, forker: ToolForker) -> None:
    command = samples.COMMANDS["convert to hf"]
    flags = [*command.flags, "--output", "models/small/mile"]
    before = samples.state_of(folder)
    done = forker.run(command.tool, [*flags, "--vocab-size", "1"], folder)  # found out late
    assert "a vocabulary of 1 does not fit" in done.err
    assert samples.state_of(folder) == before
    assert forker.run(command.tool, flags, folder).code == 0
    assert (folder / "models" / "small" / "mile" / "config.json").is_file()
    assert os.listdir(folder / "models" / "small") == ["mile"]
    in_file = [*command.flags, "--output", "in.jsonl/mile"]
    assert "in.jsonl is no folder" in forker.run(command.tool, in_file, folder).err


def test_output_place_looks_at_the_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output_place("--output", tmp_path / "a" / "b" / "c")
    output_place("--output", tmp_path / "file")
    with pytest.raises(ToolError, match="file is no folder; choose another place"):
        output_place("--output", tmp_path / "file" / "b")
    with pytest.raises(ToolError, match="no file can be made in /proc"):
        output_place("--output", "/proc/none/of/these")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
