"""Rows of the fault matrix: bad batches, bad data, other devices, another batch size, a changed config, a clock that jumps."""

import json
import os
import shutil
import signal
import struct
from hashlib import sha256

import numpy as np

from lumina.config import load
from lumina.data.rows import permute
from lumina.runs.directory import RunDirectory
from tests.faults.faulty import DAY, Fault
from tests.faults.trial import HUNDRED, Trial, events, last_line, ledger, parameters, require, tree, whole
from tests.lumina.corpora import corpus_of

KILL = {"do": "signal", "signal": signal.SIGKILL}
TOLERANCE = 1e-4  # relative, of losses on another number of devices
ONE_THREAD = "--xla_backend_optimization_level=0"


def killed_at(step: int, run: RunDirectory, saved: int) -> Fault:
    return KILL | {"step": step, "after": str(run.checkpoints / str(saved))}


# ---------------------------------------------------------------------------------------------------------- bad batches


def nan_batches(trial: Trial, part: int, parts: int) -> str:
    """A batch with a NaN is skipped, ten in a row end the run with 93; either way as if they had been passed over."""
    run, other = trial.run("one"), trial.run("one-passed-over")
    trial.train(run, faults=[{"batch": [5], "do": "nan"}])
    trial.train(other, faults=[{"passes_over": [5]}])
    same_but_for(run, other, {5}, [3, 6, 9, 12])
    require([each["step"] for each in events(run, "skipped")] == [5], "the skipped update was not recorded")
    ten, steps = list(range(4, 14)), "--config.train.steps=16"
    run, other = trial.run("ten"), trial.run("ten-passed-over")
    faults = [{"batch": ten, "do": "nan"}]
    for _ in range(2):  # the same command ends the same way
        says = trial.train(run, steps, faults=faults, code=93)
        require("loss is nan" in last_line(says) and "rows" in last_line(says), f"the diagnosis is {last_line(says)!r}")
    trial.train(run, steps, "--config.guard.max_skips=20", faults=faults)
    trial.train(other, steps, faults=[{"passes_over": ten}])
    same_but_for(run, other, set(ten), [3, 12, 15, 16])
    trial.trials += 2
    return "one is skipped; ten in a row: exit 93 with the rows, and guard.max_skips=20 goes through"


def same_but_for(run: RunDirectory, other: RunDirectory, steps: set[int], digests: list[int]) -> None:
    """Two ledgers agree in all steps but these, and in the parameters at the given ones."""
    found, expected = ([r for r in ledger(each) if r["step"] not in steps or "parameters" in r] for each in (run, other))
    require(found == expected, f"{run.path.name}: differs from {other.path.name} besides steps {sorted(steps)}")
    for step in digests:
        require(parameters(run, step) == parameters(other, step) is not None, f"other parameters at step {step}")
    rows = [[r["step"] for r in ledger(each) if "rows" in r] for each in (run, other)]
    require(rows[0] == rows[1] == sorted(set(rows[0])), "not every step once")
    whole(run)


def spikes(trial: Trial, part: int, parts: int) -> str:
    """One spike, skipped or rewound over; spikes without end: 93."""
    guard = ("--config.guard.spike_sigmas=6", "--config.guard.spike_window=20", "--config.checkpoint.every=10", *HUNDRED)
    one, endless = [80], list(range(80, 101))
    for action, passed in (("skip", [80]), ("rewind", list(range(71, 81)))):
        flags = (*guard, f"--config.guard.spike_action={action}")
        run, other = trial.run(action), trial.run(f"{action}-passed-over")
        spike = {"batch": one, "do": "random tokens"}
        trial.train(run, *flags, faults=[spike])
        trial.train(other, *flags, faults=[spike, {"passes_over": passed}])
        event = "skipped" if action == "skip" else "rewound"
        require(len(events(run, event)) == 1, f"{len(events(run, event))} {event}, not 1")
        same_but_for(run, other, {80} if action == "skip" else set(), [90, 100])
        run = trial.run(f"{action}-endless")
        says = trial.train(run, *flags, faults=[{"batch": endless, "do": "random tokens"}], code=93)
        require("loss jumped" in last_line(says), f"the diagnosis is {last_line(says)!r}")
        whole(run)
        trial.trials += 2
    return "one: skipped, or rewound over, as if passed over; without end: exit 93"


