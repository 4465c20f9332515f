"""Calibration data: every spelling gives the same samples, every mistake one sentence, too little a warning."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparsec import calibration_text
from sparsec.calibration import Calibrated, calibrate
from sparsec.calibration_text import named
from sparsec.errors import MissingPackage, NoTokenizer, SparsecWarning, TextTooShort, UnreadableCalibration
from sparsec.models import LoadedModel
from sparsec.recipe import Calibration
from sparsec.tiny import tiny_model

WORDS = [f"w{i}" for i in range(200)]
TEXT = " ".join(WORDS[(i * i + i // 7) % 200] for i in range(4096))
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return tiny_model("tiny:llama")


@pytest.fixture(scope="module")
def bert() -> LoadedModel:
    return tiny_model("tiny:bert")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return made_tokenizer()


def made_tokenizer(**options: Any) -> Any:
    """One token a word; [CLS] before and [SEP] after where special tokens are asked for."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[user]", "[assistant]", "a", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **options)


def asked(**settings: Any) -> Calibration:
    return Calibration(**{"samples": 8, "seqlen": 64, **settings})


def ids(found: Calibrated) -> list[list[int]]:
    return [sample["input_ids"][0].tolist() for sample in found.samples]


def on(model: LoadedModel, data: Any, tokenizer: Any = None, **settings: Any) -> Calibrated:
    """Calibrate without the check of how much there is."""
    return calibrate(data, asked(**settings), model.model, tokenizer, widest=0)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_segments_are_pieces_of_the_text_of_equal_length_each_once(llama: LoadedModel, tokenizer: Any) -> None:
    stream = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = ids(on(llama, [TEXT], tokenizer, samples=10))
    grid = [stream[i : i + 64] for i in range(0, len(stream) - 63, 64)]
    assert len(found) == 10
    assert all(segment in grid for segment in found)
    assert len({tuple(segment) for segment in found}) == 10


def test_asking_for_all_segments_gives_the_text_in_its_order(llama: LoadedModel, tokenizer: Any) -> None:
    found = on(llama, [TEXT], tokenizer, samples=64)
    assert [i for segment in ids(found) for i in segment] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert found.tokens == 4096
    assert found.notes == ()


def test_the_seed_decides_what_is_drawn_and_the_hash_tells_it(llama: LoadedModel, tokenizer: Any) -> None:
    first, again = on(llama, [TEXT], tokenizer), on(llama, [TEXT], tokenizer)
    other = on(llama, [TEXT], tokenizer, seed=1)
    assert ids(first) == ids(again)
    assert first.sha == again.sha
    assert ids(first) != ids(other)
    assert first.sha != other.sha


