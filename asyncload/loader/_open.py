"""From a path to the files and the header of a model."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from asyncload.errors import PlanError, SourceNotFoundError
from asyncload.gguf import Header, HeaderParser, join_parts, split_count, split_paths
from asyncload.interpreter_lock import Pause
from asyncload.source import HEAD, BlockingSource, NativeFileSource, Source, open_source

__all__ = ["ModelPath", "OpenedModel"]

T = TypeVar("T")

ModelPath = str | os.PathLike[str] | Source | Sequence[Source]
# A function that runs a blocking call on a thread, to its end.
RunBlocking = Callable[..., Awaitable[Any]]

_READ: Final = 4 << 20


class OpenedModel:
    """A model's sources and its header; an async context manager that closes the sources which it opened itself.

    ``run`` is where blocking calls go; ``native`` lets C++ read files, where it can. ``pause`` is for loops on the
    threads of ``run``.
    """

    def __init__(self, run: RunBlocking, *, strict: bool = False, native: bool = True) -> None:
        self._run = run
        self._strict = strict
        self._native = native
        self.pause = Pause()
        self._owned: list[BlockingSource] = []
        self.sources: list[Source] = []
        self.header: Header

    @property
    def name(self) -> str:
        """The first source's name, for messages."""
        return self.sources[0].url if self.sources else "model"

    @property
    def identity(self) -> tuple[Hashable, ...]:
        """What all sources were when they were opened."""
        return tuple(source.identity for source in self.sources)

    async def open(self, path: ModelPath, then: Callable[[], None] = lambda: None) -> None:
        """Opens the model's file, or all files of a split one, and reads the header.

        ``path`` is a path, a source, or all parts' sources in order; the path may be that of any part. ``then`` is
        called on the thread on which it was opened, in one go. Raises ``SourceError`` and ``FormatError``, a missing
        part is a ``SplitError``, and what ``then`` raises.
        """
        if isinstance(path, str | bytes | os.PathLike):
            await self._work(self._open_path, os.fsdecode(path), then)
        else:
            given: list[object] = [path] if isinstance(path, Source) else list(path)
            self.sources = [source for source in given if isinstance(source, Source)]
            if not given or len(self.sources) < len(given):
                raise PlanError(f"a model is a path, a source or the sources of all its parts, not {path!r}")
            headers = [await self._read_header(source) for source in self.sources]
            names = [source.url for source in self.sources]
            await self._work(self._join, headers, names, then)

    async def _work(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function that pauses."""

        def work() -> T:
            self.pause.begin()  # here: until the thread has the interpreter lock, much time may have passed
            return function(*args)

        result: T = await self._run(work)
        return result

    def _join(self, headers: Sequence[Header | None], names: Sequence[str], then: Callable[[], None]) -> None:
        self.header = join_parts(headers, names, pause=self.pause)
        then()

    def _open_path(self, path: str, then: Callable[[], None]) -> None:
        source = self._open_source(path)
        first = _read_header_blocking(source, self._parser(source))
        paths = split_paths(path, split_count(first))
        headers: list[Header | None] = []
        for name in paths:
            if Path(name).name == Path(path).name:
                self.sources.append(source)
                headers.append(first)
                continue
            try:
                part = self._open_source(name)
            except SourceNotFoundError:
                headers.append(None)  # all that is wrong with the parts is said at once
            else:
                self.sources.append(part)
                headers.append(_read_header_blocking(part, self._parser(part)))
        self._join(headers, paths, then)

    def _open_source(self, path: str) -> BlockingSource:
        source = open_source(path, native=self._native)
        self._owned.append(source)
        return source

    def _parser(self, source: Source) -> HeaderParser:
        return HeaderParser(source.size, strict=self._strict, url=source.url, pause=self.pause)

    async def _read_header(self, source: Source) -> Header:
        parser = self._parser(source)
        if isinstance(source, BlockingSource):
            return await self._work(_read_header_blocking, source, parser)
        offset = 0
        while parser.header is None:
            piece = bytearray(_next_read(source, parser, offset))
            await source.read_into(offset, memoryview(piece))
            await self._work(parser.feed, piece)
            offset += len(piece)
        return parser.header

    async def __aenter__(self) -> Self:
        """Nothing is open yet."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes what was opened here, unless it was handed over."""
        left = [source for source in self._owned if not (isinstance(source, NativeFileSource) and source.closed)]
        if left:
            await self._run(_close, left)

    def hand_over(self) -> None:
        """Lets go of the files that C++ threads hold by now, who close them when they have read them.

        So nothing that the last owner's closing waits for holds the event loop, and no hop to a thread is needed.
        """
        for source in self._owned:
            if isinstance(source, NativeFileSource):
                source.close()


def _close(sources: Sequence[BlockingSource]) -> None:
    for source in sources:
        source.close()


def _read_header_blocking(source: BlockingSource, parser: HeaderParser) -> Header:
    head = source.head if isinstance(source, NativeFileSource) else b""
    parser.feed(head)
    offset = len(head)
    while parser.header is None:
        piece = bytearray(_next_read(source, parser, offset))
        source.read_into_blocking(offset, memoryview(piece))
        parser.feed(piece)
        offset += len(piece)
    return parser.header


def _next_read(source: Source, parser: HeaderParser, offset: int) -> int:
    """Bytes to read next: what the parser is known to need, or a good piece; at the end of the file, what is left."""
    want = max(parser.needed - offset, _READ if offset else HEAD)
    return min(want, source.size - offset, 16 * _READ)
