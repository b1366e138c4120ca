"""A guest made of a container image that has no Python: built by the command, booted, forked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_container_images import Entry, layer, layout

from rollout.config import EngineConfig, ImageConfig
from rollout.errors import BootError
from rollout.sandbox.engines import what_is_missing
from rollout.sandbox.image.container import User, user_of
from rollout.sandbox.image.recipe import recipe_of
from rollout.sandbox.image.store import ImageStore, cache_dir
from rollout.sandbox.microvm.engine import MicroVMEngine
from rollout.sandbox.payload import payload_contents

_missing = what_is_missing("microvm", ImageConfig())
_system = cache_dir() / "systems" / f"{recipe_of(ImageConfig(), payload_contents()).system_key}.tar.zst"
pytestmark = [
    pytest.mark.microvm,
    pytest.mark.xdist_group("microvm"),
    pytest.mark.skipif(_missing is not None, reason=_missing or ""),
    pytest.mark.skipif(not _system.exists(), reason="no Debian system in the cache to take the agent's from"),
]
TOOLS = ("sh", "cat", "pwd", "env", "ls", "echo", "id")


def container(folder: Path) -> Path:
    """Two layers: a shell, and a change to what the first one has."""
    initrd = ImageStore().find("default").file("initrd").read_bytes()
    busybox = subprocess.run(
        ["cpio", "-i", "--quiet", "--to-stdout", "bin/busybox"], input=initrd, capture_output=True, check=True
    ).stdout
    shell: list[Entry] = [("dir", "bin", None), ("file", "bin/busybox", busybox)]
    shell += [("link", f"bin/{name}", "busybox") for name in TOOLS]
    shell += [("dir", "srv", None), ("file", "srv/gone", b""), ("file", "srv/kept", b"kept")]
    shell += [("dir", "etc", None), ("file", "etc/passwd", b"nobody:x:65534:65533::/nowhere:/bin/sh\n")]
    return layout(folder, [layer(shell), layer([("file", "srv/.wh.gone", b"")])])


async def test_a_container_without_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = container(tmp_path / "image")
    cache = tmp_path / "cache"
    (cache / "systems").mkdir(parents=True)
    (cache / "systems" / _system.name).symlink_to(_system)
    monkeypatch.setenv("ROLLOUT_CACHE", str(cache))
    build = [sys.executable, "-m", "rollout.cli", "image", "build", "--from", str(image)]
    done = subprocess.run(  # noqa: ASYNC221 - nothing else runs meanwhile
        [*build, "--name", "box"], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    config = EngineConfig(kind="microvm", accel="tcg")
    async with MicroVMEngine(config, ImageConfig()) as engine:
        machine = await engine.boot("box")
        said = await machine.exec(["sh", "-c", "pwd; ls; cat kept; echo; echo $A; ls /bin/python3"])
        assert said.stdout.split() == [b"/srv", b"kept", b"kept", b"b=c"]
        assert b"No such file" in said.stderr
        who = await machine.exec(["sh", "-c", "id -u; id -g; id -G; echo $HOME; echo x > /srv/kept"])
        assert who.stdout.split() == [b"65534", b"65533", b"65533", b"/nowhere"]
        assert b"denied" in who.stderr
        assert (await machine.exec(["cat"], cwd="/", env={"A": "z"}, stdin=b"x")).stdout == b"x"
        await machine.call("env.make", env_id="FrozenLake-v1", kwargs={"is_slippery": False})
        await machine.call("env.reset", seed=1)
        [clone] = await engine.fork(await machine.checkpoint())
        step = await clone.call("env.step", action=1)
        assert isinstance(step, dict)
        assert step["observation"] == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", None),
        ("root", None),
        ("0:0", None),
        ("app", User(1000, 100, "/home/app")),
        ("1000", User(1000, 100, "/home/app")),
        ("app:staff", User(1000, 50, "/home/app")),
        ("7:8", User(7, 8, "/")),
        ("0:staff", User(0, 50, "/root")),
    ],
)
def test_users_are_looked_up_in_the_container(tmp_path: Path, name: str, expected: User | None) -> None:
    (tmp_path / "etc").mkdir()
    users = "root:x:0:0::/root:/bin/sh\napp:x:1000:100::/home/app:/bin/sh\nbad:x:many:0::/:/bin/sh\n"
    (tmp_path / "etc/passwd").write_text(users)
    (tmp_path / "etc/group").write_text("staff:x:50:\n")
    assert user_of(name, tmp_path) == expected
    for unknown in ("nobody", "app:nobody"):
        with pytest.raises(BootError, match="nobody"):
            user_of(unknown, tmp_path)


def test_users_are_not_looked_up_outside(tmp_path: Path) -> None:
    (tmp_path / "etc").symlink_to("/etc")
    with pytest.raises(BootError, match="'daemon' is not in its /etc/passwd"):
        user_of("daemon", tmp_path)


def test_an_image_of_a_container_wants_a_name(tmp_path: Path) -> None:
    for words in (["--from", str(tmp_path)], ["--from", str(tmp_path), "--name", "x"]):
        done = subprocess.run(
            [sys.executable, "-m", "rollout.cli", "image", "build", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (1, 2)
        assert done.stderr.count("\n") == 1
        assert "--name" in done.stderr or "no container image" in done.stderr
