"""Container images, made here by hand: what becomes of their layers, and what of hostile ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.errors import BootError
from rollout.sandbox.image import layers as layers_module
from rollout.sandbox.image.layers import Budget, path_parts, unpack_layers
from rollout.sandbox.image.oci import ImageSettings, open_oci_image

Entry = tuple[str, str, Any]
"""(kind, path, content or target)"""
KINDS = {
    "dir": tarfile.DIRTYPE,
    "link": tarfile.SYMTYPE,
    "hard": tarfile.LNKTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
}
SETTINGS = {"Env": ["PATH=/bin", "A=b=c"], "WorkingDir": "/srv", "User": "nobody"}
LAYERS: list[list[Entry]] = [
    [
        ("dir", "etc", None),
        ("file", "etc/kept", b"kept"),
        ("file", "etc/gone", b"gone"),
        ("dir", "data", None),
        ("file", "data/old", b"old"),
        ("dir", "data/sub", None),
        ("file", "data/sub/old", b"old"),
        ("file", "tool", b"#!"),
        ("file", "becomes-folder", b"file"),
    ],
    [
        ("file", "etc/.wh.gone", b""),
        ("file", "data/new", b"new"),
        ("file", "data/.wh..wh..opq", b""),
        ("hard", "tool-again", "tool"),
        ("link", "also-etc", "/etc"),
        ("file", ".wh.becomes-folder", b""),
        ("file", "becomes-folder/inside", b"x"),
    ],
    [("file", "also-etc/through-link", b"y"), ("char", "dev/null", None), ("file", "etc/kept", b"newer")],
]


def layer(entries: Sequence[Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind, path, content in entries:
            info = tarfile.TarInfo(path)
            info.uid, info.gid, info.mode = os.geteuid(), os.getegid(), 0o755
            if kind == "file":
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
                continue
            info.type = KINDS[kind]
            info.linkname = content or ""
            archive.addfile(info)
    return out.getvalue()


def layout(folder: Path, contents: Sequence[bytes], **config: Any) -> Path:
    """An OCI layout of layers, compressed with gzip."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    diff_ids = [f"sha256:{hashlib.sha256(content).hexdigest()}" for content in contents]
    settings = {"os": "linux", "config": SETTINGS, "rootfs": {"diff_ids": diff_ids}, **config}
    manifest = {
        "config": put(json.dumps(settings).encode()),
        "layers": [put(gzip.compress(content)) for content in contents],
    }
    index = {"manifests": [put(json.dumps(manifest).encode())]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def docker_archive(path: Path, contents: Sequence[bytes]) -> Path:
    """What `docker save` writes."""
    diff_ids = [f"sha256:{hashlib.sha256(content).hexdigest()}" for content in contents]
    settings = {"os": "linux", "config": SETTINGS, "rootfs": {"diff_ids": diff_ids}}
    names = [f"{number}/layer.tar" for number in range(len(contents))]
    files = {
        "config.json": json.dumps(settings).encode(),
        "manifest.json": json.dumps([{"Config": "config.json", "Layers": names}]).encode(),
        **dict(zip(names, contents, strict=True)),
    }
    path.write_bytes(layer([("file", name, content) for name, content in files.items()]))
    return path


def unpacked(path: Path, tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    with open_oci_image(path, tmp_path) as image:
        unpack_layers(image.layers, image.diff_ids, root)
    return root


def files(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.mark.parametrize("kind", ["layout", "layout archive", "docker save"])
def test_layers_whiteouts_and_links(tmp_path: Path, kind: str) -> None:
    contents = [layer(entries) for entries in LAYERS]
    path = tmp_path / "image"
    if kind == "docker save":
        docker_archive(path, contents)
    else:
        layout(path, contents)
    if kind == "layout archive":
        archive = tmp_path / "image.tar"
        with tarfile.open(archive, "w") as out:
            out.add(path, ".")
        path = archive
    root = unpacked(path, tmp_path)
    assert files(root) == {
        "etc/kept": b"newer",
        "etc/through-link": b"y",
        "data/new": b"new",
        "tool": b"#!",
        "tool-again": b"#!",
        "becomes-folder/inside": b"x",
    }
    assert (root / "tool").stat().st_ino == (root / "tool-again").stat().st_ino
    assert stat.S_IMODE((root / "tool").stat().st_mode) == 0o755
    assert str((root / "also-etc").readlink()) == "/etc"
    with open_oci_image(path, tmp_path) as image:
        assert image.settings == ImageSettings({"PATH": "/bin", "A": "b=c"}, "/srv", "nobody")
    assert not (tmp_path / "oci").exists()


HOSTILE: dict[str, list[Entry]] = {
    "a path with ..": [("file", "../escape", b"x")],
    "an absolute path": [("file", "/escape", b"x")],
    "a path with .. inside": [("file", "a/../../escape", b"x")],
    "a device": [("block", "disk", None)],
    "a character device": [("char", "etc/null", None)],
    "a pipe": [("pipe", "pipe", None)],
    "a hard link out": [("hard", "stolen", "../../secret")],
    "a hard link to an absolute path": [("hard", "stolen", "/etc/passwd")],
    "a hard link to nothing": [("hard", "stolen", "nothing")],
    "a whiteout of its parent": [("file", "a/.wh...", b"")],
    "a file as a folder": [("file", "a", b""), ("file", "a/b", b"")],
    "a loop of links": [("link", "a", "b"), ("link", "b", "a"), ("file", "a/x", b"")],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_layer_is_refused(tmp_path: Path, name: str) -> None:
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    image = layout(tmp_path / "image", [layer(HOSTILE[name])])
    with pytest.raises(BootError, match="layer 1"):
        unpacked(image, inside)
    assert not list(tmp_path.rglob("escape"))


@pytest.mark.parametrize("target", ["/tmp/elsewhere", "../../../elsewhere", ".."])
def test_links_lead_nowhere_outside(tmp_path: Path, target: str) -> None:
    """A link that leads out is kept as it is, for the guest; what is written through it stays inside."""
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    entries: list[Entry] = [("link", "way", target), ("file", "way/escape", b"x"), ("file", "way/.wh.q", b"")]
    root = unpacked(layout(tmp_path / "image", [layer(entries)]), inside)
    [escape] = tmp_path.rglob("escape")
    assert escape.is_relative_to(root)
    assert str((root / "way").readlink()) == target


def test_a_whiteout_through_a_link_stays_inside(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("of the host")
    contents = [layer([("link", "way", str(victim))]), layer([("file", "way/.wh..wh..opq", b"")])]
    unpacked(layout(tmp_path / "image", contents), tmp_path)
    assert (victim / "file").exists()


@pytest.mark.parametrize("which", range(4))
def test_damaged_content_is_refused(tmp_path: Path, which: int) -> None:
    image = layout(tmp_path / "image", [layer(LAYERS[0]), layer(LAYERS[1])])
    blob = sorted((image / "blobs/sha256").iterdir())[which]
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(BootError, match=f"{blob.name} is damaged"):
        unpacked(image, tmp_path)
    blob.unlink()
    with (
        pytest.raises(BootError, match=f"lacks .*:{blob.name}"),
        open_oci_image(image, tmp_path),
    ):
        pass


def test_a_layer_of_docker_save_is_compared_with_the_configuration(tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "image.tar", [layer(LAYERS[0])])
    path.write_bytes(path.read_bytes().replace(b"kept", b"kepT"))
    with pytest.raises(BootError, match="layer 1 of the image: it is damaged"):
        unpacked(path, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "s390x"}, "for linux/s390x"),
        ({"os": "windows"}, "for windows"),
        ({"rootfs": {"diff_ids": []}}, "1 layers, and its configuration names 0"),
        ({"rootfs": 7}, "rootfs is damaged"),
        ({"config": {"Env": ["no-equals"]}}, "no variable"),
        ({"config": {"WorkingDir": "srv"}}, "no absolute path"),
        ({"config": []}, ""),
    ],
)
def test_what_does_not_fit(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    image = layout(tmp_path / "image", [layer([])], **config)
    if not message:
        with open_oci_image(image, tmp_path) as opened:
            assert opened.settings == ImageSettings()
        return
    with pytest.raises(BootError, match=message), open_oci_image(image, tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b\x08\x00", b"\0" * 1024])
def test_no_image_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(content)
    with pytest.raises(BootError), open_oci_image(path, tmp_path):
        pass
    with pytest.raises(BootError, match="no container image"), open_oci_image(tmp_path, tmp_path):
        pass
    assert not (tmp_path / "oci").exists()


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "MAX_UNPACKED_BYTES", 1 << 20)
    image = layout(tmp_path / "image", [layer([("file", "zeros", bytes(2 << 20))])])
    with pytest.raises(BootError, match="larger than"):
        unpacked(image, tmp_path)


def unpack_one(tmp_path: Path, content: bytes) -> None:
    file, root = tmp_path / "layer.tar", tmp_path / "root"
    file.write_bytes(content)
    root.mkdir(exist_ok=True)
    unpack_layers([file], [hashlib.sha256(content).hexdigest()], root)


def long_name(size: int, name: bytes = b"") -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT) + name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (long_name(2 << 20, bytes(2 << 20)), "header of 2097152 bytes"),
        (long_name(512, b"n" * 512) * 1000, "RecursionError"),
        (layer([("file", "d/" * 256 + "file", b"x")]), "more than 256 folders deep"),
        (layer([("link", "a", "d/" * 200), ("file", "a/" + "d/" * 100 + "file", b"x")]), "256 folders deep"),
    ],
    ids=["long header", "endless headers", "depth", "depth behind a link"],
)
def test_what_would_take_memory_or_recursion_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "root" / ("d/" * 200)).mkdir(parents=True)
    with pytest.raises(BootError, match=message):
        unpack_one(tmp_path, content)
    if message.startswith("Recursion"):
        (tmp_path / "archive.tar").write_bytes(content)
        with pytest.raises(BootError, match=message), open_oci_image(tmp_path / "archive.tar", tmp_path):
            pass


def test_folders_on_the_way_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = layer([("file", f"{i}/a/b/c", b"x") for i in range(3)])
    monkeypatch.setattr(layers_module, "Budget", lambda: Budget(num_entries=12))
    unpack_one(tmp_path, content)
    monkeypatch.setattr(layers_module, "Budget", lambda: Budget(num_entries=11))
    with pytest.raises(BootError, match="larger than"):
        unpack_one(tmp_path / "root", content)


def test_a_negative_size_buys_nothing(tmp_path: Path) -> None:
    budget = Budget(num_bytes=10)
    budget.spend(-(1 << 40))
    with pytest.raises(BootError, match="larger than"):
        budget.spend(11)


@given(st.text(max_size=60))
def test_no_path_leads_out(name: str) -> None:
    try:
        parts = path_parts(name)
    except BootError:
        return
    assert not {"", ".", ".."} & set(parts)
    assert Path("/root").joinpath(*parts).is_relative_to("/root")
