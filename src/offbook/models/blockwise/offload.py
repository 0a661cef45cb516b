"""Where what is kept for the backward pass waits: in place, in the processor's memory, or in a scratch file."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from offbook.errors import ResourceError


class Kept:
    """Tensors that wait.

    Args:
        tensors: what is kept.
        where: `"none"` for in place, `"cpu"`, or `"disk"`: files without a name in the folder for temporary ones
            (`TMPDIR`), which vanish with the process however it ends.

    Raises:
        ResourceError: the disk is full.

    Attributes:
        here: those that wait in place.
    """

    def __init__(self, tensors: Sequence[Tensor], where: str) -> None:
        moved = where == "disk" or (where == "cpu" and tensors[0].device.type != "cpu")
        self.here = [] if moved else list(tensors)
        self._away: list[_File | _Pinned] = []
        if moved:
            self._away = [_File(tensor) if where == "disk" else _Pinned(tensor) for tensor in tensors]

    def back(self, here: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, where they were; `here` are those that waited in place."""
        return [*here, *(away.back() for away in self._away)]


class _Pinned:
    """A copy in the processor's memory, from where a device can take it without a detour."""

    def __init__(self, tensor: Tensor) -> None:
        self._device = tensor.device
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    def back(self) -> Tensor:
        return self._copy.to(self._device, non_blocking=True)


class _File:
    """A copy in a file, read and written rather than mapped: pages of a map would count as memory of the process."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        size = tensor.numel() * tensor.element_size()
        try:
            self._file = tempfile.TemporaryFile(prefix="offbook-")  # noqa: SIM115 (it lives as long as this object)
            self._file.write(_bytes(tensor.detach().cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            got, fix = f"a full disk at {tempfile.gettempdir()}", "free some, or point TMPDIR elsewhere"
            raise ResourceError("offload='disk'", expected=f"room for {size} bytes", got=got, fix=fix) from None

    def back(self) -> Tensor:
        tensor = torch.empty(self._shape, dtype=self._dtype)
        self._file.seek(0)
        self._file.readinto(_bytes(tensor))
        return tensor.to(self._device)


def _bytes(tensor: Tensor) -> memoryview:
    # The buffer protocol has been there since NumPy 1; its type stubs do not say so before Python 3.12.
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
