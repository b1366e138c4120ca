"""The check that every test goes through finds what it should, shown by tests that do leave something."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parent / "conftest.py").read_text()

LEAKY_AND_CLEAN = """
import os, subprocess, tempfile

def test_process():
    subprocess.Popen(["sleep", "3"], start_new_session=True)

def test_orphan():
    subprocess.run(["sh", "-c", "sleep 3 & exit 0"])

def test_descriptor():
    global KEPT
    KEPT = os.open("/dev/null", os.O_RDONLY)

def test_file():
    tempfile.mkdtemp()

def test_clean():
    subprocess.run(["true"], check=True)
    os.close(os.open("/dev/null", os.O_RDONLY))
    with tempfile.TemporaryDirectory():
        pass
"""


def test_each_kind_of_leak_is_reported_and_a_clean_test_passes(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.replace("GRACE_S = 10.0", "GRACE_S = 0.2"))
    pytester.makepyfile(LEAKY_AND_CLEAN)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore", "-rA")
    result.assert_outcomes(passed=5, errors=4)
    result.stdout.fnmatch_lines(["*the test left behind:*"])
    result.stdout.fnmatch_lines_random(
        [f"ERROR*::test_{kind}*" for kind in ("process", "orphan", "descriptor", "file")]
    )
    result.stdout.no_fnmatch_line("ERROR*::test_clean*")
