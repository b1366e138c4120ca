"""Private folders: layers, their limit, deletions, flattening, and the copy where there is no overlay."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from process_helpers import MIB, boot_rogue, make_engine

from rollout.errors import CheckpointError
from rollout.sandbox.process.walls import Limits

pytestmark = pytest.mark.process


async def shell(sandbox, script):
    result = await sandbox.exec(["sh", "-ec", script])
    assert result.exit_code == 0, result.stderr
    return result.stdout.decode()


async def test_deletions_renames_and_folders_made_again_are_each_branchs_own():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await shell(sandbox, "mkdir -p a/b c; echo 1 > a/b/one; echo 2 > two; ln -s two link; ln two hard")
        first = await sandbox.checkpoint()
        (clone,) = await engine.fork(first)
        await shell(clone, "rm -r a; mkdir a; echo new > a/new; mv c d; echo 3 >> two; rm link")
        second = await clone.checkpoint()
        await shell(clone, "rm -r a d two")
        (older,) = await engine.fork(first)
        (newer,) = await engine.fork(second)
        look = "find . -path ./.tmp -o -path ./.shm -o -print | sort | tr '\\n' ' '; cat two"
        assert await shell(newer, look) == ". ./a ./a/new ./d ./hard ./two 2\n3\n"
        assert await shell(older, look) == ". ./a ./a/b ./a/b/one ./c ./hard ./link ./two 2\n"


async def test_what_is_written_survives_more_layers_than_an_overlay_may_have():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await shell(
            sandbox, "mkdir deep; echo gone > deep/gone; chmod 700 deep; mkfifo pipe; ln -s gone link"
        )
        await shell(sandbox, "touch -d 2001-01-01 deep/gone; chmod 640 deep/gone; ln deep/gone again")
        for depth in range(30):
            await shell(sandbox, f"echo {depth} >> log; echo {depth} > file{depth}; rm -f file{depth - 2}")
            checkpoint = await sandbox.checkpoint()
            (clone,) = await engine.fork(checkpoint)
            await engine.discard(checkpoint)
            await sandbox.kill()
            sandbox = clone
        assert await shell(sandbox, "ls; wc -l < log") == "again\ndeep\nfile28\nfile29\nlink\nlog\npipe\n30\n"
        about = await shell(sandbox, "stat -c '%a %F %Y %h' deep deep/gone again pipe; readlink link")
        assert about.splitlines()[1:3] == ["640 regular file 978307200 2"] * 2
        assert about.splitlines()[0].startswith("700 directory")
        assert about.splitlines()[3].startswith("644 fifo")
        assert about.splitlines()[4] == "gone"


async def test_a_branch_that_writes_nothing_adds_no_layer():
    async with make_engine() as engine:
        sandbox = await boot_rogue(engine)
        await shell(sandbox, "echo 1 > one")
        for _ in range(3):
            (clone,) = await engine.fork(await sandbox.checkpoint())
            await sandbox.kill()
            sandbox = clone
        (mount,) = [
            line for line in (await shell(sandbox, "cat /proc/mounts")).splitlines() if " /home/" in line
        ]
        lower = next(part for part in mount.split(",") if part.startswith("lowerdir="))
        assert lower.count(":") == 0


async def test_folders_of_dead_branches_are_freed():
    async with make_engine(Limits(512 * MIB, folder_bytes=64 * MIB)) as engine:
        sandbox = await boot_rogue(engine)
        free = [available_kib()]
        for _ in range(6):
            (clone,) = await engine.fork(await sandbox.checkpoint())
            await clone.write_file("large", bytes(48 * MIB))
            saved = await clone.checkpoint()
            await clone.kill()
            await engine.discard(saved)
            free.append(available_kib())
        assert (await engine.ask("stats"))["keepers"] == 1
        assert min(free[1:]) > free[0] - 150 * 1024  # six times 48 MiB would be twice as much


def available_kib():
    lines = Path("/proc/meminfo").read_text().splitlines()
    return -next(int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


async def test_what_cannot_be_flattened_is_an_error_of_that_checkpoint():
    async with make_engine(Limits(512 * MIB, folder_bytes=2 * MIB)) as engine:
        sandbox = await boot_rogue(engine)
        witness = await boot_rogue(engine)
        with pytest.raises(CheckpointError, match="folder cannot be saved"):  # noqa: PT012
            for number in range(20):  # each layer fits, all together do not
                await sandbox.write_file(f"file{number}", os.urandom(MIB))
                checkpoint = await sandbox.checkpoint()
                (clone,) = await engine.fork(checkpoint)
                await engine.discard(checkpoint)
                await sandbox.kill()
                sandbox = clone
        assert (await witness.exec(["echo", "fine"])).stdout == b"fine\n"


STORE_SCRIPT = """
import json, os, sys
from rollout.sandbox.process import folders, syscalls, walls
user, group = os.geteuid(), os.getegid()
syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
walls.map_user("self", user, group)
root, view = sys.argv[1], sys.argv[2]
syscalls.mount("tmpfs", root, "tmpfs", 0)
store = folders.FolderStore(root, 1 << 20)
had_overlay, store.has_overlay = store.has_overlay, False

def write_below(layers, script):
    folder, mount_fd = store.open(layers)
    syscalls.move_mount(mount_fd, view)
    os.close(mount_fd)
    os.chdir(view)
    script()
    listing = sorted(os.listdir("."))
    os.chdir("/")
    syscalls.unmount(view)
    return store.save(folder), listing

first, _ = write_below((), lambda: open("one", "w").write("1"))
second, seen = write_below(first, lambda: (os.unlink("one"), open("two", "w").write("2")))
_, again = write_below(first, lambda: None)
_, later = write_below(second, lambda: None)
for layers in (first, second):
    store.release(layers)
left = sorted(os.listdir(root))
print(json.dumps([had_overlay, seen, again, later, left]))
"""


def test_without_an_overlay_a_clone_gets_a_copy(tmp_path):
    for name in ("root", "view"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", STORE_SCRIPT, str(tmp_path / "root"), str(tmp_path / "view")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    had_overlay, seen, again, later, left = json.loads(done.stdout)
    assert had_overlay
    assert seen == [".shm", ".tmp", "two"]
    assert again == [".shm", ".tmp", "one"]
    assert later == [".shm", ".tmp", "two"]
    # what was saved and not released by this script: the copies below the last two
    assert [name for name in left if name.isdigit()] == [name for name in left if name != "view"]
