"""The data path of asyncload in C++ threads, which never need the interpreter lock.

``asyncload`` uses it where it was built, and its own Python engine where it was not: then importing this package raises
ImportError.
"""

from asyncload_native._native import compiler, version

__all__ = ["compiler", "version"]
