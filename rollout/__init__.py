"""RL rollouts and Monte Carlo tree search over machines that can be forked.

Importing this package imports nothing else: it also runs inside the guest, where only the standard library
and msgpack are promised.
"""

__version__ = "0.1.0"
