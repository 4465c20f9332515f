"""Cubins on a GPU: load and launch through libcuda by ctypes, on torch's current stream.

The driver is looked for when something is first launched. Modules belong to a device's context, and are kept by it: a
cubin is loaded once a device. CUDA must be initialised, which it is once a tensor lies on the device.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import torch

from sparsec.errors import NoDriver

# cuda.h: CUfunction_attribute
MAX_DYNAMIC_SHARED = 8
Argument: TypeAlias = "torch.Tensor | Int32 | int | None"

_modules: dict[tuple[int, bytes], ctypes.c_void_p] = {}
_functions: dict[tuple[int, bytes, str], ctypes.c_void_p] = {}


class Int32(int):
    """An argument of 32 bits, ``int`` in C++; a plain int has 64."""


def launch(
    cubin: bytes, name: str, grid: Sequence[int], threads: int, shared: int, args: Sequence[Argument],
    device: torch.device,
) -> None:  # fmt: skip
    """Start ``name`` of a cubin on ``device``. ``shared``: bytes of dynamic shared memory a block.

    Tensors are passed by address, None as a null pointer. An empty grid starts nothing. Raises NoDriver with what the
    driver says: none is there, the cubin is of another architecture, arguments that it refuses.
    """
    sizes = (*grid, 1, 1)[:3]
    if 0 in sizes:
        return
    with torch.cuda.device(device):
        function = _function(cubin, name, torch.cuda.current_device(), shared)
        values = arguments(args)
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _call("cuLaunchKernel", function, *sizes, threads, 1, 1, shared, stream, pointers, None)


Value: TypeAlias = "ctypes.c_void_p | ctypes.c_int32 | ctypes.c_int64"


def arguments(args: Sequence[Argument]) -> list[Value]:
    """Each argument as C has it. Raises TypeError for anything else."""
    made: list[Value] = []
    for value in args:
        if value is None or isinstance(value, torch.Tensor):
            made.append(ctypes.c_void_p(0 if value is None else value.data_ptr()))
        elif isinstance(value, Int32):
            made.append(ctypes.c_int32(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            made.append(ctypes.c_int64(value))
        else:
            raise TypeError(f"a kernel takes tensors and integers, not {value!r}")
    return made


@functools.cache
def library() -> ctypes.CDLL:
    """The driver, loaded and initialised. Raises NoDriver."""
    said = ""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError as error:
            said = said or str(error)
            continue
        failed = driver.cuInit(0)
        if failed:
            raise NoDriver(why=f"cuInit failed: {_error(driver, failed)}")
        return driver
    raise NoDriver(why=f"libcuda cannot be loaded ({said})")


def _function(cubin: bytes, name: str, device: int, shared: int) -> ctypes.c_void_p:
    key = (device, hashlib.sha256(cubin).digest())
    found = _functions.get((*key, name))
    if found is None:
        if key not in _modules:
            module = ctypes.c_void_p()
            _call("cuModuleLoadData", ctypes.byref(module), cubin)
            _modules[key] = module
        found = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(found), _modules[key], name.encode())
        if shared > 48 * 1024:  # more than that a kernel gets only when it asks
            _call("cuFuncSetAttribute", found, MAX_DYNAMIC_SHARED, shared)
        _functions[(*key, name)] = found
    return found


def _call(name: str, *args: object) -> None:
    driver = library()
    failed = getattr(driver, name)(*args)
    if failed:
        raise NoDriver(why=f"{name} failed: {_error(driver, failed)}")


def _error(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return (text.value or b"error %d" % code).decode()
