"""What a checkpoint of a machine holds: device state, and the pages that differ from the base.

A snapshot is self-sufficient given its base: restoring one is putting its pages in, at any depth. What it
stores of its own is only the pages that differ from the snapshot that its machine came from; the rest it
shares, block by block, with its ancestors. Blocks are counted by Python's own references: a block lives as
long as some snapshot names it, so discarding an ancestor never breaks a descendant.

Invariants:

- `page_numbers` ascends; page i of a snapshot is row `rows[i]` of block `owners[i]`.
- A snapshot names at most `MAX_BLOCKS` blocks: beyond that it stores all its pages anew. So the time of a
  restore does not grow with depth, and storage stays within a constant factor of the changed pages.
- Blocks hold how their pages differ from the base's (exclusive or): most of a changed page is as it was, so
  this takes about a fifth of the bytes, and needs no ancestor. They are compressed (zstd) and carry a
  checksum of the pages themselves; reading a damaged one raises `CheckpointError`.

`base_pages` is everywhere the memory of the base, shape [pages of the machine, 4096].
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

import numpy as np
import zstandard
from numpy.typing import NDArray

from rollout.errors import CheckpointError
from rollout.sandbox.microvm.compression import MAX_DEVICE_STATE_BYTES, decompressed
from rollout.sandbox.microvm.machine import GUEST_PAGE_BYTES
from rollout.sandbox.microvm.memory import PageNumbers, Pages, RawState

__all__ = ["MAX_BLOCKS", "PageBlock", "RawCache", "Snapshot"]

MAX_BLOCKS = 16
_PAGES_AT_ONCE = 64
_LEVEL = 1
"""zstd level: 1 compresses guest pages at over 500 MB/s, and higher levels save little on them."""


@dataclass(frozen=True, slots=True, eq=False)
class PageBlock:
    """Some pages, compressed together. Compared by identity.

    Attributes:
        page_numbers: Where they are in the machine, shape [n], ascending.
        compressed: zstd frame of the pages, each in exclusive or with the base's page.
        checksum: BLAKE2b of the pages.
    """

    page_numbers: PageNumbers
    compressed: bytes
    checksum: bytes

    @property
    def num_pages(self) -> int:
        """How many."""
        return len(self.page_numbers)

    @classmethod
    def of(cls, page_numbers: PageNumbers, pages: Pages, base_pages: Pages) -> PageBlock:
        """Compresses pages, shape [n, 4096]."""
        difference = pages ^ base_pages[page_numbers]
        compressed = zstandard.ZstdCompressor(level=_LEVEL).compress(difference.data)
        return cls(page_numbers, compressed, _checksum(pages))

    def unpack(self, base_pages: Pages) -> Pages:
        """The pages, shape [n, 4096].

        Raises:
            CheckpointError: The block is damaged.
        """
        size_bytes = self.num_pages * GUEST_PAGE_BYTES
        try:
            data = decompressed(self.compressed, size_bytes)
        except zstandard.ZstdError as error:
            raise CheckpointError(f"a checkpoint's pages are damaged: {error}") from error
        if len(data) == size_bytes:
            pages = np.frombuffer(data, np.uint8).reshape(-1, GUEST_PAGE_BYTES)
            pages = pages ^ base_pages[self.page_numbers]
            if _checksum(pages) == self.checksum:
                return pages
        raise CheckpointError("a checkpoint's pages are damaged: their checksum differs")


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

    def get(self, block: PageBlock, base_pages: Pages) -> Pages:
        """A block's pages, unpacked if they are not at hand.

        Raises:
            CheckpointError: The block is damaged.
        """
        with self._lock:
            if (pages := self._pages.pop(block, None)) is not None:
                self._pages[block] = pages  # now the most recently used
                return pages
        pages = block.unpack(base_pages)
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
    def of(cls, raw: RawState, origin: Snapshot | None, cache: RawCache, base_pages: Pages) -> Snapshot:
        """Makes a snapshot of a state that was read, sharing what it has in common with `origin`.

        Private pages that hold what the base holds are left out: the guest wrote back what was there, or an
        earlier life of the VMM made them private.

        Args:
            raw: The state.
            origin: What its machine was restored from or last saved as; None at the base.
            cache: Pages at hand.
            base_pages: The base, shape [num_pages, 4096].

        Raises:
            CheckpointError: A block of the origin is damaged.
        """
        is_own, owners, rows, blocks = _no_match(raw)
        if origin is not None:
            is_own, owners, rows, blocks = _match(raw, origin, cache, base_pages)
        if len(blocks) >= MAX_BLOCKS:
            is_own, owners, rows, blocks = _no_match(raw)
        own = np.flatnonzero(is_own)
        is_new = _differ(raw.pages, own, base_pages, raw.page_numbers[own])
        kept = ~is_own
        kept[own[is_new]] = True
        own_bytes = 0
        if len(own := own[is_new]):
            own_pages = raw.pages[own]
            block = PageBlock.of(raw.page_numbers[own], own_pages, base_pages)
            cache.put(block, own_pages)
            owners[own] = len(blocks)
            rows[own] = np.arange(len(own), dtype=np.uint32)
            blocks = (*blocks, block)
            own_bytes = len(block.compressed) + block.page_numbers.nbytes
        device_state = zstandard.ZstdCompressor(level=_LEVEL).compress(raw.device_state)
        numbers, owners, rows = raw.page_numbers[kept], owners[kept], rows[kept]
        own_bytes += len(device_state) + numbers.nbytes + owners.nbytes + rows.nbytes
        return cls(device_state, numbers, owners, rows, blocks, own_bytes)

    def unpack_pages(self, cache: RawCache, base_pages: Pages) -> Pages:
        """All pages in the order of `page_numbers`, shape [n, 4096].

        Raises:
            CheckpointError: A block is damaged.
        """
        return self._gather(np.arange(len(self.page_numbers)), cache, base_pages)

    def changes_since(self, now: Snapshot, cache: RawCache, base_pages: Pages) -> tuple[PageNumbers, Pages]:
        """What a machine that is at `now` must change to be here: page numbers [n], contents [n, 4096].

        Raises:
            CheckpointError: A block is damaged.
        """
        here, there = _common(self.page_numbers, now.page_numbers)
        same_block = np.array([[ours is theirs for theirs in now.blocks] for ours in self.blocks], np.bool_)
        differs = np.ones(len(self.page_numbers), np.bool_)
        if len(here):
            is_same = same_block[self.owners[here], now.owners[there]] & (self.rows[here] == now.rows[there])
            differs[here[is_same]] = False
        leaves = np.ones(len(now.page_numbers), np.bool_)
        leaves[there] = False
        return self._joined(differs, now.page_numbers[leaves], cache, base_pages)

    def changes_from(
        self, page_numbers: PageNumbers, pages: Pages, cache: RawCache, base_pages: Pages
    ) -> tuple[PageNumbers, Pages]:
        """As `changes_since`, for a machine that was read: its private pages, shape [n, 4096].

        Raises:
            CheckpointError: A block is damaged.
        """
        here, there = _common(self.page_numbers, page_numbers)
        differs = np.ones(len(self.page_numbers), np.bool_)
        differs[here] = self._differs_from(here, pages, there, cache, base_pages)
        leaves = np.ones(len(page_numbers), np.bool_)
        leaves[there] = False
        left = np.flatnonzero(leaves)
        left = left[_differ(pages, left, base_pages, page_numbers[left])]
        return self._joined(differs, page_numbers[left], cache, base_pages)

    def _joined(
        self, is_ours: NDArray[np.bool_], of_base: PageNumbers, cache: RawCache, base_pages: Pages
    ) -> tuple[PageNumbers, Pages]:
        """Some pages of ours and some of the base, in ascending order."""
        ours = np.flatnonzero(is_ours)
        numbers = np.concatenate([self.page_numbers[ours], of_base])
        pages = np.concatenate([self._gather(ours, cache, base_pages), base_pages[of_base]])
        if not len(of_base):
            return numbers, pages
        order = np.argsort(numbers)
        return numbers[order], pages[order]

    def _gather(self, indices: NDArray[np.intp], cache: RawCache, base_pages: Pages) -> Pages:
        """Some pages, by their index in `page_numbers`, shape [n, 4096]."""
        pages = np.empty((len(indices), GUEST_PAGE_BYTES), np.uint8)
        owners, rows = self.owners[indices], self.rows[indices]
        for index in np.unique(owners):
            mask = owners == index
            pages[mask] = cache.get(self.blocks[index], base_pages)[rows[mask]]
        return pages

    def _differs_from(
        self,
        indices: NDArray[np.intp],
        pages: Pages,
        page_rows: NDArray[np.intp],
        cache: RawCache,
        base_pages: Pages,
    ) -> NDArray[np.bool_]:
        """Which of some pages, by their index in `page_numbers`, differ from rows of `pages`."""
        differs = np.empty(len(indices), np.bool_)
        owners, rows = self.owners[indices], self.rows[indices]
        for index in np.unique(owners):
            mask = owners == index
            block = cache.get(self.blocks[index], base_pages)
            differs[mask] = _differ(pages, page_rows[mask], block, rows[mask])
        return differs

    def unpack_device_state(self) -> bytes:
        """What QEMU saved.

        Raises:
            CheckpointError: It is damaged.
        """
        try:
            return decompressed(self.device_state, MAX_DEVICE_STATE_BYTES)
        except zstandard.ZstdError as error:
            raise CheckpointError(f"a checkpoint's device state is damaged: {error}") from error


_Sharing = tuple[NDArray[np.bool_], NDArray[np.uint8], NDArray[np.uint32], tuple[PageBlock, ...]]
"""Which pages must be stored anew; for the others owner and row; and the blocks that those name."""


def _no_match(raw: RawState) -> _Sharing:
    num_pages = len(raw.page_numbers)
    return np.ones(num_pages, np.bool_), np.zeros(num_pages, np.uint8), np.zeros(num_pages, np.uint32), ()


def _match(raw: RawState, origin: Snapshot, cache: RawCache, base_pages: Pages) -> _Sharing:
    is_own, owners, rows, _ = _no_match(raw)
    here, there = _common(raw.page_numbers, origin.page_numbers)
    kept: list[PageBlock] = []
    for index, block in enumerate(origin.blocks):
        of_block = origin.owners[there] == index
        ours, theirs = here[of_block], origin.rows[there[of_block]]
        same = ~_differ(raw.pages, ours, cache.get(block, base_pages), theirs)
        if not same.any():
            continue
        is_own[ours[same]] = False
        owners[ours[same]] = len(kept)
        rows[ours[same]] = theirs[same]
        kept.append(block)
    return is_own, owners, rows, tuple(kept)


def _common(ours: PageNumbers, theirs: PageNumbers) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the numbers that both have; both ascend."""
    if not len(theirs):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    places = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
    here = np.flatnonzero(theirs[places] == ours)
    return here, places[here]


def _differ(
    ours: Pages, our_rows: NDArray[np.integer], theirs: Pages, their_rows: NDArray[np.integer]
) -> NDArray[np.bool_]:
    """Which pages differ, row by row.

    As 512 words a page, and few enough pages at once to stay in the processor's cache: a copy of megabytes
    spends most of its time on page faults.
    """
    differs = np.empty(len(our_rows), np.bool_)
    our_words, their_words = ours.view(np.uint64), theirs.view(np.uint64)
    for begin in range(0, len(our_rows), _PAGES_AT_ONCE):
        part = slice(begin, begin + _PAGES_AT_ONCE)
        differs[part] = (our_words[our_rows[part]] != their_words[their_rows[part]]).any(axis=1)
    return differs


def _checksum(pages: Pages) -> bytes:
    return hashlib.blake2b(pages.data, digest_size=16).digest()
