"""The stores of images and bases, on small files: what is damaged, missing or foreign is refused by name."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.config import ImageConfig
from rollout.errors import BootError
from rollout.sandbox.image.build import build_image
from rollout.sandbox.image.recipe import Recipe, payload_digest, recipe_of
from rollout.sandbox.image.store import FILES, Image, ImageStore
from rollout.sandbox.microvm import memory_file as memory_file_module
from rollout.sandbox.microvm.base import BaseStore
from rollout.sandbox.microvm.memory_file import new_memory_file

PAYLOAD = {"rollout/agent.py": b"pass"}
MEMORY_BYTES = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "cache")


def add(store: ImageStore, content: bytes = b"content", *, name: str = "default") -> Image:
    with store.scratch() as scratch:
        folder = scratch / "image"
        folder.mkdir()
        for file in FILES:
            (folder / file).write_bytes(content + file.encode())
        recipe = {"payload_sha256": payload_digest(PAYLOAD)}
        return store.add(folder, recipe, key="key", name=name)


def test_an_image_is_found_by_name_digest_and_recipe(store: ImageStore) -> None:
    image = add(store)
    assert store.find("default") == store.find(image.digest) == store.find_recipe("key") == image
    store.name("other", image)
    assert store.list() == [(image, ["default", "other"])]
    store.verify(image)


@pytest.mark.parametrize("name", ["", "a/b", "../escape", ".hidden", "x" * 300])
def test_a_name_that_is_none_is_refused(store: ImageStore, name: str) -> None:
    with pytest.raises(BootError, match="an image cannot be called"):
        store.name(name, add(store))


def test_equal_content_is_one_image_and_a_name_moves(store: ImageStore) -> None:
    first, again = add(store), add(store)
    assert first == again
    newer = add(store, b"newer")
    assert store.find("default") == newer
    assert len(store.list()) == 2


@pytest.mark.parametrize("is_empty", [True, False])
@pytest.mark.parametrize("name", ["missing", "../escape", "", ".", ".hidden", "x" * 300, "a\0b"])
def test_a_missing_image_is_named_with_the_command_that_builds_it(
    store: ImageStore, name: str, is_empty: bool
) -> None:
    if not is_empty:
        add(store)
    with pytest.raises(BootError, match="rollout image build"):
        store.find(name)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, alter, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_image_is_refused(store: ImageStore, file: str, harm: Callable[[Path], None]) -> None:
    image = add(store)
    harm(image.file(file))
    with pytest.raises(BootError, match=file if harm is not Path.unlink else "No such file"):
        store.verify(image)


def test_a_damaged_manifest_is_refused(store: ImageStore) -> None:
    image = add(store)
    truncate(image.path / "manifest.json")
    with pytest.raises(BootError, match="damaged manifest"):
        store.find("default")


def test_an_image_of_another_version_is_refused(store: ImageStore) -> None:
    image = add(store)
    assert store.find_current("default", PAYLOAD) == image
    with pytest.raises(BootError, match="another version"):
        store.find_current("default", {"rollout/agent.py": b"other"})


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ImageStore(tmp_path / "file")
    with pytest.raises(BootError, match="cannot write to the cache"), store.scratch():
        pass


def test_a_recipe_changes_with_each_of_its_parts() -> None:
    recipes = [
        recipe_of(ImageConfig(), PAYLOAD),
        recipe_of(ImageConfig(packages=("git",)), PAYLOAD),
        recipe_of(ImageConfig(wheels=("six",)), PAYLOAD),
        recipe_of(ImageConfig(), {"rollout/agent.py": b"other"}),
    ]
    assert len({recipe.key for recipe in recipes}) == 4
    assert recipes[0].system_key == recipes[2].system_key, "wheels do not need another Debian system"
    assert recipe_of(ImageConfig(packages=("b", "a", "a")), PAYLOAD).packages == ("a", "b")


def test_missing_tools_are_named_with_their_packages(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    recipe = Recipe(packages=(), wheels=(), payload_sha256="")
    with pytest.raises(BootError, match="apt-get install bubblewrap cpio dpkg erofs-utils mmdebstrap zstd"):
        build_image(recipe, {}, store=store)


@pytest.fixture
def bases(tmp_path: Path) -> BaseStore:
    return BaseStore(tmp_path)


def save_base(bases: BaseStore) -> None:
    fd = new_memory_file(MEMORY_BYTES)
    os.pwrite(fd, b"begin", 0)
    os.pwrite(fd, b"page", 5 * 4096)
    os.pwrite(fd, b"end", MEMORY_BYTES - 3)
    with bases.building("key"):
        base = bases.save("key", fd, b"device state")
    base.close()


def test_a_base_comes_back_as_it_was_and_sealed(bases: BaseStore) -> None:
    assert bases.load("key", MEMORY_BYTES) is None
    save_base(bases)
    base = bases.load("key", MEMORY_BYTES)
    assert base is not None
    try:
        assert base.device_state == b"device state"
        content = os.pread(base.ram_fd, MEMORY_BYTES, 0)
        assert content[:5] == b"begin"
        assert content[5 * 4096 :][:4] == b"page"
        assert content[-3:] == b"end"
        assert content.count(0) == MEMORY_BYTES - 12
        with pytest.raises(PermissionError):
            os.pwrite(base.ram_fd, b"x", 0)
    finally:
        base.close()


@pytest.mark.parametrize("harm", [truncate, alter, Path.unlink])
@pytest.mark.parametrize("file", ["pages.zst", "numbers.npy", "state.zst"])
def test_a_damaged_base_is_refused(
    bases: BaseStore, tmp_path: Path, file: str, harm: Callable[[Path], None]
) -> None:
    save_base(bases)
    harm(tmp_path / "bases/key" / file)
    with pytest.raises(BootError, match="damaged; delete it"):
        bases.load("key", MEMORY_BYTES)


def test_a_base_is_not_sealed_while_something_can_write_to_it(
    bases: BaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_file_module, "_LET_GO_S", 0.05)
    fd = new_memory_file(MEMORY_BYTES)
    with mmap.mmap(fd, MEMORY_BYTES), pytest.raises(BootError, match="still runs"):
        bases.save("key", fd, b"")
    os.close(fd)
