"""`lumina compare`: two models on the same tokens, opened by either backend or by transformers.

T positions, N tokens in all, V vocabulary.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lumina.config import DataConfig
from lumina.data.rows import segments_and_positions
from lumina.data.sources import held_out_texts
from lumina.errors import DataError, UsageError
from lumina.interchange.compare import Distance, Routing, verdict, weights_that_differ
from lumina.interchange.exporting import appearing, here, require_new
from lumina.interchange.side import Canonical, Foreign, Row, Side, is_foreign, one_document
from lumina.interchange.state import backend_of
from lumina.interchange.verify import CONTINUED, PROMPT, TOP, shortened
from lumina.runs import library
from lumina.runs.console import Console, printable, table
from lumina.runs.journal import finite
from lumina.runs.units import duration
from lumina.stages import first_source
from lumina.tokenizer import Tokenizer

ROWS = 16
AT_ONCE = 1 << 22  # logits of a side in memory
BACKENDS = ("jax", "torch", "hf")
SHOW_EVERY = 0.3  # seconds
SAVE = "--save-logits"

OpenSide = Callable[[str, str, Path], Side]  # backend, name, path


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lumina compare`."""
    what = "jax:RUN, torch:RUN or hf:DIR; without a prefix what trained the run, or jax for a canonical directory"
    parser.add_argument("a", metavar="A", help=what)
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="what to compare on (default: held-out text of A's run, or B's)"
    )
    parser.add_argument("--rows", metavar="N", type=int, default=ROWS, help=f"of text; 0 takes all (default: {ROWS})")
    parser.add_argument("--top-k", metavar="K", type=int, default=TOP, help=f"likeliest tokens to compare (default: {TOP})")
    parser.add_argument(SAVE, metavar="DIR", type=Path, help="write both sides' logits into this new directory, as .npy")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object instead of a table")


def tell(arguments: argparse.Namespace, open_side: OpenSide) -> None:
    """Compare, and print the report; `open_side` opens a backend's side. What differs is an answer, and no error.

    Raises:
        UsageError: an argument cannot be used, or a package is missing. ConfigError, CheckpointError: of a model.
        DataError: there is no text, or the two do not read it as the same tokens.
    """
    for flag, value, least in (("--rows", arguments.rows, 0), ("--top-k", arguments.top_k, 1)):
        if value < least:
            raise UsageError(f"{flag} = {value}: must be at least {least}")
    named = [parse(name) for name in (arguments.a, arguments.b)]
    if arguments.save_logits:
        require_new(arguments.save_logits, SAVE)
    text = read_text(arguments.text) if arguments.text else None
    console = Console(0, sys.stderr)
    sides = []
    for name, (backend, path) in zip((arguments.a, arguments.b), named, strict=True):
        console.status(f"compare: opening {name} with {backend}")
        sides.append(Foreign(name, path) if backend == "hf" else open_side(backend, name, path))
    a, b = sides
    rows, source = rows_and_source(a, b, text, str(arguments.text), arguments.rows)
    with saving(arguments.save_logits, a, b, rows) as save:
        found = compare(a, b, rows, arguments.top_k, console, save)
    console.done()
    found = {
        "a": {"name": a.name, "backend": named[0][0]},
        "b": {"name": b.name, "backend": named[1][0]},
        "text": {"source": source, **found.pop("text")},
        **found,
    }
    if arguments.json:
        print(json.dumps(finite(found), indent=2, allow_nan=False))
        return
    report, encoding = printable(table(lines(found))), sys.stdout.encoding or "utf-8"
    print(report.encode(encoding, "backslashreplace").decode(encoding))


def parse(name: str) -> tuple[str, Path]:
    """(jax, torch or hf, the path) of an argument; raises UsageError where there is no such thing."""
    prefix, colon, rest = name.partition(":")
    backend = prefix if colon and prefix in BACKENDS else ""
    path = library.find(rest if backend else name).path
    values = library.read_json(path / "config.json") or {}
    if is_foreign(values) != (backend == "hf") and backend:
        what = "of Hugging Face" if is_foreign(values) else "no directory of Hugging Face"
        works = f"hf:{rest}" if is_foreign(values) else f"jax:{rest} or torch:{rest}"
        raise UsageError(f"{name}: {rest} is {what}; {works} would work")
    return backend or ("hf" if is_foreign(values) else backend_of(path)), path


