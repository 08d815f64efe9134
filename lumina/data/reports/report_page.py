"""`lumina data report`: one page on a prepared directory, in any browser, without a network.

N documents, V ids.
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterable
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lumina.conversation import CODES, TEXT
from lumina.data.corpus import SIDES, is_prepared, kinds_told, open_corpus
from lumina.data.records import PREFERENCE
from lumina.data.reports import charts
from lumina.data.reports.statistics import (
    PACKED_DOCUMENTS,
    RARE,
    Figures,
    chosen_longer,
    figures,
    five_numbers,
    language_score,
    octaves,
    spread,
)
from lumina.errors import UsageError
from lumina.runs.console import Console
from lumina.runs.directory import replace_file
from lumina.runs.page import Shown, whole
from lumina.runs.units import decimal_bytes, si

NAMES = dict(zip(SIDES, ("training", "held out"), strict=True))
WHOSE = {0: "headers", **{code: role for role, code in CODES.items()}, TEXT: "text"}
FREQUENT, RARELY = 40, 20  # ids shown
SAMPLES, SAMPLE_TOKENS = 5, 256  # documents shown, and of each
LANGUAGES = 12
SOURCES = 100
CURVE_POINTS = 64
MOST_TURNS = 20  # conversations with more share a bar


def tell(arguments: argparse.Namespace) -> None:
    """Make the page, and print where it is.

    Raises:
        UsageError: there is no prepared directory, or the page cannot be written.
        DataError: the directory is damaged.
    """
    path = arguments.directory
    if not is_prepared(path):
        raise UsageError(f"{path}: is no prepared directory; make one with `lumina data prepare SOURCE --out {path}`")
    out = arguments.out or path / "report.html"
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(
            f"--out {out}: {'is a directory' if out.is_dir() else 'its directory is missing'}; name a file to write"
        )
    console = Console(0)
    made = page(path.absolute().name, figures(open_corpus(path), console.status))
    console.done()
    try:
        replace_file(out, lambda part: part.write_text(made, encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UsageError(f"{error.filename or out}: {error.strerror}; choose another --out") from error
    print(out)


def page(name: str, found: Figures) -> str:
    """The whole page; all that data bring into it is escaped."""
    sections = (
        ("Sources", _sources),
        ("Lengths", _lengths),
        ("Conversations", _conversations),
        ("Tokens", _tokens),
        ("Languages", _languages),
        ("What the steps did", _steps),
        ("Duplicates", _duplicates),
        ("Rejected records", _rejects),
        ("Samples", _samples),
    )
    made = [(title, make(found)) for title, make in sections]
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in made if text)
    return whole(f"Data in {name}", f"<h1>Data in {escape(name)}</h1>{_overview(found)}{body}", charts.STYLE + STYLE)


# ----------------------------------------------------------------------------------------------------------- sections


def _overview(found: Figures) -> str:
    manifest = found.corpus.manifest
    train, held_out = (manifest[side] for side in SIDES)
    tiles = [
        (si(train["documents"]), {"preference": "training pairs"}.get(manifest["kind"], "training documents")),
        (si(train["tokens"]), "training tokens"),
        (decimal_bytes(train["bytes"]), "of training text"),
        (f"{train['characters'] / max(1, train['tokens']):.2f}", "characters a training token"),
        (si(held_out["documents"]), "held-out documents"),
        (f"{manifest['tokenizer']['vocab_size']:,}", "ids"),
    ]
    records = manifest["records"]
    facts = (
        f"{records['read']:,} records were read and {records['kept']:,} kept: {kinds_told(manifest)}. Tokenizer "
        f"{manifest['tokenizer']['name']}, template {manifest['template']}, sources {manifest['source']['fingerprint'][:12]}."
    )
    shown = "".join(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in tiles)
    return f"<div class=tiles>{shown}</div><p class=faint>{escape(facts)}</p>"


def _sources(found: Figures) -> str:
    sources = found.corpus.manifest["sources"]
    total = sum(about["tokens"] for about in sources.values()) or 1
    rows = [
        [
            _name(name, short),
            f"{about['documents']:,}",
            decimal_bytes(about["bytes"]),
            si(about["tokens"]),
            _percent(about["tokens"], total),
            charts.share_bar(about["tokens"] / total),
        ]
        for (name, about), short in zip(sources.items(), tails(list(islice(sources, SOURCES))), strict=False)
    ]
    if len(sources) > SOURCES:
        rows.append([f"and {len(sources) - SOURCES:,} more", "", "", "", "", ""])
    lines = found.corpus.manifest["source"]["formats"]
    told = [*lines[:SOURCES], *([f"and {len(lines) - SOURCES:,} more"] if len(lines) > SOURCES else [])]
    read = "".join(f"<li>{escape(line)}</li>" for line in told)
    return charts.table(("source", "documents", "text", "tokens", "share", ""), rows) + f"<ul class=faint>{read}</ul>"


def _lengths(found: Figures) -> str:
    rows = []
    for side, sizes in found.sizes.items():
        of = five_numbers(sizes)
        five = [f"{of[name]:,}" for name in ("min", "lower_quartile", "median", "upper_quartile", "max")]
        rows.append([NAMES[side], *five, f"{of['mean']:,.0f}"])
    what = "side of a pair" if found.corpus.kind == PREFERENCE else "document"
    head = (f"tokens a {what}", "least", "quarter", "median", "three quarters", "most", "mean")
    bins = {side: octaves(sizes) for side, sizes in found.sizes.items()}
    least, most = min(found_bins[0][0] for found_bins in bins.values()), max(found_bins[-1][0] for found_bins in bins.values())
    edges = [edge for edge in [0, *(2**e for e in range(64))] if least <= edge <= most]
    counts = {side: {low: count for low, _, count in found_bins} for side, found_bins in bins.items()}
    documents = {NAMES[side]: [of.get(edge, 0) / sum(of.values()) for edge in edges] for side, of in counts.items()}
    weights = {NAMES[side]: _weights(sizes, edges) for side, sizes in found.sizes.items()}
    names = [charts.short(edge) for edge in edges]
    figure = charts.beside(
        (
            charts.bars(names, documents, "documents by length", "tokens, from"),
            "Documents by their length; each bar takes in twice the range of the one before.",
        ),
        (charts.bars(names, weights, "tokens by length", "tokens, from"), "Tokens by the length of the document they are in."),
    )
    return figure + charts.table(head, rows) + _packing(found)


def _weights(sizes: np.ndarray, edges: list[int]) -> list[float]:
    """The share of all tokens that is in documents of each length."""
    places = np.searchsorted(edges, sizes, "right") - 1
    sums = np.bincount(places, sizes, len(edges))
    return list(sums / max(1, sums.sum()))


def _packing(found: Figures) -> str:
    if not found.packing:
        many = found.corpus.kind != PREFERENCE
        return f"<p class=faint>Packing was not tried: over {PACKED_DOCUMENTS:,} documents.</p>" if many else ""
    count = max(1, len(found.sizes["train"]))
    rows = [[f"{length:,}", f"{100 * waste:.2f}%", f"{cut:,}", _percent(cut, count)] for length, waste, cut in found.packing]
    head = ("row length", "positions that stay empty", "documents cut", "of all")
    told = "Best-fit packing of the training documents, at the default loss weights."
    return f"<h3>Packed in rows</h3><p class=faint>{told}</p>{charts.table(head, rows)}"


def _conversations(found: Figures) -> str:
    if not found.roles:
        return ""
    parts = []
    for side, counts in found.roles.items():
        named = [(WHOSE[code], int(count)) for code, count in enumerate(counts)]
        parts.append(f"<h3>Whose words the {NAMES[side]} tokens are</h3>{charts.strip(named)}")
    turns = {NAMES[side]: counts for side, counts in found.turns.items() if counts.size}
    if turns:
        least, most = (
            int(pick(counts.min() if pick is min else counts.max() for counts in turns.values())) for pick in (min, max)
        )
        last = min(most, least + MOST_TURNS)
        numbers = list(range(least, last + 1))
        shares = {
            name: list(np.bincount(np.minimum(c, last) - least, minlength=len(numbers)) / c.size) for name, c in turns.items()
        }
        names = [f"{number}+" if number == last < most else f"{number}" for number in numbers]
        parts.append(
            charts.beside((charts.bars(names, shares, "turns a conversation", "turns"), "Conversations by their turns."))
        )
    if longer := chosen_longer(found.corpus):
        parts.append(
            f"<p>The chosen side is the longer one in {100 * longer['longer']:.1f}% of the training pairs; the medians are "
            f"{longer['chosen']:,.0f} tokens chosen and {longer['rejected']:,.0f} rejected. Far from 50%, a model "
            "may learn length instead of what is preferred.</p>"
        )
    return "".join(parts)


def _tokens(found: Figures) -> str:
    corpus, shown = found.corpus, Shown(found.corpus.tokenizer)
    counts, sizes = found.ids["train"], corpus.tokenizer.token_bytes()
    control = np.array(sorted(corpus.tokenizer.control.values()))
    text = np.setdiff1d(np.arange(counts.size), control)
    total = max(1, int(counts.sum()))
    never, rare = text[counts[text] == 0], text[(counts[text] > 0) & (counts[text] < RARE)]
    both = {what: sum(corpus.manifest[side][what] for side in SIDES) for what in ("characters", "bytes", "tokens")}
    rows = [
        ["characters a token, held out ones too", f"{both['characters'] / max(1, both['tokens']):.3f}", ""],
        ["bytes a token, held out ones too", f"{both['bytes'] / max(1, both['tokens']):.3f}", ""],
        ["ids of text never used in training", f"{never.size:,}", _percent(never.size, text.size)],
        [f"ids of text used less than {RARE} times", f"{rare.size:,}", _percent(rare.size, text.size)],
        ["tokens of one byte", f"{counts[sizes == 1].sum():,}", _percent(counts[sizes == 1].sum(), total)],
        ["control tokens", f"{counts[control].sum():,}", _percent(counts[control].sum(), total)],
        ["tokens unknown or U+FFFD, held out ones too", f"{found.unknown:,}", _percent(found.unknown, both["tokens"])],
    ]
    often = np.lexsort((np.arange(counts.size), -counts))[:FREQUENT]
    often = often[counts[often] > 0]
    seldom = rare[np.lexsort((rare, counts[rare]))][:RARELY]
    parts = [charts.beside((_zipf(counts), "How often the ids occur, from the most frequent on; both axes grow by factors."))]
    parts.append(charts.table(("", "", "share"), rows))
    for title, ids in ((f"The {often.size} most frequent", often), (f"{seldom.size} of the rarest that occur", seldom)):
        chips = " ".join(f"<span class=chip><code>{shown.token(int(i))}</code>{escape(si(int(counts[i])))}</span>" for i in ids)
        parts.append(f"<h3>{title}</h3><p>{chips}</p>" if ids.size else "")
    return "".join(parts)


def _zipf(counts: np.ndarray) -> str:
    found = np.sort(counts[counts > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(1, found.size), CURVE_POINTS).astype(np.int64))
    points = [(math.log10(rank), math.log10(found[rank - 1])) for rank in ranks] or [(0.0, 0.0)]
    ends = (points[-1][0], points[0][1])
    x_ticks, y_ticks = ({float(e): charts.short(10**e) for e in _powers(math.ceil(end) or 1)} for end in ends)
    return charts.curve(points, "occurrences by rank", "rank", x_ticks, y_ticks)


def _powers(most: int) -> range:
    """At most seven powers from 0 to `most` or just above it, evenly spread."""
    step = -(-most // 6)
    return range(0, -(-most // step) * step + 1, step)


def _languages(found: Figures) -> str:
    if found.languages_left_out:
        return f"<p class=faint>Not looked at: {escape(found.languages_left_out)}</p>"
    names = list(islice(found.languages.items(), LANGUAGES))
    rows = [
        [escape(code), f"{count:,}", _percent(count, found.sampled), charts.share_bar(count / max(1, found.sampled))]
        for code, count in names
    ]
    more = len(found.languages) - len(names)
    least = language_score(found.corpus)
    what = "sides of pairs" if found.corpus.kind == PREFERENCE else "documents"
    told = f"Of {found.sampled:,} of {len(found.sizes['train']):,} training {what}, evenly spread; und is undetermined, "
    told += f"below a probability of {least:g}. {f'{more} more languages are not shown. ' if more else ''}"
    told += f"{found.damaged:,} of them hold U+FFFD, which stands for lost characters."
    return f"<p class=faint>{escape(told)}</p>{charts.table(('language', 'documents', 'share', ''), rows)}"


def _steps(found: Figures) -> str:
    steps = found.corpus.manifest["steps"]
    rows, parts = [], []
    for step, about in steps.items():
        removed = "<br>".join(f"{count:,} {escape(reason)}" for reason, count in about["removed"].items())
        rows.append([step, f"{about['changed']:,}", removed or "nothing"])
        samples = "".join(_change(each) for each in found.samples.get(step, []))
        parts.append(f"<details><summary>{step}: some of it</summary>{samples}</details>" if samples else "")
    if not rows:
        return "<p class=faint>There were no steps (--steps none).</p>"
    return charts.table(("step", "changed", "removed"), rows) + "".join(parts)


def _change(sample: dict[str, str]) -> str:
    told = f"<p class=faint>{escape(visible_name(sample['name']))}: {escape(sample['what'])}</p>"
    boxes = "".join(
        f"<pre class=sample><span class=faint>{which} </span>{escape(visible_text(sample[which]))}</pre>"
        for which in ("before", "after")
        if which in sample
    )
    return told + boxes


def _duplicates(found: Figures) -> str:
    steps, read = found.corpus.manifest["steps"], found.corpus.manifest["records"]
    rows = []
    looked = read["kept"] + sum(sum(steps[step]["removed"].values()) for step in ("exact", "near") if step in steps)
    for step, what in (("exact", "equal to an earlier document"), ("near", "similar to an earlier document")):
        if step not in steps:
            rows.append([what, f"not looked for (--steps {step})", ""])
            continue
        count = sum(steps[step]["removed"].values())
        rows.append([what, f"{count:,} of {looked:,}", _percent(count, looked)])
        looked -= count
    return charts.table(("", "removed", "share"), rows)


def _rejects(found: Figures) -> str:
    manifest = found.corpus.manifest
    counts, read = manifest["rejects"]["counts"], manifest["records"]["read"]
    if not counts:
        return "<p>None.</p>"
    parts = [
        charts.table(("why", "records", "share"), [[escape(kind), f"{n:,}", _percent(n, read)] for kind, n in counts.items()])
    ]
    rows = [
        [_name(each["name"]), escape(each["kind"]), f"<code>{escape(visible_text(each['sample']))}</code>"]
        for each in found.rejected
    ]
    parts.append(
        f"<details><summary>the first ones of each kind</summary>{charts.table(('record', 'why', 'begins'), rows)}</details>"
    )
    return "".join(parts)


def _samples(found: Figures) -> str:
    """Some training documents as a model reads them, each token in the colour of whose words it is."""
    corpus, shown = found.corpus, Shown(found.corpus.tokenizer)
    starts, roles = corpus.documents("train"), corpus.roles("train")
    parts = []
    if roles is not None:
        keys = (f'<span class="w{code} key">{name}</span>' for code, name in WHOSE.items())
        parts.append(f"<p class=legend>{' '.join(keys)}</p>")
    for number in spread(len(starts) - 1, SAMPLES):
        start, end = int(starts[number]), int(starts[number + 1])
        stop = min(end, start + SAMPLE_TOKENS)
        ids = corpus.train.read(start, stop)
        whose = np.full(stop - start, TEXT) if roles is None else roles.read(start, stop)
        which = f"{number:,}" if corpus.kind != PREFERENCE else f"{number // 2:,}, {('chosen', 'rejected')[number % 2]}"
        more = f", of which the first {stop - start:,}" if stop < end else ""
        parts.append(f"<h3>document {which}: {end - start:,} tokens{more}</h3>")
        parts.append(f"<pre class=sample>{''.join(_coloured(shown.text(ids), whose))}</pre>")
    return "".join(parts)


def _coloured(pieces: Iterable[tuple[str, int]], whose: np.ndarray) -> Iterable[str]:
    """Text in spans of one colour each."""
    code, run = -1, ""
    for text, place in pieces:
        if int(whose[place]) != code:
            if run:
                yield f"<span class=w{code}>{run}</span>"
            code, run = int(whose[place]), ""
        run += text
    yield f"<span class=w{code}>{run}</span>" if run else ""


# ------------------------------------------------------------------------------------------------------------- pieces


def tails(names: list[str]) -> list[str]:
    """Paths by their last parts, of each as many as tell it from the others; other names as they are."""
    parts = {name: Path(name).parts if "/" in name and ":" not in name else (name,) for name in names}
    taken = dict.fromkeys(names, 1)

    def tail(name: str) -> str:
        return name if taken[name] == len(parts[name]) else "/".join(parts[name][-taken[name] :])

    while True:
        counts = Counter(map(tail, parts))
        longer = [name for name in parts if counts[tail(name)] > 1 and taken[name] < len(parts[name])]
        if not longer:
            return [tail(name) for name in names]
        for name in longer:
            taken[name] += 1


def _name(name: str, short: str = "") -> str:
    whole_name = f' title="{escape(visible_name(name))}"' if short and short != name else ""
    return f"<span class=name{whole_name}>{escape(visible_name(short or name))}</span>"


def visible_name(name: str) -> str:
    """A file's name in one line, with what nobody sees spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def visible_text(text: str) -> str:
    """The same of a text, which keeps its lines."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _percent(part: Any, whole_: int) -> str:
    return f"{100 * int(part) / max(1, whole_):.2f}%"


STYLE = """
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(7rem,1fr));gap:.5rem;margin:1rem 0}
.tiles div{background:var(--chip);border-radius:.5rem;padding:.5rem .75rem;font-size:.875rem;color:var(--faint)}
.tiles b{display:block;font-size:1.35rem;color:var(--ink);font-variant-numeric:tabular-nums}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:0 1.5rem}
td{font-variant-numeric:tabular-nums}td,th{overflow-wrap:normal}.wide th{white-space:normal;vertical-align:bottom}
.name{display:block;min-width:7rem;overflow-wrap:anywhere}
.w0{color:var(--faint)}.w1{color:var(--fourth)}.w2{color:var(--second)}.w3{color:rgb(var(--shade))}
"""
