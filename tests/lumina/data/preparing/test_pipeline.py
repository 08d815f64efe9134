import errno
import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lumina import cli
from lumina.config import DataConfig
from lumina.data.corpus import ORDER, WORK, open_corpus
from lumina.data.preparing import merge, tokenise
from lumina.data.preparing.directory import _one_line, prepare_directory
from lumina.data.preparing.pipeline import Meter, Order, train_tokenizer, training_share, training_texts
from lumina.data.reading import readers
from lumina.data.recipe import Recipe
from lumina.data.records import place
from lumina.data.sources import prepare_all
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.console import Console
from lumina.runs.lock import RunLock
from lumina.runs.units import decimal_bytes
from tests.waiting import GIVES_UP, runs, until

VOCABULARY = 300


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(readers, "UNIT_BYTES", 2000)


def conversation(i):
    said = [{"role": "user", "content": f"What is {i} squared?"}, {"role": "assistant", "content": f"It is {i * i}."}]
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    return {"messages": said if i % 3 else said + more}


def text(i):
    return {"text": f"Document {i} says {i * i}, and then {i**3} as well, with some more words in it."}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepare(out, *sources, workers=0, recipe=Recipe(), held_out=0.1, template="lumina", **asked):  # noqa: B008
    order = Order(tuple(map(str, sources)), recipe, held_out, template)
    asked = {"tokenizer": "bpe", "vocab_size": VOCABULARY, "sample": 1e6, "max_bad": 0.5, "engine": "local"} | asked
    return prepare_directory(order, out, workers=workers, console=Console(0, None), **asked)