def test_a_file_a_list_and_a_dataset_of_one_text_give_the_same_samples(
    llama: LoadedModel, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    jsonl(tmp_path / "t.jsonl", {"text": TEXT, "source": "x"}, "")
    spellings: list[Any] = [
        tmp_path / "t.txt",
        str(tmp_path / "t.jsonl"),
        [TEXT],
        Rows([{"text": TEXT}]),
        iter([{"text": TEXT}]),
        {"train": Rows([{"text": TEXT}]), "test": Rows([{"text": "no"}])},
    ]
    found = {on(llama, data, tokenizer, samples=64).sha for data in spellings}
    assert len(found) == 1


class Rows:
    """What a ``datasets.Dataset`` is to us: a length, rows by position, no Sequence."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        self.read += 1
        return self.rows[place]


def test_documents_are_streams_of_their_own(llama: LoadedModel, tokenizer: Any) -> None:
    parts = [" ".join(WORDS[i : i + 70]) for i in (0, 50, 100)]
    found = ids(on(llama, parts, tokenizer, samples=3))
    expected = [tokenizer(part, add_special_tokens=False)["input_ids"][:64] for part in parts]
    assert found == expected


def test_of_a_large_dataset_only_a_part_is_read_from_all_over_it(llama: LoadedModel, tokenizer: Any) -> None:
    rows = Rows([{"text": " ".join([WORDS[i % 200]] * 64)} for i in range(5000)])
    found = on(llama, rows, tokenizer)
    assert len(found.samples) == 8
    assert rows.read < 100
    assert len({segment[0] for segment in ids(found)}) > 4


def test_an_endless_stream_of_texts_is_read_only_until_there_is_enough(llama: LoadedModel, tokenizer: Any) -> None:
    def endless() -> Iterator[dict[str, str]]:
        while True:
            yield {"text": TEXT}

    assert len(on(llama, endless(), tokenizer).samples) == 8


def test_of_a_very_long_text_a_part_is_read_and_said(llama: LoadedModel) -> None:
    text = "".join(f"line {i}\n" for i in range(500_000))
    found = on(llama, [text])
    assert "4194304 of 5888890 characters were read" in found.notes[1]
    assert on(llama, [text]).sha == found.sha


def test_documents_shorter_than_a_segment_are_counted(llama: LoadedModel, tokenizer: Any) -> None:
    found = on(llama, [TEXT, "w1 w2", "w3"], tokenizer)
    assert found.notes == ("2 of 3 documents were left out: they are shorter than a segment of 64 tokens",)


def test_messages_are_written_out_by_the_chat_template(llama: LoadedModel, tmp_path: Path) -> None:
    tokenizer = made_tokenizer(chat_template=CHAT)
    messages = [{"role": "user", "content": " ".join(WORDS[:40])}, {"role": "assistant", "content": "w7 w8"}]
    found = on(llama, jsonl(tmp_path / "c.jsonl", {"messages": messages}), tokenizer, samples=1, seqlen=44)
    written = f"[user] {messages[0]['content']} [assistant] w7 w8"
    assert ids(found) == [tokenizer(written, add_special_tokens=False)["input_ids"]]


def test_segments_of_encoders_have_their_special_tokens_and_a_mask(bert: LoadedModel, tokenizer: Any) -> None:
    found = on(bert, [TEXT], tokenizer, samples=4)
    for sample in found.samples:
        row = sample["input_ids"][0].tolist()
        assert len(row) == 64
        assert (row[0], row[-1], row.count(1), row.count(2)) == (1, 2, 1, 1)
        assert torch.equal(sample["attention_mask"], torch.ones(1, 64, dtype=torch.long))
        bert.model(**sample)
    assert found.tokens == 4 * 64


def test_the_models_context_caps_the_segments_with_a_note(llama: LoadedModel, tokenizer: Any) -> None:
    found = on(llama, [TEXT], tokenizer, samples=2, seqlen=2048)
    assert found.samples[0]["input_ids"].shape == (1, 512)
    assert found.notes == ("seqlen 2048 was cut to 512: the model takes no more tokens",)


def test_an_encoders_tokenizer_may_know_of_a_shorter_context(bert: LoadedModel) -> None:
    found = on(bert, [TEXT], made_tokenizer(model_max_length=128), samples=2, seqlen=2048)
    assert found.samples[0]["input_ids"].shape == (1, 128)


def test_a_vocabulary_of_bytes_needs_no_tokenizer(llama: LoadedModel) -> None:
    found = on(llama, [TEXT], seqlen=16)
    assert all(bytes(row).decode() in TEXT for row in ids(found))
    assert "bytes" in found.notes[0]


def test_token_ids_are_taken_as_they_are(llama: LoadedModel) -> None:
    batches = [torch.randint(0, 256, (2, 48)), torch.randint(0, 256, (48,)).int()]
    found = on(llama, batches)
    assert torch.equal(found.samples[0]["input_ids"], batches[0])
    assert torch.equal(found.samples[1]["input_ids"], batches[1][None].long())
    assert set(found.samples[0]) == {"input_ids"}
    assert found.tokens == 2 * 48 + 48


def test_one_tensor_of_ids_is_one_sample_a_row(llama: LoadedModel) -> None:
    whole = torch.randint(0, 256, (5, 32))
    found = on(llama, whole)
    assert [sample["input_ids"].shape for sample in found.samples] == [(1, 32)] * 5
    assert found.sha == on(llama, list(whole)).sha


def test_rows_of_a_tokenized_dataset_lose_their_padding(llama: LoadedModel) -> None:
    padded = {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}
    as_tensors = {key: torch.tensor(value) for key, value in padded.items()}
    for rows in ([padded], Rows([padded]), [as_tensors], [[5, 6, 7]]):
        assert ids(on(llama, rows)) == [[5, 6, 7]]


def test_keyword_dicts_are_passed_on(llama: LoadedModel) -> None:
    row = {"input_ids": torch.randint(0, 256, (2, 16)), "attention_mask": torch.ones(2, 16).long(), "use_cache": False}
    row["attention_mask"][1, 10:] = 0
    found = on(llama, [row])
    assert set(found.samples[0]) == set(row)
    assert found.samples[0]["use_cache"] is False
    assert found.tokens == 26
    assert on(llama, row).sha == found.sha


def test_floats_go_to_the_first_argument_of_any_module() -> None:
    module = nn.Sequential(nn.Linear(12, 3))
    x = torch.randn(7, 12)
    for data in ([x], x, DataLoader(TensorDataset(x), batch_size=7)):
        found = calibrate(data, asked(), module, widest=0)
        assert list(found.samples[0]) == ["input"]
        assert torch.equal(module(**found.samples[0]), module(x))
        assert found.tokens == 7


def test_images_count_their_positions() -> None:
    module = nn.Conv2d(3, 8, 1)
    assert calibrate([torch.randn(2, 3, 4, 5)], asked(), module, widest=0).tokens == 2 * 4 * 5


def test_more_samples_than_asked_are_left_with_a_note(llama: LoadedModel) -> None:
    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield torch.randint(0, 256, (1, 8))

    found = on(llama, endless(), samples=3)
    assert len(found.samples) == 3
    assert found.notes == ("only the first 3 samples of data were read (calibration.samples)",)
    assert on(llama, [torch.zeros(1, 8).long()] * 3, samples=3).notes == ()


def test_ids_longer_than_the_context_are_cut_with_a_note(llama: LoadedModel) -> None:
    found = on(llama, [torch.randint(0, 256, (1, 600))] * 2)
    assert found.samples[1]["input_ids"].shape == (1, 512)
    assert found.notes == ("samples of data were cut to 512 tokens: the model takes no more",)


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "key", "order"])
def test_the_hash_covers_all_that_the_model_sees(change: str) -> None:
    class Takes(nn.Module):
        def forward(self, a: torch.Tensor, b: Any = None) -> torch.Tensor:
            return a

    first, second = torch.arange(12.0).view(3, 4), torch.zeros(1, 4)
    plain = calibrate([{"a": first}, {"a": second}], asked(), Takes(), widest=0).sha
    data: dict[str, list[dict[str, Any]]] = {
        "value": [{"a": first + torch.eye(3, 4)}, {"a": second}],
        "shape": [{"a": first.view(4, 3)}, {"a": second}],
        "dtype": [{"a": first.double()}, {"a": second}],
        "key": [{"a": first, "b": True}, {"a": second}],
        "order": [{"a": second}, {"a": first}],
    }
    assert calibrate(data[change], asked(), Takes(), widest=0).sha != plain


def test_bfloat16_and_strided_inputs_are_hashed_by_value() -> None:
    module, x = nn.Linear(4, 4), torch.randn(4, 6).bfloat16()
    strided = calibrate([x.t()[:, :4]], asked(), module, widest=0)
    assert strided.sha == calibrate([x.t()[:, :4].contiguous()], asked(), module, widest=0).sha


def test_fewer_segments_than_asked_is_a_warning_with_numbers(llama: LoadedModel, tokenizer: Any) -> None:
    with pytest.warns(SparsecWarning, match=r"gives 64 segments of 64 tokens, and 100 were asked for") as caught:
        found = on(llama, [TEXT], tokenizer, samples=100)
    assert len(caught) == 1
    assert found.notes == (str(caught[0].message),)


def test_fewer_tokens_than_eight_an_input_is_a_warning_with_numbers(llama: LoadedModel, tokenizer: Any) -> None:
    with pytest.warns(
        SparsecWarning, match=r"512 calibration tokens are few for layers of 160 in-features: under 1280"
    ):
        found = calibrate([TEXT], asked(), llama.model, tokenizer)
    assert found.notes[0].startswith("512 calibration tokens")
    assert calibrate([TEXT], asked(samples=20), llama.model, tokenizer).notes == ()


class TestMistakesAreOneSentence:
    @pytest.fixture
    def refused(self, llama: LoadedModel, tokenizer: Any) -> Any:
        def check(data: Any, expected: str, error: type[Exception] = UnreadableCalibration, **settings: Any) -> None:
            with pytest.raises(error) as caught:
                on(llama, data, tokenizer, **settings)
            assert expected in str(caught.value)
            assert "\n" not in str(caught.value)

        return check

    def test_text_shorter_than_a_segment(self, refused: Any) -> None:
        refused(["w1 w2 w3"], "it has 3 tokens, and one segment takes 64", TextTooShort)
        refused(["w1", "w1 w2"], "the longest of its 2 documents has 2 tokens", TextTooShort)

    def test_an_encoders_special_tokens_count(self, bert: LoadedModel, tokenizer: Any) -> None:
        with pytest.raises(TextTooShort, match=r"at most 5\b"):
            on(bert, ["w1 w2 w3"], tokenizer)
        assert on(bert, ["w1 w2 w3"], tokenizer, samples=1, seqlen=5).tokens == 5

    def test_files(self, refused: Any, tmp_path: Path) -> None:
        refused(str(tmp_path / "no.txt"), "there is no such file")
        refused(tmp_path / "no", "there is no such file")
        refused("a text, not a path", "there is no such file")
        refused(tmp_path, "it is a folder")
        (tmp_path / "t.csv").write_text("a,b")
        refused(tmp_path / "t.csv", "a .csv file is neither text nor .jsonl")
        (tmp_path / "b.txt").write_bytes(b"ab\xff\xfe")
        refused(tmp_path / "b.txt", "it is no UTF-8 text (byte 2)")
        (tmp_path / "e.txt").write_text("")
        refused(tmp_path / "e.txt", "it holds no text")
        refused(jsonl(tmp_path / "e.jsonl", "", ""), "it holds nothing")

    def test_lines_of_jsonl_are_named_by_their_number(self, refused: Any, tmp_path: Path) -> None:
        good = {"text": TEXT}
        refused(jsonl(tmp_path / "a.jsonl", good, "", "{no"), "line 3 is no JSON")
        refused(jsonl(tmp_path / "b.jsonl", good, "[1]"), "line 2 is list, not an object")
        refused(
            jsonl(tmp_path / "c.jsonl", good, {"content": "x", "id": 1}), "line 2 cannot be read: it has content, id"
        )
        refused(jsonl(tmp_path / "d.jsonl", {"text": 7}), "line 1 cannot be read: text is int, not a text")
        refused(jsonl(tmp_path / "f.jsonl", {"messages": "hi"}), "messages is str, not a list of messages")

    def test_a_line_separator_inside_a_text_is_no_new_line(self, llama: LoadedModel, tmp_path: Path) -> None:
        row = json.dumps({"text": f"\u2028{TEXT}"}, ensure_ascii=False)
        assert len(on(llama, jsonl(tmp_path / "u.jsonl", row)).samples) == 8

    def test_messages_without_a_chat_template(self, refused: Any) -> None:
        refused([{"messages": [{"role": "user", "content": "w1"}]}], "the tokenizer has no chat template")

    def test_messages_that_the_template_does_not_take(self, llama: LoadedModel) -> None:
        tokenizer = made_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
        with pytest.raises(UnreadableCalibration, match="roles must alternate"):
            on(llama, [{"messages": [{"role": "user", "content": "w1"}]}], tokenizer)

    def test_text_without_a_tokenizer(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
        with pytest.raises(NoTokenizer, match="data is text, and LlamaForCausalLM has no tokenizer"):
            calibrate([TEXT], asked(), model)

    def test_rows_of_the_wrong_kind(self, refused: Any) -> None:
        refused([{"txt": "x"}], "it has txt, but not text, messages or input_ids")
        refused(7, "int is no path, dataset, or iterable")
        refused([], "it holds nothing")
        refused({"validation": Rows([])}, "it has no split 'train'; it has: validation")
        refused([(torch.zeros(2, 2), torch.zeros(2))], "sample 1 cannot be read: it is tuple")
        refused([torch.zeros(2, 4).long(), "text"], "sample 2 cannot be read: it is str")
        refused([{"input_ids": [[1, 2]]}], "not one list of whole numbers")

    def test_values_that_the_model_cannot_take(self, refused: Any) -> None:
        refused([torch.tensor([[1, 256]])], "it holds token 256; the model's are 0 to 255")
        refused([torch.tensor([[1, -1]])], "it holds token -1")
        refused([torch.zeros(1, 0).long()], "it holds no tokens")
        refused([torch.tensor([[0.0, float("nan")]])], "it holds NaN or infinite values")
        refused([{"inputs_embeds": torch.full((1, 2, 64), float("nan"))}], "inputs_embeds holds NaN")

    def test_arguments_that_forward_does_not_have(self) -> None:
        with pytest.raises(
            UnreadableCalibration, match="Linear's forward does not take it: missing a required argument: 'input'"
        ):
            calibrate([{"pixels": torch.zeros(1, 4)}], asked(), nn.Linear(4, 4), widest=0)

    def test_a_dataset_by_name_without_the_package(self, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        refused("wikitext2", "Run: pip install datasets, or give the path of a .txt or .jsonl file.", MissingPackage)


def test_a_datasets_name_and_configuration_and_split_reach_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    package = ModuleType("datasets")

    def load_dataset(*args: Any, **kwargs: Any) -> Rows:
        calls.append((args, kwargs))
        if args[0] == "broken":
            raise ConnectionError("the hub is away.\nMore of it")
        return Rows([{"text": TEXT}])

    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    source, rows = named("some/wikitext:raw-v1", asked(split="test"))
    assert source == "dataset 'some/wikitext:raw-v1'"
    assert isinstance(rows, Rows)
    assert calls == [(("some/wikitext", "raw-v1"), {"split": "test"})]
    with pytest.raises(UnreadableCalibration, match=r"dataset 'broken' cannot be read: the hub is away\. \["):
        named("broken", asked())


# ------------------------------------------------------------------------------------------------------ very long texts


def test_a_very_long_text_is_read_in_pieces_to_the_same_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT.replace("w7 ", "w7\n").replace("w9 ", "w9\n\n")
    how = calibration_text.tokenize_with(tokenizer, "a text", "a model", None, False)
    whole = how.ids(text)
    longest = 0

    def watched(part: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(part))
        return how.ids(part)

    watching = calibration_text.Tokenize(watched, how.chat)
    assert list(calibration_text._ids(text, watching)) == whole
    assert longest == len(text)  # one call for what is not long
    longest = 0
    monkeypatch.setattr(calibration_text, "_READ", 1000)
    monkeypatch.setattr(calibration_text, "_PIECE", 300)
    assert list(calibration_text._ids(text, watching)) == whole
    assert longest <= 300


def test_pieces_of_byte_level_bpe_are_those_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    words = 'It\'s 1 000 times - "so what?", he said;  twice  over.\n\n\nThen\tnothing.\n  indented\nlines\r\n'
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = words * 40
    monkeypatch.setattr(calibration_text, "_READ", 500)
    monkeypatch.setattr(calibration_text, "_PIECE", 128)
    seen: list[str] = []

    def ids(part: str) -> list[int]:
        found = [token for token, _ in split.pre_tokenize_str(part)]
        seen.extend(found)
        return [0] * len(found)

    calibration_text._ids(text, calibration_text.Tokenize(ids, lambda _: ""))
    assert seen == [token for token, _ in split.pre_tokenize_str(text)]


def test_a_text_without_a_good_place_to_cut_is_cut_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "_READ", 100)
    monkeypatch.setattr(calibration_text, "_PIECE", 64)
    how = calibration_text.Tokenize(lambda part: list(part.encode()), lambda _: "")
    assert bytes(list(calibration_text._ids("x" * 1000, how))) == b"x" * 1000
