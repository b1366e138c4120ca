"""An interpreter that has run and stands still: what its forks do is what its threads were about to do."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollout.sandbox.microvm.confinement import FIRST_FD
from rollout.sandbox.microvm.prototype import Family, control_pair, files_of
from rollout.sandbox.microvm.spawner import Child, Spawner, limits_for
from rollout.sandbox.microvm.stopping import Stopped

PYTHON = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
LIBRARY = Path(os.__file__).parent
DEADLINE_S = 30.0
MEMORY_BYTES = 64 << 20
MAX_FDS = 2
PROGRAM_FD = FIRST_FD + MAX_FDS
# Forks see no files, so all that programs use is imported. They wait in the same place, on sockets of their
# own.
WAITS = f"""
import ctypes, encodings.idna, errno, json, mmap, os, resource, select, signal, socket, struct, sys
import threading, time
{{first}}
exec(os.read({PROGRAM_FD}, 1 << 16).decode(), globals())
"""


def interpreter_files() -> list[Path]:
    """The interpreter and its compiled modules, of which the jail shows the libraries too."""
    names = ("_ctypes", "_json", "_socket", "_struct", "array", "math", "mmap", "resource", "select")
    found = (file for name in names for file in (LIBRARY / "lib-dynload").glob(f"{name}.*.so"))
    return [PYTHON, *found]


class StoppedInterpreter:
    """The prototype of a family.

    Args:
        spawner: Shows its processes `LIBRARY`, and has `interpreter_files` for programs.
        first: What it does before it waits.
        num_threads: How many it has by then.
        is_half_started: Its forks are confined like those of a program that has begun to start.
    """

    def __init__(
        self, spawner: Spawner, first: str, num_threads: int = 1, *, is_half_started: bool = False
    ) -> None:
        self._is_half_started = is_half_started
        self.family = Family(spawner, [str(PYTHON), "-ISc", WAITS.format(first=first)])
        self._unused = [os.memfd_create("unused") for _ in range(MAX_FDS)]
        os.ftruncate(self._unused[0], MEMORY_BYTES)  # a fork may not have more memory
        self._control, theirs = control_pair()
        uid = spawner.new_uid(is_family=True)
        owner = (os.geteuid(), os.getegid()) if uid is None else (uid, uid)
        self._owner = str(owner[0]), str(owner[1])
        ours, program = socket.socketpair()
        try:
            with theirs, ours, program:
                given = [*self._unused, program.fileno(), theirs.fileno()]
                limits = limits_for(given, 1 << 12)
                self.child = self.family.start(given, uid, limits, signals_threads=is_half_started)
                files = files_of([*given, self.child.log_fd])
                wait_for_program(self.child, num_threads)
                pid, address = self.child.pid, self.family.address
                self.stopped = Stopped.of(pid, address, self._control, files)
        except BaseException:
            self.close()
            raise

    def fork(
        self,
        program: str,
        fds: Sequence[int] = (),
        limits: Mapping[str, int] | None = None,
        flags: int | None = None,
    ) -> Child:
        """A fork that goes on with a program; its descriptors are from `FIRST_FD` on.

        Args:
            program: What it does.
            fds: Its descriptors.
            limits: Resource limits instead of the usual ones.
            flags: Of `clone`, instead of the usual ones.
        """
        wanted = {**limits_for(fds), **(limits or {})}
        packet = self.stopped.fork(self._owner, wanted, keeps_root=self._is_half_started)
        if flags is not None:
            packet = struct.pack("Q", flags) + packet[8:]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            given = [*fds, *self._unused[len(fds) :], theirs.fileno()]
            child = self.family.member(self._control, packet, given)
            ours.sendall(program.encode())
        return child

    def successor(self, program: str) -> Child:
        """A fork that could become a prototype itself, and goes on with a program.

        What this one does first must map the memory that it was given, privately.
        """
        lines = Path(f"/proc/{self.child.pid}/maps").read_text().splitlines()
        [mapping] = [line for line in lines if line.endswith("/memfd:unused (deleted)")]
        start, end = (int(place, 16) for place in mapping.split()[0].split("-"))
        packet = self.stopped.successor(self._owner, (start, end), 0)
        ours, theirs = socket.socketpair()
        control, their_control = control_pair()
        with ours, theirs, control, their_control:
            fds = [*self._unused, theirs.fileno(), their_control.fileno()]
            child = self.family.member(self._control, packet, fds)
            ours.sendall(program.encode())
        return child

    def close(self) -> None:
        """Ends the family."""
        self.family.end()
        self._control.close()
        for fd in self._unused:
            os.close(fd)
        if hasattr(self, "child"):
            self.child.close()


def wait_for_program(child: Child, num_threads: int) -> None:
    """Returns once a process waits for its program, and has all of its threads."""
    give_up_at_s = time.monotonic() + DEADLINE_S
    process, waits = Path(f"/proc/{child.pid}"), ["0", hex(PROGRAM_FD)]
    while (process / "syscall").read_text().split()[:2] != waits or len(
        list((process / "task").iterdir())
    ) != num_threads:
        assert time.monotonic() < give_up_at_s, child.log()
        time.sleep(0.005)
