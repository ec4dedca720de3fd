import io
import json

import pytest

from shoal_cluster.cli.output import Output, PercentLines, Table, plain_lines, printable, seconds

TABLE = Table(title="Shards", columns=("shard", "rows"), rows=[("a", 5), ("long name", 12345)])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_table_aligns_text_left_and_numbers_right() -> None:
    assert plain_lines(TABLE) == [
        "Shards",
        "shard        rows",
        "a               5",
        "long name  12,345",
    ]


def test_plain_table_without_rows_keeps_its_head() -> None:
    assert plain_lines(Table(title="T", columns=("a", "b"), rows=[])) == ["T", "a  b"]


def test_control_characters_in_a_cell_are_written_out() -> None:
    lines = plain_lines(Table(title="T", columns=("a",), rows=[("\x1b[31mred\r\n",)]))
    assert lines[-1] == "\\x1b[31mred\\r"


def test_printable_keeps_letters_of_every_script_and_line_ends() -> None:
    assert printable("größe 大\nx\x07\x9b") == "größe 大\nx\\x07\\x9b"


def test_output_that_is_no_terminal_holds_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    output = Output(as_json=False)
    with output.progress("rows") as progress:
        for done in range(0, 101, 5):
            progress(done, 100)
    output.result({}, "head", TABLE)
    captured = capsys.readouterr()
    assert all(each.isprintable() or each == "\n" for each in captured.out + captured.err)
    assert captured.out.startswith("head\n\nShards\n")


def test_terminal_gets_a_drawn_table_without_reading_markup_in_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    Output(as_json=False).result({}, Table(title="T", columns=("a",), rows=[("[bold]x[/bold]",)]))
    assert "[bold]x[/bold]" in screen.getvalue()
    assert "┃" in screen.getvalue()


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Output(as_json=False).progress("rows") as progress:
        progress(50, 100)
    assert "50/100" in screen.getvalue()


def test_json_is_all_that_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=True)
    output.step("working")
    with output.progress("rows") as progress:
        progress(1, 1)
    output.result({"rows": 3}, TABLE)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"rows": 3}
    assert captured.err.splitlines()[0] == "working"


def test_percent_lines_come_once_a_tenth_and_end_at_a_hundred() -> None:
    lines: list[str] = []
    progress = PercentLines("rows", lines.append)
    for done in range(1001):
        progress(done, 1000)
    assert len(lines) == 11
    assert lines[-1] == "rows: 100 % (1,000 of 1,000)"


def test_percent_lines_are_silent_while_the_total_is_unknown_or_zero() -> None:
    lines: list[str] = []
    progress = PercentLines("rows", lines.append)
    progress(5, None)
    progress(0, 0)
    assert lines == []


@pytest.mark.parametrize(
    ("duration_ms", "text"), [(900, "1 s"), (119_000, "119 s"), (180_000, "3 min")]
)
def test_durations_read_well(duration_ms: int, text: str) -> None:
    assert seconds(duration_ms) == text
