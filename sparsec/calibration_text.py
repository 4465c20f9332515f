"""Calibration text: files and datasets in, rows out; rows in, segments of token ids out.

A row is a document: a text, or a dict with ``text`` or with ``messages`` (written out by the tokenizer's chat
template). Each is one stream of tokens, cut into segments of equal length; what is left over at its end is not used,
so nothing is padded. Of all segments as many as asked are drawn by the seed.
"""

from __future__ import annotations

import importlib
import json
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec.errors import MissingPackage, NoTokenizer, TextTooShort, UnreadableCalibration
from sparsec.recipe import Calibration

JSONL = (".jsonl", ".ndjson")
TEXT = (".txt", ".text", ".md")
_OTHER = (".json", ".csv", ".tsv", ".parquet", ".arrow")  # readable as text, but not meant so
_BORDERS = (re.compile(r"(?<=\S\n)(?=\S)"), re.compile(r"(?<=\S)(?= \S)"))  # tokens take the space before a word
FIELDS = ("input_ids", "messages", "text")  # of a row, the first that is there is read
_POOL = 8  # segments looked at for each that is drawn; the rest of a large dataset is never tokenized
_CHARACTERS = 6  # read of one text for each token of the pool; English has about four a token
_READ = 1 << 22  # characters of one text that are always read, in one call: seconds
_PIECE = 1 << 16  # characters a call where a text is longer: a tokenizer takes a hundred bytes for each of a call


@dataclass(frozen=True)
class Tokenize:
    """Text to ids. ``prefix`` and ``suffix`` are the special tokens that each segment gets (encoders)."""

    ids: Callable[[str], list[int]]
    chat: Callable[[Any], str]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Drawn:
    """``segments``: lists of ids, all of one length, in the order of the text. ``rest``: those that were not drawn."""

    segments: list[list[int]]
    notes: tuple[str, ...]
    rest: list[list[int]]


