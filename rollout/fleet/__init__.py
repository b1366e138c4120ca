"""The fleet: Ray actors that own hosts, and the driver that plays a run over them.

The only importer of ray.
"""
