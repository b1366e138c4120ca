"""Builds a guest image from Debian packages, Python wheels and the agent: decisions are in `recipe`.

Stages: mmdebstrap makes the system (cached by its own key, since it takes most of the time), pip adds the
wheels, the agent's files go in, mkfs.erofs makes the read-only disk, cpio the initramfs. It works without
root where mmdebstrap can (user namespaces and the `uidmap` package); every file then belongs to the guest's
root.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from uuid import UUID

from rollout.errors import BootError
from rollout.sandbox.image.container import START_OF_CONTAINER, make_container_tree
from rollout.sandbox.image.oci import OciImage
from rollout.sandbox.image.recipe import GUEST_PYTHON, Recipe
from rollout.sandbox.image.store import Image, ImageStore, require_name

__all__ = ["REQUIRED_TOOLS", "build_image"]

REQUIRED_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "dpkg-deb": "dpkg",
    "mkfs.erofs": "erofs-utils",
    "cpio": "cpio",
    "zstd": "zstd",
    "bwrap": "bubblewrap",
}
"""Programs that a build needs, with the Debian package of each."""

_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "erofs", "overlay")
_EXCLUDED_FROM_SYSTEM = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_KERNEL_FOLDER = "rollout-kernel"
_SWITCH = "exec $bb switch_root /root"
_INITRAMFS_FOLDERS = ("bin", "dev", "disk", "layer", "modules", "root")

Log = Callable[[str], None]


def build_image(
    recipe: Recipe,
    payload: Mapping[str, bytes],
    *,
    name: str = "default",
    store: ImageStore | None = None,
    container: OciImage | None = None,
    log: Log = lambda line: None,
) -> Image:
    """Builds the image of a recipe, or finds it built, and gives it a name.

    Args:
        recipe: What it is made of.
        payload: The agent's files, by path in the guest's package folder.
        name: The name it gets in the store.
        store: Where it goes; the user's cache by default.
        container: The container image of the recipe, if it has one.
        log: Told one line a stage.

    Raises:
        BootError: The name is none, a program is missing (the message names the package), or a stage failed
            (with its last lines).
    """
    require_name(name)
    store = store or ImageStore()
    if (image := store.find_recipe(recipe.key)) is not None:
        store.name(name, image)
        log(f"image {image.digest[:12]} is built already")
        return image
    _require_tools()
    with store.scratch() as scratch:
        tree = scratch / "tree"
        _unpack(_system_tar(recipe, store, scratch, log), tree)
        log("installing wheels: " + ", ".join(recipe.wheels))
        _install_wheels(recipe.wheels, tree / "opt/rollout")
        for path, content in payload.items():
            target = tree / "opt/rollout" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        _compile_python(tree)
        log("packing the disk and the initramfs")
        output = scratch / "image"
        output.mkdir()
        kernel = scratch / "kernel"
        for package in sorted((tree / _KERNEL_FOLDER).glob("*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(kernel)], "unpacking the kernel")
        shutil.rmtree(tree / _KERNEL_FOLDER)
        shutil.copy(_only(kernel / "boot", "vmlinuz-*"), output / "vmlinuz")
        start = None if container is None else START_OF_CONTAINER
        _pack_initramfs(kernel, scratch / "initramfs", output / "initrd", start)
        if container is not None:
            log("unpacking the container image")
            tree = make_container_tree(container, tree, scratch / "container")
        _pack_disk(tree, recipe, output / "rootfs.erofs")
        image = store.add(output, asdict(recipe), key=recipe.key, name=name)
    log(f"image {image.digest[:12]}: {image.size_bytes / 1e6:.0f} MB in {image.path}")
    return image


def _require_tools() -> None:
    missing = {tool: package for tool, package in REQUIRED_TOOLS.items() if shutil.which(tool) is None}
    if missing:
        raise BootError(
            f"building a guest image needs {', '.join(missing)}; install with: "
            f"apt-get install {' '.join(sorted(set(missing.values())))}"
        )


def _system_tar(recipe: Recipe, store: ImageStore, scratch: Path, log: Log) -> Path:
    """The Debian system as a tar archive, with the kernel's packages unpacked in no place yet."""
    cached = store.root / "systems" / f"{recipe.system_key}.tar.zst"
    if cached.exists():
        return cached
    log(f"making a Debian {recipe.suite} system (about a minute)")
    arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    kernel = f"linux-image-cloud-{arch}"
    # The metapackage is resolved inside the new system, whose package lists are the ones that count.
    fetch = (
        f"cd /{_KERNEL_FOLDER} && apt-get -q download busybox-static "
        f"$(apt-cache depends --important {kernel} | sed -n 's/.*Depends: //p')"
    )
    output = scratch / "system.tar.zst"
    _run(
        [
            "mmdebstrap",
            "--variant=minbase",
            f"--include={','.join(('python3', 'ca-certificates', *recipe.packages))}",
            '--aptopt=Acquire::Languages "none"',
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED_FROM_SYSTEM),
            f'--customize-hook=mkdir -m 777 "$1/{_KERNEL_FOLDER}"',
            f'--customize-hook=chroot "$1" sh -c "{fetch.replace("$", chr(92) + "$")}"',
            recipe.suite,
            str(output),
        ],
        "making the Debian system",
    )
    cached.parent.mkdir(parents=True, exist_ok=True)
    output.replace(cached)
    return cached


