"""What commands print: results on stdout, steps and progress on stderr.

On a terminal: tables, colours and bars. Elsewhere: plain aligned columns and percentage lines with
no control characters. With --json: one JSON document on stdout and nothing else there.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

PERCENT_STEP = 10
"""A plain progress line each tenth: enough to see life, short enough for a log."""

_COLUMN_GAP = "  "

Cell = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a title. Numbers align right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Output:
    """Where one command prints. as_json: results go out as JSON, for programs."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json

    def result(self, document: Any, *shown: str | Table) -> None:
        """Prints the result: `document` with --json, else lines and tables for people."""
        if self.as_json:
            click.echo(json.dumps(document, indent=2, ensure_ascii=True, default=str))
            return
        for position, part in enumerate(shown):
            if isinstance(part, str):
                click.echo(printable(part))
                continue
            if position:
                click.echo()
            _print_table(part)

    def step(self, text: str) -> None:
        """Tells what is being done, on stderr."""
        click.echo(printable(text), err=True)

    @contextmanager
    def progress(self, text: str) -> Iterator[Callable[[int, int | None], None]]:
        """Yields a callback (done, total or None) that draws a bar or prints percentage lines."""
        stream = sys.stderr
        if not is_terminal(stream):
            yield PercentLines(text, self.step)
            return
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
        )
        with bar:
            task = bar.add_task(printable(text), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


class PercentLines:
    """Progress for logs: one line each PERCENT_STEP, never one twice."""

    def __init__(self, text: str, write: Callable[[str], None]) -> None:
        self._text = text
        self._write = write
        self._shown = -1

    def __call__(self, done: int, total: int | None) -> None:
        if not total:
            return
        reached = min(100, 100 * done // total) // PERCENT_STEP * PERCENT_STEP
        if reached > self._shown:
            self._shown = reached
            self._write(f"{self._text}: {reached} % ({done:,} of {total:,})")


def is_terminal(stream: IO[str]) -> bool:
    """Says whether control characters may be written to the stream."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Returns the text with control characters written out: data must not steer a terminal."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
        for each in text
    )


def plain_lines(table: Table) -> list[str]:
    """Returns the title and the rows in columns as wide as their longest cell."""
    cells = [[_text(cell) for cell in row] for row in table.rows]
    widths = [
        max(len(column), *(len(row[position]) for row in cells)) if cells else len(column)
        for position, column in enumerate(table.columns)
    ]
    numeric = _numeric_columns(table)

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return _COLUMN_GAP.join(padded).rstrip()

    return [printable(table.title), line(table.columns), *map(line, cells or [])]


def mib(size_bytes: int) -> str:
    """Returns a size in MiB, "-" for not known."""
    return f"{size_bytes / 2**20:,.0f} MiB" if size_bytes else "-"


def seconds(duration_ms: int) -> str:
    """Returns a duration in the unit a reader would choose."""
    duration_s = duration_ms / 1000
    if duration_s < 120:
        return f"{duration_s:.0f} s"
    return f"{duration_s / 60:.0f} min" if duration_s < 7200 else f"{duration_s / 3600:.0f} h"


def _text(cell: Cell) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:g}" if isinstance(cell, float) else printable(cell).replace("\n", " ")


def _numeric_columns(table: Table) -> list[bool]:
    return [
        bool(table.rows) and all(isinstance(row[position], int | float) for row in table.rows)
        for position in range(len(table.columns))
    ]


def _print_table(table: Table) -> None:
    stream = sys.stdout
    if not is_terminal(stream):
        click.echo("\n".join(plain_lines(table)))
        return
    drawn = RichTable(title=Text(printable(table.title)), title_justify="left")
    for column, right in zip(table.columns, _numeric_columns(table), strict=True):
        drawn.add_column(column, justify="right" if right else "left")
    for row in table.rows:
        # Text, not str: rich would read [brackets] in a name as markup.
        drawn.add_row(*(Text(_text(cell)) for cell in row))
    Console(file=stream).print(drawn)
