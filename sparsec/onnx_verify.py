"""Whether an ONNX file computes what PyTorch does: a file and inputs in, the error of each output out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sparsec.errors import BadModelFile
from sparsec.onnx import accuracy, first_line, library_path, runtime, session


def differences(
    path: Path, inputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], cache_dir: str = ""
) -> Mapping[str, Mapping[str, float]]:
    """For ``sparsec`` (with our library) and ``plain`` (without): of each output its largest difference from
    ``wanted``, over the largest value there."""
    ort = runtime()
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    quiet.add_session_config_entry(*accuracy(exact=True))
    try:
        plain = ort.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
        ours = session(path, cache_dir=cache_dir, exact=True)
    except Exception as error:  # whatever its C++ throws
        raise BadModelFile(path=path.name, why=first_line(error.__cause__ or error)) from error
    found = {}
    for how, run in (("sparsec", ours), ("plain", plain)):
        feed = {said.name: value.numpy() for said, value in zip(run.get_inputs(), inputs, strict=True)}
        names = [said.name for said in run.get_outputs()]
        outputs = [torch.from_numpy(y) for y in run.run(names, feed)]
        found[how] = {name: _error(y, want) for name, y, want in zip(names, outputs, wanted, strict=True)}
    return found


def example(path: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Inputs that a file can be called with and what plain ONNX Runtime gives for them; None where it takes no inputs
    that can be made up: sizes that are not said are 2, floats are normal, whole numbers 1."""
    ort = runtime()
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 4
    quiet.add_session_config_entry(*accuracy(exact=True))
    torch_types = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32}
    made, generator = [], torch.Generator().manual_seed(0)
    try:
        run = ort.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])
        for said in run.get_inputs():
            sizes = [size if isinstance(size, int) else 2 for size in said.shape]
            dtype = torch_types[said.type]
            normal = torch.randn(sizes, generator=generator)
            made.append(normal if dtype == torch.float32 else torch.ones(sizes, dtype=dtype))
        feed = {said.name: value.numpy() for said, value in zip(run.get_inputs(), made, strict=True)}
        found = [torch.from_numpy(y) for y in run.run(None, feed)]
    except Exception:  # whatever its C++ throws, and types that are not among those
        return None
    return made, found


def first_difference(path: Path, inputs: Sequence[torch.Tensor], allowed: float, cache_dir: str = "") -> str:
    """The first operator of ours that gives something else with the library than its body does without; "" where none
    does, so that what differs from PyTorch is what ``torch.onnx`` wrote."""
    import onnx

    ort = runtime()
    model = onnx.load(path)
    ours = [node for node in model.graph.node if node.domain == "sparsec"]
    if not ours:
        return ""
    model.graph.output.extend(onnx.helper.make_tensor_value_info(node.output[0], 1, None) for node in ours)
    data, quiet, both = model.SerializeToString(), ort.SessionOptions(), []
    quiet.log_severity_level = 3
    for library in (False, True):
        if library:
            quiet.register_custom_ops_library(str(library_path(cache_dir)))
        run = ort.InferenceSession(data, quiet, providers=["CPUExecutionProvider"])
        feed = {said.name: value.numpy() for said, value in zip(run.get_inputs(), inputs, strict=True)}
        both.append(run.run([node.output[0] for node in ours], feed))
    for node, plain, sparse in zip(ours, *both, strict=True):
        if not _error(torch.from_numpy(sparse), torch.from_numpy(plain)) <= allowed:
            return str(node.name)
    return ""


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    found, wanted = found.detach(), wanted.detach()
    same = (found == wanted) | (found.isnan() & wanted.isnan())  # infinities, too
    finite = wanted[wanted.isfinite()].double().abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return float((found.double() - wanted.double()).abs().masked_fill(same, 0.0).max()) / (largest or 1.0)
