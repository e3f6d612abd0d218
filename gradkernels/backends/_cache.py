"""Compiled kernels on disk, so that every process after the first starts without a compiler.

One file per kernel, named by the hash of everything that it was made of; old ones are never read again and may be deleted at
any time. The folder is $GRADKERNELS_CACHE, else gradkernels in $XDG_CACHE_HOME or ~/.cache. Processes share it without locks:
a file appears whole or not at all, and starts with the hash of its content, so that a damaged one is not there.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from gradkernels.notices import warn

DIGEST = hashlib.sha256().digest_size


def folder() -> Path | None:
    """Where the files are; None for a user without a home."""
    own, shared = os.environ.get("GRADKERNELS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "gradkernels"
    except RuntimeError:
        return None


def key(parts: Iterable[str | bytes]) -> str:
    """The name of what is made of these parts and nothing else."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hashed.update(b"%d:" % len(data) + data)  # with its length: parts do not run into one another
    return hashed.hexdigest()


def load(name: str) -> bytes | None:
    """What was stored by that name; None when it is not there, cannot be read or is not what was written."""
    where = folder()
    try:
        data = b"" if where is None else (where / name).read_bytes()
    except OSError:
        return None
    digest, content = data[:DIGEST], data[DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def store(name: str, content: bytes) -> None:
    """Keep it by that name; a folder that cannot be written is said once and otherwise left alone."""
    where = folder()
    if where is None:
        return _not_kept("there is no home directory")
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=where, prefix=f".{name[:16]}-")
    except OSError as e:
        return _not_kept(str(e))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(path, where / name)
    except OSError as e:  # the disk is full, say
        Path(path).unlink(missing_ok=True)
        _not_kept(str(e))


@functools.cache
def _not_kept(reason: str) -> None:
    warn(
        f"compiled kernels cannot be kept on disk and are compiled again in every process: {reason}; "
        "set GRADKERNELS_CACHE to a folder that can be written"
    )
