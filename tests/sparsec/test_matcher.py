"""The matcher's table: four spellings, what each matches, and which wins."""

from __future__ import annotations

import pytest
from torch import nn

from sparsec.errors import BadRecipe
from sparsec.matcher import BARE, CLASS, EXACT, GLOB, REGEX, match, matching, nearest, unmatched, winner


class Special(nn.Linear):
    """A subclass, as quantisation libraries and adapters have them."""


MODULES: dict[str, type] = {
    "": nn.Module,
    "model": nn.Module,
    "model.layers.0": nn.Module,
    "model.layers.0.self_attn.q_proj": nn.Linear,
    "model.layers.0.self_attn.k_proj": Special,
    "model.layers.0.mlp.down_proj": nn.Linear,
    "model.layers.10.self_attn.q_proj": nn.Linear,
    "model.layers.10.mlp.down_proj": nn.Linear,
    "language_model.lm_head": nn.Linear,
    "lm_head": nn.Linear,
    "norm": nn.LayerNorm,
}
LINEARS = [name for name, cls in MODULES.items() if issubclass(cls, nn.Linear)]


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("Linear", LINEARS),
        ("Special", ["model.layers.0.self_attn.k_proj"]),
        ("linear", []),
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj"]),
        ("lm_head", ["language_model.lm_head", "lm_head"]),
        ("proj", []),
        ("*.q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj"]),
        ("*.layers.[0-9].*", [n for n in LINEARS if ".layers.0." in n]),
        ("*lm_head", ["language_model.lm_head", "lm_head"]),
        ("model.layers.?", ["model.layers.0"]),
        ("model.layers.0.mlp.down_proj", ["model.layers.0.mlp.down_proj"]),
        ("layers.0.mlp.down_proj", []),
        ("self_attn.q_proj", []),
        ("re:lm_head", ["lm_head"]),
        ("re:.*lm_head", ["language_model.lm_head", "lm_head"]),
        (r"re:model\.layers\.(0|31)\..*", [n for n in LINEARS if ".layers.0." in n]),
        (r"re:model\.layers\.1", []),
    ],
)
def test_each_spelling_matches_what_the_table_says(entry: str, names: list[str]) -> None:
    assert matching(entry, MODULES) == names
    assert bool(unmatched([entry], MODULES)) == (not names)


@pytest.mark.parametrize(
    ("entry", "name", "rank"),
    [
        ("lm_head", "lm_head", EXACT),
        ("lm_head", "language_model.lm_head", BARE),
        ("language_model.lm_head", "language_model.lm_head", EXACT),
        ("*lm_head", "lm_head", GLOB),
        ("re:lm_.*", "lm_head", REGEX),
        ("Linear", "lm_head", CLASS),
        ("Conv2d", "lm_head", None),
    ],
)
def test_a_match_knows_how_specific_it_is(entry: str, name: str, rank: int | None) -> None:
    assert match(entry, name, nn.Linear) == rank


def test_the_most_specific_entry_wins_whatever_the_order() -> None:
    name = "model.layers.0.mlp.down_proj"
    ladder = [name, "down_proj", "*.down_proj", r"re:.*\.down_proj", "Linear"]
    for i, entry in enumerate(ladder):
        rest = ladder[i:]
        assert winner(rest, name, nn.Linear) == entry
        assert winner(rest[::-1], name, nn.Linear) == entry
    assert winner(["q_proj"], name, nn.Linear) is None


def test_among_equals_the_last_written_wins() -> None:
    name = "model.layers.0.mlp.down_proj"
    assert winner(["*.down_proj", "*.layers.0.*"], name, nn.Linear) == "*.layers.0.*"
    assert winner(["*.layers.0.*", "*.down_proj"], name, nn.Linear) == "*.down_proj"


def test_nearest_names_other_kinds_of_layers_not_the_same_one_in_each_block() -> None:
    layers = {name: MODULES[name] for name in LINEARS}
    found = nearest("*.q_prj", layers)
    assert found[0] == "model.layers.0.self_attn.q_proj"
    assert len(found) == 3
    assert "model.layers.10.self_attn.q_proj" not in found
    assert nearest("Liner", layers)[0] == "Linear"
    assert nearest("re:.*down_prj", layers)[0] == "model.layers.0.mlp.down_proj"


def test_a_broken_regex_is_one_sentence() -> None:
    with pytest.raises(BadRecipe, match=r"'re:\(' is not a regular expression"):
        matching("re:(", MODULES)
