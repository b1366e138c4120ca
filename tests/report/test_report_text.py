"""Text of a run: short, in one line, and harmless to a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.report.text import duration_text, number_text, printable, size_text, value_text


@given(st.text(max_size=300), st.integers(1, 100))
def test_printable_is_bounded_and_has_no_control(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert shown.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words", "plain words"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("two\nlines\t", "two\\nlines\\t"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("lone \ud800", "lone \\ud800"),
        ("ä → 漢", "ä → 漢"),
    ],
)
def test_what_misleads_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_are_kept_when_asked_for() -> None:
    assert printable("SF\nHG\r", multiline=True) == "SF\nHG\\r"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (True, "true"),
        (3, "3"),
        (0.1 + 0.2, "0.3"),
        ("text", "text"),
        (b"\x00\xff", "00ff"),
        ([1, [2.5, "x"]], "[1, [2.5, x]]"),
        ({"a": 1, "b": [True]}, "{a: 1, b: [true]}"),
    ],
)
def test_values_as_text(value: object, shown: str) -> None:
    assert value_text(value) == shown


def test_a_huge_value_is_cut() -> None:
    assert len(value_text([0] * 1_000_000, 50)) == 50
    assert len(value_text({str(i): "x" * 1000 for i in range(1000)}, 50)) == 50


def test_numbers_and_units() -> None:
    assert [number_text(n) for n in (0, 12345, 1 / 3, -13.0, 1e-9, None)] == [
        "0", "12,345", "0.3333", "-13", "1e-09", "",
    ]  # fmt: skip
    assert [number_text(n) for n in (float("nan"), float("inf"))] == ["nan", "inf"]
    assert [duration_text(s) for s in (0.0021, 3.21, 61, 7261, None, float("nan"))] == [
        "2.1 ms", "3.21 s", "1 min 01 s", "2 h 01 min", "", "",
    ]  # fmt: skip
    assert [size_text(b) for b in (10, 2048, 3 << 20, 5 << 50)] == ["10 B", "2 KiB", "3 MiB", "5,120 TiB"]
