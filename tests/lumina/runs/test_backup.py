"""Backups of a run: what is in one, which stay, what is refused, and that a damaged one restores to nothing."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import tarfile

import pyrage
import pytest

from lumina.config import CheckpointConfig, Config, save
from lumina.errors import CheckpointError, UsageError
from lumina.runs.backup import Backups, restore
from lumina.runs.directory import RunDirectory
from lumina.runs.steps import Steps

SECRET = "correct horse battery"  # noqa: S105


def make_run(path, *steps):
    """A run as the trainer leaves it, which has gone on to step 9."""
    run = RunDirectory(path)
    run.require_writable()
    save(Config(), run.config)
    run.data.write_text('{"fingerprint": "aa"}\n')
    (run.tokenizer / "parts").mkdir(parents=True)
    (run.tokenizer / "tokenizer.json").write_text("{}")
    (run.tokenizer / "parts" / "ranks é").write_bytes(b"\0\1")
    run.ledger.write_text("".join(f'{{"step": {n}, "bits": "0x{n}"}}\n' for n in range(1, 10)))
    run.metrics.write_text("".join(f'{{"kind": "train", "step": {n}}}\n' for n in (2, 4, 6, 8)) + '{"half": ')
    run.events.write_text('{"event": "start", "step": 0}\n')
    run.result.write_text("not of a backup")
    for step in steps:
        add_step(run, step)
    return run


def add_step(run, step):
    steps = Steps(run.checkpoints)
    arrays = steps.begin(step) / "state" / "d"
    arrays.mkdir(parents=True)
    (arrays / "weights").write_bytes(bytes(range(256)) * 400 + step.to_bytes(2, "big"))
    (arrays / "empty").touch()
    lines = b"".join(run.ledger.read_bytes().splitlines(keepends=True)[:step])
    steps.commit(step, {"ledger": {"bytes": len(lines), "sha256": hashlib.sha256(lines).hexdigest()}})


def settings(place, keep=2, encrypt=False):
    return CheckpointConfig(backup_dir=str(place), backup_keep=keep, backup_encrypt=encrypt)


def contents(path):
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in path.rglob("*") if each.is_file()}


def names(path):
    return sorted(each.name for each in path.iterdir())


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", 4)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "backups"


@pytest.fixture(scope="module")
def backup(tmp_path_factory):
    """A backup of step 4, for reading only, and the run."""
    path = tmp_path_factory.mktemp("plain")
    run = make_run(path / "run", 4)
    return Backups(run, settings(path / "backups")).make(4), run


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    """An encrypted backup of step 4, for reading only, and the run. Its key takes seconds: once for all tests."""
    path = tmp_path_factory.mktemp("encrypted")
    run = make_run(path / "run", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyrage.passphrase, "decrypt", functools.cache(pyrage.passphrase.decrypt))
        patch.setenv("LUMINA_BACKUP_PASSPHRASE", SECRET)
        backups = Backups(run, settings(path / "backups", encrypt=True))
        patch.delenv("LUMINA_BACKUP_PASSPHRASE")
        yield backups.make(4), run


def expected(run, step):
    """The files of a run directory that goes on at `step`."""
    files = contents(run.path)
    ours = ("config.json", "data.json", "events.jsonl", "tokenizer/", f"checkpoints/{step}/")
    kept = {name: data for name, data in files.items() if name.startswith(ours)}
    for name in ("ledger.jsonl", "metrics.jsonl"):
        lines = [line for line in files[name].splitlines(keepends=True) if line.endswith(b"}\n")]
        kept[name] = b"".join(line for line in lines if json.loads(line)["step"] <= step)
    return kept


# ------------------------------------------------------------------------------------------------------------ restoring


def test_a_restored_run_has_what_the_step_needs_and_no_later_record(backup, tmp_path):
    archive, run = backup
    assert restore(archive, tmp_path / "deep" / "out") == 4
    assert contents(tmp_path / "deep" / "out") == expected(run, 4)
    assert Steps(tmp_path / "deep" / "out" / "checkpoints").verify(4) == []
    assert names(tmp_path / "deep") == ["out"]


def test_an_empty_directory_may_be_restored_into(backup, tmp_path):
    (tmp_path / "out").mkdir()
    assert restore(backup[0], tmp_path / "out") == 4
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_restored_directory_is_as_open_as_any_new_one(backup, tmp_path):
    (tmp_path / "new").mkdir()
    restore(backup[0], tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_run_without_records_yet_is_backed_up(tmp_path, place):
    run = make_run(tmp_path / "run")
    for journal in (run.ledger, run.metrics, run.events):
        journal.write_bytes(b"")
    add_step(run, 0)
    for journal in (run.ledger, run.metrics, run.events):
        journal.unlink()
    assert restore(Backups(run, settings(place)).make(0), tmp_path / "out") == 0
    assert (tmp_path / "out" / "ledger.jsonl").read_bytes() == b""


@pytest.mark.parametrize("there", ["file", "directory"])
def test_a_place_that_holds_something_is_refused_and_left_alone(backup, tmp_path, there):
    out = tmp_path / "out"
    if there == "directory":
        out.mkdir()
    held = out / "file" if there == "directory" else out
    held.write_text("precious")
    with pytest.raises(UsageError, match="out: is there already; give a directory that is new or empty"):
        restore(backup[0], out)
    assert held.read_text() == "precious"


def test_a_backup_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"nothing\.tar: no such file"):
        restore(tmp_path / "nothing.tar", tmp_path / "out")


def test_a_backup_opens_with_tar_and_lists_the_hash_of_each_file(backup, tmp_path):
    with tarfile.open(backup[0]) as tar:
        tar.extractall(tmp_path, filter="data")
    listed = dict(reversed(line.split("  ")) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    (tmp_path / "SHA256SUMS").unlink()
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in contents(tmp_path).items()}


# --------------------------------------------------------------------------------------------------------------- damage


def refused(data, tmp_path, passphrase=None):
    """Whether these bytes, as a backup, restore to nothing and leave nothing."""
    (tmp_path / "changed.tar").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"changed\.tar: cannot be restored: .+") as refusal:
        restore(tmp_path / "changed.tar", tmp_path / "out", passphrase)
    assert "\n" not in str(refusal.value)
    return names(tmp_path) == ["changed.tar"]


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_a_flipped_bit_in_any_file_or_header_of_a_backup_is_found(backup, tmp_path):
    data = backup[0].read_bytes()
    with tarfile.open(backup[0]) as tar:
        members = tar.getmembers()
    assert len(members) == 11
    for member in members:
        for place in (member.offset, member.offset + 124, member.offset + 156):  # its name, size, type
            assert refused(flipped(data, place), tmp_path), (member.name, place)
        for place in {member.offset_data, member.offset_data + member.size - 1} if member.size else ():
            assert refused(flipped(data, place), tmp_path), (member.name, place)


def test_a_flipped_bit_anywhere_is_found_or_changes_no_file(backup, tmp_path):
    archive, run = backup
    data = archive.read_bytes()
    for place in range(0, len(data), 2039):
        (tmp_path / "changed.tar").write_bytes(flipped(data, place))
        with contextlib.suppress(CheckpointError):
            restore(tmp_path / "changed.tar", tmp_path / "out")
            assert contents(tmp_path / "out") == expected(run, 4)
            shutil.rmtree(tmp_path / "out")
        assert names(tmp_path) == ["changed.tar"]


def test_a_backup_that_is_cut_short_is_found(backup, tmp_path):
    data = backup[0].read_bytes()
    with tarfile.open(backup[0]) as tar:
        starts = [member.offset for member in tar.getmembers()]
    for end in [0, 1, 511, 512, *starts, *(start + 512 for start in starts), *range(700, starts[-1], 9973)]:
        assert refused(data[:end], tmp_path), end


def test_a_backup_that_lacks_any_of_its_files_is_refused(backup, tmp_path):
    data = backup[0].read_bytes()
    with tarfile.open(backup[0]) as tar:
        starts = [member.offset for member in tar.getmembers()]
    for start, end in itertools.pairwise(starts):
        assert refused(data[:start] + data[end:], tmp_path), start
    (tmp_path / "changed.tar").write_bytes(data[: starts[-1]])
    with pytest.raises(CheckpointError, match="it ends before its SHA256SUMS: cut short, or damaged"):
        restore(tmp_path / "changed.tar", tmp_path / "out")


@pytest.mark.parametrize("part", ["config.json", "data.json", "tokenizer/", "checkpoints/4/state/d/weights", "checkpoints/"])
def test_a_consistent_archive_without_a_part_of_the_run_is_refused(backup, tmp_path, part):
    assert refused(forged([each for each in parts(backup[0]) if not each[0].startswith(part)]), tmp_path)


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    assert refused(b"some other file" * 1000, tmp_path)


# --------------------------------------------------------------------------------------------------------------- forgery


def forged(members):
    """An archive with these names, types and contents or link targets, and hashes that fit."""
    raw = io.BytesIO()
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, kind, data in members if kind == tarfile.REGTYPE)
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, kind, data in [*members, ("SHA256SUMS", tarfile.REGTYPE, sums.encode())]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "" if kind == tarfile.REGTYPE else data.decode()
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def parts(backup):
    """What `forged` makes the same backup from."""
    with tarfile.open(backup) as tar:
        return [(each.name, tarfile.REGTYPE, tar.extractfile(each).read()) for each in tar if each.name != "SHA256SUMS"]


def test_the_forger_makes_an_archive_that_restores(backup, tmp_path):
    (tmp_path / "same.tar").write_bytes(forged(parts(backup[0])))
    assert restore(tmp_path / "same.tar", tmp_path / "out") == 4


@pytest.mark.parametrize(
    "name", ["../evil", "../../evil", "a/../../../evil", "/evil", "a\\evil", "./evil", "a//evil", "evil\n", "evil\x1b[2J"]
)
def test_a_file_name_that_leads_outside_or_has_two_readings_is_refused(backup, tmp_path, name):
    assert refused(forged([(name, tarfile.REGTYPE, b"evil"), *parts(backup[0])]), tmp_path)


def test_an_absolute_file_name_is_refused(backup, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    data = forged([(f"{tmp_path}/elsewhere/evil", tarfile.REGTYPE, b"evil"), *parts(backup[0])])
    (tmp_path / "changed.tar").write_bytes(data)
    with pytest.raises(CheckpointError, match="which no backup does"):
        restore(tmp_path / "changed.tar", tmp_path / "out")
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_links_devices_and_directories_are_refused(backup, tmp_path, kind):
    assert refused(forged([*parts(backup[0]), ("more", kind, b"config.json")]), tmp_path)


def test_a_file_behind_a_symlink_is_not_written(backup, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    link = ("link", tarfile.SYMTYPE, str(outside).encode())
    assert refused(forged([link, ("link/evil", tarfile.REGTYPE, b"evil"), *parts(backup[0])]), tmp_path)
    assert names(outside) == []


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_an_archive_that_only_says_it_is_encrypted_is_refused(tmp_path, kind):
    assert refused(forged([("identity.age", kind, b"nowhere"), ("run.tar.age", kind, b"nowhere")]), tmp_path, SECRET)


def test_a_name_that_comes_twice_is_refused(backup, tmp_path):
    held = parts(backup[0])
    assert refused(forged([*held, held[0]]), tmp_path)


def test_hashes_that_are_not_the_last_are_refused(backup, tmp_path):
    assert refused(forged([("SHA256SUMS", tarfile.REGTYPE, b"x  y\n"), *parts(backup[0])]), tmp_path)


# ------------------------------------------------------------------------------------------------------------ encryption


def test_an_encrypted_backup_restores_to_the_same_run(encrypted, tmp_path):
    archive, run = encrypted
    assert archive.name.endswith("-000000004.age.tar")
    assert restore(archive, tmp_path / "out", SECRET) == 4
    assert contents(tmp_path / "out") == expected(run, 4)
    assert names(tmp_path) == ["out"]


def test_an_encrypted_backup_opens_with_tar_and_age_alone(encrypted):
    with tarfile.open(encrypted[0]) as tar:
        assert tar.getnames() == ["identity.age", "run.tar.age"]
        identity, data = (tar.extractfile(name).read() for name in tar.getnames())
    key = pyrage.x25519.Identity.from_str(pyrage.passphrase.decrypt(identity, SECRET).decode().strip())
    with tarfile.open(fileobj=io.BytesIO(pyrage.decrypt(data, [key]))) as tar:
        assert tar.extractfile("config.json").read() == encrypted[1].config.read_bytes()


def test_an_encrypted_backup_shows_neither_the_run_nor_the_passphrase(encrypted):
    archive, run = encrypted
    data = archive.read_bytes()
    for text in (b"config.json", b"fingerprint", bytes(range(64)), SECRET.encode(), b"AGE-SECRET-KEY"):
        assert text not in data
    assert all(SECRET.encode() not in each for each in contents(run.path).values())


def test_another_passphrase_is_refused(encrypted, tmp_path):
    with pytest.raises(CheckpointError, match="the passphrase is not the one it was made with"):
        restore(encrypted[0], tmp_path / "out", SECRET + "!")
    assert names(tmp_path) == []


@pytest.mark.parametrize("passphrase", [None, ""])
def test_an_encrypted_backup_asks_for_its_passphrase(encrypted, tmp_path, passphrase):
    with pytest.raises(UsageError, match=r"is encrypted; set \$LUMINA_BACKUP_PASSPHRASE"):
        restore(encrypted[0], tmp_path / "out", passphrase)
    assert names(tmp_path) == []


def test_damage_to_an_encrypted_backup_is_found(encrypted, tmp_path):
    data = encrypted[0].read_bytes()
    with tarfile.open(encrypted[0]) as tar:
        identity, run = tar.getmembers()
    for place in (0, identity.offset_data + 3, identity.offset_data + identity.size - 1, run.offset):
        assert refused(flipped(data, place), tmp_path, SECRET), place
    for place in (0, 60, 300, run.size // 2, run.size - 1):
        assert refused(flipped(data, run.offset_data + place), tmp_path, SECRET), place
    for end in (
        identity.offset_data + 9,
        run.offset,
        run.offset_data,
        run.offset_data + 70_000,
        run.offset_data + run.size - 1,
    ):
        assert refused(data[:end], tmp_path, SECRET), end


def test_an_encrypted_backup_is_read_and_authenticated_to_its_very_end(encrypted, tmp_path):
    with tarfile.open(encrypted[0]) as tar:
        identity, data = (tar.extractfile(name).read() for name in tar.getnames())
    key = pyrage.x25519.Identity.from_str(pyrage.passphrase.decrypt(identity, SECRET).decode().strip())
    longer = pyrage.encrypt(
        pyrage.decrypt(data, [key]) + bytes(300_000), [key.to_public()]
    )  # zeros after a tar file are allowed

    def with_data(data):
        return forged([("identity.age", tarfile.REGTYPE, identity), ("run.tar.age", tarfile.REGTYPE, data)])

    assert refused(with_data(flipped(longer, len(longer) - 1)), tmp_path, SECRET)
    assert refused(with_data(longer[:-70_000]), tmp_path, SECRET)
    (tmp_path / "changed.tar").write_bytes(with_data(longer))
    assert restore(tmp_path / "changed.tar", tmp_path / "out", SECRET) == 4


@pytest.mark.parametrize(("passphrase", "says"), [(None, "is not set"), ("", "is not set"), ("short", "has 5 characters")])
def test_encryption_without_a_good_passphrase_is_refused_before_anything_is_made(run, place, monkeypatch, passphrase, says):
    monkeypatch.delenv("LUMINA_BACKUP_PASSPHRASE", raising=False)
    if passphrase is not None:
        monkeypatch.setenv("LUMINA_BACKUP_PASSPHRASE", passphrase)
    with pytest.raises(UsageError, match=rf"\$LUMINA_BACKUP_PASSPHRASE {says}; set it, to 12 characters or more"):
        Backups(run, settings(place, encrypt=True))
    assert not place.exists()


def test_encryption_without_its_library_is_refused_before_anything_is_made(run, place, monkeypatch):
    monkeypatch.setenv("LUMINA_BACKUP_PASSPHRASE", SECRET)
    monkeypatch.setitem(__import__("sys").modules, "pyrage", None)
    with pytest.raises(UsageError, match=r"pip install pyrage \(the extra `encryption`\)"):
        Backups(run, settings(place, encrypt=True))
    assert not place.exists()


# ------------------------------------------------------------------------------------------------------------- which stay


def steps_in(place, stem="run-"):
    return [int(name.removesuffix(".tar").rsplit("-", 1)[1]) for name in names(place) if name.startswith(stem)]


@pytest.mark.parametrize(("keep", "stay"), [(1, [6]), (2, [4, 6]), (3, [3, 4, 6])])
def test_the_newest_backups_stay(tmp_path, place, keep, stay):
    backups = Backups(make_run(tmp_path / "run", 2, 3, 4, 6), settings(place, keep))
    for step in (2, 3, 4, 6):
        backups.make(step)
    assert steps_in(place) == stay


@pytest.mark.parametrize(("keep", "stay"), [(1, [3]), (2, [3, 6])])
def test_the_backup_just_made_stays_though_a_rewind_made_its_step_lower(tmp_path, place, keep, stay):
    backups = Backups(make_run(tmp_path / "run", 2, 3, 4, 6), settings(place, keep))
    for step in (4, 6, 3):
        backups.make(step)
    assert steps_in(place) == stay


def test_a_step_that_is_backed_up_again_replaces_its_backup(run, place, tmp_path):
    backups = Backups(run, settings(place))
    backups.make(4).write_bytes(b"damaged since")
    assert restore(backups.make(4), tmp_path / "out") == 4
    assert steps_in(place) == [4]


def test_a_later_process_goes_on_with_the_same_backups(tmp_path, place):
    run = make_run(tmp_path / "run", 2, 4, 6)
    for step in (2, 4, 6):
        Backups(RunDirectory(run.tokenizer / ".." / ".." / "run") if step == 6 else run, settings(place)).make(step)
    assert steps_in(place) == [4, 6]


def test_runs_of_one_name_keep_apart_in_one_directory(tmp_path, place):
    first = make_run(tmp_path / "a" / "run", 2, 4)
    Backups(first, settings(place, 1)).make(2)
    shutil.copytree(first.path, tmp_path / "b" / "run")
    other = Backups(RunDirectory(tmp_path / "b" / "run"), settings(place, 1))
    other.make(2)
    other.make(4)
    assert sorted(steps_in(place)) == [2, 4]
    Backups(first, settings(place, 1)).make(4)
    assert steps_in(place) == [4, 4]


def test_a_new_run_in_an_old_place_leaves_the_old_backups_alone(tmp_path, place):
    Backups(make_run(tmp_path / "run", 6), settings(place, 1)).make(6)
    shutil.rmtree(tmp_path / "run")
    Backups(make_run(tmp_path / "run", 2), settings(place, 1)).make(2)
    assert sorted(steps_in(place)) == [2, 6]


def test_files_that_are_no_backup_of_the_run_stay(run, place):
    backups = Backups(run, settings(place, 1))
    made = backups.make(4)
    others = [f"{made.name}.old", f"x{made.name}", f".writing-x{made.name}", made.name.replace("000000004", "4"), "notes.txt"]
    for name in others:
        (place / name).touch()
    add_step(run, 6)
    Backups(run, settings(place, 1)).make(6)
    assert names(place) == sorted([*others, made.name.replace("4.tar", "6.tar")])


def test_what_a_killed_process_left_half_written_is_removed_at_the_start(run, place):
    made = Backups(run, settings(place)).make(4)
    for name in (
        f".writing-{made.name}",
        f".writing-{made.name.replace('.tar', '.age.tar')}",
        ".writing-other-00000000-000000001.tar",
    ):
        (place / name).write_bytes(b"half")
    Backups(run, settings(place))
    assert names(place) == [".writing-other-00000000-000000001.tar", made.name]


# --------------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("inside", ["run", "run/backups", "run/checkpoints/x", "link/x", "other/../run/x"])
def test_a_backup_directory_inside_the_run_is_refused(run, tmp_path, inside):
    (tmp_path / "link").symlink_to(run.path)
    before = contents(run.path)
    with pytest.raises(UsageError, match=r"checkpoint\.backup_dir = '.*': inside the run directory .*run, and lost with it"):
        Backups(run, settings(tmp_path / inside))
    assert contents(run.path) == before


def test_a_backup_directory_beside_the_run_with_a_longer_name_is_accepted(run, tmp_path):
    assert Backups(run, settings(tmp_path / "run-backups")).make(4).is_file()


def test_a_backup_directory_that_cannot_be_made_is_refused_by_name(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"checkpoint\.backup_dir = '.*file/x': cannot be written \(Not a directory\); choose another"
    ):
        Backups(run, settings(tmp_path / "file" / "x"))


@pytest.mark.parametrize("damage", ["flip", "remove", "manifest", "cut"])
def test_a_damaged_step_is_not_backed_up(run, place, damage):
    add_step(run, 6)
    backups = Backups(run, settings(place, 1))
    before = backups.make(4)
    weights = run.checkpoints / "6" / "state" / "d" / "weights"
    if damage == "flip":
        weights.write_bytes(flipped(weights.read_bytes(), 50_000))
    elif damage == "cut":
        os.truncate(weights, 50_000)
    else:
        (weights if damage == "remove" else run.checkpoints / "6" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not backed up"):
        backups.make(6)
    assert names(place) == [before.name]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("shorter", r"ledger\.jsonl: .* 68 bytes are missing"),
        ("changed", r"ledger\.jsonl: .* changed"),
        ("missing", r"ledger\.jsonl"),
    ],
)
def test_a_step_whose_ledger_is_not_on_disk_is_not_backed_up(run, place, damage, says):
    if damage == "missing":
        run.ledger.unlink()
    else:
        data = run.ledger.read_bytes()
        run.ledger.write_bytes(data[:40] if damage == "shorter" else flipped(data, 10))
    with pytest.raises((CheckpointError, OSError), match=says):
        Backups(run, settings(place)).make(4)
    assert names(place) == []


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_step_that_retention_removes_meanwhile_leaves_nothing_half_written(run, place, monkeypatch, encrypt):
    add_step(run, 6)
    monkeypatch.setenv("LUMINA_BACKUP_PASSPHRASE", SECRET)
    backups = Backups(run, settings(place, 1, encrypt))
    before = backups.make(6)
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("a half-written backup got its name"))
    verify = Steps.verify

    def verify_then_remove(self, step, contents=True):
        wrong = verify(self, step, contents)
        (self.directory(step) / "state" / "d" / "weights").unlink()
        return wrong

    monkeypatch.setattr(Steps, "verify", verify_then_remove)
    with pytest.raises(FileNotFoundError):
        backups.make(4)
    assert names(place) == [before.name]


@contextlib.contextmanager
def room_for(size):
    """No file may grow beyond `size`, which fails in the middle of a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_disk_that_fills_up_costs_this_backup_and_no_older_one(run, place, tmp_path, monkeypatch, encrypt):
    add_step(run, 6)
    monkeypatch.setenv("LUMINA_BACKUP_PASSPHRASE", SECRET)
    backups = Backups(run, settings(place, 1, encrypt))
    before = backups.make(4)
    data = before.read_bytes()
    for size in (100, 5_000, 70_000, len(data) - 600):
        with room_for(size), pytest.raises(OSError, match="File too large"):
            backups.make(6)
        assert contents(place) == {before.name: data}
    backups.make(6)
    assert names(place) == [before.name.replace("000000004", "000000006")]


def test_a_disk_without_room_is_not_filled_to_the_brim(run, place, monkeypatch):
    backups = Backups(run, settings(place))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(OSError, match=r"backups has 0 MiB free, a backup takes 0 MiB"):
        backups.make(4)
    assert names(place) == []


def test_a_disk_that_fails_at_the_sync_leaves_no_backup(run, place, monkeypatch):
    backups = Backups(run, settings(place))

    def failing(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        backups.make(4)
    assert names(place) == []


def test_a_backup_gets_its_name_only_when_it_is_whole_and_synced(run, place, monkeypatch):
    backups, synced, replace, fsync = Backups(run, settings(place)), [], os.replace, os.fsync

    def watched(source, target):
        assert synced == [os.stat(source).st_ino]
        with tarfile.open(source) as tar:
            assert tar.getnames()[-1] == "SHA256SUMS"
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", watched)
    backups.make(4)
    assert synced[1:] == [place.stat().st_ino]


def test_a_disk_that_fills_up_while_restoring_leaves_nothing(backup, tmp_path):
    with room_for(50_000), pytest.raises(CheckpointError, match="cannot be restored: File too large"):
        restore(backup[0], tmp_path / "out")
    assert names(tmp_path) == []
