"""Container images as root file systems: an OCI layout folder, or an archive of one or of `docker save`.

Every blob is compared with its digest before it is used, and nothing in an archive is trusted. How layers
become a file system is in `layers`. Not supported: layers that are elsewhere, and encrypted ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import tarfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rollout.errors import BootError
from rollout.sandbox.image.layers import BoundedTarInfo, Budget, entries_of, path_parts, write_file

__all__ = ["ImageSettings", "OciImage", "open_oci_image"]

_MAX_JSON_BYTES = 4 << 20
_MAX_DEPTH = 16
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_INDEX_TYPES = frozenset(
    {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}
)


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What a container image says about how programs run in it.

    Attributes:
        env: Environment variables.
        workdir: Working directory.
        user: User, with `:group` or without, by name or number; empty for root.
    """

    env: Mapping[str, str] = field(default_factory=dict[str, str])
    workdir: str = "/"
    user: str = ""


@dataclass(frozen=True, slots=True)
class OciImage:
    """An opened container image.

    Attributes:
        digest: Of its configuration, which names the content of every layer: its identity.
        settings: How programs run in it.
        layers: Files of its layers, lowest first, compared with their digests already.
        diff_ids: SHA-256 of each layer uncompressed.
    """

    digest: str
    settings: ImageSettings
    layers: Sequence[Path]
    diff_ids: Sequence[str]


