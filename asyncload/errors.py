"""The one tree of errors: four families, each an answer to "what now?".

``SourceError``: try again. ``FormatError``: another file. ``PlanError``: ask for less, or for something else.
``DeviceError``: another machine, or free some of this one. Leaves derive from the matching builtin too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncload.model import Partial
    from asyncload.plan import Suggestion

__all__ = [
    "AsyncloadError",
    "BackendUnavailableError",
    "ClosedError",
    "CopyError",
    "DeviceError",
    "DeviceNotFoundError",
    "DoesNotFitError",
    "ExportError",
    "FormatError",
    "LedgerError",
    "OptionsError",
    "OutOfDeviceMemoryError",
    "PlanError",
    "RangeError",
    "ResidencyError",
    "SourceChangedError",
    "SourceError",
    "SourceNotFoundError",
    "SourceReadError",
    "SplitError",
    "TargetError",
    "TensorNotFoundError",
    "TruncatedError",
    "UnsupportedQuantError",
    "UnsupportedTypeError",
]


class AsyncloadError(Exception):
    """The base of every error that asyncload raises on purpose.

    ``partial`` is what had arrived when a load failed for good (never after a cancellation), else None.
    """

    partial: Partial | None = None


# What to do: try again.


class SourceError(AsyncloadError):
    """The bytes could not be had from where they lie.

    ``url`` names the source; ``offset`` is the byte offset of the read that failed, where there was one;
    ``transient`` says that the same read may succeed when it is made again.
    """

    def __init__(self, message: str, *, url: str, offset: int | None = None, transient: bool = False) -> None:
        super().__init__(message)
        self.url = url
        self.offset = offset
        self.transient = transient


class SourceNotFoundError(SourceError, FileNotFoundError):
    """There is nothing at the source's address."""


class SourceChangedError(SourceError):
    """The source changed (size, modification time or inode) while it was being loaded."""


class SourceReadError(SourceError, OSError):
    """A read failed or ended early; ``errno`` is the system's number where there is one.

    ``tensor`` names the first tensor of the chunk that was to be read; it is None for a header.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str,
        offset: int | None = None,
        transient: bool = False,
        errno: int | None = None,
        tensor: str | None = None,
    ) -> None:
        super().__init__(message, url=url, offset=offset, transient=transient)
        self.errno = errno
        self.tensor = tensor


# What to do: another file.


class FormatError(AsyncloadError, ValueError):
    """The bytes are no valid GGUF; ``offset`` is the byte in the file at which that showed."""

    def __init__(self, message: str, *, offset: int, url: str | None = None) -> None:
        super().__init__(message)
        self.offset = offset
        self.url = url

    def __str__(self) -> str:
        """The message with the offset and, where known, the file."""
        where = f"{self.url}: " if self.url else ""
        return f"{where}{super().__str__()} (at byte {self.offset})"


class TruncatedError(FormatError):
    """The file ends before what its header announces."""


class UnsupportedTypeError(FormatError):
    """A tensor has a ggml type that is removed, unknown or a fork's; ``type_id`` is its number."""

    def __init__(self, message: str, *, offset: int, type_id: int, url: str | None = None) -> None:
        super().__init__(message, offset=offset, url=url)
        self.type_id = type_id


class SplitError(FormatError):
    """The parts of a split model are not all there, or do not belong together; ``parts`` names the culprits."""

    def __init__(self, message: str, *, parts: tuple[str, ...], offset: int = 0, url: str | None = None) -> None:
        super().__init__(message, offset=offset, url=url)
        self.parts = parts


# What to do: ask for less, or for something else.


class PlanError(AsyncloadError, ValueError):
    """What was asked for cannot be done, and nothing has moved."""


class OptionsError(PlanError):
    """An option has a value that cannot be used; ``option`` names it."""

    def __init__(self, message: str, *, option: str) -> None:
        super().__init__(message)
        self.option = option


class UnsupportedQuantError(PlanError):
    """A tensor's type cannot be decoded to the dtype asked for; ``tensor``, ``type`` and ``dtype`` say which."""

    def __init__(self, message: str, *, tensor: str, type: str, dtype: str) -> None:  # noqa: A002 - the field's name
        super().__init__(message)
        self.tensor = tensor
        self.type = type
        self.dtype = dtype


