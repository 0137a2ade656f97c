"""From nothing to trained and compared models, on real Megatron, with one command.

    make quickstart                      (or: python examples/quickstart.py)
    python examples/quickstart.py --objectives ce,mile,focal --steps 200 --corpus my_texts/

Takes text that every machine has (the standard library of the running Python) or --corpus, holds
some documents out, trains a tokenizer, preprocesses, trains the same small LLaMA-style model once
for each objective through torchrun, evaluates each on the held-out documents, and draws the runs.
On GPUs where there are any, else on the CPU.

The run's folder then holds summary.json (written last: a folder without it is not complete), the
picture, and for each objective TensorBoard files, checkpoint and evaluation; logs/ has the output
of every step. The numbers demonstrate that everything works; at this size they prove nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A clone that is not installed is found too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _corpus import Document, QuickstartError, read_corpus, split, write
from _folder import BUCKETS, PICTURE, check_folder, prepare_folder, report, write_summary
from _steps import Stages, one_line_errors, run, torchrun
from _toy import BATCH, GPT, HYBRID, INITIAL, MODEL, SCHEDULE, SEQUENCE, VOCABULARY, Layout, cores
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from megatron_mile.objectives import NEED_INPUTS, OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
PROG = "examples/quickstart.py"
FINAL_STEPS = 10
ITERATION = re.compile(r" iteration +(\d+)/.* lm loss: (\S+)")


class Quickstart:
    """One run: its folder, and the stages in their order."""

    def __init__(
        self,
        out: Path,
        objectives: Sequence[str],
        steps: int,
        layout: Layout,
        layers: Sequence[str] = GPT,
    ) -> None:
        """Plan a run.

        Args:
            out: the run's folder, absolute, from `prepare_folder`.
            objectives: names of `OBJECTIVES`.
            steps: of `BATCH` sequences of `SEQUENCE` tokens, for each objective.
            layout: devices and tensor parallel size.
            layers: flags of the model's layers, `GPT` or `HYBRID`.
        """
        self.layers = layers
        self.out, self.objectives, self.steps, self.layout = out, objectives, steps, layout
        self.stage = Stages(5 + 2 * len(objectives))
        data = out / "data"
        self.train_text, self.held_text = data / "train.jsonl", data / "heldout.jsonl"
        self.train_data = data / "train_text_document"
        self.held_data = data / "heldout_text_document"
        self.frequency = data / "token_frequency.json"
        self.tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer"]
        self.tokenizer += ["--tokenizer-model", str(data / "tokenizer")]

    def tool(self, name: str, flags: Sequence[str], log: str) -> None:
        """Run a script of tools/ with its output in logs/."""
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *flags]
        run(command, self.out / "logs" / f"{log}.log", self.layout.env(1))

    def make_data(self, documents: Sequence[Document]) -> None:
        """Make tokenizer, data and token frequencies from the documents."""
        with self.stage(f"corpus: {len(documents):,} documents, held out by hash") as notes:
            training, held = split(documents)
            write(training, self.train_text)
            write(held, self.held_text)
            notes.append(f"{len(training):,} to train on, {len(held):,} held out")
        with self.stage("tokenizer: byte-level BPE of the training documents"):
            flags = ["--input", str(self.train_text), "--vocab-size", str(VOCABULARY)]
            flags += ["--output", self.tokenizer[-1]]
            self.tool("train_tokenizer", flags, log="tokenizer")
        with self.stage("preprocess: text to Megatron's .bin and .idx"):
            for text in (self.train_text, self.held_text):
                flags = ["--input", str(text), "--output-prefix", str(text.with_suffix(""))]
                flags += ["--append-eod", "--workers", str(min(cores(), 8)), *self.tokenizer]
                self.tool("preprocess_data", flags, log=f"preprocess_{text.stem}")
        with self.stage("token frequency: high, medium and low of the training data"):
            flags = ["--data-prefix", str(self.train_data), "--output", str(self.frequency)]
            flags += self.tokenizer
            self.tool("token_frequency", flags, log="token_frequency")

    def train(self, objective: str) -> None:
        """Train the model with one objective; the log's iterations move a progress bar."""
        folder, tp = self.out / objective, self.layout.tp
        command = [*torchrun(tp), str(ROOT / "examples" / "pretrain_gpt.py")]
        command += ["--mile-objective", objective, *MODEL, *self.layers, *INITIAL, *SCHEDULE]
        command += self.tokenizer
        command += ["--train-iters", str(self.steps), *self.layout.flags(), "--split", "100,0,0"]
        command += ["--data-path", str(self.train_data)]
        if objective in NEED_INPUTS:
            command += ["--mile-token-frequency", str(self.frequency)]
        command += ["--data-cache-path", str(self.out / "data" / "cache")]
        command += ["--tensorboard-dir", str(folder / "tensorboard"), "--ckpt-format", "torch_dist"]
        command += ["--save", str(folder / "checkpoints"), "--save-interval", str(self.steps)]
        with (
            self.stage(f"train {objective}: {self.steps} steps, tensor parallel {tp}") as notes,
            tqdm(total=self.steps, unit="step", disable=None, leave=False) as bar,
        ):

            def follow(line: str) -> None:
                if match := ITERATION.search(line):
                    bar.set_postfix_str(f"lm loss {float(match[2]):.3f}", refresh=False)
                    bar.update(int(match[1]) - bar.n)

            run(command, self.out / "logs" / f"train_{objective}.log", self.layout.env(tp), follow)
            first, final = self.losses(objective)
            notes.append(f"lm loss {first:.3f} -> {final:.3f}")

    def losses(self, objective: str) -> tuple[float, float]:
        """Return the plain cross-entropy of the first step, and the mean of the last ones."""
        events = EventAccumulator(
            str(self.out / objective / "tensorboard"), size_guidance={"scalars": 0}
        )
        values = [scalar.value for scalar in events.Reload().Scalars("lm loss")]
        final = values[-FINAL_STEPS:]
        return values[0], sum(final) / len(final)

    def evaluate(self, objective: str) -> dict[str, Any]:
        """Evaluate the trained model; return what evaluation.json holds."""
        folder = self.out / objective
        result = folder / "evaluation.json"
        with self.stage(f"evaluate {objective}: plain perplexity on the held-out text") as notes:
            flags = ["--load", str(folder / "checkpoints"), "--data-prefix", str(self.held_data)]
            flags += ["--token-frequency", str(self.frequency), "--output", str(result)]
            flags += ["--cpu"] if self.layout.on_cpu else []
            self.tool("evaluate", flags, log=f"evaluate_{objective}")
            content: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            notes.append(f"PPL {content['ppl']:.1f} over {content['tokens']:,} tokens")
        return content

    def plot(self) -> None:
        """Draw the runs."""
        with self.stage("picture"):
            folders = [str(self.out / objective) for objective in self.objectives]
            self.tool("plot_runs", [*folders, "--output", str(self.out / PICTURE)], log="plot")

    def summary_of(self, objective: str, evaluation: dict[str, Any]) -> dict[str, Any]:
        """Return the entry of one objective in summary.json."""
        first, final = self.losses(objective)
        return {
            **{key: evaluation[key] for key in ("ppl", *(f"ppl_{name}" for name in BUCKETS))},
            "first_lm_loss": first,
            "final_lm_loss": final,
            "checkpoint": str(self.out / objective / "checkpoints"),
        }

    def run(self, documents: Sequence[Document]) -> dict[str, Any]:
        """Run every stage; return the content of summary.json, its last file."""
        started = time.monotonic()
        self.make_data(documents)
        results = {}
        for objective in self.objectives:
            self.train(objective)
            results[objective] = self.evaluate(objective)
        self.plot()
        conditions = results[self.objectives[0]]
        summary = {
            "objectives": {name: self.summary_of(name, result) for name, result in results.items()},
            "tp": self.layout.tp,
            "steps": self.steps,
            "train_tokens": self.steps * BATCH * SEQUENCE,
            "corpus_bytes": sum(len(document.text.encode()) for document in documents),
            **{key: conditions[key] for key in ("vocab_size", "padded_vocab_size")},
            **{key: conditions[key] for key in ("megatron_core", "torch", "device")},
            "seconds": time.monotonic() - started,
        }
        write_summary(self.out, summary)
        return summary


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line (default: that of the process)."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = ",".join(OBJECTIVES)
    add("--objectives", default="ce,mile", help=f"any of {names} (default: %(default)s)")
    add("--steps", type=int, default=60, help="of each training (default: %(default)s)")
    add("--tp", type=int, help="tensor parallel size (default: 2, or 1 where there is one GPU)")
    add("--out", default="runs/quickstart", help="the run's folder (default: %(default)s)")
    add("--hybrid", action="store_true", help="train HybridModel instead of GPTModel, same layers")
    add("--overwrite", action="store_true", help="replace an earlier run in --out")
    add("--corpus", help="file or folder of text (default: Python's standard library)")
    return parser.parse_args(argv)


