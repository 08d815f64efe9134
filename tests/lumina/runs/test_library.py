"""`lumina runs`: what it tells of runs, what it finds wrong, and what it never deletes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from lumina import cli
from lumina.architecture import counts
from lumina.config import Config, save
from lumina.errors import CheckpointError, ConfigError, UsageError
from lumina.runs import library
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.journal import Journal
from lumina.runs.ledger import compare_ledgers, spans
from lumina.runs.lock import RunLock
from lumina.runs.steps import MANIFEST, Steps


def config(**fields):
    made = Config()
    made.train.steps, made.optim.warmup_steps = 60, 10
    for name, value in fields.items():
        group, _, field = name.partition("_")
        setattr(getattr(made, group), field, value)
    return made


def train(path, until=60, every=10, best=20, **fields):
    """A run as a trainer leaves it at step `until`, with a checkpoint `every` so many steps."""
    run = RunDirectory(path)
    run.path.mkdir(parents=True)
    save(config(**fields), run.config)
    run.data.write_text(json.dumps({"fingerprint": "d" * 64}))
    ledger, metrics, steps = Journal(run.ledger, print), Journal(run.metrics, print), Steps(run.checkpoints)
    for step in range(1, until + 1):
        ledger.append(step_record(step))
        if step % 5 == 0:
            metrics.append({"kind": "train", "step": step, "loss": 5 - step / 20, "bits_per_byte": 3 - step / 40})
        if step % every == 0:
            metrics.append({"kind": "eval", "step": step, "loss": 6 - step / 20, "bits_per_byte": 4 - step / 40})
            ledger.append({"step": step, "parameters": f"p{step:015d}"})
            commit(steps, step, {"progress": {"best_step": best, "best_loss": 1.0}, "ledger": ledger.position()})
    return run


def step_record(step):
    return {"step": step, "loss": f"{step:08x}", "rows": f"r{step:015d}"}


def commit(steps, step, manifest):
    directory = steps.begin(step)
    (directory / "state").mkdir()
    (directory / "state" / "array").write_bytes(bytes(range(256)) * 8)
    (directory / "metadata").write_text("{}")
    steps.commit(step, manifest)


def rewrite_manifest(directory, change):
    """As `steps` writes it: with a hash that fits."""
    body = json.loads((directory / MANIFEST).read_text())["manifest"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps({"manifest": body, "sha256": digest}))


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # no machine dies here


@pytest.fixture
def run():
    return train("runs/one")


@pytest.fixture
def lumina(capsys):
    """Runs a command of `lumina runs`; returns what it printed, as JSON where that was asked for."""

    def call(*arguments):
        cli.run(["runs", *map(str, arguments)])
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in arguments else out

    return call


@pytest.fixture
def refused(capsys):
    """What a command prints before it fails, and its error."""

    def call(error, *arguments):
        capsys.readouterr()
        with pytest.raises(error) as caught:
            cli.run(["runs", *map(str, arguments)])
        return capsys.readouterr().out, str(caught.value)

    return call


def listing(path):
    return {
        str(each.relative_to(path)): each.is_file() and (each.read_bytes(), each.stat().st_mtime_ns) for each in path.rglob("*")
    }


# ---------------------------------------------------------------------------------------------------------- finding


def test_a_run_is_found_by_its_path_or_by_its_name_in_runs(run, tmp_path):
    for name in ("one", "runs/one", tmp_path / "runs" / "one", "runs/../runs/one"):
        assert library.find(str(name)).path.samefile(run.path)


def test_a_path_comes_before_a_name(run, tmp_path):
    train("one", until=10)
    assert library.find("one").path.samefile(tmp_path / "one")


def test_an_unknown_run_is_refused_with_the_nearest_name(run, refused):
    assert "did you mean one?" in refused(UsageError, "show", "onee")[1]
    assert "did you mean runs/one?" in refused(UsageError, "show", "runs/onee")[1]


def test_a_directory_that_is_no_run_is_refused(run, refused):
    os.mkdir("runs/empty")
    for name in ("runs/empty", "runs", "..", "."):
        assert "it has no config.json" in refused(UsageError, "verify", name)[1]


@pytest.mark.parametrize("name", ["../outside", "..", "x/../../outside", "a\0b", "", "x" * 5000])
def test_a_name_never_leads_out_of_runs(name, run, refused):
    os.chdir(run.path)  # a run, so that runs/.. is one
    os.makedirs("runs/x")
    train("outside", until=10)  # runs/../outside
    refused(UsageError, "show", name)


def test_listing_a_run_or_nothing_is_refused(run, refused):
    assert "is itself a run; see `lumina runs show runs/one`" in refused(UsageError, "list", "runs/one")[1]
    assert "nowhere: no such directory" in refused(UsageError, "list", "nowhere")[1]


# ------------------------------------------------------------------------------------------------------ list and show


def test_a_run_is_one_line_and_runs_alone_lists(run, lumina):
    train("runs/two", until=35, best=30)
    os.mkdir("runs/not-a-run")
    lines = lumina().splitlines()
    assert lumina("list", "runs").splitlines() == lines
    assert [line.split()[:5] for line in lines[1:]] == [
        ["one", "60/60", "2.0000", "2.5000", "20"],
        ["two", "35/60", "3.2500", "3.2500", "30"],
    ]
    assert "6, newest 60" in lines[1]
    assert lines[2].endswith("stopped")


def test_a_directory_of_runs_is_listed_without_the_word_list(run, lumina):
    listed = lumina("list", run.path.parent)
    assert run.path.name in listed
    assert lumina(run.path.parent) == listed
    assert lumina("--json", run.path.parent) == lumina("list", run.path.parent, "--json")


def test_list_json_is_one_object_with_a_record_for_each_run(run, lumina):
    train("runs/two", until=35)
    found = lumina("list", "--json")
    assert found == lumina("--json") == lumina("--json", "list")
    assert [each["name"] for each in found["runs"]] == ["one", "two"]
    assert found["runs"][1]["checkpoints"] == [10, 20, 30]
    sizes = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert found["runs"][0]["bytes"] == sizes


def test_states_are_told_apart(run, lumina):
    def state():
        (found,) = lumina("list", "--json")["runs"]
        return found["state"], found["why"]

    assert state() == ("stopped", "")
    lock = RunLock(run.lock)
    assert state()[0] == "training"
    assert f"process {os.getpid()} on" in state()[1]
    assert f"process {os.getpid()} on" in lumina().splitlines()[1]
    lock.release()
    run.write_result({"step": 60, "stopped_early": False})
    assert state() == ("finished", "")
    Journal(run.ledger, print).append(step_record(61))  # it went on
    assert state() == ("stopped", "")
    run.ledger.unlink()
    for step in Steps(run.checkpoints).all():
        (run.checkpoints / str(step) / "metadata").unlink()
    assert state() == ("broken", "no checkpoint is whole")
    shutil.rmtree(run.checkpoints)
    run.config.write_text("{")
    assert state() == ("broken", "config.json cannot be read")


def test_a_run_whose_checkpoints_were_all_set_aside_is_broken(run, lumina):
    for step in Steps(run.checkpoints).all():
        Steps(run.checkpoints).set_aside(step)
    assert lumina("list", "--json")["runs"][0]["state"] == "broken"


def test_a_run_that_stopped_early_is_finished_until_that_is_switched_off(lumina):
    run = train("runs/one", until=30, train_early_stopping=2)
    run.write_result({"step": 30, "stopped_early": True})
    assert lumina("list", "--json")["runs"][0]["why"] == "stopped early"
    save(config(), run.config)
    assert lumina("list", "--json")["runs"][0]["state"] == "stopped"


def test_a_run_that_never_saved_is_listed_shown_verified_and_compared(lumina):
    run = RunDirectory("runs/new")
    run.path.mkdir(parents=True)
    save(config(), run.config)
    assert lumina().splitlines()[1].split()[:5] == ["new", "0/60", "-", "-", "-"]
    assert "0 of 60" in lumina("show", "new")
    assert "WRONG" not in lumina("verify", "new")
    assert "0 in both" in lumina("compare", "new", "new")
    assert "stay: none" in lumina("prune", "new")


def test_only_the_end_of_a_long_file_is_read(monkeypatch):
    path = RunDirectory("x").ledger
    path.parent.mkdir()
    path.write_text("damaged\n" * 10 + '{"kind": "eval", "step": 1}\n' + '{"kind": "train", "step": 2}\n' * 200)
    monkeypatch.setattr(library, "TAIL", 100)
    assert len(library.last_lines(path, bool).records) == 3
    assert library.last_lines(path, lambda records: records[0]["step"] == 1).records[0]["kind"] == "eval"  # reads on
    monkeypatch.setattr(library, "LONGEST_TAIL", 300)
    lines = library.last_lines(path, lambda records: False)
    assert lines.damaged == []
    assert 10 < len(lines.records) < 20


@pytest.mark.parametrize("size", range(1, 60))
def test_the_end_of_a_file_never_begins_within_a_line(size, monkeypatch, tmp_path):
    (tmp_path / "x").write_text('{"step": 1}\n{"step": 22}\n{"step": 333}\n')
    monkeypatch.setattr(library, "TAIL", size)
    monkeypatch.setattr(library, "LONGEST_TAIL", size)
    lines = library.last_lines(tmp_path / "x", lambda records: False)
    assert not lines.damaged
    assert [record["step"] for record in lines.records] == [1, 22, 333][3 - (size >= 14) - (size >= 27) - (size >= 39) :]


def test_damaged_lines_are_counted_and_the_rest_is_told(run, lumina):
    for path in (run.metrics, run.ledger, run.events):
        with path.open("ab") as file:
            file.write(b"\x00\xff\n[1]\n" + b"[" * 100_000 + b'\n{"step": 60, "kind": "tr')
    found = lumina("list", "--json")["runs"][0]
    assert (found["damaged"], found["loss"], found["step"]) == (8, 2.0, 60)
    assert "8 damaged lines" in lumina()
    assert lumina("show", "one", "--json")["damaged_lines"] == dict.fromkeys(
        ["metrics.jsonl", "ledger.jsonl", "events.jsonl"], 3
    )
    assert "ledger.jsonl: 3 lines are no JSON" in lumina("show", "one")


def test_values_of_other_kinds_than_expected_are_told_as_unknown(run, lumina):
    run.metrics.write_text(
        '{"kind": "train", "step": "x", "loss": "\\u001b[2J"}\n{"kind": ["eval"], "loss": 1' + "0" * 400 + "}\n{}\n"
    )
    run.config.write_text('{"train": {"steps": "many"}}')
    run.result.write_text('["result"]')
    assert lumina().splitlines()[1].split()[:4] == ["one", "60/?", "-", "-"]
    assert "train.steps = 'many'" in lumina("show", "one")


def test_losses_that_are_not_finite_make_valid_json(run, lumina):
    with run.metrics.open("a") as file:
        file.write('{"kind": "train", "step": 60, "loss": NaN}\n')
    assert lumina("list", "--json")["runs"][0]["loss"] is None
    assert " nan " in lumina()


def test_show_tells_config_checkpoints_flags_and_events(run, lumina):
    steps = Steps(run.checkpoints)
    steps.pin(10)
    steps.set_aside(40)
    (run.checkpoints / "30" / "metadata").unlink()
    Events(run, lambda says: None).write("skipped", 7, "step 7: loss jumped")
    Events(run, lambda says: None).write("started", 9, restarted_because="killed")
    text = lumina("show", "one")
    for words in (
        "step 7: loss jumped",
        "step 9: started; restarted because: killed",
        "stdlib, tokenizer bpe",
        "checkpoints/broken-40",
    ):
        assert words in text
    found = lumina("show", "one", "--json")
    assert found["config"]["parameters"] == counts(config()).total
    assert [each["step"] for each in found["checkpoints"] if each["best"]] == [20]
    assert [each["step"] for each in found["checkpoints"] if each["pinned"]] == [10]
    assert [(each["step"], each["faults"]) for each in found["checkpoints"] if each["faults"]] == [(30, ["metadata: missing"])]
    assert found["checkpoints"][0]["bytes"] == sum(p.stat().st_size for p in (run.checkpoints / "10").rglob("*") if p.is_file())


def test_show_leaves_out_a_checkpoint_that_is_deleted_meanwhile(run, lumina, monkeypatch):
    faults = library.faults
    monkeypatch.setattr(library, "faults", lambda steps, step, contents: None if step == 30 else faults(steps, step, contents))
    assert [each["step"] for each in lumina("show", "one", "--json")["checkpoints"]] == [10, 20, 40, 50, 60]


def test_what_comes_from_files_cannot_steer_the_terminal(run, lumina, refused):
    nasty = train("runs/\x1b[2Jnasty\n", until=10)
    Events(nasty, lambda says: None).write("odd", 1, "\x1b]0;title\x07\nforged line")
    run.config.write_text('{"\\u001b[2J": 1}')
    name = str(nasty.path)
    printed = lumina() + lumina("show", name) + lumina("verify", name) + lumina("compare", name, name)
    printed += refused(ConfigError, "prune", "one")[1] + refused(CheckpointError, "unpin", name, 1)[1]
    assert "\x1b" not in printed
    assert "\\nforged line" in printed


# ------------------------------------------------------------------------------------------------------------ verify


def failures(run):
    return {(finding.what, finding.says) for finding in library.verify(run) if not finding.well}


def test_a_whole_run_verifies_in_a_line_each_and_nothing_changes(run, lumina):
    before = listing(run.path)
    lines = lumina("verify", "one").splitlines()
    assert len(lines) == 1 + 6 + 2 + 1
    assert all(line.startswith("well ") for line in lines)
    assert "steps, whole and in order" in lines[7]
    assert "those recorded at step 60" in lines[8]
    assert lumina("verify", "one", "--json")["well"]
    assert listing(run.path) == before


def flip(run):
    path = run.checkpoints / "30" / "state" / "array"
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)


def truncate(run):
    os.truncate(run.checkpoints / "30" / "state" / "array", 2047)


def name_outside(run):
    rewrite_manifest(run.checkpoints / "30", lambda body: body["files"].update({"../outside": {"bytes": 0, "sha256": ""}}))


def malform(run):
    rewrite_manifest(run.checkpoints / "30", lambda body: body["files"].update(metadata={}))


def edit_manifest(run):
    path = run.checkpoints / "30" / MANIFEST
    path.write_text(path.read_text().replace('"best_loss": 1.0', '"best_loss": 2.0'))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "state/array: its contents changed"),
        (truncate, "state/array: 2047 bytes, not 2048"),
        (lambda run: (run.checkpoints / "30" / "metadata").unlink(), "metadata: missing"),
        (lambda run: (run.checkpoints / "30" / "state" / "more").touch(), "state/more: not in the manifest"),
        (lambda run: (run.checkpoints / "30" / "link").symlink_to("/etc/passwd"), "link: not in the manifest"),
        (lambda run: (run.checkpoints / "30" / "to").symlink_to(run.path.resolve()), "to: not in the manifest"),
        (lambda run: (run.checkpoints / "30" / MANIFEST).unlink(), "manifest.json: not a manifest that can be trusted"),
        (name_outside, "file name '../outside' leads outside"),
        (edit_manifest, "its own hash does not match"),
        (malform, "manifest.json: not a manifest that can be trusted"),
    ],
)
def test_damage_to_a_checkpoint_is_named(damage, says, run, refused, tmp_path):
    (tmp_path / "runs" / "one" / "checkpoints" / "outside").write_bytes(b"")
    damage(run)
    ((what, told),) = failures(run)
    assert what == "checkpoints/30"
    assert says in told
    out, error = refused(CheckpointError, "verify", "one")
    assert "WRONG  checkpoints/30" in out
    assert error == "runs/one: 1 of 10 checks failed: checkpoints/30"


def test_a_failed_check_exits_with_5_after_its_json(run):
    flip(run)
    command = [sys.executable, "-m", "lumina.cli", "runs", "verify", str(run.path.resolve()), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=os.path.dirname(os.path.dirname(cli.__file__))
    )
    assert done.returncode == 5
    assert json.loads(done.stdout)["well"] is False


def test_a_step_that_retention_deletes_meanwhile_is_no_error(run):
    def begins(step, size):
        if step == 10:
            Steps(run.checkpoints).remove([20])

    found = {finding.what: finding for finding in library.verify(run, begins)}
    assert found["checkpoints/20"].well
    assert found["checkpoints/20"].says == "deleted meanwhile"


def test_a_step_deleted_while_its_files_are_read_is_no_error(run, monkeypatch):
    steps = Steps(run.checkpoints)
    read = Steps.manifest

    def manifest(self, step):
        body = read(self, step)
        if step == 20 and steps.directory(20).exists():
            steps.remove([20])
        return body

    monkeypatch.setattr(Steps, "manifest", manifest)
    assert failures(run) == set()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda lines: lines[:4] + lines[5:], "lacks step 5"),
        (lambda lines: lines[:4] + lines[7:], "lacks steps 5-7"),
        (lambda lines: [*lines[:5], lines[4], *lines[5:]], "has step 5 more than once"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "has step 1 after a later step"),
        (lambda lines: [*lines[:4], b"\x00" * 50 + b"\n", *lines[5:]], "line 5: not JSON; lacks step 5"),
        (lambda lines: [*lines, b'{"step": 61, "lo'], "ends within a line"),
        (lambda lines: [*lines, b'{"step": 61, "loss": 3.5, "rows": "r"}\n'], "1 records tell of no step"),
        (lambda lines: [*lines, b'{"step": 10, "parameters": "other"}\n'], "has step 10 more than once"),
    ],
)
def test_damage_to_the_ledger_is_named(change, says, run):
    run.ledger.write_bytes(b"".join(change(run.ledger.read_bytes().splitlines(keepends=True))))
    assert says in " ".join(told for what, told in failures(run) if what == "ledger.jsonl")


def test_a_ledger_that_is_not_as_the_newest_checkpoint_recorded_it_is_told(run):
    whole = run.ledger.read_bytes()
    run.ledger.write_bytes(whole.replace(b"r000000000000003", b"r000000000000004"))
    assert {told[:9] for _, told in failures(run)} == {"its first"}
    run.ledger.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    ((_, told),) = failures(run)
    assert "fewer than the" in told
    run.ledger.write_bytes(whole + json.dumps(step_record(61)).encode() + b"\n")
    assert failures(run) == set()


def test_a_ledger_that_ends_before_the_newest_checkpoint_is_told(tmp_path):
    run = train(tmp_path / "r", until=60)
    steps = Steps(run.checkpoints)
    commit(steps, 62, {"progress": {"best_step": 20}, "ledger": Journal(run.ledger, print).position()})
    assert "ends before checkpoint 62" in "".join(each.says for each in library.verify(run) if not each.well)


def test_a_manifest_without_the_ledgers_position_is_told(run):
    for position in (None, {"bytes": -1, "sha256": ""}, {}):
        rewrite_manifest(run.checkpoints / "60", lambda body, position=position: body.update(ledger=position))
        assert failures(run) == {("ledger.jsonl", "its length and hash at step 60 are not in the manifest")}


def test_metrics_are_checked_for_order_and_whole_lines(run):
    whole = run.metrics.read_bytes().splitlines(keepends=True)
    for lines, says in (
        ([whole[1], whole[0], *whole[2:]], "has step 5 after a later step"),
        ([whole[0], *whole], "has step 5 more than once"),
        ([*whole, b"{"], "ends within a line"),
        ([b"x\n", *whole], "line 1: not JSON"),
        ([b"{}\n", *whole], "1 records tell of no step"),
    ):
        run.metrics.write_bytes(b"".join(lines))
        assert failures(run) == {("metrics.jsonl", says)}


def test_half_a_line_and_what_is_half_written_are_a_trainers_own_while_it_runs(run):
    with run.ledger.open("ab") as file:
        file.write(b'{"step": 61')
    Steps(run.checkpoints).begin(70)
    lock = RunLock(run.lock)
    assert failures(run) == set()
    assert not any("left by a crash" in finding.says for finding in library.verify(run))
    lock.release()
    assert failures(run) == {("ledger.jsonl", "ends within a line")}
    assert any("left by a crash" in finding.says for finding in library.verify(run))


def test_a_config_that_cannot_be_used_is_told_by_verify(run):
    run.config.write_text('{"model": {"d_ff": -1}}')
    ((what, told),) = failures(run)
    assert what == "config.json"
    assert "model.d_ff = -1" in told


# ------------------------------------------------------------------------------------------------------------ ledgers


def ledger(until, **changes):
    """The ledger's records of a run without a fault, those of some steps changed: `loss=[3]` changes the loss of step 3."""
    records = [step_record(step) for step in range(1, until + 1)]
    records += [{"step": step, "parameters": f"p{step}"} for step in range(0, until + 1, 10)]
    for record in records:
        for name, steps in changes.items():
            if record["step"] in steps and (name in record or name == "update"):
                record[name] = "other"
    return sorted(records, key=lambda record: record["step"])