def named(said: str | Path, settings: Calibration) -> tuple[str, Iterable[Any]]:
    """What to call it, and the rows, of a file's path or a dataset's name. Raises UnreadableCalibration."""
    path, shown = Path(said).expanduser(), repr(str(said))
    suffix = path.suffix.lower()
    is_path = isinstance(said, Path) or suffix in (*TEXT, *JSONL, *_OTHER) or str(said).startswith(("/", ".", "~"))
    if path.is_dir():
        raise UnreadableCalibration(source=shown, why="it is a folder; give a .txt or .jsonl file")
    if not path.exists():
        if is_path or any(c.isspace() for c in str(said)):
            raise UnreadableCalibration(source=shown, why="there is no such file")
        return f"dataset {shown}", _dataset(str(said), settings)
    if suffix in _OTHER:
        raise UnreadableCalibration(source=shown, why=f"a {suffix} file is neither text nor .jsonl; convert it to one")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableCalibration(source=shown, why=f"it is no UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UnreadableCalibration(source=shown, why=error.strerror or str(error)) from None
    return shown, list(_lines(text, shown)) if suffix in JSONL else [text]


def _lines(text: str, shown: str) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            why = f"line {number} is no JSON ({error})"
            raise UnreadableCalibration(source=shown, why=why) from None
        if not isinstance(row, Mapping):
            why = f"line {number} is {type(row).__name__}, not an object with text or messages"
            raise UnreadableCalibration(source=shown, why=why)
        row_of(row, f"{shown}, line {number}")  # a wrong field is found before anything is tokenized
        yield row


def _dataset(name: str, settings: Calibration) -> Any:
    """``name`` or ``name:configuration`` from the hub, by the package datasets where it is installed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        run = "pip install datasets, or give the path of a .txt or .jsonl file"
        raise MissingPackage(feature=f"the dataset {name!r}", package="datasets", run=run) from None
    place, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(place, configuration or None, split=settings.split)
    except Exception as error:  # datasets and the hub raise a dozen kinds
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UnreadableCalibration(source=f"dataset {name!r}", why=why) from error


def row_of(row: Any, where: str) -> tuple[str, Any]:
    """(field, value) of a row that is a document. Raises UnreadableCalibration."""
    if isinstance(row, str):
        return "text", row
    field = next((f for f in FIELDS if row.get(f) is not None), None)
    if field is None:
        has = ", ".join(map(str, row)) or "nothing"
        raise UnreadableCalibration(source=where, why=f"it has {has}, but not text, messages or input_ids")
    value = row[field]
    if not isinstance(value, str if field == "text" else Sequence) or (field == "messages" and isinstance(value, str)):
        what = {"text": "a text", "messages": "a list of messages"}.get(field, "a list of numbers")
        raise UnreadableCalibration(source=where, why=f"{field} is {type(value).__name__}, not {what}")
    return field, value


def tokenize_with(tokenizer: Any, source: str, model: str, vocabulary: int | None, encoder: bool) -> Tokenize:
    """How to read text. Without a tokenizer only a vocabulary of exactly 256 is known: bytes. Raises NoTokenizer."""
    if tokenizer is None:
        if vocabulary != 256:
            raise NoTokenizer(source=source, model=model)
        note = "the model has no tokenizer and 256 tokens: the text was read as bytes"
        return Tokenize(lambda text: list(text.encode()), _no_chat(source), note=note)

    def ids(text: str, special: bool = False) -> list[int]:
        found = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return [int(i) for i in found]

    def chat(messages: Any) -> str:
        if not getattr(tokenizer, "chat_template", None):
            return _no_chat(source)(messages)
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # whatever the template, a program of the model's authors, raises
            why = f"the tokenizer's chat template does not take its messages ({str(error).splitlines()[0]})"
            raise UnreadableCalibration(source=source, why=why) from error

    prefix, suffix = _specials(ids) if encoder else ((), ())
    return Tokenize(ids, chat, prefix, suffix)


def _no_chat(source: str) -> Callable[[Any], str]:
    def chat(messages: Any) -> str:
        raise UnreadableCalibration(source=source, why="it holds messages, and the tokenizer has no chat template")

    return chat


def _specials(ids: Callable[[str, bool], list[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after a text ([CLS] and [SEP])."""
    bare, whole = ids("a", False), ids("a", True)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def draw(rows: Iterable[Any], how: Tokenize, settings: Calibration, source: str) -> Drawn:
    """At most ``settings.samples`` segments of ``settings.seqlen`` ids. Raises TextTooShort and what rows are wrong.

    Rows with a length are read in an order drawn by the seed, others as they come, until the pool is full.
    """
    chance = random.Random(settings.seed)
    body = max(1, settings.seqlen - len(how.prefix) - len(how.suffix))
    notes = [how.note] if how.note else []
    pool: list[tuple[int, int, list[int]]] = []  # document, place in it, ids
    documents = short = longest = 0
    for document, row in _ordered(rows, chance):
        field, value = row_of(row, f"{source}, row {document + 1}")
        text, note = _window(how.chat(value) if field == "messages" else value, settings, chance)
        notes += [f"{source}: {note}"] if note else []
        ids = _ids(text, how)
        documents += 1
        short += len(ids) < body
        longest = max(longest, len(ids))
        pool += [(document, i, list(ids[i : i + body])) for i in range(0, len(ids) - body + 1, body)]
        if len(pool) >= settings.samples * _POOL:
            break
    if not longest:
        raise UnreadableCalibration(source=source, why="it holds no text")
    if not pool:
        what = "it has" if documents == 1 else f"the longest of its {documents} documents has"
        raise TextTooShort(what=what, tokens=longest + settings.seqlen - body, seqlen=settings.seqlen)
    if short and documents > 1:
        notes.append(
            f"{short} of {documents} documents were left out: they are shorter than a segment of "
            f"{settings.seqlen} tokens"
        )
    keys = sorted((chance.random(), i) for i in range(len(pool)))  # random() is the same in every Python

    def cut(part: Sequence[tuple[float, int]]) -> list[list[int]]:
        return [[*how.prefix, *ids, *how.suffix] for _, _, ids in sorted(pool[i] for _, i in part)]

    return Drawn(cut(keys[: settings.samples]), tuple(notes), cut(keys[settings.samples :]))


def _ordered(rows: Iterable[Any], chance: random.Random) -> Iterator[tuple[int, Any]]:
    if not isinstance(rows, Sized) or not hasattr(rows, "__getitem__"):
        yield from enumerate(rows)
        return
    for _, place in sorted((chance.random(), i) for i in range(len(rows))):
        yield place, rows[place]


def _window(text: str, settings: Calibration, chance: random.Random) -> tuple[str, str]:
    """The text, or of a very long one a part from the beginning of a line on, drawn by the seed; and a note of it."""
    most = max(_READ, settings.samples * settings.seqlen * _POOL * _CHARACTERS)
    if len(text) <= most:
        return text, ""
    start = text.rfind("\n", 0, int(chance.random() * (len(text) - most))) + 1
    return text[start : start + most], f"{most} of {len(text)} characters were read, from character {start} on"


def _ids(text: str, how: Tokenize) -> Sequence[int]:
    """Of a very long text piece by piece, for memory, cut where tokenizers that split at whitespace first (BPE of
    bytes, WordPiece) begin a token anyway; others (SentencePiece) may have another token at the head of a piece."""
    if len(text) <= _READ:
        return how.ids(text)
    found = array("i")
    start = 0
    while start < len(text):
        end = _border(text, start + _PIECE // 2, start + _PIECE)
        found.extend(how.ids(text[start:end]))
        start = end
    return found


def _border(text: str, low: int, high: int) -> int:
    """The last good place to cut between ``low`` and ``high``: a single line end, else a single space."""
    if high >= len(text):
        return len(text)
    for border in _BORDERS:
        if places := [found.start() for found in border.finditer(text, low, high)]:
            return places[-1]
    return high
