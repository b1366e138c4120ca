"""The microvm engine: machines on a stock QEMU that fork at any depth.

Reading order: `machine` (what a VMM is started with), `memory` (which guest pages are private, and how they
are moved), `vmm` (one VMM: start, assign, rewind, save, stop), `rewind` (how a used one becomes another
checkpoint), `snapshot` (what a checkpoint holds), `base`, `pool`, `reviver` (from a snapshot to a machine
that has shaken hands), `sandbox`, `engine`. How a VMM begins, in its jail: `confinement`, `launcher`,
`spawner`, `template` (as a fork of a process that has QEMU loaded), and then `family`, `stopping`,
`descriptors`, `prototype` (as a fork of one that has run), `half_started` (as a fork of one that has begun to
start), `starting` and `source`. Beside them: `room` and `limits`
(memory and CPU time), `transfer`, `export` and `moving` (checkpoints and sandboxes on their way to other
hosts), `tiny_guest` (for KVM).
"""
