"""What a checkpoint of a machine holds: device state, and the pages that differ from the base.

A snapshot is self-sufficient given its base: restoring one is putting its pages in, at any depth. What it
stores of its own is only the pages that differ from the snapshot that its machine came from; the rest it
shares, block by block, with its ancestors. Blocks are counted by Python's own references: a block lives as
long as some snapshot names it, so discarding an ancestor never breaks a descendant.

Invariants:

- `page_numbers` ascends; page i of a snapshot is row `rows[i]` of block `owners[i]`.
- A snapshot names at most `MAX_BLOCKS` blocks: beyond that it stores all its pages anew. So the time of a
  restore does not grow with depth, and storage stays within a constant factor of the changed pages.
- Blocks are compressed (zstd) and carry a checksum of their content; reading a damaged one raises
  `CheckpointError`.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

import numpy as np
import zstandard
from numpy.typing import NDArray

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.memory import PageNumbers, Pages
from rollout.sandbox.microvm.vmm import RawState

__all__ = ["MAX_BLOCKS", "PageBlock", "RawCache", "Snapshot"]

MAX_BLOCKS = 8
_LEVEL = 1
"""zstd level: 1 compresses guest pages at over 500 MB/s, and higher levels save little on them."""


@dataclass(frozen=True, slots=True, eq=False)
class PageBlock:
    """Some pages, compressed together. Compared by identity.

    Attributes:
        num_pages: How many.
        compressed: zstd frame.
        checksum: BLAKE2b of the pages.
    """

    num_pages: int
    compressed: bytes
    checksum: bytes

    @classmethod
    def of(cls, pages: Pages) -> PageBlock:
        """Compresses pages, shape [num_pages, 4096]."""
        data = pages.tobytes()
        return cls(len(pages), zstandard.ZstdCompressor(level=_LEVEL).compress(data), _checksum(data))

    def unpack(self) -> Pages:
        """The pages, shape [num_pages, 4096].

        Raises:
            CheckpointError: The block is damaged.
        """
        size_bytes = self.num_pages * GUEST_PAGE_BYTES
        try:
            data = zstandard.ZstdDecompressor().decompress(self.compressed, max_output_size=size_bytes)
        except zstandard.ZstdError as error:
            raise CheckpointError(f"a checkpoint's pages are damaged: {error}") from error
        if len(data) != size_bytes or _checksum(data) != self.checksum:
            raise CheckpointError("a checkpoint's pages are damaged: their checksum differs")
        return np.frombuffer(data, np.uint8).reshape(self.num_pages, GUEST_PAGE_BYTES)


@dataclass(slots=True)
class RawCache:
    """Recently used blocks in the clear, within a byte budget, least recently used out first. Thread-safe."""

    budget_bytes: int
    _pages: dict[PageBlock, Pages] = field(default_factory=dict[PageBlock, Pages])
    size_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, block: PageBlock, pages: Pages) -> None:
        """Keeps a block's pages at hand."""
        with self._lock:
            if block in self._pages:
                return
            self._pages[block] = pages
            self.size_bytes += pages.nbytes
            while self.size_bytes > self.budget_bytes:
                oldest = next(iter(self._pages))
                self.size_bytes -= self._pages.pop(oldest).nbytes

    def get(self, block: PageBlock) -> Pages:
        """A block's pages, unpacked if they are not at hand.

        Raises:
            CheckpointError: The block is damaged.
        """
        with self._lock:
            if (pages := self._pages.pop(block, None)) is not None:
                self._pages[block] = pages  # now the most recently used
                return pages
        pages = block.unpack()
        self.put(block, pages)
        return pages


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A saved machine.

    Attributes:
        device_state: Compressed with zstd.
        page_numbers: Pages that differ from the base, shape [n], ascending.
        owners: Index into `blocks` of each page, shape [n].
        rows: Row of each page within its block, shape [n].
        blocks: The blocks named.
        own_bytes: What it stores beyond what it shares with the snapshot before it.
    """

    device_state: bytes
    page_numbers: PageNumbers
    owners: NDArray[np.uint8]
    rows: NDArray[np.uint32]
    blocks: tuple[PageBlock, ...]
    own_bytes: int

    @classmethod
    def at_base(cls, device_state: bytes) -> Snapshot:
        """The base itself: device state, and no page that differs."""
        packed = zstandard.ZstdCompressor().compress(device_state)
        no_pages = np.empty(0, np.uint32)
        return cls(packed, no_pages, np.empty(0, np.uint8), no_pages, (), len(packed))

    @classmethod
    def of(cls, raw: RawState, origin: Snapshot | None, cache: RawCache) -> Snapshot:
        """Makes a snapshot of a state that was read, sharing what it has in common with `origin`.

        Args:
            raw: The state.
            origin: What its machine was restored from or last saved as; None at the base.
            cache: Pages at hand.

        Raises:
            CheckpointError: A block of the origin is damaged.
        """
        shared = _match(raw, origin, cache) if origin is not None else _no_match(raw)
        is_own, owners, rows, blocks = shared
        if len(blocks) >= MAX_BLOCKS:
            is_own, owners, rows, blocks = _no_match(raw)
        own_bytes = 0
        if (own_pages := raw.pages[is_own]).size:
            block = PageBlock.of(own_pages)
            cache.put(block, own_pages)
            owners[is_own] = len(blocks)
            rows[is_own] = np.arange(len(own_pages), dtype=np.uint32)
            blocks = (*blocks, block)
            own_bytes = len(block.compressed)
        device_state = zstandard.ZstdCompressor(level=_LEVEL).compress(raw.device_state)
        index_bytes = raw.page_numbers.nbytes + owners.nbytes + rows.nbytes
        return cls(
            device_state,
            raw.page_numbers,
            owners,
            rows,
            blocks,
            own_bytes + len(device_state) + index_bytes,
        )

    def unpack_pages(self, cache: RawCache) -> Pages:
        """All pages in the order of `page_numbers`, shape [n, 4096].

        Raises:
            CheckpointError: A block is damaged.
        """
        pages = np.empty((len(self.page_numbers), GUEST_PAGE_BYTES), np.uint8)
        for index, block in enumerate(self.blocks):
            mask = self.owners == index
            pages[mask] = cache.get(block)[self.rows[mask]]
        return pages

    def unpack_device_state(self) -> bytes:
        """What QEMU saved.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            return zstandard.ZstdDecompressor().decompress(self.device_state)
        except zstandard.ZstdError as error:
            raise CheckpointError(f"a checkpoint's device state is damaged: {error}") from error


