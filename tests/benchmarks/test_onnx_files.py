"""The bench of exported files: every engine loads, and computes what PyTorch does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import onnx_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    onnx_files.SIDE, onnx_files.LAYERS = 256, 2
    made = tmp_path_factory.mktemp("files")
    onnx_files.write_files("stack", made)
    return made


@pytest.mark.parametrize("name", onnx_files.ENGINES)
def test_each_engine_gives_what_pytorch_does(folder: Path, name: str) -> None:
    found = onnx_files.run("stack", name, folder, 2)
    assert found["load"] > 0
    assert found["call"] > 0
    assert found["error"] < (5e-2 if "int8" in name else 1e-5)


def test_the_sizes_are_those_of_the_files(folder: Path) -> None:
    sizes = [onnx_files.size_of(folder / f"{kind}.onnx") for kind in ("sparse_int8", "sparse", "dense")]
    assert sizes == sorted(sizes)
    assert sizes[1] < 0.5 * sizes[2]
