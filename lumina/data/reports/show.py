"""`lumina data show`: a record of a file as the tokens that are made of it, their ids and the weight of each in the loss."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lumina.conversation import CODES, DEFAULT_LOSS_WEIGHTS, NONE, TEXT, loss_weights, named, render
from lumina.data.preparing.tokenise import Account, after_steps
from lumina.data.reading.readers import plan, read, spool
from lumina.data.reading.streams import called
from lumina.data.recipe import AMONG_DOCUMENTS, Recipe, recipe_of
from lumina.data.records import PREFERENCE, Document, Reject, Turn, with_what_works
from lumina.errors import DataError, UsageError
from lumina.tokenizer import CONTROL_TOKENS, Tokenizer, train_bpe
from lumina.tokenizer_files import load_tokenizer

MOST = 1000  # tokens of a side that are printed; --json has them all
SAMPLE_RECORDS, SAMPLE_CHARACTERS = 200, 2**20  # that a tokenizer is trained on where none is named
VOCABULARIES = (4096, 1024, 512, 384)  # the largest that so little text is enough for
WIDEST = 128
NAMES = {NONE: "none", TEXT: "text"} | {code: role for role, code in CODES.items()}
GREY, GREEN, YELLOW, PLAIN = "\x1b[90m", "\x1b[32m", "\x1b[33m", "\x1b[0m"


def tell(arguments: argparse.Namespace) -> None:
    """Print the record. Raises UsageError, ConfigError and DataError for what cannot be."""
    if arguments.record < 1:
        raise UsageError(f"--record {arguments.record}: the first is 1")
    weights, form = loss_weights(arguments.loss_weights or DEFAULT_LOSS_WEIGHTS), named(arguments.template)
    recipe = recipe_of(arguments)
    with tempfile.TemporaryDirectory(prefix="lumina-show-") as directory:
        source = str(spool(sys.stdin.buffer, directory)) if arguments.file == "-" else arguments.file
        taken, documents = _found(source, arguments.record, bool(arguments.tokenizer), recipe)
    if isinstance(taken, Reject):
        found: dict[str, Any] = {"name": taken.name, "kind": "rejected", "why": taken.kind, "sample": taken.sample}
    elif taken.document is None:
        found = {"name": taken.name, "kind": "removed", "why": taken.did.pop(), "steps": taken.did}
    else:
        tokenizer = load_tokenizer(arguments.tokenizer, form.extra) if arguments.tokenizer else _small(documents, form.extra)
        found = shown(taken.document, tokenizer, arguments.template, weights) | {"steps": taken.did}
    if arguments.json:
        print(json.dumps(found))
    else:
        print(text(found, _is_coloured(), shutil.get_terminal_size((WIDEST, 24)).columns))


class Taken(NamedTuple):
    """A record that was read, and what the steps made of it."""

    name: str
    document: Document | None  # None: removed
    did: list[str]  # by steps, in words; what removed it comes last


def _found(source: str, asked: int, alone: bool, recipe: Recipe) -> tuple[Taken | Reject, list[Document]]:
    """The record that is asked for and, unless it is `alone`, what the steps leave of the first ones, for a tokenizer."""
    documents: list[Document] = []
    found: Taken | Reject | None = None
    number = 0
    for number, record in enumerate(_records(source, recipe), start=1):
        if number == asked or number <= SAMPLE_RECORDS:
            taken = record if isinstance(record, Reject) else _taken(record, recipe)
            found = taken if number == asked else found
            if number <= SAMPLE_RECORDS and isinstance(taken, Taken) and taken.document:
                documents.append(taken.document)
        if number >= asked and (alone or number >= SAMPLE_RECORDS):
            break
    if found is None:
        raise UsageError(f"--record {asked}: {called(source)} has {number:,}")
    return found, documents or [found.document] if isinstance(found, Taken) and found.document else documents


def _records(source: str, recipe: Recipe) -> Iterator[Document | Reject]:
    for unit in plan([source], recipe).units:
        yield from read(unit, recipe)


def _taken(record: Document, recipe: Recipe) -> Taken:
    account = Account()
    document = after_steps(record, recipe, account)
    did = [f"{step} changed it" for step in account.changed]
    did += [f"removed by {step}: {reason}" for step, reasons in account.removed.items() for reason in reasons]
    if document:
        unchanged = [step for step in recipe.named_steps if step not in (*account.changed, *AMONG_DOCUMENTS)]
        did += [f"{', '.join(unchanged)} left it as it was"] if unchanged else []
        among = [step for step in recipe.named_steps if step in AMONG_DOCUMENTS]
        did += [f"{', '.join(among)} not tried: that takes the other documents"] if among else []
    return Taken(record.name, document, did)


def _small(documents: list[Document], extra: tuple[str, ...]) -> Tokenizer:
    """A tokenizer of a vocabulary that the documents are enough for; of bytes where they are enough for none."""
    texts, characters = [], 0
    for document in documents:
        texts.append(document.text[: SAMPLE_CHARACTERS - characters])
        characters += len(texts[-1])
    for size in VOCABULARIES:
        try:
            return train_bpe(texts, size, f"bpe-{size} trained on the first records", extra)
        except DataError:  # too few pairs
            continue
    return train_bpe([], 256 + len(CONTROL_TOKENS) + len(extra), "of bytes, as there is little text", extra)


# ----------------------------------------------------------------------------------------------------------- gathering


def shown(document: Document, tokenizer: Tokenizer, template: str, weights: np.ndarray) -> dict[str, Any]:
    """A document's tokens, as plain values: of a preference the chosen side, then the rejected one."""
    sides = {"chosen": document.turns, "rejected": document.rejected} if document.kind == PREFERENCE else {"": document.turns}
    return {
        "name": document.name,
        "kind": document.kind,
        "template": template if document.turns else "",
        "tokenizer": tokenizer.name,
        "loss_weights": {NAMES[code]: float(weight) for code, weight in enumerate(weights)},
        "sides": [{"side": side, **_side(document, turns, tokenizer, template, weights)} for side, turns in sides.items()],
    }


