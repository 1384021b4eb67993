"""What NVML says of this process, whichever package asks it, and that not asking is no error."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from asyncload.device._nvml import memory_of, process_memory

UNKNOWN = (1 << 64) - 1


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([], None),
        ([(8, 100)], None),
        ([(7, 100)], 100),
        ([(7, 0)], 0),
        ([(6, 1), (7, 100), (8, None)], 100),
        ([(7, None)], None),
        ([(7, UNKNOWN)], None),
        ([(7, 100), (7, 200)], 300),
        ([(7, 100), (7, UNKNOWN)], None),
    ],
)
def test_a_process_is_found_by_its_number(processes: list[tuple[int, int | None]], expected: int | None) -> None:
    assert memory_of(7, processes) == expected


def device_of_cuda_core(*used: int) -> Any:
    processes = [SimpleNamespace(pid=os.getpid(), used_gpu_memory=nbytes) for nbytes in used]
    return SimpleNamespace(to_system_device=lambda: SimpleNamespace(compute_running_processes=processes))


class NvidiaMlPy(ModuleType):
    """What is used of the package, for the device at one place of the bus."""

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802 - the package's name
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:  # noqa: N802
        assert self.open == 1
        if bus_id != "0000:1B:00.0":
            raise LookupError(bus_id)
        return bus_id

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        assert handle == "0000:1B:00.0"
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=300), SimpleNamespace(pid=1, usedGpuMemory=None)]


def test_cuda_core_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", NvidiaMlPy())
    assert process_memory(device_of_cuda_core(100)) == 100
    assert process_memory(device_of_cuda_core()) is None  # it has answered: this process is not there


def test_nvidia_ml_py_is_asked_where_cuda_core_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    package = NvidiaMlPy()
    monkeypatch.setitem(sys.modules, "pynvml", package)
    assert process_memory(SimpleNamespace(pci_bus_id="0000:1B:00.0")) == 300
    assert process_memory(SimpleNamespace(pci_bus_id="0000:FF:00.0")) is None
    assert package.open == 0


def test_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert process_memory(SimpleNamespace()) is None
