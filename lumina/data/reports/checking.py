"""`lumina data check`: whether files can be trained on, what would become of each record, and how good they are."""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from lumina.conversation import named, render
from lumina.data.corpus import kind_of
from lumina.data.preparing.pipeline import Say, bad_records
from lumina.data.reading.readers import plan, spool
from lumina.data.reading.streams import called
from lumina.data.recipe import AMONG_DOCUMENTS, Recipe, recipe_of
from lumina.data.records import TEXT, Document, Turn, with_what_works
from lumina.data.reports.scoring import score
from lumina.data.reports.statistics import five_numbers, languages, most_first
from lumina.data.reports.survey import EXAMPLES, Survey
from lumina.errors import DataError, UsageError
from lumina.runs.console import Console, printable, table

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

SHOWN_CHARACTERS = 600  # of a sample


def tell(arguments: argparse.Namespace) -> None:
    """Print what is found.

    Raises:
        DataError: nobody could train on it: no or one document, too many bad records, kinds that cannot be together.
        UsageError, ConfigError: an option, or a template or tokenizer that there is not.
    """
    if not 0 <= arguments.max_bad <= 1:
        raise UsageError(f"--max-bad = {arguments.max_bad}: must be from 0 to 1")
    if arguments.limit < 0:
        raise UsageError(f"--limit = {arguments.limit}: must be at least 0; 0 looks at all records")
    recipe, template = recipe_of(arguments), arguments.template
    extra = named(template).extra
    tokenizer = None
    if arguments.tokenizer:
        from lumina.tokenizer_files import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer, extra)
    console = Console(0)
    with tempfile.TemporaryDirectory(prefix="lumina-check-") as directory:
        sources = [str(spool(sys.stdin.buffer, directory)) if spec == "-" else spec for spec in arguments.sources]
        found = check(sources, recipe, template, tokenizer, arguments.limit, arguments.max_bad, console.status)
    console.done()
    print(json.dumps(found, indent=2) if arguments.json else printable(text(found)))
    if found["unusable"]:
        raise DataError(f"{', '.join(arguments.sources)}: {found['unusable']}")


# ------------------------------------------------------------------------------------------------------------- looking


