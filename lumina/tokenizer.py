"""Text to token ids and back: byte-level BPE trained on the corpus, and other people's tokenizers behind one protocol.

Control tokens (document end, padding, roles, turn end, and what else a template of conversations needs) are the last ids of
every tokenizer. Only code that means them adds them: no text encodes to one, not even text that spells its name.
"""

import base64
import codecs
import functools
import hashlib
import importlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from lumina.errors import ConfigError, DataError

CONTROL_TOKENS = ("<|document_end|>", "<|padding|>", "<|system|>", "<|user|>", "<|assistant|>", "<|turn_end|>")
NAMED_ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")

FORMAT = "lumina-tokenizer-1"
FILE = "lumina_tokenizer.json"  # what `save` writes; a copied model lies beside it under the name in _COPIED_AS
_COPIED_AS = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}

# tiktoken's split patterns: BPE merges within their matches only, and each matches every character of a text.
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
_PATTERNS = {
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

# The regex engine of tiktoken and rustbpe panics where it backtracks over more than a million characters of whitespace.
LONGEST_PIECE = 2**19  # characters given to it at once
UNKNOWN = "\ufffd".encode()  # how the unknown token of other people's tokenizers is shown
MOST_TRAINING_BYTES = 2**31 - 1  # rustbpe counts pairs in 32 bits


class Tokenizer(Protocol):
    """What the rest of Lumina knows of a tokenizer."""

    name: str  # such as bpe-1024 or cl100k_base
    vocab_size: int  # ids are 0 to vocab_size - 1, the control tokens last
    control: dict[str, int]  # control token -> id
    fingerprint: str  # sha256, in hex, of everything that decides the ids

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a control token. A lone surrogate, which no UTF-8 can hold, becomes U+FFFD."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, in threads."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: bytes that are no UTF-8 become U+FFFD, control tokens are shown by their names."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; control tokens have none."""

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: how many bytes of text each id stands for."""

    def save(self, directory: Path) -> None:
        """Write a copy into `directory` that `load_tokenizer` reads with no other file."""


class _Tokenizer(Tokenizer):
    """Everything but encoding, from the bytes of each id.

    `source` is what decides them, as JSON or as the model's own file; `extra` are further control tokens, of which the file has
    those in `own` itself.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        pieces: list[bytes],
        source: dict[str, Any] | bytes,
        extra: Sequence[str] = (),
        own: Mapping[str, int] = MappingProxyType({}),
    ):
        self._control = control_tokens(extra)
        added = [token for token in self._control if token not in own]
        self.vocab_size = len(pieces) + len(added)
        self.name = name or f"{kind}-{self.vocab_size}"
        ids = dict(own) | {token: len(pieces) + i for i, token in enumerate(added)}
        self.control = {token: ids[token] for token in self._control}
        self._kind, self._source = kind, source
        self._pieces = pieces + [b""] * len(added)
        self._shown = {i: token for token, i in self.control.items()}
        self._adds_space = False  # encoding puts a space before each text, and decoding takes it away
        decides = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else source
        self.fingerprint = hashlib.sha256(json.dumps([FORMAT, kind, self._control, decides]).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(run if isinstance(run, str) else run.decode("utf-8", "replace") for run in self._runs(ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(run for run in self._runs(ids) if isinstance(run, bytes))

    def token_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], np.int32)

    def save(self, directory: Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {"format": FORMAT, "kind": self._kind, "name": self.name, "fingerprint": self.fingerprint}
        values["control"] = self._control
        if isinstance(self._source, bytes):
            (directory / _COPIED_AS[self._kind]).write_bytes(self._source)
        else:
            values |= self._source
        (directory / FILE).write_text(json.dumps(values, indent=0) + "\n", encoding="utf-8")

    def _follow(self, library_decode: Callable[[list[int]], str]) -> None:
        """Take a text's first space away if the library, which may have added it, does so."""
        ids = self.encode("a")
        self._adds_space = self.decode(ids).startswith(" ") and not library_decode(ids).startswith(" ")

    def _runs(self, ids: Iterable[int]) -> Iterator[bytes | str]:
        """Bytes of the text between control tokens, and the names of those."""
        run: list[bytes] = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise DataError(f"token id {i}: the tokenizer {self.name} has ids 0 to {self.vocab_size - 1}")
            if i in self._shown:
                yield b"".join(run)
                yield self._shown[i]
                run = []
            else:
                run.append(self._pieces[i].removeprefix(b" ") if self._adds_space and not run else self._pieces[i])
        yield b"".join(run)


# -------------------------------------------------------------------------------------------------- byte-level BPE


class _BPE(_Tokenizer):
    def __init__(self, name: str, pattern: str, ranks: list[bytes], extra: Sequence[str] = ()):
        import tiktoken

        known = set(ranks)
        missing = [byte for byte in range(256) if bytes([byte]) not in known]
        if len(known) < len(ranks) or b"" in known or missing:
            raise ValueError(f"ranks hold a token twice, or an empty one, or lack bytes {missing}")
        # Readable and exact: each byte is the character of its number.
        source = {"pattern": pattern, "ranks": [token.decode("latin-1") for token in ranks]}
        super().__init__("bpe", name, ranks, source, extra)
        mergeable = {token: rank for rank, token in enumerate(ranks)}
        # No special tokens: there is nothing that a text could spell.
        self._encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=mergeable, special_tokens={})

    def encode(self, text: str) -> list[int]:
        text = _valid(text)
        if len(text) <= LONGEST_PIECE:
            return self._encoding.encode_ordinary(text)
        return [i for part in _parts(text) for i in self._encoding.encode_ordinary(part)]


def train_bpe(
    texts: Iterable[str], vocab_size: int, name: str = "", extra: Sequence[str] = (), smaller: bool = False
) -> Tokenizer:
    """Byte-level BPE learned from `texts`; equal pair counts merge the pair of lower ids, so equal texts give equal ids.

    Args:
        texts: the corpus, or a sample of it below 2 GiB; read once, one text in memory at a time is enough.
        vocab_size: 256 bytes, then merges, then the control tokens.
        extra: further control tokens, as in `load_tokenizer`.
        smaller: fewer ids will do where the texts hold fewer pairs.

    Raises:
        ConfigError: `vocab_size` does not hold bytes and control tokens, or one of `extra` is named otherwise than they are.
        DataError: the texts hold fewer pairs to merge than asked for, or are too large.
    """
    import rustbpe

    control = len(control_tokens(extra))
    fixed = 256 + control
    if vocab_size < fixed:
        raise ConfigError(f"model.vocab_size = {vocab_size}: must be at least {fixed}, 256 bytes and {control} control tokens")

    def parts() -> Iterator[str]:
        size = 0
        for text in texts:
            text = _valid(text)
            size += len(text.encode())
            if size > MOST_TRAINING_BYTES:
                raise DataError("the text to train a tokenizer on is over 2 GiB: train it on a sample")
            yield from _parts(text)

    trainer = rustbpe.Tokenizer()
    # Texts wait in a buffer of this many to be split in parallel; the ranks do not depend on it.
    trainer.train_from_iterator(parts(), vocab_size - control, buffer_size=1024, pattern=GPT4_PATTERN)
    ranks = [bytes(token) for token, _ in trainer.get_mergeable_ranks()]
    reached = len(ranks) + control
    if reached < vocab_size and not smaller:
        raise DataError(
            f"model.vocab_size = {vocab_size}: the text has only {reached - fixed} pairs to merge, enough for {reached}; "
            f"set model.vocab_size to at most {reached}, or give more text"
        )
    tokenizer = bpe_of(ranks, extra)
    tokenizer.name = name or tokenizer.name
    return tokenizer


def bpe_of(ranks: list[bytes], extra: Sequence[str] = ()) -> Tokenizer:
    """What `train_bpe` makes, of these tokens in the order of their merges, the 256 bytes first."""
    return _BPE(f"bpe-{len(ranks) + len(control_tokens(extra))}", GPT4_PATTERN, ranks, extra)


def control_tokens(extra: Sequence[str] = ()) -> tuple[str, ...]:
    """The control tokens of a tokenizer with `extra` ones. Raises ConfigError for one that is not named like <|im_start|>."""
    if unlike := [token for token in extra if not re.fullmatch(r"<\|[a-z0-9_]+\|>", token)]:
        raise ConfigError(
            f"control token {unlike[0]!r}: must be lower-case letters, digits and _ in bars, such as <|im_start|>"
        )
    return tuple(dict.fromkeys((*CONTROL_TOKENS, *extra)))


def _valid(text: str) -> str:
    """`text` with surrogate pairs as their characters and lone surrogates as U+FFFD, so that it has UTF-8 bytes."""
    if text.isascii() or not re.search("[\ud800-\udfff]", text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parts(text: str) -> Iterator[str]:
    """`text` in parts of at most LONGEST_PIECE characters.

    They end with a line, between a visible character and a letter, where each pattern cuts in any case. So many characters
    without such a place are cut where they are: that loses nothing, but tiktoken alone may give other ids there.
    """
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = cut = start + LONGEST_PIECE
        while (cut := text.rfind("\n", start + 1, cut)) > 0:
            if text[cut + 1].isalpha() and not text[cut - 1].isspace():
                end = cut + 1
                break
        yield text[start:end]
        start = end
    yield text[start:]


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
        byte_of = _byte_of_character()
        ids = {piece: i for piece, i in json.loads(content).items() if piece != "<|endoftext|>"}
        ranks = {i: bytes(byte_of[c] for c in piece) for piece, i in ids.items()}
    else:
        ranks = {int(rank): base64.b64decode(piece) for piece, rank in map(bytes.split, content.splitlines())}
    return _BPE(name, _PATTERNS[name], [ranks[rank] for rank in range(len(ranks))], extra)


@functools.cache
def _byte_of_character() -> dict[str, int]:
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


class _SentencePiece(_Tokenizer):
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
        return self._model.encode(_valid(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode([_valid(text) for text in texts])


class _HuggingFace(_Tokenizer):
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
        found = self._model.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)
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
        byte_of = _byte_of_character()
        return lambda piece: bytes(byte_of[c] for c in piece) if byte_of.keys() >= set(piece) else piece.encode()
    marks = [step.get("replacement", "▁") for step in steps if step.get("type") == "Metaspace"]
    marks += [step["pattern"].get("String") for step in steps if step.get("type") == "Replace" and step["content"] == " "]
    if marks != ["▁"] or not kinds <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        raise DataError(
            f"{name}: its decoder ({', '.join(sorted(map(str, kinds)))}) gives a token no bytes of its own; "
            "ByteLevel, or Metaspace with or without ByteFallback, would work"
        )
    return lambda piece: _spaced(piece, "ByteFallback" in kinds and bool(re.fullmatch("<0x[0-9A-F]{2}>", piece)))


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
    tokenizer: _Tokenizer
    try:
        kind, name = values["kind"], str(values["name"])
        extra = [*control[len(CONTROL_TOKENS) :], *more]
        if kind == "bpe":
            tokenizer = _BPE(name, values["pattern"], [token.encode("latin-1") for token in values["ranks"]], extra)
        else:
            load = {"sentencepiece": _SentencePiece, "huggingface": _HuggingFace}[kind]
            tokenizer = load(str(path), _read(path.parent / _COPIED_AS[kind]), extra)
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


class StreamDecoder:
    """Text of ids that come one at a time, as soon as whole characters are there; in all, what `decode` gives."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._shown = {i: token for token, i in tokenizer.control.items()}
        self._before: list[int] = []  # the last id, as the first of a text may decode in its own way
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The characters that `id` completes; perhaps none."""
        id = int(id)
        if id in self._shown:
            return self.flush() + self._shown[id]
        known = len(self._tokenizer.decode_bytes(self._before))
        new = self._tokenizer.decode_bytes([*self._before, id])[known:]
        self._before = [id]
        return self._utf8.decode(new)

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the next id begins a new text."""
        self._before = []
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
