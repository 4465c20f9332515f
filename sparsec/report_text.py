"""An explanation as a table of plain ASCII, at most 120 columns wide; with colour on a terminal that wants it.

In: an Explanation. Out: text. Each row is two lines: what runs and what it takes, then the reason as a sentence.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from sparsec.report_data import Cost, Measured, Whole, count, duration, percent, short_format
from sparsec.report_fold import Group

if TYPE_CHECKING:
    from sparsec.explain import Explanation

WIDTH = 120
MODEL_RAISES = "the model itself raises"
MAX_EXTRA = 3  # batches beside the first that get a column; the others are in --json and --html
Line = list[tuple[str, str]]  # pieces of a line: text and style


def to_text(report: Explanation, compare: Explanation | None = None, most: int = 0) -> str:
    """The whole report without colour. ``most``: only so many rows of the table, the largest (0: all)."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines_of(report, compare, most)) + "\n"


def show(report: Explanation, file: TextIO | None = None, compare: Explanation | None = None) -> None:
    """Print the report; colours only on a terminal, and never with NO_COLOR set."""
    file = file or sys.stdout
    if not file.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        file.write(to_text(report, compare))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, width=WIDTH, highlight=False, emoji=False, soft_wrap=True)
    for line in lines_of(report, compare):
        console.print(Text.assemble(*line))


def lines_of(report: Explanation, compare: Explanation | None = None, most: int = 0) -> list[Line]:
    """The report as styled lines, every character printable ASCII."""
    lines = [*_head(report), []]
    for note in (*report.failures, *report.notes):
        lines += _wrapped(f"! {note.rstrip('.')}.", "bold yellow", indent=2) + [[]]
    groups = report.groups
    if groups:
        lines += _table(report, groups[: most or None])
        left = groups[most:] if most else ()
        lines += (
            [[(f"and {len(left)} rows more, {percent(sum(g.share for g in left))} of the time", "dim")]] if left else []
        )
        lines.append([])
    lines += _untaken(report)
    lines += _helps(report)
    if compare is not None:
        from sparsec.report_dict import difference

        lines += _compared(difference(report, compare))
    lines += _foot(report)
    return [[(_ascii(text), style) for text, style in line] for line in lines]


def _head(report: Explanation) -> list[Line]:
    import torch

    batches = "batch " + ", ".join(str(b) for b in report.batches)
    if report.tokens:
        batches += f" of {report.tokens} token{'s' if report.tokens > 1 else ''}"
    torch_version = f"torch {torch.__version__.partition('+')[0]}"
    facts = "   ".join([report.target, torch_version, batches, f"{report.seconds:.1f} s"])
    title = f"sparsec explain  {report.model}"
    if len(title) + 4 + len(facts) <= WIDTH:
        head: list[Line] = [[(title, "bold"), (" " * (WIDTH - len(title) - len(facts)), ""), (facts, "dim")]]
    else:
        head = [[(title[:WIDTH], "bold")], *_wrapped(facts, "dim")]
    return [*head, *_wrapped(summary(report))]


def summary(report: Explanation) -> str:
    """The second line: how many weights, how many zeros, how many layers, what to expect."""
    parts = []
    if report.weights:
        parts.append(f"{count(report.weights)} weights")
    if not report.layers:
        return f"model: {'; '.join([*parts, nothing(report)])}"
    facts = {(layer.name, layer.record.fact.key): layer.record.fact for layer in report.layers}.values()
    inside, kept = sum(f.n * f.k for f in facts), sum(f.nnz for f in facts)
    weights = "" if report.weights else " weights"
    parts.append(f"{count(inside)}{weights} in linear layers, {percent(1 - kept / max(inside, 1), 1)} of these zero")
    sparse, panels = ways(report)
    beside = f", {panels} dense in panels" if panels else ""
    parts.append(f"{sparse} of {len(report.layers)} linear layers run sparse{beside}")
    return f"model: {'; '.join(parts)}\n{_totals(report)}"


def ways(report: Explanation) -> tuple[int, int]:
    """How many layers skip zeros, and how many run whole weights on our kernel."""
    runs = [short_format(layer.decision) for layer in report.layers]
    return sum(way not in ("dense", "panel") for way in runs), runs.count("panel")


def nothing(report: Explanation) -> str:
    """Why there is no table, and what to do."""
    if report.failures:
        return "the model could not be looked at (see below), so torch.compile would run it without sparsec"
    if report.refusals and all(refusal.reason.startswith("already packed") for refusal in report.refusals):
        return "every linear layer is packed already, as below"
    if report.refusals:
        return "no linear layer can be taken; the reasons are below"
    return (
        "no linear layer was found. sparsec speeds up nn.Linear, x @ W, addmm, conv2d and HF Conv1D whose "
        "weight is a parameter; this model's forward has none"
    )


