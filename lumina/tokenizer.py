"""Text to token ids and back: what a tokenizer is, and byte-level BPE, trained on the corpus; `tokenizer_files` reads others.

Control tokens (document end, padding, roles, turn end, and what else a template of conversations needs) are the last ids of
every tokenizer. Only code that means them adds them: no text encodes to one, not even text that spells its name.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from lumina.errors import ConfigError, DataError

CONTROL_TOKENS = ("<|document_end|>", "<|padding|>", "<|system|>", "<|user|>", "<|assistant|>", "<|turn_end|>")

FORMAT = "lumina-tokenizer-1"
FILE = "lumina_tokenizer.json"  # what `save` writes; a copied model lies beside it under the name in COPIED_AS
COPIED_AS = {"sentencepiece": "tokenizer.model", "huggingface": "tokenizer.json"}

# tiktoken's: merges are within its matches only, and it matches every character of a text.
GPT4_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
# The regex engine of tiktoken and rustbpe panics where it backtracks over more than a million characters of whitespace.
LONGEST_PIECE = 2**19  # characters given to it at once
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


class PieceTokenizer(Tokenizer):
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
            (directory / COPIED_AS[self._kind]).write_bytes(self._source)
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


class BPE(PieceTokenizer):
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
        text = valid_text(text)
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

    control, fixed = len(control_tokens(extra)), require_bytes(vocab_size, extra)

    def parts() -> Iterator[str]:
        size = 0
        for text in texts:
            text = valid_text(text)
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


def require_bytes(vocab_size: int, extra: Sequence[str] = ()) -> int:
    """The ids of bytes and control tokens; raises ConfigError where `vocab_size` does not hold them."""
    control = len(control_tokens(extra))
    if vocab_size < 256 + control:
        least = f"must be at least {256 + control}, 256 bytes and {control} control tokens"
        raise ConfigError(f"model.vocab_size = {vocab_size}: {least}")
    return 256 + control


def bpe_of(ranks: list[bytes], extra: Sequence[str] = ()) -> Tokenizer:
    """What `train_bpe` makes, of these tokens in the order of their merges, the 256 bytes first."""
    return BPE(f"bpe-{len(ranks) + len(control_tokens(extra))}", GPT4_PATTERN, ranks, extra)


def control_tokens(extra: Sequence[str] = ()) -> tuple[str, ...]:
    """The control tokens of a tokenizer with `extra` ones. Raises ConfigError for one that is not named like <|im_start|>."""
    if unlike := [token for token in extra if not re.fullmatch(r"<\|[a-z0-9_]+\|>", token)]:
        raise ConfigError(
            f"control token {unlike[0]!r}: must be lower-case letters, digits and _ in bars, such as <|im_start|>"
        )
    return tuple(dict.fromkeys((*CONTROL_TOKENS, *extra)))


def valid_text(text: str) -> str:
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


# -------------------------------------------------------------------------------------------------------- streaming


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
