"""The data path of asyncload in C++ threads, which never need the interpreter lock."""

version: str

compiler: str
