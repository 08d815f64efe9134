"""`lumina export`: a run as a directory that other software loads, verified before it exists.

T positions.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lumina.architecture import layer_kinds
from lumina.config import TOKENIZER, Config, DataConfig, save
from lumina.conversation import TEMPLATES
from lumina.data.sources import held_out_texts
from lumina.errors import CheckpointError, DataError, UsageError
from lumina.interchange import huggingface, safe_tensors, tokenizer_json, verify
from lumina.runs.steps import sync_directory
from lumina.tokenizer import Tokenizer
from lumina.tokenizer_files import load_tokenizer

CANONICAL = "canonical"
FORMATS = (*huggingface.ARCHITECTURES, CANONICAL)
ROWS, MOST_POSITIONS = 4, 512  # of held-out text, whose logits are compared
PIECES, PIECE = 300, 400  # of held-out text, whose ids are compared, and characters in each

Say = Callable[[str], None]


def export(
    path: Path, form: str, out: Path, best: bool, say: Say, shard_bytes: int = safe_tensors.SHARD_BYTES
) -> dict[str, Any]:
    """Write the newest (or best) state of `path`, a run of either backend or a canonical directory, to the new directory `out`.

    Returns what was verified, which is in VERIFY.json as well. Where anything is not as it should be, there is no `out`.

    Raises:
        UsageError: `path` or `out` cannot be used, or transformers is not installed. ConfigError: `form` cannot express it.
        CheckpointError: it is damaged, or transformers computes something else. DataError: of the tokenizer.
    """
    from lumina.interchange import state

    if form != CANONICAL:
        verify.require_transformers()
    require_new(out)
    source = state.locate(path, best)
    if form != CANONICAL:
        huggingface.require_expressible(source.config.model, {}, form)  # before any array is read
    say("reading the state")
    found = state.read_state(source)
    tokenizer = load_tokenizer(str(path / TOKENIZER))
    told: dict[str, Any] = {"source": str(path), "step": found.step, "checkpoint": "best" if best else "newest", "format": form}
    with appearing(out) as directory:
        if form == CANONICAL:
            if (path / "data.json").is_file():  # for `Origin.check_data`: which rows are next depends on the data
                shutil.copyfile(path / "data.json", directory / "data.json")
            origin = {"step": found.step, "progress": source.manifest.get("progress", {}), "exported_from": str(path)}
            write_canonical(directory, source.config, found, tokenizer, origin)
            _require_equal(state.read_state(state.locate(directory)), found)
            return told | {"optimizer": found.is_whole}
        about = write(directory, form, source.config, found.weights, tokenizer, say, shard_bytes)
        told |= about | check(directory, form, source.config, found.weights, tokenizer, about["chat_template"], say)
        write_json(directory / verify.FILE, told)
    return told


def write(
    directory: Path,
    form: str,
    config: Config,
    weights: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    say: Say,
    shard_bytes: int = safe_tensors.SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model in a format of Hugging Face; returns what there is to tell. Raises ConfigError where it cannot be."""
    huggingface.require_expressible(config.model, weights, form)
    positions, control = config.data.sequence_length, tokenizer.control
    model, named, folded = huggingface.fold(config.model, weights)
    say("writing the weights")
    pieces = {piece.theirs: piece for piece in huggingface.pieces(model, form)}
    experts = model.moe.num_experts
    sizes = {name: named[each.ours].nbytes // (1 if each.expert is None else experts) for name, each in pieces.items()}
    safe_tensors.write(
        directory, sizes, lambda name: huggingface.to_theirs(pieces[name], named[pieces[name].ours]), shard_bytes
    )
    write_json(directory / "config.json", huggingface.config_json(model, form, positions, control))
    ends = [control["<|document_end|>"], control[TEMPLATES[config.data.template].end]]
    write_json(directory / "generation_config.json", {"eos_token_id": ends, "pad_token_id": control["<|padding|>"]})
    chat = tokenizer_json.write(directory, tokenizer, positions, config.data.template)
    tokenizer.save(directory / TOKENIZER)  # for `lumina import`: transformers' files do not say all
    notes = []
    if config.model.moe.dispatch == "capacity" and any(kind.startswith("moe") for kind in layer_kinds(model)):
        notes.append("model.moe.dispatch = 'capacity' drops in training alone; what is exported and compared drops nothing")
    if not chat:
        notes.append(
            "no chat template: this tokenizer's file encodes a message otherwise between control tokens than by itself"
        )
    embedding = {"scale": folded.scale, "untied": config.model.tie_embeddings and not model.tie_embeddings}
    return {
        "embedding": embedding | {"largest_relative_error": folded.error},
        "chat_template": chat,
        "notes": notes,
    }


def check(
    directory: Path,
    form: str,
    config: Config,
    weights: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    chat: bool,
    say: Say,
) -> dict[str, Any]:
    """Compare the directory, as transformers loads it, with what it was made from; raises CheckpointError where it differs."""
    rows_NT, pieces, source = held_out(config, tokenizer)
    theirs, ours = verify.Theirs(directory, form), verify.Ours(config.model, weights)
    return {
        "text": {"source": source, "rows": rows_NT.shape[0], "positions": rows_NT.shape[1]},
        "logits": verify.compare_models(ours, theirs, rows_NT, say),
        "tokenizer": verify.compare_ids(
            verify.load_tokenizer(directory), tokenizer, [*pieces, *verify.HARD_TEXTS], chat, config.data.template
        ),
        "versions": verify.versions(),
    }


def held_out(config: Config, tokenizer: Tokenizer) -> tuple[np.ndarray, list[str], str]:
    """(rows of ids, pieces of text, their source) that the run held out; the embedded source goes on where there are too few.

    Raises DataError when even so there is not a row.
    """
    positions = min(config.data.sequence_length, MOST_POSITIONS)
    own = here(config.data)
    sources = [config.data, DataConfig()] if own else [DataConfig()]
    rows_NT = verify.rows_of(chain.from_iterable(map(held_out_texts, sources)), tokenizer, positions, ROWS)
    texts = chain.from_iterable(map(held_out_texts, sources))
    pieces = (text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE))
    return rows_NT, list(islice(pieces, PIECES)), sources[0].source


