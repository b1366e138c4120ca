"""Tests of one group never run at the same time: many here count what there is on the whole machine."""

from __future__ import annotations

import pytest

ONE_OF_A_GROUP = """
import os, pathlib, time
import pytest

pytestmark = pytest.mark.xdist_group("group")

@pytest.mark.parametrize("number", range(6))
def test(number):
    time.sleep(0.05)  # long enough for another worker to take the next one
    worker = pathlib.Path(__file__).with_name(os.environ["PYTEST_XDIST_WORKER"])
    worker.touch()
"""


def test_a_group_runs_in_one_worker(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_one=ONE_OF_A_GROUP, test_two=ONE_OF_A_GROUP)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "2", "--dist", "loadgroup")
    result.assert_outcomes(passed=12)
    assert len(list(pytester.path.glob("gw*"))) == 1
