"""What the tests of the benchmark's table share: a small size, and reading it."""

import csv
from pathlib import Path

# Odd numbers of rows and columns per rank, for two ranks where collectives are counted.
SMALL = ["--tokens", "37", "--vocab", "514", "--threads", "2", "--rounds", "2"]


def read_rows(path: Path, **wanted: str) -> list[dict[str, str]]:
    """Return the rows whose columns have the wanted values."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def assert_phases(rows: list[dict[str, str]], empty: set[str]) -> None:
    """Expect a row per phase, sorted quantiles, and nothing missing but the `empty` columns."""
    assert [row["phase"] for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert {key for key, value in row.items() if not value} == empty
        values = [float(row[key]) for key in ("min_ms", "p20_ms", "p50_ms", "p80_ms")]
        assert values[0] > 0
        assert values == sorted(values)