def here(data: DataConfig) -> bool:
    """Whether this machine has the source, which may be files of another."""
    try:
        held_out_texts(data)
    except DataError:
        return False
    return True


def write_canonical(directory: Path, config: Config, found: Any, tokenizer: Tokenizer, about: dict[str, Any]) -> None:
    """Write a state under canonical names: config.json, tokenizer/, safetensors, and the manifest with every file's hash."""
    from lumina.interchange import state
    from lumina.runs.steps import write_manifest

    save(config, directory / "config.json")
    tokenizer.save(directory / TOKENIZER)
    state.write(directory, found)
    named = state.arrays(found)
    digests = state.digests(named)
    leaves = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "digest": digests[name]} for name, array in named.items()
    }
    write_manifest(directory, {**about, "leaves": leaves})


def _require_equal(written: Any, found: Any) -> None:
    from lumina.interchange import state

    ours, theirs = state.arrays(found), state.arrays(written)
    for name, array in ours.items():
        if not np.array_equal(array, theirs[name], equal_nan=True):
            raise CheckpointError(f"{name}: was read back otherwise than it was written; nothing was written")


# ------------------------------------------------------------------------------------------------------- directories


def require_new(out: Path, flag: str = "--out") -> None:
    """Raise a UsageError unless `out`, which `flag` gave, can be made."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UsageError(f"{out}: exists already; choose another {flag}, nothing is written over")


@contextlib.contextmanager
def appearing(out: Path, flag: str = "--out") -> Iterator[Path]:
    """A directory that becomes `out`, synced to disk, when the block succeeds and vanishes when it does not."""
    directory = out.parent / f".making-{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        directory.mkdir(parents=True)
        yield directory
        for path in sorted(directory.rglob("*")):
            if path.is_file():  # safetensors makes files that only their owner may read
                path.chmod(directory.stat().st_mode & 0o666)
            with path.open("rb") if path.is_file() else contextlib.nullcontext() as file:
                os.fsync(file.fileno()) if file else sync_directory(path)
        sync_directory(directory)
        os.rename(directory, out)
        sync_directory(out.parent)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror or error}); choose another {flag}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
