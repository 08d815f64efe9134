import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.records import Document, Turn, place


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_has_one_place_from_0_to_below_1(text):
    assert 0 <= place(text) < 1


def test_places_never_change_and_are_even():
    # sha256("abc") begins with ba7816bf.
    assert int(place("abc") * 2**32) == 0xBA7816BF
    assert sum(place(str(n)) < 0.1 for n in range(10_000)) == pytest.approx(1000, rel=0.1)


TURNS = (Turn("user", "What?"), Turn("assistant", "That."))


@pytest.mark.parametrize(
    ("document", "kind", "text"),
    [
        (Document("a", "Plain."), "text", "Plain."),
        (Document("a", turns=TURNS), "conversation", "What?\n\nThat."),
        (
            Document("a", turns=TURNS, rejected=(TURNS[0], Turn("assistant", "No."))),
            "preference",
            "What?\n\nThat.\n\nWhat?\n\nNo.",
        ),
    ],
)
def test_a_document_has_its_kind_and_all_that_it_says_and_every_part_is_mapped(document, kind, text):
    assert (document.kind, document.text) == (kind, text)
    assert document.mapped(str) is document
    assert document.mapped(str.upper).text == text.upper()
    assert document.mapped(str.upper).kind == kind
