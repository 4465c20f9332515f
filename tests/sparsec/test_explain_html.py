"""The page of a report: one file, no network, everything escaped, the same data as ``to_dict()``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from sparsec.explain import Explanation, build
from sparsec.facts import Candidate, Declined
from sparsec.options import Options
from sparsec.records import CompileRecord, LayerRecord
from sparsec.report_data import Whole
from sparsec.report_html import tiles

Make = Callable[..., LayerRecord]
EVIL = "a</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


class Page(HTMLParser):
    """Tags, attributes and the text of scripts, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.cells: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.cells:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    @property
    def data(self) -> Any:
        found = [text for attrs, text in self.scripts if attrs.get("type") == "application/json"]
        assert len(found) == 1
        return json.loads(found[0])


def report(layers: list[LayerRecord], batches: tuple[int, ...] = (1, 16), **fields: Any) -> Explanation:
    record = CompileRecord(layers=layers, declined=[Declined("bmm has no stored weight", "bmm_1", "attn", "bmm")])
    made = build([record], batches=batches, given=1, options=Options.parse({"target": "reference"}))
    return replace(made, **{"model": "m", "weights": 1000, **fields})


def with_formats(record: LayerRecord, formats: list[str]) -> tuple[Candidate, ...]:
    """The candidates of a record and more, as a weight has that fits many formats."""
    like = record.decision.candidates[-1]
    more = [replace(like, format=f, kernel=loop) for f in formats for loop in ("dot", "outer")]
    return (*record.decision.candidates, *more)


def test_the_page_holds_exactly_one_json_block_equal_to_the_dict(layer_record: Make) -> None:
    made = report([layer_record("q"), layer_record("k", density=1.0, format="dense", reason="no zeros")])
    assert Page(made.to_html()).data == made.to_dict()


def test_the_page_loads_nothing_from_anywhere(layer_record: Make) -> None:
    text = report([layer_record("q")]).to_html()
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<link|<iframe|<img|<base", text)
    assert not any({"src", "srcset", "data", "action"} & attrs.keys() for _, attrs in page.tags)
    assert all(str(a["href"]).startswith("#") for _, a in page.tags if "href" in a)


def test_three_hundred_layers_that_do_not_fold_stay_below_a_megabyte(layer_record: Make) -> None:
    layers = [
        layer_record(f"model.layers.block_{i}.mlp.down_proj", 4096, 11008, density=0.3 + 0.001 * i, pays_to=64 + i)
        for i in range(300)
    ]
    blocks = [f"block:{r}x{c}+fp32" for r in (1, 4, 8, 16, 32) for c in (1, 4, 8, 16, 32)]
    layers = [replace(x, decision=replace(x.decision, candidates=with_formats(x, blocks))) for x in layers]
    made = report(layers, (1, 16, 512))
    assert len(made.groups) == 300
    body = made.to_dict()
    assert {c["format"] for c in body["layers"][0]["candidates"]} >= {"dense", "bitmap+fp32"}
    assert len(made.to_html().encode()) < 1_000_000


def test_names_and_reasons_from_a_model_are_escaped_everywhere(layer_record: Make) -> None:
    made = report(
        [layer_record(EVIL, reason=EVIL, help=EVIL, near=EVIL)], model=EVIL, spec=EVIL, helps=(EVIL,), notes=(EVIL,)
    )
    made = replace(
        made, refusals=(replace(made.refusals[0], reason=EVIL, names=(EVIL,), ops=(EVIL,)),), failures=(EVIL,)
    )
    text = made.to_html(compare=report([layer_record(EVIL, density=1.0)], model=EVIL))
    page = Page(text)
    assert len(page.scripts) == 2
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.tags)
    assert "</script><script>" not in text
    assert page.data["layers"][0]["name"] == EVIL
    assert any(EVIL in cell for cell in page.cells)


def test_the_table_is_readable_without_javascript(layer_record: Make) -> None:
    cells = " ".join(Page(report([layer_record("decoder.up_proj", reason="reads 0.61x the bytes")]).to_html()).cells)
    for text in ("decoder.up_proj", "reads 0.61x the bytes", "384 x 384", "50 %", "unstructured", "bitmap", "1.19x"):
        assert text in cells


def test_the_page_never_contains_weights(layer_record: Make) -> None:
    body = report([layer_record("q")]).to_dict()
    longest = max(len(v) for v in body["layers"][0].values() if isinstance(v, (list, str)))
    assert longest <= 256  # the thumbnail: 16 x 16 mean densities


def test_a_page_without_layers_and_one_of_a_failure_can_be_made() -> None:
    assert "no linear layer" in report([]).to_html() or "no linear layer can be taken" in report([]).to_html()
    assert "no C++ compiler" in report([], failures=("no C++ compiler was found",)).to_html()


def test_the_whole_model_is_the_first_number_of_the_page(layer_record: Make) -> None:
    made = report([layer_record("q")], whole=Whole(1.2e-2, 6e-3, 1.9, 2.1))
    what, number, remark = tiles(made)[0]
    assert (what, number) == ("whole model", "2.00x")
    assert remark == "1.90 to 2.10, measured at batch 1; 6.0 ms instead of Inductor's 12 ms"
    text = made.to_html()
    assert text.index(">2.00x<") < text.index("expected, linear layers")
    assert Page(text).data["total"]["speedup"] == 2.0


def test_the_page_is_written_where_asked(tmp_path: Any, layer_record: Make) -> None:
    made = report([layer_record("q")])
    assert made.to_html(tmp_path / "r.html") == (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_comparison_is_in_the_page_and_in_its_data(layer_record: Make) -> None:
    now, before = report([layer_record("q", density=0.1)]), report([layer_record("q", density=0.9)], model="before")
    text = now.to_html(compare=before)
    assert "Compared with before" in text
    assert Page(text).data == now.to_dict(before)
    assert Page(text).data["compare"]["changed"][0]["density"] == [0.9, 0.1]
