"""The stand-in driver is as asynchronous, and as unforgiving, as a device."""

from __future__ import annotations

import ctypes

import pytest

from tests.native.stub_cuda import StubCuda

pytestmark = pytest.mark.native

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, INVALID_CONTEXT = 0, 1, 2, 3, 201
INVALID_HANDLE, NOT_READY, LAUNCH_FAILED = 400, 600, 719
HostKernel = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.c_ssize_t)


class Bytes:
    """Host memory that the driver copies from and to."""

    def __init__(self, content: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(content, len(content))
        self.address = ctypes.addressof(self.buffer)

    @property
    def content(self) -> bytes:
        return self.buffer.raw


@pytest.fixture
def cuda(stub_cuda: StubCuda) -> StubCuda:
    stub_cuda.attach()
    return stub_cuda


def upload(cuda: StubCuda, stream: int, target: int, source: Bytes) -> int:
    return cuda.call("cuMemcpyHtoDAsync_v2", target, source.address, len(source.content), stream)


def content(cuda: StubCuda, address: int, nbytes: int) -> bytes:
    stream, copy = cuda.make("cuStreamCreate", 0), Bytes(bytes(nbytes))
    assert cuda.call("cuMemcpyDtoHAsync_v2", copy.address, address, nbytes, stream) == SUCCESS
    assert cuda.call("cuStreamSynchronize", stream) == SUCCESS
    assert cuda.call("cuStreamDestroy_v2", stream) == SUCCESS
    return copy.content


def test_a_copy_reads_its_source_when_the_stream_comes_to_it(cuda: StubCuda) -> None:
    memory, stream, event = cuda.make("cuMemAlloc_v2", 4), cuda.make("cuStreamCreate", 0), cuda.make("cuEventCreate", 2)
    source = Bytes(b"soon")
    cuda.hold(True)
    assert upload(cuda, stream, memory, source) == SUCCESS
    assert cuda.call("cuEventRecord", event, stream) == SUCCESS
    assert cuda.call("cuEventQuery", event) == cuda.call("cuStreamQuery", stream) == NOT_READY
    source.buffer.raw = b"late"
    cuda.hold(False)
    assert cuda.call("cuEventSynchronize", event) == SUCCESS
    assert cuda.call("cuEventQuery", event) == SUCCESS
    assert content(cuda, memory, 4) == b"late"


def test_a_stream_waits_for_the_event_as_it_was_recorded_last(cuda: StubCuda) -> None:
    first, second = cuda.make("cuStreamCreate", 1), cuda.make("cuStreamCreate", 1)
    memory, event = cuda.make("cuMemAlloc_v2", 4), cuda.make("cuEventCreate", 0)
    cuda.hold(True)
    upload(cuda, first, memory, one := Bytes(b"one."))
    cuda.call("cuEventRecord", event, first)
    assert cuda.call("cuStreamWaitEvent", second, event, 0) == SUCCESS
    upload(cuda, second, memory, two := Bytes(b"two."))
    cuda.hold(False)
    assert cuda.call("cuStreamSynchronize", second) == SUCCESS
    assert content(cuda, memory, 4) == two.content
    assert one.content == b"one."


def test_kernels_decode_what_their_groups_reach(cuda: StubCuda) -> None:
    def upper(source: int, target: int, count: int) -> int:
        ctypes.memmove(target, ctypes.string_at(source, count).upper(), count)
        return 1

    function = HostKernel(upper)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    kernel = cuda.kernel(address, blocks_per_group=2)
    source, target = cuda.make("cuMemAlloc_v2", 5), cuda.make("cuMemAlloc_v2", 5)
    stream, event, packed = cuda.make("cuStreamCreate", 0), cuda.make("cuEventCreate", 0), Bytes(b"words")
    upload(cuda, stream, source, packed)
    arguments = (ctypes.c_uint64 * 3)(source, target, 5)
    each = (ctypes.c_void_p * 3)(*(ctypes.addressof(arguments) + 8 * i for i in range(3)))
    for groups, decoded in ((2, b"WORD\xa5"), (3, b"WORDS")):
        launch = (kernel, groups, 1, 1, 256, 1, 1, 0, stream, ctypes.byref(each), 0)
        assert cuda.call("cuLaunchKernel", *launch) == SUCCESS
        cuda.call("cuEventRecord", event, stream)
        assert cuda.call("cuEventSynchronize", event) == SUCCESS
        assert content(cuda, target, 5) == decoded


def test_what_fails_on_the_device_fails_every_later_call(cuda: StubCuda) -> None:
    memory, stream = cuda.make("cuMemAlloc_v2", 4), cuda.make("cuStreamCreate", 0)
    cuda.fail("work", LAUNCH_FAILED, nth=2)
    source = Bytes(b"data")
    upload(cuda, stream, memory, source)
    upload(cuda, stream, memory, source)
    assert cuda.call("cuStreamSynchronize", stream) == LAUNCH_FAILED
    assert cuda.call("cuMemFree_v2", memory) == LAUNCH_FAILED


def test_the_nth_call_fails_and_no_other(cuda: StubCuda) -> None:
    cuda.fail("cuStreamCreate", OUT_OF_MEMORY, nth=2)
    stream = ctypes.c_uint64()
    assert [cuda.call("cuStreamCreate", ctypes.byref(stream), 0) for _ in range(3)] == [0, OUT_OF_MEMORY, 0]
    assert (cuda.calls("cuStreamCreate"), cuda.live("streams")) == (3, 2)


def test_misuse_is_an_error(stub_cuda: StubCuda) -> None:
    made = ctypes.c_uint64()
    assert stub_cuda.call("cuMemAlloc_v2", ctypes.byref(made), 4) == NOT_INITIALIZED
    stub_cuda.attach()
    stub_cuda.call("cuCtxSetCurrent", 0)
    assert stub_cuda.call("cuMemAlloc_v2", ctypes.byref(made), 4) == INVALID_CONTEXT
    stub_cuda.attach()
    memory, stream, outside = stub_cuda.make("cuMemAlloc_v2", 4), stub_cuda.make("cuStreamCreate", 0), Bytes(b"12345")
    assert upload(stub_cuda, stream, memory, outside) == INVALID_VALUE
    assert stub_cuda.call("cuStreamQuery", stream + 1) == INVALID_HANDLE
    assert stub_cuda.call("cuMemFree_v2", memory + 1) == INVALID_VALUE
    assert stub_cuda.call("cuMemAlloc_v2", ctypes.byref(made), 1 << 40) == OUT_OF_MEMORY


def test_memory_given_back_under_work_is_a_violation(cuda: StubCuda) -> None:
    memory, stream, source = cuda.make("cuMemAlloc_v2", 4), cuda.make("cuStreamCreate", 0), Bytes(b"data")
    assert cuda.call("cuMemHostRegister_v2", source.address, 4, 0) == SUCCESS
    cuda.hold(True)
    upload(cuda, stream, memory, source)
    cuda.call("cuStreamDestroy_v2", stream)  # its work goes on
    assert cuda.call("cuMemHostUnregister", source.address) == SUCCESS
    assert cuda.violations == ["host memory was unregistered under work on it"]
    cuda.reset()


def test_what_lives_is_counted(cuda: StubCuda) -> None:
    assert {what: cuda.live(what) for what in ("contexts", "memory", "registered", "streams", "events")} == {
        "contexts": 1,
        "memory": 0,
        "registered": 0,
        "streams": 0,
        "events": 0,
    }