def test_equal_ledgers_are_identical():
    verdict = compare_ledgers(ledger(30), ledger(30))
    assert verdict.identical
    assert (verdict.common, verdict.same_until, verdict.digests) == (30, 30, 4)


def test_empty_ledgers_prove_nothing():
    assert not compare_ledgers([], []).identical
    assert compare_ledgers([], []).same_until == 0


def test_a_run_that_is_not_as_far_agrees_but_is_not_identical():
    verdict = compare_ledgers(ledger(30), ledger(20))
    assert verdict.agree
    assert not verdict.identical
    assert (verdict.common, verdict.same_until, verdict.a.last, verdict.b.last) == (20, 20, 30, 20)


@pytest.mark.parametrize("name", ["rows", "loss", "update"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_step_that_differs_is_named(name, swapped):
    a, b = ledger(30), ledger(30, **{name: [17, 21]})
    verdict = compare_ledgers(*((b, a) if swapped else (a, b)))
    assert getattr(verdict, name) == [17, 21]
    assert verdict.same_until == 16
    assert not verdict.agree
    assert sum(len(getattr(verdict, each)) for each in ("rows", "loss", "update", "parameters")) == 2


def test_parameters_count_only_where_both_have_a_digest():
    b = [record for record in ledger(30, parameters=[20]) if record != {"step": 10, "parameters": "p10"}]
    verdict = compare_ledgers(ledger(30), b)
    assert (verdict.parameters, verdict.digests, verdict.same_until) == ([20], 3, 19)
    assert not verdict.agree
    assert compare_ledgers(ledger(30), [record for record in ledger(30) if "parameters" not in record]).identical


def test_other_parameters_at_the_start_leave_nothing_the_same():
    assert compare_ledgers(ledger(30), ledger(30, parameters=[0])).same_until == 0


@pytest.mark.parametrize("gone", [[1], [15], [14, 15, 16], [3, 20]])
def test_missing_steps_are_named(gone):
    b = [record for record in ledger(30) if record["step"] not in gone]
    verdict = compare_ledgers(ledger(30), b)
    assert [step for first, last in verdict.b.missing for step in range(first, last + 1)] == gone
    assert verdict.a.missing == []
    assert verdict.same_until == gone[0] - 1
    assert not verdict.agree


@pytest.mark.parametrize("change", [{}, {"loss": "other"}])
def test_doubled_steps_are_named_even_with_equal_values(change):
    b = sorted([*ledger(30), step_record(12) | change], key=lambda record: record["step"])
    verdict = compare_ledgers(ledger(30), b)
    assert verdict.b.doubled == [12]
    assert verdict.loss == ([12] if change else [])
    assert not verdict.agree


def test_a_save_that_was_tried_again_doubles_no_step():
    assert compare_ledgers(ledger(30), [*ledger(30), {"step": 30, "parameters": "p30"}]).identical


def test_steps_that_were_made_again_without_dropping_the_old_ones_are_doubled():
    records = ledger(20) + [record for record in ledger(25) if record["step"] > 17]
    state = compare_ledgers(ledger(25), records).b
    assert state.doubled == [18, 19, 20]
    assert state.disordered == [18, 19]


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"step": "1", "loss": "x", "rows": "y"},
        {"step": True, "loss": "x", "rows": "y"},
        {"step": 0, "loss": "x", "rows": "y"},
        {"step": -3, "parameters": "x"},
        {"step": 31, "loss": "x"},
        {"step": 31, "rows": "y"},
        {"step": 31, "loss": ["x"], "rows": {}},
        {"step": None},
    ],
)
def test_a_record_that_tells_of_no_step_is_counted(odd):
    verdict = compare_ledgers([*ledger(30), odd], ledger(30))
    assert verdict.a.unusable == 1
    assert not verdict.agree


