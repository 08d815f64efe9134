import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import socket

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lumina.data.reading import embedded, readers
from lumina.data.reading.readers import Unit, plan, read, spool
from lumina.data.reading.streams import encoding_of
from lumina.data.recipe import Recipe
from lumina.data.records import CONVERSATION, Document, Reject
from lumina.errors import DataError, UsageError

COMPRESS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.ZstdCompressor().compress}


def records(units, recipe=None):
    """All that the units yield, each of them sent through JSON first."""
    sent = [Unit(*json.loads(json.dumps(unit))) for unit in units]
    assert [pickle.loads(pickle.dumps(unit)) for unit in units] == units  # noqa: S301
    return [record for unit in sent for record in read(unit, recipe or Recipe())]


def read_all(*specs, **options):
    recipe = Recipe(**options)
    return records(plan([str(spec) for spec in specs], recipe).units, recipe)


def told(found, base=""):
    """(name without `base`, text or kind of reject) of each record."""
    return [
        (record.name.removeprefix(f"{base}/"), record.text if isinstance(record, Document) else [record.kind])
        for record in found
    ]


def write_jsonl(path, values):
    path.write_bytes(b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in values))
    return path


# ------------------------------------------------------------------------------------------------------------ units

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


@given(LINES, st.integers(1, 60), st.booleans(), st.sampled_from(["jsonl", "lines"]))
def test_lines_cut_in_units_of_any_size_are_those_of_one_unit(tmp_path_factory, lines, size, ended, format_):
    path = tmp_path_factory.getbasetemp() / "property.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ended)
    recipe = Recipe(max_record_mb=80e-6, format=format_)
    with pytest.MonkeyPatch.context() as patch:
        whole = plan([str(path)], recipe)
        patch.setattr(readers, "UNIT_BYTES", size)
        patch.setattr(readers, "READ_BYTES", 7)
        cut = plan([str(path)], recipe)
    assert cut.fingerprint == whole.fingerprint
    assert [unit.number for unit in cut.units] == list(range(len(cut.units)))
    assert sum(unit.bytes for unit in cut.units) == cut.bytes == path.stat().st_size
    assert records(cut.units, recipe) == records(whole.units, recipe)


@given(LINES)
def test_every_line_of_jsonl_is_one_record_by_a_reader_of_a_few_lines(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "oracle.jsonl"
    path.write_bytes(b"\n".join(lines))
    if encoding_of(str(path)):
        return
    expected = []
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > 80 or line.strip():
            expected.append((f"{path}:{number}", line))
    found = read_all(path, max_record_mb=80e-6)
    assert [record.name for record in found] == [name for name, _ in expected]
    for record, (_, line) in zip(found, expected, strict=True):
        if isinstance(record, Document) and record.kind == "text":
            assert json.loads(line)["text"] == record.text


def test_large_files_are_cut_and_small_ones_share_a_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "UNIT_BYTES", 1000)
    for n in range(7):
        (tmp_path / f"{n}.txt").write_text("x" * 300)
        write_jsonl(tmp_path / f"{n}.jsonl", [{"text": str(n)}] * 2)
    write_jsonl(tmp_path / "large.jsonl", [{"text": str(n)} for n in range(200)])
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "x" * 100 + str(n)} for n in range(90)]), tmp_path / "a.pq", 10)
    units = plan([str(tmp_path / pattern) for pattern in ("*.txt", "?.jsonl", "large.jsonl", "a.pq")], Recipe()).units
    assert [len(unit.paths) for unit in units[:4]] == [3, 3, 1, 7]
    large = [unit for unit in units if unit.paths[0].endswith("large.jsonl")]
    assert [unit.start for unit in large[1:]] == [unit.stop for unit in large[:-1]]
    assert all(1000 <= unit.bytes < 1020 for unit in large[:-1])
    groups = [unit for unit in units if unit.format == "parquet"]
    assert len(groups) > 1
    assert [record.name for record in records(groups)] == [f"{tmp_path}/a.pq[{n}]" for n in range(90)]


