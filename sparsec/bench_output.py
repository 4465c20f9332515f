"""Records of ``sparsec bench`` to text: md, json, jsonl, csv, sql; and back, to compare two runs.

One schema serves all five: the fields of ``BenchRecord``. Tables (md) show what people read; csv and sql leave out
the lists of samples.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparsec.bench import BenchRecord
from sparsec.errors import BadOptionValue, InputError

LISTS = ("samples_ns", "samples_ts")
SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "float": "REAL"}
Ratios = Mapping[tuple[object, ...], float]


def render(records: Sequence[BenchRecord], format: str, before: Sequence[BenchRecord] | None = None) -> str:
    """The records in one of FORMATS. ``before``: records of an earlier run, which add a Speedup column."""
    if format not in FORMATS:
        raise BadOptionValue(key="-o", value=format, expected=f"it must be one of {', '.join(FORMATS)}")
    return FORMATS[format](records, None if before is None else ratios(records, before))


def ratios(records: Sequence[BenchRecord], before: Sequence[BenchRecord]) -> Ratios:
    """How many times faster than ``before`` each record is, for those that have a partner there."""
    old = {record.key: record.avg_ts for record in before}
    return {r.key: r.avg_ts / old[r.key] for r in records if old.get(r.key)}


def read_records(path: Path) -> list[BenchRecord]:
    """Records that an earlier run wrote with ``-o json`` or ``-o jsonl``. Raises OSError, InputError."""
    text = path.read_text()
    try:
        if text.lstrip().startswith("["):
            said = json.loads(text)
        else:
            said = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [BenchRecord.from_dict(record) for record in said]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(detail=f"{path} holds no records of sparsec bench -o json ({error})") from error


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """An aligned markdown table; the columns named in ``left`` are set left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if header[i] in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [f":{'-' * (w - 1)}" if header[i] in left else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *(line(row) for row in rows)])


def _md(records: Sequence[BenchRecord], compared: Ratios | None) -> str:
    if not records:
        return ""
    header = ["model", "size", "params", "zeros", "dtype", "backend", "threads", "batch", "test", "t/s", "vs dense"]
    extra = ["Speedup"] if compared is not None else []
    rows = []
    for r in records:
        dense = r.backend != "sparsec"
        rows.append(
            [
                _short_name(r),
                _size(r.model_size),
                _count(r.model_n_params),
                f"{100 * r.zeros:.1f} %",
                r.dtype,
                f"{r.backend} (dense)" if dense else r.backend,
                str(r.n_threads),
                str(r.n_batch),
                r.test,
                f"{_number(r.avg_ts)} ± {_number(r.stddev_ts)}",
                "1.00x" if dense else f"{r.speedup:.2f}x [{r.speedup_low:.2f}, {r.speedup_high:.2f}]",
                *([f"{compared[r.key]:.2f}x" if r.key in compared else "-"] if compared is not None else []),
                r.path,
            ]
        )
    return "\n".join([table([*header, *extra, "path"], rows, left=("model", "path")), "", *_footer(records, compared)])


def _footer(records: Sequence[BenchRecord], compared: Ratios | None) -> list[str]:
    first = records[0]
    build = f"{first.sparsec_version} ({first.build_commit})" if first.build_commit else first.sparsec_version
    samples = any(r.unit == "samples" for r in records)
    lines = [
        f"sparsec {build}, torch {first.torch_version}, {first.cpu_info} ({first.isa}); "
        f"both engines in turns, {len(first.samples_ns)} rounds; t/s: mean ± std{', samples for fwd' * samples}; "
        "vs dense: median over rounds [95 %]",
    ]
    worst = max(r.difference for r in records)
    lines.append(f"largest difference between the two outputs: {worst:.1g} of the largest value")
    if compared is not None:
        lines.append(f"Speedup: against the other run, {len(compared)} of {len(records)} rows have a partner there")
    return lines + [f"note: {note}" for note in dict.fromkeys(r.notes for r in records if r.notes)]


def _plain(record: BenchRecord, compared: Ratios | None, lists: bool) -> dict[str, Any]:
    said = {k: v for k, v in record.to_dict().items() if lists or k not in LISTS}
    return said if compared is None else {**said, "compare_speedup": compared.get(record.key)}


def _json(records: Sequence[BenchRecord], compared: Ratios | None) -> str:
    return json.dumps([_plain(r, compared, lists=True) for r in records], indent=2)


def _jsonl(records: Sequence[BenchRecord], compared: Ratios | None) -> str:
    return "\n".join(json.dumps(_plain(r, compared, lists=True)) for r in records)


def _csv(records: Sequence[BenchRecord], compared: Ratios | None) -> str:
    rows = [_plain(r, compared, lists=False) for r in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _sql(records: Sequence[BenchRecord], compared: Ratios | None) -> str:
    types = {f.name: SQL_TYPES.get(str(f.type), "TEXT") for f in fields(BenchRecord) if f.name not in LISTS}
    if compared is not None:
        types["compare_speedup"] = "REAL"
    columns = ",\n".join(f"  {name} {kind}" for name, kind in types.items())
    lines = [f"CREATE TABLE IF NOT EXISTS test (\n{columns}\n);", ""]
    for record in records:
        said = _plain(record, compared, lists=False)
        values = ", ".join(_literal(said[name]) for name in types)
        lines.append(f"INSERT INTO test ({', '.join(types)}) VALUES ({values});")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, (int, float)):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"


def _short_name(record: BenchRecord) -> str:
    name = record.model_filename.rstrip("/").rpartition("/")[2] or record.model_filename
    return f"{record.model_type.partition(' ')[0]} {name}".replace("|", "/")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _count(number: float) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10_000 else f"{value:.2f}"


FORMATS: dict[str, Callable[[Sequence[BenchRecord], Ratios | None], str]] = {
    "md": _md,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
    "sql": _sql,
}
