"""sparsec eval: numbers against independent computations, pairing, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsec import cli
from sparsec.errors import BadOptionValue, InputError
from sparsec.evaluate import Evaluation, Result, evaluate, paired, t_quantile
from sparsec.models import LoadedModel, load_model

TEXT = "\n\n".join(
    f"Paragraph {i}: the quick brown fox jumps over {i * i} lazy dogs, again and again." for i in range(40)
)


@pytest.fixture(scope="module")
def dense() -> LoadedModel:
    return load_model("tiny:llama")


@pytest.fixture(scope="module")
def pruned() -> LoadedModel:
    return load_model("tiny:llama@80")


def rows(found: Evaluation) -> dict[str, Result]:
    return {result.metric: result for result in found.results}


def window_ids(count: int, window: int) -> torch.Tensor:
    return torch.tensor(list(TEXT.encode())[: count * window]).view(count, window)


def test_perplexity_is_the_exponential_of_the_models_own_loss(dense: LoadedModel) -> None:
    found = rows(evaluate(dense, None, TEXT, ["ppl"], limit=5, window=64))["ppl"]
    ids = window_ids(5, 64)
    with torch.no_grad():
        losses = [float(dense.model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    assert found.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert found.n == 5
    assert found.dense is None
    assert found.stderr == pytest.approx(found.value * float(torch.tensor(losses).std()) / 5**0.5, rel=1e-3)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = load_model("tiny:llama")
    with torch.no_grad():
        model.model.lm_head.weight.zero_()  # type: ignore[union-attr,operator]
    assert rows(evaluate(model, None, TEXT, ["ppl"], limit=3))["ppl"].value == pytest.approx(256.0, rel=1e-5)


def test_kl_and_top1_agree_with_torch(dense: LoadedModel, pruned: LoadedModel) -> None:
    found = rows(evaluate(pruned, dense, TEXT, ["kl"], limit=4, window=32))
    ids = window_ids(4, 32)
    with torch.no_grad():
        ours = pruned.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        theirs = dense.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    each = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    assert found["kl"].value == pytest.approx(float(each.mean()), rel=1e-4)
    assert found["top1"].value == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert found["kl"].verdict == found["top1"].verdict == "worse"


@pytest.mark.parametrize("task", ["ppl", "kl"])
def test_the_same_model_cannot_be_separated_from_itself(task: str, dense: LoadedModel) -> None:
    for result in evaluate(dense, dense, TEXT, [task], limit=4).results:
        assert result.delta == pytest.approx(0.0, abs=1e-6)
        assert result.verdict == "not separable"


def test_how_many_windows_run_at_once_changes_nothing(dense: LoadedModel, pruned: LoadedModel) -> None:
    one, all_at_once = (rows(evaluate(pruned, dense, TEXT, limit=5, window=48, batch=b)) for b in (1, 5))
    assert one.keys() == all_at_once.keys() == {"ppl", "kl", "top1"}
    for metric, result in one.items():
        assert result.value == pytest.approx(all_at_once[metric].value, rel=1e-4)
        assert result.interval == pytest.approx(all_at_once[metric].interval, rel=1e-3, abs=1e-6)


def test_pairing_removes_the_difficulty_of_the_windows(dense: LoadedModel) -> None:
    nudged = load_model("tiny:llama@5")
    found = rows(evaluate(nudged, dense, TEXT, ["ppl"], limit=12, window=64))["ppl"]
    assert found.interval is not None
    assert found.stderr is not None
    low, high = found.interval
    assert low <= (found.delta or 0.0) <= high
    unpaired_half = 1.96 * 2**0.5 * found.stderr / found.value
    assert (high - low) / 2 < unpaired_half


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042), (120, 1.980), (10**6, 1.960)],
)
def test_t_quantiles_agree_with_the_printed_tables(freedom: int, expected: float) -> None:
    assert t_quantile(freedom) == pytest.approx(expected, rel=2e-3)


def test_a_paired_interval_by_hand() -> None:
    mean, interval = paired([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert interval == pytest.approx((2.0 - 4.30265 / 3**0.5, 2.0 + 4.30265 / 3**0.5), rel=1e-5)
    assert paired([1.5]) == (1.5, None)


def test_an_encoder_is_most_similar_to_itself() -> None:
    model, other = load_model("tiny:bert"), load_model("tiny:bert@70")
    same = rows(evaluate(model, model, TEXT, limit=6))["cosine"]
    assert same.value == pytest.approx(1.0, abs=1e-6)
    assert same.verdict == "not separable"
    pruned = rows(evaluate(other, model, TEXT, limit=6))["cosine"]
    assert pruned.value < 0.999
    assert pruned.verdict == "worse"
    assert pruned.n == 6


def test_padding_does_not_change_an_embedding() -> None:
    model, other = load_model("tiny:bert"), load_model("tiny:bert@70")
    text = "short\n\n" + "a much longer paragraph " * 8
    together = rows(evaluate(other, model, text, batch=2))["cosine"].value
    apart = rows(evaluate(other, model, text, batch=1))["cosine"].value
    assert together == pytest.approx(apart, abs=1e-6)


def test_a_tokenizer_that_is_there_is_used(dense: LoadedModel) -> None:
    class Letters:
        """Maps a text to every second byte, so that using it changes the count of tokens."""

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            assert options["add_special_tokens"] is False
            return {"input_ids": list(text.encode())[::2]}

    found = evaluate(replace(dense, tokenizer=Letters()), None, "ab" * 64, ["ppl"], window=16)
    assert (found.tokens, found.results[0].n, found.tokenizer) == (64, 4, "Letters")


@pytest.mark.parametrize(
    ("model", "against", "tasks", "options", "why"),
    [
        ("tiny:llama", None, ["arc_easy"], {}, "the tasks are ppl, kl, similarity"),
        ("tiny:llama", None, ["kll"], {}, "did you mean 'kl'"),
        ("tiny:llama", None, ["kl"], {}, "--against DENSE"),
        ("tiny:llama", None, ["similarity"], {}, "for encoder models"),
        ("tiny:bert", None, ["ppl"], {}, "for causal models"),
        ("tiny:bert", None, [], {}, "--against"),
        ("tiny:vit", None, [], {}, "no task fits"),
        ("tiny:llama", None, ["ppl"], {"window": 513}, "takes 2 to 512 tokens"),
        ("tiny:llama", None, ["ppl"], {"limit": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_measured_says_why(
    model: str, against: str | None, tasks: list[str], options: dict[str, int], why: str
) -> None:
    with pytest.raises(BadOptionValue, match=why):
        evaluate(load_model(model), load_model(against) if against else None, TEXT, tasks, **options)  # type: ignore[arg-type]


def test_a_text_shorter_than_a_window_is_refused(dense: LoadedModel) -> None:
    with pytest.raises(InputError, match="does not fill one window of 256 tokens"):
        evaluate(dense, None, "too short")


def test_models_with_other_vocabularies_are_not_compared(dense: LoadedModel, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="other vocabularies"):
        evaluate(load_model(str(tmp_path)), dense, TEXT)


def test_weights_that_are_not_finite_are_an_error_not_a_number() -> None:
    model = load_model("tiny:llama")
    with torch.no_grad():
        next(model.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        evaluate(model, None, TEXT, limit=2)


def test_the_command_prints_lm_evals_columns_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    words = ["eval", "tiny:llama@80", "--against", "tiny:llama", "--text", str(text), "--limit", "8"]
    assert cli.run([*words, "--tasks", "ppl,kl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:8] == ["Tasks", "Version", "n-shot", "Metric", "", "Value", "", "Stderr"]
    assert header[8:] == ["dense", "vs dense", "95 % interval", "verdict"]
    assert len(lines[0]) == len(lines[2]) == len(lines[4])
    assert cli.run([*words, "--tasks", "ppl,kl", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [result["metric"] for result in said["results"]] == ["ppl", "kl", "top1"]
    for result in said["results"]:
        assert result["interval"][0] <= result["delta"] <= result["interval"][1]
        assert result["stderr"] > 0
    assert (said["text"], said["window"], said["tokenizer"]) == ("text.txt", 256, "bytes")


def test_a_text_that_is_not_utf8_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.bin"
    text.write_bytes(b"\xff\xfe\x00")
    assert cli.run(["eval", "tiny:llama", "--text", str(text)]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
