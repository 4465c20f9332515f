"""Recipes: every way to write one, every way to get one wrong, and YAML that stays what it looks like."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from sparsec.errors import BadPattern, BadRecipe, MissingPackage, UnknownMethod, UnknownRecipeKey, UntranslatedRecipe
from sparsec.passes.masks import METHODS
from sparsec.recipe import Recipe, schema
from sparsec.recipe_file import parse_yaml, read, to_yaml
from sparsec.recipe_steps import step_class


@dataclasses.dataclass(frozen=True)
class Damped:
    """Stands in for a method with options of its own."""

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ()
    scope: ClassVar[str] = "row"
    norm: ClassVar[str] = "sum"
    source: ClassVar[str] = "none"
    cost: ClassVar[str] = "seconds"
    damp: Annotated[float, Field(gt=0)] = dataclasses.field(
        default=0.01, metadata={"doc": "share of the mean diagonal"}
    )
    block_size: int = 128

    def score(self, weight: Any, stats: Any) -> Any:
        return weight.abs() + self.damp


@pytest.fixture
def damped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "damped", f"{__name__}:Damped")


TRAPS = """
pattern: 2:4
wide: 8:16
many: 16:256
venom: 64:2:8
damp: 1e-5
tune: off
answer: yes
padded: 010
day: 2024-01-01
half: .5
whole: 12
truth: true
nothing:
"""


def test_yaml_keeps_what_it_looks_like() -> None:
    assert parse_yaml(TRAPS) == {
        "pattern": "2:4",
        "wide": "8:16",
        "many": "16:256",
        "venom": "64:2:8",
        "damp": 1e-5,
        "tune": "off",
        "answer": "yes",
        "padded": 10,
        "day": "2024-01-01",
        "half": 0.5,
        "whole": 12,
        "truth": True,
        "nothing": None,
    }
    assert yaml.safe_load(TRAPS)["pattern"] == 124  # why the loader is ours


@pytest.mark.usefixtures("damped")
def test_a_yaml_recipe_with_unquoted_patterns_validates(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "version: 1\nsteps:\n- {method: damped, pattern: 2:4, damp: 1e-5}\n- {method: magnitude, pattern: 8:16}\n"
    )
    recipe = Recipe.load(file)
    assert [step.pattern for step in recipe.steps] == ["2:4", "8:16"]
    assert recipe.steps[0].method_object() == Damped(damp=1e-5)
    assert Recipe.load(str(file)) == recipe


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(max_size=12),
    st.sampled_from(
        ["2:4", "1e-5", "off", "010", "0o17", "0x1F", "~", "null", ".5", "1_000", "=", "<<", "- a", "a: b"]
    ),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(trees)
def test_what_is_written_as_yaml_is_read_back(value: Any) -> None:
    assert parse_yaml(to_yaml(value)) == value


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(["2:4", "off", "1e-5", "010"])))
def test_texts_survive_readers_of_yaml_1_1_too(value: dict[str, str]) -> None:
    assert yaml.safe_load(to_yaml(value)) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "line 2: the key 'a' is there twice"),
        ("a: [1", "line 1"),
        ("a: !!python/object:os.system x", "constructor"),
        ("? [1, 2]\n: 3", "a key must be a text"),
        ("\ta: 1", "line 1"),
    ],
)
def test_broken_yaml_is_one_sentence_with_its_line(text: str, words: str) -> None:
    with pytest.raises(BadRecipe, match=words):
        parse_yaml(text)


ONE = {"method": "magnitude", "sparsity": 0.7}


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
def test_the_same_recipe_in_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    if suffix == ".toml":
        pytest.importorskip("tomllib")
    texts = {
        ".yaml": "version: 1\nmethod: magnitude\nsparsity: 0.7",
        ".json": json.dumps({"version": 1, **ONE}),
        ".toml": 'version = 1\nmethod = "magnitude"\nsparsity = 0.7',
    }
    file = tmp_path / f"r{suffix}"
    file.write_text(texts[suffix])
    assert Recipe.load(file) == Recipe.load(ONE)


def test_toml_without_tomllib_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.toml").write_text("")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(MissingPackage, match="as YAML"):
        read(tmp_path / "r.toml")


@pytest.mark.parametrize(("name", "text"), [("r.json", "{"), ("r.toml", "a ="), ("r.yaml", "a: [")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadRecipe, match=name):
        Recipe.load(tmp_path / name)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"nope\.yaml.*No such file"):
        Recipe.load(str(tmp_path / "nope.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRecipe, match=r"b\.yaml"):
        Recipe.load(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    "said",
    [
        "magnitude",
        {"method": "magnitude"},
        ["magnitude"],
        [{"method": "magnitude", "sparsity": 0.5}],
        {"steps": ["magnitude"]},
        {"version": 1, "seed": 0, "calibration": None, "steps": [{"method": "magnitude", "pattern": "unstructured"}]},
        {"method": "magnitude", "mask_structure": "0:0", "num_calibration_samples": 128, "max_seq_length": 2048},
    ],
)
def test_every_spelling_of_a_recipe_is_the_same_recipe(said: Any) -> None:
    recipe = Recipe.load(said)
    assert recipe.to_dict() == Recipe.load("magnitude").to_dict()
    assert recipe.sha == Recipe.load("magnitude").sha
    assert Recipe.load(recipe) is recipe


def test_a_recipe_survives_its_own_dump() -> None:
    recipe = Recipe.load(
        {
            "version": 1,
            "seed": 3,
            "calibration": {"samples": 7},
            "ignore": ["lm_head"],
            "steps": [
                {
                    **ONE,
                    "scope": "global",
                    "targets": "Linear",
                    "overrides": {"*.q": "skip", "*.v": {"pattern": "1:4"}},
                },
                {"method": "magnitude", "pattern": "2:4", "ignore": ["q_proj"]},
            ],
        }
    )
    assert Recipe.load(parse_yaml(recipe.to_yaml())) == recipe
    assert Recipe.load(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.steps[1].ignore == ("lm_head", "q_proj")


def test_the_hash_is_of_what_is_asked_not_of_who_wrote_it() -> None:
    plain = Recipe.load(ONE)
    assert Recipe.load({**ONE, "made_with": {"torch": "9.9"}}).sha == plain.sha
    assert Recipe.load({**ONE, "seed": 1}).sha != plain.sha
    assert Recipe.load({**ONE, "sparsity": 0.71}).sha != plain.sha


@pytest.mark.parametrize("value", ["skip", None, False])
def test_three_ways_to_skip_a_layer(value: Any) -> None:
    step = Recipe.load({**ONE, "overrides": {"*.q_proj": value}}).steps[0]
    assert step.overridden("*.q_proj") is None


def test_an_override_changes_only_what_it_names() -> None:
    step = Recipe.load({**ONE, "scope": "row", "overrides": {"a": {"sparsity": 0.1}, "b": {"pattern": "1:4"}}}).steps[0]
    a, b = step.overridden("a"), step.overridden("b")
    assert a is not None
    assert b is not None
    assert (a.sparsity, a.pattern, a.scope) == (0.1, "unstructured", "row")
    assert (b.sparsity, b.pattern, b.scope) == (0.75, "1:4", "row")


def test_n_m_brings_its_sparsity_and_unstructured_has_a_default() -> None:
    assert Recipe.load({"method": "magnitude", "pattern": "1:4"}).steps[0].sparsity == 0.75
    assert Recipe.load({"method": "magnitude", "pattern": "2:4", "sparsity": 0.5}).steps[0].sparsity == 0.5
    assert Recipe.load("magnitude").steps[0].sparsity == 0.5


def test_mask_structure_counts_the_pruned_ones_and_says_so() -> None:
    same = Recipe.load({"method": "magnitude", "mask_structure": "2:4"})
    assert (same.steps[0].pattern, same.notes) == ("2:4", ())
    other = Recipe.load({"method": "magnitude", "mask_structure": "1:4"})
    assert other.steps[0].pattern == "3:4"
    assert other.notes == ("mask_structure 1:4 prunes 1 of 4, as in llm-compressor: it was read as pattern 3:4",)


def test_calibration_aliases_of_other_tools_are_read() -> None:
    recipe = Recipe.load({**ONE, "num_calibration_samples": 512, "max_seq_length": 1024, "calibration": {"seed": 2}})
    assert (recipe.calibration.samples, recipe.calibration.seqlen, recipe.calibration.seed) == (512, 1024, 2)


@pytest.mark.usefixtures("damped")
def test_the_options_of_a_method_are_keys_of_its_step() -> None:
    step = Recipe.load({"method": "damped", "damp": 0.1, "overrides": {"x": {"damp": 0.2}}}).steps[0]
    assert step.method_object() == Damped(0.1)
    assert step.scope == "row"
    changed = step.overridden("x")
    assert changed is not None
    assert changed.method_object() == Damped(0.2)
    dumped = Recipe.load({"method": "damped"}).to_dict()["steps"][0]
    assert (dumped["damp"], dumped["block_size"]) == (0.01, 128)
    with pytest.raises(BadRecipe, match="damp of step 1 is -1"):
        Recipe.load({"method": "damped", "damp": -1})
    with pytest.raises(UnknownRecipeKey, match="'dmp'; did you mean 'damp'"):
        Recipe.load({"method": "damped", "dmp": 1})
    with pytest.raises(UnknownRecipeKey, match="method magnitude"):
        Recipe.load({"method": "magnitude", "damp": 1})


@pytest.mark.usefixtures("damped")
def test_the_schema_names_every_key_with_its_type() -> None:
    found = schema("damped")
    assert found["additionalProperties"] is False
    assert found["properties"]["method"]["const"] == "damped"
    assert found["properties"]["damp"] == {
        "default": 0.01,
        "description": "share of the mean diagonal",
        "exclusiveMinimum": 0,
        "title": "Damp",
        "type": "number",
    }
    whole = schema()
    choices = whole["properties"]["steps"]["items"]
    assert choices["discriminator"] == {"propertyName": "method"}
    assert [c["$ref"] for c in choices["oneOf"]] == [f"#/$defs/{name}" for name in METHODS]
    assert set(METHODS) <= set(whole["$defs"])
    assert step_class("magnitude") is step_class("magnitude")


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("magntude", UnknownMethod, "did you mean 'magnitude'"),
        ({"method": "wnda"}, UnknownMethod, "unknown method 'wnda'"),
        ({"method": ["magnitude"]}, UnknownMethod, "magnitude"),
        ({"method": "magnitude", "sparsty": 0.5}, UnknownRecipeKey, "did you mean 'sparsity'"),
        ({"steps": ["magnitude"], "sedd": 1}, UnknownRecipeKey, "did you mean 'seed'"),
        ({"steps": ["magnitude"], "sparsity": 0.5}, UnknownRecipeKey, "a recipe with steps"),
        ({**ONE, "calibration": {"sample": 1}}, UnknownRecipeKey, "did you mean 'samples'"),
        ({**ONE, "overrides": {"*.x": {"sparsty": 1}}}, UnknownRecipeKey, "did you mean 'sparsity'"),
        ({**ONE, "overrides": {"*.x": {"method": "magnitude"}}}, UnknownRecipeKey, "'method'"),
        ({**ONE, "notes": ["x"]}, UnknownRecipeKey, "'notes'"),
        ({"metod": "magnitude"}, BadRecipe, "names no method .it has 'metod'"),
        ({}, BadRecipe, "names no method; known methods are"),
        (
            {"method": "proximal", "pattern": "2:4", "outliers": "16:256"},
            BadRecipe,
            "2:4 only, and outliers 16:256 stay",
        ),
        ({**ONE, "sparsity": 1.0}, BadRecipe, "sparsity of step 1 is 1.0, but must be less than 1"),
        ({**ONE, "sparsity": -0.1}, BadRecipe, "greater than or equal to 0"),
        ({**ONE, "sparsity": float("nan")}, BadRecipe, "finite"),
        ({**ONE, "sparsity": "half"}, BadRecipe, "'half'"),
        ({**ONE, "scope": "blok"}, BadRecipe, "'layer', 'global' or 'row'"),
        ({**ONE, "pattern": "2:4"}, BadRecipe, "pattern 2:4 means sparsity 0.5, but sparsity is 0.7"),
        ({**ONE, "overrides": {"x": {"pattern": "2:4", "sparsity": 0.6}}}, BadRecipe, "pattern 2:4 means sparsity 0.5"),
        ({**ONE, "overrides": {"x": {"sparsity": 2}}}, BadRecipe, r"sparsity of overrides\['x'\] is 2"),
        ({**ONE, "overrides": {"x": "keep"}}, BadRecipe, "'keep'"),
        ({**ONE, "overrides": ["x"]}, BadRecipe, "overrides"),
        ({**ONE, "targets": 5}, BadRecipe, "targets"),
        ({**ONE, "version": 2}, BadRecipe, "version of the recipe is 2, but must be 1"),
        ({**ONE, "seed": "a"}, BadRecipe, "seed"),
        ({**ONE, "preset": "best"}, BadRecipe, "no presets; name a method"),
        ({**ONE, "calibration": [1]}, BadRecipe, "calibration is a dict"),
        ({**ONE, "calibration": {"samples": 0}}, BadRecipe, "samples of calibration is 0"),
        ({**ONE, "calibration": {"samples": 1}, "num_calibration_samples": 2}, BadRecipe, "are the same; give one"),
        ({**ONE, "mask_structure": "2:4", "pattern": "2:4"}, BadRecipe, "are the same; give one"),
        ({"steps": []}, BadRecipe, "at least one step"),
        ({"steps": [3]}, BadRecipe, "step 1 is 3"),
        (5, BadRecipe, "not 5"),
        ({**ONE, "pattern": 124}, BadPattern, "reads 2:4 as 124"),
        ({**ONE, "pattern": "4:2"}, BadPattern, "prunes nothing"),
        ({**ONE, "mask_structure": "x"}, BadPattern, "not a pattern"),
        ({**ONE, "overrides": {"x": {"pattern": 496}}}, BadPattern, "reads 8:16 as 496"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(said: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as raised:
        Recipe.load(said)
    assert "\n" not in str(raised.value)


def test_a_guess_at_what_was_meant_ends_with_its_own_mark() -> None:
    errors = (
        UnknownMethod(name="wnda", nearest="; did you mean 'wanda'?", known="wanda"),
        UntranslatedRecipe(name="WandaModifer", why="has no counterpart in sparsec; did you mean 'WandaModifier'?"),
    )
    for error in errors:
        assert "?." not in str(error)
        assert "'? " in str(error)
