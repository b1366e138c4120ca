"""A guest's files made of a container image, with a Python of the agent's own beside them.

The agent needs a Python, and a container need not have one, nor a C library that ours could run on. So the
Debian system goes along whole in a folder of its own, and its Python is started by its own loader with its
own libraries: nothing of the container's is used for it, and no variable is set that the container's own
programs would see.

What the container says of its environment, working directory and user holds for every command. The agent
itself is root, and so is what it does: reading and writing files, and playing environments.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rollout.errors import BootError
from rollout.sandbox.image.layers import unpack_layers
from rollout.sandbox.image.oci import OciImage

__all__ = ["START_OF_CONTAINER", "User", "make_container_tree", "user_of"]

_PREFIX = "opt/rollout-system"
_PACKAGE = "opt/rollout"
_FOLDERS = ("dev", "proc", "sys", "run", "tmp", "root", "opt")
_PYTHON = f"/{_PREFIX}/usr/bin/python3"
_LIBRARIES = f"/{_PREFIX}/usr/lib/x86_64-linux-gnu:/{_PREFIX}/lib/x86_64-linux-gnu"
_LOADER = f"/{_PREFIX}/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
_DEFAULT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
START_OF_CONTAINER = (
    f"{_LOADER} --library-path {_LIBRARIES} --argv0 {_PYTHON} {_PYTHON} -I /{_PACKAGE}/start.py"
)
"""The command that follows the initramfs, in the new root."""
_START = """# Made with the image: what its container says of commands, and then the agent.
import os
import runpy
import sys

os.environ.clear()
os.environ.update(ENV)
os.makedirs(WORKDIR, exist_ok=True)
os.chdir(WORKDIR)
sys.path.insert(0, "/PACKAGE")
from rollout.sandbox import agent_command
agent_command.command_user = USER
runpy.run_module("rollout.sandbox.guest_init", run_name="__main__")
"""


def make_container_tree(image: OciImage, system: Path, tree: Path) -> Path:
    """Makes the root file system of a guest.

    Args:
        image: The container.
        system: The Debian system with the agent installed, which moves.
        tree: A new folder; returned.

    Raises:
        BootError: A layer is damaged or hostile, the container has a file where a folder must be, or its user
            does not exist.
    """
    tree.mkdir()
    tree.chmod(0o755)
    unpack_layers(image.layers, image.diff_ids, tree)
    for name in _FOLDERS:
        folder = tree / name
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise BootError(f"the container has a link or a file at /{name}, where a guest needs a folder")
        folder.mkdir(exist_ok=True)
    for name in (_PREFIX, _PACKAGE):
        if os.path.lexists(tree / name):
            raise BootError(f"the container has something at /{name}, where the agent goes")
    shutil.move(system / _PACKAGE, tree / _PACKAGE)
    shutil.rmtree(system / "var", ignore_errors=True)
    shutil.move(system, tree / _PREFIX)
    start = _START.replace("PACKAGE", _PACKAGE)
    user = user_of(image.settings.user, tree)
    home = {} if user is None else {"HOME": user.home}
    start = start.replace("ENV", json.dumps({**_DEFAULT_ENV, **home, **image.settings.env}))
    start = start.replace("USER", repr(None if user is None else (user.uid, user.gid)))
    start = start.replace("WORKDIR", json.dumps(image.settings.workdir))
    (tree / _PACKAGE / "start.py").write_text(start)
    return tree


@dataclass(frozen=True, slots=True)
class User:
    """Who commands run as."""

    uid: int
    gid: int
    home: str


def user_of(name: str, tree: Path) -> User | None:
    """The user that a container names, looked up in its own files; None for root.

    Args:
        name: `user`, `user:group`, by name or number; empty for root.
        tree: The container's root folder.

    Raises:
        BootError: It has no such user or group.
    """
    wanted, _, wanted_group = name.partition(":")
    users = _lines(tree / "etc/passwd", 7)
    found = next((line for line in users if wanted in (line[0], line[2])), None)
    if found is None and wanted and not wanted.isdecimal():
        raise BootError(f"the container's user {wanted!r} is not in its /etc/passwd")
    uid, gid, home = (int(found[2]), int(found[3]), found[5]) if found else (int(wanted or 0), 0, "/")
    if wanted_group:
        groups = _lines(tree / "etc/group", 4)
        line = next((line for line in groups if wanted_group in (line[0], line[2])), None)
        if line is None and not wanted_group.isdecimal():
            raise BootError(f"the container's group {wanted_group!r} is not in its /etc/group")
        gid = int(line[2] if line else wanted_group)
    return None if (uid, gid) == (0, 0) else User(uid, gid, home or "/")


def _lines(file: Path, num_fields: int) -> list[list[str]]:
    """The well-formed lines of a container's file; none where it is missing or a link (it may lead out)."""
    if file.is_symlink() or file.parent.is_symlink() or not file.is_file():
        return []
    lines = [line.split(":") for line in file.read_text(errors="replace").splitlines()]
    numbered = [line for line in lines if len(line) >= num_fields and line[2].isdecimal()]
    return [line for line in numbered if num_fields == 4 or line[3].isdecimal()]
