"""What is done to a document by itself: steps that change it, or say why it is removed."""

import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Protocol

from lumina.data.cleaning.decontamination import Decontaminate
from lumina.data.cleaning.language import Language
from lumina.data.cleaning.quality import Quality
from lumina.data.cleaning.redaction import Redact
from lumina.data.extras import need
from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import UsageError


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
        "redact": lambda: Redact(recipe),
        "length": lambda: Length(recipe),
        "quality": Quality,
        "language": lambda: Language(recipe),
        "decontaminate": lambda: Decontaminate(against, recipe),
    }
    return [build[name]() for name in recipe.named_steps if name in build]


def require_options(recipe: Recipe) -> None:
    """Raise what `steps` would, and what exact and near would, before any text is read: those of --against are not yet."""
    if "decontaminate" in recipe.named_steps and not recipe.against.strip(", "):
        raise UsageError("--against: --steps decontaminate compares with evaluation texts; name files that hold some")
    steps(recipe, against=["a text in place of those"])
    if "near" in recipe.named_steps:
        need("rensa", "--steps near")


class Repair:
    """Undoes wrong decoding, by ftfy: UTF-8 read as a one-byte encoding, split surrogates, C1 controls for Windows-1252.

    Letters are composed (NFC), which Unicode defines to be the same text. What else ftfy can do is left out, because it
    changes what a text says or how code runs: curly quotes and ligatures stay, entities such as &lt; stay, wide characters
    stay wide, and no character is replaced by U+FFFD, the mark of a loss.
    """

    name = "repair"

    def __init__(self) -> None:
        self._ftfy = need("ftfy", "--steps repair")
        self._config = self._ftfy.TextFixerConfig(replace_lossy_sequences=False)
        self._suspect = _suspect(need("ftfy.badness", "--steps repair").MOJIBAKE_CATEGORIES)

    def __call__(self, document: Document) -> Document:
        return document.mapped(self.repaired)

    def repaired(self, text: str) -> str:
        if text.isascii():
            return text
        if _SURROGATE.search(text):
            text = self._ftfy.fixes.fix_surrogates(text)
        if self._suspect.search(text):
            text = "\n".join(map(self._repaired_line, text.split("\n")))
        return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)

    def _repaired_line(self, line: str) -> str:
        """Line by line, as ftfy does: each may have been decoded in its own wrong way."""
        return line if line.isascii() or not self._suspect.search(line) else self._ftfy.fix_encoding(line, self._config)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _suspect(categories: dict[str, str]) -> re.Pattern[str]:
    """What every text matches in which ftfy sees mojibake, at a fraction of the price: two odd characters, or one of a few.

    ftfy's own pattern has 40 alternatives, and does 5 MB/s; most lines that are not English hold none of these pairs.
    """
    letters = "".join(categories[name] for name in ("upper_common", "lower_common"))
    odd = "".join(categories[name] for name in categories if name not in ("upper_common", "lower_common", "common"))
    any_ = odd + letters + categories["common"]
    return re.compile(f"[{odd}][{any_}]|[{letters}{categories['common']}][{odd}]|[{categories['c1']}ŒœÃÂЂ]")


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
        if self._least < 0 or self._most < 0 or 0 < self._most < self._least:
            raise UsageError(
                f"--min-characters {self._least}, --max-characters {self._most}: no text is between; 0 is no upper bound"
            )

    def __call__(self, document: Document) -> Document | str:
        if len(document.text) < self._least:
            return f"shorter than {self._least} characters"
        if self._most and len(document.text) > self._most:
            return f"longer than {self._most} characters"
        return document