def check(
    sources: Sequence[str],
    recipe: Recipe,
    template: str = "lumina",
    tokenizer: "Tokenizer | None" = None,
    limit: int = 0,
    max_bad: float = 0.5,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """All that is printed, ready for JSON; "unusable" says why nobody could train on it, and is "" where one can.

    The sources are read once, and of them the parts again that hold an example; what is in memory is a sample of about
    SAMPLE_CHARACTERS, and some 24 bytes a document.

    Raises DataError where a source is missing or of no known format.
    """
    planned = plan(sources, recipe, say)
    looked = Survey(planned, recipe, limit, say)
    chosen, sample = looked.chosen(), looked.sample()
    if sample:
        say(f"languages and quality of {_count(len(sample), 'document')}")
    found: dict[str, Any] = {
        "sources": [called(spec) for spec in sources],
        "formats": planned.formats,
        "limit": limit,
        "kinds": most_first(looked.kinds),
        "records": {"read": looked.account.read, "kept": looked.count},
        "rejects": {"counts": dict(sorted(looked.account.rejects.items())), "examples": looked.account.rejected},
        "steps": _steps(looked, recipe),
        "duplicates": looked.duplicates(chosen),
        "characters": five_numbers(looked.sizes) | {"fair": looked.fair},
        "damaged": looked.damaged,
        **_sampled(sample, recipe, tokenizer, template),
        "turns": looked.turns(),
        "samples": [_shown(name, chosen[number], tokenizer, template) for name, number in looked.shown().items()],
    }
    found["unusable"] = _unusable(found, max_bad)
    found["score"] = score(found)
    return found


# -------------------------------------------------------------------------------------------------------------- told


def _steps(looked: Survey, recipe: Recipe) -> dict[str, Any]:
    """What each step that looks at one document does: {step: {changed, removed: {reason: documents}}}."""
    account = looked.account
    return {
        step: {"changed": account.changed.get(step, 0), "removed": most_first(account.removed.get(step, {}))}
        for step in recipe.named_steps
        if step not in AMONG_DOCUMENTS  # told under duplicates, whether named or not
    }


def _sampled(
    documents: list[Document], recipe: Recipe, tokenizer: "Tokenizer | None", template: str
) -> dict[str, dict[str, Any]]:
    """What is measured of a sample: its size, languages, faults of quality, and tokens where there is a tokenizer."""
    spoken, why = languages((document.text for document in documents), recipe.language_score)
    faults, why_not = _faults(documents)
    characters = sum(len(document.text) for document in documents)
    about: dict[str, Any] = {"documents": len(documents), "characters": characters}
    if tokenizer and documents:
        tokens = np.array([_tokens(document, tokenizer, template) for document in documents])
        about["tokens"] = five_numbers(tokens) | {"characters_a_token": characters / max(1, int(tokens.sum()))}
    return {
        "sample": about,
        "languages": {"found": spoken, "left_out": why},
        "quality": {"faults": faults, "left_out": why_not},
    }


def _faults(documents: list[Document]) -> tuple[dict[str, int], str]:
    """How many documents break each rule of quality, or why nobody can tell."""
    from lumina.data.cleaning.quality import fault

    try:
        counts = Counter(fault(document.text, document.kind) for document in documents)
    except UsageError as error:
        return {}, str(error)
    return most_first({rule: count for rule, count in counts.items() if rule}), ""


def _tokens(document: Document, tokenizer: "Tokenizer", template: str) -> int:
    if document.kind == TEXT:
        return len(tokenizer.encode(document.plain)) + 1  # with the document's end
    sides = filter(None, (document.turns, document.rejected))
    return sum(render(tokenizer, turns, template).ids.size + 1 for turns in sides)


def _shown(which: str, document: Document, tokenizer: "Tokenizer | None", template: str) -> dict[str, Any]:
    """A document as a model reads it, or, without a tokenizer, as its template writes it."""
    sides = {"": document.turns} if not document.rejected else {"chosen": document.turns, "rejected": document.rejected}
    parts = []
    for side, turns in sides.items():
        head = f"[{side}]\n" if side else ""
        if not turns:
            said = document.plain
        elif tokenizer:
            said = tokenizer.decode(render(tokenizer, turns, template).ids)
        else:
            said = written(turns, template)
        parts.append(head + said)
    whole = "\n".join(parts)
    cut = whole[:SHOWN_CHARACTERS] + (f" ... ({len(whole):,} characters)" if len(whole) > SHOWN_CHARACTERS else "")
    about: dict[str, Any] = {"which": which, "name": document.name, "kind": document.kind, "text": cut}
    if tokenizer:
        about["tokens"] = _tokens(document, tokenizer, template)
    return about


def written(turns: Sequence[Turn], template: str) -> str:
    """Turns as a template writes them, where there is no tokenizer to render them with."""
    form = named(template)
    return "".join(
        (form.between if number else "") + "".join(form.headers[role]) + form.lead + words + form.end + form.after
        for number, (role, words) in enumerate(turns)
    )


def _unusable(found: dict[str, Any], max_bad: float) -> str:
    """Why nobody could train on it, or ""."""
    read, kept = found["records"]["read"], found["records"]["kept"]
    bad = bad_records(found["rejects"]["counts"])
    if bad > max_bad * read:
        return f"{bad:,} of {read:,} records are bad, above --max-bad {max_bad:g}"
    if kept - found["duplicates"]["exact"]["documents"] < 2:
        what = "no document" if not kept else f"{kept:,} documents that are all equal" if kept > 1 else "one document"
        return f"holds {what}; it takes two that differ, one to train on and one to hold out"
    try:
        kind_of(found["kinds"])
    except DataError as error:
        return str(error)
    return ""


def text(found: dict[str, Any]) -> str:
    """All of it as a person reads it."""
    records, sizes, sample = found["records"], found["characters"], found["sample"]
    limited = f" (the first {found['limit']:,})" if found["limit"] else ""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items())
    rows = [
        ("sources", "\n".join(found["formats"])),
        ("records", f"{records['read']:,} read{limited}, {records['kept']:,} pass the steps{f': {kinds}' if kinds else ''}"),
    ]
    for kind, count in found["rejects"]["counts"].items():
        some = [f"{each['name']}  {each['sample']}" for each in found["rejects"]["examples"] if each["kind"] == kind]
        rows.append(
            ("rejected", "\n".join([f"{count:,} {with_what_works(kind)}, such as", *(f"  {one}" for one in some[:EXAMPLES])]))
        )
    for step, about in found["steps"].items():
        told = [f"{about['changed']:,} changed"] if about["changed"] else []
        told += [f"{count:,} removed: {reason}" for reason, count in about["removed"].items()]
        rows.append((f"step {step}", "\n".join(told) or "nothing changed or removed"))
    rows += _duplicates_told(found["duplicates"], records["kept"])
    if sizes.get("sum"):
        five = [f"{sizes[name]:,}" for name in ("min", "lower_quartile", "median", "upper_quartile", "max")]
        rows.append(("characters", f"{sizes['sum']:,}; a document: {' | '.join(five)} (least, quartiles, most)"))
    if found["damaged"]:
        rows.append(("damaged", f"{_count(found['damaged'], 'document')} with U+FFFD, which stands for lost characters"))
    rows += _measured_told(found) if sample["documents"] else []
    rows += _turns_told(found["turns"])
    parts = found["score"]["parts"]
    rows.append(("score", "not measured" if found["score"]["score"] is None else f"{found['score']['score']:.1f} of 100"))
    rows += [("", f"{100 * each['share']:5.1f}%  x {each['weight']}  {each['name']}: {each['formula']}") for each in parts]
    rows.append(("", f"= {found['score']['formula']}"))
    return "\n\n".join([*map(_sample_told, found["samples"]), table(rows)])


