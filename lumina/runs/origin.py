"""What a new run begins from: checkpoint.init_from."""

from hashlib import sha256
from pathlib import Path
from typing import Any

from lumina.architecture import tensor_table
from lumina.config import Config
from lumina.errors import CheckpointError, ConfigError, DataError, UsageError
from lumina.interchange.state import Source, State, locate, read_state
from lumina.runs.directory import ACCEPT, RunDirectory, config_changes, deciding, replace_file
from lumina.runs.progress import Progress
from lumina.runs.steps import Steps
from lumina.tokenizer_files import load_tokenizer

FIELD = "checkpoint.init_from"
# What is read: a run on something else begins from weights, unless it says state.
READS = tuple(
    f"data.{name}:" for name in ("source", "mode", "finetuning", "ratio", "stages", "rows", "template", "loss_weights")
)


class Origin:
    """The state of another run, or of a directory, that a run begins from. It is remembered in each manifest of the run."""

    def __init__(self, record: dict[str, Any], new: bool):
        """`record` has path, part and step; `new` says whether the run begins now."""
        self.record, self.new = record, new

    @classmethod
    def of(cls, config: Config, run: RunDirectory, accept: bool = False) -> "Origin | None":
        """What `config` asks a new run to begin from, looked at before anything expensive; or what `run` once began from.

        Raises:
            UsageError, ConfigError, CheckpointError: it is not there, damaged, of another shape, or has nothing left to do.
        """
        steps = Steps(run.checkpoints)
        for step in reversed(steps.all()):
            try:
                record = steps.manifest(step).get("begun_from")
            except CheckpointError:  # restoring will tell of it
                continue
            return cls(record, new=False) if record else None
        if not config.checkpoint.init_from or steps.all() or steps.broken():
            return None
        path, part = Path(config.checkpoint.init_from), config.checkpoint.init_part
        if path.resolve() == run.path.resolve():
            raise UsageError(f"{FIELD} = {str(path)!r}: is this run itself, which has no checkpoint; give another")
        source = locate(path)
        _check_tensors(source, config)
        if part == "auto":
            other = any(change.startswith(READS) for change in config_changes(source.config, config))
            part = "weights" if other or not source.is_whole else "state"
        if part == "state":
            _check_goes_on(source, config, accept)
        return cls({"path": str(path.resolve()), "part": part, "step": source.step}, new=True)

    @property
    def says(self) -> str:
        """For the event."""
        if self.record["part"] == "weights":
            return f"begins from the weights of {self.record['path']} at its step {self.record['step']}, at step 0"
        return f"begins from {self.record['path']}, going on at its step {self.record['step']}"

    def tokenizer(self, run: RunDirectory) -> Path | None:
        """Where the tokenizer of the weights lies: with `run` once that has begun, before in the origin."""
        places = (run.tokenizer, RunDirectory(Path(self.record["path"])).tokenizer)
        return next((place for place in places if place.is_dir()), None)

    def check_data(self, data: dict[str, Any], accept: bool = False) -> list[str]:
        """What is to be told of other data than the origin's. Raises a DataError where that must not be, unless `accept`."""
        path = Path(self.record["path"])
        if not self.new:
            return []
        changed = RunDirectory(path).data_changes(data) if (path / "data.json").is_file() else _tokenizer_changes(path, data)
        if self.record["part"] == "weights":
            return [f"{FIELD}: {change}" for change in changed if change.startswith("tokenizer.")]
        if changed and not accept:
            raise DataError(
                f"{FIELD} = {str(path)!r}: trained on other data ({'; '.join(changed)}); use the same, "
                f"--config.checkpoint.init_part=weights, or go on with it: {ACCEPT}"
            )
        return [f"{FIELD}: {change}" for change in changed]

    def copy_ledger(self, run: RunDirectory) -> None:
        """Begin the ledger of `run` with the source's up to here, if that is as the checkpoint recorded it."""
        source = RunDirectory(Path(self.record["path"]))
        if self.record["part"] == "state" and source.ledger.is_file():
            recorded = Steps(source.checkpoints).manifest(self.record["step"]).get("ledger") or {"bytes": 0, "sha256": ""}
            with source.ledger.open("rb") as file:
                data = file.read(recorded["bytes"])
            if sha256(data).hexdigest() == recorded["sha256"]:
                replace_file(run.ledger, lambda path: path.write_bytes(data))

    def load(self) -> tuple[State, dict[str, Any]]:
        """The state, verified again, and what a manifest would say of it: step 0 and no progress for weights alone."""
        path, part, step = Path(self.record["path"]), self.record["part"], self.record["step"]
        source = locate(path, step=step)
        if source.step != step:
            raise CheckpointError(f"{path}: is at step {source.step} now, and was at {step} when the run began from it")
        state = read_state(source)
        if part == "weights":
            return State(0, state.weights), {"begun_from": self.record}
        progress = source.manifest.get("progress", {})
        return state, {"progress": progress, "begun_from": self.record}


def _tokenizer_changes(path: Path, data: dict[str, Any]) -> list[str]:
    """Of a directory that was imported, which has no data of its own."""
    if not (path / "tokenizer").is_dir():
        return []
    before, now = load_tokenizer(str(path / "tokenizer")).fingerprint, data["tokenizer"]["fingerprint"]
    return [f"tokenizer.fingerprint: {before[:12]} -> {now[:12]}"] if before != now else []


def _check_tensors(source: Source, config: Config) -> None:
    """Raise a ConfigError that names the first tensor that does not fit."""
    found, wanted = ({t.name: t.shape for t in tensor_table(each.model)} for each in (source.config, config))
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"{FIELD} = {str(source.path)!r}: {name} is {found.get(name, 'missing')} there, the model needs "
                f"{wanted.get(name, 'none')}"
            )


def _check_goes_on(source: Source, config: Config, accept: bool) -> None:
    """Raise unless training can go on from the source as it would have there."""
    named = f"{FIELD} = {str(source.path)!r}"
    if not source.is_whole:
        raise ConfigError(f"{named}: holds weights alone; use --config.checkpoint.init_part=weights")
    changed = deciding(config_changes(source.config, config), config)
    if changed and not accept:
        raise ConfigError(
            f"{named}: was trained with another config ({'; '.join(changed)}); use --config.checkpoint.init_part=weights, or "
            f"go on with the change: {ACCEPT}"
        )
    if source.config.guard.spike_window != config.guard.spike_window:
        raise ConfigError(f"{named}: remembers guard.spike_window = {source.config.guard.spike_window} losses; use the same")
    if source.step >= config.train.steps:
        raise ConfigError(f"{named}: is at step {source.step}; train.steps = {config.train.steps} must be above it")
    patience = config.train.early_stopping
    if source.is_run and Progress(**source.manifest.get("progress", {})).without_improvement(patience):
        raise ConfigError(f"{named}: stopped early; use train.early_stopping = 0 or above {patience}")
