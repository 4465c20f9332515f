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
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparsec.cache import digest, lock, read_json, write_atomic, write_json
from sparsec.codegen.cpp import family
from sparsec.codegen.spec import Kernel, KernelSpec
from sparsec.errors import BuildError, CompileFailed, NoCompiler, SparsecWarning

COMPILERS = ("g++", "clang++", "c++")
TIMEOUT_S = 900

_COMMON = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
_AVX2 = "-mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt"
_ISA_FLAGS = {
    "avx512": f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi2",
    "avx2": _AVX2,
    "portable": "",
}

_WORTH_A_HEAD = 4  # kernels with the same flags; making their precompiled header takes as long as it saves on two

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


def compile_shared(
    text: str, name: str, flags: Sequence[str], cache: Path, head: Callable[[], Path | None] | None = None
) -> Path:
    """Compile ``text`` into ``<cache>/kernels/<name>-<digest>.so`` once, whoever asks first; the .cpp stays beside it.

    The digest covers the text, the flags and the compiler's version. Without a compiler, an object that an earlier
    one made from the same text and flags is used. ``head``: what to include first, which changes nothing but the time.
    Raises NoCompiler, CompileFailed. Warns where a damaged object had to be built again.
    """
    folder = cache / "kernels"
    try:
        compiler = find_compiler()
    except NoCompiler:
        if earlier := _earlier(folder, name, digest(text, *flags)):
            return earlier
        raise
    path = _place(folder, name, text, flags, compiler)
    if _intact(path):
        return path
    with lock(path.with_suffix(".lock")):
        if _intact(path):  # another process was faster
            return path
        if path.exists() and path.with_suffix(".json").exists():
            warnings.warn(f"the compiled kernel {path} is damaged; it is built again", SparsecWarning, stacklevel=2)
        _compile(compiler, text, path, flags, head() if head else None)
    return path


def _place(folder: Path, name: str, text: str, flags: Sequence[str], compiler: str) -> Path:
    return folder / f"{name}-{digest(text, *flags, _version(compiler, os.environ.get('PATH', '')))}.so"


def text_of(spec: KernelSpec) -> str:
    """The C++ translation unit of a kernel. Raises KeyError, PatternMismatch where no family makes it."""
    return family(spec.format.pattern.kind, spec.x, spec.loop).text(spec)


def compile_all(specs: Iterable[KernelSpec], cache: Path, threads: int = 4) -> dict[KernelSpec, BuildError]:
    """Compile kernels side by side, ahead of the ``build`` of each; gives those that failed, which ``build`` raises.

    A third to a half of the time of a kernel is the reading of the compiler's own <immintrin.h>: where several need it
    with the same flags, it is precompiled for as long as this takes. Raises NoCompiler where there is none.
    """
    compiler = find_compiler()
    failed: dict[KernelSpec, BuildError] = {}
    sources = {spec: (text_of(spec), isa_flags(spec)) for spec in specs}
    missing = [spec for spec, (text, flags) in sources.items()
               if not _intact(_place(cache / "kernels", spec.name, text, flags, compiler))]  # fmt: skip
    shared = Counter(sources[spec][1] for spec in missing if spec.isa != "portable")

    def compile_one(spec: KernelSpec) -> None:
        text, flags = sources[spec]
        head = functools.partial(heads.of, flags) if shared[flags] >= _WORTH_A_HEAD else None
        try:
            compile_shared(text, spec.name, flags, cache, head)
        except BuildError as error:
            failed[spec] = error

    if missing:
        first = os.getpid() % len(missing)  # processes that share a cache begin at different ones, and help each other
        missing = missing[first:] + missing[:first]
        with tempfile.TemporaryDirectory(prefix="sparsec-") as folder, ThreadPoolExecutor(threads) as pool:
            heads = _Heads(compiler, Path(folder))
            list(pool.map(compile_one, missing))
    return failed


class _Heads:
    """Precompiled headers, made once for each set of flags when first asked for; only GCC takes them so."""

    def __init__(self, compiler: str, folder: Path) -> None:
        self._compiler, self._folder = compiler, folder
        self._lock = threading.Lock()
        self._made: dict[tuple[str, ...], Path | None] = {}

    def of(self, flags: tuple[str, ...]) -> Path | None:
        """What a compilation with these flags includes first; None: nothing."""
        with self._lock:
            if flags not in self._made:
                self._made[flags] = self._make(flags)
            return self._made[flags]

    def _make(self, flags: tuple[str, ...]) -> Path | None:
        if "clang" in _version(self._compiler, os.environ.get("PATH", "")):
            return None
        head = self._folder / f"head{len(self._made)}.h"
        command = [*shlex.split(self._compiler), "-x", "c++-header", "-fPIC", *flags, "-o", f"{head}.gch", str(head)]
        try:
            head.write_text("#include <stdint.h>\n#include <immintrin.h>\n")
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return None if done.returncode else head


def _compile(compiler: str, text: str, path: Path, flags: Sequence[str], head: Path | None) -> None:
    source = path.with_suffix(".cpp")
    partial = path.with_suffix(f".{os.getpid()}.part")
    first = ["-include", str(head)] if head else []
    command = [*shlex.split(compiler), "-shared", "-fPIC", *first, "-o", str(partial), str(source), *flags]
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
    path = compile_shared(text_of(spec), spec.name, isa_flags(spec), cache)
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
