"""Recordings: the episode store, windows of it for training, returns, normalisation, clips, and foreign formats.

NumPy, PyArrow and PyAV only. The parts are imported one by one: `offbook.data.store`, `offbook.data.windows`, ...
"""