def quickstart(args: argparse.Namespace) -> None:
    """Run the command.

    Args:
        args: parsed flags of `parse_args`.

    Raises:
        QuickstartError: a flag, the corpus or the folder cannot be used (nothing is changed then),
            or a step failed.
    """
    objectives = list(dict.fromkeys(args.objectives.split(",")))
    unknown = [name for name in objectives if name not in OBJECTIVES]
    if unknown:
        raise QuickstartError(
            f"--objectives {args.objectives}: no objective {unknown[0]!r}; expected one or more "
            f"of {', '.join(OBJECTIVES)}, with commas between"
        )
    if args.steps < 1:
        raise QuickstartError(f"--steps {args.steps}: expected at least 1")
    layout = Layout(args.tp)
    out = Path(args.out).resolve()
    check_folder(out, args.overwrite)
    corpus = Path(args.corpus).resolve() if args.corpus else None
    if corpus and (corpus == out or out in corpus.parents):
        raise QuickstartError(f"--corpus {corpus} lies in --out {out}; choose another --out")
    documents = read_corpus(corpus, left_out=out)
    prepare_folder(out, objectives)
    layers = HYBRID if args.hybrid else GPT
    print(report(Quickstart(out, objectives, args.steps, layout, layers).run(documents), out))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    args = parse_args(argv)
    with one_line_errors(PROG):
        quickstart(args)


if __name__ == "__main__":
    main()