@contextmanager
def open_oci_image(path: Path, scratch: Path) -> Generator[OciImage]:
    """Opens a container image.

    Args:
        path: A folder (OCI layout, or an unpacked `docker save`), or a tar archive of one.
        scratch: Where an archive is unpacked to meanwhile.

    Raises:
        BootError: There is none, it is damaged, or it is for another processor.
    """
    if path.is_dir():
        yield _open_folder(path)
        return
    folder = scratch / "oci"
    try:
        folder.mkdir()
        _unpack_archive(path, folder)
        yield _open_folder(folder)
    except OSError as error:
        raise BootError.wrap(error, f"cannot read the image {path}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack_archive(path: Path, folder: Path) -> None:
    try:
        with tarfile.open(path, tarinfo=BoundedTarInfo) as archive:
            _unpack_outer(archive, folder)
    except BootError:
        raise
    except Exception as error:  # of hostile archives the parser raises anything
        raise BootError.wrap(error, f"cannot read the image {path}") from error


def _unpack_outer(archive: tarfile.TarFile, folder: Path) -> None:
    """The archive around the layers: plain files, and links among them as `docker save` makes them."""
    links: list[tuple[Path, str]] = []
    budget = Budget()
    for entry in entries_of(archive):
        parts = path_parts(entry.name)
        if len(parts) > _MAX_DEPTH:
            raise BootError(f"the image's archive holds {entry.name[:120]!r}, which is too deep")
        target = folder.joinpath(*parts)
        budget.spend(entry.size)
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.isfile():
            write_file(archive, entry, target)
        elif entry.issym() or entry.islnk():
            links.append((target, entry.linkname if entry.islnk() else f"{entry.name}/../{entry.linkname}"))
        elif not entry.isdir():
            raise BootError(f"the image's archive holds {entry.name!r}, which is no file")
    for target, name in links:
        source = folder.joinpath(*path_parts(os.path.normpath(name)))
        if not source.is_file():
            raise BootError(f"the image's archive links {target.name!r} to nothing")
        shutil.copyfile(source, target)


def _open_folder(folder: Path) -> OciImage:
    if (folder / "index.json").is_file() and (folder / "blobs").is_dir():
        config, layers = _from_layout(folder)
    elif (folder / "manifest.json").is_file():
        config, layers = _from_docker(folder)
    else:
        raise BootError(f"{folder} is no container image: it has neither index.json nor manifest.json")
    settings = _mapping(_json(config, "the image's configuration"), "the image's configuration")
    here = _ARCHITECTURES.get(platform.machine(), platform.machine())
    if settings.get("architecture", here) != here or settings.get("os", "linux") != "linux":
        made_for = f"{settings.get('os')}/{settings.get('architecture')}"
        raise BootError(f"the image is for {made_for}, and this machine is linux/{here}")
    rootfs = _mapping(settings.get("rootfs", {}), "the image's rootfs")
    diff_ids = [_digest(each) for each in _list(rootfs.get("diff_ids", []), "the image's diff_ids")]
    if not layers or len(diff_ids) != len(layers):
        raise BootError(f"the image has {len(layers)} layers, and its configuration names {len(diff_ids)}")
    digest = hashlib.sha256(config).hexdigest()
    return OciImage(digest, _settings(settings.get("config") or {}), layers, diff_ids)


def _from_layout(folder: Path) -> tuple[bytes, list[Path]]:
    """Configuration and layers of an OCI layout (image-spec, `image-layout.md`)."""
    manifest: Any = _mapping(_json((folder / "index.json").read_bytes(), "index.json"), "index.json")
    for _ in range(4):  # an index may name another
        if "manifests" not in manifest:
            break
        entries = [_mapping(each, "index.json") for each in _list(manifest["manifests"], "index.json")]
        manifest = _json(_blob(folder, _chosen(entries)).read_bytes(), "a manifest")
        manifest = _mapping(manifest, "a manifest")
    config = _blob(folder, _mapping(manifest.get("config"), "a manifest's config")).read_bytes()
    layers = _list(manifest.get("layers"), "a manifest's layers")
    return config, [_blob(folder, _mapping(layer, "a layer")) for layer in layers]


def _chosen(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The image of this machine, of those that an index names."""
    here = _ARCHITECTURES.get(platform.machine(), platform.machine())
    fitting = [
        entry
        for entry in entries
        if (entry.get("platform") or {}).get("architecture", here) == here
        and (entry.get("platform") or {}).get("os", "linux") == "linux"
    ]
    if len(fitting) != 1:
        raise BootError(f"the image's index names {len(fitting)} images for linux/{here}; it must be one")
    return fitting[0]


def _from_docker(folder: Path) -> tuple[bytes, list[Path]]:
    """Configuration and layers of an unpacked `docker save`: the first image in it."""
    images = _list(_json((folder / "manifest.json").read_bytes(), "manifest.json"), "manifest.json")
    if len(images) != 1:
        raise BootError(f"the archive holds {len(images)} images; save one of them alone")
    image = _mapping(images[0], "manifest.json")
    config = _inner(folder, image.get("Config")).read_bytes()
    return config, [_inner(folder, layer) for layer in _list(image.get("Layers"), "manifest.json")]


def _inner(folder: Path, name: object) -> Path:
    path = folder.joinpath(*path_parts(str(name)))
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise BootError(f"the image's archive lacks {str(name)!r}")
    return path


def _blob(folder: Path, descriptor: Mapping[str, Any]) -> Path:
    """A file of a layout, compared with its digest."""
    digest = _digest(descriptor.get("digest"))
    path = folder / "blobs" / "sha256" / digest
    if not path.is_file():
        raise BootError(f"the image lacks the blob sha256:{digest}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise BootError(f"the image's blob sha256:{digest} is damaged: its checksum differs")
    return path


def _settings(config: object) -> ImageSettings:
    values = _mapping(config, "the image's config")
    env: dict[str, str] = {}
    for each in _list(values.get("Env") or [], "the image's Env"):
        name, equals, value = str(each).partition("=")
        if not (name and equals) or "\0" in str(each):
            raise BootError(f"the image's environment has {str(each)[:80]!r}, which is no variable")
        env[name] = value
    workdir = str(values.get("WorkingDir") or "/")
    if not workdir.startswith("/") or "\0" in workdir:
        raise BootError(f"the image's working directory is {workdir[:80]!r}, which is no absolute path")
    return ImageSettings(env, workdir, str(values.get("User") or ""))


def _json(content: bytes, what: str) -> object:
    if len(content) > _MAX_JSON_BYTES:
        raise BootError(f"{what} is longer than {_MAX_JSON_BYTES} bytes")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BootError(f"{what} of the image is damaged: {error}") from error


def _mapping(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BootError(f"{what} is damaged: it is no object")
    return cast("Mapping[str, Any]", value)


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BootError(f"{what} is damaged: it is no list")
    return cast("list[Any]", value)


def _digest(value: object) -> str:
    match = _DIGEST.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise BootError(f"the image names content by {str(value)[:80]!r}, which is no SHA-256 digest")
    return match.group(1)