def digests(directory):
    """Of every file; what holds a lock is none."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def texts_of(corpus, side):
    """Every document of a side, decoded, by its place in the index."""
    stream, starts = getattr(corpus, side), corpus.documents(side)
    return [corpus.tokenizer.decode(stream.read(int(a), int(b) - 1).tolist()) for a, b in pairwise(starts)]


# ------------------------------------------------------------------------------------------------------- what is made


def test_every_record_is_accounted_for(tmp_path):
    bad = ["{", "[]", '{"text": 3}', '{"text": "  "}', '{"nothing": 1}']
    path = write(tmp_path / "a.jsonl", [text(i) for i in range(60)])
    path.write_text(path.read_text() + "\n".join(bad) + "\n" + path.read_text())
    recipe = Recipe(steps="control,length,exact", min_characters=75)
    manifest = prepare(tmp_path / "out", path, recipe=recipe)
    short = sum(len(text(i)["text"]) < 75 for i in range(60))
    assert 0 < short < 60
    rejects, steps = manifest["rejects"]["counts"], manifest["steps"]
    removed = sum(count for step in steps.values() for count in step["removed"].values())
    assert manifest["records"]["read"] == 125 == manifest["records"]["kept"] + sum(rejects.values()) + removed
    assert sum(rejects.values()) == 5
    assert sum(steps["length"]["removed"].values()) == 2 * short
    assert steps["exact"]["removed"] == {"repeats an earlier document": 60 - short}
    kept = sum(manifest[side]["documents"] for side in ("train", "held_out"))
    assert kept == manifest["records"]["kept"] == 60 - short
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {f"{path}:{number}" for number in range(61, 66)}
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert samples["exact"][0]["after"] == "" if "after" in samples["exact"][0] else "as " in samples["exact"][0]["before"]


def test_the_rejects_that_are_named_are_the_first_of_their_kind(tmp_path):
    path = write(tmp_path / "a.jsonl", [3 if i % 4 == 3 else text(i) for i in range(100)])
    prepare(tmp_path / "out", path)
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [f"{path}:{number}" for number in (4, 8, 12, 16, 20)]


def test_the_index_cuts_the_streams_into_the_documents_in_order(tmp_path):
    path = write(tmp_path / "a.jsonl", [text(i) for i in range(100)])
    prepare(tmp_path / "out", path)
    corpus = open_corpus(tmp_path / "out")
    assert corpus.kind == "text"
    assert corpus.roles("train") is None
    whole = [text(i)["text"] for i in range(100)]
    assert texts_of(corpus, "train") == [each for each in whole if place(each) >= 0.1]
    assert texts_of(corpus, "held_out") == [each for each in whole if place(each) < 0.1]


@pytest.mark.parametrize("block", [1, 2**22])
def test_turns_and_roles_of_conversations_are_where_the_index_says(tmp_path, monkeypatch, block):
    from lumina.conversation import ASSISTANT, NONE, TEXT, USER

    monkeypatch.setattr(merge, "BLOCK_TOKENS", block)
    records = [conversation(i) if i % 5 else text(i) for i in range(100)]
    prepare(tmp_path / "out", write(tmp_path / "a.jsonl", [*records, *records[:20]]))
    corpus = open_corpus(tmp_path / "out")
    assert corpus.kind == "conversation"
    control = corpus.tokenizer.control
    begins, ends = {control["<|user|>"], control["<|assistant|>"]}, control["<|turn_end|>"]
    for side in ("train", "held_out"):
        stream, starts, turns = getattr(corpus, side), corpus.documents(side), corpus.turns(side)
        ids, roles = (each.read(0, stream.num_tokens) for each in (stream, corpus.roles(side)))
        assert turns.tolist() == np.flatnonzero(np.isin(ids, list(begins))).tolist()
        assert (ids[starts[1:] - 1] == corpus.document_end_id).all()
        for turn in turns:
            stop = turn + int(np.flatnonzero(ids[turn:] == ends)[0])
            code = USER if ids[turn] == control["<|user|>"] else ASSISTANT
            assert roles[turn] == NONE
            assert (roles[turn + 1 : stop + 1] == code).all()
        for a, b in pairwise(starts):
            if ids[a] not in begins:
                assert (roles[a:b] == TEXT).all()
            else:
                assert roles[b - 1] == NONE


def test_preferences_are_pairs_of_documents(tmp_path):
    pairs = [
        {"prompt": f"What is {i} squared?", "chosen": f"It is {i * i}.", "rejected": "No idea, sorry, none at all."}
        for i in range(60)
    ]
    prepare(tmp_path / "out", write(tmp_path / "a.jsonl", pairs))
    corpus = open_corpus(tmp_path / "out")
    assert corpus.kind == "preference"
    for side in ("train", "held_out"):
        found = texts_of(corpus, side)
        assert len(found) == 2 * corpus.manifest[side]["documents"]
        assert all("It is" in each for each in found[::2])
        assert all("No idea" in each for each in found[1::2])
        assert [each.partition("<|assistant|>")[0] for each in found[::2]] == [
            each.partition("<|assistant|>")[0] for each in found[1::2]
        ]


def test_preferences_with_others_are_refused(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "a.jsonl", [pair, *map(text, range(50))])
    seen = rf"preference \({path}\) and text \({path}\)"
    with pytest.raises(DataError, match=rf"{seen} .*cannot be prepared together with others; prepare them apart, each with"):
        prepare(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()
    begun = tmp_path / "begun" / WORK / ORDER  # of other sources, for hours
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    with pytest.raises(DataError, match=seen):
        prepare(tmp_path / "begun", path)
    assert begun.exists()


def test_preferences_that_are_seen_late_leave_nothing_behind(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "a.jsonl", [*map(text, range(50)), pair])
    with pytest.raises(DataError, match=rf"holds preference \({path}:51\) and text \({path}:1\) records"):
        prepare(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["preferences", "pairs.jsonl", "prepared"])
def test_training_refuses_preferences_before_it_reads_them(tmp_path, source, monkeypatch):
    pairs = [{"prompt": f"say {i}", "chosen": f"{i} it is", "rejected": f"no {i * i}"} for i in range(40)]
    path = write(tmp_path / "pairs.jsonl", pairs)
    if source == "prepared":
        prepare(tmp_path / "prepared", path)
    spec = source if source == "preferences" else str(tmp_path / source)
    monkeypatch.setattr("lumina.data.sources.train_tokenizer", None)
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=f"^{spec}: holds preferences, chosen and rejected; training needs texts"):
        prepare_all(["synthetic", spec], data, 16, lambda line: None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("count", range(12))
def test_of_equal_documents_the_first_stays(count):
    rng = np.random.default_rng(count)
    keys = rng.integers(0, 3, (count, 2)).astype(np.uint64)
    cut = count // 2
    units = []
    for part in (keys[:cut], keys[cut:]):
        unit = object.__new__(merge._Unit)
        unit.documents = np.zeros(len(part), tokenise.DOCUMENT)
        unit.documents["key"] = part
        unit.name = str
        units.append(unit)
    kept, account = [np.ones(len(unit.documents), bool) for unit in units], tokenise.Account()
    merge._drop_equal(units, kept, account)
    seen, expected = set(), []
    for key in map(tuple, keys.tolist()):
        expected.append(key not in seen)
        seen.add(key)
    assert np.concatenate(kept).tolist() == expected
    assert account.removed == ({"exact": {"repeats an earlier document": expected.count(False)}} if False in expected else {})


# ---------------------------------------------------------------------------------------------- any workers, any stop


@pytest.fixture
def sources(tmp_path):
    records = [conversation(i) if i % 2 else text(i % 150) for i in range(300)]
    (tmp_path / "more.txt").write_text("A text of its own.\n" * 50)
    return write(tmp_path / "a.jsonl", records), tmp_path / "more.txt"


RECIPE = Recipe(steps="control,exact,near,length", near_shingle=2, min_characters=5)


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, sources):
    made = []
    for workers in (0, 1, 3):
        prepare(tmp_path / f"out{workers}", *sources, workers=workers, recipe=RECIPE)
        made.append(digests(tmp_path / f"out{workers}"))
    assert made[0] == made[1] == made[2]
    assert "manifest.json" in made[0]
    assert not any(name.startswith("work") for name in made[0])


class Killed(BaseException):
    pass


def test_a_stop_at_any_point_goes_on_to_the_same_bytes(tmp_path, sources, monkeypatch):
    """A stop before each of: rename of a unit, write to a shard, finish of an index, and the last renames."""
    prepare(tmp_path / "whole", *sources, recipe=RECIPE)
    expected = digests(tmp_path / "whole")
    rename, calls, out = Path.rename, [0, None], tmp_path / "stopped"

    def stopping(self, target):
        calls[0] += 1
        if calls[0] == calls[1]:
            raise Killed
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopping)
    stops = 0
    for at in range(1, 60):
        calls[:] = [0, at]
        try:
            prepare(out, *sources, recipe=RECIPE)
            break
        except Killed:
            stops += 1
    assert stops > 10
    monkeypatch.undo()
    assert digests(out) == expected


def test_what_is_done_is_not_done_again(tmp_path, sources, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(merge, "merge", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            prepare(tmp_path / "out", *sources)
    monkeypatch.setattr(tokenise, "read", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("lumina.tokenizer.train_bpe", lambda *_: pytest.fail("trained again"))
    prepare(tmp_path / "out", *sources)
    assert open_corpus(tmp_path / "out").train.num_tokens


BEGIN = """
import os, sys, time
from lumina.data.reading import readers
readers.UNIT_BYTES = 4000
from lumina.cli import run
if __name__ == "__main__":
    if "NEVER_ENDS" in os.environ:  # however late it is killed
        from lumina.data.preparing import merge
        merge.merge = lambda *_: time.sleep(60_000)
    run(sys.argv[1:])
