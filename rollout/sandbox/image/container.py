"""A guest's files made of a container image, with a Python of the agent's own beside them.

The agent needs a Python, and a container need not have one, nor a C library that ours could run on. So the
Debian system goes along whole in a folder of its own, and its Python is started by its own loader with its
own libraries: nothing of the container's is used for it, and no variable is set that the container's own
programs would see.

What the container says of its environment and working directory holds for every command. Its user does not:
commands run as root, as in the Debian image.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from rollout.errors import BootError
from rollout.sandbox.image.layers import unpack_layers
from rollout.sandbox.image.oci import OciImage

__all__ = ["START_OF_CONTAINER", "make_container_tree"]

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
runpy.run_module("rollout.sandbox.guest_init", run_name="__main__")
"""


def make_container_tree(image: OciImage, system: Path, tree: Path) -> Path:
    """Makes the root file system of a guest.

    Args:
        image: The container.
        system: The Debian system with the agent installed, which moves.
        tree: A new folder; returned.

    Raises:
        BootError: A layer is damaged or hostile, or the container has a file where a folder must be.
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
    start = start.replace("ENV", json.dumps({**_DEFAULT_ENV, **image.settings.env}))
    start = start.replace("WORKDIR", json.dumps(image.settings.workdir))
    (tree / _PACKAGE / "start.py").write_text(start)
    return tree