def _unpack(archive: Path, tree: Path) -> None:
    tree.mkdir()
    # Device nodes need root and are not wanted: the guest's kernel makes them.
    owner = [] if os.geteuid() == 0 else ["--no-same-owner"]
    _run(
        ["tar", "--zstd", "-xf", str(archive), "-C", str(tree), "--exclude=./dev/*", *owner],
        "unpacking the Debian system",
    )


def _install_wheels(wheels: Sequence[str], target: Path) -> None:
    machine = platform.machine()
    tags = ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
    platforms = [f"--platform={tag}_{machine}" for tag in tags]
    _run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"),
            *("--disable-pip-version-check", "--root-user-action=ignore", "--only-binary=:all:"),
            *("--implementation=cp", f"--python-version={GUEST_PYTHON}", *platforms),
            *("--target", str(target), *wheels),
        ],
        "installing wheels for the guest",
    )


def _compile_python(tree: Path) -> None:
    """Byte-compiles with the guest's own Python, which the host's need not be."""
    _run(
        [
            *("bwrap", "--bind", str(tree), "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all"),
            *("/usr/bin/python3", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"),
            "/opt/rollout",
        ],
        "compiling the guest's Python files",
    )


def _pack_initramfs(kernel: Path, tree: Path, output: Path, start: str | None) -> None:
    """Packs the first file system; `start` is the command that goes on, instead of the usual one."""
    for folder in _INITRAMFS_FOLDERS:
        (tree / folder).mkdir(parents=True)
    shutil.copy(kernel / "bin/busybox", tree / "bin/busybox")
    order = _modules_in_load_order(kernel)
    for module in order:
        shutil.copy(module, tree / "modules" / module.name)
    (tree / "modules/order").write_text("".join(f"{module.name}\n" for module in order))
    script = resources.files("rollout.sandbox.image").joinpath("initramfs.sh").read_text()
    if start is not None:
        script = script[: script.index(_SWITCH)] + f"{_SWITCH} {start}\n"
    (tree / "init").write_text(script)
    (tree / "init").chmod(0o755)
    paths = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    archive = _run(
        ["cpio", "--quiet", "--reproducible", "--owner=0:0", "-o", "-H", "newc"],
        "packing the initramfs",
        stdin="\n".join(paths).encode(),
        cwd=tree,
    )
    output.write_bytes(archive)


def _modules_in_load_order(kernel: Path) -> list[Path]:
    """The needed kernel modules, each after those that it depends on (from each module's own `depends=`)."""
    files = {path.stem.replace("-", "_"): path for path in kernel.glob("lib/modules/*/kernel/**/*.ko")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = files.get(name)
        if path is None:
            raise BootError(f"the guest kernel has no module {name}")
        if path in order:
            return
        match = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in match.group(1).decode().split(",") if match else ():
            if needed:
                visit(needed.replace("-", "_"))
        order.append(path)

    for module in _MODULES:
        visit(module)
    return order


def _pack_disk(tree: Path, recipe: Recipe, output: Path) -> None:
    shutil.rmtree(tree / "var/lib/apt/lists", ignore_errors=True)
    volume_id = UUID(hex=recipe.key[:32], version=4)
    owner = [] if os.geteuid() == 0 else ["--all-root"]
    _run(
        ["mkfs.erofs", "-zlz4hc", "-T0", f"-U{volume_id}", "-x-1", *owner, str(output), str(tree)],
        "packing the disk",
    )


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise BootError(f"expected one {pattern} in the kernel package, found {len(found)}")
    return found[0]


def _run(argv: Sequence[str], doing: str, *, stdin: bytes = b"", cwd: Path | None = None) -> bytes:
    done = subprocess.run(argv, input=stdin, cwd=cwd, capture_output=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
        raise BootError(f"{doing} failed ({argv[0]} exit {done.returncode}): {' | '.join(lines[-3:])}")
    return done.stdout
