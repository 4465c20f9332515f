"""What a run leaves on disk: taken up by the same run alone, gone when it is done, and data that no model takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsec import sparsify, sparsify_run
from sparsec.cli import run
from sparsec.errors import BadOptionValue, OtherRun, UnreadableCalibration
from sparsec.journal import STATE, Journal
from sparsec.passes.masks.block import LayerState
from sparsec.sparsify import execute, fingerprint, prepare
from sparsec.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::sparsec.errors.SparsecWarning")
TEXT = "the quick brown fox jumps over the lazy dog and reads " * 400
Broken = Callable[[str], None]


def llama() -> nn.Module:
    return tiny_model("tiny:llama").model


def tokens() -> list[torch.Tensor]:
    return [torch.arange(i, i + 24)[None] for i in range(4)]


@pytest.fixture
def breaks_at(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Makes runs stop, as by Ctrl-C, when they come to a layer; "" makes them go on."""
    prune = sparsify_run.prune_state

    def set_place(place: str) -> None:
        def breaks(job: Any, state: LayerState) -> None:
            if state.name == place:
                raise KeyboardInterrupt
            prune(job, state)

        monkeypatch.setattr(sparsify_run, "prune_state", breaks if place else prune)

    return set_place


def broken_run(breaks_at: Broken, folder: Path, model: nn.Module, at: str = "model.layers.1.mlp.up_proj") -> None:
    breaks_at(at)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, "wanda", tokens(), progress=False, resume=folder)
    breaks_at("")


# ------------------------------------------------------------------------------------------------------------- library


def test_one_changed_value_anywhere_changes_the_fingerprint() -> None:
    model = nn.Linear(300, 300)
    before = fingerprint(model)
    for place in (1, 44_321, 89_999):  # none of them at an even distance from the ends
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.weight.view(-1)[place] += 1.0
        assert fingerprint(other) != before
    assert fingerprint(copy.deepcopy(model)) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.complex64])
def test_every_dtype_and_layout_has_a_fingerprint(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("b", torch.ones(4, 6).to(dtype).t())
    model.register_buffer("scalar", torch.ones((), dtype=dtype))
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))


def test_an_edited_model_does_not_take_the_blocks_of_another(breaks_at: Broken, tmp_path: Path) -> None:
    broken_run(breaks_at, tmp_path / "state", llama())
    edited = llama()
    with torch.no_grad():
        edited.get_submodule("model.layers.0.mlp.up_proj").weight[3] *= 100
    with pytest.raises(OtherRun, match="model"):
        sparsify(edited, "wanda", tokens(), progress=False, resume=tmp_path / "state")


def test_the_state_is_gone_when_a_run_is_done_and_another_model_starts_afresh(tmp_path: Path) -> None:
    state, model = tmp_path / "state", llama()
    sparsify(model, "wanda", tokens(), progress=False, resume=state)
    assert not state.exists()
    sparsify(model, "wanda", tokens(), progress=False, resume=state)  # another model by now: no OtherRun


def test_the_state_stays_for_a_caller_that_has_yet_to_save(tmp_path: Path) -> None:
    execute(prepare(llama(), "wanda"), tokens(), progress=False, resume=tmp_path, keep_journal=True)
    assert Journal.held(tmp_path)


def test_a_resumed_run_says_how_many_blocks_it_took(breaks_at: Broken, tmp_path: Path) -> None:
    broken_run(breaks_at, tmp_path, llama())
    report = sparsify(llama(), "wanda", tokens(), progress=False, resume=tmp_path)
    assert f"1 block came from the unfinished run in {str(tmp_path)!r}" in report.notes
    assert tmp_path.is_dir()  # it was there before


def test_a_run_that_fails_before_its_first_block_leaves_nothing(breaks_at: Broken, tmp_path: Path) -> None:
    broken_run(breaks_at, tmp_path / "state", llama(), at="model.layers.0.mlp.up_proj")
    assert not (tmp_path / "state").exists()


def test_a_negative_budget_of_memory_is_refused() -> None:
    with pytest.raises(BadOptionValue, match="max_memory"):
        sparsify(llama(), "wanda", tokens(), progress=False, max_memory=-1)


# ------------------------------------------------------------------------------------------------- data that do not fit


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(a) + b)  # type: ignore[no-any-return]


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


UNFIT: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "another width": (stack, [torch.ones(4, 7)], r"Sequential fails on it \(input \[4, 7\] float32\)"),
    "another dtype": (stack, [{"input": torch.ones(4, 8, dtype=torch.float64)}], "float64"),
    "a missing argument": (Two, [torch.ones(4, 8)], "'b'; pass dicts of forward's arguments, by name"),
    "a loader's pairs": (
        stack,
        DataLoader(TensorDataset(torch.ones(8, 8), torch.zeros(8)), 4),
        "pass the inputs alone",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_data_that_the_model_does_not_take_is_one_sentence_and_changes_nothing(case: str) -> None:
    make, data, words = UNFIT[case]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnreadableCalibration, match=words):
        sparsify(model, "wanda", data, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# -------------------------------------------------------------------------------------------------------- command line


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(["sparsify", "tiny:llama", "--no-eval", "--no-explain", *words])
    return code, *capsys.readouterr()


@pytest.fixture
def interrupted(breaks_at: Broken, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Words of a command that Ctrl-C ended after its first block."""
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--method", "wanda", "--data", str(tmp_path / "text.txt"), "--calibration", "{samples: 4, seqlen: 32}"]
    breaks_at("model.layers.1.mlp.up_proj")
    code, _, err = ask(capsys, *words, "-o", str(tmp_path / "out"))
    breaks_at("")
    assert code == 130
    assert f"what was finished is in {tmp_path / 'out.journal'}; the same command goes on from there" in err
    return words


def test_after_an_interrupt_the_same_command_goes_on(
    interrupted: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = ask(capsys, *interrupted, "-o", str(tmp_path / "out"))
    assert code == 0
    assert "1 block came from the unfinished run" in out
    assert not (tmp_path / "out.journal").exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize("method", ["magnitude", "ria"])
def test_another_recipe_does_not_ignore_an_unfinished_run(
    interrupted: list[str], method: str, dry: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", method, *interrupted[2:], "-o", str(tmp_path / "out")]
    code, _, err = ask(capsys, *words, *dry)
    assert code == 2
    assert "holds the unfinished run of another recipe" in err
    assert Journal.held(tmp_path / "out.journal")
    assert (tmp_path / "out.journal" / STATE).is_dir()


def test_a_dry_run_refuses_an_output_folder_that_the_run_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = ask(capsys, "--method", "magnitude", "-o", str(tmp_path / "out"), "--dry-run")
    assert code == 2
    assert "already holds files that sparsec did not write" in err


def test_calibration_that_is_no_mapping_is_a_sentence_with_data_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ("--method", "wanda", "--calibration", "3", "--data", str(tmp_path / "text.txt"), "--dry-run")
    code, _, err = ask(capsys, *words)
    assert code == 2
    assert "the recipe is not valid" in err