# --------------------------------------------------------------------------------------------------------------- text


def read_text(path: Path) -> str:
    """A file as text; raises DataError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); give another --text") from error


def rows_and_source(a: Side, b: Side, text: str | None, name: str, rows: int) -> tuple[list[Row], str]:
    """At most `rows` rows (0: all) that both sides take, and what they are of; raises DataError where there are none."""
    texts, source = (iter([text]), name) if text is not None else held_out(a, b)
    apart = any(isinstance(side, Foreign) for side in (a, b))  # transformers takes a document at a time
    documents = (same_ids(a, b, each, end=not apart) for each in texts)
    found: list[Row] = []
    for row in cut(documents, min(a.positions, b.positions), a.end, apart):
        found.append(row)
        if len(found) == rows:
            break
    if not found:
        raise DataError(f"{source}: has no two tokens that follow each other; give more text with --text")
    return found, source


def held_out(a: Side, b: Side) -> tuple[Iterator[str], str]:
    """The texts that A's run held out, or B's, and their source; the embedded source's where their files are not here."""
    datas = [side.config.data for side in (a, b) if isinstance(side, Canonical)]
    data = next((data for data in datas if here(data)), DataConfig())
    return held_out_texts(data), f"held-out text of {first_source(data)}"


def same_ids(a: Side, b: Side, text: str, end: bool) -> list[int]:
    """The ids of a document, with that of its end if `end`; raises DataError where the two have others."""
    ids, others = _ids(a, text, end), _ids(b, text, end) if a.tokenizer.fingerprint != b.tokenizer.fingerprint else None
    if others is not None and ids != others:
        place = next(
            (i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), min(len(ids), len(others))
        )
        told = [f"{side.name} has {_id_at(side.tokenizer, of, place)}" for side, of in ((a, ids), (b, others))]
        raise DataError(
            f"the two have other tokens, from token {place} of {shortened(text)!r} on: {', '.join(told)}; only models "
            "with the same ids for the text can be compared"
        )
    for side in (a, b):
        if (largest := max(ids, default=0)) >= side.columns:
            raise DataError(
                f"{side.name}: has {side.columns} logits, and the text has token {largest}; it cannot be compared on it"
            )
    return ids


def _ids(side: Side, text: str, end: bool) -> list[int]:
    return [*side.tokenizer.encode(text), *([side.end] if end else [])]


def _id_at(tokenizer: Tokenizer, ids: list[int], place: int) -> str:
    return f"{ids[place]} {tokenizer.decode([ids[place]])!r}" if place < len(ids) else "none"


def cut(documents: Iterator[list[int]], T: int, end: int, apart: bool) -> Iterator[Row]:
    """Rows of T tokens, the last one of what is left: of documents one after another, as in training, or of one each."""
    waiting: list[int] = []
    for ids in documents:
        waiting = ids if apart else waiting + ids
        start = 0
        while len(waiting) - start > T:
            yield _row(waiting[start : start + T + 1], end)
            start += T
        waiting = waiting[start:]
        if apart and len(waiting) > 1:
            yield _row(waiting, end)
    if not apart and len(waiting) > 1:
        yield _row(waiting, end)


def _row(tokens: list[int], end: int) -> Row:
    tokens_1t = np.array([tokens], np.int32)
    segments_1T, positions_1T = segments_and_positions(tokens_1t[:, :-1], end)
    return Row(tokens_1t[0, :-1], tokens_1t[0, 1:], segments_1T[0].astype(np.int32), positions_1T[0].astype(np.int32))


# --------------------------------------------------------------------------------------------------------- comparison

Save = Callable[[np.ndarray, np.ndarray], None]


