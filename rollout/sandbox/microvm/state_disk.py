"""A disk image whose only content is one snapshot of device state: how a running VMM is given a state anew.

QEMU takes an incoming migration once in its life. What it can do again and again is load a snapshot from a
qcow2 disk (`loadvm`), and the stream in there may be device state alone. So each clone has such a disk, in a
memory file that no guest sees: the stream is written into the snapshot's clusters from outside, and `loadvm`
reads it. The layout never changes, because loading a snapshot moves none of its clusters.

Pure: bytes and offsets. The format is version 2 of QEMU's `docs/interop/qcow2.txt`.
"""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["MAX_STATE_BYTES", "SNAPSHOT_NAME", "STATE_OFFSET", "empty_state_disk"]

SNAPSHOT_NAME: Final = "state"
"""What `loadvm` is asked for."""
MAX_STATE_BYTES: Final = 512 << 10
"""Room for device state; a guest with one disk and one port has about 12 KB of it."""

_CLUSTER_BITS: Final = 14
_CLUSTER_BYTES: Final = 1 << _CLUSTER_BITS
_NUM_STATE_CLUSTERS: Final = MAX_STATE_BYTES // _CLUSTER_BYTES
# Clusters of the file, in order.
_REFCOUNT_TABLE, _REFCOUNTS, _ACTIVE_L1, _SNAPSHOTS, _SNAPSHOT_L1, _SNAPSHOT_L2, _STATE = range(1, 8)
STATE_OFFSET: Final = _STATE * _CLUSTER_BYTES
"""Where in the file the stream begins."""
_DISK_BYTES: Final = _CLUSTER_BYTES
_L1_ENTRIES: Final = 2
"""One for the disk's own bytes, which are never used, and one for the state, which follows them."""


def empty_state_disk() -> bytes:
    """The image before a state has been written into it."""
    num_clusters = _STATE + _NUM_STATE_CLUSTERS
    image = bytearray(num_clusters * _CLUSTER_BYTES)
    struct.pack_into(
        ">4sIQIIQIIQQIIQ",
        image,
        0,
        *(b"QFI\xfb", 2, 0, 0),  # version, no backing file
        *(_CLUSTER_BITS, _DISK_BYTES, 0),  # no encryption
        *(_L1_ENTRIES, _ACTIVE_L1 * _CLUSTER_BYTES),
        *(_REFCOUNT_TABLE * _CLUSTER_BYTES, 1),
        *(1, _SNAPSHOTS * _CLUSTER_BYTES),
    )
    struct.pack_into(">Q", image, _REFCOUNT_TABLE * _CLUSTER_BYTES, _REFCOUNTS * _CLUSTER_BYTES)
    struct.pack_into(f">{num_clusters}H", image, _REFCOUNTS * _CLUSTER_BYTES, *[1] * num_clusters)
    entry = _snapshot_entry()
    start = _SNAPSHOTS * _CLUSTER_BYTES
    image[start : start + len(entry)] = entry
    struct.pack_into(">QQ", image, _SNAPSHOT_L1 * _CLUSTER_BYTES, 0, _SNAPSHOT_L2 * _CLUSTER_BYTES)
    states = [STATE_OFFSET + index * _CLUSTER_BYTES for index in range(_NUM_STATE_CLUSTERS)]
    struct.pack_into(f">{len(states)}Q", image, _SNAPSHOT_L2 * _CLUSTER_BYTES, *states)
    return bytes(image)


def _snapshot_entry() -> bytes:
    """The one line of the snapshot table."""
    name, number = SNAPSHOT_NAME.encode(), b"1"
    extra = struct.pack(">QQ", MAX_STATE_BYTES, _DISK_BYTES)
    fixed = struct.pack(
        ">QIHHIIQII",
        *(_SNAPSHOT_L1 * _CLUSTER_BYTES, _L1_ENTRIES, len(number), len(name)),
        *(0, 0, 0, MAX_STATE_BYTES, len(extra)),  # no date and no clock: nobody reads them
    )
    return fixed + extra + number + name
