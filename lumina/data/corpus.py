"""A prepared directory: shards of token ids, where documents and turns begin in them, the tokenizer, and how all came about."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lumina.data.records import CONVERSATION, KINDS, PREFERENCE, TEXT
from lumina.data.shards import TokenStream
from lumina.errors import DataError

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

FORMAT = 2  # of a prepared directory, and part of every cache key: raise it when shards or manifest change meaning
SIDES = ("train", "held_out")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
WORK, ORDER = "work", "order.json"  # in a directory that is being prepared: what is done so far, and in it whose work it is


@dataclass(frozen=True)
class Corpus:
    """A tokenised source, split into training and held-out documents. Preferences: document 2i is chosen, 2i + 1 rejected."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: "Tokenizer"
    train: TokenStream
    held_out: TokenStream

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokenizer and the streams, however they are stored."""
        streams = [self.manifest[side] for side in SIDES]
        parts = [self.tokenizer.fingerprint, *(stream["tokens_sha256"] for stream in streams)]
        parts += [stream["roles"]["tokens_sha256"] for stream in streams if "roles" in stream]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def kind(self) -> str:
        """text, conversation or preference."""
        return str(self.manifest["kind"])

    @property
    def document_end_id(self) -> int:
        return int(self.manifest["document_end_id"])

    def documents(self, side: str) -> np.ndarray:
        """Where each document of `train` or `held_out` begins in its stream, and the end of the last: int64 [n + 1]."""
        return self._index(side, "documents")

    def turns(self, side: str) -> np.ndarray:
        """Where each turn of a conversation begins in the stream: int64 [m], none of texts."""
        return self._index(side, "turns")

    def roles(self, side: str) -> TokenStream | None:
        """Whose words each token is, a code of `lumina.conversation`; None where all is text."""
        part = self.manifest[side].get("roles")
        return TokenStream(self.path, f"{side}_roles", part) if part else None

    def _index(self, side: str, what: str) -> np.ndarray:
        about = self.manifest[side]
        path = self.path / f"{side}-{what}.npy"
        try:
            index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _broken(path, f"cannot be read ({error})") from error
        if index.dtype != np.int64 or index.shape != (about[f"{what}_indexed"],):
            raise _broken(path, f"has {index.dtype} {index.shape}, not {about[f'{what}_indexed']} of int64")
        return index


def is_prepared(path: Path) -> bool:
    """Whether `path` is a prepared directory; others may have a manifest.json too."""
    return (path / MANIFEST).is_file() and any((path / own).exists() for own in (TOKENIZER, "train-documents.npy"))


def is_unfinished(path: Path) -> bool:
    """Whether `path` becomes a prepared directory when the command that began it goes on."""
    return (path / WORK / ORDER).is_file()


def open_corpus(path: Path, tokenizer: "Tokenizer | None" = None) -> Corpus:
    """The corpus in a prepared directory; raises DataError where it is damaged, or made with another tokenizer than given."""
    from lumina.tokenizer_files import load_tokenizer

    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT or manifest["kind"] not in KINDS:
            raise ValueError(f"format {manifest['format']}, kind {manifest['kind']}; this is format {FORMAT}")
        expected = manifest["tokenizer"]["fingerprint"]
        train, held_out = (TokenStream(path, side, manifest[side]) for side in SIDES)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(path / MANIFEST, f"cannot be read as a manifest ({error})") from error
    tokenizer = tokenizer or load_tokenizer(str(path / TOKENIZER))
    if tokenizer.fingerprint != expected:
        raise _broken(path, f"its tokens were made with tokenizer {expected}, not {tokenizer.fingerprint}")
    return Corpus(path, manifest, tokenizer, train, held_out)


class KindsError(DataError):
    """Kinds of documents that cannot be one corpus."""


def kind_of(kinds: Mapping[str, object]) -> str:
    """The kind of a corpus whose documents are of `kinds`, each with where it is seen, or how often.

    Raises KindsError where they cannot be together.
    """
    if PREFERENCE in kinds and len(kinds) > 1:
        said = " and ".join(f"{kind} ({kinds[kind]})" for kind in sorted(kinds))
        works = "prepare them apart, each with an --out of its own"
        raise KindsError(f"holds {said} records: preferences cannot be prepared together with others; {works}")
    return PREFERENCE if PREFERENCE in kinds else CONVERSATION if CONVERSATION in kinds else TEXT


def kinds_told(manifest: dict[str, Any]) -> str:
    """How many documents of each kind a prepared directory has; of earlier ones, its kind."""
    return ", ".join(f"{count:,} {kind}" for kind, count in manifest.get("kinds", {}).items()) or str(manifest["kind"])


def _broken(path: Path, what: str) -> DataError:
    directory = path if path.is_dir() else path.parent
    return DataError(f"{path}: {what}; delete {directory}, and it is made again")
