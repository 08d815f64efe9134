"""Several processes on this machine: what they save together, how they find each other, and how they end."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from lumina.config import save
from lumina.errors import CheckpointError
from lumina.interchange import orbax
from lumina.interchange import state as interchange
from lumina.interchange.orbax import from_leaves
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.processes import Part
from lumina.runs.steps import Steps
from lumina.runs.supervisor import FINAL
from lumina_jax import hosts
from lumina_jax.checkpoint import _read, by_name, load
from lumina_jax.hosts import SILENT_BEATS
from tests.lumina_jax import together
from tests.lumina_jax.tiny import tiny
from tests.lumina_jax.together import CONFIG, Opened, like, same_bits, values
from tests.waiting import GIVES_UP

ROOT = Path(__file__).parents[2]


class Chapter(NamedTuple):
    """What processes did: exit codes, and what each wrote."""

    codes: list[int]
    out: list[str]
    errors: list[str]


def play(directory, *chapters):
    """Chapters of `tests.lumina_jax.together`, each (processes, devices of each, scenario, argument, ...)."""
    command = [sys.executable, "-m", together.__name__, str(directory), json.dumps(chapters)]
    played = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=GIVES_UP
    )
    assert played.returncode == 0, played.stderr
    return [
        Chapter(codes, *([path.read_text() for path in sorted(directory.glob(f"{name}-{n}-*"))] for name in ("out", "errors")))
        for n, codes in enumerate(json.loads(played.stdout))
    ]


# ----------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(directory, what each of two processes saw, what it said): four processes saved there, then two restored and saved."""
    directory = tmp_path_factory.mktemp("saved")
    for name in ("run", "alone"):
        (directory / name).mkdir()
        save(CONFIG, directory / name / "config.json")
    assert Opened(directory / "alone", like((1, 8))).save(1) == ""
    chapters = play(directory, (4, 1, "four"), (2, 2, "two"))
    assert [chapter.codes for chapter in chapters] == [[0] * 4, [0] * 2], chapters
    return directory, [json.loads(each.splitlines()[-1]) for each in chapters[1].out], chapters[1].errors


def test_what_four_processes_saved_two_restore_and_each_reads_what_its_devices_have(saved):
    assert [each["restored"] for each in saved[1]] == [[1, True]] * 2


def test_what_one_process_saved_of_eight_devices_two_restore(saved):
    assert [each["alone"] for each in saved[1]] == [[1, True]] * 2
    leaves = Steps(RunDirectory(saved[0] / "alone").checkpoints).manifest(1)["leaves"]
    assert not any("pieces" in leaf for leaf in leaves.values())


def test_every_process_writes_the_pieces_of_its_own(saved):
    steps = Steps(RunDirectory(saved[0] / "run").checkpoints)
    leaves = steps.manifest(1)["leaves"]
    name = "variables.params.embedding"
    assert [piece[0] for piece in leaves[name]["pieces"]] == [0, 1, 2, 3]
    assert leaves[name]["pieces"][3] == [3, [0, 12], [300, 4]]
    assert "pieces" not in leaves["step"]
    assert {path.name for path in steps.directory(1).iterdir()} == {"manifest.json", "state", "state.1", "state.2", "state.3"}
    copies = steps.manifest(2)["leaves"]  # each process had all of it: they shared the work
    assert [piece[0] for piece in copies[name]["pieces"]] == [0, 1]


def test_a_disk_that_fails_in_any_process_costs_this_checkpoint_and_hangs_nobody(saved):
    run = RunDirectory(saved[0] / "run")
    assert Steps(run.checkpoints).all() == [1, 2, 5]
    first, second = (each["failures"][:4] for each in saved[1])
    full = "No space left on device"
    assert first == ["", f"process 1: {full}", full, ""]
    assert second == ["", full, full, ""]
    said = [record["says"] for record in read_json_lines(run.events) if record["event"] == "save failed"][:2]
    assert said == [
        f"step 3: the checkpoint could not be written (process 1: {full}); step 2 stands",
        f"step 4: the checkpoint could not be written ({full}); step 2 stands",
    ]
    assert [each["again"] for each in saved[1]] == [[5, True]] * 2


def test_what_another_process_wrote_elsewhere_or_not_at_all_is_no_checkpoint(saved):
    (elsewhere, missing), (own, _) = (each["failures"][4:] for each in saved[1])
    assert "elsewhere/.writing-6: made by another process, but not seen by this one; all must share the disk" in own
    assert elsewhere == f"process 1: {own}"
    assert ".writing-7/state.1: made by another process, but not seen" in missing


