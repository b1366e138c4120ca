"""What the fuzzing programs share: inputs that are scripts, seeds made in code, and the start of the fuzzer.

A fuzzing program (`fuzz_*.py`) is one target with its seeds. It runs until it has done what the options of
libFuzzer say (`-runs`, `-max_total_time`), or until an input breaks an invariant; then it ends with 77, a
traceback, and the input as a file `crash-…`, which the same program plays again when it gets it as its only
argument.

The code in question writes files where somebody else says: broken, it writes anywhere. So a program runs
where nothing but the current folder can be written, in namespaces that bubblewrap makes, and nowhere else.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import atheris

__all__ = ["Growth", "Script", "fuzz", "text_of"]

_CORPUS = Path("corpus")
_STARTED_AGAIN = "FUZZING_STARTED_AGAIN"
_MAX_INPUT_BYTES = 64 << 10


def _confine() -> None:
    """Starts the program again with all but the current folder read-only, unless that is how it runs."""
    if os.statvfs("/").f_flag & os.ST_RDONLY:
        return
    folder = str(Path.cwd())
    if _STARTED_AGAIN in os.environ or folder == "/":
        sys.exit("fuzzing: everything can be written here, although it was made read-only")
    bubblewrap = [
        *("bwrap", "--ro-bind", "/", "/", "--bind", folder, folder, "--dev", "/dev", "--chdir", folder),
        *("--unshare-all", "--uid", "0", "--gid", "0", "--die-with-parent", "--setenv", _STARTED_AGAIN, "1"),
    ]
    os.execvp("bwrap", [*bubblewrap, sys.executable, *sys.argv])


class Script:
    """An input, read from its front; what it lacks is zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def has_more(self) -> bool:
        """Whether anything is left."""
        return self._position < len(self._data)

    def number(self, num_bytes: int = 1) -> int:
        """A number, big end first."""
        return int.from_bytes(self.take(num_bytes), "big")

    def take(self, num_bytes: int) -> bytes:
        """So many bytes, fewer at the end."""
        taken = self._data[self._position : self._position + num_bytes]
        self._position += num_bytes
        return taken

    def piece(self) -> bytes:
        """Bytes with their length in front, as `text_of` writes them."""
        return self.take(self.number(2))

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))


def text_of(*parts: int | bytes) -> bytes:
    """A script: of numbers below 256, and of pieces."""
    return b"".join(
        bytes([part]) if isinstance(part, int) else len(part).to_bytes(2, "big") + part for part in parts
    )


class Growth:
    """Asserts that no input makes the process much larger than the largest before it did."""

    def __init__(self, max_bytes: int) -> None:
        self._max_kib = max_bytes >> 10

    def __enter__(self) -> None:
        self._before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __exit__(self, *_: object) -> None:
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before_kib
        assert grown_kib <= self._max_kib, f"one input took {grown_kib >> 10} MiB more"


def fuzz(
    target: Callable[[bytes], None],
    seeds: Iterable[bytes],
    mutate: Callable[[bytes, int, int], bytes] | None = None,
    *,
    arguments: Sequence[str] = tuple(sys.argv),
) -> None:
    """Plays the seeds, then whatever the fuzzer makes of them, confined. Does not return.

    Args:
        target: Is called with each input, and raises if it breaks an invariant.
        seeds: Inputs to begin with.
        mutate: Makes another input of one, given the most bytes that it may have and a seed.
        arguments: Those of the program.
    """
    _confine()
    options = [f"-max_len={_MAX_INPUT_BYTES}", "-print_final_stats=1", *arguments[1:]]
    is_replay = any(not argument.startswith("-") for argument in arguments[1:])
    if not is_replay:
        _CORPUS.mkdir(exist_ok=True)
        for number, seed in enumerate(seeds):
            (_CORPUS / f"seed-{number}").write_bytes(seed)
        options.append(str(_CORPUS))
    settings = {} if mutate is None else {"custom_mutator": mutate}
    atheris.Setup([arguments[0], *options], target, **settings)
    atheris.Fuzz()
