import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.config import DataConfig
from lumina.data.sources import TEXT_FIELDS, open_source, place
from lumina.errors import DataError


def read(source, **fields):
    """The texts of a source, and its rejects."""
    opened = open_source(DataConfig(source=str(source), **fields))
    return [document.text for document in opened], opened.rejects


def write_jsonl(path, records):
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    return path


# ------------------------------------------------------------------------------------------- the standard library


def test_stdlib_has_over_five_megabytes_of_python_in_order_of_path():
    documents = list(open_source(DataConfig(source="stdlib")))
    names = [document.name for document in documents]
    assert sum(len(document.text.encode()) for document in documents) > 5e6
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)


def test_stdlib_leaves_out_tests_and_installed_packages():
    parts = {part for document in open_source(DataConfig(source="stdlib")) for part in document.name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def test_stdlib_files_are_decoded_as_their_cookie_says_and_others_rejected(tmp_path, monkeypatch):
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "wrong.py").write_bytes(b"name = '\xe9'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: klingon\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    texts, rejects = read("stdlib")
    assert texts == ["# coding: latin-1\nname = 'é'\n"]
    assert rejects.counts == {"not in its declared encoding": 2}


def test_a_python_without_source_files_says_what_else_to_use(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"no \.py files; use synthetic"):
        open_source(DataConfig(source="stdlib"))


# ------------------------------------------------------------------------------------------------------- synthetic


def test_synthetic_text_never_changes():
    source = open_source(DataConfig(source="synthetic"))
    assert source.fingerprint == "10e5366954c1a58238bcf3652887b1fcbaf06db957a71f47dc32aa438d27c196", (
        "tests and published figures rely on this text: if the change was meant, say so in CHANGELOG.md and pin the new one"
    )


def test_synthetic_documents_are_two_thousand_different_true_programs():
    documents = [document.text for document in open_source(DataConfig(source="synthetic"))]
    assert len(set(documents)) == 2000
    for text in documents[:50]:
        definition, calls = text.split("\n\n")
        scope = {}
        exec(definition, scope)  # noqa: S102
        assert all(eval(call, scope) for call in calls.splitlines())  # noqa: S307


# ----------------------------------------------------------------------------------------------------------- files


def test_a_text_file_is_one_document_kept_to_the_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\n\tüß\n".encode())
    assert read(path)[0] == ["one\r\ntwo\n\n\tüß\n"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    assert read(f"{tmp_path}/a.txt,{tmp_path}/b.jsonl")[0] == ["one", "two"]


@pytest.mark.parametrize("name", TEXT_FIELDS)
def test_text_is_found_in_each_usual_field(tmp_path, name):
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"id": "x", name: "found"}]))[0] == ["found"]


def test_the_first_usual_field_wins_whatever_the_order_in_the_record(tmp_path):
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"output": "o", "content": "c", "body": "b"}]))[0] == ["c"]


def test_a_named_field_replaces_the_usual_ones(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "prose": "yes"}, {"text": "no"}])
    texts, rejects = read(path, text_field="prose")
    assert texts == ["yes"]
    assert rejects.counts == {"no field prose": 1}


REJECTS = {
    "not UTF-8": b'{"text": "\xff"}',
    "not JSON": b'{"text": "x"',
    "not an object": b'["text"]',
    "no text field": b'{"title": "x"}',
    "text not a string": b'{"text": 7}',
    "empty text": b'{"text": " \\n"}',
    "NUL byte": b'{"text": "a\\u0000b"}',
    "lone surrogate": b'{"text": "a\\ud800b"}',
}


@pytest.mark.parametrize("kind", REJECTS)
def test_a_bad_record_is_counted_named_and_skipped(tmp_path, kind):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "before"}, REJECTS[kind], {"text": "after"}])
    texts, rejects = read(path)
    assert texts == ["before", "after"]
    assert rejects.counts == {kind: 1}
    assert rejects.examples == [f"{path}:2: {kind}"]


def test_brackets_nested_deeper_than_the_stack_are_a_bad_record(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [b'{"text":' + b"[" * 200_000, {"text": "after"}])
    texts, rejects = read(path)
    assert texts == ["after"]
    assert rejects.counts == {"not JSON": 1}