"""


def test_kill_9_in_the_middle_and_again_gives_the_same_bytes(tmp_path):
    source = write(tmp_path / "a.jsonl", map(text, range(3000)))
    script = tmp_path / "prepare.py"
    script.write_text(BEGIN)
    command = [sys.executable, str(script), "data", "prepare", str(source), "--vocab-size", "300", "--workers", "2", "--out"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    killed = tmp_path / "killed"
    endless = environment | {"NEVER_ENDS": ""}
    with subprocess.Popen([*command, str(killed)], env=endless, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(killed.glob("work/unit-*[0-9]")):
            time.sleep(0.005)
        workers = _children(process.pid)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    until(lambda: not any(map(runs, workers)), lambda: f"{workers} go on without a parent")
    assert not (killed / "manifest.json").exists()
    for out in (killed, tmp_path / "whole"):
        subprocess.run([*command, str(out)], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert digests(killed) == digests(tmp_path / "whole")


def _children(pid):
    """Its processes, where the system tells."""
    listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in listed for child in children]


@pytest.fixture
def patient_ray(monkeypatch):
    """Ray gives its own processes half a minute to start, which a busy machine may need: here, half an hour."""
    node = pytest.importorskip("ray._private.node")
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", str(int(GIVES_UP)))
    slow = {"monotonic": lambda: 30 / GIVES_UP * time.monotonic()}
    monkeypatch.setattr(node, "time", types.SimpleNamespace(**vars(time) | slow))


@pytest.mark.usefixtures("patient_ray")
def test_ray_makes_the_same_bytes(tmp_path, sources):
    prepare(tmp_path / "local", *sources, recipe=RECIPE)
    prepare(tmp_path / "ray", *sources, recipe=RECIPE, engine="ray")
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")


# ------------------------------------------------------------------------------------------------------- what is refused


def test_no_time_left_is_foretold_from_the_first_bytes(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr("lumina.data.preparing.pipeline.time.monotonic", lambda: now[0])
    meter = Meter("tokenised", 10_000_000, said.append)
    for done in (0, 2_000, 97_000, 1_901_000):  # together 0, 0.02, 0.99 and 20 %
        now[0] += 3.0
        meter.add(done, 0, 0)
        meter.tick()
    assert [" left" in line for line in said] == [False, False, False, True]
    assert said[-1].endswith(" 166.7 kB/s, 0:48 left")


def test_a_directory_of_another_order_is_left_alone(tmp_path, sources):
    prepare(tmp_path / "out", *sources)
    before = digests(tmp_path / "out")
    assert prepare(tmp_path / "out", *sources) == json.loads((tmp_path / "out" / "manifest.json").read_text())
    for asked in ({"vocab_size": 301}, {"held_out": 0.2}, {"recipe": Recipe(max_record_mb=8.0)}):
        with pytest.raises(UsageError, match=r"holds another order's work .*->.*choose another --out"):
            prepare(tmp_path / "out", *sources, **asked)
    write(sources[0], map(text, range(9)))
    with pytest.raises(UsageError, match="fingerprint"):
        prepare(tmp_path / "out", *sources)
    assert digests(tmp_path / "out") == before


def test_a_source_that_changes_until_the_shards_are_written_is_refused(tmp_path, sources, monkeypatch):
    merged = merge.merge

    def changing(*given):
        sources[1].write_text("Another text.\n" * 50)
        return merged(*given)

    monkeypatch.setattr(merge, "merge", changing)
    with pytest.raises(DataError, match="changed while it was being read"):
        prepare(tmp_path / "out", *sources)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.EACCES, "/a/out/work", "--out /a/out: cannot be written (Permission denied: /a/out/work); choose another"),
        (errno.EROFS, "/a", "--out /a/out: cannot be written (Read-only file system: /a); choose another"),
        (errno.ENOSPC, "/a/out/work", "/a/out/work: cannot be written (No space left on device); free disk space"),
        (
            errno.EACCES,
            "/b/x.txt",
            "/b/x.txt: cannot be read (Permission denied); mend it, and the same command goes on, or leave",
        ),
    ],
)
def test_an_error_of_the_system_is_told_with_what_would_help(number, path, said):
    with pytest.raises(UsageError, match=f"^{re.escape(said)}"), _one_line(Path("/a/out")):
        raise OSError(number, os.strerror(number), path)


def test_an_out_that_cannot_be_made_or_is_in_use_is_told_so(tmp_path, sources):
    with pytest.raises(
        UsageError, match=r"^--out /proc/x: cannot be written \(No such file or directory: /proc/x\); choose another"
    ):
        prepare(Path("/proc/x"), *sources)
    (tmp_path / "out").mkdir()
    held = RunLock(tmp_path / "out" / ".lock")
    with pytest.raises(UsageError, match="wait for it, stop it, or choose another --out"):
        prepare(tmp_path / "out", *sources)
    held.release()


def test_a_directory_with_something_else_is_left_alone(tmp_path, sources):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is not empty, and no prepared directory"):
        prepare(tmp_path / "out", *sources)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != ".lock"] == ["thesis.txt"]
    with pytest.raises(UsageError, match="is a file"):
        prepare(sources[0], *sources)


def test_mostly_bad_records_stop_it_and_tell_where(tmp_path):
    path = write(tmp_path / "a.jsonl", [*map(text, range(40)), *[3] * 60])
    with pytest.raises(DataError, match=r"60 of 100 records are bad, above --max-bad 0\.5: 60 records .*rejects\.jsonl"):
        prepare(tmp_path / "out", path)
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()[0])["name"] == f"{path}:41"
    assert prepare(tmp_path / "out", path, max_bad=0.6)["records"] == {"read": 100, "kept": 40}


def test_a_worker_that_dies_is_told_and_the_same_command_goes_on(tmp_path, sources, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("lumina.data.preparing.engines.tokenise", _die)
        with pytest.raises(UsageError, match="a worker process was killed; what is done is kept"):
            prepare(tmp_path / "out", *sources, workers=1)
    assert prepare(tmp_path / "out", *sources)["records"]["kept"]


def _die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------------- what a review found wanting


def test_units_of_other_files_are_not_taken_for_those_of_this_order(tmp_path, monkeypatch):
    """The same files by name and as a directory have one fingerprint, and share units in other ways."""
    (tmp_path / "d").mkdir()
    files = [write(tmp_path / "d" / f"{n}.jsonl", map(text, range(5 * n, 5 * n + 5))) for n in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr(merge, "merge", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            prepare(tmp_path / "out", *files)
    with pytest.raises(UsageError, match=r"another order's work .*units"):
        prepare(tmp_path / "out", tmp_path / "d")
    assert prepare(tmp_path / "out", *files)["records"] == {"read": 30, "kept": 30}


def test_bad_records_are_judged_as_a_whole_whatever_the_order_and_the_workers(tmp_path):
    good = write(tmp_path / "good.jsonl", map(text, range(2000)))
    bad = write(tmp_path / "bad.jsonl", [3] * 1500)
    for number, (sources, workers) in enumerate((((bad, good), 0), ((good, bad), 2))):
        assert prepare(tmp_path / f"out{number}", *sources, workers=workers)["records"] == {"read": 3500, "kept": 2000}


def test_replies_off_the_best_path_are_nothing_bad(tmp_path):
    messages = []
    for tree in range(40):
        asked = {"message_id": f"{tree}", "parent_id": None, "role": "prompter", "text": f"What is {tree}?", "rank": 0}
        answers = [
            {"message_id": f"{tree}.{n}", "parent_id": f"{tree}", "role": "assistant", "text": f"It is {n}.", "rank": n}
            for n in range(6)
        ]
        messages += [asked, *answers]
    manifest = prepare(tmp_path / "out", write(tmp_path / "trees.jsonl", messages), vocab_size=262)
    assert manifest["records"]["kept"] == 40
    assert manifest["rejects"]["counts"] == {"off the best path": 200}


def test_another_tokenizer_under_the_same_name_is_another_order(tmp_path, sources):
    from lumina.tokenizer import train_bpe

    texts = [text(i)["text"] for i in range(300)]
    train_bpe(texts, 300).save(tmp_path / "mine")
    prepare(tmp_path / "out", *sources, tokenizer=str(tmp_path / "mine"))
    train_bpe(texts, 280).save(tmp_path / "mine")
    with pytest.raises(UsageError, match=r"tokenizer\.fingerprint"):
        prepare(tmp_path / "out", *sources, tokenizer=str(tmp_path / "mine"))


def test_an_attempt_that_came_to_nothing_is_nobodys_work(tmp_path):
    few = write(tmp_path / "few.jsonl", map(text, range(5)))
    with pytest.raises(DataError, match="gpt2"):
        prepare(tmp_path / "out", few, tokenizer="gpt2")
    with pytest.raises(DataError, match=r"--held-out=([0-9.]+) leaves some on both sides") as refusal:
        prepare(tmp_path / "out", few, held_out=0.0001)
    works = float(str(refusal.value).partition("--held-out=")[2].partition(" ")[0])
    assert prepare(tmp_path / "out", few, held_out=works)["records"]["kept"] == 5


def test_an_output_inside_of_a_source_is_refused_at_once(tmp_path):
    write(tmp_path / "a.jsonl", map(text, range(50)))
    with pytest.raises(UsageError, match="would change while it is read"):
        prepare(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_pair_that_cleaning_makes_equal_is_removed(tmp_path):
    pairs = [{"prompt": f"Mail {i}?", "chosen": f"a{i}@b.com", "rejected": f"c{i}@d.com"} for i in range(30)]
    pairs += [{"prompt": f"Name {i}?", "chosen": f"Anna {i}", "rejected": f"Bert {i}"} for i in range(30)]
    manifest = prepare(tmp_path / "out", write(tmp_path / "a.jsonl", pairs), recipe=Recipe(steps="redact"), vocab_size=262)
    assert manifest["steps"]["redact"]["removed"] == {"chosen and rejected are equal": 30}


FEW = [{"text": f"Note {i} says {i * i}, and {'more ' * (i % 7)}than that."} for i in range(12)]  # none of them below 0.02


def made_of_few(tmp_path, name, *flags):
    path = write(tmp_path / "few.jsonl", FEW)
    cli.run(["data", "prepare", str(path), "--out", str(tmp_path / name), "--workers", "0", *flags])
    return open_corpus(tmp_path / name).manifest


def test_a_few_documents_are_prepared_without_any_option_and_what_is_chosen_is_said(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Console, "say", lambda self, line: told.append(line))
    places = [place(each["text"]) for each in FEW]
    assert min(places) > 0.02
    manifest = made_of_few(tmp_path, "out")
    share, ids = manifest["held_out_fraction"], manifest["tokenizer"]["vocab_size"]
    assert f"{share:g} of the documents are held out: of 12, 0.02 would leave all on one side" in told
    assert f"the tokenizer has {ids:,} ids, not 32,768: so many the text has pairs to merge for" in told
    assert manifest["held_out"]["documents"] == sum(each < share for each in places) >= 1
    assert 262 < ids < 1000
    asked = made_of_few(tmp_path, "asked", "--held-out", f"{share}", "--vocab-size", f"{ids}")
    shards = [name for name in digests(tmp_path / "out") if name != "manifest.json"]
    assert {name: digests(tmp_path / "out")[name] for name in shards} == {
        name: digests(tmp_path / "asked")[name] for name in shards
    }
    assert asked["records"] == manifest["records"]
    assert made_of_few(tmp_path, "out") == manifest
    assert "is prepared already" in told[-1]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--vocab-size", "9999"], "only .* --vocab-size to at most"),
        (["--held-out", "0.02"], "none of 12 documents"),
    ],
)
def test_what_is_asked_for_is_not_changed(tmp_path, flags, why):
    with pytest.raises(DataError, match=why):
        made_of_few(tmp_path, "out", *flags)
    assert not (tmp_path / "out").exists()


def test_many_documents_are_split_by_the_default(tmp_path):
    records = [text(i) for i in range(400)]
    places = [place(each["text"]) for each in records]
    first = next(i for i, each in enumerate(places) if each < 0.02)
    path = write(tmp_path / "a.jsonl", records[first:])
    cli.run(["data", "prepare", str(path), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert open_corpus(tmp_path / "out").manifest["held_out_fraction"] == 0.02


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--vocab-size", "300"], "--vocab-size 300: is of a bpe that is trained, and --tokenizer .* has its own ids"),
        (["--tokenizer-sample-mb", "5"], "--tokenizer-sample-mb 5: is of a bpe"),
    ],
)
def test_options_of_a_trained_tokenizer_are_refused_with_another(tmp_path, flags, says):
    with pytest.raises(UsageError, match=f"^{says}.*leave out one of the two"):
        made_of_few(tmp_path, "out", "--tokenizer", str(tmp_path), *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--vocab-size", "-5"], "^--vocab-size = -5: must be at least 262, 256 bytes and 6 control tokens"),
        (
            ["--text-field", "txet"],
            "^--text-field txet: the first records of .*few.jsonl have none; .*: text$",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_a_tokenizer_is_trained(tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr("lumina.data.preparing.directory.train_tokenizer", None)
    with pytest.raises((ConfigError, DataError), match=says):
        made_of_few(tmp_path, "out", *flags)
    assert not (tmp_path / "out").exists()


def test_of_another_encoding_it_is_told_what_works(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [text(i) for i in range(30)])
    path.write_bytes(path.read_bytes() + '{"text": "süß"}\n'.encode("cp1252"))
    works = "1 not UTF-8 (of text from Windows, iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW makes it so)"
    cli.run(["data", "prepare", str(path), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert works in capsys.readouterr().out
    cli.run(["data", "check", str(path)])
    assert works in capsys.readouterr().out
    cli.run(["data", "show", str(path), "--record", "31"])
    assert works[2:] in capsys.readouterr().out
    path.write_bytes('{"text": "süß"}\n'.encode("cp1252"))
    with pytest.raises(DataError, match="iconv -f WINDOWS-1252 -t UTF-8"):
        cli.run(["data", "prepare", str(path), "--out", str(tmp_path / "bad"), "--workers", "0"])


def test_what_came_by_standard_input_is_called_so(tmp_path, monkeypatch):
    content = write(tmp_path / "a.jsonl", [*(text(i) for i in range(30)), 3, text(0)]).read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    cli.run(["data", "prepare", "-", "--out", str(tmp_path / "out"), "--workers", "0", "--held-out", "0.1"])
    for name in ("manifest.json", "samples.json", "rejects.jsonl"):
        said = (tmp_path / "out" / name).read_text()
        assert "<stdin>" in said
        assert str(tmp_path) not in said
    assert json.loads(said)["name"] == "<stdin>:31"


def test_kinds_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [*(text(i) for i in range(30)), *(conversation(i) for i in range(20)), text(0)])
    cli.run(["data", "prepare", str(path), "--out", str(tmp_path / "out"), "--workers", "0", "--held-out", "0.1"])
    assert "51 read, 50 kept: 30 text, 20 conversation" in capsys.readouterr().out
    manifest = open_corpus(tmp_path / "out").manifest
    assert (manifest["kind"], manifest["kinds"]) == ("conversation", {"text": 30, "conversation": 20})


def test_an_interrupted_order_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*arguments, **others):
        raise KeyboardInterrupt

    monkeypatch.setattr("lumina.data.preparing.directory.fill", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"{tmp_path / 'out'}: the same command goes on with what is done"):
        made_of_few(tmp_path, "out")
    monkeypatch.setattr("lumina.data.preparing.directory.train_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        made_of_few(tmp_path, "other")
    assert interrupt.value.args == ()
    assert not (tmp_path / "other").exists()


def test_what_is_redacted_is_nowhere_in_what_is_made(tmp_path):
    """Nor is the half of an address that the end of a sample cuts, nor one with a character within that `control` removes."""
    who = "qob.qmith@qxample.com"
    split, wrong = who.replace("qmith", "qmi\u200bth"), "schÃ¶n"
    records = [{"text": f"{i} \u200b{wrong} ask {who} or {split} now"} for i in range(20)]  # repaired, controlled, redacted
    records += [{"text": f"\u200b{'x' * at} {who} {'y' * 50}"} for at in (80, 185, 285, 290)]  # samples end in an address
    records += [{"text": f"{who} {i}"} for i in range(9)]  # too short
    chats = [{"prompt": f"Mail {i} of {who}?", "response": "\u200b"} for i in range(9)]  # nothing is left
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in [*records, *chats]) + f"{{ {who}\n{'z' * 70} {who}\n[]\n"
    )
    recipe = Recipe(steps="repair,control,redact,length,exact,near", redact="email", min_characters=15)
    manifest = prepare(tmp_path / "out", tmp_path / "a.jsonl", recipe=recipe, vocab_size=262)
    assert manifest["rejects"]["counts"] == {"no turns": 1, "not JSON": 2}
    cli.run(["data", "report", str(tmp_path / "out"), "--out", str(tmp_path / "out" / "report.html")])
    corpus = open_corpus(tmp_path / "out")
    made = {"train": "".join(texts_of(corpus, "train")), "held out": "".join(texts_of(corpus, "held_out"))}
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            made[path.name] = path.read_bytes().decode("utf-8", "replace")
    assert {"samples.json", "rejects.jsonl", "report.html", "manifest.json"} <= made.keys()
    assert made["samples.json"].count("[EMAIL]") > 20
    for name, holds in made.items():
        assert not re.search("qob|qmi|qxa|ple.com", holds), name
    samples = json.loads(made["samples.json"])
    assert {step: len(each) for step, each in samples.items()} == {"repair": 5, "control": 10, "redact": 5, "length": 5}


def test_equal_questions_are_on_one_side_whatever_the_answers(tmp_path):
    pairs = [
        {"prompt": f"What is {i % 60}?", "chosen": f"It is {i}.", "rejected": "No idea, sorry, none at all."}
        for i in range(240)
    ]
    prepare(tmp_path / "out", write(tmp_path / "a.jsonl", pairs))
    corpus = open_corpus(tmp_path / "out")
    train, held_out = (
        {each.partition("<|assistant|>")[0] for each in texts_of(corpus, side)} for side in ("train", "held_out")
    )
    assert held_out
    assert not train & held_out


def test_what_a_kill_left_after_the_manifest_is_removed(tmp_path, sources):
    prepare(tmp_path / "out", *sources)
    (tmp_path / "out" / "work" / "unit-000000").mkdir(parents=True)
    prepare(tmp_path / "out", *sources)
    assert not (tmp_path / "out" / "work").exists()


def test_a_model_of_fewer_ids_is_told_both_ways_out(tmp_path, sources):
    prepare(tmp_path / "out", sources[0])
    both = f"--config.model.vocab_size={VOCABULARY}, or prepare {tmp_path / 'out'} with --vocab-size 270$"
    with pytest.raises(ConfigError, match=f"^model.vocab_size = 270: .*bpe-{VOCABULARY}'s {VOCABULARY}; use {both}"):
        prepare_all([str(tmp_path / "out")], DataConfig(), 270, lambda line: None)
    data = DataConfig(tokenizer=str(tmp_path / "out" / "tokenizer"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=f"; use --config.model.vocab_size={VOCABULARY}$"):
        prepare_all([str(sources[1])], data, 270, lambda line: None)


def test_a_prepared_directory_in_a_list_of_files_is_refused_with_the_mixture_that_works(tmp_path, sources):
    prepare(tmp_path / "out", sources[0])
    spec = f"{sources[1]}, {tmp_path / 'out'}"
    works = f"mix them by weight: {sources[1]}@1,{tmp_path / 'out'}@1"
    with pytest.raises(ConfigError, match=f"{tmp_path / 'out'} is a prepared directory.*; {works}$"):
        prepare_all([spec], DataConfig(cache_dir=str(tmp_path / "cache")), VOCABULARY, lambda line: None)
    assert not (tmp_path / "cache").exists()


def test_a_prepared_directory_in_another_template_is_refused_and_its_own_split_is_told(tmp_path):
    prepare(tmp_path / "out", write(tmp_path / "a.jsonl", map(conversation, range(80))), template="chat")
    data = DataConfig(source=str(tmp_path / "out"), held_out=0.1)
    with pytest.raises(ConfigError, match=r"data\.template = 'lumina': .*out was prepared with chat"):
        prepare_all([data.source], data, VOCABULARY, lambda line: None)
    said = []
    (corpus,) = prepare_all([data.source], replace(data, template="chat", held_out=0.5), VOCABULARY, said.append)
    assert corpus.kind == "conversation"
    assert said[0].endswith("out: 0.1 of its documents are held out, as it was prepared; data.held_out is not asked")


def test_a_tokenizer_learns_from_what_can_be_counted_and_says_what_it_leaves(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", map(text, range(200)))
    order = Order((str(source),), Recipe(steps="none"), 0.1, "lumina")
    monkeypatch.setattr("lumina.tokenizer.MOST_TRAINING_BYTES", 2000)
    said = []
    texts = list(training_texts([(order, readers.plan(order.sources, order.recipe))], 1.0, said.append))
    assert 1500 < sum(map(len, texts)) <= 1900
    assert [line for line in said if "alone" in line] == said
    assert len(said) == 1


def test_a_sample_of_compressed_files_is_of_the_text_that_they_hold(tmp_path):
    plain = write(tmp_path / "a.jsonl", [{"text": f"{i} " + "the same words again and again " * 40} for i in range(400)])
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    size, said = plain.stat().st_size, []
    assert size > 20 * (packed / "a.jsonl.gz").stat().st_size
    learned = []
    for source in (plain, packed):
        order = Order((str(source),), Recipe(steps="none"), 0.1, "lumina")
        planned = readers.plan(order.sources, order.recipe)
        assert readers.text_bytes(planned) == pytest.approx(size, rel=0.01)
        share = training_share(readers.text_bytes(planned), size / 4)
        learned.append(sum(map(len, training_texts([(order, planned)], share, said.append))))
    assert learned[0] == pytest.approx(size / 4, rel=0.3)
    assert learned[1] == pytest.approx(learned[0], rel=0.1)
    train_tokenizer([(order, planned)], VOCABULARY, (), size / 4, said.append)
    assert said[-1] == f"training a tokenizer of {VOCABULARY:,} ids on {decimal_bytes(size / 4)}"


def test_a_tokenizer_learns_once_from_what_the_exact_step_leaves_once(tmp_path, monkeypatch):
    odd = [{"text": f"zqxj{n} zqxj{n} zqxj{n}"} for n in range(20)]
    once = write(tmp_path / "once.jsonl", [*map(text, range(80)), *odd])
    many = write(tmp_path / "many.jsonl", [*map(text, range(80)), *(100 * odd)])

    def learned(source, steps):
        order = Order((str(source),), Recipe(steps=steps), 0.1, "lumina")
        return list(training_texts([(order, readers.plan(order.sources, order.recipe))], 1.0, lambda line: None))

    assert learned(many, "exact") == learned(once, "exact") == learned(once, "none")
    assert len(learned(many, "none")) > 10 * len(learned(once, "none"))
    exact, none = (
        [
            prepare(tmp_path / f"{source.stem} {steps}", source, recipe=Recipe(steps=steps))["tokenizer"]
            for source in (once, many)
        ]
        for steps in ("exact", "none")
    )
    assert exact[0] == exact[1] == none[0] != none[1]
    known = len([each for each in learned(once, "none") if "zqxj" not in each]) + 5
    monkeypatch.setattr("lumina.data.preparing.pipeline.REMEMBERED", known)
    assert len(learned(many, "exact")) == known + 100 * (len(learned(once, "none")) - known)
