"""Text to machine code: a C++ text or a ``KernelSpec`` comes in, a checked ``.so`` or a ``Kernel`` goes out.

Each artifact is three files in ``<cache>/kernels``: the source, the shared object, and a record with the object's
checksum, so that a damaged object is found before it is loaded (loading one would kill the process).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from sparsec.cache import digest, lock, read_json, write_atomic, write_json
from sparsec.codegen.cpp import family
from sparsec.codegen.spec import Kernel, KernelSpec
from sparsec.errors import CompileFailed, NoCompiler, SparsecWarning

COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_S = 900

_COMMON = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
_AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt"
_ISA_FLAGS = {
    "avx512": f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi2",
    "avx2": _AVX2,
    "portable": "",
}

_kernels: dict[tuple[KernelSpec, str], Kernel] = {}
_kernels_lock = threading.Lock()


def find_compiler() -> str:
    """The C++ compiler's command: the CXX variable if it can be run, else g++, clang++, c++. Raises NoCompiler."""
    said = os.environ.get("CXX", "").strip()
    tried = ([said] if said else []) + list(COMPILERS)
    for command in tried:
        if shutil.which(shlex.split(command)[0]):
            return command
    raise NoCompiler(tried=", ".join(tried))


@functools.lru_cache(maxsize=8)
def _version(command: str, path: str) -> str:
    """First line of ``--version``; ``path`` is part of the key because PATH decides what a bare name means."""
    done = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True, timeout=60)
    return (done.stdout or done.stderr).partition("\n")[0]


def isa_flags(spec: KernelSpec) -> tuple[str, ...]:
    """Compiler flags of a spec: the ISA that it names and nothing of the machine that compiles it."""
    flags = [*_COMMON, *_ISA_FLAGS[spec.isa].split()]
    if spec.bf16_dot:
        flags.append("-mavx512bf16")
    if spec.x and spec.isa == "avx512":
        flags += ["-mavx512vnni", "-mavx512vbmi"]
    if spec.int_dot:
        flags += ["-mavxvnni"] if spec.int_dot == "vnni" else ["-mamx-tile", "-mamx-int8"]
    return tuple(flags)


def compile_shared(text: str, name: str, flags: Sequence[str], cache: Path) -> Path:
    """Compile ``text`` into ``<cache>/kernels/<name>-<digest>.so`` once, whoever asks first; the .cpp stays beside it.

    The digest covers the text, the flags and the compiler's version. Without a compiler, an object that an earlier
    one made from the same text and flags is used. Raises NoCompiler, CompileFailed. Warns where a damaged object had
    to be built again.
    """
    folder = cache / "kernels"
    try:
        compiler = find_compiler()
    except NoCompiler:
        if earlier := _earlier(folder, name, digest(text, *flags)):
            return earlier
        raise
    path = folder / f"{name}-{digest(text, *flags, _version(compiler, os.environ.get('PATH', '')))}.so"
    if _intact(path):
        return path
    with lock(path.with_suffix(".lock")):
        if _intact(path):  # another process was faster
            return path
        if path.exists() and path.with_suffix(".json").exists():
            warnings.warn(f"the compiled kernel {path} is damaged; it is built again", SparsecWarning, stacklevel=2)
        _compile(compiler, text, path, flags)
    return path


def _compile(compiler: str, text: str, path: Path, flags: Sequence[str]) -> None:
    source = path.with_suffix(".cpp")
    partial = path.with_suffix(f".{os.getpid()}.part")
    command = [*shlex.split(compiler), "-shared", "-fPIC", "-o", str(partial), str(source), *flags]
    try:
        write_atomic(source, text.encode())
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode:
            raise CompileFailed(compiler=compiler, source=str(source), detail=_first_errors(done.stderr))
        checksum = _checksum(partial)
        os.replace(partial, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileFailed(compiler=compiler, source=str(source), detail=str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), {"so": checksum, "made_from": digest(text, *flags)})


def _first_errors(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line] or lines
    return "; ".join(errors[:3]) or "no message"


def _checksum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _intact(path: Path) -> bool:
    if not path.exists():
        return False
    record = read_json(path.with_suffix(".json"))
    return record is not None and record["so"] == _checksum(path)


def _earlier(folder: Path, name: str, made_from: str) -> Path | None:
    for path in sorted(folder.glob(f"{name}-*.so")):
        record = read_json(path.with_suffix(".json"))
        if record is not None and record["made_from"] == made_from and record["so"] == _checksum(path):
            return path
    return None


def build(spec: KernelSpec, cache: Path) -> Kernel:
    """Generate, compile and load a spec; the second call with the same spec and cache is a dictionary look-up.

    Raises NoCompiler, CompileFailed (also where the object cannot be loaded, e.g. a ``noexec`` cache directory).
    """
    key = (spec, str(cache))
    with _kernels_lock:
        if key not in _kernels:
            _kernels[key] = _load(spec, cache)
        return _kernels[key]


def _load(spec: KernelSpec, cache: Path) -> Kernel:
    text = family(spec.format.pattern.kind, spec.x, spec.loop).text(spec)
    path = compile_shared(text, spec.name, isa_flags(spec), cache)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileFailed(compiler="the loader", source=str(path), detail=str(error)) from error

    def address(symbol: str) -> int:
        return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value or 0

    return Kernel(
        spec,
        path.with_suffix(".cpp"),
        run=address("sparsec_run"),
        prepare=address("sparsec_prepare"),
        prepare_units=address("sparsec_prepare_units"),
        scratch=address("sparsec_scratch"),
    )