def test_a_step_far_beyond_the_others_is_a_gap_and_no_burden():
    verdict = compare_ledgers(ledger(5), [*ledger(5), step_record(10**15)])
    assert verdict.b.missing == [(6, 10**15 - 1)]


def test_steps_are_told_in_words():
    assert spans([3]) == "step 3"
    assert spans([3, 4, 5, 9]) == "steps 3-5, 9"
    assert spans([(2, 2), (3, 4)]) == "steps 2-4"
    assert spans(range(1, 20, 2)) == "steps 1, 3, 5, 7, 9 and 5 more"


# ----------------------------------------------------------------------------------------------------------- compare


def test_two_runs_that_are_the_same_are_told_so(run, lumina):
    train("runs/two")
    text = lumina("compare", "one", "two")
    assert "config: the same" in text
    assert "data: the same" in text
    assert "ledger: identical, all 60 steps, bit for bit; parameters too, at 6 of them" in text
    assert lumina("compare", "one", "two", "--json")["ledger"]["identical"] is True


def test_differences_are_told_field_by_field_and_from_which_step(run, lumina):
    two = train("runs/two", until=40, optim_learning_rate=0.5, train_steps=40)
    two.data.write_text(json.dumps({"fingerprint": "e" * 64}))
    two.ledger.write_bytes(two.ledger.read_bytes().replace(b'"00000021"', b'"00000022"'))
    text = lumina("compare", "one", "two")
    for words in (
        "config: differs in 2 fields",
        "optim.learning_rate: 0.0003 / 0.5\n",
        "train.steps: 60 / 40 (may change)",
        "data: dddddddddddd / eeeeeeeeeeee",
        "a to step 60, b to 40; 40 in both, the same to 32",
        "loss bits differ first at step 33, in all at step 33",
    ):
        assert words in text
    found = lumina("compare", "one", "two", "--json")
    assert found["config"][0] == {"field": "optim.learning_rate", "a": 0.0003, "b": 0.5, "decides": True}
    assert found["ledger"]["same_until"] == 32
    assert found["ledger"]["a"]["last"] == 60


