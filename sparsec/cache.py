"""The cache directory: compiled kernels, measured rates, profiles. Losing it costs time, never an answer.

Every entry is written to a temporary name and renamed, so a killed process leaves nothing half-written and two
processes may share one directory. Entries carry a checksum; one that does not match is rebuilt with a warning.
An unwritable directory is replaced by a temporary one, with a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsec.errors import SparsecWarning

_replacements: dict[str, Path] = {}


def cache_dir(chosen: str = "") -> Path:
    """The directory to use: ``chosen``, else SPARSEC_CACHE_DIR, else ~/.cache/sparsec; created and writable."""
    path = wanted_dir(chosen)
    text = str(path)
    if text in _replacements:
        return _replacements[text]
    if why := unwritable(path):
        path = Path(tempfile.mkdtemp(prefix="sparsec-cache-"))
        warnings.warn(
            f"the cache directory {text} cannot be written ({why}); using {path} for this process",
            SparsecWarning,
            stacklevel=2,
        )
        _replacements[text] = path
    return path


def wanted_dir(chosen: str = "") -> Path:
    """What ``cache_dir`` gives where it can be written."""
    text = chosen or os.environ.get("SPARSEC_CACHE_DIR", "") or os.path.join(_user_cache(), "sparsec")
    return Path(text).expanduser()


def unwritable(path: Path) -> str:
    """Why a directory, made where it is missing, takes no file; or nothing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _user_cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def digest(*parts: str | bytes) -> str:
    """A short stable hash of texts; the file name of whatever they shaped."""
    h = hashlib.blake2b(digest_size=12)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write so that a reader sees the old file or the new one, never a part of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock file across processes, so that only one of them builds an entry."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """``lock``, or nothing at all where no lock file can be made: then nothing can be written, nor shared, either."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.enter_context(lock(path))
        yield


def read_json(path: Path) -> Any | None:
    """The value stored by ``write_json``, or None where there is none; a damaged file is removed with a warning."""
    try:
        wrapped = json.loads(path.read_bytes())
        if wrapped["sum"] != digest(json.dumps(wrapped["value"], sort_keys=True)):
            raise ValueError("checksum does not match")
        return wrapped["value"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"the cache entry {path} is damaged ({error}); it is made again", SparsecWarning, stacklevel=2)
        path.unlink(missing_ok=True)
        return None


def sealed(value: Any) -> bytes:
    """A JSON value with its checksum, as ``read_json`` reads it."""
    return json.dumps({"sum": digest(json.dumps(value, sort_keys=True)), "value": value}, sort_keys=True).encode()


def write_json(path: Path, value: Any) -> None:
    """Store a JSON value with its checksum. A full or read-only disk is a warning: the cache is optional."""
    try:
        write_atomic(path, sealed(value))
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error.strerror}); going on without", SparsecWarning, stacklevel=2)
