"""What a command prints: lines, columns and JSON, of which nothing can steer a terminal."""

import json
import sys
from typing import Any

from lumina.runs.console import printable
from lumina.runs.journal import finite


def clean(text: str) -> str:
    """What may come from a file, on one line, without control characters or what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text.replace("\n", "\\n").replace("\t", "\\t")).encode(encoding, "backslashreplace").decode(encoding)


def say(text: str) -> None:
    print(clean(text))


def columns(rows: list[list[str]], words: tuple[int, ...] = (0,)) -> None:
    """Aligned columns; the columns of `words` to the left, numbers to the right."""
    rows = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        print("  ".join(cell.ljust(width) if i in words else cell.rjust(width) for i, (cell, width) in cells).rstrip())


def print_json(values: Any) -> None:
    print(json.dumps(finite(values), indent=2))


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
