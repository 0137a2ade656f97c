r"""Evaluates trained models: perplexity by token frequency, benchmark scores, and a comparison.

    python tools/evaluate.py --load runs/mile/checkpoints \
        --data-prefix data/heldout_text_document \
        --token-frequency data/train_token_frequency.json --output runs/mile/evaluation.json

Perplexity of a Megatron checkpoint of any parallel layout, in one process. Every token of the data
but the first is predicted once, by plain cross-entropy whatever objective trained the model: the
documents are read as one stream, cut into windows of the training sequence length. With
--token-frequency (made by tools/token_frequency.py) the figures are also given for the high, medium
and low frequency tokens.

    python tools/evaluate.py --hf converted/mile --output runs/mile/evaluation.json

Scores of a Hugging Face folder, as tools/convert_checkpoint.py makes it, by lm-evaluation-harness:
at 0 and 5 shots on tasks in the style of the paper (--tasks, --shots). A task whose data is neither
cached nor to be reached is named and left out. --load and --hf may be given together.

    python tools/evaluate.py --compare runs/*/evaluation.json --picture comparison.png

The JSON: `checkpoint`, `iteration`, `data`, `tokens`, `cross_entropy` (nats), `ppl`, per bucket
`tokens_high`, `cross_entropy_high`, `ppl_high` and so on, `vocab_size`, `padded_vocab_size`,
`megatron_core`, `torch`, `device`; `harness` with `folder`, `lm_eval`, `scores` (shots, task,
metric) and `missing` (task, reason); `seconds`. A bucket without tokens has null.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.common.cli import ToolError, UsageError, new_parser, run_tool
from tools.common.files import json_text, write_whole
from tools.common.outputs import output_file
from tools.data.frequency_buckets import BUCKETS
from tools.data.pair_reader import files_of
from tools.evaluation.comparison import Evaluation, read_evaluation, read_evaluations, table
from tools.evaluation.harness import PAPER_SHOTS, PAPER_TASKS, run_harness

PROG = "tools/evaluate.py"


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one model.

    Args:
        args: parsed flags.

    Returns:
        The content of the JSON file.

    Raises:
        ToolError: model, data and frequencies cannot be used together, or no task has its data
            here and nothing else was asked for.
    """
    started = time.monotonic()
    result: dict[str, Any] = {}
    # First: the Hugging Face libraries read their environment once, and Megatron loads them too.
    if args.hf:
        result["harness"] = run_harness(
            args.hf,
            args.tasks,
            args.shots,
            task_folder=args.task_folder,
            batch_size=args.micro_batch_size,
            cpu=args.cpu,
        )
        _report_missing(result["harness"], alone=args.load is None)
    if args.load:
        from tools.evaluation.perplexity import perplexity

        figures = perplexity(
            args.load,
            args.ckpt_step,
            args.data_prefix,
            args.token_frequency,
            batch_size=args.micro_batch_size,
            cpu=args.cpu,
        )
        result = {**figures, **result}
    return {**result, "seconds": time.monotonic() - started}


def output_of(args: argparse.Namespace) -> Path | None:
    """Check --output before the work.

    Returns:
        The file to write, None for none.

    Raises:
        ToolError: it cannot be written, or is an input.
    """
    if args.output is None:
        return None
    inputs: list[Path] = [args.hf] if args.hf else []
    if args.load:
        from megatron_mile.integration.checkpoint_folder import TRACKER
        from tools.checkpoint.megatron_model import checkpoint_folder

        inputs += [checkpoint_folder(args.load, args.ckpt_step), Path(args.load, TRACKER)]
        inputs += files_of(args.data_prefix)
    if args.token_frequency:
        inputs.append(Path(args.token_frequency))
    return output_file("--output", args.output, [] if _is_evaluation(args.output) else inputs)


def _is_evaluation(path: str) -> bool:
    """Whether a file is an earlier evaluation, which may lie in the model's folder."""
    try:
        return bool(read_evaluation(Path(path)))
    except (ToolError, OSError):
        return False


