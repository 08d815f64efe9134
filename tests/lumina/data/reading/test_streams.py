import bz2
import gzip
import io
import lzma
import os
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.reading import streams
from lumina.data.reading.streams import encoding_of, expansion, lines, opened, sample, shown

COMPRESS = {
    "gz": gzip.compress,
    "xz": lambda content: lzma.compress(content, preset=0),
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


def read(path, encoding):
    with opened(str(path), encoding) as stream:
        return stream.file.read(), stream.damage()


@pytest.fixture(params=COMPRESS)
def compression(request):
    return request.param


def test_streams_in_a_row_are_read_as_one(tmp_path, compression):
    path = tmp_path / "a"
    path.write_bytes(COMPRESS[compression](b"one\n") + COMPRESS[compression](b"") + COMPRESS[compression](b"two\n" * 10_000))
    assert encoding_of(str(path)) == compression
    assert read(path, compression) == (b"one\n" + b"two\n" * 10_000, "")


def test_a_stream_that_is_cut_anywhere_gives_what_came_before_and_says_so(tmp_path, compression):
    content = bytes(range(256)) * 40 + os.urandom(300_000)
    whole = COMPRESS[compression](content)
    for size in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:size])
        before, damage = read(tmp_path / "a", compression)
        assert damage == f"damaged {compression}"
        assert content.startswith(before)
    assert len(before) > 0 or compression in ("xz", "bz2")  # they give a block when all of it is there


def test_garbage_in_a_stream_or_behind_it_is_damage(tmp_path, compression):
    whole = bytearray(COMPRESS[compression](os.urandom(5000)))
    (tmp_path / "behind").write_bytes(bytes(whole) + b"garbage, and more of it")
    whole[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    (tmp_path / "inside").write_bytes(bytes(whole))
    assert read(tmp_path / "behind", compression)[1] == f"damaged {compression}"
    if compression != "zst":  # it has no checksum of its own accord
        assert read(tmp_path / "inside", compression)[1] == f"damaged {compression}"


def test_a_bomb_is_decompressed_in_bounded_memory(tmp_path, compression):
    zeros = bytes(2**27)
    (tmp_path / "a").write_bytes(COMPRESS[compression](zeros))
    del zeros  # 128 MB, of which each format makes a few KB
    tracemalloc.start()
    with opened(str(tmp_path / "a"), compression) as stream:
        first = stream.file.read(10)
        rest = sum(len(piece) for piece in iter(lambda: stream.file.read(2**20), b""))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(first), rest, stream.damage()) == (10, 2**27 - 10, "")
    assert peak < 2**27


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_text_with_a_mark_of_utf16_or_utf32_is_recoded(tmp_path, encoding):
    path = tmp_path / "a"
    path.write_bytes("ein süßer 🐈\n".encode(encoding))
    assert encoding_of(str(path)) == encoding
    assert read(path, encoding) == ("ein süßer 🐈\n".encode(), "")
    path.write_bytes("ein süßer 🐈\n".encode(encoding)[:-1])
    assert read(path, encoding) == ("ein süßer 🐈".encode(), f"not {encoding.upper()}")


@pytest.mark.parametrize("content", [b"", b"BZh is how this text begins", b"text", b"\xef\xbb\xbftext"])
def test_a_text_is_in_no_encoding(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert encoding_of(str(tmp_path / "a.txt")) == ""


def test_the_name_tells_of_a_compression_that_the_content_does_not(tmp_path):
    (tmp_path / "a.jsonl.GZ").write_bytes(b"{}")
    assert encoding_of(str(tmp_path / "a.jsonl.GZ")) == "gz"
    assert read(tmp_path / "a.jsonl.GZ", "gz") == (b"", "damaged gz")


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.integers(1, 12), st.booleans()
)
def test_lines_are_those_of_split_with_long_ones_cut(content, limit, ended):
    whole = b"\n".join(content) + b"\n" * ended
    found = list(lines(io.BytesIO(whole), 0, limit))
    parts = whole.split(b"\n")
    parts = [part + b"\n" for part in parts[:-1]] + [part for part in parts[-1:] if part]
    assert found == [(part[: limit + 1], len(part.removesuffix(b"\n")) <= limit) for part in parts]


def test_a_long_line_is_never_held_whole(monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_BYTES", 1000)

    class Counted(io.BytesIO):
        largest = 0

        def readline(self, size=-1):
            self.largest = max(self.largest, size)
            return super().readline(size)

    file = Counted(b"x" * 100_000 + b"\nshort\n")
    assert list(lines(file, 0, 50)) == [(b"x" * 51, False), (b"short\n", True)]
    assert file.largest == 1000


def test_what_cannot_be_printed_is_escaped_in_one_line():
    assert shown("a\nb\x1b[31m\udcff ü") == "a\\nb\\x1b[31m\\udcff ü"
    assert sample(b"a\xff\n" + b"x" * 1000) == "a\\xff\\n" + "x" * 74 + "..."
    assert sample({"a": "\n"}) == r"{'a': '\n'}"


# -------------------------------------------------------------------------------------------------------- expansion


def prose(lines):
    return "".join(f"line {n} says {n * n} and {n**3 % 9973}\n" for n in range(lines)).encode()


def test_expansion_is_that_of_the_whole_where_it_is_small(tmp_path, compression):
    name, compress = compression, COMPRESS[compression]
    content = prose(3000)
    paths = []
    for part in range(3):
        path = tmp_path / f"{part}.{name}"
        path.write_bytes(compress(content[: len(content) // (part + 1)]))
        paths.append(str(path))
    text = sum(len(content) // (part + 1) for part in range(3))
    assert expansion(paths, name) == pytest.approx(text / sum(map(os.path.getsize, paths)), rel=0.01)


def test_expansion_is_measured_on_a_bounded_beginning(tmp_path, compression, monkeypatch):
    name, compress = compression, COMPRESS[compression]
    monkeypatch.setattr(streams, "MEASURED_BYTES", 2**16)
    path = tmp_path / f"a.{name}"
    random = os.urandom(2**18)
    path.write_bytes(compress(prose(60_000)) + compress(random))
    beginning = len(prose(60_000)) / len(compress(prose(60_000)))
    read = []
    honest = streams._pieces
    monkeypatch.setattr(streams, "_pieces", lambda *about: (read.append(len(piece)) or piece for piece in honest(*about)))
    assert expansion([str(path), str(path)], name) == pytest.approx(beginning, rel=0.15)
    assert 0 < sum(read) < len(prose(60_000))


def test_expansion_of_what_is_damaged_recoded_or_empty(tmp_path):
    damaged, wide, empty = (tmp_path / name for name in ("damaged.gz", "wide", "empty.gz"))
    content = gzip.compress(prose(3000))
    damaged.write_bytes(content[: len(content) // 2])
    wide.write_bytes("a line\n".encode("utf-16") * 5)
    empty.touch()
    assert expansion([str(damaged)], "gz") == pytest.approx(len(prose(3000)) / len(content), rel=0.1)
    assert 0.4 < expansion([str(wide)], "utf-16") < 0.8
    assert expansion([str(empty)], "gz") == 1