def _totals(report: Explanation) -> str:
    lines = []
    if report.whole is not None:
        lines.append(f"measured for the whole model: {whole(report.whole)} at batch {report.whole.batch}")
    measured = report.measured()
    if measured is not None:
        speedup = f"{measured.speedup:.2f}x ({interval(measured)})"
        lines.append(f"measured for the linear layers: {speedup} at batch {report.batches[0]}{_amdahl(report)}")
    texts = []
    for batch in report.batches:
        cost = report.expected(batch)
        if cost is not None:
            kept = " (dense kept)" if cost.speedup < 1.005 else ""
            texts.append(f"{cost.speedup:.2f}x at batch {batch}{kept}")
    unknown = "unknown, the decisions carry no costs"
    return "\n".join([*lines, f"expected for the linear layers: {', '.join(texts) or unknown}"])


def whole(cost: Whole) -> str:
    """``12 ms by Inductor, 5.5 ms by sparsec, 2.20x (2.10 to 2.30)``."""
    times = f"{duration(cost.dense_s)} by {cost.engine}, {duration(cost.ours_s)} by sparsec"
    return f"{times}, {cost.speedup:.2f}x ({interval(cost)})"


def interval(cost: Measured) -> str:
    return f"{cost.low:.2f} to {cost.high:.2f}"


def _amdahl(report: Explanation) -> str:
    """How much of the whole the linear layers are: the limit of what sparsity can give."""
    if report.whole is None or report.whole.batch not in report.batches:
        return ""
    cost = report.measured(report.whole.batch)
    if cost is None:
        return ""
    share = min(cost.dense_s / report.whole.dense_s, 1.0)
    return f"; dense, they are {percent(share)} of {report.whole.engine}'s time"


def _table(report: Explanation, groups: Sequence[Group]) -> list[Line]:
    measured = report.measured() is not None
    first, *rest = report.batches
    names = ["shape", "zero", "pattern", f"x{first} runs", "dense", "ours"]
    names += ["expected", "measured"] if measured else ["speedup"]
    names += [f"x{b}" for b in rest[:MAX_EXTRA]] + ["share"]
    rows = [_row(group, len(rest[:MAX_EXTRA]), measured) for group in groups]
    widths = [max(len(_ascii(text)) for text in column) for column in zip(names, *rows, strict=True)]
    room = WIDTH - sum(widths) - len(widths)
    name_width = min(room, max(len("layer"), *(len(_ascii(g.name)) for g in groups)))
    head = "layer".ljust(name_width) + "".join(
        " " + (n.ljust(w) if i < 4 else n.rjust(w)) for i, (n, w) in enumerate(zip(names, widths, strict=True))
    )
    lines: list[Line] = [[(head, "bold")]]
    for group, cells in zip(groups, rows, strict=True):
        name, *more = cut(_ascii(group.name), name_width)
        line: Line = [(name.ljust(name_width), "")]
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            line.append((" " + (cell.ljust(width) if i < 4 else cell.rjust(width)), _style(i, group)))
        lines.append(line)
        lines += [[(part, "")] for part in more]
        lines += _wrapped(sentence(group), "dim", indent=4)
        lines += _wrapped(group.activation, "dim", indent=4) if group.activation else []
    return lines


def _row(group: Group, extra: int, measured: bool) -> list[str]:
    layer = group.first
    cells = [f"{layer.shape[0]}x{layer.shape[1]}", group.zero, layer.pattern, short_format(layer.decision)]
    expected, real = group.cost(0), group.cost(0, measured=True)
    shown = real if measured else expected
    n = len(group.layers)
    cells += [duration(shown.dense_s / n), duration(shown.ours_s / n)] if shown else ["-", "-"]
    cells.append(_times(expected))
    if measured:
        cells.append(_times(real))
    cells += [_times(group.cost(i + 1, measured)) for i in range(extra)]
    return [*cells, percent(group.share) if shown else "-"]


def _times(cost: Cost | None) -> str:
    return f"{cost.speedup:.2f}x" if cost else "-"


def _style(column: int, group: Group) -> str:
    if column == 3 and group.first.decision != "dense":
        return "green"
    return "dim" if column == 3 else ""


def sentence(group: Group) -> str:
    """The reason, with how many layers it speaks for where the name does not show it."""
    many = f"{len(group.layers)} layers: " if "*" in group.name else ""
    return f"{many}{group.reason}"


