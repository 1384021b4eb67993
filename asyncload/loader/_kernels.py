"""Kernels made ready before a byte moves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Final

from asyncload.errors import BackendUnavailableError
from asyncload.gguf import GGMLType
from asyncload.pipeline import Engine
from asyncload.plan import Decode
from asyncload.quant import DType, prepare

__all__ = ["prepare_kernels"]

_log: Final = logging.getLogger("asyncload.load")


def prepare_kernels(engine: Engine, kernels: Callable[[Decode], Collection[tuple[GGMLType, DType]]]) -> bool:
    """Prepares the kernels that are needed at each place, on the device and on the host; blocks.

    Returns False, and logs why, where the device cannot compile its kernels and the choice of the place was left to us.
    Raises ``BackendUnavailableError`` where it was not.
    """
    if pairs := kernels(Decode.DEVICE):
        try:
            engine.device.prepare(pairs)
        except BackendUnavailableError as error:
            if engine.options.decode != "auto":
                raise
            _log.warning("decoding on the host, as the device cannot: %s", error)
            return False
    if pairs := kernels(Decode.HOST):
        prepare(pairs)
    return True
