import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data import readers
from lumina.data.readers import Unit, plan, read
from lumina.data.recipe import Recipe


def records(units, recipe=None):
    """All that the units yield, each of them sent through JSON first."""
    sent = [Unit(*json.loads(json.dumps(unit))) for unit in units]
    return [record for unit in sent for record in read(unit, recipe or Recipe())]


LINES = st.lists(
    st.sampled_from(
        [
            b"",
            b"  ",
            b"\r",
            b'{"text": "x"}',
            b'{"text": "\xc3\xbc"}\r',
            b"{",
            b"[]",
            b'{"text": "\xff"}',
            b"\xef\xbb\xbf",
            b"7" * 90,
        ]
    )
    | st.binary(max_size=30).filter(lambda line: b"\n" not in line),
    max_size=20,
)


@given(LINES, st.integers(1, 60), st.booleans())
def test_lines_cut_in_units_of_any_size_are_those_of_one_unit(tmp_path_factory, lines, size, ended):
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ended)
    recipe = Recipe(max_record_mb=80e-6)
    with pytest.MonkeyPatch.context() as patch:
        whole = plan([str(path)], recipe)
        patch.setattr(readers, "UNIT_BYTES", size)
        patch.setattr(readers, "READ_BYTES", 7)
        cut = plan([str(path)], recipe)
    assert cut.fingerprint == whole.fingerprint
    assert [unit.number for unit in cut.units] == list(range(len(cut.units)))
    assert records(cut.units, recipe) == records(whole.units, recipe)
