"""Steps that repair and bound a document by itself."""
# ruff: noqa: RUF001  # characters that look like others are what this is about

import itertools
import re
import sys
from string import ascii_letters

import ftfy
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from hypothesis import example, given
from hypothesis import strategies as st

from lumina.data.cleaning.language import language_model
from lumina.data.cleaning.steps import Control, Length, Repair, steps
from lumina.data.recipe import STEPS, Recipe
from lumina.data.records import Document, Turn
from lumina.errors import UsageError

LIBRARIES = [("repair", "ftfy"), ("language", "py3langid.langid"), ("quality", "py3langid.langid")]
REPAIR, CONTROL = Repair(), Control()
ODD_RANGES = "".join(MOJIBAKE_CATEGORIES.values())
ODD = ODD_RANGES.replace("-", "")
EUROPEAN = "".join(map(chr, range(0x2700)))


def text(step, value):
    return step(Document("x", value)).text


def test_steps_come_in_the_order_of_the_recipe_without_those_of_several_documents():
    built = steps(Recipe(steps="all"), ["the words of an evaluation"])
    assert [step.name for step in built] == [name for name in STEPS if name not in ("exact", "near")]
    assert [step.name for step in steps(Recipe(steps="length, repair"))] == ["repair", "length"]
    assert steps(Recipe(steps="none")) == []


@pytest.mark.parametrize(
    ("step", "module"), [("repair", "ftfy"), ("language", "py3langid.langid"), ("quality", "py3langid.langid")]
)
def test_a_step_whose_library_is_missing_says_what_to_install(step, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    language_model.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'lumina\[data\]'"):
        steps(Recipe(steps=step))


def test_a_step_changes_each_turn_of_a_conversation():
    turns = (Turn("user", "schÃ¶n"), Turn("assistant", "gut"))
    other = (Turn("user", "schÃ¶n"), Turn("assistant", "schÃ¶n"))
    repaired = REPAIR(Document("x", turns=turns, rejected=other))
    assert repaired.turns == (Turn("user", "schön"), Turn("assistant", "gut"))
    assert repaired.rejected == (Turn("user", "schön"), Turn("assistant", "schön"))


# ----------------------------------------------------------------------------------------------------------- repair


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("schÃ¶n", "schön"),
        ("voilÃ le travail", "voilà le travail"),
        ("â€œquotedâ€\x9d", "“quoted”"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
        ("\x93hi\x94 \x80 5", "“hi” € 5"),
        ("\ud83d\ude00", "😀"),
        ("cafe\u0301", "café"),
        ("plain\nschÃ¶n\nгод", "plain\nschön\nгод"),
    ],
)
def test_wrong_decoding_is_undone(broken, whole):
    assert text(REPAIR, broken) == whole


@pytest.mark.parametrize(
    "value",
    [
        "“curly” ‘quotes’",
        "ﬁne ﬂow",
        "&lt;p&gt; &amp; é",
        "ｗｉｄｅ ｶﾅ",
        "10³ µm",
        "â€? lost",
        "naïve Ærø, Œuvre, Ÿ",
        "x\r\né\r\n",
        "日本語、です。",
    ],
)
def test_what_a_text_says_is_not_repaired(value):
    assert text(REPAIR, value) == value


def test_every_pair_that_ftfy_takes_for_mojibake_is_suspect():
    pairs = ["".join(pair) for pair in itertools.product(re.findall(f"[{ODD_RANGES}]", EUROPEAN), repeat=2)]
    bad = [pair for pair in pairs if is_bad(pair)]
    assert len(bad) > 10000
    assert [pair for pair in bad if not REPAIR._suspect.search(pair)] == []


@given(st.text(st.sampled_from(ODD + ascii_letters[:3] + " .А日\xa0")))
@example("œ ")
@example("вЂ”")
def test_what_ftfy_sees_is_never_passed_over(value):
    """The oracle is ftfy itself, on every line; ours looks only at suspect ones."""
    assert not is_bad(value) or REPAIR._suspect.search(value)
    config = ftfy.TextFixerConfig(replace_lossy_sequences=False)
    expected = "\n".join(ftfy.fix_encoding(line, config) for line in value.split("\n"))
    assert text(REPAIR, value) == ftfy.fix_text(expected, config._replace(**UNTOUCHED))


UNTOUCHED = dict.fromkeys(
    (
        "unescape_html",
        "fix_encoding",
        "fix_c1_controls",
        "fix_latin_ligatures",
        "fix_character_width",
        "uncurl_quotes",
        "fix_line_breaks",
        "remove_terminal_escapes",
        "remove_control_chars",
    ),
    False,
)


# ---------------------------------------------------------------------------------------------------------- control


def test_control_characters_go_and_line_ends_become_line_feeds():
    assert text(CONTROL, "a\0b\x1b[31mc\x7fd\x85e\x9ff\tg\r\nh\ri\fj\vk\u2028l") == "ab[31mcd\nef\tg\nh\ni\nj\nk\nl"


def test_invisible_characters_go_but_those_that_spell():
    assert text(CONTROL, "a\u200bb\ufeffc\u2060d\u202ee\u2066f\u2069") == "abcdef"
    for spelled in ("می\u200cخواهم", "👩\u200d💻", "क्\u200dष", "שלום\u200f!"):
        assert text(CONTROL, spelled) == spelled


@given(st.text())
def test_control_leaves_nothing_for_a_second_time(value):
    once = text(CONTROL, value)
    assert text(CONTROL, once) == once
    assert not set(once) & {chr(code) for code in (*range(32), *range(127, 160))} - {"\n", "\t"}


# ----------------------------------------------------------------------------------------------------------- length


def test_length_removes_what_is_outside_its_bounds():
    step = Length(Recipe(min_characters=3, max_characters=5))
    answers = [step(Document("x", "a" * count)) for count in (2, 3, 5, 6)]
    assert answers[0] == "shorter than 3 characters"
    assert [answer.text for answer in answers[1:3]] == ["aaa", "aaaaa"]
    assert answers[3] == "longer than 5 characters"
    assert Length(Recipe())(Document("x", "a" * 10**6)).text == "a" * 10**6


@pytest.mark.parametrize(
    "options", [{"min_characters": -1}, {"max_characters": -1}, {"min_characters": 9, "max_characters": 8}]
)
def test_bounds_that_no_text_can_meet_are_refused(options):
    with pytest.raises(UsageError, match="-characters"):
        Length(Recipe(**options))


# -------------------------------------------------------------------------------------------------------- all steps


@given(st.text(min_size=1))
def test_every_step_takes_any_text_and_gives_the_same_answer_again(value):
    for step in ALL:
        first = step(Document("x", value))
        assert step(Document("x", value)) == first
        assert isinstance(first, Document | str)


ALL = steps(Recipe(steps="all", redact="url,email,phone,key,code", languages="en,und"), ["one two three four five six"])