def _report_missing(harness: dict[str, Any], alone: bool) -> None:
    """Say in one line which tasks had no data; raise it where nothing else is left to do."""
    missing = harness["missing"]
    if not missing:
        return
    message = (
        f"no data for {', '.join(missing)} ({next(iter(missing.values()))}); run once where the "
        "Hugging Face Hub can be reached and keep HF_HOME, or give --tasks"
    )
    if alone and not harness["scores"]:
        raise ToolError(message)
    print(f"{PROG}: left out: {message}", file=sys.stderr)


def perplexity_table(result: dict[str, Any]) -> str:
    """Lay the cross-entropies out for people."""
    rows = [f"{'tokens':10}{'count':>12}{'cross-entropy':>16}{'ppl':>12}"]
    for suffix in ("", *("_" + name for name in BUCKETS)):
        if result.get("ppl" + suffix) is not None:
            rows.append(
                f"{suffix[1:] or 'all':10}{result['tokens' + suffix]:>12,}"
                f"{result['cross_entropy' + suffix]:>16.4f}{result['ppl' + suffix]:>12.3f}"
            )
    return "\n".join(rows)


def compare(args: argparse.Namespace) -> None:
    """Print, and draw, several evaluations side by side.

    Args:
        args: parsed flags.

    Raises:
        ToolError: a file is not an evaluation, or the picture cannot be written.
    """
    if args.picture:
        from tools.common.picture import picture_file

        picture = picture_file("--picture", args.picture, args.compare)
    evaluations = read_evaluations(args.compare)
    print(table(evaluations))
    if args.picture:
        from tools.evaluation.comparison_picture import draw

        draw(evaluations, picture)


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument_group("perplexity").add_argument
    add("--load", help="Megatron checkpoint folder (torch_dist)")
    add("--ckpt-step", type=int, help="iteration (default: the latest)")
    add("--data-prefix", help="held-out data, path without .bin and .idx")
    add("--token-frequency", help="JSON of tools/token_frequency.py, for figures per bucket")
    add = parser.add_argument_group("benchmarks").add_argument
    add("--hf", type=Path, metavar="FOLDER", help="Hugging Face model folder")
    add(
        "--tasks",
        nargs="+",
        default=PAPER_TASKS,
        metavar="TASK",
        help=f"names of the harness (default: {' '.join(PAPER_TASKS)})",
    )
    add(
        "--shots",
        nargs="+",
        type=int,
        default=PAPER_SHOTS,
        metavar="N",
        help=f"examples in the prompt (default: {' '.join(map(str, PAPER_SHOTS))})",
    )
    add(
        "--task-folder",
        type=Path,
        help="folder with more task definitions (YAML, which may run Python)",
    )
    add = parser.add_argument_group("comparison").add_argument
    add(
        "--compare", nargs="+", type=Path, metavar="JSON", help="evaluations, named by their folder"
    )
    add("--picture", type=Path, help="picture of the comparison (.png, .svg or .pdf)")
    add = parser.add_argument
    add("--output", help="JSON file to write (default: none, the table only)")
    add(
        "--micro-batch-size",
        type=int,
        default=8,
        help="windows or requests at a time (default: %(default)s)",
    )
    add("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together.

    Raises:
        UsageError: two do not.
    """
    if bool(args.compare) == bool(args.load or args.hf):
        raise UsageError("give --load, --hf or both; or --compare with what they wrote")
    if bool(args.load) != bool(args.data_prefix):
        raise UsageError("--load and --data-prefix need each other")
    if args.picture and not args.compare:
        raise UsageError("--picture needs --compare")
    if args.compare and args.output is not None:
        raise UsageError("--output is for --load and --hf; --compare has --picture")
    if args.micro_batch_size < 1:
        raise UsageError(f"--micro-batch-size {args.micro_batch_size}: expected at least 1")
    if min(args.shots) < 0:
        raise UsageError(f"--shots {min(args.shots)}: expected 0 or more")


def evaluate(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: an input cannot be used, or the output not be written.
    """
    check_flags(args)
    if args.compare:
        compare(args)
        return
    output = output_of(args)
    result = evaluation(args)
    if output:
        write_whole(output, json_text(result))
    if args.load:
        print(perplexity_table(result))
    if args.hf:
        print(table([Evaluation(args.hf.name, {"harness": result["harness"]})]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), evaluate, argv)


if __name__ == "__main__":
    main()
