"""A CUDA kernel that sleeps until it is woken, so that tests can have work under way for as long as they need."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

__all__ = ["Sleep", "SleepingKernel", "check"]

_SOURCE = r"""
extern "C" __global__ void sleep_then_copy(volatile unsigned int *woken, unsigned long long nanoseconds,
                                           const unsigned char *source, unsigned char *target,
                                           unsigned long long nbytes)
{
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (*woken == 0 && now - begin < nanoseconds);
    for (unsigned long long i = threadIdx.x; i < nbytes; i += blockDim.x)
        target[i] = source[i];
}
"""
_THREADS = 32
_SLEEPS = 1024  # words to wake sleeping kernels with; as many launches later the first word is used again
_WORD = ctypes.sizeof(ctypes.c_uint32)


def check(result: tuple[Any, ...]) -> Any:
    """What a function of ``cuda.bindings.driver`` gave, or ``RuntimeError`` with the driver's code."""
    if int(result[0]) != 0:
        raise RuntimeError(f"the driver refuses: {result[0].name}")
    return result[1] if len(result) > 1 else None


class Sleep:
    """A launched kernel that sleeps as long as the word at ``address`` is zero."""

    def __init__(self, address: int) -> None:
        self._word = ctypes.c_uint32.from_address(address)
        self._word.value = 0

    def wake(self) -> None:
        """Has the kernel go on at once; further calls do nothing."""
        self._word.value = 1


class SleepingKernel:
    """Compiles the kernel for a CUDA device, by its number, and runs it once.

    The device is the calling thread's current one from then on. (A first launch loads the kernel, which can wait for
    other kernels.) Needs ``cuda.core`` and NVRTC.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._core: Any = import_module("cuda.core")
        self._driver: Any = import_module("cuda.bindings.driver")
        device: Any = self._core.Device(index)
        device.set_current()
        # Allocated before any kernel sleeps, as allocating may wait for kernels. Pinned host memory has one address for
        # host and device, and what the one writes the other sees.
        address = check(self._driver.cuMemAllocHost((_SLEEPS + 1) * _WORD))
        self._words = (ctypes.c_uint32 * (_SLEEPS + 1)).from_address(int(address))
        self._words[_SLEEPS] = 0  # of those that nobody wakes
        self._launched = 0
        self._code = self.compile(f"sm_{device.arch}")
        self._kernel = self._code.get_kernel("sleep_then_copy")
        stream = self.stream()
        with self.asleep(stream, seconds=0):
            pass

    @staticmethod
    def compile(architecture: str) -> Any:
        """Compiles the kernel for an architecture such as ``"sm_90"``; needs no device."""
        core: Any = import_module("cuda.core")
        options = core.ProgramOptions(std="c++17", arch=architecture)
        return core.Program(_SOURCE, "c++", options).compile("cubin")

    def stream(self) -> Any:
        """A new stream of ``cuda.core``, foreign to asyncload; the device becomes the calling thread's current one."""
        device = self._core.Device(self.index)  # there is one for each thread
        device.set_current()
        return device.create_stream()

    @contextmanager
    def asleep(
        self, stream: Any, *, seconds: float = 60.0, source: int = 0, target: int = 0, nbytes: int = 0
    ) -> Generator[Sleep]:
        """Enqueues the kernel on a stream (any with ``__cuda_stream__``), where it sleeps for ``seconds`` at most.

        It then copies ``nbytes`` bytes of device memory from address ``source`` to ``target``. It is woken, and has
        ended, when the block ends.
        """
        address = ctypes.addressof(self._words) + self._launched % _SLEEPS * _WORD
        self._launched += 1
        sleep = Sleep(address)
        ended = self._launch(stream, address, seconds, (source, target, nbytes)).record()
        try:
            yield sleep
        finally:
            sleep.wake()
            ended.sync()

    def sleep(self, stream: Any, seconds: float) -> None:
        """Enqueues a sleep on a stream (any with ``__cuda_stream__``) and returns at once."""
        self._launch(stream, ctypes.addressof(self._words) + _SLEEPS * _WORD, seconds)

    def _launch(self, stream: Any, word: int, seconds: float, copy: tuple[int, int, int] = (0, 0, 0)) -> Any:
        config = self._core.LaunchConfig(grid=1, block=_THREADS)
        launch_on = self._core.Stream.from_handle(stream.__cuda_stream__()[1])
        self._core.launch(launch_on, config, self._kernel, word, int(seconds * 1e9), *copy)
        return launch_on

    def close(self) -> None:
        """Gives its memory back; no kernel of it runs any more."""
        self._driver.cuMemFreeHost(ctypes.addressof(self._words))
