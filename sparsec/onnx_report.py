"""The table of an ONNX export: an ``OnnxReport`` in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsec.export_onnx import OnnxReport


def text_of(report: OnnxReport) -> str:
    """A line for each layer with its reason, then sizes and errors."""
    ours = [layer for layer in report.layers if layer.decision != "dense"]
    lines = [f"{report.path}: {len(ours)} of {len(report.layers)} linear layers as operators of sparsec", ""]
    width = max((len(layer.name) for layer in report.layers), default=5)
    lines.append(f"{'layer':<{width}}  {'shape':<11}  {'zeros':>6}  {'in the file':<12}  {'MB':>7}  expected  why")
    for layer in report.layers:
        gain = f"{layer.expected:.2f}x" if layer.decision != "dense" else "-"
        lines.append(
            f"{layer.name:<{width}}  {f'{layer.n}x{layer.k}':<11}  {layer.zeros:>6.1%}  {layer.decision:<12}  "
            f"{layer.bytes / 1e6:>7.2f}  {gain:>8}  {layer.reason}"
        )
    share = report.bytes / max(report.dense_bytes, 1)
    lines += [
        "",
        f"file: {report.bytes / 1e6:.1f} MB, {share:.2f} of the dense weights ({report.dense_bytes / 1e6:.1f} MB)",
    ]
    for how, of in report.errors.items():
        what = "with our library" if how == "sparsec" else "without"
        lines.append(f"largest error, {what}: {max(of.values(), default=0.0):.1e}")
    if any(layer.decision.startswith("int4") for layer in report.layers):
        lines.append("sessions round what layers of 4 bits read to 8 bits, except with exact=True, as it was run here")
    return "\n".join(lines)
