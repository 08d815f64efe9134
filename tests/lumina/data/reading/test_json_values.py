import io
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lumina.data.reading import json_values
from lumina.data.reading.json_values import values

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def read(content, limit=10**6):
    """(value, fault) of each."""
    return [(each.value, each.fault) for each in values(io.BytesIO(content), limit)]


@pytest.fixture(params=[1, 3, 2**20])
def window(request, monkeypatch):
    monkeypatch.setattr(json_values, "WINDOW_BYTES", request.param)


@given(st.lists(ANY_JSON, max_size=6), st.sampled_from([None, 2]), st.booleans(), st.integers(1, 9))
def test_an_array_gives_its_elements_through_a_window_of_any_size(elements, indent, escaped, size):
    content = json.dumps(elements, indent=indent, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "WINDOW_BYTES", size)
        assert read(content) == [(element, "") for element in elements]


@pytest.mark.usefixtures("window")
def test_values_in_a_row_are_records_with_or_without_commas():
    assert read(b'{"a": 1}\n{"a": 2} 12\n\n{"a": 3},') == [({"a": 1}, ""), ({"a": 2}, ""), (12, ""), ({"a": 3}, "")]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize(
    "broken",
    [
        b'{"a": nope}',
        b'{"a": [1, ]}',
        b'{"a" 1}',
        b"nope",
        b'{"a": "x\\q"}',
        b'{"a": "]} {[" 1}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 20_000 + b"]" * 20_000,
    ],
    ids=["word", "bracket", "colon", "bare", "escape", "quoted brackets", "long integer", "deep"],
)
def test_a_broken_element_ends_where_its_brackets_do(broken):
    assert read(b'[{"b": 1}, ' + broken + b', {"b": 2}]') == [({"b": 1}, ""), (None, "not JSON"), ({"b": 2}, "")]


PIECES = [
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    '"',
    "\\",
    "\n",
    " ",
    '"a"',
    "1",
    "-2.5",
    "nope",
    "null",
    '{"a": 1}',
    '"\\""',
    "9" * 5000,
    "\xfc",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.integers(1, 9))
@example('1"{"a": 1}', 1)
def test_broken_values_are_the_same_in_any_window_and_decoded_alone(content, size):
    found = []
    for window, alone in ((2**20, False), (size, False), (size, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_values, "WINDOW_BYTES", window)
            if alone:
                patch.setattr(json_values._Window, "is_broken", property(lambda _: True, lambda *_: None), raising=False)
            found.append(list(values(io.BytesIO(content.encode()), 10**5)))
    assert found[0] == found[1] == found[2]


def test_the_cost_of_broken_values_is_not_that_of_their_window_each(monkeypatch):
    content = b"[" + b",\n".join([b'{"a": nope}', b'{"a": 1}'] * 2000) + b"]"
    decode, given_to_errors = json_values._decode, []

    def counted(text, start=0):
        try:
            return decode(text, start)
        except ValueError:
            given_to_errors.append(len(text))
            raise

    monkeypatch.setattr(json_values, "_decode", counted)
    monkeypatch.setattr(json_values, "WINDOW_BYTES", 2**13)
    assert read(content) == [(None, "not JSON"), ({"a": 1}, "")] * 2000
    assert len(given_to_errors) >= 2000
    assert sum(given_to_errors) < 5 * len(content)


@pytest.mark.usefixtures("window")
def test_a_string_without_an_end_costs_its_own_line_alone():
    content = b'[\n {"a": "b},\n {"a": 2},\n {"a": "c" d"}\n,\n [3]\n]'
    assert read(content) == [(None, "not JSON"), ({"a": 2}, ""), (None, "not JSON"), ([3], "")]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize("content", [b'[{"a": 1}, {"a": ', b'[{"a": 1}, {"a": "b', b'[{"a": 1}', b'[{"a": 1},\n'])
def test_an_array_that_ends_early_says_so_once(content):
    assert read(content) == [({"a": 1}, ""), (None, "not JSON")]


@pytest.mark.usefixtures("window")
@pytest.mark.parametrize(
    "large", [b'{"t": "' + b"x" * 500 + b'"}', b'{"t": "' + b'[\\"' * 200 + b'"}', b"[" + b"[1], " * 100 + b"1]", b"7" * 300]
)
def test_a_large_element_is_passed_over_to_its_end(large):
    assert read(b"[1, " + large + b', {"b": 2}]', limit=100) == [(1, ""), (None, "too large"), ({"b": 2}, "")]


def test_a_large_element_is_never_held_whole():
    class Endless(io.RawIOBase):
        """An array whose second element is 64 MB of text."""

        def __init__(self):
            self.left = [b'[1, "', *[b"x" * 2**20] * 64, b'", 2]']

        def read(self, size=-1):
            return self.left.pop(0) if self.left else b""

    import tracemalloc

    tracemalloc.start()
    assert [(each.value if each.fault == "" else "", each.fault) for each in values(Endless(), 2**20)] == [
        (1, ""),
        ("", "too large"),
        (2, ""),
    ]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_how_deep_brackets_may_be_nested_depends_on_no_stack(opening):
    def deep(levels):
        return (opening * levels + "1" + opening.translate({ord("["): "]", ord("{"): "}"})[:1] * levels).encode()

    def at(depth):
        return at(depth - 1) if depth else [fault for _, fault in read(b"[" + deep(200) + b"," + deep(201) + b"]")]

    assert at(0) == at(400) == ["", "not JSON"]


def test_many_brackets_that_are_not_nested_are_not_deep():
    assert read(json.dumps([["[" * 500], [[1]] * 500]).encode()) == [(["[" * 500], ""), ([[1]] * 500, "")]


def test_bytes_that_are_not_utf8_are_lone_surrogates_in_the_source():
    (value,) = values(io.BytesIO(b'[{"a": "\xff"}]'), 100)
    assert value.source == '{"a": "\udcff"}'