def test_losses_stand_side_by_side_at_about_ten_steps_that_both_logged(run, lumina):
    train("runs/two", until=57, every=19)
    found = lumina("compare", "one", "two", "--json")["losses"]
    assert [row["step"] for row in found["train"]] == [5, 10, 15, 20, 25, 35, 40, 45, 50, 55]
    assert found["train"][0] == {"step": 5, "loss_a": 4.75, "loss_b": 4.75, "bits_per_byte_a": 2.875, "bits_per_byte_b": 2.875}
    assert found["eval"] == []
    lines = lumina("compare", "one", "two").splitlines()
    assert lines[-2].startswith("train loss of a  █")
    assert lines[-2].rstrip().endswith("▁")


def test_damaged_lines_are_counted_in_a_comparison(run, lumina):
    two = train("runs/two")
    with two.metrics.open("ab") as file:
        file.write(b"damaged\nhalf")
    assert "runs/two/metrics.jsonl: 2 lines are damaged, and left out" in lumina("compare", "one", "two")
    assert lumina("compare", "one", "two", "--json")["damaged"] == {"runs/two/metrics.jsonl": 2}


def test_a_config_that_cannot_be_read_cannot_be_compared(run, refused):
    train("runs/two").config.write_text("[]")
    assert "runs/two/config.json: cannot be read as a config" in refused(ConfigError, "compare", "one", "two")[1]