def test_a_text_file_that_is_not_utf8_is_a_reject(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "b.txt").write_text("good")
    texts, rejects = read(tmp_path / "*.txt")
    assert texts == ["good"]
    assert rejects.examples == [f"{tmp_path}/a.txt: not UTF-8"]


def test_every_kind_is_counted_but_only_the_first_few_are_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [b"{"] * 100 + [b"[]"] * 2)
    _, rejects = read(path)
    assert rejects.counts == {"not JSON": 100, "not an object": 2}
    assert rejects.examples == [f"{path}:{n}: not JSON" for n in (1, 2, 3)] + [f"{path}:{n}: not an object" for n in (101, 102)]


def test_a_second_iteration_counts_anew(tmp_path):
    source = open_source(DataConfig(source=str(write_jsonl(tmp_path / "a.jsonl", [b"{", {"text": "x"}]))))
    assert list(source) == list(source)
    assert source.rejects.counts == {"not JSON": 1}


def test_blank_lines_are_no_records(tmp_path):
    texts, rejects = read(write_jsonl(tmp_path / "a.jsonl", [b"", {"text": "x"}, b"  ", b""]))
    assert texts == ["x"]
    assert rejects.counts == {}


# --------------------------------------------------------------------------------------------------- what is named


def test_files_come_in_the_order_named_and_those_of_a_glob_by_name(tmp_path):
    for name in ("b", "a", "z", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert read(f"{tmp_path}/z.txt, {tmp_path}/[a-c].txt")[0] == ["z", "a", "b", "c"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("bracket")
    assert read(tmp_path / "a[1].txt")[0] == ["bracket"]


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("home")
    assert read("~/a.txt")[0] == ["home"]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{}/missing.txt", "missing.txt: no such file"),
        ("{}/*.jsonl", "no file matches"),
        ("{}", "is a directory; name its files"),
        ("{}/table.csv", r"must end in \.txt .* or \.jsonl"),
        ("{}/*", r"must end in \.txt .* or \.jsonl"),
        ("{0}/a.txt,{0}/*.txt", "names .*a.txt twice"),
        ("stdlib,stdlib", "names stdlib twice"),
        (" , ", "names nothing"),
        ("", "names nothing"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused_before_anything_is_read(tmp_path, spec, says):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match=says) as refusal:
        open_source(DataConfig(source=spec.format(tmp_path)))
    assert "\n" not in str(refusal.value)


def test_an_unreadable_file_is_refused_by_name_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def refuse(name, mode):  # not by its mode bits: root reads every file
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("lumina.data.sources.open", refuse, raising=False)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        open_source(DataConfig(source=str(tmp_path / "a.txt")))


def test_a_file_that_vanishes_meanwhile_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    source = open_source(DataConfig(source=str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/a.txt: cannot be read")):
        list(source)


# ------------------------------------------------------------------------------------- fingerprints and held-out place


def test_the_fingerprint_is_of_the_content_wherever_it_lies(tmp_path):
    for directory, text in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "a.txt").write_text(text)
    one, two, three = (open_source(DataConfig(source=f"{tmp_path}/{d}/a.txt")).fingerprint for d in ("one", "two", "three"))
    assert one == two != three


def test_the_fingerprint_depends_on_the_order_and_the_kind_of_files(tmp_path):
    for name in ("a.txt", "b.txt", "a.jsonl"):
        (tmp_path / name).write_text("[]" if name != "b.txt" else "{}")
    specs = ("a.txt,b.txt", "b.txt,a.txt", "a.jsonl,b.txt", "a.txt")
    sources = [",".join(f"{tmp_path}/{name}" for name in spec.split(",")) for spec in specs]
    assert len({open_source(DataConfig(source=source)).fingerprint for source in sources}) == len(sources)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_has_one_place_from_0_to_below_1(text):
    assert 0 <= place(text) < 1


def test_places_never_change_and_are_even():
    # sha256("abc") begins with ba7816bf.
    assert int(place("abc") * 2**32) == 0xBA7816BF
    assert sum(place(str(n)) < 0.1 for n in range(10_000)) == pytest.approx(1000, rel=0.1)
