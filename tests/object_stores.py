"""Real servers of object stores on loopback, each in a process of its own.

What reaches for them runs in processes of its own too: Arrow's clients keep threads and descriptors for as
long as their process lives.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest

DEADLINE_S = 60.0


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = tmp_path_factory.mktemp("s3") / "log"
    with served(command, port, log):
        yield f"http://127.0.0.1:{port}"


@dataclass
class S3Bucket:
    """A bucket of an S3 server, with keys in its URIs.

    Attributes:
        server: Address of the server.
        name: Its name.
    """

    server: str
    name: str = field(default_factory=lambda: f"bucket-{uuid.uuid4().hex}")

    def uri(self, path: str, credentials: str = "key:secret@") -> str:
        """Of something in the bucket; whoever has no credentials in it needs them in the environment."""
        endpoint = quote(self.server, safe="")
        return f"s3://{credentials}{self.name}/{path}?region=us-east-1&endpoint_override={endpoint}"

    def make(self) -> None:
        self._ask("PUT", "")

    def put(self, key: str, data: bytes) -> None:
        self._ask("PUT", f"/{key}", data)

    def names(self, prefix: str = "") -> list[str]:
        listed = self._ask("GET", f"?list-type=2&prefix={quote(prefix)}").decode()
        return re.findall(r"<Key>([^<]*)</Key>", listed)

    def _ask(self, method: str, rest: str, data: bytes | None = None) -> bytes:
        url, headers = f"{self.server}/{self.name}{rest}", {"Content-Type": "application/octet-stream"}
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return answer.read()


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server of Google Cloud Storage; it has the bucket `bucket`."""
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory", "--quiet"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--default-bucket", "bucket"]
    with served(command, port, tmp_path_factory.mktemp("gcs") / "log"):
        yield port


FORWARD = """
import asyncio, sys

async def forward(reader, writer):
    far = await asyncio.open_connection("127.0.0.1", int(sys.argv[1]))
    await asyncio.gather(copy(reader, far[1]), copy(far[0], writer), return_exceptions=True)

async def copy(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()

async def main():
    async with await asyncio.start_server(forward, "127.0.0.1", int(sys.argv[2])) as server:
        await server.serve_forever()

asyncio.run(main())
"""


@dataclass
class GcsBucket:
    """A folder of the bucket of a GCS server, reached over a connection that can be cut.

    Attributes:
        server: Port of the server.
        folder: Where its log goes.
        name: Name of the folder.
        port: Port of the connection.
    """

    server: int
    folder: Path
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    port: int = field(default_factory=lambda: free_port())

    @contextlib.contextmanager
    def reachable(self) -> Iterator[None]:
        """It can be reached for as long as the context lasts."""
        command = [sys.executable, "-c", FORWARD, str(self.server), str(self.port)]
        with served(command, self.port, self.folder / "connection.log"):
            yield

    def uri(self, path: str) -> str:
        query = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&retry_limit_seconds=1"
        return f"gs://anonymous@bucket/{self.name}/{path}?{query}"

    def names(self) -> list[str]:
        url = f"http://127.0.0.1:{self.server}/storage/v1/b/bucket/o?prefix={self.name}/"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            return [each["name"] for each in json.load(answer).get("items", [])]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def served(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Runs a server until the context ends; it answers when the context begins."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()