# --------------------------------------------------------------------------------------------------------- retention


def test_prune_keeps_the_newest_the_best_and_pinned_ones(run, lumina):
    Steps(run.checkpoints).pin(10)
    before = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    found = lumina("prune", "one", "--json")
    after = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    assert found["deleted"] == [30, 40]
    assert Steps(run.checkpoints).all() == found["stay"] == [10, 20, 50, 60]
    assert found["freed_bytes"] == before - after > 4096
    assert lumina("prune", "one", "--json")["deleted"] == []
    assert "checkpoints that stay: 10 (pinned), 20 (best), 50, 60" in lumina("prune", "one")


def test_prune_takes_its_defaults_from_the_config(lumina):
    run = train("runs/one", checkpoint_keep=3, checkpoint_keep_every=30)
    lumina("prune", "one")
    assert Steps(run.checkpoints).all() == [20, 30, 40, 50, 60]
    lumina("prune", "one", "--keep", "2")
    assert Steps(run.checkpoints).all() == [20, 30, 50, 60]


def test_a_dry_run_of_prune_tells_the_same_and_deletes_nothing(run, lumina):
    Steps(run.checkpoints).begin(70)
    before = listing(run.path)
    told = lumina("prune", "one", "--dry-run", "--json")
    assert listing(run.path) == before
    done = lumina("prune", "one", "--json")
    assert {name: told[name] for name in ("deleted", "leftovers", "freed_bytes", "stay")} == {
        name: done[name] for name in ("deleted", "leftovers", "freed_bytes", "stay")
    }
    assert done["leftovers"] == [".writing-70"]
    assert not (run.checkpoints / ".writing-70").exists()


