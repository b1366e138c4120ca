"""The image store: a folder of immutable images, each named by the digest of its content.

Layout under the cache folder:

    images/<digest>/manifest.json   written last: an image without it does not exist
    images/<digest>/{vmlinuz,initrd,rootfs.erofs}
    names/<name>                    a text file with a digest, replaced atomically
    recipes/<key>                   likewise: what a recipe gave when it was last built

An image is verified by its checksums when it is asked for by `verify`, not at every boot: reading 100 MB for
each would cost more than the boot of a clone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.errors import BootError
from rollout.sandbox.image.recipe import payload_digest

__all__ = ["FILES", "Image", "ImageStore", "cache_dir", "require_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

FILES = ("vmlinuz", "initrd", "rootfs.erofs")


def cache_dir() -> Path:
    """Where images and bases are kept: `$ROLLOUT_CACHE`, or `rollout` in the user's cache folder."""
    if explicit := os.environ.get("ROLLOUT_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rollout"


@dataclass(frozen=True, slots=True)
class Image:
    """A built image.

    Attributes:
        digest: SHA-256 over the files' own digests.
        path: Its folder.
        sha256: Digest of each file.
        recipe: What it was built from, for people.
    """

    digest: str
    path: Path
    sha256: Mapping[str, str]
    recipe: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum((self.path / name).stat().st_size for name in self.sha256)

    def file(self, name: str) -> Path:
        """Path of one of `FILES`."""
        return self.path / name


class ImageStore:
    """Finds, adds and checks images. Safe for many processes at once: every change is one rename."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_dir()

    def add(self, folder: Path, recipe: Mapping[str, Any], *, key: str, name: str) -> Image:
        """Takes a folder with `FILES` into the store, which moves it, and names it.

        Raises:
            BootError: The store cannot be written.
        """
        sha256 = {file: _sha256_of_file(folder / file) for file in FILES}
        digest = hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest()
        image = Image(digest, self.root / "images" / digest, sha256, recipe)
        manifest = {"digest": digest, "sha256": sha256, "recipe": dict(recipe)}
        try:
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
            image.path.parent.mkdir(parents=True, exist_ok=True)
            if not (image.path / "manifest.json").exists():
                shutil.rmtree(image.path, ignore_errors=True)
                folder.rename(image.path)
            self._point("recipes", key, digest)
            self._point("names", name, digest)
        except OSError as error:
            raise BootError.wrap(error, f"cannot add an image to {self.root}") from error
        return image

    def adopt(self, folder: Path, digest: str, manifest: Mapping[str, Any]) -> Image:
        """Takes an image of another machine, whose `FILES` are in a folder, which moves; it gets no name.

        Raises:
            BootError: The files are not those of the digest, or the store cannot be written.
        """
        sha256 = {file: _sha256_of_file(folder / file) for file in FILES}
        if hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest() != digest:
            raise BootError(f"guest image {digest[:12]}: what came is another image, or damaged")
        recipe = dict(manifest)
        image = Image(digest, self.root / "images" / digest, sha256, recipe)
        try:
            text = json.dumps({"digest": digest, "sha256": sha256, "recipe": recipe}, indent=2)
            (folder / "manifest.json").write_text(text)
            image.path.parent.mkdir(parents=True, exist_ok=True)
            if not (image.path / "manifest.json").exists():
                shutil.rmtree(image.path, ignore_errors=True)
                folder.rename(image.path)
        except OSError as error:
            raise BootError.wrap(error, f"cannot add an image to {self.root}") from error
        return image

    def get(self, digest: str) -> Image | None:
        """The image of that digest, if it is here.

        Raises:
            BootError: Its manifest is damaged.
        """
        return self._load(digest)

    def find(self, name_or_digest: str) -> Image:
        """The image of that name or digest.

        Raises:
            BootError: There is none; the message names the command that builds it.
        """
        named = self._pointed("names", name_or_digest)
        image = self._load(named or name_or_digest)
        if image is None:
            raise BootError(
                f"no guest image {name_or_digest!r} in {self.root}; build it with: rollout image build"
            )
        return image

    def find_current(self, name_or_digest: str, payload: Mapping[str, bytes]) -> Image:
        """As `find`, and the image has the agent of this version of the package.

        Raises:
            BootError: There is none, or its agent is another version's: guest and host would not understand
                each other, or would compute differently.
        """
        image = self.find(name_or_digest)
        if image.recipe.get("payload_sha256") != payload_digest(payload):
            raise BootError(
                f"guest image {name_or_digest!r} was built by another version of this package; "
                "build it again with: rollout image build"
            )
        return image

    def find_recipe(self, key: str) -> Image | None:
        """The image that a recipe gave when it was last built, if it is still there."""
        digest = self._pointed("recipes", key)
        return self._load(digest) if digest else None

    def name(self, name: str, image: Image) -> None:
        """Gives an image one more name."""
        self._point("names", name, image.digest)

    def list(self) -> list[tuple[Image, list[str]]]:
        """Every image with its names, by digest."""
        names: dict[str, list[str]] = {}
        folder = self.root / "names"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            names.setdefault(path.read_text().strip(), []).append(path.name)
        images = self.root / "images"
        found = [self._load(path.name) for path in sorted(images.iterdir())] if images.is_dir() else []
        return [(image, names.get(image.digest, [])) for image in found if image is not None]

    def verify(self, image: Image) -> None:
        """Reads the whole image and compares its checksums.

        Raises:
            BootError: A file is missing, truncated or altered.
        """
        for name, expected in image.sha256.items():
            try:
                actual = _sha256_of_file(image.file(name))
            except OSError as error:
                raise BootError.wrap(error, f"guest image {image.digest[:12]}") from error
            if actual != expected:
                raise BootError(
                    f"guest image {image.digest[:12]}: {name} is damaged (its checksum differs); "
                    f"delete {image.path} and run: rollout image build"
                )

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """A temporary folder on the store's file system, from which content can be renamed into place."""
        parent = self.root / "tmp"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = Path(tempfile.mkdtemp(dir=parent))
        except OSError as error:
            raise BootError.wrap(error, f"cannot write to the cache folder {self.root}") from error
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _load(self, digest: str) -> Image | None:
        if not _NAME.fullmatch(digest):
            return None
        path = self.root / "images" / digest
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            return Image(manifest["digest"], path, dict(manifest["sha256"]), dict(manifest["recipe"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise BootError(
                f"guest image {digest[:12]}: damaged manifest ({error}); delete {path} and run: "
                "rollout image build"
            ) from error

    def _pointed(self, kind: str, name: str) -> str | None:
        if not _NAME.fullmatch(name):
            return None
        try:
            return (self.root / kind / name).read_text().strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _point(self, kind: str, name: str, digest: str) -> None:
        require_name(name)
        folder = self.root / kind
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", delete=False) as file:
            file.write(digest)
        Path(file.name).replace(folder / name)


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_name(name: str) -> None:
    """Refuses what cannot be the name of an image.

    Raises:
        BootError: It is not made of letters, digits, dots, underscores and dashes, or too long.
    """
    if not _NAME.fullmatch(name):
        raise BootError(f"an image cannot be called {name!r}: take letters, digits, '.', '_' and '-'")
