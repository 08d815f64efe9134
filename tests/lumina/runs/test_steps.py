"""Checkpoints on disk, while the machine dies, the disk fills up, bits rot and people put things in their way."""

import contextlib
import hashlib
import itertools
import json
import os
import resource
import shutil

import pytest

from lumina.errors import CheckpointError
from lumina.runs import steps as module
from lumina.runs.steps import Steps

FILES = {"weights": bytes(range(256)) * 5, "state/deep/0": b"\x01" * 333, "state/.hidden": b"x", "empty": b""}
CALLS = ("fsync", "rename", "mkdir", "rmdir", "unlink")  # what changes the disk, but for what is in a file


class MachineDies(BaseException):
    pass


def fill(directory, step=0):
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content + b"s" * step)
    (directory / "empty").write_bytes(b"")


def write(steps, *numbers):
    for step in numbers:
        fill(steps.begin(step), step)
        steps.commit(step, {"note": "é"})


def fails(*_):
    raise OSError(5, "I/O error")


def replace(path, make):
    """Something else in the place of what is at `path`."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


def forge(steps, step, **changes):
    """A manifest whose hash is right, as one who means harm writes it."""
    path = steps.directory(step) / "manifest.json"
    body = json.loads(path.read_text())["manifest"] | changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"manifest": body, "sha256": digest}))


@contextlib.contextmanager
def cut_off(at, error, after):
    """The call number `at` of those that change the disk raises, before or `after` it did its work; yields whether one did."""
    calls, raised = itertools.count(), []

    def wrap(real):
        def call(*args, **kwargs):
            if raised or next(calls) != at:
                return real(*args, **kwargs)
            raised.append(True)
            if after:
                real(*args, **kwargs)
            raise error

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(getattr(os, name)))
        with contextlib.suppress(type(error)):
            yield raised


@pytest.fixture
def steps(tmp_path):
    return Steps(tmp_path / "checkpoints")


every_end = pytest.mark.parametrize(
    ("error", "after"), [(MachineDies(), False), (MachineDies(), True), (OSError(5, "I/O error"), False)]
)


# -------------------------------------------------------------------------------------------------------- writing


def test_a_committed_step_exists_and_verifies(steps):
    write(steps, 0, 7, 10)
    assert steps.all() == [0, 7, 10]
    assert [steps.verify(step) for step in steps.all()] == [[], [], []]
    assert (steps.directory(7) / "state/deep/0").read_bytes() == FILES["state/deep/0"] + b"s" * 7


def test_the_manifest_returns_what_was_recorded_with_size_and_hash_of_each_file(steps):
    write(steps, 7)
    manifest = steps.manifest(7)
    assert (manifest["step"], manifest["note"]) == (7, "é")
    assert manifest["files"].keys() == FILES.keys()
    content = FILES["weights"] + b"s" * 7
    assert manifest["files"]["weights"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_step_does_not_exist_before_its_commit(steps):
    fill(steps.begin(7))
    assert steps.all() == []


def test_a_directory_that_is_not_there_holds_no_steps(steps):
    assert (steps.all(), steps.pinned(), steps.broken(), steps.superfluous(None)) == ([], set(), [], [])
    steps.clean()
    assert not steps.path.exists()


def test_begin_forgets_what_an_earlier_attempt_wrote(steps):
    fill(steps.begin(7))
    assert list(steps.begin(7).iterdir()) == []


def test_an_abandoned_step_leaves_nothing(steps):
    fill(steps.begin(7))
    steps.abandon(7)
    assert list(steps.path.iterdir()) == []


@every_end
def test_a_commit_that_ends_anywhere_leaves_the_step_whole_or_invisible(tmp_path, error, after):
    for at in itertools.count():
        steps = Steps(tmp_path / str(at))
        write(steps, 1)
        with cut_off(at, error, after) as raised:
            write(steps, 2)
        assert steps.all() in ([1], [1, 2])
        assert [steps.verify(step) for step in steps.all()] == [[]] * len(steps.all())
        steps.clean()
        assert sorted(path.name for path in steps.path.iterdir()) == [str(step) for step in steps.all()]
        if not raised:
            break
    assert at > 10  # calls that were cut off
    assert steps.all() == [1, 2]


@pytest.mark.parametrize("room", [0, 1, 100, 700])
def test_a_disk_that_fills_up_within_the_manifest_leaves_the_older_steps(steps, room):
    write(steps, 1)
    fill(steps.begin(2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            steps.commit(2, {"note": "long" * 500})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (steps.all(), steps.verify(1)) == ([1], [])


def test_a_commit_that_the_disk_refused_may_be_tried_again(steps, monkeypatch):
    fill(steps.begin(2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="I/O error"):
            steps.commit(2, {})
    steps.commit(2, {})
    assert (steps.all(), steps.verify(2)) == ([2], [])


def test_a_step_that_exists_is_not_overwritten(steps):
    write(steps, 2)
    before = steps.manifest(2)
    (steps.begin(2) / "other").touch()
    with pytest.raises(OSError, match="not empty"):
        steps.commit(2, {})
    assert (steps.manifest(2), steps.verify(2)) == (before, [])


def test_a_link_among_the_files_is_not_committed(steps, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"x")
    (steps.begin(2) / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="not a regular file"):
        steps.commit(2, {})
    assert steps.all() == []


def inode(path):
    return path.stat().st_ino


def trace(monkeypatch):
    """The calls that order what reaches the disk, as (name, inode that a sync is of)."""
    calls = []

    def record(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls.append((name, os.fstat(args[0]).st_ino if name == "fsync" else None))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "unlink", "rmdir"):
        record(name)
    return calls


def test_all_of_a_step_is_synced_before_the_rename_and_the_rename_after_it(steps, monkeypatch):
    fill(steps.begin(2))
    calls = trace(monkeypatch)
    steps.commit(2, {})
    renamed = calls.index(("rename", None))
    synced = {number for name, number in calls[:renamed] if name == "fsync"}
    directory = steps.directory(2)
    assert {inode(path) for path in [directory, *directory.rglob("*")]} <= synced
    assert ("fsync", inode(steps.path)) in calls[renamed:]


def test_a_file_is_synced_before_the_directories_that_name_it(steps, monkeypatch):
    fill(steps.begin(2))
    calls = trace(monkeypatch)
    steps.commit(2, {})
    synced = [number for name, number in calls if name == "fsync"]
    for path in steps.directory(2).rglob("*"):
        assert synced.index(inode(path)) < synced.index(inode(path.parent))


# -------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["weights", "state/deep/0", "state/.hidden"])
def test_a_flipped_bit_in_any_file_is_found(steps, name):
    write(steps, 7)
    path = steps.directory(7) / name
    whole = path.read_bytes()
    for position in {0, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        assert steps.verify(7) == [f"{name}: its contents changed"]
        assert steps.verify(7, contents=False) == []
    path.write_bytes(whole)
    assert steps.verify(7) == []


def test_a_flipped_bit_in_the_manifest_is_found_or_changes_nothing(steps):
    write(steps, 7)
    path = steps.directory(7) / "manifest.json"
    whole, before, found = path.read_bytes(), steps.manifest(7), 0
    for position, bit in itertools.product(range(len(whole)), (2, 5)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        wrong = steps.verify(7, contents=False)
        found += bool(wrong)
        assert wrong or steps.manifest(7) == before
        assert all(line.startswith("manifest.json: not a manifest that can be trusted (") for line in wrong)
    assert found > 1.9 * len(whole)


def test_a_manifest_cut_short_anywhere_is_found(steps):
    write(steps, 7)
    path = steps.directory(7) / "manifest.json"
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # the last byte ends its last line
        path.write_bytes(whole[:length])
        assert steps.verify(7)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"3", b'{"manifest": 3, "sha256": ""}', b"\0" * 600, b"[" * 100_000])
def test_what_is_no_manifest_is_said_to_be_none(steps, content):
    write(steps, 7)
    (steps.directory(7) / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoints/7/manifest\.json: not a manifest that can be trusted \(.+\)$"):
        steps.manifest(7)


def test_the_manifest_of_another_step_is_refused(steps):
    write(steps, 7, 8)
    shutil.copy(steps.directory(7) / "manifest.json", steps.directory(8))
    assert steps.verify(8) == ["manifest.json: not a manifest that can be trusted (it is of step 7, format 1)"]


@pytest.mark.parametrize("name", ["../7/weights", "/etc/passwd", "state/../../8/weights", "..\\x", ".."])
def test_a_manifest_that_leads_outside_the_step_is_refused(steps, name):
    write(steps, 7, 8)
    forge(steps, 7, files={name: {"bytes": 1, "sha256": "0" * 64}})
    assert "leads outside" in "".join(steps.verify(7))


@pytest.mark.parametrize("files", [["weights"], None, {"weights": 3}, {"weights": {"bytes": 3}}, {"weights": {"sha256": "0"}}])
def test_a_manifest_of_another_form_is_refused(steps, files):
    write(steps, 7)
    forge(steps, 7, files=files)
    assert "not a manifest that can be trusted" in "".join(steps.verify(7))


def test_a_manifest_of_another_format_is_refused(steps):
    write(steps, 7)
    forge(steps, 7, format=2)
    assert "format 2" in "".join(steps.verify(7))


@pytest.mark.parametrize("contents", [True, False])
@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("weights", lambda path: os.truncate(path, 100), "weights: 100 bytes, not 1287"),
        ("weights", lambda path: os.truncate(path, 0), "weights: 0 bytes, not 1287"),
        ("empty", lambda path: path.write_bytes(b"x"), "empty: 1 bytes, not 0"),
        ("weights", lambda path: path.unlink(), "weights: missing"),
        ("empty", lambda path: path.unlink(), "empty: missing"),
        ("state/new", lambda path: path.touch(), "state/new: not in the manifest"),
        ("weights", lambda path: replace(path, lambda path: path.mkdir()), "weights: missing"),
        ("empty", lambda path: replace(path, os.mkfifo), "empty: cannot be read (not a regular file)"),
    ],
)
def test_damage_to_a_file_is_found_even_without_reading_it(steps, name, damage, said, contents):
    write(steps, 7)
    damage(steps.directory(7) / name)
    assert steps.verify(7, contents) == [said]


@pytest.mark.parametrize("contents", [True, False])
@pytest.mark.parametrize("name", ["weights", "empty", "state", "manifest.json"])
def test_a_link_in_place_of_what_was_written_is_found(steps, tmp_path, name, contents):
    write(steps, 7)
    path = steps.directory(7) / name
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert steps.verify(7, contents)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_in_place_of_the_manifest_is_found(steps, make):
    write(steps, 7)
    replace(steps.directory(7) / "manifest.json", make)
    assert "manifest.json: not a manifest that can be trusted" in "".join(steps.verify(7))


@pytest.mark.parametrize("function", ["_sha256", "_require_regular"])
def test_storage_that_fails_says_nothing_against_a_step(steps, monkeypatch, function):
    write(steps, 7)
    monkeypatch.setattr(module, function, fails)
    with pytest.raises(OSError, match="I/O error"):
        steps.verify(7)


def test_a_step_that_is_not_there_does_not_verify(steps):
    assert "No such file" in "".join(steps.verify(7))


def test_everything_that_is_wrong_is_told(steps):
    write(steps, 7)
    (steps.directory(7) / "weights").unlink()
    (steps.directory(7) / "empty").write_bytes(b"x")
    (steps.directory(7) / "new").touch()
    assert len(steps.verify(7)) == 3


@pytest.mark.parametrize(
    "name", ["007", "1.5", "-1", "+1", "1_0", "pinned-3", "broken-3", ".writing-3", ".deleting-3", "3 ", "٣", "1٣", "²", "x"]
)
def test_a_directory_that_is_named_otherwise_is_no_step(steps, name):
    write(steps, 5)
    shutil.copytree(steps.directory(5), steps.path / name)
    assert steps.all() == [5]


def test_a_file_is_no_step(steps):
    write(steps, 5)
    (steps.path / "6").touch()
    assert steps.all() == [5]


# ---------------------------------------------------------------------------------------------------- setting aside


def test_a_broken_step_is_set_aside_with_all_its_files(steps):
    write(steps, 6, 7)
    assert steps.set_aside(7) == steps.path / "broken-7"
    assert steps.all() == [6]
    assert (steps.path / "broken-7" / "weights").read_bytes() == FILES["weights"] + b"s" * 7


def test_what_was_set_aside_before_stays(steps):
    for name in ("broken-7", "broken-7-2", "broken-7-3"):
        write(steps, 7)
        assert steps.set_aside(7).name == name
    assert [path.name for path in steps.broken()] == ["broken-7", "broken-7-2", "broken-7-3"]


def test_clean_keeps_what_was_set_aside_or_pinned_and_what_is_not_its_own(steps):
    write(steps, 5, 7)
    steps.pin(5)
    steps.set_aside(7)
    (steps.path / "notes").mkdir()
    steps.clean()
    assert sorted(path.name for path in steps.path.iterdir()) == ["5", "broken-7", "notes", "pinned-5"]


# -------------------------------------------------------------------------------------------------------- retention


def test_the_newest_steps_stay(steps):
    write(steps, 2, 10, 30, 4)
    assert steps.superfluous(None) == [2, 4]


def test_the_best_step_stays(steps):
    write(steps, 1, 2, 3, 4)
    assert steps.superfluous(2) == [1]


def test_a_pinned_step_stays_until_it_is_unpinned(steps):
    write(steps, 1, 2, 3, 4)
    steps.pin(1)
    assert (steps.pinned(), steps.superfluous(None)) == ({1}, [2])
    steps.unpin(1)
    assert (steps.pinned(), steps.superfluous(None)) == (set(), [1, 2])


def test_unpinning_what_is_not_pinned_does_nothing(steps):
    steps.unpin(3)


def test_pinning_a_step_that_is_not_there_names_those_that_are(steps):
    write(steps, 1, 2)
    with pytest.raises(CheckpointError, match="no step 3 to pin; there are 1, 2"):
        steps.pin(3)
    assert steps.pinned() == set()


@pytest.mark.parametrize("name", ["pinned-", "pinned-x", "pinned-3~", "pinned-1.5", "pinned-007", "pinned-٣"])
def test_a_pin_of_no_step_is_none(steps, name):
    write(steps, 1, 2, 3)
    (steps.path / name).touch()
    assert (steps.pinned(), steps.superfluous(None)) == (set(), [1])


def test_steps_that_keep_every_divides_stay(steps):
    write(steps, 0, 50, 100, 150, 200, 250)
    steps.keep_every = 100
    assert steps.superfluous(None) == [50, 150]


def test_a_kept_step_counts_as_one_of_the_newest_all_the_same(steps):
    write(steps, 1, 2, 3)
    steps.pin(3)
    assert steps.superfluous(2) == [1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "weights").unlink(),
        lambda path: os.truncate(path / "weights", 5),
        lambda path: (path / "manifest.json").unlink(),
    ],
)
def test_a_broken_step_does_not_count_as_one_of_the_newest(steps, damage):
    write(steps, 1, 2, 3, 4, 5)
    damage(steps.directory(5))
    damage(steps.directory(3))
    assert steps.superfluous(None) == [1]


def test_as_long_as_no_step_is_whole_none_may_go(steps):
    write(steps, 1, 2, 3)
    for step in steps.all():
        (steps.directory(step) / "empty").unlink()
    assert steps.superfluous(None) == []


# --------------------------------------------------------------------------------------------------------- removing


def test_removed_steps_are_gone_with_their_pins_and_each_is_told(steps):
    write(steps, 1, 2, 3)
    steps.pin(2)
    told = []
    steps.remove([1, 2], told.append)
    assert told == [1, 2]
    assert [path.name for path in steps.path.iterdir()] == ["3"]


@every_end
def test_a_removal_that_ends_anywhere_leaves_each_step_whole_or_invisible(tmp_path, error, after):
    for at in itertools.count():
        steps = Steps(tmp_path / str(at))
        write(steps, 1, 2, 3)
        with cut_off(at, error, after) as raised:
            steps.remove([1, 2])
        assert set(steps.all()) >= {3}
        assert [steps.verify(step) for step in steps.all()] == [[]] * len(steps.all())
        steps.clean()
        assert sorted(path.name for path in steps.path.iterdir()) == [str(step) for step in steps.all()]
        if not raised:
            break
    assert at > 10  # calls that were cut off
    assert steps.all() == [3]


def test_a_step_is_out_of_sight_on_the_disk_before_anything_in_it_is_deleted(steps, monkeypatch):
    write(steps, 1, 2)
    calls = trace(monkeypatch)
    steps.remove([1])
    assert [name for name, _ in calls[:3]] == ["rename", "fsync", "unlink"]
    assert calls[1] == ("fsync", inode(steps.path))


def test_removing_a_link_to_a_step_leaves_what_it_leads_to(steps, tmp_path):
    write(steps, 1, 2)
    steps.directory(1).rename(tmp_path / "other disk")
    steps.directory(1).symlink_to(tmp_path / "other disk")
    steps.remove([1])
    assert [path.name for path in steps.path.iterdir()] == ["2"]
    assert (tmp_path / "other disk" / "weights").exists()
