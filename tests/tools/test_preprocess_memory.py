"""tools/preprocess_data.py: memory does not grow with the input."""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
from pathlib import Path

import pytest

from tools.preprocess_data import main


def _growth(given: Path, *flags: str) -> int:
    """Run the tool in a process of its own; by how many bytes it and its workers grew at most."""
    ours, theirs = multiprocessing.Pipe()

    def child() -> None:
        def peak(who: int) -> int:
            return resource.getrusage(who).ru_maxrss * 1024

        before = peak(resource.RUSAGE_SELF)  # what it has from the fork
        main(["--input", str(given), "--output-prefix", str(given.with_suffix("")), *flags])
        theirs.send(max(map(peak, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))) - before)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    grown: int = ours.recv()
    return grown


# The tool forks; so does Megatron's own. What pytest has loaded beside it starts threads.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
@pytest.mark.usefixtures("whole")  # has imported Megatron, once for both runs
def test_main_memory_does_not_grow_with_the_input(
    texts: list[str], hf_flags: list[str], tmp_path: Path
) -> None:
    """Measured: 0.1 to 2 MiB more for 12.6 MiB more of input."""
    lines = [
        json.dumps({"text": first + second}) + "\n"
        for first, second in zip(texts[::2], texts[1::2], strict=False)
    ]
    grown = []
    for copies in (4, 24):
        given = tmp_path / f"{copies}.jsonl"
        given.write_text(copies * "".join(lines))
        grown.append(_growth(given, "--workers", "2", *hf_flags))
    more = given.stat().st_size * 20 // 24
    assert grown[1] - grown[0] < more // 2