_Sharing = tuple[NDArray[np.bool_], NDArray[np.uint8], NDArray[np.uint32], tuple[PageBlock, ...]]
"""Which pages must be stored anew; for the others owner and row; and the blocks that those name."""


def _no_match(raw: RawState) -> _Sharing:
    num_pages = len(raw.page_numbers)
    return np.ones(num_pages, np.bool_), np.zeros(num_pages, np.uint8), np.zeros(num_pages, np.uint32), ()


def _match(raw: RawState, origin: Snapshot, cache: RawCache) -> _Sharing:
    is_own, owners, rows, _ = _no_match(raw)
    _, here, there = np.intersect1d(
        raw.page_numbers, origin.page_numbers, assume_unique=True, return_indices=True
    )
    kept: list[PageBlock] = []
    for index, block in enumerate(origin.blocks):
        of_block = origin.owners[there] == index
        ours, theirs = here[of_block], origin.rows[there[of_block]]
        # Pages are compared as 512 words, which numpy does at memory speed.
        same = (raw.pages[ours].view(np.uint64) == cache.get(block)[theirs].view(np.uint64)).all(axis=1)
        if not same.any():
            continue
        is_own[ours[same]] = False
        owners[ours[same]] = len(kept)
        rows[ours[same]] = theirs[same]
        kept.append(block)
    return is_own, owners, rows, tuple(kept)


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
