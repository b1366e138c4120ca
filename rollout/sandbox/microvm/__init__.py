"""The microvm engine: machines on a stock QEMU that fork at any depth.

Reading order: `machine` (what a VMM is started with), `memory` (which guest pages are private, and how they
are moved), `vmm` (one VMM: start, assign, save, stop), `snapshot` (what a checkpoint holds), `base`, `pool`,
`engine`.
"""