# ------------------------------------------------------------------------------------------------------------- bad data


def corrupt_shard(trial: Trial, part: int, parts: int) -> str:
    """Flipped bytes in a token shard; the message says what to delete, and then nothing is lost."""
    cache = trial.directory / "cache"
    shutil.copytree(os.environ["LUMINA_CACHE"], cache)
    run = trial.run("run", trial.six)
    (shard,) = cache.glob("corpus-*/train-00000.arrayrecord")
    data = bytearray(shard.read_bytes())
    for place in range(len(data) // 10, len(data) * 9 // 10, 1000):
        data[place] ^= 0x10
    shard.write_bytes(data)
    says = last_line(trial.train(run, code=4, LUMINA_CACHE=str(cache)))
    require(str(shard) in says and f"delete {shard.parent}" in says, f"says {says!r}")
    shutil.rmtree(shard.parent)
    trial.train(run, LUMINA_CACHE=str(cache))
    trial.nothing_lost(run)
    trial.trials += 1
    return "exit 4 names the shard and what to delete; then it is made again"


def changed(trial: Trial, part: int, parts: int) -> str:
    """A config, text or tokenizer that changed under a run is refused by name, and the run is as it was."""
    text = trial.directory / "text.jsonl"
    documents = [{"text": f"def f{n}(x):\n    return x * {n} + {n * n}\n" * 5} for n in range(400)]
    text.write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    own = (f"--config.data.source={text}",)
    run = trial.run("text")
    trial.train(run, *own, faults=[killed_at(5, run, 3)], code=-signal.SIGKILL)
    before = tree(run.path)
    lines = text.read_text(encoding="utf-8")
    text.write_text(lines.replace("return", "yield", 3), encoding="utf-8")
    refused(trial, run, before, 4, "began on other data", *own)
    text.write_text(lines, encoding="utf-8")
    saved = next(run.tokenizer.iterdir())  # the very tokenizer, as a file of one's own
    trial.train(run, *own)
    run = trial.run("tokenizer")
    own_tokenizer = trial.directory / f"own{saved.suffix}"
    shutil.copy(saved, own_tokenizer)
    flags = (*own, f"--config.data.tokenizer={own_tokenizer}")
    trial.train(run, *flags, faults=[killed_at(5, run, 3)], code=-signal.SIGKILL)
    before, bytes_before = tree(run.path), own_tokenizer.read_bytes()
    smaller = trial.run("smaller")  # another tokenizer under the same name
    trial.train(smaller, *own, "--config.model.vocab_size=299", "--config.train.steps=1", "--config.optim.warmup_steps=0")
    shutil.copy(smaller.tokenizer / saved.name, own_tokenizer)
    refused(trial, run, before, 4, "began on other data", *flags)
    own_tokenizer.write_bytes(bytes_before)
    trial.train(run, *flags)
    run = trial.run("config", trial.six)
    before = tree(run.path)
    fields = ("optim.learning_rate=0.02", "train.seed=1", "data.held_out=0.1", "model.d_ff=32", "data.tokenizer=gpt2")
    for flag in (*fields, "guard.spike_window=9"):
        refused(trial, run, before, 3, flag.partition("=")[0], f"--config.{flag}")
    trial.train(run)
    trial.nothing_lost(run)
    return "text: exit 4, tokenizer: exit 4, six fields: exit 3 with the field; the run is as it was"


def refused(trial: Trial, run: RunDirectory, before: dict[str, bytes], code: int, names: str, *flags: str) -> None:
    says = last_line(trial.train(run, *flags, code=code))
    require(names in says, f"exit {code} does not name {names}: {says!r}")
    after = tree(run.path)
    differ = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name) and name != "lock")
    require(not differ, f"refused {names}, and changed {differ}")
    trial.trials += 1


