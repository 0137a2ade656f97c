"""What can happen to an input, a number or an output of a command: strategies for hypothesis."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from support import samples
from support.samples import Command

WHOLE = (
    *(b"", b"null", b"[]", b"{}", b"3", b'"a"', b"\xff\xfe\x00", b"\n\n", b"0" * 5000),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b'{"text": "a"}\n', b"PK\x03\x04"),
)
ODD_VALUES = (
    *(None, -1, 0, 1, 2.5, 10**12, 10**30, math.inf, math.nan, True, "", "x", "3", [], {}),
    *([[]], [None], {"a": 1}, "\ud800", ["x"] * 3, -(2**63), "../../x", "\x00"),
)
ODD_NUMBERS = (
    *("-1", "0", "1", "2", "3", "299", "300", "65500", "1000000000000", "9" * 30, "9" * 5000),
    *("", "x", "1.5", "nan", "-0", "1e3", "0x10", "2147483648", "-9223372036854775809"),
)
# {} is the name that the command gives its output.
ODD_OUTPUTS = (
    *("missing/{}", "folder/{}", "in.jsonl/{}", "{}/", "", ".", "..", "/proc/self/{}"),
    *("folder", "pipe", "loop", "x" * 300, "x" * 245, "{}\n", " ", "-", "a b", "é\udcff{}"),
    *("tok", "model", "runs", "pile", "c", "d", "$_$", "*{}", "[{}", "~/{}"),
)
# Arguments of a checkpoint that decide what is computed, or how.
BENT = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("padded_vocab_size", "vocab_size", "seq_length", "max_position_embeddings", "seed"),
    *("params_dtype", "untie_embeddings_and_output_weights", "num_query_groups", "swiglu"),
    *("group_query_attention", "add_bias_linear", "num_experts", "mtp_num_layers"),
    *("layernorm_epsilon", "rotary_base", "rotary_percent", "hybrid_layer_pattern"),
    *("qk_layernorm", "common.iteration", "common.args", "attention_dropout", "use_mup"),
    *("tokenizer_type", "tokenizer_model", "special_tokens", "make_vocab_size_divisible_by"),
)


class Case(NamedTuple):
    """One thing that is wrong."""

    kind: str
    target: str
    """The file, flag or argument that it is about."""
    place: float = 0.0
    """Where in the file, as a share of it."""
    value: Any = None


_START, _NOTHING = st.just(0.0), st.none()
_PLACES, _BYTES = st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)
_HEADER_FIELDS = st.tuples(
    st.sampled_from((9, 17, 18, 26, 34)), st.sampled_from((0, 1, 4, 7, 99, 255))
)


def cases(command: Command) -> st.SearchStrategy[Case]:
    """Everything that can be wrong with a command and its files."""
    files = st.sampled_from(command.inputs)
    kinds = [
        _case("cut", files, _PLACES),
        _case("flip", files, _PLACES, st.integers(0, 7)),
        _case("put", files, _PLACES, _BYTES),
        _case("add", files, _PLACES, _BYTES),
        _case("whole", files, value=st.sampled_from(WHOLE)),
        *(_case(kind, files) for kind in ("gone", "folder", "loop")),
        _case("output", st.just(command.output[0]), value=_outputs(command)),
    ]
    values = st.sampled_from(ODD_VALUES)
    if command.numbers:
        numbers = st.sampled_from(command.numbers)
        kinds.append(_case("number", numbers, value=st.sampled_from(ODD_NUMBERS)))
    if texts := [name for name in command.inputs if name.endswith((".json", ".info", "progress"))]:
        kinds += 2 * [_case("json", st.sampled_from(texts), _PLACES, values)]
        kinds.append(_case("json gone", st.sampled_from(texts), _PLACES))
    if indices := [name for name in command.inputs if name.endswith(".idx")]:
        kinds.append(_case("header", st.sampled_from(indices), value=_HEADER_FIELDS))
    if "model" in command.flags:
        kinds += 3 * [_case("bend", st.sampled_from(BENT), value=values)]
        kinds.append(_case("bend gone", st.sampled_from(BENT)))
    return st.one_of(kinds)


def _case(
    kind: str,
    target: st.SearchStrategy[str],
    place: st.SearchStrategy[float] = _START,
    value: st.SearchStrategy[Any] = _NOTHING,
) -> st.SearchStrategy[Case]:
    return st.tuples(st.just(kind), target, place, value).map(lambda parts: Case(*parts))


def _outputs(command: Command) -> st.SearchStrategy[str]:
    # With another output, a run that was begun is not what is read.
    inputs = [name for name in command.inputs if ".partial" not in name]
    links = [f"{kind} {name}" for kind in ("link", "hard link") for name in inputs]
    return st.sampled_from([*ODD_OUTPUTS, *inputs, *links])


def apply(case: Case, command: Command, folder: Path) -> list[str]:
    """Do it; return the flags of the command."""
    flags = [*command.flags, *command.output]
    if case.kind == "number":
        return [*flags, case.target, case.value]
    if case.kind == "output":
        return [*command.flags, case.target, _make_output(case.value, command, folder)]
    if case.kind.startswith("bend"):
        _bend(case, folder)
    else:
        _damage(case, folder / case.target)
    return flags


def _make_output(name: str, command: Command, folder: Path) -> str:
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    kind, _, given = name.rpartition("link ")
    if not given or given == name:
        return name.format(command.output[1])
    # A file that the command would write, under another name.
    path = folder / f"other{command.suffixes[0]}{Path(command.output[1]).suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind:
        path.hardlink_to(folder / given)
    else:
        path.symlink_to(folder / given)
    return f"other{Path(command.output[1]).suffix}"


def _bend(case: Case, folder: Path) -> None:
    if case.kind == "bend":
        samples.bend(folder / samples.MODEL, {case.target: case.value})
    else:
        with suppress(KeyError):  # an argument that this version has not
            samples.bend(folder / samples.MODEL, {}, missing=case.target)


def _damage(case: Case, path: Path) -> None:
    content = path.read_bytes()
    at = int(case.place * len(content))
    if case.kind in ("gone", "folder", "loop"):
        path.unlink()
        if case.kind == "folder":
            path.mkdir()
        elif case.kind == "loop":
            path.symlink_to(path.name)
        return
    time = path.stat()
    path.write_bytes(_damaged(case, content, at))
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))


def _damaged(case: Case, content: bytes, at: int) -> bytes:
    value = case.value
    if case.kind == "cut":
        return content[:at]
    if case.kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << value]) + content[at + 1 :]
    if case.kind == "put":
        return (content[:at] + value + content[at + len(value) :])[: len(content)]
    if case.kind == "add":
        return content[:at] + value + content[at:]
    if case.kind == "whole":
        return bytes(value)
    if case.kind == "header":
        size = 1 if value[0] == 17 else 8
        return content[: value[0]] + struct.pack("<Q", value[1])[:size] + content[value[0] + size :]
    return _with_odd_value(case, content)


def _with_odd_value(case: Case, content: bytes) -> bytes:
    """Put an odd value into a JSON document, or take one out."""
    document = {"": json.loads(content)}
    places = list(_places_of(document))
    holder, key = places[int(case.place * len(places))]
    if case.kind == "json":
        holder[key] = case.value
    else:
        del holder[key]
    return json.dumps(document.get("")).encode()


def _places_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in a JSON document, as its holder and its key there; few of long lists."""
    keys = value if isinstance(value, dict) else range(min(len(value), 3))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places_of(value[key])
