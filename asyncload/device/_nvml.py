"""What NVML, the driver's library for managing devices, tells of this process.

``cuda.core`` speaks to it where the CUDA bindings know it (12.9.6, 13.2 and later); else the package nvidia-ml-py does,
where somebody has installed it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Final

__all__ = ["memory_of", "process_memory"]

_NOT_AVAILABLE: Final = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE; nvidia-ml-py makes None of it


def process_memory(device: Any) -> int | None:
    """Bytes that this process takes of a device of ``cuda.core``, its context included; None where NVML does not tell.

    It often does not in a container, where processes have other numbers than on the host, or are not shown.
    """
    for processes in (_processes_by_cuda_core, _processes_by_nvidia_ml_py):
        try:
            return memory_of(os.getpid(), processes(device))
        except Exception:  # noqa: BLE001, S112 - without the package, the library or the permission it does not tell
            continue
    return None


def memory_of(pid: int, processes: Iterable[tuple[int, int | None]]) -> int | None:
    """The bytes of one of the processes (numbers and bytes); None if it is not there, or its bytes are not known.

    A process is there more than once if it uses several instances of a device.
    """
    known = 0
    listed = [nbytes for number, nbytes in processes if number == pid]
    for nbytes in listed:
        if nbytes is None or nbytes == _NOT_AVAILABLE:
            return None
        known += nbytes
    return known if listed else None


def _processes_by_cuda_core(device: Any) -> list[tuple[int, int | None]]:
    return [(process.pid, process.used_gpu_memory) for process in device.to_system_device().compute_running_processes]


def _processes_by_nvidia_ml_py(device: Any) -> list[tuple[int, int | None]]:
    nvml: Any = import_module("pynvml")
    nvml.nvmlInit()
    try:
        handle = nvml.nvmlDeviceGetHandleByPciBusId(device.pci_bus_id)
        return [(process.pid, process.usedGpuMemory) for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    finally:
        nvml.nvmlShutdown()
