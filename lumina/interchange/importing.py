"""`lumina import`: a Llama, Mixtral or Qwen3-MoE directory as a canonical one, verified before it exists.

V vocabulary, D model width.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lumina.config import TOKENIZER, Config, DataConfig, ModelConfig, validate
from lumina.errors import ConfigError, DataError, UsageError
from lumina.interchange import foreign, verify
from lumina.interchange.exporting import Say, appearing, held_out, require_new, write_canonical, write_json
from lumina.interchange.safe_tensors import INDEX, SafeTensors
from lumina.tokenizer import FILE, Tokenizer
from lumina.tokenizer_files import load_tokenizer


def import_directory(path: Path, out: Path, say: Say) -> dict[str, Any]:
    """Write the model in `path` to the new directory `out`, under canonical names; returns what was verified.

    Raises:
        UsageError: `path` or `out` cannot be used, or transformers is not installed. ConfigError: our model has no such thing.
        CheckpointError: the weights do not fit, or transformers computes something else. DataError: of the tokenizer.
    """
    from lumina.interchange.state import State

    verify.require_transformers()
    require_new(out)
    values = read_config(path)
    form, model = values["model_type"], foreign.model_of(values)
    tokenizer = tokenizer_of(path)
    tensors = SafeTensors(path)
    say("reading the weights")
    weights = foreign.canonical(model, form, tensors, tensors.load)
    known = model.vocab_size
    model, weights, added = with_control_rows(model, weights, tokenizer)
    data = DataConfig(sequence_length=positions_of(values), tokenizer=TOKENIZER)
    config = validate(Config(model=model, data=data))
    told: dict[str, Any] = {"source": str(path), "format": form, "rows_added": added}
    with appearing(out) as directory:
        rows_NT, pieces, source = held_out(config, tokenizer)
        rows_NT[rows_NT >= known] = 0  # what was imported has no row for a document end that was added
        with weights_alone(path, tensors.files) as alone:
            theirs = verify.Theirs(alone, form)
            told["logits"] = verify.compare_models(verify.Ours(model, weights), theirs, rows_NT, say)
        if (path / "tokenizer.json").is_file():
            told["tokenizer"] = verify.compare_ids(verify.load_tokenizer(path, alone=True), tokenizer, pieces, chat=False)
        told["text"] = {"source": source, "rows": rows_NT.shape[0], "positions": rows_NT.shape[1]}
        told["versions"] = verify.versions()
        write_json(directory / verify.FILE, told)
        say("writing the weights")
        write_canonical(directory, config, State(0, weights), tokenizer, {"step": 0, "imported_from": str(path)})
    return told


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a directory of Hugging Face; raises UsageError or ConfigError where it is none."""
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{path}: has no config.json; give a directory that transformers' save_pretrained wrote")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ConfigError(f"{file}: names no model_type; give a directory that transformers' save_pretrained wrote")
    return values


def positions_of(values: dict[str, Any]) -> int:
    """T that the model takes; transformers' own default where config.json names none."""
    positions = values.get("max_position_embeddings", 2048)
    if type(positions) is not int or positions < 2:
        raise ConfigError(f"config.json: max_position_embeddings = {positions!r}: must be a whole number of at least 2")
    return positions


def tokenizer_of(path: Path) -> Tokenizer:
    """Lumina's own where `lumina export` left it, else the tokenizer.json or tokenizer.model of the directory."""
    for name in (f"{TOKENIZER}/{FILE}", "tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return load_tokenizer(str(path / name))
    raise DataError(
        f"{path}: has neither tokenizer.json nor tokenizer.model, without which no text could be given to the model"
    )


def with_control_rows(
    model: ModelConfig, weights: dict[str, np.ndarray], tokenizer: Tokenizer
) -> tuple[ModelConfig, dict[str, np.ndarray], int]:
    """The model with rows for control tokens where the embedding has none left: the mean of the others, and their number."""
    missing = max(0, tokenizer.vocab_size - model.vocab_size)
    if not missing:
        return model, weights, 0
    weights = dict(weights)
    for name, axis in (("embedding.weight", 0), ("head.weight", 1)):
        if name in weights:
            mean = weights[name].mean(axis=axis, keepdims=True, dtype=np.float64).astype(np.float32)
            weights[name] = np.concatenate([weights[name], np.repeat(mean, missing, axis=axis)], axis=axis)
    return replace(model, vocab_size=tokenizer.vocab_size), weights, missing


@contextlib.contextmanager
def weights_alone(path: Path, files: list[str]) -> Iterator[Path]:
    """A directory with config.json and the weights of another and nothing else, such as adapters or code, for transformers."""
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("config.json", INDEX, *files):
            if (path / name).is_file():
                (Path(temporary) / name).symlink_to((path / name).resolve())
        yield Path(temporary)
