"""Simulated worlds: gymnasium in, gymnasium out.

`adapters.make` opens every library's environments, `tabletop` holds our own, `experts` act in them, `play` is the one
loop, and `recording` turns it into an episode store.
"""
