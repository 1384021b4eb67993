"""``python -m asyncload.quant._warm Q4_K:float16 ...``: compiles these kernels into the cache on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from asyncload.gguf import GGMLType
from asyncload.quant import DType
from asyncload.quant._compiled import compile_kernel


def main(arguments: Sequence[str]) -> None:
    """Compiles each pair of a type's and a dtype's name that the cache does not hold yet."""
    for argument in arguments:
        type_name, _, dtype = argument.partition(":")
        compile_kernel(GGMLType[type_name], DType(dtype))


if __name__ == "__main__":
    main(sys.argv[1:])
