"""What a source yields: documents, conversations and preference pairs, and why a record is none of them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

TEXT, CONVERSATION, PREFERENCE = "text", "conversation", "preference"
KINDS = (TEXT, CONVERSATION, PREFERENCE)


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: str  # system, user or assistant
    text: str


@dataclass(frozen=True)
class Document:
    """A text, or a conversation, or a preference between two ends of one; with the name that errors and reports use for it."""

    name: str  # the file and, where it holds several, the line or record: notes.jsonl:17
    plain: str = ""  # the text of a document that is no conversation
    turns: tuple[Turn, ...] = ()  # a conversation; of a preference, the chosen one
    rejected: tuple[Turn, ...] = ()  # of a preference: the conversation that is not to be learned, with the same beginning
    group: str = ""  # documents of a group are on one side of the held-out split; without one see `place`

    @property
    def kind(self) -> str:
        return PREFERENCE if self.rejected else CONVERSATION if self.turns else TEXT

    @cached_property
    def text(self) -> str:
        """All that it says, a blank line between turns: what filters, hashes and statistics look at."""
        return "\n\n".join(turn.text for turn in (*self.turns, *self.rejected)) if self.turns else self.plain

    @property
    def place(self) -> float:
        """Where it falls in [0, 1); below the held-out fraction it is held out. Equal texts, and equal questions whatever the
        answers, fall together."""
        first = 1 if self.turns and self.turns[0].role == "system" else 0
        asked = "\n\n".join(turn.text for turn in self.turns[: first + 1])
        return place(self.group or asked or self.text)

    def mapped(self, change: Callable[[str], str]) -> "Document":
        """A copy with `change` applied to the text, or to that of each turn; itself where nothing changes."""
        turns, rejected = (tuple(Turn(role, change(text)) for role, text in side) for side in (self.turns, self.rejected))
        plain = self.plain if self.turns else change(self.plain)
        same = plain == self.plain and turns == self.turns and rejected == self.rejected
        return self if same else replace(self, plain=plain, turns=turns, rejected=rejected)


def place(text: str) -> float:
    """Where a document falls in [0, 1), by the sha256 of its text; below the held-out fraction it is held out."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float


# Of a kind of reject, what works.
WORKS = {"not UTF-8": "of text from Windows, iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW makes it so"}


def with_what_works(kind: str) -> str:
    """A kind of reject as a person is told of it."""
    return f"{kind} ({WORKS[kind]})" if kind in WORKS else kind


class Reject(NamedTuple):
    """A record that cannot be used."""

    name: str  # the file and the line or record
    kind: str  # the same words for every record with the same fault, such as "not UTF-8"
    sample: str = ""  # the beginning of it, printable
