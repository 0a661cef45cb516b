"""offbook: turn recordings into behaviour and find out whether it works. Train offline, test online.

The package imports nothing by itself; import the part you need (`offbook.data`, `offbook.client`, ...).
"""

__version__ = "0.1.0"
