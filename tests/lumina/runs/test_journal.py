"""JSON lines while the process dies within a line, the disk fills up, and bits rot."""

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.runs import journal as module
from lumina.runs.journal import Journal, read_json_lines, trim_after


class Disk:
    """Takes `room` more bytes, and then what fits of a line, and then none; None is room for all."""

    def __init__(self, patch):
        self.room = None
        self._write = os.write
        patch.setattr(os, "write", self.write)

    def write(self, fd, data):
        if self.room is None:
            return self._write(fd, data)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(fd, data[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.jsonl"


@pytest.fixture
def said():
    return []


def lines(path):
    """Steps of the records in a file of which every line is whole."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.split("\n")[:-1]]


def position_of(path):
    content = path.read_bytes() if path.exists() else b""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def refuse(*_):
    raise OSError(errno.EIO, "Input/output error")


def test_records_are_lines_that_read_back_in_order(path, said):
    records = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "layers": [1, [2.5]]}, {"step": 3, "text": "é\n\r\u2028"}]
    journal = Journal(path, said.append)
    for record in records:
        journal.append(record)
    assert path.read_bytes().count(b"\n") == 3
    assert read_json_lines(path) == records
    assert said == []


def test_a_record_that_is_not_json_changes_nothing(path, said):
    journal = Journal(path, said.append)
    journal.append({"step": 1})
    with pytest.raises(TypeError):
        journal.append({"step": {2}})
    assert lines(path) == [1]
    assert journal.position() == position_of(path)


def test_a_journal_goes_on_behind_what_is_there(path, said):
    Journal(path, said.append).append({"step": 1})
    Journal(path, said.append).append({"step": 2})
    assert lines(path) == [1, 2]


def test_opening_makes_no_file(path, said):
    Journal(path, said.append, step=5)
    assert not path.exists()


# --------------------------------------------------------------------------------------------------- what is not whole


@pytest.mark.parametrize("half", ['{"step": 3, "lo', "{", '{"step": 3}', "3", "\0\0\0\0"])
def test_half_a_line_at_the_end_is_dropped(path, said, half):
    path.write_text('{"step": 2}\n' + half)
    journal = Journal(path, said.append)
    assert journal.position() == position_of(path)
    journal.append({"step": 3})
    assert lines(path) == [2, 3]


@pytest.mark.parametrize("garbage", [b"\xff\xfe\0", b"{", b"", b"\0" * 100, b"7", b"null", b'"step"', b"[" * 100_000])
def test_garbage_in_the_middle_is_dropped_and_what_follows_it_stays(path, said, garbage):
    path.write_bytes(b'{"step": 1}\n' + garbage + b'\n{"step": 3}\n')
    journal = Journal(path, said.append)
    journal.append({"step": 4})
    assert lines(path) == [1, 3, 4]
    assert journal.position() == position_of(path)


def test_reading_passes_over_what_is_not_whole(path):
    path.write_bytes(b'{"step": 1}\n\xff\n7\nnull\n{"step": 2}\n{"step": 3')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_reading_no_file_gives_no_records(path):
    assert read_json_lines(path) == []


# ------------------------------------------------------------------------------------------------------------ trimming


def test_trimming_drops_later_records_and_keeps_the_others_byte_for_byte(path):
    kept = '{"kind": "train", "step": 2, "loss": 1.50}\n{"step": 3}\n'
    path.write_text(kept + '{"step": 4}\n{"step": 10}\n')
    assert b"".join(trim_after(path, 3)).decode() == kept
    assert path.read_text() == kept


def test_later_records_are_dropped_wherever_they_are(path):
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 9, 2, 8, 3)))
    trim_after(path, 3)
    assert lines(path) == [1, 2, 3]


@pytest.mark.parametrize("record", ['{"other": 1}', '{"step": "2"}', '{"step": null}'])
def test_a_record_of_no_step_goes_only_when_steps_are_trimmed(path, record):
    path.write_text(record + "\n")
    trim_after(path)
    assert path.read_text() == record + "\n"
    trim_after(path, 9)
    assert path.read_text() == ""


def test_trimming_leaves_no_other_file(path):
    path.write_text('{"step": 1}\n?\n{"step": 2}\n')
    trim_after(path, 9)
    assert list(path.parent.iterdir()) == [path]


def test_trimming_to_the_beginning_leaves_an_empty_file(path):
    path.write_text('{"step": 1}\n')
    trim_after(path, 0)
    assert path.read_bytes() == b""


def test_what_needs_no_trimming_is_not_written(path, monkeypatch):
    path.write_text('{"step": 1}\n')
    before = path.stat()
    trim_after(path, 1)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_the_file_is_never_half_rewritten(path, monkeypatch):
    before = b'{"step": 1}\n?\n{"step": 2}\n'
    path.write_bytes(before)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Input/output"):
        trim_after(path, 2)
    assert (path.read_bytes(), list(path.parent.iterdir())) == (before, [path])


def test_a_run_that_goes_back_makes_its_later_records_again(path, said):
    journal = Journal(path, said.append)
    for step in (1, 2, 3, 4):
        journal.append({"step": step})
    journal.trim(2)
    assert journal.position() == position_of(path)
    for step in (3, 4):
        journal.append({"step": step})
    assert lines(path) == [1, 2, 3, 4]
    assert journal.position() == position_of(path)


def test_going_back_keeps_the_earlier_ones_of_the_lines_that_wait(path, said, disk):
    journal = Journal(path, said.append)
    disk.room = 0
    for step in (1, 2, 3):
        journal.append({"step": step})
    journal.trim(2)
    disk.room = None
    journal.append({"step": 3})
    assert lines(path) == [1, 2, 3]
    assert journal.position() == position_of(path)


@pytest.mark.parametrize("damage", ["", "?\n"])
def test_a_file_that_cannot_be_trimmed_at_first_is_trimmed_before_the_next_line(path, said, monkeypatch, damage):
    content = '{"step": 1}\n' + damage + '{"step": 2}\n{"step": 3}\n{"st'
    path.write_text(content)
    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", refuse)
        patch.setattr(os, "replace", refuse)
        journal = Journal(path, said.append, step=2)
        journal.append({"step": 3})
        position = journal.position()
        assert path.read_text() == content
    journal.append({"step": 4})
    assert lines(path) == [1, 2, 3, 4]
    assert journal.position() == position_of(path)
    os.truncate(path, position["bytes"])
    assert (lines(path), position_of(path)) == ([1, 2, 3], position)
    assert [line.partition(": ")[2].partition(" ")[0] for line in said] == ["cannot", "takes"]


def test_going_back_less_far_brings_back_nothing_that_could_not_be_trimmed_before(path, said, monkeypatch):
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", refuse)
        journal = Journal(path, said.append, step=1)
        for step in (2, 3):
            journal.append({"step": step, "made": "again"})
        journal.trim(2)
    journal.append({"step": 3})
    assert lines(path) == [1, 2, 3]
    assert "again" in read_json_lines(path)[1].values()
    assert journal.position() == position_of(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_null_since_json_has_no_word_for_it(path, said, number):
    Journal(path, said.append).append({"step": 1, "layers": [1.5, (number,)], "loss": number})
    assert path.read_text() == '{"step": 1, "layers": [1.5, [null]], "loss": null}\n'


# ------------------------------------------------------------------------------------------------------- a disk that is full


def test_lines_wait_for_a_full_disk_and_arrive_in_order(path, said, disk):
    journal = Journal(path, said.append)
    journal.append({"step": 1})
    disk.room = 0
    for step in (2, 3):
        journal.append({"step": step})
    assert lines(path) == [1]
    disk.room = None
    journal.append({"step": 4})
    assert lines(path) == [1, 2, 3, 4]


def test_a_full_disk_is_told_once_and_so_is_its_end(path, said, disk):
    journal = Journal(path, said.append)
    for _ in range(2):
        disk.room = 0
        for step in (1, 2, 3):
            journal.append({"step": step})
        disk.room = None
        journal.append({"step": 4})
        journal.append({"step": 5})
    refused = f"{path}: cannot be written (No space left on device); training goes on, its lines wait in memory"
    assert said == [refused, f"{path}: takes lines again, nothing is lost"] * 2


@pytest.mark.parametrize("room", range(1, 12))
def test_a_disk_that_fills_up_within_a_line_is_left_without_half_of_it(path, said, disk, room):
    journal = Journal(path, said.append)
    journal.append({"step": 1})
    disk.room = room
    journal.append({"step": 2})
    assert lines(path) == [1]
    disk.room = None
    journal.append({"step": 3})
    assert lines(path) == [1, 2, 3]


def test_half_a_line_that_cannot_be_taken_back_at_once_goes_before_the_next(path, said, disk, monkeypatch):
    journal = Journal(path, said.append, step=0)
    journal.append({"step": 1})
    disk.room = 5
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        journal.append({"step": 2})
    disk.room = None
    journal.append({"step": 3})
    assert lines(path) == [1, 2, 3]
    assert journal.position() == position_of(path)


@pytest.mark.parametrize("name", ["open", "fstat", "write", "close", "fsync"])
def test_whatever_the_disk_refuses_training_goes_on(path, said, monkeypatch, name):
    journal = Journal(path, said.append)
    real = os.close
    with monkeypatch.context() as patch:
        patch.setattr(os, name, lambda fd, *_: (real(fd) if name == "close" else None, refuse()))
        journal.append({"step": 1})
        journal.position()
    journal.append({"step": 2})
    assert set(lines(path)) == {1, 2}
    assert "Input/output error" in said[0]


def test_a_journal_in_a_directory_that_is_gone_waits_for_it(tmp_path, said):
    journal = Journal(tmp_path / "gone" / "x.jsonl", said.append)
    journal.append({"step": 1})
    journal.position()
    (tmp_path / "gone").mkdir()
    journal.append({"step": 2})
    assert lines(tmp_path / "gone" / "x.jsonl") == [1, 2]
    assert len(said) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_device_that_is_always_full_stops_nothing(said):
    journal = Journal(Path("/dev/full"), said.append)
    for step in range(10):
        journal.append({"step": step})
        journal.position()
    assert said == ["/dev/full: cannot be written (No space left on device); training goes on, its lines wait in memory"]


def test_of_more_lines_than_may_wait_the_oldest_go_and_are_counted(path, said, disk, monkeypatch):
    monkeypatch.setattr(module, "WAITING", 3)
    journal = Journal(path, said.append)
    disk.room = 0
    for step in range(5):
        journal.append({"step": step})
    disk.room = None
    journal.append({"step": 5})
    assert lines(path) == [3, 4, 5]
    assert said[1:] == [f"{path}: takes lines again; 3 lines are lost"]


def test_lost_lines_are_told_only_once(path, said, disk, monkeypatch):
    monkeypatch.setattr(module, "WAITING", 3)
    journal = Journal(path, said.append)
    for steps in (range(5), range(2)):
        disk.room = 0
        for step in steps:
            journal.append({"step": step})
        disk.room = None
        journal.append({"step": 9})
    assert said[1::2] == [
        f"{path}: takes lines again; 3 lines are lost",
        f"{path}: takes lines again, nothing is lost",
    ]


# ------------------------------------------------------------------------------------------------------------- position


def test_position_is_the_length_and_hash_of_the_file(path, said):
    path.write_text('{"step": 0}\n{"st')
    journal = Journal(path, said.append)
    for step in range(3):
        assert journal.position() == position_of(path)
        journal.append({"step": step, "text": "é"})
    assert journal.position() == position_of(path)


def test_position_counts_the_lines_that_wait(path, said, disk):
    journal = Journal(path, said.append)
    disk.room = 0
    journal.append({"step": 1})
    waiting = journal.position()
    disk.room = None
    assert journal.position() == waiting == position_of(path)


def test_position_syncs_the_file(path, said, monkeypatch):
    journal = Journal(path, said.append)
    journal.append({"step": 1})
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    journal.position()
    assert synced == [path.stat().st_ino]


ACTIONS = st.one_of(
    st.tuples(st.just("room"), st.none() | st.integers(0, 40)),
    st.tuples(st.just("append"), st.just(0)),
    st.tuples(st.just("position"), st.just(0)),
    st.tuples(st.just("back"), st.integers(0, 5)),
    st.tuples(st.just("killed"), st.integers(0, 12)),
)


@given(st.lists(ACTIONS, max_size=30))
@settings(max_examples=100)
def test_whatever_happens_the_file_holds_each_step_once_in_order(actions):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        path, disk, step = Path(directory) / "x.jsonl", Disk(patch), 0
        journal = Journal(path, lambda _: None)
        for action, value in actions:
            if action == "room":
                disk.room = value
            elif action == "append":
                step += 1
                journal.append({"step": step})
            elif action == "position":
                journal.position()
            elif action == "back":
                step = max(0, step - value)
                journal.trim(step)
            else:  # and begins again from the last step on disk, behind half a line
                step = max([record["step"] for record in read_json_lines(path)], default=0)
                with path.open("ab") as file:
                    file.write(b'{"step": 99}\n'[:value])
                journal = Journal(path, lambda _: None, step)
            on_disk = [record["step"] for record in read_json_lines(path)]
            assert on_disk == list(range(1, len(on_disk) + 1))
        disk.room = None
        journal.append({"step": step + 1})
        assert lines(path) == list(range(1, step + 2))
        assert journal.position() == position_of(path)
