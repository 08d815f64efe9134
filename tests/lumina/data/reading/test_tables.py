import csv
import io
import os

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lumina.data.reading import tables
from lumina.data.reading.streams import Stream, opened
from lumina.data.reading.tables import Row, arrow_batches, arrow_rows, csv_rows, parquet_groups, parquet_rows


def of_csv(content, limit=10**6):
    return list(csv_rows(Stream(io.BytesIO(content), lambda: ""), limit))


def told(rows):
    """What a test compares: number, value or fault."""
    return [(row.number, row.fault or row.value) for row in rows]


# -------------------------------------------------------------------------------------------------------------- csv

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=6) | st.sampled_from(
    ['"', "a\nb", ""]
)


@given(st.lists(st.tuples(CELLS, CELLS), max_size=6), st.sampled_from([",", ";", "\t", "|"]), st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_is_read_with_the_line_that_each_row_begins_at(rows, delimiter, end):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    expected, number = [], 1
    for row in [("text", "id"), *rows]:
        expected.append((number, {"text": row[0], "id": row[1]}))
        writer.writerow(row)
        number = file.getvalue().count("\n") + 1
    assert told(of_csv(file.getvalue().encode())) == expected[1:]


def test_a_quote_without_an_end_costs_its_own_line_alone():
    content = b'text,id\n"a,1\nb,2\n"c\nd",3\ne"f,4\n"g"h,5\ni,6\n'
    assert told(of_csv(content)) == [
        (2, "broken quotes"),
        (3, {"text": "b", "id": "2"}),
        (4, {"text": "c\nd", "id": "3"}),
        (6, {"text": 'e"f', "id": "4"}),
        (7, "broken quotes"),
        (8, {"text": "i", "id": "6"}),
    ]


def test_a_quote_without_an_end_in_the_last_line_is_one_fault():
    assert told(of_csv(b'text\na\n"b\n')) == [(2, {"text": "a"}), (3, "broken quotes")]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (b"a,1,2", "not as many columns as the header"),
        (b"a", "not as many columns as the header"),
        (b"\xff,1", "not UTF-8"),
        (b"x" * 200 + b",1", "too large"),
        (b'"' + b"x\n" * 200 + b'",1', "too large"),
        (b"a\rb,1", "broken quotes"),
    ],
)
def test_a_bad_row_is_a_fault_and_the_rows_around_it_are_read(row, fault):
    rows = told(of_csv(b"text,id\nbefore,0\n" + row + b"\n\nafter,9\n", limit=100))
    assert rows[0] == (2, {"text": "before", "id": "0"})
    assert rows[1] == (3, fault)
    assert rows[-1] == (4 + row.count(b"\n") + 1, {"text": "after", "id": "9"})
    assert len(rows) == 3 or b"x\n" in row  # what follows the first line of a large row cannot be told from rows


def test_nul_bytes_and_a_mark_and_an_empty_file_are_read():
    assert told(of_csv(b"\xef\xbb\xbftext,id\na\0b,1\n")) == [(2, {"text": "a\0b", "id": "1"})]
    assert of_csv(b"") == of_csv(b"text,id\n") == of_csv(b"\n\n") == []


def test_what_divides_columns_is_not_looked_for_in_quotes():
    assert told(of_csv(b'"a;b;c",text\n1,x\n')) == [(2, {"a;b;c": "1", "text": "x"})]


def test_many_broken_rows_do_not_take_the_square_of_their_time():
    calls = 0

    class Counted(io.BytesIO):
        def readline(self, size=-1):
            nonlocal calls
            calls += 1
            return super().readline(size)

    rows = list(csv_rows(Stream(Counted(b"text\n" + b'"a"b\n"c\n' * 5000), lambda: ""), 10**6))
    assert len(rows) == 10_000
    assert calls < 10_010


# ------------------------------------------------------------------------------------------------- Parquet and Arrow

ROWS = [{"id": n, "text": f"text {n}", "other": [n]} for n in range(100)]


def write_parquet(path, rows=ROWS, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=30, **options)
    return str(path)


