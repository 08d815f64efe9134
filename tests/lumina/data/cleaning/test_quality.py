"""Quality rules: what each is for, and real documents that none of them may take for rubbish."""

import ast
import re
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.cleaning.quality import Quality, fault, measures
from lumina.data.records import CONVERSATION, Document, Turn

PROSE = """The harbour had been quiet since the storm, and the boats that used to leave before dawn now stayed at their
moorings. Old Marta, who sold bread to the crews, walked along the quay every morning to see whether anything had changed.
Nothing had. She counted the gulls instead, wrote their number on a slip of paper, and pinned it to the door of the chapel.
By the end of March there were ninety slips, one above the other, and people began to ask what they were for. "To have
something to compare with," she said, and would not explain it further.
"""
LICENCE = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files, to deal in the Software without restriction, including without limitation the rights to use, copy, modify,
merge, publish, distribute, sublicense, and/or sell copies of the Software. The above copyright notice and this permission
notice shall be included in all copies. The software is provided "as is", without warranty of any kind, express or implied.
"""
GERMAN = """Der Hafen war seit dem Sturm still, und die Boote, die sonst vor dem Morgengrauen ausliefen, blieben nun an ihren
Liegeplätzen. Die alte Marta, die den Mannschaften Brot verkaufte, ging jeden Morgen am Kai entlang, um zu sehen, ob sich etwas
geändert hatte. Nichts hatte sich geändert. Sie zählte stattdessen die Möwen, schrieb ihre Zahl auf einen Zettel und heftete ihn
an die Tür der Kapelle. Ende März hingen dort neunzig Zettel übereinander, und die Leute begannen zu fragen, wozu sie dienten.
"""
JAPANESE = "嵐のあと、港は静かだった。夜明け前に出ていた船は、今では岸につながれたままだった。マルタは毎朝、岸壁を歩いた。" * 3
STOP = "English with fewer than 2 of its 8 stop words"
KEYWORDS = "Cheap watches online. Discount prices. Best deals. " + " ".join(
    sorted(set(re.findall("[a-z]{5,}", PROSE + LICENCE)))
)


@pytest.mark.parametrize("text", [PROSE, LICENCE, GERMAN, JAPANESE, PROSE.upper(), "# Title\n\n## Part\n\n" + PROSE])
def test_texts_worth_reading_are_kept(text):
    assert fault(text) == ""


def test_nearly_all_english_documents_of_the_standard_library_are_kept():
    """Where a stop-word rule once kept none of 275: module documentation, by itself."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        document = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        if len(document.split()) >= 100:
            found.append(fault(document))
    assert len(found) >= 25
    assert found.count("") >= 0.9 * len(found), Counter(found)
    assert not any("stop words" in reason for reason in found)


def test_source_code_is_not_judged_as_prose():
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    reasons = [fault(path.read_text("utf-8", "replace")) for path in paths]
    assert reasons.count("") >= 0.95 * len(reasons), Counter(reasons)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short to say.", "fewer than 50 words"),
        (PROSE * 2000, "more than 100,000 words"),
        (re.sub(r"(\w)\w*", r"\1", PROSE), "mean word length below 3 characters"),
        (re.sub(r"(\w+)", r"\1\1\1", PROSE), "mean word length above 10 characters"),
        (re.sub(r"\b(\w+) (\w+)", r"\1 12345", PROSE), "fewer than 80% of words with a letter"),
        (re.sub(r" (\w+) ", r" #\1 ", PROSE), "more than one # or ellipsis in 10 words"),
        ("".join(f"- {line}.\n" for line in PROSE.replace("\n", " ").split(",")), "more than 90% of lines with a bullet"),
        (re.sub(r",", "...\n", PROSE), "more than 30% of lines that end in an ellipsis"),
        (PROSE.replace(".", ","), "fewer than 3 sentences"),
        (PROSE + "Lorem ipsum dolor sit amet.", "lorem ipsum"),
        (KEYWORDS, STOP),
        (PROSE + "Read the next page now.\n" * 3 + "Go.\n" * 9, "repeated lines above 30%"),
        (PROSE + "\n\nRead the next page.\n\n" * 3, "repeated paragraphs above 30%"),
    ],
)
def test_a_rule_that_is_broken_is_named(text, reason):
    assert fault(text) == reason


def test_a_conversation_may_be_short():
    turns = (Turn("user", "What is the capital of France?"), Turn("assistant", "Paris."))
    conversation = Document("x", turns=turns)
    assert conversation.kind == CONVERSATION
    assert Quality()(conversation) is conversation
    assert Quality()(Document("x", "What is the capital of France? Paris.")) == "fewer than 50 words"


def slow_repeated(words, n):
    """The share of characters in runs of n words that came before, word by word."""
    seen, covered = set(), [False] * len(words)
    for start in range(len(words) - n + 1):
        run = tuple(words[start : start + n])
        if run in seen:
            covered[start : start + n] = [True] * n
        seen.add(run)
    return sum(len(word) for word, cover in zip(words, covered, strict=True) if cover) / sum(map(len, words))


def slow_commonest(words, n):
    runs = Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
    most = max(runs.values())
    longest = max(len("".join(run)) for run, count in runs.items() if count == most)
    return min(1, longest * most / sum(map(len, words))) if most > 1 else 0


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=12, max_size=40))
def test_repeated_words_are_counted_as_word_by_word(words):
    measured = measures(" ".join(words))
    assert measured["repeated_5_words"] == pytest.approx(slow_repeated(words, 5))
    for n in (2, 3, 4):
        assert measured[f"commonest_{n}_words"] == pytest.approx(slow_commonest(words, n))


@given(st.lists(st.sampled_from(["", "a", "bb", " bb "]), max_size=12))
def test_repeated_lines_are_counted_as_line_by_line(lines):
    measured = measures("\n".join(lines))
    stripped = [line.strip() for line in lines if line.strip()]
    repeated = [line for number, line in enumerate(stripped) if line in stripped[:number]]
    assert measured["repeated_lines"] == pytest.approx(len(repeated) / max(1, len(stripped)))
    assert measured["repeated_line_characters"] == pytest.approx(sum(map(len, repeated)) / max(1, sum(map(len, stripped))))


@given(st.text())
def test_words_between_spaces_are_measured_as_split_does(text):
    words, measured = text.split(), measures(text)
    assert measured["mean_word_length"] == pytest.approx(sum(map(len, words)) / max(1, len(words)))
    assert measured["alphabetic_words"] == pytest.approx(
        sum(any(map(str.isalpha, word)) for word in words) / max(1, len(words))
    )


def test_measures_are_numbers_under_the_same_names_for_any_text():
    assert measures("").keys() == measures(PROSE).keys()
    assert all(isinstance(value, int | float) for text in ("", PROSE) for value in measures(text).values())