def clock_jumps(trial: Trial, part: int, parts: int) -> str:
    """The clock jumps a day ahead, and later two days back."""
    run = trial.run("run")
    jumps = [{"step": 4, "do": "clock", "seconds": DAY}, {"step": 8, "do": "clock", "seconds": -2 * DAY}]
    trial.train(run, faults=[*jumps, killed_at(11, run, 9)], code=-signal.SIGKILL)
    trial.train(run, faults=[{"at": "start", "do": "clock", "seconds": -DAY}])
    trial.nothing_lost(run)
    trial.trials += 3
    return "a day ahead, two days back, a day back at a restart: no effect"


# -------------------------------------------------------------------------------------------- other devices, other batches


def devices(trial: Trial, part: int, parts: int) -> str:
    """4 devices, then 2, then 1, then 1 with two micro-batches: the same rows; losses but for rounding."""
    run = trial.run("run")

    def on(count: int) -> dict[str, str]:
        return {"XLA_FLAGS": f"{ONE_THREAD} --xla_force_host_platform_device_count={count}"}

    for count, step in ((4, 5), (2, 8), (1, 11)):
        says = trial.train(run, faults=[killed_at(step, run, step // 3 * 3)], code=-signal.SIGKILL, **on(count))
        require(f"{count} x cpu" in says, f"not on {count} devices")
        trial.trials += 1
    trial.train(run, "--config.train.micro_batches=2", **on(1))
    found, expected = ([r for r in ledger(each) if "rows" in r] for each in (run, trial.reference))
    require([(r["step"], r["rows"]) for r in found] == [(r["step"], r["rows"]) for r in expected], "rows differ")
    losses = np.array([[struct.unpack(">f", bytes.fromhex(r["loss"]))[0] for r in each] for each in (found, expected)])
    worst = float(np.max(np.abs(losses[0] - losses[1]) / losses[1]))
    require(worst < TOLERANCE, f"losses differ by {worst:.1e}, more than {TOLERANCE:g}")
    whole(run)
    return f"4, 2, 1 devices, 2 micro-batches: same rows, losses within {worst:.0e} (at most {TOLERANCE:g})"


def batch_size(trial: Trial, part: int, parts: int) -> str:
    """8 rows a batch, then 16: refused without --accept-changes, and with it every row comes once, in the run's order."""
    run = trial.run("run")
    trial.train(run, "--config.train.batch_size=8", faults=[killed_at(9, run, 6)], code=-signal.SIGKILL)
    before = tree(run.path)
    refused(trial, run, before, 3, "train.batch_size: 8 -> 16", "--config.train.batch_size=16")
    trial.train(run, "--config.train.batch_size=16", "--accept-changes")
    config = load(str(trial.kit / "config.json"))
    corpus = corpus_of(config.data, config.model.vocab_size, lambda line: None)
    rows = (corpus.train.num_tokens - 1) // config.data.sequence_length
    order = permute(np.arange(6 * 8 + 6 * 16, dtype=np.int64), rows, config.train.seed, 0)
    require(len(set(order.tolist())) == len(order), "the expected order repeats a row")
    cuts = [(8 * step, 8 * step + 8) for step in range(6)] + [(48 + 16 * step, 48 + 16 * step + 16) for step in range(6)]
    expected = [sha256(order[a:b].astype("<i8").tobytes()).hexdigest()[:16] for a, b in cuts]
    found = [(r["step"], r["rows"]) for r in ledger(run) if "rows" in r]
    require(found == list(enumerate(expected, 1)), "rows are missing, doubled or out of order")
    require(any("train.batch_size: 8 -> 16" in each["says"] for each in events(run, "changed")), "the change is not recorded")
    whole(run)
    return "8 to 16: refused with the field; accepted, each of 144 rows once, in order"