def _measured_told(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured of a sample that is not empty."""
    sample, records, rows = found["sample"], found["records"], []
    if "tokens" in sample:
        told = f"{sample['tokens']['sum']:,} in the sample, {sample['tokens']['characters_a_token']:.2f} characters each"
        rows.append(("tokens", told))
    part = "all documents" if sample["documents"] == records["kept"] else f"a sample of {sample['documents']:,} documents"
    rows.append(("languages", _counted(found["languages"], "found", sample["documents"], part)))
    rows.append(("quality", _counted(found["quality"], "faults", sample["documents"], part) or f"no rule is broken in {part}"))
    return rows


def _sample_told(about: dict[str, Any]) -> str:
    tokens = f", {about['tokens']:,} tokens" if "tokens" in about else ""
    return f"--- {about['which']}: {about['name']}{tokens}\n{about['text']}"


def _duplicates_told(duplicates: dict[str, Any], documents: int) -> list[tuple[str, str]]:
    rows = []
    for which, about in duplicates.items():
        among = about.get("compared", documents)
        told = (
            [f"{_count(about['documents'], 'document')} of {among:,} ({_percent(about['documents'], among)})"] if among else []
        )
        told += [f"  {pair['name']} as {pair['as']}" for pair in about["examples"]]
        told += [f"not looked at: {about['left_out']}"] if about.get("left_out") else []
        rows.append((f"{which} duplicates", "\n".join(told) or "no document"))
    return rows


def _turns_told(turns: dict[str, Any]) -> list[tuple[str, str]]:
    if not turns["conversations"]:
        return []
    of = turns["a_conversation"]
    roles = [
        f"{role}: {about['turns']:,} turns, {100 * about['share']:.1f}% of the characters"
        for role, about in turns["roles"].items()
    ]
    same = turns["repeated_answers"]
    return [
        ("turns", f"{of['min']} | {of['median']} | {of['max']} a conversation (least, median, most)"),
        ("roles", "\n".join(roles)),
        (
            "answers",
            f"{_count(same, 'conversation')} ({_percent(same, turns['conversations'])}) with the last answer of an earlier one",
        ),
    ]


def _counted(about: dict[str, Any], what: str, documents: int, part: str) -> str:
    if about["left_out"]:
        return f"not measured: {about['left_out']}"
    lines = [f"{_percent(count, documents)}  {name}" for name, count in islice(about[what].items(), 8)]
    return "\n".join([f"of {part}", *lines]) if lines else ""


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f}%"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
