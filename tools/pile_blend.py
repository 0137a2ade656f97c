r"""Blends the Pile's 22 domains as the MiLe Loss paper's code did, for Megatron's `--data-path`.

    python tools/pile_blend.py data/pile --output data/pile/blend.txt
    torchrun ... pretrain_gpt.py --data-args-path data/pile/blend.txt ...

    torchrun ... pretrain_gpt.py --data-path $(python tools/pile_blend.py data/pile) ...

The folder holds the pairs that `tools/preprocess_data.py --split-domains` wrote, such as
pile_Pile-CC_text_document.idx and .bin. Where a domain has several (pile-00_..., pile-01_...), they
share its weight by their tokens. The table goes to stderr, the value for --data-path to stdout or,
with --output, into a file for --data-args-path. Every pair is checked to be whole, and all must
have been made with one tokenizer, as far as their .info files say.

The weights are those of configs/pile_sampling_rates.json in the authors' code
(github.com/suu990901/LLaMA-MiLe-Loss, commit 4930a02), which are used divided by their sum; they
are not the Pile paper's. What the MiLe paper itself says about them is not confirmed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # of this checkout; and no command hides a package of its name
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.common.cli import ToolError, library_errors, new_parser, run_tool
from tools.common.files import write_whole
from tools.common.outputs import output_file
from tools.data.pair_reader import SUFFIXES, open_pair
from tools.data.work_folder import file_name

PROG = "tools/pile_blend.py"
# As in the source, where they sum to 1.6998.
WEIGHTS = {
    "ArXiv": 0.1997321993112564,
    "BookCorpus2": 0.010042401030659676,
    "Books3": 0.16402588784694672,
    "DM Mathematics": 0.05021200701594353,
    "Enron Emails": 0.0029569293837994337,
    "EuroParl": 0.01562151312828064,
    "FreeLaw": 0.08954474329948425,
    "Github": 0.09623967856168747,
    "Gutenberg (PG-19)": 0.048119839280843735,
    "HackerNews": 0.01171613484621048,
    "NIH ExPorter": 0.004742245189845562,
    "OpenSubtitles": 0.0238507017493248,
    "OpenWebText2": 0.1735103726387024,
    "PhilPapers": 0.007252845447510481,
    "Pile-CC": 0.1550993025302887,
    "PubMed Abstracts": 0.05355947092175484,
    "PubMed Central": 0.2823030650615692,
    "StackExchange": 0.10265565663576126,
    "USPTO Backgrounds": 0.0585806742310524,
    "Ubuntu IRC": 0.02287435717880726,
    "Wikipedia (en)": 0.11214014142751694,
    "YoutubeSubtitles": 0.015063601545989513,
}
_ENDING = "_text_document"


class Share(NamedTuple):
    """One pair in the blend."""

    domain: str
    prefix: str
    tokens: int
    weight: float
    """Of all samples; the weights of a blend sum to 1."""


def blend(folder: Path, renormalize: bool) -> list[Share]:
    """Weigh the pairs in a folder.

    Args:
        folder: holds the pairs.
        renormalize: whether domains without a pair are left out instead of an error.

    Returns:
        The pairs in the order of `WEIGHTS`, those of one domain by name.

    Raises:
        ToolError: domains are missing, a pair is damaged or empty, or tokenizers differ.
    """
    prefixes = {domain: _pairs(folder, domain) for domain in WEIGHTS}
    for prefix in itertools.chain([str(folder)], *prefixes.values()):
        if not prefix.isprintable() or " " in prefix:
            raise ToolError(
                f"{prefix!r}: Megatron splits blends at white space and reads UTF-8; rename it"
            )
    missing = [domain for domain, found in prefixes.items() if not found]
    if missing and (len(missing) == len(WEIGHTS) or not renormalize):
        raise ToolError(
            f"{folder}: no *_DOMAIN{_ENDING}.idx for {len(missing)} of {len(WEIGHTS)} domains: "
            f"{', '.join(missing)}; make them with tools/preprocess_data.py --split-domains, or "
            "give --renormalize to do without"
        )
    _check_tokenizers([prefix for found in prefixes.values() for prefix in found])
    total = sum(WEIGHTS[domain] for domain, found in prefixes.items() if found)
    return [
        share
        for domain, found in prefixes.items()
        for share in _shares(domain, found, WEIGHTS[domain] / total)
    ]


def _pairs(folder: Path, domain: str) -> list[str]:
    """List the prefixes of a domain's pairs, whole or not."""
    ending = file_name(domain) + _ENDING
    files = (file for suffix in SUFFIXES for file in folder.glob(f"*{ending}{suffix}"))
    stems = sorted({file.stem for file in files})
    return [str(folder / stem) for stem in stems if stem == ending or stem.endswith(f"_{ending}")]


def _check_tokenizers(prefixes: Sequence[str]) -> None:
    """Refuse pairs whose .info files name different tokenizers."""
    from megatron_mile.run_record import data_files  # the import takes seconds

    tokenizers = {}
    for path in (f"{prefix}.info" for prefix in prefixes):
        if os.path.isfile(path):  # Megatron's own tool makes none
            try:
                tokenizers[path] = data_files.tokenizer_of(path)
            except (ValueError, LookupError, TypeError, RecursionError):
                raise ToolError(f"{path}: damaged; preprocess the domain again") from None
    with library_errors():
        data_files.check_tokenizers(tokenizers)


def _shares(domain: str, prefixes: Sequence[str], weight: float) -> list[Share]:
    """Divide the weight of a domain among its pairs by their tokens."""
    tokens = [open_pair(prefix)[1] for prefix in prefixes]
    for prefix, count in zip(prefixes, tokens, strict=True):
        if not count:
            raise ToolError(f"{prefix}.bin: no tokens; remove the pair")
    return [
        Share(domain, prefix, count, weight * count / sum(tokens))
        for prefix, count in zip(prefixes, tokens, strict=True)
    ]


def table(shares: Sequence[Share]) -> str:
    """Lay the blend out for people."""
    rows = [f"{'domain':20}{'weight':>9}{'tokens':>18}  pair"]
    rows += [
        f"{share.domain:20}{share.weight:>9.3%}{share.tokens:>18,}  {share.prefix}"
        for share in shares
    ]
    left_out = [domain for domain in WEIGHTS if domain not in {share.domain for share in shares}]
    if left_out:
        rows.append(f"left out: {', '.join(left_out)}")
    return "\n".join(rows)


def command_line() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = new_parser(PROG, __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="holds the .idx and .bin files of the domains")
    add("--output", type=Path, help="file for --data-args-path (default: to stdout)")
    add(
        "--renormalize",
        action="store_true",
        help="leave missing domains out and scale the other weights up",
    )
    return parser


def pile_blend(args: argparse.Namespace) -> None:
    """Run the tool.

    Args:
        args: parsed flags.

    Raises:
        ToolError: the pairs make no blend, or the output cannot be written.
    """
    if args.output:
        pairs = [file for end in SUFFIXES for file in args.folder.glob(f"*{end}")]
        output = output_file("--output", args.output, pairs)
    shares = blend(args.folder, args.renormalize)
    print(table(shares), file=sys.stderr)
    value = " ".join(f"{share.weight:.10f} {share.prefix}" for share in shares)
    if args.output:
        write_whole(output, value + "\n")
    else:
        print(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line (default: that of the process)."""
    run_tool(command_line(), pile_blend, argv)


if __name__ == "__main__":
    main()
