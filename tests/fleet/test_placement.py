from __future__ import annotations

import pytest

from rollout.errors import CapacityError
from rollout.fleet.placement import Placement


def placement(*hosts: str, room: int = 4) -> Placement:
    made = Placement(room)
    for host in hosts:
        made.add(host)
    return made


def test_new_work_goes_where_there_is_most_room() -> None:
    fleet = placement("a", "b")
    assert [fleet.place(None, 2) for _ in range(4)] == ["a", "b", "a", "b"]
    assert fleet.place(None, 1) is None
    fleet.finish("b", 2)
    assert fleet.place(None, 2) == "b"


def test_among_idle_hosts_new_work_goes_where_least_is_held() -> None:
    fleet = placement("a", "b")
    fleet.hold(["x"], "a")
    assert fleet.place(None, 1) == "b"


def test_work_on_a_checkpoint_goes_to_its_holder_and_waits_for_it() -> None:
    fleet = placement("a", "b")
    fleet.hold(["x"], "b")
    assert fleet.place("x", 4) == "b"
    assert fleet.place("x", 1) is None
    assert fleet.place(None, 4) == "a"
    fleet.finish("b", 4)
    assert fleet.place("x", 1) == "b"
    assert fleet.in_flight == 5


def test_what_a_lost_host_held_is_gone() -> None:
    fleet = placement("a", "b")
    fleet.hold(["x", "y"], "b")
    fleet.place("x", 2)
    fleet.remove("b")
    fleet.remove("b")
    with pytest.raises(CapacityError, match="no host holds checkpoint x") as caught:
        fleet.place("x", 1)
    assert caught.value.retryable
    fleet.finish("b", 2)
    fleet.hold(["z"], "b")
    assert fleet.drop(["x", "y", "z"]) == {}
    assert fleet.in_flight == 0
    assert fleet.hosts == ["a"]


def test_without_hosts_work_waits() -> None:
    fleet = placement()
    assert fleet.place(None, 1) is None
    fleet.add("a")
    assert fleet.place(None, 1) == "a"


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(CapacityError, match="never fit"):
        placement("a").place(None, 5)


def test_drop_says_who_has_to_free_what() -> None:
    fleet = placement("a", "b")
    fleet.hold(["x", "y"], "a")
    fleet.hold(["z"], "b")
    assert fleet.drop(["x", "z", "unknown"]) == {"a": ["x"], "b": ["z"]}
    assert fleet.drop(["x"]) == {}
    assert fleet.holder("y") == "a"
