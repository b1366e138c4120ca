"""PID 1 of a microVM: mounts what programs expect, starts the agent, reaps orphans, ends the machine with it.

The agent is a child and not PID 1 itself, so that a command that it runs can neither make it miss its own
children nor panic the kernel. When the agent ends, its state is lost, so the machine restarts, which the VMM
turns into its own end: the host then sees a closed channel at once, not a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import os
import socket
import struct
import time
from pathlib import Path

from rollout.sandbox import agent

_PORTS = "vport*p1"
"""The channel's device; the number after `vport` depends on the machine's other devices."""
_PORT_DEADLINE_S = 30.0
_MOUNTS = (
    ("proc", "/proc", "proc", ""),
    ("sys", "/sys", "sysfs", ""),
    ("run", "/run", "tmpfs", "mode=755"),
    ("tmp", "/tmp", "tmpfs", "mode=1777"),
    ("devpts", "/dev/pts", "devpts", "mode=620,ptmxmode=666"),
    ("shm", "/dev/shm", "tmpfs", "mode=1777"),
)
_WARM_MODULES = ("numpy", "gymnasium", "rollout.spaces")
"""Imported before the machine is saved as a base: once, instead of once in every clone."""
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_RB_AUTOBOOT = 0x01234567
"""reboot(2): restart, which `-no-reboot` makes the VMM's end."""


def main() -> None:
    """Runs as PID 1; never returns."""
    libc = ctypes.CDLL(None, use_errno=True)
    for source, target, kind, options in _MOUNTS:
        Path(target).mkdir(parents=True, exist_ok=True)
        if libc.mount(source.encode(), target.encode(), kind.encode(), 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"cannot mount {target}")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        link = Path("/dev") / name
        if not link.is_symlink():
            link.symlink_to(target)
    _raise_loopback()
    port_fd = _open_port()
    child = os.fork()
    if child == 0:
        os.setsid()
        for module in _WARM_MODULES:
            with contextlib.suppress(ImportError):  # not every image has them
                importlib.import_module(module)
        # A full collection writes to every object that it looks at: in each clone, pages that all share.
        gc.collect()
        gc.freeze()
        agent.run(port_fd, port_fd, machine=True, keep_open=True)
        os._exit(0)
    os.close(port_fd)
    while True:
        try:
            pid, _ = os.wait()
        except InterruptedError:
            continue
        if pid == child:
            libc.reboot(_RB_AUTOBOOT)


def _raise_loopback() -> None:
    """Sets the loopback interface up, so that the guest's own programs can talk to each other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket.fileno(), _SIOCSIFFLAGS, request)


def _open_port() -> int:
    """Opens the channel to the host; its node can appear before it can be opened."""
    give_up_at_s = time.monotonic() + _PORT_DEADLINE_S
    while True:
        try:
            return os.open(next(Path("/dev").glob(_PORTS)), os.O_RDWR | os.O_CLOEXEC)
        except (OSError, StopIteration):
            if time.monotonic() > give_up_at_s:
                raise
            time.sleep(0.005)


if __name__ == "__main__":
    main()
