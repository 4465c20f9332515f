"""Reports built from records made by hand: what is folded, sorted, said and summed. Times come from costs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sparsec.errors import BadOptionValue
from sparsec.explain import Explanation, build, explain, log_record
from sparsec.facts import Declined, NMFact, Range, ValueFact
from sparsec.options import Options
from sparsec.records import CompileRecord, LayerRecord, StageRecord
from sparsec.report_data import Measured, Whole, count, duration, percent, rows_at
from sparsec.report_fold import merge_names, merge_numbers, not_taken
from sparsec.report_text import WIDTH, to_text

Make = Callable[..., LayerRecord]
REFERENCE = Options.parse({"target": "reference"})


def encoder(make: Make) -> CompileRecord:
    """Six blocks of an encoder and a head, as a compilation would record them."""
    record = CompileRecord(stages=[StageRecord("capture", 12.0, 37), StageRecord("decide", 3.5, 30)])
    for i in range(6):
        block = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            record.layers.append(make(f"{block}.attention.self.{part}", density=0.5 - 0.004 * i, pays_to=100))
        dense = {"format": "dense", "reason": "break-even is 62 % zero on this machine"}
        record.layers.append(make(f"{block}.attention.output.dense", density=0.89, **dense))
        near = f"near 2:4 (97.{i} % of groups; 1 81{i} break it)"
        record.layers.append(make(f"{block}.intermediate.dense", 1536, 384, density=0.2, near=near))
        exact = {"fact": {"nm": (NMFact(2, 4, 1000, 0),)}, "format": "nm:2:4+fp32"}
        record.layers.append(make(f"{block}.output.dense", 384, 1536, density=0.5, **exact))
        attention = f"{block}.attention.self"
        record.declined.append(
            Declined("a product of activations has no stored weight", f"mm_{i}", attention, "matmul")
        )
    record.layers.append(make("lm_head", 30522, 384, density=1.0, format="dense", reason="no zeros", help="prune it"))
    record.declined.append(Declined("the weight is computed in the graph (mul), not a parameter", "linear_9", "gate"))
    return record


def report(*records: CompileRecord, batches: tuple[int, ...] = (1, 16), **fields: Any) -> Explanation:
    made = build(list(records), batches=batches, given=1, options=REFERENCE)
    return replace(made, **{"model": "encoder", "weights": 34_000_000, "seconds": 1.25, **fields})


def stable(text: str) -> str:
    """The text without what differs between installations."""
    return re.sub(r"torch \d+\.\d+\.\d+\S*", "torch X.Y.Z", text)


def test_the_report_of_an_encoder(layer_record: Make, golden: Callable[[str], None]) -> None:
    text = str(report(encoder(layer_record), helps=("prune lm_head to 80 % zero: 1.17x to 1.69x at batch 1",)))
    assert "encoder.layer.0..5.intermediate.dense" in text
    golden(stable(text))


def test_no_line_is_wider_than_120_columns_and_all_is_plain_ascii(layer_record: Make) -> None:
    long = layer_record("a" * 70 + "." + "b" * 90 + ".proj", reason="because " * 40)
    strange = layer_record("büro.\x1b[31mschicht")
    text = str(report(CompileRecord(layers=[long, strange]), batches=(1, 2, 4, 8, 16, 32, 64)))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.isascii()
    assert "\x1b" not in text
    assert "b\\xfcro.\\x1b[31mschicht" in text


def test_every_layer_has_a_reason_and_every_dense_one_a_break_even(layer_record: Make) -> None:
    empty = layer_record("no_reason", reason="")
    made = report(encoder(layer_record), CompileRecord(layers=[empty]), batches=(1, 512))
    assert all(layer.reason for layer in made.layers)
    dense = [layer for layer in made.layers if any(at.decision == "dense" for at in layer.at)]
    assert len(dense) == 6 * 4 + 1
    assert all("break-even" in layer.reason for layer in dense)


def test_a_layer_that_turns_dense_with_more_rows_says_where(layer_record: Make) -> None:
    made = report(CompileRecord(layers=[layer_record("q", pays_to=100)]), batches=(1, 16))
    assert [at.decision for at in made.layers[0].at] == ["bitmap+fp32", "dense"]
    assert "bitmap up to 100 rows, dense above" in made.layers[0].reason


def test_layers_whose_names_differ_only_in_numbers_fold_into_one_row(layer_record: Make) -> None:
    groups = {g.name: g for g in report(encoder(layer_record)).groups}
    assert len(groups) == 7
    assert len(groups["encoder.layer.0..5.attention.self.query"].layers) == 6
    assert groups["encoder.layer.0..5.attention.self.query"].zero == "50-52 %"
    assert (
        "near 2:4 (97.0 to 97.5 % of groups; 1 810 to 1 815 break it)"
        in groups["encoder.layer.0..5.intermediate.dense"].reason
    )


def test_layers_that_decide_otherwise_do_not_fold(layer_record: Make) -> None:
    names = [f"layers.{i}.q_proj" for i in range(4)]
    odd = layer_record(names[2], format="dense", reason="break-even is 62 % zero")
    far = layer_record(names[3], density=0.1)
    record = CompileRecord(layers=[layer_record(names[0]), layer_record(names[1]), odd, far])
    assert sorted(g.name for g in report(record).groups) == ["layers.0,1.q_proj", "layers.2.q_proj", "layers.3.q_proj"]


def test_rows_are_sorted_by_time_and_shares_add_up(layer_record: Make) -> None:
    groups = report(encoder(layer_record)).groups
    shares = [g.share for g in groups]
    assert shares == sorted(shares, reverse=True)
    assert groups[0].name == "lm_head"
    assert sum(shares) == pytest.approx(1.0)


def test_expected_totals_are_the_sums_of_the_layers(layer_record: Make) -> None:
    made = report(encoder(layer_record))
    for i, batch in enumerate(made.batches):
        costs = [layer.at[i].expected for layer in made.layers]
        assert all(costs)
        total = made.expected(batch)
        assert total is not None
        assert total.dense_s == pytest.approx(sum(c.dense_s for c in costs if c))
        assert total.speedup == pytest.approx(total.dense_s / sum(c.ours_s for c in costs if c))
    with pytest.raises(BadOptionValue, match="batch"):
        made.expected(3)


def test_expected_times_are_the_cost_expressions_at_the_rows_of_the_batch(layer_record: Make) -> None:
    made = report(CompileRecord(layers=[layer_record("q", 100, 1000, density=0.5)]), batches=(1, 4))
    dense = [2e-10 * 1e5 * (1 + m / 8) for m in (16, 64)]
    assert [at.rows for at in made.layers[0].at] == [16, 64]
    assert [at.expected.dense_s for at in made.layers[0].at if at.expected] == pytest.approx(dense, rel=1e-5)


def test_a_tuned_decision_shows_the_ratio_that_the_tuner_measured(layer_record: Make) -> None:
    record = layer_record("q", source="measured")
    ranges = (Range(1, None, "bitmap+fp32", "dot", 3e-5, 1e-5),)
    tuned = replace(record, decision=replace(record.decision, ranges=ranges))
    made = report(CompileRecord(layers=[tuned]), batches=(1,))
    assert made.layers[0].expected is not None
    assert made.layers[0].expected.speedup == pytest.approx(3.0)
    assert "tuner measured" in str(made)


def test_expected_and_measured_are_different_fields(layer_record: Make) -> None:
    made = report(CompileRecord(layers=[layer_record("q")]), batches=(1,))
    layer = made.layers[0]
    assert layer.measured is None
    assert made.measured() is None
    timed = replace(layer, at=(replace(layer.at[0], measured=Measured(4e-5, 2e-5, 1.8, 2.2)),))
    after = replace(made, layers=(timed,))
    assert after.expected() == made.expected()
    assert after.measured() == Measured(4e-5, 2e-5, pytest.approx(1.8), pytest.approx(2.2))
    text = str(after)
    assert "measured for the linear layers: 2.00x (1.80 to 2.20) at batch 1\n" in text
    assert "were timed here" in text
    assert "were timed here" not in str(made)


@pytest.mark.parametrize(("base", "name"), [("inductor", "Inductor"), ("eager", "eager PyTorch")])
def test_the_whole_model_is_the_total_and_the_layers_are_summed_apart(layer_record: Make, base: str, name: str) -> None:
    made = report(CompileRecord(layers=[layer_record("q")]), batches=(1, 4))
    ats = [replace(at, measured=Measured(4e-5, 2e-5, 1.8, 2.2)) for at in made.layers[0].at]
    timed = replace(made, layers=(replace(made.layers[0], at=tuple(ats)),))
    after = replace(timed, whole=Whole(1e-4, 5e-5, 1.9, 2.1, base, batch=4))
    text = str(after)
    assert f"measured for the whole model: 100 us by {name}, 50 us by sparsec, 2.00x (1.90 to 2.10) at batch 4" in text
    assert f"linear layers: 2.00x (1.80 to 2.20) at batch 1; dense, they are 40 % of {name}'s time" in text
    body = after.to_dict()
    times = {"dense_s": 1e-4, "ours_s": 5e-5, "speedup": 2.0, "low": 1.9, "high": 2.1}
    assert body["total"] == {"of": "whole model", "base": base, "batch": 4, **times}
    assert [sums["measured"]["low"] for sums in body["linear_layers"]] == [1.8, 1.8]
    assert made.to_dict()["total"] is None
    assert timed.to_dict()["total"] is None


def test_the_whole_model_is_reported_where_a_layer_could_not_be_timed(layer_record: Make) -> None:
    made = report(CompileRecord(layers=[layer_record("q")]), spec="minilm", whole=Whole(1e-4, 5e-5, 1.9, 2.1))
    assert "measured for the whole model: 100 us by Inductor" in str(made)
    assert "measured for the linear layers" not in str(made)
    assert "next: sparsec bench minilm" in str(made)


def test_what_is_not_taken_is_listed_by_reason_with_folded_names(layer_record: Make) -> None:
    made = report(encoder(layer_record))
    assert [(r.count, r.names) for r in made.not_taken] == [
        (6, ("encoder.layer.0..5.attention.self",)),
        (1, ("gate",)),
    ]
    assert "not taken: 7 operations" in str(made)
    assert not_taken([Declined("", "n")])[0].reason


@pytest.mark.parametrize(
    ("fact", "density", "expected"),
    [
        ({}, 0.5, "unstructured"),
        ({}, 1.0, "dense"),
        ({}, 0.0, "all zero"),
        ({"nm": (NMFact(2, 4, 10, 0), NMFact(4, 8, 10, 0))}, 0.5, "2:4"),
        ({"nm": (NMFact(2, 4, 10, 1),)}, 0.5, "unstructured"),
        ({"nm": (NMFact(4, 8, 10, 0),)}, 0.1, "unstructured"),
        ({"zero_rows": 192}, 0.5, "rows"),
        ({"zero_cols": 192}, 0.5, "columns"),
    ],
)
def test_the_pattern_is_named_from_the_facts(
    layer_record: Make, fact: dict[str, Any], density: float, expected: str
) -> None:
    record = layer_record("q", density=density, fact=fact, format="dense" if density == 1 else "bitmap+fp32")
    assert report(CompileRecord(layers=[record])).layers[0].pattern == expected


def test_a_model_without_linear_layers_says_what_sparsec_takes() -> None:
    text = str(report(CompileRecord()))
    assert "no linear layer was found" in text
    assert "nn.Linear" in text
    assert "next: sparsec demo" in text


def test_a_failure_is_shown_with_its_reason() -> None:
    text = str(report(CompileRecord(failure="no C++ compiler was found. Install g++ or clang++ [S401]")))
    assert "no C++ compiler was found" in text
    assert "next: sparsec doctor" in text


def test_dense_weights_lead_to_the_command_that_prunes(layer_record: Make) -> None:
    record = CompileRecord(layers=[layer_record("q", density=1.0, format="dense", reason="no zeros")])
    text = str(report(record, spec="minilm"))
    assert "0 of 1 linear layers run sparse" in text
    assert "next: sparsec sparsify minilm --method magnitude" in text
    assert "next: sparsec.sparsify(model, " in str(report(record))


def test_a_layer_that_is_dense_only_at_these_rows_says_at_which_it_pays(layer_record: Make) -> None:
    made = report(CompileRecord(layers=[layer_record("q", pays_to=2)]), batches=(1,))
    assert made.layers[0].decision == "dense"
    assert made.layers[0].reason.startswith("bitmap up to 2 rows, dense above; this call has 16 rows; no break-even")


def test_zeros_at_random_are_not_called_nearly_structured(layer_record: Make) -> None:
    few = {"nm": (NMFact(4, 8, 1000, 4),)}
    chance = layer_record("q", density=0.2, fact=few, near="near 4:8 (99.6 % of groups; 4 break it)")
    real = layer_record("k", density=0.5, fact=few, near="near 4:8 (99.6 % of groups; 4 break it)")
    made = report(CompileRecord(layers=[chance, real]))
    assert [layer.pattern for layer in made.layers] == ["unstructured", "near 4:8"]
    assert ["near" in layer.reason for layer in made.layers] == [False, True]


def test_the_log_of_one_graph_is_a_table(layer_record: Make) -> None:
    text = log_record(encoder(layer_record))
    assert "one compiled graph" in text
    assert "30 of 37 linear layers run sparse" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_only_for_terminals_that_want_it(layer_record: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = report(encoder(layer_record))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made.show(terminal := Terminal())
    assert "\x1b[" in terminal.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue()).split() == str(made).split()
    monkeypatch.setenv("NO_COLOR", "1")
    made.show(plain := Terminal())
    assert plain.getvalue() == str(made)
    monkeypatch.delenv("NO_COLOR")
    made.show(pipe := io.StringIO())
    assert pipe.getvalue() == str(made)


def test_names_with_markup_are_printed_as_they_are(layer_record: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    report(CompileRecord(layers=[layer_record("[red]q[/red]")])).show(terminal := Terminal())
    assert "[red]q[/red]" in terminal.getvalue()


def test_a_paste_into_an_issue_has_the_largest_rows_and_counts_the_rest(layer_record: Make) -> None:
    made = report(CompileRecord(layers=[layer_record(f"block{'abcdefg'[i]}", 64 * (i + 1)) for i in range(7)]))
    text = to_text(made, most=3)
    assert "blockg" in text
    assert "blocka" not in text
    assert re.search(r"and 4 rows more, \d+ % of the time", text)


def test_two_reports_are_compared_layer_by_layer(layer_record: Make) -> None:
    before = report(encoder(layer_record), model="dense encoder")
    changed = encoder(layer_record)
    changed.layers[-1] = layer_record("lm_head", 30522, 384, density=0.2)
    changed.layers.append(layer_record("new"))
    diff = report(changed).to_dict(before)["compare"]
    assert [entry["name"] for entry in diff["changed"]] == ["lm_head"]
    assert diff["changed"][0]["density"] == [1.0, 0.2]
    assert diff["changed"][0]["decision"] == ["dense", "bitmap+fp32"]
    assert (diff["same"], diff["only_now"], diff["only_before"]) == (36, ["new"], [])
    text = report(changed).text(before)
    assert "compared with dense encoder" in text
    assert "lm_head: zero 0 % -> 80 %; dense -> unstructured; runs dense -> bitmap" in text


def test_the_dict_is_json_and_holds_every_layer_with_its_reason(layer_record: Make) -> None:
    body = report(encoder(layer_record)).to_dict()
    again = json.loads(json.dumps(body))
    assert again == body
    assert len(body["layers"]) == 37
    assert all(layer["reason"] for layer in body["layers"])
    assert sorted(i for group in body["groups"] for i in group["layers"]) == list(range(37))
    assert sum(layer["share"] for layer in body["layers"]) == pytest.approx(1.0, abs=1e-3)
    assert {r["count"] for r in body["not_taken"]} == {1, 6}


def test_batches_scale_the_rows_of_x(layer_record: Make) -> None:
    site = layer_record("q").site
    assert rows_at(replace(site, x_shape=(2, 16, 384)), 4, 2) == 64
    assert rows_at(replace(site, x_shape=("s0", 16, 384)), 4, 2) == 64
    assert rows_at(replace(site, x_shape=(384,)), 1, 1) == 1
    assert rows_at(replace(site, x_shape=(2, 8, 8, 27), kind="conv2d"), 2, 2) == 128


def test_a_batch_that_is_no_number_is_refused() -> None:
    import torch

    with pytest.raises(BadOptionValue, match="batch"):
        explain(torch.nn.Linear(4, 4), torch.ones(1, 4), batch=[0])
    with pytest.raises(BadOptionValue, match="batch"):
        explain(torch.nn.Linear(4, 4), torch.ones(1, 4), batch=[])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["h.0.fc", "h.1.fc", "h.2.fc"], "h.0..2.fc"),
        (["h.0.fc", "h.2.fc", "h.3.fc"], "h.0,2,3.fc"),
        (["h.10.fc", "h.9.fc"], "h.9,10.fc"),
        ([f"h.{i}.e.{j}.w" for i in range(2) for j in range(8)], "h.0,1.e.0..7.w"),
        (["h.0.e.1.w", "h.1.e.0.w"], "h.*.e.*.w"),
        (["a.b"], "a.b"),
    ],
)
def test_names_fold_into_ranges(names: list[str], expected: str) -> None:
    assert merge_names(names) == expected


def test_numbers_in_sentences_become_ranges() -> None:
    assert merge_numbers(["2:4, 1 812 break it", "2:4, 998 break it"]) == "2:4, 998 to 1 812 break it"
    assert merge_numbers(["no number"]) == "no number"


def test_numbers_are_written_short_and_never_rounded_to_nothing() -> None:
    assert [duration(s) for s in (4.12e-5, 2.13e-3, 9.96e-4, 1.234, 3e-7)] == [
        "41 us",
        "2.1 ms",
        "996 us",
        "1.2 s",
        "0.3 us",
    ]
    assert [percent(s) for s in (0, 0.001, 0.5, 0.999, 1)] == ["0 %", "<1 %", "50 %", ">99 %", "100 %"]
    assert [count(n) for n in (812, 10_600_000, 1_240_000_000)] == ["812", "10.6 M", "1.24 B"]


@pytest.mark.parametrize(
    ("x", "w", "values", "words"),
    [
        ("int8", "", ValueFact("grid", 0, 8, 0), "int8 activations, dynamic per token; weights on int8 grid, per row"),
        ("int8:min=1e-07", "", ValueFact(), "int8 activations, dynamic per token"),
        ("int8:given", "", ValueFact("grid", 0, 4, 64), "one static scale; weights on int4 grid, in groups of 64"),
        ("", "[1]", ValueFact("ternary", 3), "ternary weights; the graph computes them from stored integers"),
    ],
)
def test_what_is_quantised_is_said_in_the_reason(
    layer_record: Make, x: str, w: str, values: ValueFact, words: str
) -> None:
    record = layer_record("layer", fact={"values": values})
    plain = report(CompileRecord(layers=[layer_record("layer")])).layers[0].reason
    record = replace(record, site=replace(record.site, x=x, w=w))
    made = report(CompileRecord(layers=[record]))
    assert words in made.layers[0].reason
    assert "activations" not in plain
    assert "grid" not in plain
    assert made.to_dict()["layers"][0]["inputs"] == x
