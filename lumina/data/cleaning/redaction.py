"""What should not be learned by heart: addresses, numbers and keys, each replaced by a word in brackets.

The patterns would rather miss than take what is none: a date, a version or a hash is not a telephone number. Each is bounded
or possessive where it repeats, so that the time is linear in the text, whatever it says.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import UsageError


class _Pattern(NamedTuple):
    literals: tuple[str, ...]  # a text with none of these has no match: `in` is far faster than a search
    pattern: re.Pattern[str]
    before: str = ""  # what of the match is left, before the word in brackets


def _key(literals: tuple[str, ...], pattern: str) -> _Pattern:
    return _Pattern(literals, re.compile(rf"(?<![\w-]){pattern}(?![\w-])"))


_KEYS = [
    _Pattern(
        ("PRIVATE KEY",),
        re.compile(
            r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:[^-]++|-(?!----))*+-----END [A-Z0-9 ]{1,60}-----"
        ),
    ),
    _Pattern(("://",), re.compile(r"(?<=://)[^\s/:@\"'<>]{1,64}:[^\s/@\"'<>]{1,128}(?=@)")),  # a password in an address
    _Pattern(("ecret", "ECRET"), re.compile(r"(?i:aws_?secret_?access_?key)\W{1,5}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")),
    _key(("AKIA", "ASIA"), r"(?:AKIA|ASIA)[A-Z0-9]{16}"),
    _key(("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"gh[pousr]_[A-Za-z0-9]{36,255}"),
    _key(("github_pat_",), r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"),
    _key(("glpat-",), r"glpat-[\w-]{20,200}"),
    _key(("xox",), r"xox[abeprs]-[A-Za-z0-9-]{10,250}"),
    _key(("AIza",), r"AIza[\w-]{35}"),
    _key(("k_live_", "k_test_"), r"[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}"),
    _key(("sk-",), r"sk-(?:(?:proj|ant|svcacct|admin|or)-[\w-]{20,250}|[A-Za-z0-9]{32,250})"),
    _key(("hf_",), r"hf_[A-Za-z0-9]{34,40}"),
    _key(("npm_",), r"npm_[A-Za-z0-9]{36}"),
    _key(("pypi-",), r"pypi-AgEI[\w-]{50,1000}"),
    _key(("eyJ",), r"eyJ[\w-]{10,}+\.eyJ[\w-]{10,}+\.[\w-]{10,}+"),
]
_URL = _Pattern(
    ("://", "www.", "WWW."),
    re.compile(r"(?<!\w)(?:(?:https?|ftp)://|www\.(?=\w))[^\s<>\"'`{}|\\^]*[^\s<>\"'`{}|\\^.,;:!?()\[\]*]", re.IGNORECASE),
)
_EMAIL = _Pattern(
    ("@",),
    re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}[A-Za-z]{2,24}(?![\w(@-])"),
)
# The first character comes before what may not stand to the left of it: so a search skips to that character.
_PHONES = [
    # A country, and 7 to 12 digits more: +49 (0) 89 1234567
    _Pattern(("+",), re.compile(r"\+(?<![\w)+.-]\+)[1-9]\d{0,2}(?:[ -]?\(\d{1,4}\))?(?:[ -]?\d){7,12}(?!\w|[.-]\d)")),
    # North American: neither area nor exchange begins with 0 or 1, and all separators are of one kind.
    _Pattern(
        ("-", ".", "("),
        re.compile(
            r"[(1-9](?<![\w+/.-][(1-9])(?:(?<=1)[- ](?:\(|[2-9]))?"
            r"(?:(?<=\()[2-9]\d{2}\) ?[2-9]\d{2}[ .-]|(?<=[2-9])\d{2}(?P<sign>[-.])[2-9]\d{2}(?P=sign))"
            r"\d{4}(?![\w/]|[.-]\d)"
        ),
    ),
    # Where it says so.
    _Pattern(
        ("el", "EL", "hone", "HONE", "ax", "AX", "obil", "OBIL"),
        re.compile(
            r"(?P<label>[TtPpFfMm](?<!\w.)"
            r"(?i:(?<=t)el(?:ephone|efon)?|(?<=t)éléphone|(?<=p)hone|(?<=f)ax|(?<=m)obile)[ .:]{1,4})"
            r"\(?\+?\d(?:[ ./()-]{0,3}\d){6,14}(?!\w|[.-]\d)"
        ),
        r"\g<label>",
    ),
]
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)


class Redact:
    """Replaces what `redact` names with [URL], [EMAIL], [PHONE], [KEY] and [CODE]: text as any other, no control tokens."""

    name = "redact"

    def __init__(self, recipe: Recipe):
        named = {what.strip() for what in recipe.redact.split(",") if what.strip()}
        if unknown := sorted(named - set(_REDACTIONS)):
            raise UsageError(f"--redact: {unknown[0]!r} is not known; there are {', '.join(_REDACTIONS)}")
        self._redactions = [_REDACTIONS[what] for what in _REDACTIONS if what in named]

    def __call__(self, document: Document) -> Document:
        return document.mapped(self._redacted)

    def _redacted(self, text: str) -> str:
        for redact in self._redactions:
            text = redact(text)
        return text


def _replacing(patterns: list[_Pattern], word: str) -> Callable[[str], str]:
    def replaced(text: str) -> str:
        for literals, pattern, before in patterns:
            if any(literal in text for literal in literals):
                text = pattern.sub(before + word, text)
        return text

    return replaced


def _without_code(text: str) -> str:
    """Fenced blocks of Markdown, as CommonMark 4.5 has them, become [CODE]; one that is never closed stays."""
    if "```" not in text and "~~~" not in text:
        return text
    parts, taken, opening = [], 0, None
    for fence in _FENCE.finditer(text):
        marks, rest = fence.groups()
        if opening is None:
            opening = fence if marks[0] == "~" or "`" not in rest else None
        elif marks.startswith(opening[1]) and not rest.strip():
            parts += [text[taken : opening.start()], "[CODE]"]
            taken, opening = fence.end(), None
    return "".join([*parts, text[taken:]])


# In this order: a key may stand in an address, and an address in code.
_REDACTIONS: dict[str, Callable[[str], str]] = {
    "code": _without_code,
    "key": _replacing(_KEYS, "[KEY]"),
    "url": _replacing([_URL], "[URL]"),
    "email": _replacing([_EMAIL], "[EMAIL]"),
    "phone": _replacing(_PHONES, "[PHONE]"),
}
