"""Models in several files: every part that is missing, foreign or miscounted is named."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from asyncload.errors import SplitError
from asyncload.gguf import GGMLType, Header, HeaderParser, ValueType, join_parts, split_count, split_paths
from asyncload.testing import MetadataValue, Typed, encode_header, lay_out

URLS = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]


def header(names: list[str], metadata: Mapping[str, MetadataValue]) -> Header:
    specs, nbytes = lay_out([(name, GGMLType.F32, (8,)) for name in names])
    data = encode_header(metadata, specs) + bytes(nbytes)
    parser = HeaderParser(len(data))
    parser.feed(data)
    assert parser.header is not None
    return parser.header


def part(number: int, names: list[str], *, count: int = 3, total: int | None = 5, **others: str) -> Header:
    metadata: dict[str, MetadataValue] = {**others}
    metadata["split.no"] = Typed(ValueType.UINT16, number)
    metadata["split.count"] = Typed(ValueType.UINT16, count)
    if total is not None:
        metadata["split.tensors.count"] = Typed(ValueType.INT32, total)
    return header(names, metadata)


def whole() -> list[Header | None]:
    return [
        part(0, ["token_embd", "blk.0.a"], name="a model"),
        part(1, ["blk.0.b", "blk.1.a"]),
        part(2, ["output"]),
    ]


def culprits(headers: list[Header | None], urls: list[str] = URLS) -> tuple[str, ...]:
    with pytest.raises(SplitError) as caught:
        join_parts(headers, urls)
    assert all(url in str(caught.value) for url in caught.value.parts)
    return caught.value.parts


def test_parts_become_one_header() -> None:
    headers = whole()
    joined = join_parts(headers, URLS)
    assert joined.parts == 3
    assert joined.metadata["name"] == "a model"
    assert [(name, tensor.part) for name, tensor in joined.tensors.items()] == [
        ("token_embd", 0),
        ("blk.0.a", 0),
        ("blk.0.b", 1),
        ("blk.1.a", 1),
        ("output", 2),
    ]
    assert headers[1] is not None
    assert joined.tensors["blk.0.b"].offset == headers[1].tensors["blk.0.b"].offset
    assert [tensor.part for tensor in joined.layers[0]] == [0, 1]
    assert joined.nbytes == 5 * 32


def test_a_first_part_without_tensors_is_one() -> None:
    joined = join_parts([part(0, [], count=2, total=1), part(1, ["t"], count=2, total=1)], URLS[:2])
    assert list(joined.tensors) == ["t"]


def test_parts_need_not_say_how_many_tensors_there_are() -> None:
    headers = [part(number, [f"t{number}"], total=None) for number in range(3)]
    assert len(join_parts(headers, URLS).tensors) == 3


def test_one_file_is_itself() -> None:
    alone = header(["t"], {})
    assert join_parts([alone], ["m.gguf"]) is alone


def test_pauses_while_it_joins() -> None:
    pauses = 0

    def pause() -> None:
        nonlocal pauses
        pauses += 1

    headers = [part(number, [f"blk.{n}.{number}" for n in range(500)], total=1500) for number in range(3)]
    join_parts(headers, URLS, pause=pause)
    assert pauses >= 1500 // 100


def test_missing_parts_are_named() -> None:
    headers = whole()
    headers[1] = None
    assert culprits(headers) == (URLS[1],)
    headers[0] = None
    assert culprits(headers) == (URLS[0], URLS[1])


def test_a_file_that_is_no_part_is_named() -> None:
    headers = whole()
    headers[2] = header(["output"], {})
    assert culprits(headers) == (URLS[2],)


def test_a_part_of_a_model_in_more_files_is_named() -> None:
    headers = whole()
    headers[1] = part(1, ["blk.0.b", "blk.1.a"], count=4)
    assert culprits(headers) == (URLS[1],)


def test_parts_that_were_renamed_are_named() -> None:
    first, second, third = whole()
    assert culprits([first, third, second]) == (URLS[1], URLS[2])


def test_a_part_with_another_total_is_named() -> None:
    headers = whole()
    headers[2] = part(2, ["output"], total=6)
    assert culprits(headers) == (URLS[2],)


def test_a_total_that_is_not_the_sum_is_everyones() -> None:
    headers = whole()
    headers[1] = part(1, ["blk.0.b"])
    assert culprits(headers) == tuple(URLS)


def test_a_part_with_a_tensor_of_another_is_named() -> None:
    headers = whole()
    headers[2] = part(2, ["blk.0.a"])
    with pytest.raises(SplitError, match=rf"{URLS[2]} has tensor 'blk.0.a', which {URLS[0]} has too"):
        join_parts(headers, URLS)


def test_each_of_several_faults_is_named() -> None:
    assert culprits([None, header([], {}), part(0, ["output"])]) == tuple(URLS)


@pytest.mark.parametrize("number", ["1", True, 1.0, [1]])
def test_a_number_of_a_wrong_type_is_none(number: MetadataValue) -> None:
    headers = whole()
    headers[1] = header(["blk.0.b", "blk.1.a"], {"split.no": number, "split.count": 3})
    assert culprits(headers) == (URLS[1],)


def test_split_count() -> None:
    assert split_count(header(["t"], {})) == 1
    assert split_count(header(["t"], {"split.count": 0})) == 1  # merged again
    assert split_count(part(2, ["t"])) == 3
    for wrong in ("3", -1, [3], True, 2.0):
        with pytest.raises(SplitError, match="no number of files"):
            split_count(header(["t"], {"split.count": wrong}))


@pytest.mark.parametrize("url", URLS)
def test_all_names_from_the_name_of_any(url: str) -> None:
    assert split_paths(f"/models/of-00001/{url}", 3) == [f"/models/of-00001/{url}" for url in URLS]


def test_a_file_that_is_not_split_may_be_called_anything() -> None:
    assert split_paths("model", 1) == ["model"]


@pytest.mark.parametrize(
    "url",
    [
        "m.gguf",
        "m-00001-of-00004.gguf",
        "m-00000-of-00003.gguf",
        "m-00004-of-00003.gguf",
        "m-1-of-3.gguf",
        "m-00001-of-00003.bin",
        "m-0000\N{ARABIC-INDIC DIGIT ONE}-of-00003.gguf",
    ],
)
def test_names_that_are_no_parts_are_refused(url: str) -> None:
    with pytest.raises(SplitError) as caught:
        split_paths(url, 3)
    assert caught.value.parts == (url,)
