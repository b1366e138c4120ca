"""Exports: a run's trajectories in the formats that trainers load unchanged.

`source` reads whole episodes in a fixed order, `text` makes conversations of them, `targets` turns search
trees into preferences and advantages, one module per family of formats turns chunks into records, `files`
writes them, and `formats` lists every format by name.
"""
