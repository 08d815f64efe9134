"""Tokenizers from files, behind the one protocol: saved ones, named encodings, SentencePiece and Hugging Face.

Nothing is downloaded, and no pickle is read.
"""

import base64
import functools
import hashlib
import importlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lumina.errors import ConfigError, DataError
from lumina.tokenizer import BPE, CONTROL_TOKENS, COPIED_AS, FILE, FORMAT, GPT4_PATTERN, PieceTokenizer, Tokenizer, valid_text

NAMED_ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")

# tiktoken's split patterns.
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k_base": GPT4_PATTERN,
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
# The ranks' public address, after which tiktoken names its cached copy (nothing here opens it), and their sha256.
# GPT-2's encoder.json has them all; its vocab.bpe repeats them as merges.
_PUBLIC = "https://openaipublic.blob.core.windows.net/"
_FILES = {
    "gpt2": ("gpt-2/encodings/main/encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "cl100k_base": ("encodings/cl100k_base.tiktoken", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
    "o200k_base": ("encodings/o200k_base.tiktoken", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
}
UNKNOWN = "\ufffd".encode()  # how the unknown token of other people's tokenizers is shown


# ---------------------------------------------------------------------------------------------------------- loading


def load_tokenizer(spec: str, extra: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer that `spec` names. Nothing is downloaded, and no pickle is read.

    Args:
        spec: gpt2, cl100k_base or o200k_base, or their public file; a SentencePiece .model; a Hugging Face tokenizer.json; a
            directory that `save` wrote into, or its lumina_tokenizer.json.
        extra: control tokens beside CONTROL_TOKENS, such as <|im_start|>. A saved tokenizer keeps those that it has, and a
            tokenizer.json its own special tokens of that name; the others get new ids at the end, of which a model that was
            trained without them knows nothing.

    Raises:
        ConfigError: one of `extra` is named otherwise than control tokens are.
        DataError: it is missing, damaged, not of these kinds, or needs a package that is not installed.
    """
    spec = str(spec)
    if spec in NAMED_ENCODINGS:
        return _load_named(spec, extra)
    path = Path(spec)
    if path.is_dir():
        path = path / FILE
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; give one, or {', '.join(NAMED_ENCODINGS)}")
    if path.suffix == ".model":
        return _SentencePiece(spec, _read(path), extra)
    if path.suffix != ".json":
        return _load_ranks(path, extra)
    content = _read(path)
    if hashlib.sha256(content).hexdigest() == _FILES["gpt2"][1]:
        return _load_ranks(path, extra)
    try:
        values = json.loads(content)
        saved = isinstance(values, dict) and "format" in values
    except ValueError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not saved:
        return _HuggingFace(spec, content, extra)
    tokenizer = _load_saved(path, values, ())
    return tokenizer if tokenizer.control.keys() >= set(extra) else _load_saved(path, values, extra)


def _load_saved(path: Path, values: dict[str, Any], more: Sequence[str]) -> Tokenizer:
    """The saved tokenizer, which must be as it was saved, or one with `more` control tokens, which cannot be."""
    control = values.get("control")
    if values["format"] != FORMAT or not isinstance(control, list) or control[: len(CONTROL_TOKENS)] != list(CONTROL_TOKENS):
        raise DataError(f"{path}: its format is {values['format']!r}; this version reads {FORMAT!r} and its control tokens")
    tokenizer: PieceTokenizer
    try:
        kind, name = values["kind"], str(values["name"])
        extra = [*control[len(CONTROL_TOKENS) :], *more]
        if kind == "bpe":
            tokenizer = BPE(name, values["pattern"], [token.encode("latin-1") for token in values["ranks"]], extra)
        else:
            load = {"sentencepiece": _SentencePiece, "huggingface": _HuggingFace}[kind]
            tokenizer = load(str(path), _read(path.parent / COPIED_AS[kind]), extra)
            tokenizer.name = name
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise DataError(f"{path}: cannot be used: {error!r}") from error
    if not more and tokenizer.fingerprint != values.get("fingerprint"):
        raise DataError(f"{path}: was changed after it was saved: its content has the fingerprint {tokenizer.fingerprint}")
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------- named encodings


def _load_named(name: str, extra: Sequence[str]) -> Tokenizer:
    address, sha256 = _FILES[name]
    cache_name = hashlib.sha1((_PUBLIC + address).encode(), usedforsecurity=False).hexdigest()  # as tiktoken calls its copy
    public_name = address.rpartition("/")[2]
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    directories = [Path(place) for place in (os.environ.get("TIKTOKEN_CACHE_DIR"), default) if place]
    for file in (directory / file_name for directory in directories for file_name in (cache_name, public_name)):
        if file.is_file():
            return _load_ranks(file, extra)
    raise DataError(
        f"{name}: its file {public_name} (sha256 {sha256}) is not on this machine, and nothing is downloaded; put it at "
        f"{directories[0] / public_name}, or set TIKTOKEN_CACHE_DIR to the directory that has it"
    )


def _load_ranks(file: Path, extra: Sequence[str]) -> Tokenizer:
    """The named encoding that `file` is the public file of, whatever it is called."""
    content = _read(file)
    found = hashlib.sha256(content).hexdigest()
    name = next((name for name, (_, sha256) in _FILES.items() if sha256 == found), "")
    if not name:
        raise DataError(f"{file}: sha256 {found} is not that of {', '.join(NAMED_ENCODINGS)}: damaged, or unknown here")
    if name == "gpt2":
        byte_of = byte_of_character()
        ids = {piece: i for piece, i in json.loads(content).items() if piece != "<|endoftext|>"}
        ranks = {i: bytes(byte_of[c] for c in piece) for piece, i in ids.items()}
    else:
        ranks = {int(rank): base64.b64decode(piece) for piece, rank in map(bytes.split, content.splitlines())}
    return BPE(name, PATTERNS[name], [ranks[rank] for rank in range(len(ranks))], extra)


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: visible Latin-1 is itself, the other bytes count up from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


# ----------------------------------------------------------------------------------- SentencePiece and Hugging Face


def _optional(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"{name}: reading it needs a package that is not installed: pip install {package}") from error


def _spaced(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()


class _SentencePiece(PieceTokenizer):
    """Ids are the library's own. Lossless as far as the model is: identity normalisation and byte fallback lose nothing."""

    def __init__(self, name: str, content: bytes, extra: Sequence[str] = ()):
        sentencepiece = _optional("sentencepiece", name)
        try:
            if not content:  # the library takes no bytes for no model yet
                raise ValueError("empty")
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=content)
            size = model.vocab_size()
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{name}: is not a SentencePiece model") from error

        def piece_bytes(i: int) -> bytes:
            if model.is_unknown(i):
                return UNKNOWN
            if model.is_control(i) or model.is_unused(i):  # the library encodes no text to these
                return b""
            return _spaced(model.id_to_piece(i), model.is_byte(i))

        super().__init__("sentencepiece", "", [piece_bytes(i) for i in range(size)], content, extra)
        self._follow(model.decode)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(valid_text(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode([valid_text(text) for text in texts])


class _HuggingFace(PieceTokenizer):
    """Ids are the library's own, for files whose tokens have bytes of their own: ByteLevel, Metaspace, byte fallback.

    Lossless as far as the file is: a normaliser loses what it replaces, and Metaspace the first space of a text.

    Special tokens of the file are never produced; those that are `extra` keep their ids. The library finds them in ordinary
    text, and a Unigram model does even when they are not declared, so it gets them under unguessable names. Added tokens that
    are not special are text, and stay so.
    """

    def __init__(self, name: str, content: bytes, extra: Sequence[str] = ()):
        tokenizers = _optional("tokenizers", name)
        try:
            spec = json.loads(content)
            specials = _rename_specials(spec)
            self._model = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # what the library raises
            raise DataError(f"{name}: is not a Hugging Face tokenizer.json: {error}") from error
        to_bytes = _bytes_of_piece(name, spec.get("decoder") or {})
        unknown = spec["model"].get("unk_token")
        if spec["model"].get("unk_id") is not None:  # a Unigram model names it by number
            unknown = spec["model"]["vocab"][spec["model"]["unk_id"]][0]
        special_bytes = dict.fromkeys(specials.values(), b"") | {unknown: UNKNOWN}
        added_bytes = {token["content"]: token["content"].encode() for token in spec["added_tokens"]} | special_bytes
        vocab = self._model.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocab.values()) + 1)
        for piece, i in vocab.items():
            pieces[i] = added_bytes[piece] if piece in added_bytes else to_bytes(piece)
        own = {token: vocab[renamed] for token, renamed in specials.items() if token in set(extra) - set(CONTROL_TOKENS)}
        super().__init__("huggingface", "", pieces, content, extra, own)
        self._follow(self._model.decode)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = self._model.encode_batch_fast([valid_text(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in found]


def _rename_specials(spec: dict[str, Any]) -> dict[str, str]:
    """Give special tokens random names in `spec`, in place, and switch off what would change encoding; returns the names."""
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    model = spec["model"]
    if "dropout" in model:
        model["dropout"] = None
    new = {token["content"]: secrets.token_hex(32) for token in spec["added_tokens"] if token["special"]}
    for token in spec["added_tokens"]:
        token["content"] = new.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = new.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in merges if not new.keys() & {a, b, a + b}]
    return new


def _bytes_of_piece(name: str, decoder: dict[str, Any]) -> Callable[[str], bytes]:
    """How a piece of this decoder turns into bytes; refuses decoders that look at more than one piece."""
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        byte_of = byte_of_character()
        return lambda piece: bytes(byte_of[c] for c in piece) if byte_of.keys() >= set(piece) else piece.encode()
    marks = [step.get("replacement", "▁") for step in steps if step.get("type") == "Metaspace"]
    marks += [step["pattern"].get("String") for step in steps if step.get("type") == "Replace" and step["content"] == " "]
    if marks != ["▁"] or not kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise DataError(
            f"{name}: its decoder ({', '.join(sorted(map(str, kinds)))}) gives a token no bytes of its own; "
            "ByteLevel, or Metaspace with or without ByteFallback, would work"
        )
    return lambda piece: _spaced(piece, "ByteFallback" in kinds and bool(re.fullmatch("<0x[0-9A-F]{2}>", piece)))
