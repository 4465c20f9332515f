"""Steps become stages: what may stand before and after a mask method, and what each illegal order is told."""

from __future__ import annotations

import pytest

from sparsec.errors import BadRecipe
from sparsec.recipe import Recipe
from sparsec.stages import Stage, stages_of


def stages(*steps: object) -> tuple[Stage, ...]:
    return stages_of(Recipe.load(list(steps)).steps)


def test_a_mask_method_takes_the_allocator_before_it_and_the_posts_after_it() -> None:
    first, second = stages(
        {"method": "owl", "sparsity": 0.7}, "wanda", "variance", "reconstruct", {"method": "magnitude", "sparsity": 0.9}
    )
    assert [piece.method for piece in first.pieces] == ["owl", "wanda", "variance", "reconstruct"]
    assert first.mask is not None
    assert first.mask.sparsity == 0.7
    assert [piece.method for piece in second.pieces] == ["magnitude"]


def test_only_what_reads_inputs_needs_data() -> None:
    assert not stages("magnitude")[0].needs_data
    assert stages("wanda")[0].needs_data
    assert stages("magnitude", "reconstruct")[0].needs_data
    assert not stages("magnitude", "variance")[0].needs_data
    assert stages("magnitude", "variance")[0].walks
    assert stages("equalize", "magnitude")[0].needs_data


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["variance", "wanda"], "variance works on masks: put it after"),
        (["owl"], "owl must be followed by the step of a mask method"),
        (["owl", "besa", "wanda"], "owl and besa both allocate"),
        (["owl", "equalize", "wanda"], "equalize changes what owl has measured; put it first"),
        (["wanda", "owl", "variance"], "variance works on masks"),
        (["owl", {"method": "wanda", "pattern": "64:2:8"}], "owl gives each layer its own sparsity, and 64:2:8"),
        (["time", {"method": "magnitude", "pattern": "2:4"}], "time sets shares that N of 2:4 can only come near"),
        (
            ["besa", {"method": "wanda", "pattern": "2:4"}],
            "each row, which 2:4 cannot hold; say per: layer",
        ),
        (["besa", {"method": "wanda", "pattern": "block:4x4"}], "for each row, which block:4x4 cannot hold"),
        (["owl", {"method": "magnitude", "scope": "global"}], "scope global would overrule it"),
        (
            [{"method": "owl", "sparsity": 0.7}, {"method": "wanda", "sparsity": 0.6}],
            r"owl asks for sparsity 0\.7, wanda for 0\.6",
        ),
        (["besa", {"method": "wanda", "pattern": "block:4x4"}], "which block:4x4 cannot hold; say per: layer"),
        (["owl", "bonsai"], "bonsai removes heads and neurons, so owl has no use before it"),
        (["rtn", "wanda"], "wanda comes after rtn, and .* say allow_quantize_first: true"),
        (["wanda", "rtn", "magnitude"], "magnitude comes after rtn"),
        (["rtn", "bonsai"], "bonsai comes after rtn"),
        (["owl", "rtn"], "owl spreads a sparsity, and rtn has none"),
        (["wanda", "rtn", "variance"], "variance moves the weights that stay, off the grid that rtn has put them on"),
        ([{"method": "owl", "sparsity": 0.7}, {"method": "wanda", "pattern": "2:4"}], "owl asks for sparsity 0.7, and"),
    ],
)
def test_an_order_that_means_nothing_is_refused_in_a_sentence(steps: list[object], said: str) -> None:
    with pytest.raises(BadRecipe, match=said):
        stages(*steps)


def test_masks_after_a_value_method_are_taken_where_the_recipe_says_so() -> None:
    recipe = Recipe.load({"allow_quantize_first": True, "steps": ["rtn", "wanda"]})
    assert [stage.mask.method for stage in stages_of(recipe.steps, recipe.allow_quantize_first) if stage.mask] == [
        "rtn", "wanda",
    ]  # fmt: skip
    assert Recipe.load(recipe.to_dict()).allow_quantize_first


def test_a_method_that_updates_weights_does_not_end_a_recipe_with_a_grid() -> None:
    with pytest.raises(BadRecipe, match="sparsegpt moves the weights that stay, off the grid"):
        stages_of(Recipe.load({"allow_quantize_first": True, "steps": ["rtn", "sparsegpt"]}).steps, True)
    assert (
        len(stages_of(Recipe.load({"allow_quantize_first": True, "steps": ["rtn", "sparsegpt", "rtn"]}).steps, True))
        == 3
    )


def test_a_rewrite_goes_before_the_value_method_that_follows_it() -> None:
    first, second = stages("wanda", "equalize", "rtn")
    assert [piece.method for piece in first.pieces] == ["wanda"]
    assert [piece.method for piece in second.pieces] == ["equalize", "rtn"]


def test_a_resolved_recipe_makes_the_same_stages() -> None:
    made = stages({"method": "owl", "sparsity": 0.7}, {"method": "wanda", "ignore": ["lm_head"]})
    again = stages_of(Recipe.load({"steps": [p.model_dump(mode="json") for p in made[0].pieces]}).steps)
    assert again == made
