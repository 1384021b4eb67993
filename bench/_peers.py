"""Other ways to bring the same model to the same place: those of the peers that are installed here."""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from asyncload.gguf import Header
from asyncload.testing import synthesize

__all__ = ["PEERS", "TRANSFORMERS", "Peer", "Run", "missing", "peers"]

TRANSFORMERS: Final = "transformers, bf16"

# The peers and the packages that each needs; to host memory safetensors gets along with numpy.
PEERS: Final[Mapping[str, tuple[str, ...]]] = {
    "safetensors": ("safetensors", "torch"),
    "gguf-py": ("gguf", "torch"),
    "transformers": ("transformers", "accelerate", "gguf", "torch"),
}

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
    """The peers that cannot be measured here, and why: the packages that they lack."""
    needs: dict[str, Sequence[str]] = {name: PEERS[name] for name in wanted}
    if device == "host" and "safetensors" in needs:
        needs["safetensors"] = ("safetensors",)
    lacking = {name: [package for package in packages if not find_spec(package)] for name, packages in needs.items()}
    return {name: f"not installed: {', '.join(packages)}" for name, packages in lacking.items() if packages}


def peers(
    file: Path, header: Header, device: str, folder: Path, *, wanted: Collection[str], share: float
) -> Iterator[Peer]:
    """The peers that are wanted and installed, made ready in ``folder``, the slowest last.

    Their packages are imported and the device is used before; safetensors gets a file of its own with the same bytes,
    transformers loads a tiny model first. ``share`` (0 to 1) is that of the bytes on which gguf-py's decoding is
    measured; its time is scaled up then, for each type by itself.
    """
    unready = missing(wanted, device)
    ready = [name for name in PEERS if name in wanted and name not in unready]
    device = "cpu" if device == "host" else device
    for package in {package for name in ready for package in PEERS[name] if find_spec(package)}:
        _module(package)
    _synchronize(device)
    if "safetensors" in ready:
        same = folder / "same.safetensors"
        _write_safetensors(file, header, same)
        module, where = ("safetensors.torch", [device]) if find_spec("torch") else ("safetensors.numpy", [])
        note = "maps the file, reads nothing" if where == ["cpu"] else ""
        yield Peer(f"{module}.load_file", lambda: _timed(lambda: _module(module).load_file(same, *where), device, note))
    if "gguf-py" in ready:
        yield Peer("gguf-py + torch, packed", lambda: _timed(lambda: _gguf_packed(file, device), device))
        yield Peer("gguf-py + torch, bf16", lambda: _gguf_decoded(file, device, share), bf16=True)
    if "transformers" in ready:
        (tiny,) = synthesize(folder / "tiny.gguf", preset="tiny")
        yield Peer(TRANSFORMERS, lambda: _transformers(file, header, device, tiny), bf16=True)


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _synchronize(device: str) -> None:
    if device != "cpu":
        _module("torch").cuda.synchronize(device)


def _timed(function: Callable[[], object], device: str, remark: str = "") -> Run:
    begin = time.perf_counter()
    result = function()
    _synchronize(device)
    seconds = time.perf_counter() - begin
    del result  # freeing is not loading
    return Run(seconds, remark)


def _write_safetensors(file: Path, header: Header, target: Path) -> None:
    import numpy as np

    data = np.memmap(file, np.uint8, "r")
    tensors = {info.name: data[info.offset : info.offset + info.nbytes] for info in header.tensors.values()}
    _module("safetensors.numpy").save_file(tensors, target)


def _gguf_packed(file: Path, device: str) -> Any:
    """Every tensor's blocks, copied out of gguf-py's mapping of the file (a mapping alone would have read nothing)."""
    torch = _module("torch")
    return {
        tensor.name: torch.tensor(tensor.data, device=device) for tensor in _module("gguf").GGUFReader(file).tensors
    }


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
