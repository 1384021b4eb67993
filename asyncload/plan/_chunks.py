"""A load cut into chunks, each of which one staging buffer takes.

A buffer holds first the bytes as they are read, then, where they are decoded on the host, what they are decoded to:

    | read span: one tensor's piece, or several small tensors | decoded | decoded | ...

A large tensor is split; a piece that is decoded ends on a block boundary. Small tensors that lie close to each other in
one file share a chunk and its one read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from asyncload.errors import PlanError
from asyncload.plan._tensor import Decode, TensorPlan

__all__ = ["Chunk", "Piece", "Segment", "cut_chunks", "cut_tensor"]

# Decoded bytes start on a cache line, and so does every read.
_ALIGNMENT: Final = 64
# Reading a gap of this size costs less than another read.
_GAP: Final = 64 << 10
# Tensors that share a chunk: what they cost on the event loop's thread comes in one piece.
_MOST_SHARED: Final = 256


@dataclass(frozen=True, slots=True)
class Segment:
    """One tensor's share of a chunk; offsets and sizes in bytes.

    ``source_offset`` and ``source_nbytes``: its packed bytes within the buffer. ``upload_offset`` and
    ``upload_nbytes``: the bytes of the buffer to upload (the packed ones, or what the host has decoded them to).
    ``target_offset`` and ``target_nbytes``: what they are of the tensor on the device, where they may be decoded.
    ``tensor`` is the index into the plan's tensors.
    """

    tensor: int
    source_offset: int
    source_nbytes: int
    upload_offset: int
    upload_nbytes: int
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
        """Bytes that cross the bus."""
        return sum(segment.upload_nbytes for segment in self.segments)

    @property
    def target_nbytes(self) -> int:
        """Bytes of tensors that they become on the device."""
        return sum(segment.target_nbytes for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Piece:
    """``nbytes`` at ``offset`` of a tensor in the file, and which bytes of the tensor on the device they are there."""

    offset: int
    nbytes: int
    target_offset: int
    target_nbytes: int


def cut_tensor(tensor: TensorPlan, room: int) -> Iterator[Piece]:
    """Cuts a tensor into pieces of at most ``room`` bytes, whole blocks where it is decoded.

    Where the host decodes, the decoded bytes lie beside the others, and count too. Raises ``PlanError`` if one block
    does not fit.
    """
    info, by_host = tensor.info, tensor.decode is Decode.HOST
    # the bytes of one block before and after decoding; what is not decoded may be cut anywhere
    before, after = (
        (_ALIGNMENT, _ALIGNMENT) if tensor.decode is Decode.NONE else (info.type.type_size, tensor.block_nbytes)
    )
    needed = before + (after if by_host else 0)
    blocks = (room - (_ALIGNMENT if by_host else 0)) // needed
    if blocks <= 0:
        raise PlanError(f"{info.name}: one block takes {needed} bytes, more than a chunk of {room}")
    step = blocks * before
    for start in range(0, info.nbytes, step):
        nbytes = min(step, info.nbytes - start)
        yield Piece(start, nbytes, start // before * after, nbytes * after // before)


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
        after = _decoded_nbytes(tensor)
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
        info, offset = tensor.info, tensor.info.offset - first.offset
        by_host = tensor.decode is Decode.HOST
        upload = (decoded_at, tensor.nbytes) if by_host else (offset, info.nbytes)
        decoded_at += _decoded_nbytes(tensor)
        segments.append(Segment(index, offset, info.nbytes, *upload, 0, tensor.nbytes))
    return Chunk(group, first.part, first.offset, nbytes, tuple(segments))


def _split(tensor: TensorPlan, index: int, group: int, chunk_size: int) -> Iterator[Chunk]:
    info = tensor.info
    for piece in cut_tensor(tensor, chunk_size):
        by_host = tensor.decode is Decode.HOST
        upload = (_align(piece.nbytes), piece.target_nbytes) if by_host else (0, piece.nbytes)
        segment = Segment(index, 0, piece.nbytes, *upload, piece.target_offset, piece.target_nbytes)
        yield Chunk(group, info.part, info.offset + piece.offset, piece.nbytes, (segment,))


def _decoded_nbytes(tensor: TensorPlan) -> int:
    """What a tensor's decoded form takes of a buffer."""
    return _align(tensor.nbytes) if tensor.decode is Decode.HOST else 0


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
