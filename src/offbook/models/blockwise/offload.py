"""Where what is kept for the backward pass waits: in place, in the processor's memory, or in a scratch file."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from offbook.errors import ResourceError


def put_away(tensors: Sequence[Tensor], where: str) -> tuple[list[Tensor], list[_File | _Pinned]]:
    """Puts tensors where they wait.

    Args:
        tensors: what is kept.
        where: `"none"` for in place, `"cpu"`, or `"disk"`: files without a name in the folder for temporary ones
            (`TMPDIR`), which vanish with the process however it ends.

    Returns:
        Those that wait in place, and copies of the others.

    Raises:
        ResourceError: the disk is full.
    """
    if where == "disk":
        return [], [_File(tensor) for tensor in tensors]
    if where == "cpu" and tensors[0].device.type != "cpu":
        return [], [_Pinned(tensor) for tensor in tensors]
    return list(tensors), []


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
        self._file = tempfile.TemporaryFile(prefix="offbook-")  # noqa: SIM115 (it lives as long as this object)
        try:
            self._file.write(_bytes(tensor.detach().cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            got, fix = f"a full disk at {tempfile.gettempdir()}", "free some, or point TMPDIR elsewhere"
            raise ResourceError("offload='disk'", expected=f"room for {size} bytes", got=got, fix=fix) from None

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def back(self) -> Tensor:
        tensor = torch.empty(self._shape, dtype=self._dtype)
        self._file.seek(0)
        self._file.readinto(_bytes(tensor))
        return tensor.to(self._device)


def _bytes(tensor: Tensor) -> memoryview:
    # The buffer protocol has been there since NumPy 1; its type stubs do not say so before Python 3.12.
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