def _side(
    document: Document, turns: tuple[Turn, ...], tokenizer: Tokenizer, template: str, weights: np.ndarray
) -> dict[str, Any]:
    end = tokenizer.control[CONTROL_TOKENS[0]]
    if turns:
        rendered = render(tokenizer, turns, template)
        ids, roles, starts = [*rendered.ids.tolist(), end], [*rendered.roles.tolist(), NONE], rendered.turns.tolist()
    else:
        ids = [*tokenizer.encode(document.plain), end]
        roles, starts = [TEXT] * len(ids), [0]
    names = {i: token for token, i in tokenizer.control.items()}
    return {
        "turns": [
            {"role": role, "start": start} for role, start in zip([t.role for t in turns] or ["text"], starts, strict=True)
        ],
        "ids": ids,
        "roles": [NAMES[role] for role in roles],
        "weights": weights[roles].tolist(),
        "pieces": [names.get(i) or _piece(tokenizer.decode_bytes([i])) for i in ids],
    }


def _piece(token: bytes) -> str:
    """A token on one line: bytes that are no character by themselves in hexadecimal, spaces visible."""
    text = token.decode("utf-8", "backslashreplace").replace(" ", "\u00b7")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------------------------- text


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # no-color.org


def text(found: dict[str, Any], coloured: bool, width: int) -> str:
    """The record for a terminal of `width` columns: each token's id and text, coloured or marked where it is learned."""
    if found["kind"] == "rejected":
        return f"{found['name']}: rejected: {with_what_works(found['why'])}\n  {found['sample']}".rstrip()
    if found["kind"] == "removed":
        return f"{found['name']}: {'; '.join([*found['steps'], found['why']])}"
    weights = ", ".join(f"{role} {weight:g}" for role, weight in found["loss_weights"].items() if role != "none")
    legend = (
        f"{GREY}not learned{PLAIN}, {GREEN}learned{PLAIN}, {YELLOW}learned more{PLAIN}"
        if coloured
        else "* learned, + learned more"
    )
    template = f", template {found['template']}" if found["template"] else ""
    lines = [
        f"{found['name']}: {found['kind']}{template}, tokenizer {found['tokenizer']}",
        f"loss weights: {weights} ({legend})",
        *([f"steps: {'; '.join(found['steps'])}"] if found["steps"] else []),
    ]
    for side in found["sides"]:
        learned = sum(weight > 0 for weight in side["weights"])
        lines.append(f"\n{side['side'] or 'all of it'}: {len(side['ids']):,} tokens, {learned:,} of them learned")
        lines += _turns(side, coloured, width)
    return "\n".join(lines)


def _turns(side: dict[str, Any], coloured: bool, width: int) -> Iterator[str]:
    starts = [turn["start"] for turn in side["turns"]]
    for turn, start, stop in zip(side["turns"], starts, [*starts[1:], len(side["ids"])], strict=True):
        if start >= MOST:
            break
        yield f"  {turn['role']}, from token {start:,}"
        cells = [_cell(side, place) for place in range(start, min(stop, MOST))]
        yield from _wrapped(cells, coloured, width)
    if len(side["ids"]) > MOST:
        yield f"  ... {len(side['ids']) - MOST:,} more tokens; --json has all"


def _cell(side: dict[str, Any], place: int) -> tuple[str, float]:
    return f"{side['ids'][place]} {side['pieces'][place]}", side["weights"][place]


def _wrapped(cells: list[tuple[str, float]], coloured: bool, width: int) -> Iterator[str]:
    line, used = "   ", 3
    for cell, weight in cells:
        mark = "" if coloured else "+" if weight > 1 else "*" if weight else " "
        if used > 3 and used + 1 + len(mark) + len(cell) > width:
            yield line.rstrip()
            line, used = "   ", 3
        colour = YELLOW if weight > 1 else GREEN if weight else GREY
        line += f" {mark}" + (f"{colour}{cell}{PLAIN}" if coloured else cell)
        used += 1 + len(mark) + len(cell)
    yield line.rstrip()
