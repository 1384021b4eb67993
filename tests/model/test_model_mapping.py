"""A model is a mapping of tensors that owns them; a partial result owns them until it is used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from asyncload.device import DeviceInfo
from asyncload.errors import ClosedError, TensorNotFoundError
from asyncload.gguf import GGMLType, Header, TensorInfo
from asyncload.model import Model, Partial, Tensor
from asyncload.quant import DType

NAMES = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.10.attn_q.weight")


@pytest.fixture
def header() -> Header:
    infos = [TensorInfo(name, GGMLType.F32, (4,), 256 * index, 16, 0) for index, name in enumerate(NAMES)]
    return Header(
        version=3,
        alignment=32,
        metadata={},
        tensors={info.name: info for info in infos},
        data_offset=0,
        nbytes=64,
    )


@pytest.fixture
def tensors(make_tensor: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {name: make_tensor((4,), DType.FLOAT32, name=name) for name in NAMES}


@pytest.fixture
def model(header: Header, tensors: Mapping[str, Tensor], host: DeviceInfo) -> Model:
    return Model(tensors, header=header, device=host, stats={"seconds": 1.0})


def test_it_is_a_mapping(model: Model, tensors: Mapping[str, Tensor], header: Header, host: DeviceInfo) -> None:
    assert isinstance(model, Mapping)
    assert tuple(model) == NAMES
    assert len(model) == 4
    assert dict(model) == tensors
    assert model["blk.0.attn_q.weight"] is tensors["blk.0.attn_q.weight"]
    assert "token_embd.weight" in model
    assert "nothing" not in model
    assert model.get("nothing") is None
    assert (model.header, model.device, model.nbytes, model.stats) == (header, host, 64, {"seconds": 1.0})
    assert repr(model) == "Model(4 tensors, 64 bytes, device='host')"


def test_names_that_are_not_there(header: Header, tensors: dict[str, Tensor], host: DeviceInfo) -> None:
    del tensors["token_embd.weight"]
    model = Model(tensors, header=header, device=host)
    with pytest.raises(TensorNotFoundError, match="not selected"):
        _ = model["token_embd.weight"]
    with pytest.raises(KeyError, match="not in the model") as caught:
        _ = model["nothing"]
    assert isinstance(caught.value, TensorNotFoundError)
    assert caught.value.name == "nothing"


def test_layers(model: Model, header: Header, tensors: dict[str, Tensor], host: DeviceInfo) -> None:
    assert list(model.layers) == [0, 10]
    assert [tensor.name for tensor in model.layers[0]] == ["blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    assert model.layers[10] == (tensors["blk.10.attn_q.weight"],)
    part = Model({NAMES[3]: tensors[NAMES[3]]}, header=header, device=host)
    assert list(part.layers) == [10]


def test_close(model: Model, tensors: Mapping[str, Tensor]) -> None:
    array = model["token_embd.weight"].numpy()
    model.close()
    model.close()
    assert model.closed
    assert all(tensor.closed for tensor in tensors.values())
    uses: list[Callable[[], Any]] = [
        lambda: model["token_embd.weight"],
        lambda: len(model),
        lambda: list(model),
        lambda: "token_embd.weight" in model,
        lambda: model.layers,
        tensors["token_embd.weight"].numpy,
    ]
    for use in uses:
        with pytest.raises(ClosedError):
            use()
    assert array.tolist() == [0, 0, 0, 0]
    assert repr(model) == "Model(closed, device='host')"
    assert model.nbytes == 64


def test_context_manager(model: Model) -> None:
    with model as entered:
        assert entered is model
        assert not model.closed
    assert model.closed


def test_a_model_is_itself_alone(model: Model, tensors: Mapping[str, Tensor]) -> None:
    assert model != tensors
    owners = {model, model}
    model.close()
    assert owners == {model}


def test_memory_goes_when_model_and_views_have_gone(
    header: Header,
    make_tensor: Callable[..., Tensor],
    host_memory: Callable[[bytes], Any],
    host: DeviceInfo,
) -> None:
    memories = [host_memory(bytes(16)) for _ in range(2)]
    alive = [weakref.ref(memory) for memory in memories]
    loaded = {
        name: make_tensor((4,), DType.FLOAT32, name=name, memory=memory)
        for name, memory in zip(NAMES, memories, strict=False)
    }
    model = Model(loaded, header=header, device=host)
    view = loaded[NAMES[0]].numpy()
    del memories
    model.close()
    assert [memory() is not None for memory in alive] == [True, False]
    del view
    assert alive[0]() is None


@pytest.fixture
def partial(tensors: Mapping[str, Tensor], host: DeviceInfo) -> Partial:
    return Partial(tensors, identity=("inode", 7), device=host)


def test_partial(partial: Partial, tensors: Mapping[str, Tensor], host: DeviceInfo) -> None:
    assert (partial.names, partial.nbytes, partial.identity, partial.device) == (NAMES, 64, ("inode", 7), host)
    assert partial.tensors == tensors
    assert repr(partial) == "Partial(4 tensors, 64 bytes, device='host')"


def test_partial_is_taken_once(partial: Partial, tensors: Mapping[str, Tensor]) -> None:
    assert partial.take() == tensors
    assert partial.closed
    with pytest.raises(ClosedError):
        partial.take()
    with pytest.raises(ClosedError):
        _ = partial.tensors
    partial.close()
    assert not any(tensor.closed for tensor in tensors.values())  # they are somebody else's now
    assert (partial.names, partial.nbytes) == (NAMES, 64)


def test_partial_closes_what_it_owns(partial: Partial, tensors: Mapping[str, Tensor]) -> None:
    partial.close()
    partial.close()
    assert all(tensor.closed for tensor in tensors.values())
    with pytest.raises(ClosedError):
        partial.take()
    assert repr(partial).endswith("closed)")
