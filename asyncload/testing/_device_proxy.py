"""A device and its streams that do what others do: what doubles of devices are made from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from asyncload.device import (
    Device,
    DeviceInfo,
    DeviceMemory,
    Event,
    MemoryInfo,
    Recipient,
    Residency,
    StagingMemory,
    Stream,
    WorkOnStream,
    WorkStream,
    allocate_until,
    free_each,
)
from asyncload.gguf import GGMLType
from asyncload.quant import DType

__all__ = ["DeviceProxy", "StreamProxy"]


class StreamProxy(WorkOnStream):
    """A stream that does what ``inner`` does; a double overrides what it does otherwise."""

    def __init__(self, inner: Stream) -> None:
        self.inner = inner

    def upload(
        self, target: DeviceMemory, target_offset: int, staging: StagingMemory, staging_offset: int, nbytes: int
    ) -> None:
        """As the inner stream."""
        self.inner.upload(target, target_offset, staging, staging_offset, nbytes)

    def decode(self, type: GGMLType, dtype: DType, source: DeviceMemory, target: DeviceMemory) -> None:  # noqa: A002
        """As the inner stream."""
        self.inner.decode(type, dtype, source, target)

    def wait(self, event: Event) -> None:
        """As the inner stream."""
        self.inner.wait(event)

    def record(self, *, timing: bool = False) -> Event:
        """As the inner stream."""
        return self.inner.record(timing=timing)

    def close(self) -> None:
        """Closes the inner stream."""
        self.inner.close()


class DeviceProxy:
    """A device that does what ``inner`` does; a double overrides what it does otherwise."""

    def __init__(self, inner: Device) -> None:
        self.inner = inner

    @property
    def info(self) -> DeviceInfo:
        """The inner device's."""
        return self.inner.info

    def attach(self) -> None:
        """As the inner device."""
        self.inner.attach()

    def allocate(self, nbytes: int) -> DeviceMemory:
        """As the inner device."""
        return self.inner.allocate(nbytes)

    def allocate_all(self, sizes: Sequence[int]) -> list[DeviceMemory]:
        """As the inner device."""
        return self.inner.allocate_all(sizes)

    def allocate_some(self, sizes: Sequence[int], recipient: Recipient) -> list[DeviceMemory]:
        """Each by ``allocate``."""
        return allocate_until(sizes, self.allocate, recipient)

    def free(self, memory: DeviceMemory) -> None:
        """As the inner device."""
        self.inner.free(memory)

    def free_all(self, memory: Collection[DeviceMemory]) -> dict[DeviceMemory, Exception]:
        """Each by ``free``."""
        return free_each(memory, self.free)

    def staging(self, nbytes: int) -> StagingMemory:
        """The inner device's."""
        return self.inner.staging(nbytes)

    def stream(self) -> Stream:
        """The inner device's."""
        return self.inner.stream()

    def prepare(self, pairs: Collection[tuple[GGMLType, DType]]) -> None:
        """As the inner device."""
        self.inner.prepare(pairs)

    def adopt(self, stream: object) -> WorkStream:
        """As the inner device."""
        return stream if isinstance(stream, StreamProxy) else self.inner.adopt(stream)

    def barrier(self) -> Event:
        """The inner device's."""
        return self.inner.barrier()

    def download(self, memory: DeviceMemory, offset: int, buffer: memoryview) -> None:
        """As the inner device."""
        self.inner.download(memory, offset, buffer)

    def memory(self) -> MemoryInfo:
        """The inner device's."""
        return self.inner.memory()

    def process_memory(self) -> int | None:
        """The inner device's."""
        return self.inner.process_memory()

    def residency(self, memory: DeviceMemory) -> Residency:
        """The inner device's."""
        return self.inner.residency(memory)

    def close(self) -> None:
        """Closes the inner device."""
        self.inner.close()
