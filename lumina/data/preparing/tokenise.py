"""One unit of a source: read, cleaned, rendered to token ids and written to files of its own, by any process that has the job.

What is written is a function of the unit and the job alone, so that units may be made in any order, anywhere, and made again.
"""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lumina.data.cleaning.duplicates import exact_key, signature
from lumina.data.cleaning.steps import Step, steps
from lumina.data.reading.readers import Unit, plan, read
from lumina.data.recipe import Recipe
from lumina.data.records import KINDS, PREFERENCE, TEXT, Document, Reject
from lumina.data.shards import token_dtype
from lumina.errors import DataError
from lumina.runs.steps import sync_directory, sync_files

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

Redacted = Callable[[Document], str]

DOCUMENT_END = "<|document_end|>"
CHUNK_CHARACTERS = 2**20  # tokenised at once
SAMPLES = 5  # of each kind of reject and each step, kept of a unit
SAMPLE_CHARACTERS = 300

# One record a document that was kept: token ids in all (of a preference, of both sides) and of the rejected side, sizes of its
# text, where it falls in [0, 1) for the held-out split, and its 16 bytes for exact duplicates.
DOCUMENT = np.dtype(
    [
        ("tokens", "<i8"),
        ("rejected", "<i8"),
        ("bytes", "<i8"),
        ("characters", "<i8"),
        ("place", "<f8"),
        ("key", "<u8", (2,)),
        ("kind", "u1"),
    ]
)


@dataclass(frozen=True)
class Job:
    """What decides, with a unit, the files that are made of it."""

    recipe: Recipe
    tokenizer: str  # the directory that it was saved to
    template: str  # of conversations
    work: str  # where each unit has its directory


