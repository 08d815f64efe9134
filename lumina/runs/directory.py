"""The directory of a run, and the rules for going on with one."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lumina.config import Config, from_dict, save, to_dict
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.journal import Journal

# Fields that may differ when a run goes on: later numbers change by no more than rounding. But for train.steps, which stretches
# the schedule of the learning rate, and for checkpoint.every and guard.max_*, which decide where a rewind goes and how often.
MAY_CHANGE = (
    "model.attention_form",
    "model.moe.grouped_form",
    "train.steps",
    "train.micro_batches",
    "train.remat",
    "optim.offload",
    "train.eval_",
    "train.early_stopping",
    "mesh.",
    "checkpoint.",
    "guard.max_",
    "guard.hang_seconds",
    "monitor.",
    "data.cache_dir",
    "data.workers",
    "torch.device",
    "torch.compile",
    "torch.deepspeed.",
)
ACCEPT = "--accept-changes"


class RunDirectory:
    """config.json, data.json, tokenizer/, metrics.jsonl, ledger.jsonl, events.jsonl, tensorboard/, samples/, checkpoints/."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.data = self.path / "data.json"
        self.tokenizer = self.path / "tokenizer"
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.events = self.path / "events.jsonl"
        self.result = self.path / "result.json"
        self.tensorboard = self.path / "tensorboard"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.lock = self.path / "lock"

    def require_writable(self) -> None:
        """Make the directory, or raise a UsageError now rather than after the first expensive minute."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}); choose another --workdir") from error

    def changes(self, config: Config) -> list[str]:
        """Fields in which `config` differs from that of the run, as `name: before -> now`, those that may change included."""
        return config_changes(self._saved_config() or config, config)

    def check_same_config(self, config: Config, accept: bool = False) -> None:
        """Refuse to go on with a run under a config that would make other numbers, naming each field, unless `accept`."""
        changed = deciding(self.changes(config), config)
        if changed and not accept:
            raise ConfigError(
                f"{self.path} holds a run of another config ({'; '.join(changed)}); choose another --workdir, "
                f"or go on with the change from the newest checkpoint: {ACCEPT}"
            )

    def data_changes(self, data: dict[str, Any]) -> list[str]:
        """How `data`, a corpus's manifest with its fingerprint, differs from what the run began with, field by field."""
        before = self._saved_data()
        if before is None or before["fingerprint"] == data["fingerprint"]:
            return []
        then, now = flat(before), flat(data)
        parts = ("source.", "tokenizer.", "held_out", "train.", "others.")
        told = [name for name in now if name.startswith(parts) and not name.endswith("shards")]
        changed = [f"{name}: {_brief(then.get(name))} -> {_brief(now[name])}" for name in told if then.get(name) != now[name]]
        return changed or [f"fingerprint: {_brief(before['fingerprint'])} -> {_brief(data['fingerprint'])}"]

    def check_same_data(self, data: dict[str, Any], accept: bool = False) -> None:
        """Refuse to go on with a run on other data, or another tokenizer, than it began with, unless `accept`."""
        changed = self.data_changes(data)
        if changed and not accept:
            raise DataError(
                f"{self.path} began on other data ({'; '.join(changed)}), such as a changed file, or another Python whose "
                f"standard library differs; restore the data, choose another --workdir, or go on with it: {ACCEPT}"
            )

    def record(self, config: Config, data: dict[str, Any], tokenizer: Any) -> None:
        """Write down what the run is made of, each file whole or not at all."""
        if self._saved_config() != config:
            replace_file(self.config, lambda path: save(config, path))
        if (self._saved_data() or {}).get("fingerprint") != data["fingerprint"]:
            tokenizer.save(self.tokenizer)
            for path in self.tokenizer.iterdir():
                _sync(path)
            replace_file(self.data, lambda path: path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"))

    def write_result(self, result: dict[str, Any]) -> None:
        """How the run ended."""
        replace_file(self.result, lambda path: path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))

    def _saved_config(self) -> Config | None:
        if not self.config.is_file():
            return None
        try:
            return from_dict(json.loads(self.config.read_text(encoding="utf-8")))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{self.config}: cannot be read ({error}); choose another --workdir") from error

    def _saved_data(self) -> dict[str, Any] | None:
        if not self.data.is_file():
            return None
        try:
            saved = json.loads(self.data.read_text(encoding="utf-8"))
            saved["fingerprint"]
            return dict(saved)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.data}: cannot be read ({error}); choose another --workdir") from error


class Events:
    """events.jsonl: starts, resumptions, stops, skipped batches, broken checkpoints, restarts with causes, never trimmed."""

    def __init__(self, run: RunDirectory | None, say: Callable[[str], None]):
        """Without a run, in all processes but the first, nothing is recorded."""
        self._journal, self._say = Journal(run.events, say) if run else None, say
        self._lock = threading.Lock()  # saves and backups tell of themselves from threads of their own

    def write(self, event: str, step: int, says: str = "", **details: Any) -> None:
        """Record an event, with the time; `says` is also shown."""
        if says:
            self._say(says)
        if self._journal is None:
            return
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            self._journal.append({"time": when, "event": event, "step": step, **({"says": says} if says else {}), **details})


def config_fingerprint(config: Config) -> str:
    """SHA-256 over the fields that decide a run's numbers."""
    deciding = {name: value for name, value in flat(to_dict(config)).items() if not _may_change(name, config)}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def config_changes(before: Config, now: Config) -> list[str]:
    """Fields in which two configs differ, as `name: before -> now`."""
    then, new = flat(to_dict(before)), flat(to_dict(now))
    return [f"{name}: {then.get(name)!r} -> {new[name]!r}" for name in new if then.get(name) != new[name]]


def deciding(changes: list[str], config: Config) -> list[str]:
    """Those of `config_changes` that decide a run's numbers."""
    return [change for change in changes if not _may_change(change, config)]


def _may_change(name: str, config: Config) -> bool:
    """Whether `name`, a field, may change within a run: nothing depends on it but rounding."""
    counted = config.model.moe.balance_over == "micro_batch" and name.startswith("train.micro_batches")
    moves_stages = config.data.mode == "hybrid" and name.startswith("train.steps")
    return name.startswith(MAY_CHANGE) and not counted and not moves_stages


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` make the file, whole or not at all."""
    temporary = path.with_name(f".new-{path.name}")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # where it could not be finished


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _brief(value: Any) -> str:
    """A value in few characters: hashes are told apart by their first twelve."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value) else repr(value)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, of dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return found
