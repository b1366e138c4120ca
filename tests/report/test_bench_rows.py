"""Benchmarks: what a row says, and that a benchmark measures, prints and writes what it measured."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rollout.cli import main
from rollout.commands import bench, bench_crowds, bench_forks, bench_sandbox
from rollout.commands.bench_engine import Bench
from rollout.commands.bench_machine import describe_machine
from rollout.commands.bench_rival import measure_bare_fork, measure_start, private_mib
from rollout.commands.bench_row import (
    BenchRow,
    Rival,
    at_least,
    at_most,
    format_figure,
    markdown_table,
    quartiles,
)
from rollout.commands.bench_sandbox import rows
from rollout.errors import ForkError

NEEDS_PROCESS_ENGINE = pytest.mark.process


def test_a_row_is_the_median_and_the_quartiles() -> None:
    row = BenchRow.of("fork", [5.0, 1.0, 2.0, 4.0, 3.0], "ms", rivals=[Rival.of("bare", [30.0, 20.0, 10.0])])
    assert (row.value, row.spread, row.samples) == (3.0, (2.0, 4.0), 5)
    assert row.cells() == ("fork", "3 ms", "2 to 4 (n=5)", "", "bare: 20 ms (0.15x)")
    assert row.to_json()["beside"] == [{"name": "bare", "median": 20.0, "samples": 3, "ratio": 0.15}]


def test_quartiles_need_two_samples() -> None:
    assert quartiles([1.0]) is None
    assert quartiles([1.0, 2.0]) == (1.25, 1.75)
    assert BenchRow.of("x", [1.0], "ms").spread is None


@pytest.mark.parametrize(
    ("target", "value", "reached", "text"),
    [
        (at_most(10), 10.0, True, "≤ 10 ✓"),
        (at_most(10), 10.1, False, "≤ 10 ✗"),
        (at_least(150), 150.0, True, "≥ 150 ✓"),
        (at_least(150), 149.0, False, "≥ 150 ✗"),
    ],
)
def test_targets(target: object, value: float, reached: bool, text: str) -> None:
    row = BenchRow.of("x", [value], "ms", target=target)  # type: ignore[arg-type]
    assert row.reached is reached
    assert row.cells()[3] == text


def test_a_row_without_a_value_says_why() -> None:
    row = BenchRow.absent("fork", "ms", "no bubblewrap", target=at_most(1))
    assert row.cells() == ("fork", "-", "", "≤ 1", "no bubblewrap")
    assert row.reached is None
    assert row.to_json()["missing"] == "no bubblewrap"
    assert BenchRow.of("fork", [], "ms").missing == "no sample was taken"
    with pytest.raises(ValueError, match="needs a value or the reason"):
        BenchRow("fork", "ms", None)
    with pytest.raises(ValueError, match="needs a value or the reason"):
        BenchRow("fork", "ms", 1.0, missing="both")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00123, "0.00123"), (12.345, "12.3"), (123.4, "123"), (98765.4, "98,765")]
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert format_figure(value) == text


def test_ratios_read_well_on_both_sides() -> None:
    def beside(value: float, rival: float) -> str:
        return BenchRow.of("x", [value], "", rivals=[Rival("r", rival)]).cells()[4]

    assert beside(30, 2) == "r: 2 (15x)"
    assert beside(1, 200) == "r: 200 (1/200)"
    assert beside(1, 0) == "r: 0"
    assert beside(0, 1) == "r: 1 (0x)"


def test_markdown_is_one_table_a_subject() -> None:
    text = markdown_table(
        [
            BenchRow.of("a|b", [1.0], "ms", subject="inline"),
            BenchRow.of("c", [2.0], "ms", subject="process"),
            BenchRow.of("d", [3.0], "ms", subject="inline"),
        ],
        {"CPU": "some", "cores": "2"},
    )
    assert text.splitlines() == [
        "CPU some, cores 2",
        "",
        "| inline | median | quartiles | target | beside |",
        "|---|---|---|---|---|",
        "| a\\|b | 1 ms |  |  |  |",
        "| d | 3 ms |  |  |  |",
        "",
        "| process | median | quartiles | target | beside |",
        "|---|---|---|---|---|",
        "| c | 2 ms |  |  |  |",
    ]


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert {"CPU", "cores", "memory", "kernel", "QEMU", "Python", "rollout"} <= machine.keys()
    assert all(machine.values())


def test_rivals_are_really_forked_and_started() -> None:
    figures = measure_bare_fork(3)
    assert len(figures.fork_ms) == len(figures.branch_ms) == 3
    assert 0 < min(figures.fork_ms) < min(figures.branch_ms)
    assert 0 < figures.private_mib < 100
    (start_ms,) = measure_start(1)
    assert start_ms > min(figures.fork_ms)


def test_memory_of_a_process_that_is_gone() -> None:
    with pytest.raises(OSError, match="smaps_rollup"):
        private_mib(2**22 + 1)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_forks, "_WINDOW_S", 0.05)
    monkeypatch.setattr(bench_forks, "_NUM_WINDOWS", 2)
    monkeypatch.setattr(bench_forks, "DEEP", 4)


def check_rows(found: list[BenchRow], kind: str) -> dict[str, BenchRow]:
    assert {row.subject for row in found} == {kind}
    by_name = {row.name: row for row in found}
    assert len(by_name) == len(found)
    measured = [row for row in found if not row.missing]
    assert all(row.value is not None and row.value >= 0 for row in measured)
    for in_flight in (1, 4, 8):
        rate = by_name[f"whole branches, {in_flight} in flight"]
        assert rate.value is not None
        assert rate.value > 0
        assert [rival.name for rival in rate.rivals] == ["bare os.fork, one after the other"]
    assert by_name["processes left after 3 cycles"].value == 0
    assert by_name["descriptors left after 3 cycles"].value == 0
    assert by_name["files left after 3 cycles"].value == 0
    return by_name


@pytest.mark.usefixtures("short")
def test_the_inline_engine_is_measured() -> None:
    by_name = check_rows(list(rows(["inline"], samples=2, cycles=3, live=20)), "inline")
    assert by_name["20 live at once, lost"].value == 0
    assert by_name["private memory of an idle clone"].missing == "the clones have no processes of their own"


@NEEDS_PROCESS_ENGINE
@pytest.mark.usefixtures("short")
def test_the_process_engine_is_measured() -> None:
    by_name = check_rows(list(rows(["process"], samples=2, cycles=3)), "process")
    memory = by_name["private memory of an idle clone"].value
    assert memory is not None
    assert 0 < memory < 200


def test_an_engine_that_cannot_run_is_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path))  # there is no image here
    monkeypatch.setenv("PATH", "/nonexistent")
    found = list(rows(["microvm", "process"], samples=2, cycles=1))
    assert [row.subject for row in found] == ["microvm", "process"]
    assert [row.value for row in found] == [None, None]
    assert "apt-get install" in found[1].missing


def test_a_section_that_fails_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken_section(of: Bench) -> AsyncIterator[BenchRow]:
        yield BenchRow.of("before", [1.0], "ms", subject=of.kind)
        raise ForkError("no room")

    async def last(of: Bench) -> AsyncIterator[BenchRow]:
        yield BenchRow.of("after", [1.0], "ms", subject=of.kind)

    monkeypatch.setitem(bench_sandbox.SECTIONS, "inline", (broken_section, last))
    found = list(rows(["inline"], samples=2))
    assert [(row.name, row.missing) for row in found[1:]] == [
        ("before", ""),
        ("broken section", "ForkError: no room"),
        ("after", ""),
    ]


def test_one_section_is_measured_by_itself() -> None:
    names = [row.name for row in rows(["inline"], samples=2, cycles=3, live=5, only=["cycles"])]
    assert names == [
        "create and destroy a clone",
        "processes left after 3 cycles",
        "descriptors left after 3 cycles",
        "files left after 3 cycles",
        "memory grown after 3 cycles",
        "last tenth against first after 3 cycles",
    ]
    crowd = list(rows(["inline"], samples=2, cycles=3, live=5, only=["live-at-once", "cold-boot"]))
    assert [row.name.split(",")[0] for row in crowd] == ["cold boot", *["5 live at once"] * 3]


def test_what_cycles_leave_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []

    async def leaky(bench: Bench) -> float:
        (bench.scratch / f"left-{len(left)}").touch()
        left.append(os.open("/dev/null", os.O_RDONLY))
        return 1.0

    monkeypatch.setattr(bench_crowds, "_cycle", leaky)
    try:
        by_name = {row.name: row for row in rows(["inline"], samples=2, cycles=3, only=["cycles"])}
    finally:
        for descriptor in left:
            os.close(descriptor)
    assert by_name["files left after 3 cycles"].value == 3
    assert by_name["descriptors left after 3 cycles"].value == 3
    assert by_name["processes left after 3 cycles"].value == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--only", "cicles"], "no engine here has a section 'cicles'"),
        (["--only", "gvisor", "--engine", "process"], "no engine here has a section 'gvisor'"),
        (["--only", "live-at-once"], "live-at-once needs to know how many: --live 1000"),
    ],
)
def test_a_section_that_cannot_be_measured_is_named(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench("sandbox", *words) == 2
    assert complaint in capsys.readouterr().err


def run_bench(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *words])
    return int(exit_.value.code or 0)


@pytest.mark.usefixtures("short")
def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, markdown = tmp_path / "bench.json", tmp_path / "bench.md"
    options = ("--engine", "inline", "--samples", "2", "--cycles", "1")
    assert run_bench("sandbox", *options, "--json", str(json_file), "--markdown", str(markdown)) == 0
    printed = capsys.readouterr().out
    figures = json.loads(json_file.read_text())
    assert figures["bench"] == "sandbox"
    assert figures["machine"].keys() == describe_machine().keys()
    for row in figures["rows"]:
        assert row["name"] in printed
        assert f"| {row['name']} |" in markdown.read_text()


def test_what_was_measured_before_an_interrupt_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(module: str) -> Iterator[BenchRow]:
        yield BenchRow.of(f"first of {module}", [1.0], "ms")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_rows_of", interrupted)
    assert run_bench("sink", "--json", str(tmp_path / "bench.json")) == 130
    assert [row["name"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]] == [
        "first of bench_sink"
    ]
    assert "first of bench_sink" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run_bench("sandbox", option, str(tmp_path / "missing" / "file")) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    assert run_bench("sandbox", option, str(tmp_path), "--engine", "nothing") == 2
    assert "there is no engine 'nothing'" in capsys.readouterr().err
