"""The directory of a run, and the rules for going on with one."""

import json
import os
from pathlib import Path
from typing import Any

from lumina.config import Config, from_dict, save, to_dict
from lumina.errors import ConfigError, DataError, UsageError

# Fields that may differ when a run goes on: they change no number that an earlier step has produced, and no later one but by
# rounding.
MAY_CHANGE = (
    "train.steps",
    "train.micro_batches",
    "train.eval_",
    "train.early_stopping",
    "checkpoint.",
    "monitor.",
    "data.cache_dir",
)


class RunDirectory:
    """config.json, data.json, tokenizer/, metrics.jsonl, ledger.jsonl, tensorboard/, samples/, checkpoints/."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.data = self.path / "data.json"
        self.tokenizer = self.path / "tokenizer"
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "ledger.jsonl"
        self.result = self.path / "result.json"
        self.tensorboard = self.path / "tensorboard"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"

    def require_writable(self) -> None:
        """Make the directory, or raise a UsageError now rather than after the first expensive minute."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".write-probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}); choose another --workdir") from error

    def check_same_config(self, config: Config) -> None:
        """Refuse to go on with a run under a config that would make other numbers, naming each field."""
        if not self.config.is_file():
            return
        try:
            before = _flat(to_dict(from_dict(json.loads(self.config.read_text(encoding="utf-8")))))
        except ValueError as error:
            raise ConfigError(f"{self.config}: cannot be read ({error}); choose another --workdir") from error
        now = _flat(to_dict(config))
        changed = [f"{k}: {before[k]!r} -> {now[k]!r}" for k in now if before[k] != now[k] and not k.startswith(MAY_CHANGE)]
        if changed:
            raise ConfigError(f"{self.path} holds a run of another config ({'; '.join(changed)}); choose another --workdir")

    def check_same_data(self, fingerprint: str) -> None:
        """Refuse to go on with a run on other data than it began with."""
        if self.data.is_file():
            before = json.loads(self.data.read_text(encoding="utf-8"))["fingerprint"]
            if before != fingerprint:
                raise DataError(
                    f"{self.path} began on data {before[:12]}, this is {fingerprint[:12]} (a changed file, or another Python "
                    "whose standard library differs); restore the data or choose another --workdir"
                )

    def begin(self, config: Config, data: dict[str, Any], tokenizer: Any) -> None:
        """Record what the run is made of."""
        save(config, self.config)
        self.data.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(self.tokenizer)


def append_json(path: Path, record: dict[str, Any]) -> None:
    """Append one line in one write, so that a reader never sees half of two."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def trim_after(path: Path, step: int) -> None:
    """Drop the records of steps after `step`, and a half-written last line: they will be made again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All records of a file that `append_json` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
