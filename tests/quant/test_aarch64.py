"""What is written for AArch64 becomes machine code of its own: a call would be of a function that processes lack."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import pytest

from asyncload.gguf import GGMLType
from asyncload.quant import DType, can_decode, native_dtype
from asyncload.quant._block import Block, Processor
from asyncload.quant._kernels import DECODERS
from asyncload.quant._vector import I8, ir

LLVM: Any = llvmlite.binding
PAIRS = [
    pytest.param(type_, dtype, id=f"{type_.name}-{dtype}")
    for type_ in DECODERS
    for dtype in DType
    if can_decode(type_, dtype) and native_dtype(type_) is not dtype
]


@pytest.fixture(scope="module")
def machine() -> Any:
    LLVM.initialize_all_targets()
    LLVM.initialize_all_asmprinters()
    return LLVM.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(opt=2)


@pytest.mark.parametrize(("type_", "dtype"), PAIRS)
def test_nothing_is_called(type_: GGMLType, dtype: DType, machine: Any) -> None:
    module = ir.Module(f"{type_.name}")
    module.triple = machine.triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I8.as_pointer()] * 2), "decode")
    builder = ir.IRBuilder(function.append_basic_block())
    processor = Processor(half=True, permute=False, look_up="llvm.aarch64.neon.tbl1.v16i8")
    weights = type_.block_size if type_.quantized else 32
    DECODERS[type_](Block(builder, *function.args, weights=weights, dtype=dtype, processor=processor))
    builder.ret_void()
    parsed = LLVM.parse_assembly(str(module))
    parsed.verify()
    code = machine.emit_assembly(parsed)
    assert "\tret" in code
    assert not [line for line in code.splitlines() if line.split()[:1] in (["bl"], ["blr"], ["b"])]
