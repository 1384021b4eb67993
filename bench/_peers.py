"""Other ways to bring the same model to the same place: those of the peers that are installed here."""

from __future__ import annotations

import importlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from asyncload.gguf import Header
from asyncload.testing import synthesize

__all__ = ["INSTANTTENSOR", "PEERS", "TRANSFORMERS", "Peer", "Run", "missing", "peers", "safetensors_loaders"]

INSTANTTENSOR: Final = "InstantTensor"
TRANSFORMERS: Final = "transformers, bf16"

Tensors = Mapping[str, Any]

# The peers and the packages that each needs; to host memory safetensors gets along with numpy.
PEERS: Final[Mapping[str, tuple[str, ...]]] = {
    "safetensors": ("safetensors", "torch"),
    "instanttensor": ("instanttensor", "torch"),
    "gguf-py": ("gguf", "torch"),
    "transformers": ("transformers", "accelerate", "gguf", "torch"),
}

_HOST_NOTE: Final = "maps the file, reads nothing"

# How InstantTensor reads a file that is in the page cache; as it comes, it would read around that.
_BUFFERED: Final = ("AIO_BUFFERED", "URING_BUFFERED", "MMAP")

# Where transformers puts a Llama's tensors. The queries' and keys' rows come in another order there, so they are not
# compared with the file's.
_MODULES: Final = {
    "token_embd": "model.embed_tokens",
    "output": "lm_head",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a peer did once: seconds for the whole model, a remark, and what it decoded, by the names in the file."""

    seconds: float
    remark: str = ""
    tensors: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer's name, what it does, and whether it decodes to bfloat16; those that do are slow and run once."""

    name: str
    run: Callable[[], Run]
    bf16: bool = False


def missing(wanted: Collection[str], device: str) -> dict[str, str]:
    """The peers that cannot be measured here, and why: packages are not installed or do not import, or the device."""
    needs: dict[str, Sequence[str]] = {name: PEERS[name] for name in wanted}
    if device == "host" and "safetensors" in needs:
        needs["safetensors"] = ("safetensors",)
    reasons = {name: reason for name, packages in needs.items() if (reason := _lacking(packages))}
    if device == "host" and "instanttensor" in needs:
        reasons["instanttensor"] = "loads to CUDA devices only"
    return reasons


def _lacking(packages: Sequence[str]) -> str | None:
    if absent := [package for package in packages if not find_spec(package)]:
        return f"not installed: {', '.join(absent)}"
    for package in reversed(packages):  # torch comes before those that stand on it
        try:
            _module(package)
        except Exception as error:  # noqa: BLE001 - whatever a package does, the other figures stand
            return f"{package} does not import: {type(error).__name__}: {error}"
    return None


def peers(
    file: Path, header: Header, device: str, folder: Path, *, wanted: Collection[str], share: float
) -> Iterator[Peer]:
    """The peers that are wanted and installed, made ready in ``folder``, the slowest last.

    Their packages are imported and the device is used before; safetensors gets a file of its own with the same bytes,
    transformers loads a tiny model first. ``share`` (0 to 1) is that of the bytes on which gguf-py's decoding is
    measured; its time is scaled up then, for each type by itself.
    """
    ready = _ready(wanted, device)
    if {"safetensors", "instanttensor"} & set(ready):
        same = folder / "same.safetensors"
        _write_safetensors(file, header, same)
        for name, load in safetensors_loaders(same, device, wanted=ready).items():
            yield Peer(name, partial(_timed, load, _HOST_NOTE if device == "host" else ""))
    device = "cpu" if device == "host" else device
    if "gguf-py" in ready:
        yield Peer("gguf-py + torch, packed", partial(_timed, partial(_gguf_packed, file, device)))
        yield Peer("gguf-py + torch, bf16", lambda: _gguf_decoded(file, device, share), bf16=True)
    if "transformers" in ready:
        (tiny,) = synthesize(folder / "tiny.gguf", preset="tiny")
        yield Peer(TRANSFORMERS, lambda: _transformers(file, header, device, tiny), bf16=True)


def safetensors_loaders(file: Path, device: str, *, wanted: Collection[str]) -> dict[str, Callable[[], Tensors]]:
    """By name, what loads a safetensors file: the ways of those peers that are wanted and installed.

    Each returns its tensors by name once they are there. InstantTensor's own their memory, as ours do. It is as it is
    installed, where it pins memory for each load anew; with ``INSTANTTENSOR_CACHE_BUFFER=1`` in the environment, at
    which it looks once, it keeps that until the process ends, as a loader of ours does until it is closed.
    """
    ready = _ready(wanted, device)
    loaders: dict[str, Callable[[], Tensors]] = {}
    if "safetensors" in ready:
        name = "safetensors.torch" if find_spec("torch") else "safetensors.numpy"
        load_file, where = _module(name).load_file, [] if device == "host" else [device]
        loaders[f"{name}.load_file"] = lambda: _there(load_file(file, *where), device)
    if "instanttensor" in ready:
        keeps = os.environ.get("INSTANTTENSOR_CACHE_BUFFER") == "1"
        for backend in _BUFFERED:
            name = f"{INSTANTTENSOR}, {backend}" + (", buffers kept" if keeps else "")
            loaders[name] = partial(_instanttensor, file, device, backend)
    return loaders


def _ready(wanted: Collection[str], device: str) -> list[str]:
    """The peers that are wanted and can be measured here, imported, and the device used."""
    unready = missing(wanted, device)
    ready = [name for name in PEERS if name in wanted and name not in unready]
    if ready:
        _synchronize(device)
    return ready


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _synchronize(device: str) -> None:
    if device not in {"cpu", "host"}:
        _module("torch").cuda.synchronize(device)


def _timed(load: Callable[[], Tensors], remark: str = "") -> Run:
    begin = time.perf_counter()
    tensors = load()
    seconds = time.perf_counter() - begin
    del tensors  # freeing is not loading
    return Run(seconds, remark)


def _write_safetensors(file: Path, header: Header, target: Path) -> None:
    import numpy as np

    data = np.memmap(file, np.uint8, "r")
    tensors = {info.name: data[info.offset : info.offset + info.nbytes] for info in header.tensors.values()}
    _module("safetensors.numpy").save_file(tensors, target)


def _there(tensors: Tensors, device: str) -> Tensors:
    """The tensors, once the copies to the device have ended."""
    _synchronize(device)
    return tensors


def _instanttensor(file: Path, device: str, backend: str) -> Tensors:
    module = _module("instanttensor")
    with module.safe_open(str(file), framework="pt", device=device, backend=module.Backend[backend]) as opened:
        return _there(dict(opened.tensors()), device)


def _gguf_packed(file: Path, device: str) -> Tensors:
    """Every tensor's blocks, copied out of gguf-py's mapping of the file (a mapping alone would have read nothing)."""
    torch = _module("torch")
    tensors = _module("gguf").GGUFReader(file).tensors
    return _there({tensor.name: torch.tensor(tensor.data, device=device) for tensor in tensors}, device)


def _gguf_decoded(file: Path, device: str, share: float) -> Run:
    """Every tensor to float32 by gguf-py, to bfloat16 and to the device by torch."""
    torch, gguf = _module("torch"), _module("gguf")
    begin = time.perf_counter()
    tensors = gguf.GGUFReader(file).tensors
    opening = time.perf_counter() - begin
    seen, taken, seconds = defaultdict[Any, int](int), defaultdict[Any, int](int), defaultdict[Any, float](float)
    results: dict[str, Any] = {}
    for tensor in tensors:
        kind, nbytes = tensor.tensor_type, int(tensor.n_bytes)
        seen[kind] += nbytes
        if taken[kind] >= share * seen[kind]:
            continue
        begin = time.perf_counter()
        values = gguf.dequantize(tensor.data, kind)
        values = values if values.flags.writeable else values.copy()  # float32 comes as the mapped file itself
        results[str(tensor.name)] = torch.from_numpy(values).to(torch.bfloat16).to(device)
        _synchronize(device)
        seconds[kind] += time.perf_counter() - begin
        taken[kind] += nbytes
    whole = opening + sum(seconds[kind] * seen[kind] / taken[kind] for kind in seen)
    measured = sum(taken.values()) / sum(seen.values())
    return Run(whole, f"extrapolated from {measured:.0%} of the bytes" if measured < 1 else "", results)


def _transformers(file: Path, header: Header, device: str, tiny: Path) -> Run:
    _from_pretrained(tiny, device)  # what it imports then is not loading
    begin = time.perf_counter()
    model = _from_pretrained(file, device)
    seconds = time.perf_counter() - begin
    if header.metadata.get("general.architecture") != "llama":
        return Run(seconds)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {name: _place(name) for name in header.tensors}
    return Run(seconds, "", {name: parameters[place].detach() for name, place in places.items() if place in parameters})


def _from_pretrained(file: Path, device: str) -> Any:
    transformers = _module("transformers")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    dtype = {"dtype" if version >= (4, 56) else "torch_dtype": _module("torch").bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, device_map={"": device}, **dtype
    )
    _synchronize(device)
    return model


def _place(name: str) -> str | None:
    """Where transformers puts a tensor of the file, or None where it does not keep it as it is."""
    *layer, part, suffix = name.split(".")
    module = _MODULES.get(part)
    if module is None:
        return None
    return f"model.layers.{layer[1]}.{module}.{suffix}" if layer else f"{module}.{suffix}"
