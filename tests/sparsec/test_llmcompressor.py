"""Recipes of llm-compressor: the same layers and settings, and a refusal by name of what cannot be followed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsec.errors import BadPattern, BadRecipe, UnmatchedTarget, UntranslatedRecipe
from sparsec.llmcompressor import is_llmcompressor, translate
from sparsec.passes.masks import METHODS
from sparsec.prunable import Survey, select_layers, survey
from sparsec.recipe import Recipe
from sparsec.recipe_file import parse_yaml
from sparsec.recipe_steps import Step
from sparsec.tiny import tiny_model

SPARSEGPT = """
sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: 2:4
      targets: [Linear]
      ignore: ["re:.*lm_head"]
"""


def one(modifier: str, **said: Any) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    found, notes = translate({"stage_stage": {"pruning_modifiers": {modifier: said}}})
    return found["steps"], notes


def sparsegpt(**said: Any) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    return one("SparseGPTModifier", **{"sparsity": 0.5, "ignore": ["lm_head"], **said})


def refused(expected: str, modifier: str = "SparseGPTModifier", **said: Any) -> None:
    with pytest.raises(UntranslatedRecipe) as caught:
        one(modifier, **said)
    assert expected in str(caught.value)
    assert modifier in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_sparsegpt_recipe_of_the_readme_is_read() -> None:
    said = parse_yaml(SPARSEGPT)
    assert is_llmcompressor(said)
    found, notes = translate(said)
    assert found == {
        "version": 1,
        "steps": [
            {
                "method": "sparsegpt",
                "pattern": "2:4",
                "ignore": ["re:(?:.*lm_head).*"],
                "targets": ["Linear"],
                "blocksize": 128,
                "damp": 0.01,
            }
        ],
    }
    assert notes == ()
    step = Recipe.load(found).steps[0]
    assert isinstance(step, Step)
    assert (step.sparsity, step.method) == (0.5, "sparsegpt")


@pytest.mark.parametrize(
    "said",
    [
        {"modifiers": {"WandaPruningModifier": {"sparsity": 0.6, "ignore": ["lm_head"]}}},
        {"WandaPruningModifier": {"sparsity": 0.6, "ignore": ["lm_head"]}},
        {"pruning_modifiers": [{"WandaPruningModifier": {"sparsity": 0.6, "ignore": ["lm_head"]}}]},
        {
            "DEFAULT_stage": {
                "DEFAULT_modifiers": {
                    "WandaPruningModifier": {
                        "sparsity": 0.6,
                        "ignore": ["lm_head"],
                        "mask_structure": "0:0",
                        "targets": "Linear",
                        "sparsity_profile": None,
                        "index": 0,
                        "group": "x",
                    }
                }
            }
        },
    ],
)
def test_every_nesting_of_a_modifier_means_the_same(said: dict[str, Any]) -> None:
    assert is_llmcompressor(said)
    assert translate(said)[0]["steps"] == [
        {"method": "wanda", "pattern": "unstructured", "sparsity": 0.6, "ignore": ["lm_head"], "targets": ["Linear"]}
    ]


def test_recipes_of_ours_are_not_taken_for_theirs() -> None:
    ours: list[dict[str, Any]] = [
        {"method": "sparsegpt", "mask_structure": "2:4", "num_calibration_samples": 8},
        {"version": 1, "calibration": {}, "ignore": [], "steps": [{"method": "magnitude"}]},
    ]
    assert not any(map(is_llmcompressor, ours))


@pytest.mark.parametrize(
    ("theirs", "ours"), [("2:4", "2:4"), ("1:4", "3:4"), ("3:4", "1:4"), ("8:16", "8:16"), ("0:0", "unstructured")]
)
def test_mask_structure_counts_the_pruned_weights(theirs: str, ours: str) -> None:
    steps, notes = sparsegpt(mask_structure=theirs)
    assert steps[0]["pattern"] == ours
    n, m = map(int, theirs.split(":"))
    assert any("so the pattern is" in note for note in notes) == (m > 0 and 2 * n != m)


def test_a_pattern_that_yaml_made_a_number_of_is_named() -> None:
    with pytest.raises(BadPattern, match="reads 2:4 as 124"):
        sparsegpt(mask_structure=124)
    with pytest.raises(BadPattern, match="prunes nothing"):
        sparsegpt(mask_structure="0:4")


def test_a_sparsity_that_n_m_overrules_is_said() -> None:
    steps, notes = sparsegpt(mask_structure="2:4", sparsity=0.7)
    assert "sparsity" not in steps[0]
    assert "sparsity 0.7 was without effect there: 2:4 means 0.5" in notes[0]


def test_owl_is_a_step_before_the_mask() -> None:
    steps, notes = one(
        "WandaPruningModifier", sparsity=0.7, sparsity_profile="owl", owl_m=5, owl_lmbda=0.08, ignore=["lm_head"]
    )
    assert steps[0] == {"method": "owl", "sparsity": 0.7, "lam": 0.08, "m": 5, "flat": 1.0}
    assert steps[1]["method"] == "wanda"
    assert "sparsity" not in steps[1]
    assert notes == ()


def test_owl_without_effect_is_left_out_and_said() -> None:
    steps, notes = sparsegpt(mask_structure="2:4", sparsity_profile="owl", owl_m=5, owl_lmbda=0.08)
    assert [step["method"] for step in steps] == ["sparsegpt"]
    assert "OWL was without effect there" in notes[0]


@pytest.mark.parametrize("half", [{"owl_m": 5}, {"sparsity_profile": "owl"}, {"sparsity_profile": "owl", "owl_m": 5}])
def test_half_an_owl_is_refused(half: dict[str, Any]) -> None:
    refused("must be owl and come with owl_m and owl_lmbda", sparsity=0.5, **half)


def test_options_of_sparsegpt_keep_their_values() -> None:
    steps, _ = sparsegpt(block_size=64, dampening_frac=0.1)
    assert (steps[0]["blocksize"], steps[0]["damp"]) == (64, 0.1)
    assert sparsegpt(percdamp=0.0)[0][0]["damp"] == 0.0
    assert sparsegpt(preserve_sparsity_mask=False, quantize=False)[1] == ()
    refused("percdamp", sparsity=0.5, percdamp=0.1, dampening_frac=0.1)


def test_sequential_targets_say_what_is_calibrated_at_a_time() -> None:
    modifier = {"sparsity": 0.5, "ignore": ["lm_head"]}
    blocks, notes = translate({"SparseGPTModifier": {**modifier, "sequential_targets": ["LlamaDecoderLayer"]}})
    layers, _ = translate({"SparseGPTModifier": {**modifier, "sequential_targets": "Linear"}})
    assert "true_sequential" not in blocks
    assert "finds the model's blocks by itself" in notes[0]
    assert Recipe.load(layers).true_sequential


def test_what_changes_no_result_is_a_note() -> None:
    _, notes = sparsegpt(offload_hessians=True, sequential_update=False, start=0.0)
    assert [note.split()[1] for note in notes] == ["offload_hessians", "sequential_update:", "start"]


def test_magnitude_reaches_its_final_sparsity_at_once() -> None:
    said = {"init_sparsity": 0.05, "final_sparsity": 0.8, "start": 0, "end": 10, "update": 1}
    steps, notes = one("MagnitudePruningModifier", **said, targets="__ALL_PRUNABLE__", mask_structure="unstructured")
    assert steps == [{"method": "magnitude", "sparsity": 0.8, "pattern": "unstructured", "ignore": []}]
    assert "it grows from 0.05 to 0.8 (cubic) while training; here 0.8 is reached in one step" in notes[0]
    assert any("start, end, update are times of a training run" in note for note in notes)


def test_magnitude_in_blocks_and_over_all_layers() -> None:
    said = {"init_sparsity": 0.5, "final_sparsity": 0.5, "targets": ["re:.*q_proj.weight"]}
    block = one("MagnitudePruningModifier", **said, mask_structure="block_1,4")[0][0]
    whole = one("MagnitudePruningModifier", **said, apply_globally=True, leave_enabled=True)[0][0]
    assert block["pattern"] == "block:1x4"
    assert whole["scope"] == "global"
    Recipe.load({"steps": [block, whole]})
    refused("is 'channel'; of these only", "MagnitudePruningModifier", **said, mask_structure="channel")


def test_keeping_zeros_is_no_step_and_said() -> None:
    said = parse_yaml(
        SPARSEGPT
        + """