def _untaken(report: Explanation) -> list[Line]:
    if not report.refusals:
        return [[("not taken: nothing; every linear-type operation is in the table", "")], []] if report.layers else []
    operations = sum(r.count for r in report.refusals)
    lines: list[Line] = [[(f"not taken: {operations} operation{'s' if operations > 1 else ''}", "bold")]]
    for refusal in report.refusals:
        ops = f" ({', '.join(refusal.ops)})" if refusal.ops else ""
        where = f": {', '.join(refusal.names)}" if refusal.names else ""
        lines += _wrapped(f"{refusal.count} x {refusal.reason}{ops}{where}", indent=2)
    return [*lines, []]


def _helps(report: Explanation) -> list[Line]:
    if not report.helps:
        return []
    lines: list[Line] = [[("what would help", "bold")]]
    for text in report.helps:
        lines += _wrapped(text, indent=2)
    return [*lines, []]


def _compared(diff: dict[str, object]) -> list[Line]:
    from sparsec.report_dict import difference_lines

    lines: list[Line] = [[(f"compared with {diff['model']}", "bold")]]
    for text in difference_lines(diff):
        lines += _wrapped(text, indent=2)
    return [*lines, []]


def _foot(report: Explanation) -> list[Line]:
    lines: list[Line] = []
    if report.layers:
        lines += _wrapped(f"numbers: {how(report)}", "dim")
    return [*lines, [("next: ", "bold"), (next_command(report), "")]]


def how(report: Explanation) -> str:
    """How the numbers were got, in a sentence."""
    if report.measured() is not None:
        together = "; the whole model likewise, compiled twice" if report.whole else ""
        return (
            "dense, ours and measured were timed here, each layer against F.linear in one interleaved run"
            f"{together}; expected comes from the cost model"
        )
    sources = {layer.record.decision.source for layer in report.layers}
    if sources == {"measured"}:
        return "expected from ratios that the tuner measured on this machine; nothing was timed in this run"
    machine = "this machine's measured rates"
    if report.target.startswith("reference"):
        machine = "the fixed rates of the reference target, which is no real machine"
    return f"expected by the cost model from {machine}; no layer was timed in this run"


def next_command(report: Explanation) -> str:
    """The command that takes the reader further; for a model that has no name on the command line, the call."""
    spec, batch = report.spec, report.batches[0]
    tokens = f" {report.tokens}" if report.tokens else ""
    if any(MODEL_RAISES in failure for failure in report.failures):
        return "give inputs that the model takes"
    if report.failures:
        return "sparsec doctor"
    if not report.layers and report.refusals:
        return "change what the reasons name, and explain again"
    if not report.layers:
        return "sparsec demo    (a model that has what sparsec takes)"
    proposed = [int(m[1]) / 100 for m in (re.match(r"(\d+) % zero on", h) for h in report.helps) if m]
    few = all(layer.density > 0.95 for layer in report.layers)
    if (few or proposed) and not any(a.decision != "dense" for layer in report.layers for a in layer.at):
        share = proposed[0] if proposed else 0.8
        if not spec:
            return f'sparsec.sparsify(model, {{"method": "magnitude", "sparsity": {share:g}}})'
        return f"sparsec sparsify {spec} --method magnitude --sparsity {share:g} -o OUT"
    if report.measured() is None and report.whole is None:
        if not spec:
            return "sparsec.explain(model, *inputs, measure=True)"
        return f"sparsec explain {spec} --batch {batch}{f' --tokens{tokens}' if tokens else ''} --measure"
    if not spec:
        return 'torch.compile(model, backend="sparsec")'
    return f"sparsec bench {spec} -b {batch}{f' -p{tokens}' if tokens else ''}"


def cut(name: str, width: int) -> list[str]:
    """A dotted name in pieces of at most ``width``, cut at dots where it can be; later pieces are indented."""
    pieces, rest = [], name
    while len(rest) > width:
        at = rest.rfind(".", 3, width) + 1
        at = at if at > 3 else width
        pieces.append(rest[:at])
        rest = "  " + rest[at:]
    return [*pieces, rest]


def _wrapped(text: str, style: str = "", indent: int = 0) -> list[Line]:
    lines: list[Line] = []
    for part in text.split("\n"):
        hang = " " * (indent + 2 if indent else 2)
        wrapped = textwrap.wrap(
            part, WIDTH, initial_indent=" " * indent, subsequent_indent=hang, break_on_hyphens=False
        )
        lines += [[(line, style)] for line in wrapped]
    return lines


def _ascii(text: str) -> str:
    """Names and sentences may hold anything; a table holds printable ASCII."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in plain)
