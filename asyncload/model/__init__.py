"""What comes out of a load: tensors that other libraries can use, the model that holds them, the caller's buffers."""

from __future__ import annotations

from asyncload.model._dlpack import Memory
from asyncload.model._model import Model
from asyncload.model._partial import Partial
from asyncload.model._target import Target, borrow, check_disjoint, check_target
from asyncload.model._tensor import Tensor

__all__ = ["Memory", "Model", "Partial", "Target", "Tensor", "borrow", "check_disjoint", "check_target"]