@dataclass
class Account:
    """What became of the records of a unit, or of several: read = kept + rejected + removed."""

    read: int = 0
    kept: int = 0
    tokens: int = 0
    rejects: dict[str, int] = field(default_factory=dict)  # kind -> records
    changed: dict[str, int] = field(default_factory=dict)  # step -> documents
    removed: dict[str, dict[str, int]] = field(default_factory=dict)  # step -> reason -> documents
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # step -> what it did to the first few
    rejected: list[dict[str, str]] = field(default_factory=list)  # the first few of each kind: name, kind, sample

    def reject(self, item: Reject) -> None:
        self.rejects[item.kind] = self.rejects.get(item.kind, 0) + 1
        if self.rejects[item.kind] <= SAMPLES:
            self.rejected.append({"name": item.name, "kind": item.kind, "sample": item.sample})

    def remove(self, step: str, reason: str, name: str, text: Callable[[], str]) -> None:
        """Count a document that a step removed; of the first few, its name and the beginning of its text are kept."""
        reasons = self.removed.setdefault(step, {})
        reasons[reason] = reasons.get(reason, 0) + 1
        if reasons[reason] <= SAMPLES:
            self._sample(step, f"removed: {reason}", name, text(), "")

    def change(self, step: str, before: Document, after: Document, redacted: Redacted | None) -> None:
        """Count a document that a step changed; of the first few, what is around the first change is kept. What `redacted`
        takes away is not, so that of those no text before it is."""
        self.changed[step] = self.changed.get(step, 0) + 1
        if self.changed[step] <= SAMPLES:
            old, new = before.text, redacted(after) if redacted else after.text
            first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
            begin = max(0, first - SAMPLE_CHARACTERS // 3)
            self._sample(step, "changed", before.name, "" if redacted else old[begin:], new[begin:])

    def _sample(self, step: str, what: str, name: str, before: str, after: str) -> None:
        told = {"what": what, "name": name, "before": before[:SAMPLE_CHARACTERS], "after": after[:SAMPLE_CHARACTERS]}
        self.samples.setdefault(step, []).append({key: value for key, value in told.items() if value})

    def add(self, other: "Account") -> None:
        """Sum; of samples, the first few of each kind stay."""
        self.read, self.kept, self.tokens = self.read + other.read, self.kept + other.kept, self.tokens + other.tokens
        for own, more in ((self.rejects, other.rejects), (self.changed, other.changed)):
            for name, count in more.items():
                own[name] = own.get(name, 0) + count
        for step, reasons in other.removed.items():
            for reason, count in reasons.items():
                own = self.removed.setdefault(step, {})
                own[reason] = own.get(reason, 0) + count
        for step, samples in other.samples.items():
            own_samples = self.samples.setdefault(step, [])
            for sample in samples:
                if sum(each["what"] == sample["what"] for each in own_samples) < SAMPLES:
                    own_samples.append(sample)
        for sample in other.rejected:
            if sum(each["kind"] == sample["kind"] for each in self.rejected) < SAMPLES:
                self.rejected.append(sample)


def directory_of(unit: Unit, job: Job) -> Path:
    """Where a unit's files appear, all at once."""
    return Path(job.work) / f"unit-{unit.number:06d}"


def tokenise(unit: Unit, job: Job, threads: bool = False) -> Account:
    """Make the files of a unit, or find them made: documents.bin, tokens.bin, names.jsonl, account.json and, where there are
    any, roles.bin, turns.bin and signatures.bin. `threads` encodes in several.

    Raises DataError, in words for the user, where the tokenizer lets text become a control token.
    """
    directory = directory_of(unit, job)
    if directory.is_dir():
        return read_account(directory)
    making = directory.with_name(f"{directory.name}.part-{uuid.uuid4().hex}")  # what a killed process left is another's
    making.mkdir(parents=True)
    tokenizer, account = _tokenizer(job.tokenizer), Account()
    with _Files(making, tokenizer, job) as files:
        for chunk in _chunks(cleaned(unit, job.recipe, account)):
            files.write(chunk, threads)
        account.kept, account.tokens = files.documents, files.tokens
    (making / "account.json").write_text(json.dumps(account.__dict__), encoding="utf-8")
    sync_files(making)
    try:
        making.rename(directory)
    except OSError:  # another process, which is not known to have died, was first with the same
        if not directory.is_dir():
            raise
        shutil.rmtree(making)
    sync_directory(directory.parent)
    return account


def cleaned(unit: Unit, recipe: Recipe, account: Account, most: int | None = None) -> Iterator[Document]:
    """The documents of a unit, or of its first `most` records, that pass the steps of `recipe`; all else goes to `account`."""
    for item in islice(read(unit, recipe), most):
        account.read += 1
        if isinstance(item, Reject):  # of bytes that nobody can read, nobody can redact a sample
            account.reject(item._replace(sample="") if "redact" in recipe.named_steps else item)
            continue
        document = after_steps(item, recipe, account)
        if document is not None:
            yield document


def after_steps(document: Document, recipe: Recipe, account: Account) -> Document | None:
    """What the steps that look at one document leave of it; what they did goes to `account`."""
    redacted = _redacted(recipe)
    for step in _steps(recipe):
        before, result = document, step(document)
        if isinstance(result, Document) and result is not before:
            account.change(step.name, before, result, redacted)
            result = _why_useless(result) or result
        if isinstance(result, str):
            account.remove(step.name, result, before.name, partial(redacted or attrgetter("text"), before))
            return None
        document = result
    return document


def _why_useless(document: Document) -> str:
    """Why nothing can be learned from a document that a step changed, or ""."""
    if not (document.text.strip() and all(turn.text.strip() for turn in (*document.turns, *document.rejected))):
        return "nothing left"
    return "chosen and rejected are equal" if document.rejected == document.turns and document.rejected else ""


def _redacted(recipe: Recipe) -> Redacted | None:
    """What gives the text of a document as the steps up to redact leave it; None where that step is not taken."""
    if "redact" not in recipe.named_steps:
        return None
    names = [step.name for step in _steps(recipe)]
    changing = _steps(recipe)[: names.index("redact") + 1]

    def redacted(document: Document) -> str:
        for step in changing:
            result = step(document)
            document = result if isinstance(result, Document) else document
        return document.text

    return redacted


def read_account(directory: Path) -> Account:
    """What a unit's files say of it."""
    return Account(**json.loads((directory / "account.json").read_text(encoding="utf-8")))


@lru_cache(1)
def _steps(recipe: Recipe) -> list[Step]:
    return steps(recipe, against=_texts_of(recipe))


def _texts_of(recipe: Recipe) -> Iterator[str]:
    """The evaluation texts that nothing may repeat."""
    specs = [spec.strip() for spec in recipe.against.split(",") if spec.strip()]
    if "decontaminate" in recipe.named_steps and specs:
        own = Recipe(steps="none")
        for unit in plan(specs, own).units:
            yield from (item.text for item in read(unit, own) if isinstance(item, Document))


@lru_cache(1)
def _tokenizer(directory: str) -> "Tokenizer":
    from lumina.tokenizer_files import load_tokenizer

    return load_tokenizer(directory)


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class _Files:
    """The growing files of a unit; what is in memory is a chunk."""

    def __init__(self, directory: Path, tokenizer: "Tokenizer", job: Job):
        self.tokenizer, self.job, self.directory = tokenizer, job, directory
        self.dtype, self.end = token_dtype(tokenizer.vocab_size), tokenizer.control[DOCUMENT_END]
        self.near = "near" in job.recipe.named_steps
        self.documents, self.tokens = 0, 0
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> "_Files":
        for name in ("documents.bin", "tokens.bin", "names.jsonl"):
            self._file(name)
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def _file(self, name: str) -> BinaryIO:
        if name not in self._open:
            self._open[name] = open(self.directory / name, "wb")  # noqa: SIM115 closed together
        return self._open[name]

    def write(self, chunk: list[Document], threads: bool) -> None:
        """Append documents."""
        texts = [document.plain for document in chunk if document.kind == TEXT]
        encoded = iter(self.tokenizer.encode_batch(texts) if threads else map(self.tokenizer.encode, texts))
        records = np.zeros(len(chunk), DOCUMENT)
        for record, document in zip(records, chunk, strict=True):
            rejected = 0
            if document.kind == TEXT:
                size = self._write_ids(np.array([*next(encoded), self.end], np.int64), document, None)
            else:
                size = self._write_turns(document, document.turns)
                if document.kind == PREFERENCE:
                    rejected = self._write_turns(document, document.rejected)
            utf8 = document.text.encode("utf-8")
            record["tokens"], record["rejected"] = size + rejected, rejected
            record["bytes"], record["characters"], record["place"] = len(utf8), len(document.text), document.place
            record["key"] = np.frombuffer(exact_key(document), "<u8")
            record["kind"] = KINDS.index(document.kind)
        if self.near:
            self._file("signatures.bin").write(b"".join(signature(each, self.job.recipe).tobytes() for each in chunk))
        self._file("documents.bin").write(records.tobytes())
        self._file("names.jsonl").write("".join(json.dumps(document.name) + "\n" for document in chunk).encode())
        self.documents += len(chunk)

    def _write_turns(self, document: Document, turns: tuple[Any, ...]) -> int:
        from lumina.conversation import NONE, render

        rendered = render(self.tokenizer, turns, self.job.template)
        self._file("turns.bin").write((self.tokens + rendered.turns).astype("<i8").tobytes())
        return self._write_ids(np.append(rendered.ids, self.end), document, np.append(rendered.roles, np.uint8(NONE)))

    def _write_ids(self, ids: np.ndarray, document: Document, roles: np.ndarray | None) -> int:
        if (ids[:-1] == self.end).any():
            raise DataError(f"{document.name}: its text encodes to the control token {DOCUMENT_END}, id {self.end}")
        if roles is None and "roles.bin" in self._open:
            roles = _of_text(len(ids))
        elif roles is not None and "roles.bin" not in self._open:
            self._file("roles.bin").write(_of_text(self.tokens).tobytes())  # what came before was text
        if roles is not None:
            self._file("roles.bin").write(roles.astype(np.uint8).tobytes())
        self._file("tokens.bin").write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        return len(ids)


def _of_text(count: int) -> np.ndarray:
    from lumina.conversation import TEXT as CODE

    return np.full(count, CODE, np.uint8)
