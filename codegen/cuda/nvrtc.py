"""CUDA C++ text -> machine code, by NVRTC through ctypes: no toolkit, no headers, no driver and no GPU are needed.

The library is the one of the pip package ``nvidia-cuda-nvrtc`` (torch's CUDA wheels depend on it), else the system's.
It is loaded when first asked for.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from sparsec.errors import KernelCompileFailed, NoNvrtc

OPTIONS = ("--std=c++17",)


def compile(text: str, arch: str, name: str = "kernel") -> bytes:
    """The cubin of a translation unit. ``arch``: ``sm_80``, ``sm_90a``. ``name``: for errors.

    Raises NoNvrtc, and KernelCompileFailed with the first line that the compiler says is wrong.
    """
    nvrtc = library()
    program = ctypes.c_void_p()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None)
    if made:
        raise KernelCompileFailed(name=name, target=arch, detail=_said(nvrtc, made))
    try:
        options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={arch}")]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _read(nvrtc, "ProgramLog", program).decode(errors="replace")
            lines = [line for line in log.splitlines() if "error" in line] or [_said(nvrtc, failed)]
            raise KernelCompileFailed(name=name, target=arch, detail=lines[0].rstrip("\0"))
        return _read(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def version() -> tuple[int, int]:
    """Of the library, such as (13, 0). Raises NoNvrtc."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC, loaded. Raises NoNvrtc."""
    said = "no libnvrtc was found beside the pip packages of NVIDIA, in torch or in the system"
    for path in candidates():
        try:
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # NVRTC asks the loader for it by name alone
                ctypes.CDLL(str(builtins))
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            said = f"{path} cannot be loaded ({error})"
            continue
        loaded.nvrtcGetErrorString.restype = ctypes.c_char_p
        return loaded
    raise NoNvrtc(why=said)


def candidates() -> Iterator[Path]:
    """Where NVRTC may be, the newest of the best place first."""
    for package, pattern in (("nvidia", "*/lib"), ("torch", "lib")):
        found = importlib.util.find_spec(package)
        for root in (found.submodule_search_locations or ()) if found else ():
            for folder in sorted(Path(root).glob(pattern), reverse=True):
                files = [f for f in folder.glob("libnvrtc*.so*") if "builtins" not in f.name and ".alt." not in f.name]
                yield from sorted(files, reverse=True)
    named = ctypes.util.find_library("nvrtc")
    if named:
        yield Path(named)


def _read(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _said(nvrtc: ctypes.CDLL, code: int) -> str:
    return str(nvrtc.nvrtcGetErrorString(code).decode())