def test_a_unit_has_no_more_files_than_a_worker_should_read_alone(tmp_path, monkeypatch):
    for n in range(7):
        (tmp_path / f"{n}.txt").write_text(str(n))
    (whole,) = plan([str(tmp_path)], Recipe()).units
    monkeypatch.setattr(readers, "UNIT_FILES", 3)
    units = plan([str(tmp_path)], Recipe()).units
    assert [(unit.number, len(unit.paths), unit.bytes) for unit in units] == [(0, 3, 3), (1, 3, 3), (2, 1, 1)]
    assert tuple(path for unit in units for path in unit.paths) == whole.paths
    assert [unit.name for unit in units] == [unit.paths[0] for unit in units]
    assert records(units) == records([whole])


def test_small_files_of_one_kind_with_another_between_them_keep_their_order(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert told(read_all(tmp_path), tmp_path) == [
        ("a.txt", '{"text": "a.txt"}'),
        ("b.jsonl:1", "b.jsonl"),
        ("c.txt", '{"text": "c.txt"}'),
    ]


def test_progress_is_told_while_a_plan_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PROGRESS_SECONDS", 0)
    (tmp_path / "a.txt").write_bytes(b"x" * 3_000_000)
    said = []
    plan([str(tmp_path / "a.txt")], Recipe(), said.append)
    assert len(said) == 3
    assert said[-1].startswith("looked through 3 of 3 MB, ")


# ------------------------------------------------------------------------------------------------------------- torture


def as_csv(rows):
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def test_the_torture_folder_is_accounted_for_to_the_record(tmp_path):
    large, too_large = "x" * 3000, ["larger than 0.002 MB"]
    good, other = {"text": "good"}, {"text": "other"}
    lines = {
        "empty.jsonl": (b"", []),
        "blank.jsonl": (b"\n  \n\r\n", []),
        "bom.jsonl": (b'\xef\xbb\xbf{"text": "good"}\r\n', [(":1", "good")]),
        "joined.jsonl": (b'\xef\xbb\xbf{"text": "good"}\n\xef\xbb\xbf{"text": "other"}\n', [(":1", "good"), (":2", "other")]),
        "utf8.jsonl": (b'{"text": "\xff"}\n{"text": "good"}', [(":1", ["not UTF-8"]), (":2", "good")]),
        "nul.jsonl": (b'{"text": "a\\u0000"}\n{"text": "a\0"}', [(":1", ["NUL byte"]), (":2", ["not JSON"])]),
        "surrogate.jsonl": (b'{"text": "a\\ud800b"}', [(":1", ["lone surrogate"])]),
        "broken.jsonl": (b'{"text": "a"\n{"text": "good"}\n{}{}', [(":1", ["not JSON"]), (":2", "good"), (":3", ["not JSON"])]),
        "type.jsonl": (b'7\n"x"\nnull\n{"text": 7}\n{"title": ""}', [
            (":1", ["not an object"]), (":2", ["not an object"]), (":3", ["not an object"]),
            (":4", ["text not a string"]), (":5", ["no text field"]),
        ]),
        "void.jsonl": (b'{"text": ""}\n{"text": " \\n"}', [(":1", ["empty text"]), (":2", ["empty text"])]),
        "large.jsonl": (b'{"text": "' + large.encode() + b'"}\n{"text": "good"}', [(":1", too_large), (":2", "good")]),
        "deep.jsonl": (b"[" * 1500 + b"\n" + b"[" * 300 + b"]" * 300, [(":1", ["not JSON"]), (":2", ["not JSON"])]),
        "odd.jsonl": (b'{"text": "a", "text": "b"}\n{"text": "c", "n": NaN}\n{"text": "d", "n": 1e999}', [
            (":1", "b"), (":2", "c"), (":3", "d"),
        ]),
        "utf16.jsonl": ('{"text": "süß"}\n'.encode("utf-16"), [(":1", "süß")]),
        "array.json": (b'[{"text": "good"}, {"text": "\xff"}, {"text": }, 7, {"text": "\\u0000"}, "' + large.encode() + b'"]', [
            ("[0]", "good"), ("[1]", ["not UTF-8"]), ("[2]", ["not JSON"]), ("[3]", ["not an object"]), ("[4]", ["NUL byte"]),
            ("[5]", too_large),
        ]),
        "cut.json": (b'[{"text": "good"}, {"te', [("[0]", "good"), ("[1]", ["not JSON"])]),
        "object.json": (b'{\n "text": "good"\n}\n', [("[0]", "good")]),
        "lines.json": (b'{"text": "good"}\n{"text": "other"}\n', [(":1", "good"), (":2", "other")]),
        "rows.csv": (b'text,id\ngood,1\n\xff,2\n"a"b,3\ntoo,many,4\n,5\na\0,6\n' + large.encode() + b",7\nother,8\n", [
            (":2", "good"), (":3", ["not UTF-8"]), (":4", ["broken quotes"]), (":5", ["not as many columns as the header"]),
            (":6", ["empty text"]), (":7", ["NUL byte"]), (":8", too_large), (":9", "other"),
        ]),
        "rows.tsv": (b"text\tid\ngood, it is\t1\n", [(":2", "good, it is")]),
        "good.txt": (b"\xef\xbb\xbfone\r\ntwo\n", [("", "one\r\ntwo\n")]),
        "utf8.md": (b"\xff", [("", ["not UTF-8"])]),
        "empty.py": (b"", [("", ["empty text"])]),
        "nul.c": (b"a\0", [("", ["NUL byte"])]),
        "large.rst": (large.encode(), [("", too_large)]),
        "utf16.txt": ("süß\n".encode("utf-16"), [("", "süß\n")]),
        "odd16.txt": (b"\xff\xfea", [("", ["not UTF-16"])]),
        "a\nb\x1b.txt": (b"good", [("", "good")]),
    }  # fmt: skip
    for compression, compress in COMPRESS.items():
        whole = compress(b"".join(json.dumps({"text": os.urandom(200).hex()}).encode() + b"\n" for _ in range(4000)) + b"{}")
        lines[f"good.jsonl.{compression}"] = (compress(b'{"text": "good"}\n{'), [(":1", "good"), (":2", ["not JSON"])])
        lines[f"good.txt.{compression}"] = (compress(b"good"), [("", "good")])
        lines[f"no.jsonl.{compression}"] = (b"{}", [(":1", [f"damaged {compression}"])])
        (tmp_path / f"cut.jsonl.{compression}").write_bytes(whole[:-100])
    for name, (content, _) in lines.items():
        (tmp_path / name).write_bytes(content)
    rows = [good, {"text": None}, {"text": "a\0"}, {"text": large}, {"text": " "}, other]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    of_rows = ["good", ["text not a string"], ["NUL byte"], too_large, ["empty text"], "other"]
    lines["rows.parquet"] = (b"", [(f"[{n}]", found) for n, found in enumerate(of_rows)])
    lines["cut.parquet"] = (b"", [("[0]", ["damaged Parquet"])])
    recipe = Recipe(max_record_mb=0.002)
    found = records(plan([str(tmp_path)], recipe).units, recipe)
    cut = {name: [each for each in found if each.name.startswith(f"{tmp_path}/cut.jsonl.{name}:")] for name in COMPRESS}
    for name, kept in cut.items():
        assert [record.name for record in kept] == [f"{tmp_path}/cut.jsonl.{name}:{n}" for n in range(1, len(kept) + 1)]
        assert [record.kind for record in kept if isinstance(record, Reject)] == [f"damaged {name}"]
        assert len(kept) > 1000
    others = [each for each in found if not each.name.startswith(f"{tmp_path}/cut.jsonl.")]
    names = {name: name.replace("\n", "\\n").replace("\x1b", "\\x1b") for name in lines}
    assert told(others, tmp_path) == [(names[name] + at, said) for name in sorted(lines) for at, said in lines[name][1]]
    assert all(record.sample.isprintable() and len(record.sample) <= 400 for record in found if isinstance(record, Reject))


def test_a_reject_shows_how_the_record_begins(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [b'{"text": "\xff\x1b', b'{"text": "a\\u0000 and more"}', b"x" * 5000])
    samples = [record.sample for record in read_all(path, max_record_mb=0.001)]
    assert samples[:2] == ['{"text": "\\xff\\x1b', '{"text": "a\\u0000 and more"}']
    assert samples[2] == "x" * 80 + "..."


# ------------------------------------------------------------------------------------------------ formats and fields


MESSAGES = b'{"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]}'


@pytest.mark.parametrize(
    ("name", "content", "says", "texts"),
    [
        ("a.jsonl", b'{"content": "x"}\n', "jsonl, texts (content)", ["x"]),
        ("a.ndjson", MESSAGES, "jsonl, conversations (messages)", ["q\n\na"]),
        ("a.json", b'[{"prompt": "q", "response": "a"}]', "json, conversations (prompt, response)", ["q\n\na"]),
        ("a.csv", b"title;body\nt;x\n", "csv, texts (body)", ["x"]),
        ("a.md", b"x", "text, a document a file", ["x"]),
        ("Makefile", b"x", "text, a document a file", ["x"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0), "jsonl, gz, texts (text)", ["x"]),
        ("wrongly.jsonl", gzip.compress(b'{"text": "x"}', mtime=0), "jsonl, gz, texts (text)", ["x"]),
        ("unnamed", b'{"text": "x"}\n{"text": "y"}', "jsonl, texts (text)", ["x", "y"]),
        ("unnamed", b' [\n{"text": "x"}]', "json, texts (text)", ["x"]),
        ("unnamed", b"[[wiki]] text", "text, a document a file", ["[[wiki]] text"]),
        ("unnamed", gzip.compress(b"x", mtime=0), "text, gz, a document a file", ["x"]),
        ("unnamed", "süß".encode("utf-16"), "text, utf-16, a document a file", ["süß"]),
        ("a.jsonl", b"[1]", "jsonl, conversations (lists of messages)", None),
        ("a.jsonl", b"{", "jsonl, no record in the first 20", None),
    ],
)  # fmt: skip
def test_format_and_field_are_found_and_stated(tmp_path, name, content, says, texts):
    (tmp_path / name).write_bytes(content)
    planned = plan([str(tmp_path / name)], Recipe())
    assert planned.formats == [f"{tmp_path / name}: {says}"]
    if texts:
        assert [record.text for record in records(planned.units)] == texts


def test_format_and_field_of_the_recipe_go_before_what_is_found(tmp_path):
    path = write_jsonl(tmp_path / "a.txt", [{"text": "no", "prose": "yes"}, {"text": "no"}])
    assert told(read_all(path, format="jsonl", text_field="prose"), tmp_path) == [
        ("a.txt:1", "yes"),
        ("a.txt:2", ["no field prose"]),
    ]
    assert told(read_all(path, format="lines"), tmp_path)[1] == ("a.txt:2", '{"text": "no"}')
    with pytest.raises(UsageError, match=r"--format: 'doc' is no format; there are text, lines, jsonl, json, csv"):
        plan([str(path)], Recipe(format="doc"))


def test_trees_of_replies_are_read_whole_in_any_table(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "UNIT_BYTES", 10)
    messages = [
        {"message_id": "q", "parent_id": None, "role": "prompter", "text": "question"},
        {"message_id": "a", "parent_id": "q", "role": "assistant", "text": "answer"},
    ]
    write_jsonl(tmp_path / "a.jsonl", [messages[0], b"{", messages[1]])
    parquet.write_table(pyarrow.Table.from_pylist(messages), tmp_path / "b.parquet", 1)
    planned = plan([str(tmp_path)], Recipe())
    assert [unit.trees for unit in planned.units] == [True, True]
    found = records(planned.units)
    assert [(each.kind, each.text) for each in found if isinstance(each, Document)] == [
        (CONVERSATION, "question\n\nanswer")
    ] * 2
    assert [(each.name, each.kind) for each in found if isinstance(each, Reject)] == [(f"{tmp_path}/a.jsonl:2", "not JSON")]
    assert {plain.text for plain in read_all(tmp_path / "a.jsonl", text_field="text") if isinstance(plain, Document)} == {
        "question",
        "answer",
    }


def test_a_text_that_is_too_large_for_a_document_is_told_of_before_it_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("x\n" * 1000)
    says = "text, larger than 0.001 MB and thus rejected; with --format lines a line is a document"
    assert plan([str(tmp_path / "a.txt")], Recipe(max_record_mb=0.001)).formats == [f"{tmp_path}/a.txt: {says}"]


# --------------------------------------------------------------------------------------------------- what is named


def test_a_directory_gives_known_files_in_order_and_tells_of_the_others(tmp_path, monkeypatch):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("z.txt", "b/y.py", "b/c/x.md", "a.png", "b/q.bin", "README", ".hidden/a.txt", ".env", "LICENSE"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "again.txt").symlink_to(tmp_path / "z.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        monkeypatch.chdir(tmp_path)  # a socket's path must be short
        bound.bind("socket.txt")
        planned = plan([str(tmp_path)], Recipe())
    assert told(records(planned.units), tmp_path) == [(n, n) for n in ("LICENSE", "README", "z.txt", "b/y.py", "b/c/x.md")]
    assert planned.formats == [
        f"{tmp_path}: 5 files: text, a document a file",
        f"{tmp_path}: 9 passed over: 1 .bin, 1 .png, 1 broken link, 2 hidden, 1 link to a directory already taken, "
        "1 link to a file already taken, 2 socket, pipe or device",
    ]


def test_a_format_takes_the_files_of_a_directory_that_may_have_it(tmp_path):
    for name in ("a.txt", "b.jsonl", "c.csv"):
        (tmp_path / name).write_text('{"text": "x"}')
    assert [record.name for record in read_all(tmp_path, format="lines")] == [f"{tmp_path}/a.txt:1"]
    assert [record.name for record in read_all(tmp_path, format="jsonl")] == [f"{tmp_path}/b.jsonl:1"]


def test_files_come_in_the_order_named_and_those_of_a_glob_by_name(tmp_path, monkeypatch):
    for name in ("b", "a", "z", "c", "a[1]"):
        (tmp_path / f"{name}.txt").write_text(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    specs = (tmp_path / "z.txt", tmp_path / "[bc].txt", "~/a[[]1].txt", "~/a.txt")
    assert [record.text for record in read_all(*specs)] == ["z", "b", "c", "a[1]", "a"]
    assert [record.text for record in read_all(tmp_path / "a[1].txt")] == ["a[1]"]  # a name, before it is a glob


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        (["{}/missing.txt"], "missing.txt: no such file"),
        (["{}/*.jsonl"], "no file matches"),
        (["{}/void"], "holds no file that can be read"),
        (["{}/pictures"], r"holds no file that can be read; .*/pictures: 1 passed over: 1 \.png"),
        (["{}/pictures/a.png"], "of no known format; where it is one, name it with --format"),
        (["{0}/a.txt", "{0}/*.txt"], "names .*a.txt twice"),
        (["{0}/a.txt", "{0}/link.txt"], "names .*a.txt twice"),
        (["{}/link.txt", "{}"], "names .*a.txt twice"),
        (["stdlib", "stdlib"], "names stdlib twice"),
        (["-"], "stdin can be read only once"),
        (["{}/pipe"], "is a socket, pipe or device"),
        (["{}/broken.txt"], "broken.txt: cannot be read: No such file"),
        (["{}/a\n\x1bb.txt"], r"a\\n\\x1bb.txt: no such file"),
        ([], "name nothing"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_before_anything_is_read(tmp_path, specs, says):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "void").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "broken.txt").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=says) as refusal:
        plan([spec.format(tmp_path) for spec in specs], Recipe())
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("named", ["a.txt", ""])
def test_a_file_that_may_not_be_read_is_refused_by_name_at_once(tmp_path, monkeypatch, named):
    (tmp_path / "a.txt").write_text("a")

    def refuse(name, mode):  # not by its mode bits: root reads every file
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("lumina.data.reading.streams.open", refuse, raising=False)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        plan([str(tmp_path / named)], Recipe())


def test_a_directory_that_may_not_be_listed_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"secret: cannot be read: Permission denied"):
        plan([str(tmp_path)], Recipe())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv", "a.json"])