def test_prune_says_what_was_really_freed(run, lumina, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as on a disk that lets nothing be deleted
    assert lumina("prune", "one", "--json")["freed_bytes"] == 0
    assert Steps(run.checkpoints).all() == [20, 50, 60]  # out of sight all the same


@pytest.mark.parametrize("keep", [1, 0, -2])
def test_prune_refuses_to_keep_fewer_than_two(keep, run, refused):
    assert f"--keep = {keep}: must be at least 2" in refused(UsageError, "prune", "one", "--keep", keep)[1]
    assert len(Steps(run.checkpoints).all()) == 6


def test_prune_is_refused_while_a_trainer_runs(run, refused):
    lock = RunLock(run.lock)
    assert "is in use by process" in refused(UsageError, "prune", "one")[1]
    lock.release()
    assert len(Steps(run.checkpoints).all()) == 6


def test_prune_releases_the_lock_even_when_it_fails(run, lumina, refused, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Steps, "remove", lambda self, steps: os.rename("nowhere", "x"))
        assert refused(UsageError, "prune", "one")[1].startswith("nowhere: No such file")
    assert lumina("prune", "one", "--json")["deleted"] == [10, 30, 40]


@pytest.mark.parametrize("damage", [flip, truncate, edit_manifest])
def test_damaged_checkpoints_do_not_count_among_the_newest_that_prune_keeps(damage, lumina):
    run = train("runs/one", until=40, best=40)
    damage(run)  # step 30
    lumina("prune", "one")
    assert Steps(run.checkpoints).all() == [20, 30, 40]


def test_prune_without_a_readable_config_is_refused(run, refused):
    run.config.write_text("{}x")
    refused(ConfigError, "prune", "one", "--keep", 2)
    assert len(Steps(run.checkpoints).all()) == 6


def test_prune_leaves_what_was_set_aside_and_says_so(run, lumina):
    Steps(run.checkpoints).set_aside(30)
    assert "broken-30 was set aside as broken and stays" in lumina("prune", "one")
    assert (run.checkpoints / "broken-30").is_dir()


def test_pinning_holds_until_unpinning(run, lumina, refused):
    assert lumina("pin", "one", 10, "--json")["pinned"] == [10]
    lumina("prune", "one")
    assert Steps(run.checkpoints).all() == [10, 20, 50, 60]
    lumina("unpin", "one", 10)
    lumina("prune", "one")
    assert Steps(run.checkpoints).all() == [20, 50, 60]
    assert "step 10 is not pinned; there are none" in refused(CheckpointError, "unpin", "one", 10)[1]
    assert "no step 10 to pin; there are 20, 50, 60" in refused(CheckpointError, "pin", "one", 10)[1]


# ------------------------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize("arguments", [["runs", "--help"], ["runs"], ["runs", "show", "one"], ["runs", "verify", "one"]])
def test_runs_imports_nothing_heavy(arguments, run):
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(cli.__file__))!r})
import lumina.cli
try:
    lumina.cli.run({arguments})
except SystemExit:
    pass
print(sorted(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.strip(" '[]").split(".")[0] for name in done.stderr.split(",")}
    assert not loaded & {"jax", "flax", "optax", "orbax", "grain", "torch", "tiktoken", "absl", "numpy"}
    assert done.stdout


def test_a_run_that_cannot_be_read_does_not_hide_the_others(run, lumina, monkeypatch):
    train("runs/two", until=10)
    summary = library.summary

    def failing(run):
        if run.path.name == "one":
            raise PermissionError(13, "Permission denied")
        return summary(run)

    monkeypatch.setattr(library, "summary", failing)
    first, second = lumina().splitlines()[1:]
    assert first.endswith("broken (cannot be read: Permission denied)")
    assert second.split()[0] == "two"


def test_what_a_terminal_cannot_show_is_spelled_out(run):
    train("runs/two", until=10)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))}
    command = [sys.executable, "-m", "lumina.cli", "runs", "compare", "one", "two"]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 0
    assert b"\\u2588" in done.stdout
