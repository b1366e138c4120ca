"""Sandboxes: the engines that boot, fork and save them, and the guest's side of the channel.

Nothing is imported here: this package also runs inside the guest.
"""