class TensorNotFoundError(PlanError, KeyError):
    """A name or pattern matches no tensor; ``name`` is what was asked for."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name

    def __str__(self) -> str:
        """The message itself (``KeyError`` would quote it)."""
        return str(self.args[0])


class TargetError(PlanError):
    """A buffer given by the caller cannot take its tensor; ``tensor``, and ``needed`` and ``available`` in bytes."""

    def __init__(self, message: str, *, tensor: str, needed: int | None = None, available: int | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.needed = needed
        self.available = available


class ExportError(PlanError, BufferError):
    """A tensor cannot be given to another library in the form asked for; ``tensor`` names it."""

    def __init__(self, message: str, *, tensor: str) -> None:
        super().__init__(message)
        self.tensor = tensor


class RangeError(PlanError, IndexError):
    """A copy would leave its source or its target; ``offset``, ``nbytes`` and ``limit`` in bytes."""

    def __init__(self, message: str, *, offset: int, nbytes: int, limit: int) -> None:
        super().__init__(message)
        self.offset = offset
        self.nbytes = nbytes
        self.limit = limit


class DoesNotFitError(PlanError, MemoryError):
    """A model does not fit; ``needed`` at the least, ``available`` and ``breakdown`` (by purpose) in bytes.

    ``suggestions`` are single changes that take less, those that suffice first. Unless ``kv_exact``, the cache of keys
    and values is counted with an upper bound, which ``kv_bytes`` replaces. ``message`` says how much is needed and
    available, the text of the error also what helps, as arguments of ``plan_memory``.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: int,
        available: int,
        breakdown: Mapping[str, int],
        suggestions: tuple[Suggestion, ...],
        kv_exact: bool,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.needed = needed
        self.available = available
        self.breakdown = dict(breakdown)
        self.suggestions = suggestions
        self.kv_exact = kv_exact

    def __str__(self) -> str:
        """The message, and what helps."""
        helps = [
            *map(str, self.suggestions),
            *([] if self.kv_exact else ["kv_bytes=..., as the cache is an upper bound"]),
        ]
        return f"{self.message}; what helps: {'; '.join(helps) or 'a larger device, or a smaller model'}"


class ClosedError(PlanError):
    """The loader, model, tensor or partial result was used after it had been closed."""


class StalledError(PlanError, TimeoutError):
    """A consumer of a layer stream kept a layer for longer than the others were to wait for it, and lost its place."""


# What to do: another machine, or free some of this one.


class DeviceError(AsyncloadError):
    """A device could not do what it was asked; ``device`` names it, ``code`` is the driver's name of the failure.

    Where a load failed, ``tensor`` names the first tensor of the chunk that was on its way, and ``offset`` is the byte
    in the file at which that chunk begins. Where a layer could not be brought into its slot, ``layer`` is its number;
    out of host memory all of the layer is on its way, of which they name the first tensor.
    """

    def __init__(
        self,
        message: str,
        *,
        device: str,
        code: str | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__(message)
        self.device = device
        self.code = code
        self.tensor = tensor
        self.offset = offset
        self.layer = layer


class DeviceNotFoundError(DeviceError, LookupError):
    """There is no such device on this machine."""


class BackendUnavailableError(DeviceError, ImportError):
    """The packages or the driver that this device needs are not there."""


class CopyError(DeviceError):
    """A copy to the device failed, or work that copies were among, of which CUDA does not say what it was."""


class OutOfDeviceMemoryError(DeviceError, MemoryError):
    """The device has not enough free memory; ``needed``, ``available`` and ``breakdown`` (by purpose) in bytes."""

    def __init__(
        self,
        message: str,
        *,
        device: str,
        needed: int,
        available: int | None,
        breakdown: Mapping[str, int],
        code: str | None = None,
    ) -> None:
        super().__init__(message, device=device, code=code)
        self.needed = needed
        self.available = available
        self.breakdown = dict(breakdown)


class LedgerError(DeviceError):
    """A range of device memory overlaps one that the ledger holds, or is none of the ledger's.

    ``address`` and ``nbytes`` are the range's.
    """

    def __init__(self, message: str, *, device: str, address: int, nbytes: int) -> None:
        super().__init__(message, device=device)
        self.address = address
        self.nbytes = nbytes


class ResidencyError(DeviceError):
    """What the ledger holds as the device's memory is not; ``allocations`` are the descriptions of what is not."""

    def __init__(self, message: str, *, device: str, allocations: Sequence[str]) -> None:
        super().__init__(message, device=device)
        self.allocations = tuple(allocations)