def compare(a: Side, b: Side, rows: list[Row], top: int, console: Console, save: Save) -> dict[str, Any]:
    """All figures of the two on these rows, one row after another, some positions at a time."""
    columns = min(a.columns, b.columns)  # an import may have added rows for control tokens
    distance, routing, silent = Distance(top), Routing([]), why_silent(a, b)
    bytes_V = a.tokenizer.token_bytes()
    began = shown = time.perf_counter()
    text_bytes = 0
    for number, row in enumerate(rows):
        passes = a.read(row), b.read(row)
        reached_T = np.zeros(len(row.inputs_T), bool)
        if number == 0 and not silent:
            silent = why_unlike(*(each.told for each in passes))
            routing = Routing([] if silent else a.kinds or [])
        if not silent:
            reached_T = routing.add(number, row, *(each.told for each in passes))
        for start in range(0, len(row.inputs_T), step := max(1, AT_ONCE // columns)):
            stop = min(start + step, len(row.inputs_T))
            pair = [each.logits(start, stop) for each in passes]
            save(*pair)
            a_nV, b_nV = (logits_nV[:, :columns] for logits_nV in pair)
            distance.add((number, start), a_nV, b_nV, row.targets_T[start:stop], reached_T[start:stop])
        text_bytes += int(bytes_V[row.targets_T].sum())
        if console.live and (now := time.perf_counter()) - shown > SHOW_EVERY:
            shown, left = now, (now - began) / (number + 1) * (len(rows) - number - 1)
            console.status(f"compare: row {number + 1}/{len(rows)}  eta {duration(left)}")
    console.status("compare: a continuation")
    figures = distance.figures(columns, text_bytes)
    for part in ("logits", "kl"):
        where = figures[part]["where"]
        where["token"] = a.tokenizer.decode([int(rows[where["row"]].inputs_T[where["position"]])])
    figures |= {
        "text": {"rows": len(rows), "bytes": text_bytes, "positions": min(a.positions, b.positions)},
        "columns": {"a": a.columns, "b": b.columns},
        "weights": weights(a, b),
        "greedy": greedy(a, b, rows[0], columns),
        "routing": {"why": silent} if silent else routing.found(),
    }
    equal, says = verdict(figures)
    return figures | {"equal": equal, "verdict": says}


def why_silent(a: Side, b: Side) -> str:
    """Why no decisions of the two can be compared; empty if they may be."""
    if a.kinds is None or b.kinds is None:
        return "not compared: transformers tells no decisions"
    if a.kinds != b.kinds:
        return "not compared: the two have layers of other kinds"
    return "" if any(kind != "dense" for kind in a.kinds) else "none: every layer is dense"


def why_unlike(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> str:
    """The same, of what they told of a row."""
    shapes = [{name: value.shape for name, value in told.items()} for told in (a, b)]
    return "" if shapes[0] == shapes[1] else "not compared: the two choose other numbers of experts"


def weights(a: Side, b: Side) -> dict[str, Any] | None:
    """How many tensors are not the same bits, and the first of them; None where they have other names."""
    if a.digests is None or b.digests is None:
        return None
    other = weights_that_differ(a.digests, b.digests)
    return {"tensors": len(a.digests.keys() | b.digests.keys()), "differ": len(other), "first": other[0] if other else None}


def greedy(a: Side, b: Side, row: Row, columns: int) -> dict[str, Any]:
    """Whether both continue a prompt alike; else where not first, and how far ahead each side's choice was there."""
    T = min(a.positions, b.positions)
    prompt_T = row.inputs_T[: max(1, min(PROMPT, T // 2))]
    count = min(CONTINUED, T - len(prompt_T))
    written = [side.continuation(prompt_T, count) for side in (a, b)]
    found = {"prompt": len(prompt_T), "tokens": count, "equal": written[0] == written[1]}
    if found["equal"]:
        return found
    first = next(i for i, pair in enumerate(zip(*written, strict=True)) if pair[0] != pair[1])
    context = one_document(np.concatenate([prompt_T, written[0][:first]]))
    at = len(context.inputs_T)
    ours_V, others_V = (side.read(context).logits(at - 1, at)[0] for side in (a, b))
    chosen, other = (each[first] for each in written)
    ahead = {
        "a": float(ours_V[chosen] - ours_V[other]) if other < a.columns else None,
        "b": float(others_V[other] - others_V[chosen]) if chosen < b.columns else None,
    }
    names = {"a": a.tokenizer.decode([chosen]), "b": b.tokenizer.decode([other])}
    return found | {"first_differs_at": first, "token": names, "ahead": ahead}


@contextlib.contextmanager
def saving(out: Path | None, a: Side, b: Side, rows: list[Row]) -> Iterator[Save]:
    """Writes what it is given, in order, as one array a side: a.npy and b.npy [N, V], float32; index.npy says of what.

    index.npy [N, 4], int64, has row, position, token and the token that follows. The directory appears when all is written.
    """
    if out is None:
        yield lambda *pair: None
        return
    index_N4 = np.concatenate(
        [
            np.stack([np.full(len(row.inputs_T), number), np.arange(len(row.inputs_T)), row.inputs_T, row.targets_T], axis=1)
            for number, row in enumerate(rows)
        ]
    ).astype(np.int64)
    with appearing(out, SAVE) as directory, contextlib.ExitStack() as files:
        np.save(directory / "index.npy", index_N4, allow_pickle=False)
        open_files = []
        for name, side in (("a", a), ("b", b)):
            file = files.enter_context((directory / f"{name}.npy").open("wb"))
            shape = (len(index_N4), side.columns)
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            open_files.append(file)

        def save(*pair: np.ndarray) -> None:
            for file, logits_nV in zip(open_files, pair, strict=True):
                file.write(np.ascontiguousarray(logits_nV, "<f4").data)

        yield save


# ------------------------------------------------------------------------------------------------------------- report


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The report as rows of a table."""
    text, logits, kl = found["text"], found["logits"], found["kl"]
    continued = found["greedy"]

    def at(where: dict[str, Any]) -> str:
        return f"row {where['row']}, position {where['position']}, after {where['token']!r}"

    said = f"{continued['tokens']} tokens alike"
    if not continued["equal"]:
        ahead = ", ".join(
            f"{side} has {continued['token'][side]!r}" + (f" by {gap:.1e}" if gap is not None else "")
            for side, gap in continued["ahead"].items()
        )
        said = f"alike up to token {continued['first_differs_at']}, where {ahead}"
    return [
        *((side.upper(), f"{found[side]['name']}, by {found[side]['backend']}") for side in ("a", "b")),
        ("text", f"{found['tokens']:,} tokens, {text['bytes']:,} bytes, in {text['rows']} rows of {text['source']}"),
        ("weights", _weights(found["weights"])),
        ("logits", f"differ by up to {logits['largest_difference']:.1e} of the largest, {logits['largest_logit']:.4g}; "
         f"at {at(logits['where'])}"),
        ("KL(A || B)", f"{kl['mean']:.2e} nats a token, {kl['max']:.2e} at most, at {at(kl['where'])}"),
        (f"top {found['top']['k']}", f"{100 * found['top']['overlap']:.3f} % the same"),
        ("likeliest", f"{100 * found['same_likeliest']:.3f} % the same"),
        *((f"loss {side.upper()}", f"{of['nats_per_token']:.6f} nats a token, {of['bits_per_byte']:.6f} bits/byte")
          for side, of in found["loss"].items()),
        ("continuation", said),
        ("routing", _routing(found["routing"])),
        ("verdict", found["verdict"]),
    ]  # fmt: skip


def _weights(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not compared: transformers has them under other names"
    if not found["differ"]:
        return f"the same, bit for bit, in all {found['tensors']} tensors"
    return f"{found['differ']} of {found['tensors']} tensors differ, {found['first']} first"


def _routing(found: dict[str, Any]) -> str:
    if "why" in found:
        return str(found["why"])
    if not found["flips"]:
        return f"all {found['decisions']:,} decisions are the same"
    told = [f"{found['flips']:,} of {found['decisions']:,} decisions differ, first in layer {found['first_layer_with_a_flip']}"]
    for stage in found["stages"]:
        if stage["flips"]:
            first = f", {stage['first_flips']:,} of them first, up to {stage['largest_margin']:.1e} from a tie"
            line = f"layer {stage['layer']}, {stage['of']}: {stage['flips']:,} of {stage['decisions']:,}"
            told.append(line + (first if stage["first_flips"] else ""))
    return "\n".join(told)
