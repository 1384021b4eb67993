"""A load cut into chunks, each of which one staging buffer takes.

A buffer holds first the bytes as they are read, then, where they are decoded on the host, what they are decoded to:

    | read span: one tensor's piece, or several small tensors | decoded | decoded | ...

A large tensor is split; a piece that is decoded ends on a block boundary. Small tensors that lie close to each other in
one file share a chunk and its one read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asyncload.errors import PlanError

if TYPE_CHECKING:
    from asyncload.plan._load import TensorPlan

__all__ = ["Chunk", "Segment", "cut_chunks"]

# Decoded bytes start on a cache line, and so does every read.
_ALIGNMENT: Final = 64
# Reading a gap of this size costs less than another read.
_GAP: Final = 64 << 10
# Tensors that share a chunk: what they cost on the event loop's thread comes in one piece.
_MOST_SHARED: Final = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """One tensor's share of a chunk; offsets and sizes in bytes.

    ``source_offset`` and ``source_nbytes``: its packed bytes within the buffer. ``upload_offset``: where in the buffer
    the bytes to upload start (the packed ones, or their decoded form). ``target_offset`` and ``target_nbytes``: where
    they go within the tensor. ``tensor`` is the index into the plan's tensors.
    """

    tensor: int
    source_offset: int
    source_nbytes: int
    upload_offset: int
    target_offset: int
    target_nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One read of ``nbytes`` at ``offset`` of file ``part``, and what becomes of it.

    ``group`` counts up whenever all tensors of the chunks before are complete: a group is one large tensor or the small
    ones that share a chunk.
    """

    group: int
    part: int
    offset: int
    nbytes: int
    segments: tuple[Segment, ...]

    @property
    def upload_nbytes(self) -> int:
        """Bytes that go to the device."""
        return sum(segment.target_nbytes for segment in self.segments)


def cut_chunks(tensors: Sequence[TensorPlan], chunk_size: int, skip: Collection[int] = ()) -> Iterator[Chunk]:
    """Cuts tensors, given in file order, into chunks that fit buffers of ``chunk_size`` bytes.

    Every byte of every tensor whose index is not to be skipped is in exactly one segment; an empty tensor has one empty
    segment. Raises ``PlanError`` if one block and its decoded form do not fit a buffer.
    """
    group = 0
    shared: list[int] = []  # the small tensors of the chunk being gathered
    decoded = 0  # bytes that these take once decoded
    for index, tensor in enumerate(tensors):
        if index in skip:
            continue
        info = tensor.info
        after = _align(tensor.nbytes) if tensor.decoded else 0
        large = _align(info.nbytes) + after > chunk_size // 2
        if shared and (large or not _joins(tensors, shared, tensor, chunk_size - decoded - after)):
            yield _shared_chunk(tensors, shared, group)
            group, shared, decoded = group + 1, [], 0
        if large:
            yield from _split(tensor, index, group, chunk_size)
            group += 1
        else:
            shared.append(index)
            decoded += after
    if shared:
        yield _shared_chunk(tensors, shared, group)


def _joins(tensors: Sequence[TensorPlan], shared: Sequence[int], tensor: TensorPlan, room: int) -> bool:
    """Whether a small tensor lies close enough behind the others for one read of at most ``room`` bytes."""
    first, last, info = tensors[shared[0]].info, tensors[shared[-1]].info, tensor.info
    return (
        len(shared) < _MOST_SHARED
        and info.part == first.part
        and 0 <= info.offset - last.offset - last.nbytes <= _GAP
        and _align(info.offset + info.nbytes - first.offset) <= room
    )


def _shared_chunk(tensors: Sequence[TensorPlan], indices: Sequence[int], group: int) -> Chunk:
    first, last = tensors[indices[0]].info, tensors[indices[-1]].info
    nbytes = last.offset + last.nbytes - first.offset
    decoded_at = _align(nbytes)
    segments: list[Segment] = []
    for index in indices:
        tensor = tensors[index]
        source_offset = upload_offset = tensor.info.offset - first.offset
        if tensor.decoded:
            upload_offset = decoded_at
            decoded_at += _align(tensor.nbytes)
        segments.append(Segment(index, source_offset, tensor.info.nbytes, upload_offset, 0, tensor.nbytes))
    return Chunk(group, first.part, first.offset, nbytes, tuple(segments))


def _split(tensor: TensorPlan, index: int, group: int, chunk_size: int) -> Iterator[Chunk]:
    info = tensor.info
    # the bytes of one block before and after decoding; what is not decoded may be cut anywhere
    before, after = (info.type.type_size, tensor.block_nbytes) if tensor.decoded else (_ALIGNMENT, 0)
    blocks = (chunk_size - _ALIGNMENT) // (before + after) if tensor.decoded else chunk_size // _ALIGNMENT
    if blocks == 0:
        raise PlanError(f"{info.name}: one block takes {before + after} bytes, more than a chunk of {chunk_size}")
    step = blocks * before
    for start in range(0, info.nbytes, step):
        nbytes = min(step, info.nbytes - start)
        if tensor.decoded:
            count = nbytes // before
            segment = Segment(index, 0, nbytes, _align(nbytes), start // before * after, count * after)
        else:
            segment = Segment(index, 0, nbytes, 0, start, nbytes)
        yield Chunk(group, info.part, info.offset + start, nbytes, (segment,))


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
