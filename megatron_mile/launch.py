r"""Run any Megatron training script with the objective, without a changed line in it.

Usage:
    torchrun --nproc-per-node 8 -m megatron_mile.launch pretrain_gpt.py \
        --mile-objective mile --mile-gamma 1.0 [the job's own arguments]
    python -m megatron_mile.launch --help

Without a --mile flag the script runs as if it had been started directly.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import Namespace


def prepare(argv: list[str]) -> None:
    """Read the --mile flags in `argv` (without the script's name) and hook Megatron.

    Call it before the first import of megatron. CPU mode adds the flags it needs to `argv`. A
    second call with the same flags changes nothing, so a script that calls it may also be started
    by the launcher. Without a --mile flag the run is recorded beside its checkpoints and a resume
    watched: a checkpoint of another objective, or of other data, is refused.

    Raises:
        MileError: A flag does not fit, or Megatron is not as expected.
    """
    from megatron_mile import cpu_mode
    from megatron_mile.integration import arguments

    on_cpu = cpu_mode.wanted(argv)
    asks_help = "--help" in argv or "-h" in argv
    if not (arguments.given(argv) or on_cpu or asks_help):
        if any(word.split("=")[0] in ("--load", "--save") for word in argv):
            from megatron_mile.integration.job import watch_run

            watch_run()
        return
    settings: Namespace = arguments.parse(argv)
    notes: list[tuple[str, str]] = []
    if on_cpu:
        added = cpu_mode.missing_flags(argv)
        argv += added
        cpu_mode.enable()
        reason = "--mile-cpu" if settings.mile_cpu else "--distributed-backend gloo, no GPU"
        notes = [("cpu mode", reason), ("flags added", " ".join(added) or "none")]
        from megatron_mile.cpu_mode.hybrid_layers import use_local_layers

        if use_local_layers():
            notes.append(("hybrid spec", "local layers, as there is no Transformer Engine"))
    from megatron_mile.integration.job import hook_job

    hook_job(settings, notes)


def prepare_script() -> None:
    """Do what the launcher does, for the running script: its first line that concerns Megatron.

    `prepare` on the process's own command line; an error of ours ends the process with one line.
    """
    arguments = sys.argv[1:]
    with one_line_errors():
        prepare(arguments)
    sys.argv[1:] = arguments


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line on stderr instead of a traceback for errors of ours."""
    from megatron_mile.errors import MileError

    try:
        yield
    except MileError as error:
        # In one write: other ranks and torchrun write to the same place.
        sys.stderr.write(f"megatron_mile: error: {error}\n")
        sys.stderr.flush()
        # Other ranks wait in a collective: leave without the interpreter's orderly shutdown.
        sys.stdout.flush()
        os._exit(1)


def main(argv: Sequence[str]) -> None:
    """Run the script named first in `argv` with the rest as its command line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    script = argv[0]
    if not os.path.isfile(script):
        print(f"megatron_mile: error: no script at {script}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = list(argv)
    # As `python script` does: imports start in the folder of the file that a link leads to, and in
    # none under -P or PYTHONSAFEPATH, where `python -m` has put no folder in front either.
    if not getattr(sys.flags, "safe_path", False):  # from Python 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    with one_line_errors():
        prepare_script()
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
