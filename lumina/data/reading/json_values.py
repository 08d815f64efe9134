"""The values of a JSON file one by one, in a window: the elements of an array, or objects in a row."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

WINDOW_BYTES = 2**20
SOURCE_CHARACTERS = 1000  # kept of a value that is too large

_SEPARATORS = re.compile(r"[\s,]*+")
_WORD = re.compile(r"[^\s,\[\]{}]*+")
_BRACKET_OR_QUOTE = re.compile(r'["\[\]{}]')
_STRING = re.compile(r'(?:[^"\\\n]++|\\.)*+')
_NEXT_LINE = re.compile(r"\n[ \t\r]*+[\[\]{]")
_decode = json.JSONDecoder().raw_decode


MOST_LEVELS = 200


def is_too_deep(source: str, value: Any) -> bool:
    """Whether brackets are nested deeper than MOST_LEVELS.

    Where Python itself gives up depends on how deep its own calls are, thus on who reads; this does not.
    """
    if source.count("[") + source.count("{") <= MOST_LEVELS:
        return False
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_LEVELS):
        inner = (each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer))
        level = [each for each in inner if isinstance(each, dict | list)]
    return bool(level)


class Value(NamedTuple):
    """One value, or the kind of fault that it has."""

    source: str  # as it is written; of a large one the beginning. A byte that is not UTF-8 is a lone surrogate in it.
    value: Any
    fault: str  # "", "not JSON" or "too large"


def values(file: IO[bytes], limit: int) -> Iterator[Value]:
    """The elements of an array, or the values that stand one after the other; those above `limit` bytes are faults.

    A broken value ends where its brackets do; where a string of it has no end, at the next line that begins with one.
    """
    window = _Window(file)
    in_array, fault = False, ""
    while window.skip_separators():
        if window.text[window.at] == ("]" if in_array else "["):
            in_array = not in_array
            window.at += 1
        else:
            found = _value(window, limit)
            fault = found.fault
            yield found
    if in_array and not fault:
        yield Value("", None, "not JSON")  # its end is missing, and no last value told of it


def _value(window: "_Window", limit: int) -> Value:
    """What begins at the window's place; the window grows until all of it is there, and then is behind it."""
    scan = _Scan()
    while True:
        text, start = window.text, window.at
        value, end, fault = _decoded(window, scan)
        if end < 0 and window.ended:
            end = len(text)
        if end >= 0:
            window.at = end
            if _is_larger(text, start, end, limit):
                value, fault = None, "too large"
            return Value(text[start:end], value, fault)
        if len(text) - start > limit:
            window.pass_over(scan)
            return Value(text[start : start + SOURCE_CHARACTERS], None, "too large")
        window.grow()


def _decoded(window: "_Window", scan: "_Scan") -> tuple[Any, int, str]:
    """The value at the window's place, where it ends or -1 if that is not in the window, and its fault."""
    text, start, end = window.text, window.at, -1
    given, before = text, 0
    if window.is_broken:  # decoded alone then, because an error counts the lines of all that the decoder is given
        end = scan.end(text, start, window.ended)
        if end < 0:
            return None, end, "not JSON"
        given, before = text[start:end], start
    try:
        value, stop = _decode(given, start - before)
        stop += before
        if is_too_deep(text[start:stop], value):
            raise RecursionError
        if text[start] not in '{["' and stop != scan.end(text, start, window.ended):
            raise ValueError("a word or number goes on")
    except (ValueError, RecursionError):  # also for integers that are longer than Python reads
        window.is_broken = True
        return None, end if end >= 0 else scan.end(text, start, window.ended), "not JSON"
    return value, stop, ""


def _is_larger(text: str, start: int, stop: int, limit: int) -> bool:
    if 4 * (stop - start) <= limit:
        return False
    return len(text[start:stop].encode("utf-8", "surrogateescape")) > limit


class _Window:
    """A part of the file as characters, and a place in it."""

    def __init__(self, file: IO[bytes]):
        self.text, self.at, self.ended = "", 0, False
        self.is_broken = False  # whether something in the text was found to be no JSON
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def grow(self) -> None:
        """Drop what is before the place, and at least double the rest."""
        rest = self.text[self.at :]
        chunk = self._file.read(max(WINDOW_BYTES, len(rest)))
        self.ended = not chunk
        self.text, self.at = rest + self._decoder.decode(chunk, final=self.ended), 0
        self.is_broken = False

    def skip_separators(self) -> bool:
        """Go to the next value or bracket; whether there is one."""
        while True:
            self.at = _SEPARATORS.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text) or self.ended:
                return self.at < len(self.text)
            self.grow()

    def pass_over(self, scan: "_Scan") -> None:
        """Go behind the value at the place, without keeping any of it."""
        while (end := scan.end(self.text, self.at, self.ended)) < 0 and not self.ended:
            self.at += scan.read
            scan.read = 0
            self.grow()
        self.at = end if end >= 0 else len(self.text)


class _Scan:
    """Finds the end of a value, of which more and more is at hand, by its brackets and strings alone."""

    def __init__(self) -> None:
        self.read = 0  # characters of the value that are done with
        self._depth = 0
        self._place = "outside"  # of strings; or in a "string", behind a "broken" one, or in a "word" or number

    def end(self, text: str, start: int, ended: bool) -> int:
        """Where the value that begins at `start` ends, or -1 if that is not in the text. `ended`: nothing comes after it."""
        at = start + self.read
        while at < len(text):
            if self._place == "string":
                at = _STRING.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
                if at == len(text) or (text[at] == "\\" and at + 1 == len(text)):
                    break
                self._place = "outside" if text[at] == '"' else "broken"
                at += self._place == "outside"
            elif self._place == "broken":
                if found := _NEXT_LINE.search(text, at):
                    return found.start()
                at = max(at, text.rfind("\n", at))
                break
            elif self._place == "word":
                at = _WORD.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing, too
                if at < len(text) or ended:
                    return at
                at -= 1  # so that at the end there is something to look at
                break
            elif not self._depth and text[at] in "]}":
                return at + 1
            elif not self._depth and text[at] not in '"[{':
                self._place = "word"
            else:
                found = _BRACKET_OR_QUOTE.search(text, at)
                at = found.end() if found else len(text)
                self._enter(found.group() if found else "")
            if self._place == "outside" and not self._depth:
                return at
        self.read = at - start
        return -1

    def _enter(self, character: str) -> None:
        if character == '"':
            self._place = "string"
        elif character:
            self._depth += 1 if character in "[{" else -1
