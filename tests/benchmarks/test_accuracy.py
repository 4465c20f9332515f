"""The machinery of make accuracy: pairing, verdicts, gates, resuming, refusals.

Which relations hold is the benchmark's own business: a model small enough for a test would rank nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.accuracy import activations_report
from benchmarks.accuracy import run as accuracy_run
from benchmarks.accuracy.__main__ import command, fixtures_of, re_of
from benchmarks.accuracy.activations import LABELS, activation_claims, activation_grid
from benchmarks.accuracy.claims import claims
from benchmarks.accuracy.control import RANDOM, Random, known
from benchmarks.accuracy.fixture import Fixture, Settings, plant, trigram
from benchmarks.accuracy.grid import Row, bits, grid, mask, row
from benchmarks.accuracy.relations import FAILS, HOLDS, MISSING, OPEN, Found, Pair, judge, spread, together
from benchmarks.accuracy.report import broken, gates, markdown, model_report, report, write
from benchmarks.accuracy.run import done, read, run, tasks
from sparsec.errors import BadOptionValue, InputError
from sparsec.passes.masks import METHODS
from sparsec.recipe import Recipe
from sparsec.recipe_steps import role_of
from sparsec.tiny import tiny_model

WINDOWS = 12


@pytest.fixture(autouse=True)
def control() -> Iterator[None]:
    with known():
        yield


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)  # type: ignore[no-untyped-call]


def small(folder: Path, kind: str = "llama", **settings: int) -> Fixture:
    """A random model with text beside it."""
    words = random.Random(0)
    text = ("".join(words.choice("etaoin shrdlu") for _ in range(60)) for _ in range(80))
    (folder / "calib.txt").write_text("\n\n".join(text))
    (folder / "test.txt").write_text("\n\n".join("some other words to be judged by " * 2 for _ in range(30)))
    loaded = replace(tiny_model(f"tiny:{kind}"), tokenizer=byte_tokenizer())
    made = Settings(**{"samples": 4, "seqlen": 32, "windows": 6, **settings})
    return Fixture(loaded, folder / "calib.txt", folder / "test.txt", made)


# The grid


def test_every_method_that_makes_masks_has_a_row() -> None:
    named = {piece for r in grid() for piece in r.pieces}
    assert {name for name in METHODS if role_of(name) not in ("structure", "gate")} <= named


def test_every_gate_method_has_a_row_of_its_own_grid() -> None:
    rows = activation_grid()
    assert {name for name in METHODS if role_of(name) == "gate"} <= {piece for r in rows for piece in r.pieces}
    assert len({(r.name, kind) for r in rows for kind in r.models}) == sum(len(r.models) for r in rows)
    for r in rows:
        assert Recipe.load(dict(r.recipe)).steps
        assert r.name.rpartition(" ")[2] in LABELS
    named = {(kind, r.name) for r in rows for kind in r.models}
    for claim in activation_claims():
        for pair in claim.pairs:
            assert {(claim.model, pair.a), (claim.model, pair.b)} <= named, pair


def test_a_method_registered_later_gets_a_row_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "new", METHODS["variance"])
    assert [r.name for r in grid() if "new" in r.pieces] == ["wanda+new 50%"]


def test_rows_have_unique_names_and_recipes_that_load() -> None:
    rows = grid()
    assert len({r.name for r in rows}) == len(rows)
    for r in rows:
        quantised = any(role_of(piece) == "quantize" for piece in r.pieces)
        assert bits(Recipe.load(dict(r.recipe))) > (2 if quantised else 4)


def test_every_claim_is_about_rows_of_the_grid_and_of_its_kind_of_model() -> None:
    rows = {r.name: r for r in grid()}
    for claim in claims():
        for pair in claim.pairs:
            assert claim.model in rows[pair.a].models, pair
            assert claim.model in rows[pair.b].models, pair


def test_only_rows_that_read_data_or_seeds_differ_between_draws() -> None:
    rows = {r.name: r for r in grid()}
    assert not rows["magnitude 50%"].draws_differ
    assert all(rows[name].draws_differ for name in ("wanda 50%", "random 50%", "magnitude+barber(10%) 70%"))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (mask("wanda", "50%"), 16 / 2 + 1),
        (mask("wanda", "2:4"), 16 / 2 + 3 / 4),
        (mask("wanda", "8:16"), 16 / 2 + 14 / 16),
        (mask("wanda", "2:4", outliers="16:256"), 16 / 2 + 3 / 4 + 24 / 16),
        (mask("wanda", "64:2:8"), 16 / 4 + 7 / 512 + 3 / 8),
    ],
)
def test_bits_count_values_positions_and_outliers(step: dict[str, Any], expected: float) -> None:
    assert bits(Recipe.load(step)) == pytest.approx(expected)


# Verdicts


def costs(gap: float, noise: float = 0.01, draws: int = 3, name: str = "a 50%") -> dict[tuple[str, int], list[float]]:
    """Row ``b 50%`` with windows that differ by far more than the gap, and a row that lies ``gap`` above it."""
    made: dict[tuple[str, int], list[float]] = {}
    for draw in range(draws):
        numbers = random.Random(draw)
        made["b 50%", draw] = [1 + 5 * i for i in range(WINDOWS)]
        made[name, draw] = [x + gap + numbers.gauss(0, noise) for x in made["b 50%", draw]]
    return made


PAIR = Pair("a 50%", "b 50%")


def test_windows_are_paired_so_their_own_spread_does_not_hide_a_small_gap() -> None:
    found = judge(PAIR, costs(-0.1))
    assert (found.verdict, found.draws) == (HOLDS, 3)
    assert found.low < -0.1 < found.high < 0


def test_a_gap_of_the_other_sign_does_not_hold_and_noise_is_not_separable() -> None:
    assert judge(PAIR, costs(0.1)).verdict == FAILS
    assert judge(PAIR, costs(-0.001, noise=0.1)).verdict == OPEN


def test_draws_that_differ_are_not_separable() -> None:
    mixed = {**costs(-0.1), **{key: v for key, v in costs(0.1).items() if key[1] == 2}}
    found = judge(PAIR, mixed)
    assert (found.verdict, found.why) == (OPEN, "draws differ")


def test_a_gap_under_four_spreads_of_wanda_between_draws_is_no_claim() -> None:
    made = costs(-0.1)
    for draw, shift in enumerate((0.0, 0.03, 0.06)):
        made["wanda 50%", draw] = [1.0 + shift] * WINDOWS
    assert spread(made, "wanda 50%") == pytest.approx(0.03)
    found = judge(PAIR, made)
    assert found.verdict == OPEN
    assert "0.0300" in found.why
    made.update({("wanda 50%", draw): [1.0 + 0.01 * draw] * WINDOWS for draw in range(3)})
    assert judge(PAIR, made).verdict == HOLDS


def test_a_row_without_draws_is_paired_with_every_draw() -> None:
    made = costs(-0.1)
    fixed = {key: v for key, v in made.items() if key[0] != "b 50%" or key[1] == 0}
    assert judge(PAIR, fixed).draws == 1
    assert judge(PAIR, fixed, frozenset({"b 50%"})).draws == 3
    assert judge(Pair("b 50%", "a 50%"), fixed, frozenset({"b 50%"})).verdict == FAILS


def test_no_more_and_same_allow_five_percent() -> None:
    base = 1 + 5 * (WINDOWS - 1) / 2  # the mean of b
    for gap, no_more, same in ((0.03, HOLDS, HOLDS), (0.2, FAILS, FAILS), (-0.2, HOLDS, FAILS)):
        made = costs(gap * base)
        assert judge(replace(PAIR, kind="no more"), made).verdict == no_more
        assert judge(replace(PAIR, kind="same"), made).verdict == same


def test_what_was_not_measured_is_said_so() -> None:
    assert judge(Pair("a 50%", "c 50%"), costs(-0.1)).verdict == MISSING


def test_a_relation_fails_with_one_pair_and_holds_with_all() -> None:
    def of(*verdicts: str) -> str:
        return together([Found(PAIR, verdict) for verdict in verdicts])

    assert of(HOLDS, HOLDS) == HOLDS
    assert of(HOLDS, OPEN, FAILS) == FAILS
    assert of(HOLDS, OPEN, MISSING) == OPEN
    assert of(HOLDS, MISSING) == "holds where measured"
    assert of(MISSING, MISSING) == MISSING


def test_gates_pass_fail_or_say_that_nothing_was_measured() -> None:
    facts = {"kind": "causal", "dense": 2.0, "trigram": 2.2}
    made = {("random 50%", 0): [1.5, 1.5], ("wanda 50%", 0): [0.2], ("wanda 50%", 1): [0.4]}
    found = {gate["name"]: gate for gate in gates(facts, made)}
    assert [found[name]["passed"] for name in ("g1", "g2", "g3")] == [False, True, None]
    assert found["g4"]["value"] == pytest.approx(math.sqrt(0.02), abs=1e-5)


def bad_model(**changed: float) -> dict[str, Any]:
    """A report where SparseGPT costs more than Wanda at 50 %."""
    facts = {"kind": "causal", "model": "m", "dense": 2.0, "trigram": 4.0, **changed}
    line = {"achieved": 0.5, "bits": 9.0, "seconds": 1.0, "code": ""}
    rows = [r for r in grid() if r.name in ("wanda 50%", "sparsegpt 50%")]
    wanted: list[Any] = [SimpleNamespace(row=r) for r in rows]
    found = {(r.name, 0): {**line, "draw": 0, "costs": [i + (r.name > "t") * -0.5 for i in range(9)]} for r in rows}
    return {"facts": facts, **model_report(facts, wanted, found)}


def test_a_hard_relation_that_does_not_hold_fails_the_command() -> None:
    assert broken({"models": [bad_model()]}) == ["m: SparseGPT < Wanda does not hold"]


def test_a_model_that_fails_a_gate_ranks_nothing() -> None:
    made = bad_model(trigram=2.1)
    assert {r["verdict"] for r in made["relations"]} == {"not judged: gate g1"}
    assert broken({"models": [made]}) == ["m: gate g1 is not passed"]


# Fixtures


def test_the_dense_model_costs_nothing_and_a_pruned_one_does(tmp_path: Path) -> None:
    for kind in ("llama", "bert"):
        fixture = small(tmp_path, kind)
        assert fixture.costs(fixture.loaded.model) == pytest.approx([0] * 6, abs=1e-6)
        before = {name: p.clone() for name, p in fixture.loaded.model.named_parameters()}
        line = fixture.measure(row("wanda 70%", 1, mask("wanda", "70%")), 0)
        assert max(map(abs, line["costs"])) > 1e-3
        assert line["achieved"] == pytest.approx(0.7, abs=0.01)
        assert all(torch.equal(before[name], p) for name, p in fixture.loaded.model.named_parameters())


def test_costs_are_nats_a_token_above_dense(tmp_path: Path) -> None:
    fixture = small(tmp_path)
    other = tiny_model("tiny:llama", seed=1).model
    ids = torch.tensor(fixture.windows[:1])
    with torch.no_grad():
        ours, dense = (m(input_ids=ids, labels=ids).loss.item() for m in (other, fixture.loaded.model))
    assert fixture.costs(other)[0] == pytest.approx(ours - dense, abs=1e-5)


def test_draws_differ_and_repeat(tmp_path: Path) -> None:
    fixture, again = small(tmp_path), small(tmp_path)
    ids = [[s["input_ids"].tolist() for s in f.draw(d, n)] for f, d, n in
           ((fixture, 0, None), (again, 0, None), (fixture, 1, None), (fixture, 0, 2))]  # fmt: skip
    assert ids[0] == ids[1] != ids[2]
    assert [len(x) for x in ids] == [4, 4, 4, 2]


def test_another_text_or_setting_is_another_fixture(tmp_path: Path) -> None:
    keys = [small(tmp_path).key, small(tmp_path).key, small(tmp_path, samples=5).key]
    assert keys[0] == keys[1] != keys[2]
    changed = small(tmp_path)
    (tmp_path / "test.txt").write_text("something else " * 40)
    assert changed.key != keys[0]


def test_planted_outliers_change_no_output_and_mislead_magnitude_alone(tmp_path: Path) -> None:
    fixture = small(tmp_path)
    planted = tiny_model("tiny:llama").model
    plant(planted, 32.0)
    assert fixture.costs(planted) == pytest.approx([0] * 6, abs=1e-6)

    def pair(method: str) -> list[list[float]]:
        plain = row("plain", 1, mask(method, "50%"))
        return [fixture.measure(r, 0)["costs"] for r in (plain, replace(plain, planted=32.0))]

    assert pair("wanda")[0] == pytest.approx(pair("wanda")[1], abs=1e-5)
    assert pair("magnitude")[0] != pytest.approx(pair("magnitude")[1], abs=1e-3)
    with pytest.raises(InputError, match="layout"):
        plant(tiny_model("tiny:bert").model, 32.0)


def test_the_control_is_random_by_seed_and_unknown_outside() -> None:
    weight = torch.randn(8, 8)
    first, again, other = (Random(seed).score(weight, {}) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with known():
        pass
    assert RANDOM not in METHODS


def test_the_trigram_model_is_a_distribution_and_likes_what_it_read() -> None:
    text = [0, 1, 2, 0, 1, 3, 0, 1, 2, 2, 1, 0]
    for context in ([1], [4], [0, 1], [3, 3]):
        chances = []
        for token in range(5):
            window = [*context, token]
            before = trigram(text, [context], 5) * (len(context) - 1) if len(context) > 1 else 0.0
            chances.append(math.exp(before - trigram(text, [window], 5) * (len(window) - 1)))
        assert sum(chances) == pytest.approx(1)
    assert trigram(text, [[0, 1, 2]], 5) < trigram(text, [[2, 4, 3]], 5)


# Running and resuming


def plan(fixture: Fixture, draws: int = 2) -> list[accuracy_run.Task]:
    rows = [row(f"{m} 50%", 1, mask(m, "50%")) for m in ("magnitude", "wanda")]
    return tasks([fixture], rows, draws)


def test_a_run_goes_on_where_it_stopped_and_repeats_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    wanted = plan(small(tmp_path))
    assert [(t.row.name, t.draw) for t in wanted] == [("magnitude 50%", 0), ("wanda 50%", 0), ("wanda 50%", 1)]
    first = next(run(wanted, path))
    assert first["row"] == "magnitude 50%"
    rest = list(run(wanted, path))
    assert [(line["row"], line["draw"]) for line in rest] == [("wanda 50%", 0), ("wanda 50%", 1)]
    assert list(run(wanted, path)) == []
    assert sum("facts" in line for line in read(path)) == 1


def test_a_line_that_a_kill_cut_short_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    wanted = plan(small(tmp_path))
    list(run(wanted, path))
    whole = path.read_text()
    path.write_text(whole[:-40])
    again = list(run(wanted, path))
    assert [(line["row"], line["draw"]) for line in again] == [("wanda 50%", 1)]
    assert len(done(read(path))) == 3
    last = json.loads(whole.splitlines()[-1])
    assert done(read(path))[wanted[-1].key]["costs"] == last["costs"]


def test_another_recipe_of_the_same_name_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    fixture = small(tmp_path)
    list(run(plan(fixture), path))
    changed = tasks([fixture], [row("wanda 50%", 1, mask("wanda", "60%"))], 1)
    assert len(list(run(changed, path))) == 1


def test_fresh_measures_what_other_sources_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    wanted = plan(small(tmp_path), 1)
    list(run(wanted, path))
    assert list(run(wanted, path, fresh=True)) == []
    monkeypatch.setattr(accuracy_run, "code", lambda: "other")
    assert list(run(wanted, path)) == []
    assert len(list(run(wanted, path, fresh=True))) == 2


def test_no_row_is_started_after_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(run(plan(small(tmp_path)), path, minutes=1e-9)) == []
    assert not path.exists()


def test_a_refused_row_is_reported_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    fixture = small(tmp_path)
    wanted = tasks([fixture], [row("wanda 50%", 1, {"method": "wanda", "targets": ["nowhere"]})], 1)
    assert ["error" in line for line in run(wanted, path)] == [True]
    assert ["error" in line for line in run(wanted, path)] == [True]
    made = report(wanted, read(path), "make accuracy")
    assert "nowhere" in made["models"][0]["refused"]["wanda 50%"]
    assert "### Refused" in markdown(made)


def test_the_first_draw_of_a_late_row_comes_before_the_third_of_an_early_one(tmp_path: Path) -> None:
    order = [(t.row.name, t.draw) for t in tasks([small(tmp_path)], grid(), 3)]
    assert order[0] == ("random 50%", 0)
    assert order.index(("owl+wanda 70%", 0)) < order.index(("wanda 50%", 1))
    assert order.index(("gblm 70%", 0)) < order.index(("wanda 50%", 2))


def test_the_report_holds_tables_verdicts_and_no_path(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    fixture = small(tmp_path)
    rows = [r for r in grid() if r.name in ("random 50%", "magnitude 50%", "wanda 50%", "sparsegpt 50%")]
    wanted = tasks([fixture], rows, 2)
    list(run(wanted, path))
    made = report(wanted, read(path), command(2, 64, 48, 256, "minilm"))
    write(made, tmp_path)
    text = (tmp_path / "accuracy.md").read_text()
    assert json.loads((tmp_path / "accuracy.json").read_text()) == made
    assert 'SPARSEC_EVAL=DIR make accuracy ARGS="--draws 2"' in text
    assert str(tmp_path) not in text + json.dumps(made)
    assert "7 of 7 runs are done" in text
    (wanda,) = [r for r in made["models"][0]["rows"] if r["name"] == "wanda 50%"]
    lines = [line["costs"] for line in read(path) if line.get("row") == "wanda 50%"]
    assert wanda["cost"] == pytest.approx(sum(map(sum, lines)) / 12, abs=1e-5)
    assert wanda["interval"][0] < wanda["cost"] < wanda["interval"][1]
    first = made["models"][0]["relations"][0]
    assert [pair["verdict"] for pair in first["pairs"]].count(MISSING) == 3
    assert first["pairs"][0]["draws"] == 2


# Bad input


def test_wrong_options_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEC_EVAL", raising=False)
    with pytest.raises(BadOptionValue, match="SPARSEC_EVAL"):
        fixtures_of("", "", "", "", Settings())
    with pytest.raises(InputError, match="there is no file"):
        fixtures_of("tiny:llama", str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "", Settings())
    with pytest.raises(BadOptionValue, match="regular expression"):
        re_of("(")


def test_a_text_too_short_for_two_windows_is_refused(tmp_path: Path) -> None:
    fixture = small(tmp_path)
    (tmp_path / "test.txt").write_text("short")
    with pytest.raises(InputError, match="two are needed"):
        _ = fixture.windows


def test_rows_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Row("a", {}, 1).tier = 2  # type: ignore[misc]


def test_the_stored_tables_say_what_the_stored_lines_say() -> None:
    folder = Path(accuracy_run.__file__).parent.parent
    stored = json.loads((folder / "accuracy.json").read_text())
    assert markdown(stored) == (folder / "accuracy.md").read_text()
    lines = [line for line in read(folder / "accuracy.jsonl") if "costs" in line]
    for model in stored["models"]:
        for r in model["rows"]:
            mine = [x for x in lines if (x["model"], x["row"]) == (model["facts"]["model"], r["name"])]
            means = {x["draw"]: sum(x["costs"]) / len(x["costs"]) for x in mine}  # the last of each draw counts
            assert len(means) == r["draws"]
            assert sum(means.values()) / len(means) == pytest.approx(r["cost"], abs=2e-5)
        assert model["relations"]
    assert broken(stored) == []


# Activations


def test_gates_are_measured_on_the_test_windows_and_their_report_has_tables_and_curves(tmp_path: Path) -> None:
    wanted = ("teal 20%", "teal 80%", "cats 50%", "coreinfer(last half) 50%", "teal(last half) 50%")
    rows = [r for r in activation_grid() if r.name in wanted and "causal" in r.models]
    every = tasks([small(tmp_path)], rows, 1)
    lines = tmp_path / "activations.jsonl"
    assert len(list(run(every, lines))) == len(wanted)
    made = activations_report.activation_report(every, read(lines), "make it")
    (told,) = made["models"]
    assert told["measured"] == told["wanted"] == len(wanted)
    shares = {row["name"]: (row["zeros"], row["unread"]) for row in told["rows"]}
    for name, share in (("teal 20%", 0.2), ("teal 80%", 0.8), ("cats 50%", 0.5)):
        assert shares[name][0] == pytest.approx(share, abs=0.1)
    assert shares["cats 50%"][1] < shares["cats 50%"][0]  # attention and gate are read whole
    assert shares["coreinfer(last half) 50%"][0] == 0.5
    (curve,) = (points for method, points in activations_report.curves(told).items() if method == "teal")
    assert [x for x, *_ in curve] == sorted(x for x, *_ in curve)
    assert curve[0][1] == pytest.approx(math.exp(told["facts"]["dense"]))
    activations_report.write(made, tmp_path)
    text = (tmp_path / "activations.md").read_text()
    assert "| `teal(last half) 50%` | last half | last half |" in text
    assert (tmp_path / "activations.png").stat().st_size > 1000


def test_only_the_last_half_is_scored_where_a_row_says_so(tmp_path: Path) -> None:
    made = small(tmp_path)
    assert len(made.late) == len(made.windows)
    assert made.late != made.dense
    assert made.costs(made.loaded.model, late=True) == [0.0] * len(made.windows)