def test_a_file_that_vanishes_after_the_plan_is_an_error_and_no_reject(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": 1}')
    planned = plan([str(path)], Recipe())
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read: "):
        records(planned.units)


def test_stdin_is_spooled_to_a_file_whose_format_is_found(tmp_path):
    path = spool(io.BytesIO(gzip.compress(b'{"text": "x"}\n', mtime=0)), tmp_path)
    assert os.listdir(tmp_path) == ["<stdin>"]
    assert told(read_all(path), tmp_path) == [("<stdin>:1", "x")]


# ----------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_of_contents_their_order_and_formats_wherever_they_lie(tmp_path):
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        for name in ("a.txt", "b.txt", "a.jsonl"):
            (tmp_path / directory / name).write_text("[]" if name != "b.txt" else "{}")
    names = (["a.txt", "b.txt"], ["b.txt", "a.txt"], ["a.jsonl", "b.txt"], ["a.txt"])
    of = [[plan([f"{tmp_path}/{d}/{name}" for name in each], Recipe()).fingerprint for each in names] for d in ("one", "two")]
    assert of[0] == of[1]
    assert len(set(of[0])) == len(names)
    assert plan([f"{tmp_path}/one/a.txt"], Recipe(format="lines")).fingerprint not in of[0]


def test_the_same_bytes_in_another_encoding_have_another_fingerprint(tmp_path):
    content = b'{"text": "x"}\n'
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz"):
        (tmp_path / name).write_bytes(content)
    of = [plan([f"{tmp_path}/{name}"], Recipe()).fingerprint for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz")]
    assert len(set(of)) == 3
    plain = hashlib.sha256(b"jsonl" + hashlib.sha256(content).digest()).digest()
    assert of[0] == hashlib.sha256(plain).hexdigest()


def test_synthetic_text_never_changes():
    assert plan(["synthetic"], Recipe()).fingerprint == "10e5366954c1a58238bcf3652887b1fcbaf06db957a71f47dc32aa438d27c196", (
        "tests and published figures rely on this text: if the change was meant, say so in CHANGELOG.md and pin the new one"
    )


# --------------------------------------------------------------------------------------------------------- embedded


def test_stdlib_is_python_files_in_order_of_path_whatever_the_units(monkeypatch):
    whole = plan(["stdlib"], Recipe())
    monkeypatch.setattr(readers, "UNIT_BYTES", 2**20)
    cut = plan(["stdlib"], Recipe())
    documents = records(cut.units)
    assert len(cut.units) > 5 > len(whole.units)
    assert cut.fingerprint == whole.fingerprint
    assert documents == records(whole.units)
    names = [document.name for document in documents]
    assert names == sorted(names) == embedded.stdlib_names()
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not {part for name in names for part in name.split("/")[:-1]} & embedded.NOT_STDLIB
    assert sum(len(document.text.encode()) for document in documents if isinstance(document, Document)) > 5e6
    text = (embedded.stdlib_root() / "argparse.py").read_text("utf-8")
    assert documents[names.index("argparse.py")] == Document("argparse.py", text)


def test_stdlib_files_are_decoded_as_their_cookie_says_and_others_rejected(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "wrong.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: klingon\n")
    (tmp_path / "void.py").write_bytes(b"")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    wrong = ["not in its declared encoding"]
    expected = [
        ("latin.py", "# coding: latin-1\nname = 'é'\n"),
        ("unknown.py", wrong),
        ("void.py", ["empty text"]),
        ("wrong.py", wrong),
    ]
    assert told(read_all("stdlib")) == expected


def test_a_python_without_source_files_says_what_else_to_use(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"no \.py files; use synthetic"):
        plan(["stdlib"], Recipe())


def test_synthetic_documents_are_two_thousand_different_true_programs():
    documents = [document.text for document in read_all("synthetic")]
    assert len(set(documents)) == 2000
    for text in documents[:50]:
        definition, calls = text.split("\n\n")
        scope = {}
        exec(definition, scope)  # noqa: S102
        assert all(eval(call, scope) for call in calls.splitlines())  # noqa: S307


@pytest.fixture
def made(tmp_path):
    """A folder with a text and a prepared directory, whose manifest and samples could be read as records."""
    directory = tmp_path / "texts" / "made"
    (directory / "tokenizer").mkdir(parents=True)
    for name in ("manifest.json", "samples.json"):
        (directory / name).write_text('{"text": "of a prepared directory"}')
    (tmp_path / "texts" / "a.txt").write_text("a text")
    return directory


def test_a_prepared_directory_is_refused_as_a_source_by_name(made):
    with pytest.raises(DataError, match=f"^{made}: is a prepared directory.*alone, or in a mixture such as {made}@1,OTHER@1"):
        plan([str(made.parent / "a.txt"), str(made)], Recipe())


def test_one_that_was_stopped_is_refused_too(made):
    (made / "manifest.json").unlink()
    (made / "work").mkdir()
    (made / "work" / "order.json").write_text("{}")
    with pytest.raises(DataError, match=f"^{made}: is being prepared, or was stopped; the command that began it goes on"):
        plan([str(made)], Recipe())
    assert len(read_all(made.parent)) == 1


def test_one_below_a_folder_is_passed_over_and_told(made):
    assert [record.text for record in read_all(made.parent)] == ["a text"]
    assert f"{made.parent}: 1 passed over: 1 prepared directory" in plan([str(made.parent)], Recipe()).formats


def test_a_folder_with_a_manifest_of_something_else_is_a_source(made):
    (made / "tokenizer").rmdir()
    assert [record.text for record in read_all(made)] == ["of a prepared directory"] * 2
