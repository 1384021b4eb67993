"""``asyncload doctor``: what a load would work with here."""

from __future__ import annotations

import json
import platform
import re
import resource
from contextlib import closing, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Final

from asyncload import __version__
from asyncload.cli.text import table
from asyncload.errors import AsyncloadError, BackendUnavailableError
from asyncload.options import Options, format_size

__all__ = ["doctor"]

_KERNEL_MODULE: Final = Path("/proc/driver/nvidia/version")
_MEMORY: Final = Path("/proc/meminfo")


def doctor(*, device: str | None, as_json: bool) -> None:
    """Prints what a load to a device (by default the first GPU, else the host) would work with.

    Raises, after that, what keeps such a load from working: what opening the device and its engine raises.
    """
    from asyncload.device import default_device

    engine, failure = _engine(device or default_device(), Options.from_env())
    found = {
        "asyncload": {"version": __version__, "python": platform.python_version()},
        "engine": engine,
        "native": _extension(),
        "driver": _driver(),
        "cuda": _devices(),
        "nvrtc": _nvrtc(),
        "numba": _numba(),
        "memory": _memory(),
    }
    print(json.dumps(found, indent=2, ensure_ascii=False) if as_json else _render(found))
    if failure is not None:
        raise failure


# Each of these returns plain values for JSON; ``problem`` says why something is missing, and is None where nothing is.


def _engine(device: str, options: Options) -> tuple[dict[str, Any], AsyncloadError | None]:
    """Which engine moves a local file's bytes to a device, and why none can, if so. Only opening it shows that."""
    from asyncload.device import open_device
    from asyncload.pipeline import Engine

    def open_engine(options: Options) -> str:
        with closing(Engine(open_device(device), options)) as engine:
            return engine.options.engine

    found: dict[str, Any] = {"device": device, "asked": options.engine, "serves": None, "problem": None}
    try:
        found["serves"] = open_engine(options)
        if found["serves"] != "native" and options.engine == "auto":
            open_engine(replace(options, engine="native"))
    except AsyncloadError as error:
        found["problem"] = str(error)
        return found, None if found["serves"] else error
    return found, None


def _extension() -> dict[str, Any]:
    """The C++ extension, which an installation has where there was a compiler."""
    try:
        import asyncload_native
    except ImportError as error:
        return {"version": None, "compiler": None, "problem": str(error)}
    return {"version": asyncload_native.version, "compiler": asyncload_native.compiler, "problem": None}


def _driver() -> dict[str, Any]:
    """NVIDIA's kernel module by its version, and the version of CUDA that the driver's library knows."""
    found: dict[str, Any] = {"version": None, "cuda": None, "problem": None}
    with suppress(OSError):
        match = re.search(r"\s(\d+\.\d[\d.]*)\s", _KERNEL_MODULE.read_text())
        found["version"] = match and match[1]
    try:
        import asyncload_native

        version = asyncload_native.Driver().version
        found["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
    except (ImportError, RuntimeError) as error:
        found["problem"] = str(error)
    return found


def _devices() -> dict[str, Any]:
    """The CUDA devices, each opened."""
    from asyncload.device import open_device

    devices: list[dict[str, Any]] = []
    for index in count():
        try:
            with closing(open_device(f"cuda:{index}")) as device:
                memory, info = device.memory(), device.info
        except AsyncloadError as error:
            return {"devices": devices, "problem": None if devices else str(error)}
        devices.append({"name": info.name, "model": info.model, "total": memory.total, "free": memory.free})
    raise AssertionError("there is a last device")


def _nvrtc() -> dict[str, Any]:
    """The compiler of the CUDA kernels, and the folder that keeps them."""
    from asyncload.quant.cuda import compiler

    try:
        version, folder = compiler()
    except BackendUnavailableError as error:
        return {"version": None, "kernels": None, "problem": str(error)}
    return {"version": version, "kernels": folder and str(folder), "problem": None}


def _numba() -> dict[str, Any]:
    """The compiler of the host's kernels, and the folder that keeps them."""
    from asyncload.quant import compiler

    version, folder = compiler()
    return {"version": version, "kernels": folder and str(folder), "problem": None}


def _memory() -> dict[str, Any]:
    """The host's memory in bytes: what is available, and what a process may lock (None: all of it)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    match = re.search(r"^MemAvailable:\s*(\d+) kB", _MEMORY.read_text(), re.MULTILINE)
    return {
        "available": match and int(match[1]) << 10,
        "lockable": None if limit == resource.RLIM_INFINITY else limit,
    }


def _render(found: dict[str, dict[str, Any]]) -> str:
    """What was found, a line for each."""
    engine, native, driver, cuda, memory = (found[key] for key in ("engine", "native", "driver", "cuda", "memory"))
    serves = f"{engine['serves'] or 'none'} for {engine['device']} (asked for: {engine['asked']})"
    cuda_version = driver["cuda"] and f"CUDA {driver['cuda']}"
    lockable = "all of it" if memory["lockable"] is None else format_size(memory["lockable"])
    rows = [
        ("asyncload", f"{found['asyncload']['version']} on Python {found['asyncload']['python']}"),
        ("engine", _joined(serves, engine["problem"])),
        ("native", _joined(native["version"], native["compiler"], native["problem"])),
        ("driver", _joined(driver["version"], cuda_version, driver["problem"])),
        *((each["name"], f"{each['model']}, {_sizes(each)}") for each in cuda["devices"]),
        *([] if cuda["devices"] else [("cuda", cuda["problem"])]),
        *((name, _compiler(found[name])) for name in ("nvrtc", "numba")),
        ("memory", f"{format_size(memory['available'] or 0)} available, lockable: {lockable}"),
    ]
    return table(rows, align="<<")


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _sizes(device: dict[str, Any]) -> str:
    return f"{format_size(device['free'])} of {format_size(device['total'])} free"


def _compiler(found: dict[str, Any]) -> str:
    kept = f"kernels kept in {found['kernels']}" if found["kernels"] else "kernels cannot be kept"
    return found["problem"] or f"{found['version']}, {kept}"
