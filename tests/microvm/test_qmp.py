"""The monitor's client against peers that do everything but what they should."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from rollout.sandbox.microvm.qmp import QmpClient, QmpError

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
Peer = Callable[[socket.socket], None]


@pytest.fixture
def client_of() -> Iterator[Callable[[Peer], QmpClient]]:
    threads: list[threading.Thread] = []
    clients: list[QmpClient] = []

    def connect(peer: Peer) -> QmpClient:
        ours, theirs = socket.socketpair()

        def serve() -> None:
            with theirs:
                peer(theirs)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        clients.append(QmpClient(ours))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def answering(*answers: bytes) -> Peer:
    """Greets, and then gives one answer for each line that comes in."""

    def peer(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        for answer in (b'{"return": {}}\r\n', *answers):
            if not connection.recv(4096):
                return
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                connection.sendall(answer)
        with contextlib.suppress(ConnectionResetError):
            connection.recv(4096)

    return peer


def test_events_between_command_and_answer_are_kept(client_of) -> None:
    client = client_of(answering(b'{"event": "STOP"}\r\n{"return": 7}\r\n{"event": "RESUME"}\r\n'))
    client.negotiate(5)
    assert client.execute("x", timeout_s=5) == 7
    client.wait_event("RESUME", 5)
    client.wait_event("STOP", 5)


def test_a_refusal_is_told(client_of) -> None:
    client = client_of(answering(json.dumps({"error": {"desc": "no such thing"}}).encode() + b"\r\n"))
    client.negotiate(5)
    with pytest.raises(QmpError, match="no such thing"):
        client.execute("x", timeout_s=5)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"not json\r\n", "did not send JSON"),
        (b"[1, 2]\r\n", "did not send JSON"),
        (b"x" * (2 << 20), "endless line"),
        (b"", "in time"),
    ],
)
def test_garbage_and_silence_end_in_an_error(client_of, answer: bytes, reason: str) -> None:
    client = client_of(answering(answer))
    client.negotiate(5)
    with pytest.raises(QmpError, match=reason):
        client.execute("x", timeout_s=0.3)


def test_a_peer_that_closes(client_of) -> None:
    client = client_of(lambda connection: connection.sendall(GREETING[:10]))
    with pytest.raises(QmpError, match="gone"):
        client.negotiate(5)


def test_a_peer_that_sends_events_for_ever_does_not_hold_up_a_deadline(client_of) -> None:
    def peer(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        connection.recv(4096)
        connection.sendall(b'{"return": {}}\r\n')
        try:
            while True:
                connection.sendall(b'{"event": "NOISE"}\r\n' * 100)
        except OSError:
            return

    client = client_of(peer)
    client.negotiate(5)
    with pytest.raises(QmpError, match="in time"):
        client.execute("x", timeout_s=0.3)
    client.close()
