"""Simulated worlds: gymnasium in, gymnasium out.

`adapters.make` opens every library's environments, `tabletop` holds our own, `experts` act in them, `play` is the one
loop, and `recording` turns it into an episode store.
"""

from offbook.errors import needs_extra

# Whatever is used of this package needs it; said once, here, with the install line.
with needs_extra("sim"):
    import gymnasium  # noqa: F401
