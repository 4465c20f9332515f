"""Launching cubins: what can be shown without a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from sparsec.codegen.cuda import driver
from sparsec.codegen.cuda.driver import Int32, arguments
from sparsec.errors import NoDriver


class Loud:
    """A driver that notes each call, and answers with an error where told to."""

    def __init__(self, fail: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail = fail

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls.append((name, args))
            if name == "cuGetErrorString":
                args[1]._obj.value = b"no kernel image is available"
            return 209 if name == self.fail else 0

        return call

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_modules", {})
    monkeypatch.setattr(driver, "_functions", {})


@pytest.mark.usefixtures("fresh")
def test_a_cubin_is_loaded_once_a_device_and_asks_for_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    loud = Loud()
    monkeypatch.setattr(driver, "library", lambda: loud)
    for device in (0, 0, 1):
        driver._function(b"cubin", "f", device, 100_000)
    assert loud.names == 2 * ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"]
    assert loud.calls[2][1][1:] == (driver.MAX_DYNAMIC_SHARED, 100_000)
    driver._function(b"cubin", "g", 0, 1000)
    assert loud.names[6:] == ["cuModuleGetFunction"]


@pytest.mark.usefixtures("fresh")
def test_what_the_driver_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "library", lambda: Loud("cuModuleLoadData"))
    with pytest.raises(NoDriver, match="cuModuleLoadData failed: no kernel image is available"):
        driver._function(b"cubin", "f", 0, 0)


def test_without_a_driver_that_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(NoDriver, match="libcuda cannot be loaded"):
        driver.library.__wrapped__()


def test_arguments_have_the_sizes_of_c() -> None:
    tensor = torch.zeros(3)
    made = arguments([tensor, None, 5, Int32(6)])
    assert [ctypes.sizeof(value) for value in made] == [8, 8, 8, 4]
    assert [value.value for value in made] == [tensor.data_ptr(), None, 5, 6]
    with pytest.raises(TypeError, match="not True"):
        arguments([True])


def test_an_empty_grid_starts_nothing() -> None:
    driver.launch(b"", "f", (0,), 32, 0, [], torch.device("cuda"))
