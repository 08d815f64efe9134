"""One pass over the records of sources, in bounded memory, and what it leaves behind: counts, sizes, duplicates, a sample."""

import heapq
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from lumina.data.cleaning.duplicates import NearDuplicates, exact_key, signature
from lumina.data.preparing.pipeline import Meter, Say
from lumina.data.preparing.tokenise import Account, cleaned
from lumina.data.reading.readers import Plan, Unit
from lumina.data.recipe import Recipe
from lumina.data.records import TEXT, Document, place
from lumina.data.reports.scoring import LONGEST, SHORTEST
from lumina.data.reports.statistics import five_numbers, repeats, role_balance
from lumina.errors import DataError, UsageError

SAMPLE_CHARACTERS, SAMPLE_DOCUMENTS = 16 * 2**20, 4000  # of a source, kept for languages and quality
# Looked at for near duplicates, unless --steps names near.
COMPARED, COMPARED_CHARACTERS = 50_000, 64 * 2**20
EXAMPLES = 3
REPLACEMENT = "\ufffd"


class Survey:
    """One pass over the records that pass the steps, and what it leaves behind."""

    def __init__(self, planned: Plan, recipe: Recipe, limit: int, say: Say):
        self.planned, self.recipe, self.limit = planned, recipe, limit
        self.account, self.count, self.fair, self.damaged = Account(), 0, 0, 0
        self.kinds: Counter[str] = Counter()
        self._sizes, self._keys = array("q"), array("Q")
        self._firsts: list[int] = []  # of each unit: the number of its first document
        self._sample: list[tuple[float, int, Document]] = []  # a heap, the one that falls highest first
        self._sampled = 0
        self._lengths: Counter[int] = Counter()  # turns of a conversation
        self._answers = array("Q")  # 8 bytes of the last turn of each conversation
        self._turns: Counter[str] = Counter()
        self._characters: Counter[str] = Counter()
        self._similar = Similar(recipe)
        meter, told = Meter("looked at", planned.bytes, say), 0
        for unit, document in self._documents():
            # Of a unit that is not yet read, about what its documents are long.
            size = min(len(document.text), unit.bytes - told) if document else unit.bytes - told
            told = told + size if document else 0
            if document:
                self._take(document)
            meter.add(size, 0, self.count - meter.documents)
            meter.tick()

    def _documents(self) -> Iterator[tuple[Unit, Document | None]]:
        """Each document with its unit, and None where one ends."""
        for unit in self.planned.units:
            most = self.limit - self.account.read if self.limit else None
            if most == 0:
                return
            self._firsts.append(self.count)
            for document in cleaned(unit, self.recipe, self.account, most):
                yield unit, document
            yield unit, None

    def _take(self, document: Document) -> None:
        said = document.text
        self.kinds[document.kind] += 1
        self._sizes.append(len(said))
        self._keys.append(_key(document))
        self.fair += len(said) <= LONGEST and (document.kind != TEXT or len(said) >= SHORTEST)
        self.damaged += REPLACEMENT in said
        if document.turns:
            self._lengths[len(document.turns)] += 1
            self._answers.append(_key(Document("", document.turns[-1].text)))
            for role, words in (*document.turns, *document.rejected):
                self._turns[role] += 1
                self._characters[role] += len(words)
        self._similar.take(self.count, document, self._keys[-1])
        heapq.heappush(self._sample, (-place(said), -self.count, document))
        self._sampled += len(said)
        while len(self._sample) > 1 and (self._sampled > SAMPLE_CHARACTERS or len(self._sample) > SAMPLE_DOCUMENTS):
            self._sampled -= len(heapq.heappop(self._sample)[2].text)
        self.count += 1

    @property
    def sizes(self) -> np.ndarray:
        """Characters of each document: int64 [documents]."""
        return _array(self._sizes, np.int64)

    def sample(self) -> list[Document]:
        """Documents chosen by nothing but their text, in order."""
        return [document for _, _, document in sorted(self._sample, key=lambda each: -each[1])]

    def turns(self) -> dict[str, Any]:
        """Figures of the conversations."""
        answers = _array(self._answers, np.uint64)
        lengths = np.repeat(list(self._lengths), list(self._lengths.values())).astype(np.int64)
        return {
            "conversations": sum(self._lengths.values()),
            "repeated_answers": int((repeats(answers) != np.arange(answers.size)).sum()),
            "a_conversation": five_numbers(lengths),
            "roles": role_balance(self._turns, self._characters),
        }

    def shown(self) -> dict[str, int]:
        """The numbers of the documents that are shown."""
        if not self.count:
            return {}
        numbers = {0: "first"} | ({self.count // 2: "middle"} if self.count > 1 else {})
        for _, number, _ in sorted(self._sample, reverse=True):  # the one that falls lowest
            if -number not in numbers:
                numbers[-number] = "by hash"
                break
        return {name: number for number, name in numbers.items()}

    @cached_property
    def earlier(self) -> np.ndarray:
        """Of each document the number of the first one that is equal to it: int64 [documents]."""
        return repeats(_array(self._keys, np.uint64))

    def chosen(self) -> dict[int, Document]:
        """Documents that are shown or are examples of duplicates, by number; their units are read again."""
        earlier = self.earlier
        repeats = [(int(i), int(earlier[i])) for i in np.flatnonzero(earlier != np.arange(self.count))[:EXAMPLES]]
        self._repeats = repeats
        wanted = {*self.shown().values(), *(i for pair in (*repeats, *self._similar.examples) for i in pair)}
        found: dict[int, Document] = {}
        for unit, first, end in zip(self.planned.units, self._firsts, [*self._firsts[1:], self.count], strict=False):
            here = sorted(number for number in wanted if first <= number < end)
            if here:
                documents = islice(cleaned(unit, self.recipe, Account()), here[-1] - first + 1)
                found |= {first + i: document for i, document in enumerate(documents) if first + i in wanted}
        if found.keys() != wanted:
            raise DataError(f"{', '.join(unit.name for unit in self.planned.units[:3])}: changed while it was being read")
        return found

    def duplicates(self, chosen: dict[int, Document]) -> dict[str, Any]:
        """How many documents repeat earlier ones, with the names of some."""

        def named_as(pairs: list[tuple[int, int]]) -> list[dict[str, str]]:
            return [{"name": chosen[number].name, "as": chosen[first].name} for number, first in pairs]

        similar = self._similar
        exact = {"documents": int((self.earlier != np.arange(self.count)).sum()), "examples": named_as(self._repeats)}
        near = {"documents": similar.found, "compared": similar.compared, "examples": named_as(similar.examples)}
        return {"exact": exact, "near": near | {"left_out": similar.left_out}}


def _key(document: Document) -> int:
    return int.from_bytes(exact_key(document)[:8], "little")


def _array(values: "array[int]", dtype: type) -> np.ndarray:
    return np.frombuffer(values, dtype) if values else np.empty(0, dtype)


class Similar:
    """Near duplicates among the first documents, or among all where --steps names near; equal ones are not counted again."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.all = recipe, "near" in recipe.named_steps
        self.compared, self.found, self.characters, self.left_out = 0, 0, 0, ""
        self.examples: list[tuple[int, int]] = []
        self._kept, self._numbers, self._keys = NearDuplicates(recipe), array("q"), set[int]()

    def take(self, number: int, document: Document, key: int) -> None:
        """Compare a document with the earlier ones."""
        if self.left_out:
            return
        if not self.all and (self.compared >= COMPARED or self.characters >= COMPARED_CHARACTERS):
            self.left_out = f"documents after the first {self.compared:,}; --steps near compares all"
            return
        self.compared, self.characters = self.compared + 1, self.characters + len(document.text)
        if key in self._keys:
            return
        self._keys.add(key)
        try:
            earlier = self._kept.earlier(signature(document, self.recipe))
        except UsageError as error:
            if self.all:
                raise
            self.compared, self.left_out = 0, str(error)
            return
        if earlier < 0:
            self._numbers.append(number)
            return
        self.found += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append((number, self._numbers[earlier]))