def test_of_what_processes_told_each_other_for_a_checkpoint_only_the_last_is_kept(saved):
    assert len(saved[1][0]["kept"]) == 1


def test_one_that_fails_tells_the_others_why(saved):
    for errors in saved[2]:
        assert "process 1 of 2 failed: RuntimeError: planted" in errors


@pytest.mark.parametrize("sizes", [(1, 8), (2, 4), (8, 1)])
def test_one_process_restores_what_several_saved_on_any_devices(saved, sizes):
    run, shapes = RunDirectory(saved[0] / "run"), like(sizes)
    for step in (1, 2, 5):
        assert same_bits(read_step(run, step, shapes), step)
    assert same_bits(load(run, shapes)[0], 5)


def read_step(run, step, shapes):
    steps = Steps(run.checkpoints)
    return unnamed(_read(steps.directory(step), by_name(shapes), steps.manifest(step)["leaves"]))


def unnamed(named):
    return jax.tree.unflatten(jax.tree.structure(like((1, 8))), named.values())


def test_a_state_in_pieces_opens_without_jax(saved):
    _, state, _ = interchange.load(saved[0] / "run")
    leaves = by_name(values(5))
    expected = from_leaves(CONFIG.model, leaves)
    for part in ("weights", "first_moment", "second_moment"):
        found = getattr(state, part)
        assert found.keys() == expected[part].keys()
        for name, array in found.items():
            assert array.tobytes() == np.ascontiguousarray(expected[part][name]).tobytes(), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda pieces: pieces[:-1], r"its 3 pieces do not cover \(300, 16\)"),
        (lambda pieces: [*pieces, pieces[0]], r"its 5 pieces overlap in \(300, 16\)"),
        (lambda pieces: [*pieces[:-1], [3, [0, 12], [300, 5]]], r"a piece of \(300, 5\) at \(0, 12\) lies outside"),
        (lambda pieces: [*pieces[:-1], [2, *pieces[-1][1:]]], r"state.2 has no .*embedding@3"),
        (lambda pieces: [*pieces[:2], [2, [0, 8], [300, 3]], [3, [0, 11], [300, 5]]], r"@. is \(300, 4\), the manifest says"),
    ],
    ids=["missing", "twice", "outside", "elsewhere", "another_shape"],
)
def test_pieces_that_do_not_make_up_an_array_are_refused_by_name(saved, change, says):
    steps = Steps(RunDirectory(saved[0] / "run").checkpoints)
    leaves = steps.manifest(1)["leaves"]
    name = "variables.params.embedding"
    leaves[name]["pieces"] = change(leaves[name]["pieces"])
    directory = steps.directory(1)
    for read in (lambda: _read(directory, by_name(like((1, 8))), leaves), lambda: orbax.read(directory, leaves)):
        with pytest.raises(CheckpointError, match=says):
            read()


# -------------------------------------------------------------------------------------------------- training


