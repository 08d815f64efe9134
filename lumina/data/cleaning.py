"""What is done to a document by itself: steps that change it, or say why it is removed."""

import re
from collections.abc import Callable, Iterable
from typing import Protocol

from lumina.data.extras import need
from lumina.data.recipe import Recipe
from lumina.data.records import Document


class Step(Protocol):
    """Pure and deterministic: the same document gives the same answer in any process."""

    name: str

    def __call__(self, document: Document) -> Document | str:
        """The document, changed or the same; or why it is removed, in the same words for each with that fault."""
        ...


def steps(recipe: Recipe, against: Iterable[str] = ()) -> list[Step]:
    """The steps that `recipe` names, in order, but exact and near, which look at several documents.

    Args:
        against: the evaluation texts that decontaminate compares with.

    Raises:
        UsageError: a step or one of its options does not exist, or it needs a library that is not installed.
    """
    build: dict[str, Callable[[], Step]] = {
        "repair": Repair,
        "control": Control,
        "length": lambda: Length(recipe),
    }
    return [build[name]() for name in recipe.named_steps if name in build]


class Repair:
    """Undoes wrong decoding: mojibake, split surrogates and C1 controls that were Windows-1252."""

    name = "repair"

    def __init__(self) -> None:
        self._fix_text = need("ftfy", "--steps repair").fix_text
        self._config = need("ftfy", "--steps repair").TextFixerConfig(
            unescape_html=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            remove_control_chars=False,
            explain=False,
        )

    def __call__(self, document: Document) -> Document:
        return document.mapped(self.repaired)

    def repaired(self, text: str) -> str:
        return text if text.isascii() else self._fix_text(text, self._config)


# Line ends of other systems, form feeds and Unicode's own: all that end a line.
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Not U+200C and U+200D: Persian, Indic scripts and emoji are spelled with them.
_INVISIBLE = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff]+")


class Control:
    """Removes control characters, zero-width spaces, byte order marks and bidirectional overrides; lines end in a line feed."""

    name = "control"

    def __call__(self, document: Document) -> Document:
        return document.mapped(lambda text: _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text)))


class Length:
    """Removes documents that are too short or too long."""

    name = "length"

    def __init__(self, recipe: Recipe):
        self._least, self._most = recipe.min_characters, recipe.max_characters

    def __call__(self, document: Document) -> Document | str:
        if len(document.text) < self._least:
            return f"shorter than {self._least} characters"
        if self._most and len(document.text) > self._most:
            return f"longer than {self._most} characters"
        return document