def write_arrow(path, rows=ROWS, kind=pyarrow.ipc.new_stream):
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, kind(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_rows_of_groups_are_those_of_the_whole_with_the_needed_columns_alone(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_BYTES", 100)
    if kind == "parquet":
        path, groups, rows = write_parquet(tmp_path / "a"), parquet_groups, parquet_rows
    else:
        path = write_arrow(tmp_path / "a", kind=getattr(pyarrow.ipc, f"new_{kind}"))
        groups, rows = arrow_batches, arrow_rows
    expected = [(n, {"text": f"text {n}"}) for n in range(100)]
    assert [count for count, _ in groups(path)] == [30, 30, 30, 10]
    assert told(rows(path, 0, 0, 0, "")) == expected
    assert told([*rows(path, 0, 1, 0, ""), *rows(path, 1, 3, 30, ""), *rows(path, 3, 4, 90, "")]) == expected
    assert told(rows(path, 0, 0, 0, "id"))[7] == (7, {"id": 7})
    assert told(rows(path, 0, 0, 0, "missing"))[7] == (7, {"id": 7})  # rows are still counted


def test_a_parquet_file_without_its_end_is_one_fault(tmp_path):
    path = write_parquet(tmp_path / "a")
    for content in (b"", b"PAR1", (tmp_path / "a").read_bytes()[:-20], b"PAR1" + bytes(100) + b"PAR1"):
        (tmp_path / "a").write_bytes(content)
        assert parquet_groups(path) == []
        assert told(parquet_rows(path, 0, 0, 0, "")) == [(0, "damaged Parquet")]


def test_a_damaged_row_group_is_one_fault_and_the_others_are_read(tmp_path):
    path = write_parquet(
        tmp_path / "a", [{"text": f"{n} {'x' * 1000}"} for n in range(90)], compression="snappy", use_dictionary=False
    )
    offset = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray((tmp_path / "a").read_bytes())
    content[offset : offset + 60] = b"\xff" * 60
    (tmp_path / "a").write_bytes(content)
    rows = list(parquet_rows(path, 0, 0, 0, ""))
    assert [row.number for row in rows] == [*range(30), 30, *range(60, 90)]
    assert [row.number for row in rows if row.fault] == [30]


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_an_arrow_file_that_is_cut_gives_the_batches_before(tmp_path, kind):
    path = write_arrow(tmp_path / "a", kind=getattr(pyarrow.ipc, f"new_{kind}"))
    whole = (tmp_path / "a").read_bytes()
    for size in (0, 3, 20, len(whole) // 2, len(whole) - 1 if kind == "file" else len(whole) * 2 // 3):
        (tmp_path / "a").write_bytes(whole[:size])
        rows = told(arrow_rows(path, 0, 0, 0, ""))
        assert rows == [(n, {"text": f"text {n}"}) for n in range(len(rows) - 1)] + [(len(rows) - 1, "damaged Arrow")]
        assert sum(count for count, _ in arrow_batches(path)) == len(rows) - 1
        assert arrow_batches(path)[-1] == (0, 0)
    assert kind == "file" or len(rows) in (31, 61)


def test_bytes_are_read_as_text_and_those_that_are_not_utf8_are_faults(tmp_path):
    write_parquet(tmp_path / "a", [{"text": b"good"}, {"text": b"\xff"}, {"text": None}, {"text": "ü".encode()}])
    expected = [(0, {"text": "good"}), (1, "not UTF-8"), (2, {"text": None}), (3, {"text": "ü"})]
    assert told(parquet_rows(str(tmp_path / "a"), 0, 0, 0, "")) == expected


def test_a_table_that_is_not_there_is_no_damage(tmp_path):
    for read in (parquet_rows, arrow_rows):
        with pytest.raises(FileNotFoundError):
            list(read(str(tmp_path / "missing"), 0, 0, 0, ""))


def test_csv_through_a_damaged_stream_keeps_the_rows_before(tmp_path):
    import gzip

    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\n" + b"".join(b"row %d\n" % n for n in range(9999)))[:-100])
    with opened(str(tmp_path / "a.csv.gz"), "gz") as stream:
        rows = list(csv_rows(stream, 10**6))
    assert rows[-1] == Row(len(rows) + 1, {}, "damaged gz")
    assert told(rows[:-1]) == [(n + 2, {"text": f"row {n}"}) for n in range(len(rows) - 1)]
    assert len(rows) > 1000


def test_offsets_that_are_damaged_are_faults_and_end_no_process(tmp_path):
    offsets = pyarrow.py_buffer(np.array([0, 1, 2**30, 3, 4], np.int32).tobytes())
    texts = pyarrow.StringArray.from_buffers(4, offsets, pyarrow.py_buffer(b"abcd"))
    batch = pyarrow.RecordBatch.from_arrays([texts], ["text"])
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    rows = told(arrow_rows(str(tmp_path / "a.arrow"), 0, 0, 0, ""))
    assert rows == [(0, {"text": "a"}), (1, "damaged Arrow"), (2, "damaged Arrow"), (3, {"text": "d"})]


def test_a_file_whose_name_is_not_utf8_is_read(tmp_path):
    path = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff"))
    (tmp_path / "a").write_bytes(b"")
    os.rename(write_parquet(tmp_path / "a"), path)
    assert len(list(parquet_rows(path, 0, 0, 0, ""))) == 100
    os.rename(write_arrow(tmp_path / "a"), path)
    assert len(list(arrow_rows(path, 0, 0, 0, ""))) == 100