def settings(steps):
    made = tiny("moe", steps=steps, batch_size=4, eval_every=0, eval_rows=8)
    made.mesh.data, made.mesh.fsdp, made.data.source = 2, 2, "synthetic"
    made.checkpoint.every, made.monitor.log_every, made.monitor.sample_tokens, made.monitor.tensorboard = 2, 1, 2, False
    return made


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(directory, exit codes, stdout, stderr) of each chapter: a run of four devices in one process; and the same by four
    processes, of which one is killed at step 5, then by two, of which one is asked to stop at 7, then by one again."""
    directories = {name: tmp_path_factory.mktemp(name) for name in ("whole", "parts")}
    for directory in directories.values():
        save(settings(10), directory / "config.json")
    killed, asked = (4, 1, "train", 5, int(signal.SIGKILL), 2), (2, 2, "train", 7, int(signal.SIGTERM), 1)
    chapters = {"whole": [(1, 4, "train")], "parts": [killed, asked, (1, 4, "train")]}
    return {name: (directory, play(directory, *chapters[name])) for name, directory in directories.items()}


def ledger(story, name):
    return [record for record in read_json_lines(RunDirectory(story[name][0] / "run").ledger) if "rows" in record]


def loss_of(record):
    return struct.unpack(">f", bytes.fromhex(record["loss"]))[0]


def test_four_processes_then_two_then_one_have_the_ledger_of_one(story):
    for name, last in (("whole", 0), ("parts", 2)):
        chapter = story[name][1][last]
        assert chapter.codes == [0], chapter.errors
    whole, parts = ledger(story, "whole"), ledger(story, "parts")
    assert [record["step"] for record in parts] == list(range(1, 11))
    assert [record["rows"] for record in parts] == [record["rows"] for record in whole]
    assert list(map(loss_of, parts)) == pytest.approx(list(map(loss_of, whole)), rel=1e-5)


def test_one_killed_ends_the_rest_who_say_which(story):
    codes, _, errors = story["parts"][1][0]
    assert codes[2] == -signal.SIGKILL
    assert all(code not in FINAL and code != 75 for code in codes), codes
    for number in (0, 1, 3):
        assert "process 2 of 4 is gone, or hangs: no sign of life" in errors[number], errors[number]


def test_a_signal_to_one_of_two_stops_both_at_one_step(story):
    codes, _, errors = story["parts"][1][1]
    assert codes == [75, 75], errors
    run = RunDirectory(story["parts"][0] / "run")
    (stopped,) = [record for record in read_json_lines(run.events) if record["event"] == "stopped"]
    assert "a signal to another process" in stopped["says"]
    assert stopped["step"] in (7, 8)


def test_of_several_processes_one_speaks_and_each_says_how_it_joined(story):
    _, out, errors = story["parts"][1][1]
    for number in (0, 1):
        assert (
            f"process {number} of 2, as JAX_NUM_PROCESSES and JAX_PROCESS_ID say; process 0 is at 127.0.0.1:" in errors[number]
        )
    assert "in 2 processes" in errors[0] + out[0]
    assert not [line for line in (errors[1] + out[1]).splitlines() if line.startswith(("step", "held out", "---", "next:"))]


# --------------------------------------------------------------------------------------------------- signs of life


class Service:
    """What processes tell each other, as JAX's coordination service keeps it; time passes while one waits."""

    def __init__(self, monkeypatch):
        self.told, self.now, self.meanwhile = {}, 0.0, lambda: None
        monkeypatch.setattr(hosts, "_client", lambda: self)
        monkeypatch.setattr(hosts.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(hosts.time, "sleep", self.pass_by)

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.told and not allow_overwrite:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
        self.told[key] = value

    def key_value_dir_get(self, key):
        return [(each, value) for each, value in sorted(self.told.items()) if each.startswith(f"{key}/")]

    def pass_by(self, seconds):
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def service(monkeypatch):
    return Service(monkeypatch)


def pulses(count):
    return [hosts._Pulse(Part(number, count)) for number in range(count)]


def test_who_is_silent_is_told_and_taken_back_once_there_are_signs_of_life_again(service, capsys):
    first, second, third = pulses(3)

    def beat(*alive):
        for pulse in alive:
            pulse.beat(service)
        service.now += first.period
        return [pulse.known.is_set() for pulse in (first, second, third)]

    for _ in range(2):
        assert beat(first, second, third) == [False] * 3
    for _ in range(SILENT_BEATS + 1):
        beat(second, first)
    assert beat(first, second) == [True, True, False]
    for _ in range(2):
        found = beat(third, first, second)
    assert found == [False] * 3
    assert capsys.readouterr().err == "process 2 of 3 is gone, or hangs: no sign of life for 10 s\n" * 3  # each of them


def test_the_first_to_fail_says_why_whoever_falls_silent_after_it(service, capsys):
    first, second, third = pulses(3)
    for pulse in (first, second, third):
        pulse.beat(service)
    third.tell_why("process 2 of 3 failed: of hunger")
    second.tell_why("process 1 of 3 failed: without it")
    for _ in range(2 * SILENT_BEATS):
        service.now += first.period
        first.beat(service)
    assert capsys.readouterr().err == "process 2 of 3 failed: of hunger\n" * 2


def test_the_first_process_waits_until_the_living_know_and_for_no_other(service):
    first, second, third = pulses(3)
    for pulse in (first, second, third):
        pulse.beat(service)
    for _ in range(2 * SILENT_BEATS):
        service.now += first.period
        first.beat(service)
        service.key_value_set("lumina/beat/1", str(service.now), True)  # late with all else
    began = service.now
    service.meanwhile = lambda: service.now > began + 3 and second.beat(service)
    first.until_others_know()
    assert second.known.is_set()
    assert began + 3 < service.now < began + 3 + first.period


def test_the_first_process_waits_for_nobody_for_ever(service):
    first, second = pulses(2)
    service.meanwhile = lambda: service.key_value_set("lumina/beat/1", str(service.now), True) or first.beat(service)
    service.meanwhile()
    first.tell_why("process 0 of 2 failed: alone")
    first.until_others_know()
    assert service.now == pytest.approx(first.patience, abs=first.period)
