"""The kernels as machine code for other processors: the code of every pair is made, and calls no library."""

from __future__ import annotations

import re
from typing import Any

import llvmlite.binding
import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import FAMILIES, DType, native_dtype
from asyncload.quant._block import Block, Processor
from asyncload.quant._kernels import DECODERS
from asyncload.quant._vector import I8, ir

binding: Any = llvmlite.binding  # it carries no types

PAIRS = [
    (type_, dtype)
    for type_ in FAMILIES
    for dtype in (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
    if native_dtype(type_) is not dtype
]
SHUFFLE = "llvm.x86.ssse3.pshuf.b.128"
TABLE = "llvm.aarch64.neon.tbl1.v16i8"
TARGETS = {
    "aarch64": ("aarch64-linux-gnu", "", Processor(half=True, permute=False, look_up=TABLE), r"\bblr?\b"),
    "aarch64, computed": ("aarch64-linux-gnu", "", Processor(half=True, permute=False), r"\bblr?\b"),
    "x86-64": ("x86_64-linux-gnu", "x86-64", Processor(half=False, permute=False), r"\bcallq?\b"),
    "x86-64-v2": (
        "x86_64-linux-gnu",
        "x86-64-v2",
        Processor(half=False, permute=False, look_up=SHUFFLE),
        r"\bcallq?\b",
    ),
    "x86-64-v3": ("x86_64-linux-gnu", "x86-64-v3", Processor(half=True, permute=False, look_up=SHUFFLE), r"\bcallq?\b"),
    "x86-64-v4": ("x86_64-linux-gnu", "x86-64-v4", Processor(half=True, permute=True), r"\bcallq?\b"),
}


def module(pairs: list[tuple[GGMLType, DType]], triple: str, processor: Processor) -> str:
    """A function for each pair that decodes one block, in LLVM's language."""
    text = ir.Module("kernels")
    text.triple = triple
    pointer = I8.as_pointer()
    for type_, dtype in pairs:
        function = ir.Function(text, ir.FunctionType(ir.VoidType(), [pointer, pointer]), f"{type_.name}_{dtype}")
        builder = ir.IRBuilder(function.append_basic_block())
        weights = type_.block_size if type_.quantized else 32
        DECODERS[type_](Block(builder, *function.args, weights=weights, dtype=dtype, processor=processor))
        builder.ret_void()
    return str(text)


@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_is_machine_code_without_library_calls(name: str) -> None:
    triple, cpu, processor, call = TARGETS[name]
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    parsed = binding.parse_assembly(module(PAIRS, triple, processor))
    parsed.verify()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=2)
    assembly = machine.emit_assembly(parsed)
    assert all(f"\n{type_.name}_{dtype}:" in assembly for type_, dtype in PAIRS)
    assert re.findall(rf"^\s+{call}.*$", assembly, re.MULTILINE) == []
    assert machine.emit_object(parsed).startswith(b"\x7fELF")


def test_a_processor_without_float16_would_call_a_library() -> None:
    """What the test above looks for can be seen."""
    triple, cpu, _, call = TARGETS["x86-64-v2"]
    parsed = binding.parse_assembly(
        module([(GGMLType.F16, DType.FLOAT32)], triple, Processor(half=True, permute=False))
    )
    assembly = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=2).emit_assembly(parsed)
    assert "__extendhfsf2" in assembly
    assert re.search(call, assembly)
