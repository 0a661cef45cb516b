"""Where what is kept for the backward pass waits: in place, in the processor's memory, or in a scratch file."""

from __future__ import annotations

import contextlib
import errno
import functools
import tempfile
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from offbook.errors import ResourceError


def put_away(tensors: Sequence[Tensor], where: str, before: Sequence[Away] = ()) -> tuple[list[Tensor], list[Away]]:
    """Puts tensors where they wait.

    Args:
        tensors: what is kept.
        where: `"none"` for in place, `"cpu"`, or `"disk"`: files without a name in the folder for temporary ones
            (`TMPDIR`), which vanish with the process however it ends.
        before: what was put away before, and will be wanted next after these; it starts on its way when these are.

    Returns:
        Those that wait in place, and copies of the others.

    Raises:
        ResourceError: the disk is full.
    """
    if where == "disk":
        return [], [_File(tensor) for tensor in tensors]
    if where == "cpu" and tensors[0].device.type == "cuda":
        return [], [_Pinned(tensor, before if not number else ()) for number, tensor in enumerate(tensors)]
    return list(tensors), []


class Away(Protocol):
    """A tensor that waits elsewhere."""

    def back(self) -> Tensor:
        """The tensor, where it was."""


class _Pinned:
    """A copy in the processor's memory, which goes and comes beside the computation, and comes one layer ahead."""

    def __init__(self, tensor: Tensor, before: Sequence[Away]) -> None:
        self._device, self._before = tensor.device, before
        self._coming: Tensor | None = None
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        side = _side(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._copy.copy_(tensor, non_blocking=True)
        # Its memory must not be given to others before it is copied.
        tensor.record_stream(side)

    def fetch(self) -> Tensor:
        if self._coming is None:
            with torch.cuda.stream(_side(self._device)):
                self._coming = self._copy.to(self._device, non_blocking=True)
        return self._coming

    def back(self) -> Tensor:
        tensor, self._coming = self.fetch(), None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(_side(self._device))
        tensor.record_stream(current)
        for one in self._before:
            if isinstance(one, _Pinned):
                one.fetch()
        self._before = ()
        return tensor


@functools.cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which copies go beside the computation."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


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