finetuning_stage:
  run_type: train
  finetuning_modifiers:
    ConstantPruningModifier:
      targets: ['re:.*q_proj.weight']
      start: 0
"""
    )
    found, notes = translate(said)
    assert [step["method"] for step in found["steps"]] == ["sparsegpt"]
    assert any("finetuning_stage trains the model" in note for note in notes)
    assert any("ConstantPruningModifier: it keeps zeros" in note for note in notes)
    with pytest.raises(UntranslatedRecipe, match="asks for nothing that prunes"):
        translate({"ConstantPruningModifier": {"targets": "__ALL__", "start": 0}})


def test_settings_of_the_call_become_calibration() -> None:
    found, _ = translate(
        {**parse_yaml(SPARSEGPT), "dataset": "wikitext", "num_calibration_samples": 512, "max_seq_length": 1024}
    )
    calibration = Recipe.load(found).calibration
    assert (calibration.dataset, calibration.samples, calibration.seqlen) == ("wikitext", 512, 1024)


@pytest.mark.parametrize(
    "name", ["GPTQModifier", "QuantizationModifier", "AWQModifier", "SmoothQuantModifier", "AutoRoundModifier"]
)
def test_quantization_comes_later(name: str) -> None:
    said = {**parse_yaml(SPARSEGPT), "quantization_stage": {"quantization_modifiers": {name: {"targets": ["Linear"]}}}}
    with pytest.raises(UntranslatedRecipe, match=f"{name} quantizes, and is not translated; .* rtn"):
        translate(said)


def test_what_has_no_counterpart_is_refused_by_name() -> None:
    refused("has no counterpart in sparsec", "OutputDistillationModifier", targets=["x"])
    refused("did you mean 'SparseGPTModifier'?", "SparseGPTModifer", sparsity=0.5)
    refused("wild of SparseGPTModifier (here 7) has no counterpart", sparsity=0.5, wild=7)
    refused("preserve_sparsity_mask of", sparsity=0.5, preserve_sparsity_mask=True)
    refused("quantize of SparseGPTModifier is not translated", sparsity=0.5, quantize=True)
    refused("is one for each layer", sparsity=[0.5, 0.6])
    refused("is missing, and an unstructured mask needs it")
    refused("is 'half', not a number", sparsity="half")
    refused("LlamaDecoderLayer, a class of blocks", sparsity=0.5, targets=["LlamaDecoderLayer"])
    refused("which is no regular expression", sparsity=0.5, targets=["re:(a"])
    refused("final_sparsity of", "MagnitudePruningModifier", init_sparsity=0.5, targets="__ALL__")
    refused("targets of", "MagnitudePruningModifier", final_sparsity=0.5)
    refused("names weights in a way", sparsity=0.5, targets=["re:.*(weight|bias)"])
    for said, expected in (
        ({"SparseGPTModifier": {"sparsity": 0.5}, "learning_rate": 0.1}, "learning_rate is no stage"),
        ({"args": {"s": 0.5}, "SparseGPTModifier": {"sparsity": "eval(s)"}}, "args is no stage"),
        ({"x_modifiers": ["SparseGPTModifier"]}, "x_modifiers holds no modifiers by name"),
        ({"SparseGPTModifier": 0.5}, "SparseGPTModifier has no settings by name"),
        ({"x_stage": {}}, "asks for nothing that prunes"),
    ):
        with pytest.raises(UntranslatedRecipe, match=expected):
            translate(said)


def test_the_output_head_is_what_the_recipe_says_or_a_note() -> None:
    assert "head is pruned too" in one("SparseGPTModifier", sparsity=0.5)[1][0]
    assert "head stays dense here" in sparsegpt(ignore=["re:.*q_proj"])[1][0]
    for ignore in (["lm_head"], ["re:.*lm_head"], ["re:lm_head$"]):
        assert sparsegpt(ignore=ignore)[1] == ()
    assert one("SparseGPTModifier", sparsity=0.5, targets=["re:.*q_proj"])[1] == ()


# What llm-compressor does with targets and ignore, transcribed: match_layers_params, get_prunable_layers, on_start.


def their_layers(model: nn.Module, targets: Sequence[str], ignore: Sequence[str]) -> set[str]:
    def named(name: str, entries: Sequence[str]) -> bool:
        return any(re.match(e[3:], name) if e.startswith("re:") else name == e for e in entries)

    chosen = []
    for name, module in model.named_modules():
        hit = named(name, targets) or type(module).__name__ in targets
        for parameter, _ in module.named_parameters(recurse=False):
            hit = hit or named(f"{name}.{parameter}", targets)
        if hit:
            chosen.append((name, module))
    found = set()
    for name, module in chosen:
        for inner, layer in module.named_modules():
            full = f"{name}.{inner}".strip(".")
            if isinstance(layer, nn.Linear) and not named(full, ignore):
                found.add(full)
    return found


def our_layers(seen: Survey, targets: Sequence[str], ignore: Sequence[str]) -> set[str]:
    steps, _ = one("WandaPruningModifier", sparsity=0.5, targets=list(targets), ignore=list(ignore))
    step = Recipe.load({"steps": steps}).steps[0]
    assert isinstance(step, Step)
    try:
        return {job.layer.name for job in select_layers(seen, step).jobs}
    except (UnmatchedTarget, BadRecipe):  # nothing is meant, or all of it is ignored
        return set()


LLAMA = tiny_model("tiny:llama").model
SEEN = survey(LLAMA)
HEAD = "re:.*lm_head"  # where it is not in ignore, it stays dense here: a note says so

TARGETS = [
    "Linear",
    "model.layers.0",
    "model.layers.1.self_attn",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.up_proj.weight",
    "re:model.layers.\\d*$",
    "re:.*model.layers.0$",
    "re:model.layers*",
    "re:.*self_attn$",
    "re:.*q_proj",
    "re:.*q_proj$",
    "re:.*q_proj.weight",
    "re:.*q_proj\\.weight$",
    "re:.*_proj[.]weight",
    "re:.*weight",
    "re:.*self_attn.*weight",
    "re:.*(q|k)_proj",
    "re:.*q_proj$|.*mlp$",
    "re:(?i).*Q_PROJ",
    "re:^model\\.layers\\.1\\.",
    "re:.*layers.[0]\\.mlp",
    "re:.*mlp.(gate|up)_proj$",
    "re:.*\\Z",
    "re:.*mlp\\Z",
    "re:model",
    "re:mod",
]
IGNORES = [
    [],
    ["re:.*q_proj"],
    ["re:.*_proj$"],
    ["re:model.layers.0"],
    ["re:.*down_proj$|.*up_proj$"],
    ["re:.*layers.1.*"],
    ["re:(?i).*MLP.*"],
    ["model.layers.0.mlp.up_proj", "re:.*k_proj"],
    ["q_proj"],
    ["mlp"],
]


@pytest.mark.parametrize("ignore", IGNORES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_the_same_layers_are_meant(target: str, ignore: list[str]) -> None:
    ignored = [*ignore, HEAD]
    expected = their_layers(LLAMA, [target], ignored)
    assert our_layers(SEEN, [target], ignored) == expected
    assert expected or ignore, "each target means something by itself"


def test_without_an_ignore_list_the_head_is_pruned_as_there() -> None:
    assert our_layers(SEEN, ["Linear"], []) == their_layers(LLAMA, ["Linear"], [])
    assert "lm_head" in our_layers(SEEN, ["Linear"], [])


PIECES = ["model", r"\.", ".", "layers", r"\d", "0", "1", ".*", "self_attn", "mlp", "(q|k)", "_proj", "up", "$", "[01]"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7), st.booleans())
@example(["model", "$", r"\."], False)
@example(["model", "$", ".*"], False)
@example([".*", "_proj", r"\."], False)
@example([".*", "_proj", ".", "."], False)
@example([".*", "_proj", r"\.", ".*"], False)
@example([".*", "_pro", ".", r"\."], False)
def test_any_regular_expression_means_the_same_layers(pieces: list[str], as_ignore: bool) -> None:
    entry = "re:" + "".join(pieces)
    try:
        re.compile(entry[3:])
    except re.error:  # ".*" after ".*"
        return
    targets, ignore = (["Linear"], [entry, HEAD]) if as_ignore else ([entry], [HEAD])
    assert our_layers(SEEN, targets, ignore) == their_layers(LLAMA, targets, ignore)


def test_the_methods_and_options_it_writes_exist() -> None:
    pattern = {"sparsity": 0.6, "sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.05, "ignore": ["lm_head"]}
    found, _ = translate(
        {
            "SparseGPTModifier": {**pattern, "block_size": 32, "dampening_frac": 0.1},
            "a_stage": {"modifiers": {"WandaPruningModifier": pattern}},
            "b_stage": {"modifiers": {"MagnitudePruningModifier": {"final_sparsity": 0.7, "targets": "__ALL__"}}},
        }
    )
    made = Recipe.load(found)
    assert [step.method for step in made.steps] == ["owl", "sparsegpt", "owl", "wanda", "magnitude"]
    assert {step.method for step in made.steps} <= set(METHODS)
