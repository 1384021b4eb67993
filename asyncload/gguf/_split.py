"""Models that lie in several files: the names of the parts, and one header over all of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from asyncload.errors import SplitError
from asyncload.gguf._header import Header, TensorInfo, Value
from asyncload.gguf._reader import quote

__all__ = ["join_parts", "split_count", "split_paths"]

_NUMBER_KEY: Final = "split.no"
_COUNT_KEY: Final = "split.count"
_TENSORS_KEY: Final = "split.tensors.count"

_PART: Final = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_TENSORS_BETWEEN_PAUSES: Final = 64


def split_count(header: Header) -> int:
    """The number of files that a model lies in, 1 for one that is not split.

    Raises ``SplitError`` if the header says something that is no number of files.
    """
    count = header.metadata.get(_COUNT_KEY, 1)
    # llama.cpp writes 0 in a file that has been merged again.
    if (number := _integer(count)) is None or number < 0:
        raise SplitError(f"{_COUNT_KEY} is {count!r}, no number of files", parts=())
    return max(number, 1)


def split_paths(url: str, count: int) -> list[str]:
    """The names of all ``count`` parts, in order, from the name of any of them: ``name-00002-of-00003.gguf``.

    Raises ``SplitError`` if the name is no such name, or is that of a part of another number of parts.
    """
    if count == 1:
        return [url]
    match = _PART.fullmatch(url)
    if match is None:
        raise SplitError(
            f"a part of a model in {count} files must be called name-00001-of-{count:05}.gguf", parts=(url,), url=url
        )
    if int(match["count"]) != count or not 1 <= int(match["number"]) <= count:
        raise SplitError(f"its name is not that of one of {count} parts", parts=(url,), url=url)
    return [f"{match['prefix']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def join_parts(
    headers: Sequence[Header | None], urls: Sequence[str], *, pause: Callable[[], None] | None = None
) -> Header:
    """One header over all parts of a model, given in order with their names; a missing part is None.

    Metadata, version and alignment are the first part's. Raises ``SplitError``, which names every part that is
    missing, belongs to something else, or does not add up with the others.
    """
    if len(headers) != len(urls) or not urls:
        raise ValueError(f"{len(headers)} headers and {len(urls)} names")
    if len(headers) == 1 and headers[0] is not None and split_count(headers[0]) == 1:
        return headers[0]
    present = [header for header in headers if header is not None]
    total = _announced_total(present)
    wrong: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    step = _every(_TENSORS_BETWEEN_PAUSES, pause)
    for part, (header, url) in enumerate(zip(headers, urls, strict=True)):
        if header is None:
            wrong[url] = "is missing"
        elif (reason := _foreign(header.metadata, part, len(urls), total)) is not None:
            wrong[url] = reason
        elif (twice := _add(tensors, header, part, step)) is not None:
            wrong[url] = f"has tensor {quote(twice.name)}, which {urls[twice.part]} has too"
    if not wrong and total not in (None, len(tensors)):
        wrong = dict.fromkeys(urls, f"says there are {total} tensors in all parts, which have {len(tensors)}")
    if wrong:
        raise SplitError("; ".join(f"{url} {reason}" for url, reason in wrong.items()), parts=tuple(wrong))
    first = headers[0]
    assert first is not None  # or it would be missing
    return Header(
        version=first.version,
        alignment=first.alignment,
        metadata=first.metadata,
        tensors=MappingProxyType(tensors),
        data_offset=first.data_offset,
        nbytes=sum(header.nbytes for header in present),
        parts=len(urls),
    )


def _announced_total(headers: Sequence[Header]) -> int | None:
    """The number of tensors in all parts as most of them have it, None if none says."""
    totals = Counter(_integer(header.metadata.get(_TENSORS_KEY)) for header in headers)
    del totals[None]
    return totals.most_common(1)[0][0] if totals else None


def _add(tensors: dict[str, TensorInfo], header: Header, part: int, step: Callable[[], None]) -> TensorInfo | None:
    """Adds a part's tensors; returns the first that was there already, where there is one."""
    for tensor in header.tensors.values():
        step()
        if (twice := tensors.get(tensor.name)) is not None:
            return twice
        tensors[tensor.name] = tensor._replace(part=part)
    return None


def _foreign(metadata: Mapping[str, Value], part: int, parts: int, total: int | None) -> str | None:
    """Why a file with this metadata is not part number ``part`` of ``parts``, or None if it is."""
    count, number = _integer(metadata.get(_COUNT_KEY)), _integer(metadata.get(_NUMBER_KEY))
    if count is None or number is None:
        return "is no part of a split model"
    if count != parts:
        return f"is a part of a model in {count} files, not {parts}"
    if number != part:
        return f"says it is part {number + 1}, not {part + 1}"
    announced = _integer(metadata.get(_TENSORS_KEY, total))
    if announced != total:
        return f"says there are {announced} tensors in all parts, the others say {total}"
    return None


def _integer(value: Value | None) -> int | None:
    """The value if it is an integer (a bool is none)."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _every(period: int, pause: Callable[[], None] | None) -> Callable[[], None]:
    """A function that calls ``pause`` each ``period``-th time."""
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        if pause is not None and calls % period == 0:
            pause()

    return step
