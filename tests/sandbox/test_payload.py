"""The guest's files are enough: an agent runs from them alone, with msgpack and without this package."""

from __future__ import annotations

import ast
import socket
import subprocess
import sys
from pathlib import Path

import msgpack

import rollout
from rollout.sandbox import wire
from rollout.sandbox.payload import PAYLOAD, payload_contents
from rollout.sandbox.wire import FrameDecoder

STANDARD_AND_PROMISED = set(sys.stdlib_module_names) | {"msgpack", "numpy", "gymnasium", "rollout"}


def unpack_payload(folder: Path) -> None:
    for path, content in payload_contents().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def test_an_agent_runs_from_the_payload_and_msgpack_alone(tmp_path: Path) -> None:
    unpack_payload(tmp_path)
    (tmp_path / "msgpack").symlink_to(Path(msgpack.__file__).parent)
    code = (
        "import sys;"
        f"sys.path.insert(0, {str(tmp_path)!r});"
        "from rollout.sandbox import agent;"
        f"assert agent.__file__.startswith({str(tmp_path)!r});"
        "agent.run(int(sys.argv[1]), int(sys.argv[1]))"
    )
    ours, theirs = socket.socketpair()
    with ours:
        command = [sys.executable, "-I", "-S", "-c", code, str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            requests = [
                ("ping", {}),
                ("exec", {"argv": ["echo", "hi"]}),
                ("env.make", {"env_id": "CartPole-v1"}),
            ]
            for number, (op, args) in enumerate(requests):
                ours.sendall(wire.frame({"id": number, "op": op, "args": args}))  # type: ignore[dict-item]
            decoder, answers = FrameDecoder(), []
            ours.settimeout(20)
            while len(answers) < len(requests):
                data = ours.recv(1 << 16)
                assert data, answers
                answers += decoder.feed(data)
        finally:
            ours.close()
            assert process.wait(20) == 0
    by_id = {answer["id"]: answer for answer in answers}  # type: ignore[index,call-overload]
    assert by_id[0] == {"id": 0, "ok": None}
    assert by_id[1]["ok"]["stdout"] == b"hi\n"  # type: ignore[index,call-overload]
    assert "no gymnasium" in by_id[2]["error"]["message"]  # type: ignore[index,call-overload]


def test_the_payload_imports_nothing_but_itself_and_what_guests_have() -> None:
    names = {path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for path in PAYLOAD}
    for path, content in payload_contents().items():
        for node in ast.walk(ast.parse(content)):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                modules = [node.module]
                if node.module in ("rollout", "rollout.sandbox"):
                    modules = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in modules:
                assert module.split(".")[0] in STANDARD_AND_PROMISED, (path, module)
                if module.startswith("rollout."):
                    assert module in names, (path, module)


def test_the_payload_is_what_is_installed() -> None:
    folder = Path(rollout.__file__).parent.parent
    assert {path: (folder / path).read_bytes() for path in PAYLOAD} == payload_contents()
