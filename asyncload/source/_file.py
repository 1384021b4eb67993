"""A local file, read with ``preadv`` into the caller's buffer.

Never through ``mmap``: a file truncated meanwhile would kill the process with SIGBUS, and page faults are slow on
network file systems.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from asyncload.errors import SourceChangedError, SourceNotFoundError, SourceReadError
from asyncload.source._contract import check_read
from asyncload.threads import run_in_thread

__all__ = ["FileSource"]

# What a disk, a network file system or a signal makes pass by itself.
_PASSING: Final = frozenset(
    (errno.EAGAIN, errno.EINTR, errno.EIO, errno.ENOMEM, errno.ENOBUFS, errno.ETIMEDOUT, errno.EREMOTEIO)
)


class FileSource:
    """A regular file, held open by its descriptor; its identity is device, inode, size and modification time.

    Raises ``SourceNotFoundError`` or ``SourceReadError`` if it cannot be opened. Blocks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fsdecode(path)
        self._fd = -1
        try:
            # a FIFO would hold its opener until somebody writes to it
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self._fd)
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{self._path}: no such file", url=self._path) from error
        except (OSError, ValueError) as error:
            raise self._error(error, None) from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise SourceReadError(f"{self._path}: not a regular file", url=self._path)
        self._size = status.st_size
        self._identity = _identity(status)

    @property
    def url(self) -> str:
        """The path as it was given."""
        return self._path

    @property
    def size(self) -> int:
        """Bytes in the file when it was opened."""
        return self._size

    @property
    def identity(self) -> tuple[int, ...]:
        """Device, inode, size and modification time when it was opened."""
        return self._identity

    def read_into_blocking(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``offset`` on, and checks that the file is still the one that was opened."""
        check_read(self, offset, buffer.nbytes)
        done = 0
        try:
            while done < buffer.nbytes:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                if count == 0:
                    self._check_unchanged()
                    raise SourceReadError(
                        f"{self._path}: the file ended at byte {offset + done}", url=self._path, offset=offset + done
                    )
                done += count
        except OSError as error:
            if isinstance(error, SourceReadError):
                raise
            raise self._error(error, offset + done) from error
        self._check_unchanged()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """``read_into_blocking`` on a thread of its own."""
        await run_in_thread(self.read_into_blocking, offset, buffer)

    def close(self) -> None:
        """Closes the descriptor."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    async def aclose(self) -> None:
        """Closes the descriptor."""
        await run_in_thread(self.close)

    def _check_unchanged(self) -> None:
        """Both what is open and what now stands at the path: a file replaced by another shows only there."""
        try:
            same = _identity(os.fstat(self._fd)) == self._identity == _identity(Path(self._path).stat())
        except (FileNotFoundError, NotADirectoryError):
            same = False
        except OSError as error:
            raise self._error(error, None) from error
        if not same:
            raise SourceChangedError(f"{self._path}: the file changed while it was being loaded", url=self._path)

    def _error(self, error: OSError | ValueError, offset: int | None) -> SourceReadError:
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number is not None else str(error)
        return SourceReadError(
            f"{self._path}: {reason}", url=self._path, offset=offset, transient=number in _PASSING, errno=number
        )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
