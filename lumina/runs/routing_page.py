"""`lumina routing`: one page that shows what the routers of a run do, in any browser, without a network.

R rows, T positions, k choices, L layers, N tokens.
"""

import argparse
import base64
import json
import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import numpy as np

from lumina.architecture import layer_kinds
from lumina.config import Config
from lumina.data.corpus import Corpus
from lumina.errors import CheckpointError, ConfigError, DataError, LuminaError, UsageError
from lumina.runs import library
from lumina.runs.console import printable
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import finite
from lumina.runs.page import Shown, whole
from lumina.runs.routing import History, advice, read_history, summary, verdicts
from lumina.runs.routing_plots import THEMES, draw, require_matplotlib
from lumina.runs.routing_text import HeldOut, Typical, by_position, extremes, typical
from lumina.runs.text import corpora_of
from lumina.tokenizer import Tokenizer

ROWS = 64
LEAST_OF_EXPERT, LEAST_OF_DEPTH = 5, 10  # occurrences below which a token says nothing
SHOWN = 12  # tokens of an expert or a side
BINS = 64  # parts of a row
SAMPLE = 1024  # tokens

Look = Callable[[RunDirectory, Config, Corpus, int, bool], HeldOut]  # run, config, corpus, rows, best


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lumina routing`."""
    parser.add_argument("run_name", metavar="RUN", help="a run directory, or its name in runs/")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where index.html and the plots go (default: RUN/routing)")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss, not the newest")
    parser.add_argument("--rows", metavar="N", type=int, default=ROWS, help=f"held-out rows to read (default: {ROWS}; 0: none)")
    parser.add_argument("--json", action="store_true", help="history, verdicts and advice as one JSON object, and no page")


def tell(arguments: argparse.Namespace, look: Look) -> None:
    """Make the page, and print the advice and where the page is. `look` is the backend's pass over held-out text.

    Raises:
        UsageError: nothing in the run routes, matplotlib is missing, or the page cannot be written.
        CheckpointError: --best, and there is no whole best checkpoint. Without --best the page says what is missing.
    """
    if arguments.rows < 0:
        raise UsageError(f"--rows = {arguments.rows}: must be at least 0; 0 reads no held-out text")
    run = library.find(arguments.run_name)
    config = library.read_config(run)
    if all(kind == "dense" for kind in layer_kinds(config.model)):
        raise UsageError(
            f"{run.path}: a dense run, no layer of it routes (model.moe.pattern and model.mod.pattern select none): "
            "there is nothing to show"
        )
    if arguments.json:
        history = read_history(run, config)
        found = [verdict._asdict() for verdict in verdicts(history, config)]
        about = {"run": str(run.path), **summary(history), "verdicts": found, "advice": advice(history, config)}
        print(json.dumps(finite(about), indent=2))
        return
    require_matplotlib()
    out = arguments.out or run.path / "routing"
    try:
        out.mkdir(parents=True, exist_ok=True)
        held_out, tokenizer, missing = _held_out(run, config, arguments.rows, arguments.best, look)
        history = read_history(run, config)
        position_Ln = by_position(held_out.taken_LRT, held_out.filled_RT, BINS) if held_out else None
        plots = draw(out, history, config, position_Ln)
        images = {name: [(out / f"{name}{theme.suffix}.png").read_bytes() for theme in THEMES] for name in plots}
        text = page(run.path.absolute().name, history, config, images, held_out, tokenizer, missing)
        (out / "index.html").write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{error.filename or out}: {error.strerror}; choose another --out") from error
    for says in advice(history, config):
        print(printable(f"- {says}"))
    if missing:
        print(printable(f"- held-out text was not looked at: {missing}"))
    print(printable(str(out / "index.html")))


def _held_out(
    run: RunDirectory, config: Config, rows: int, best: bool, look: Look
) -> tuple[HeldOut | None, Tokenizer | None, str]:
    """What the routers decide about held-out text, with its tokenizer, or why that cannot be told."""
    if rows == 0:
        return None, None, "--rows=0"
    try:
        corpora = corpora_of(run, config, lambda line: print(printable(line), file=sys.stderr))
        corpus = next(iter(corpora.values()))
        return look(run, config, corpus, rows, best), corpus.tokenizer, ""
    except (ConfigError, DataError, CheckpointError, UsageError) as error:
        if best and isinstance(error, CheckpointError):
            raise
        return None, None, _why(error)


def _why(error: LuminaError) -> str:
    return str(error).split("; restore the data")[0]


# -------------------------------------------------------------------------------------------------------------- page


def page(
    name: str,
    history: History,
    config: Config,
    images: dict[str, list[bytes]],
    held_out: HeldOut | None,
    tokenizer: Tokenizer | None,
    missing: str,
) -> str:
    """The whole page: all that a run or its text brings into it is escaped."""
    shown = Shown(tokenizer) if tokenizer else None
    body = [f"<h1>Routing of {escape(name)}</h1>", f"<p class=faint>{escape(_facts(history, config, held_out))}</p>"]
    items = "".join(f"<li>{escape(says)}</li>" for says in advice(history, config))
    body.append(f"<section><h2>What to do</h2><ul class=advice>{items}</ul></section>")
    if history.moe_layers:
        body.append("<section><h2>Experts</h2>")
        body.append(_figure(images, "load", "A row an expert, a column a log step. Even colours are even loads."))
        body.append(_figure(images, "experts", "Drops are of training alone; evaluation and generation drop nothing."))
        if held_out and shown:
            body.append(_typical_tokens(history, config, held_out, shown))
        body.append("</section>")
    if history.mod_layers:
        body.append("<section><h2>Depth</h2>")
        body.append(_figure(images, "depth", "What generation would take, and how well it foresees what training takes."))
        body.append(_figure(images, "position", "Bands across positions would mean that place decides, not content."))
        if held_out and shown:
            body += [_takers_and_skippers(history, held_out, shown), _sample(history, held_out, shown)]
        body.append("</section>")
    if missing:
        body.append(f"<p class=faint>Held-out text was not looked at: {escape(missing)}</p>")
    return whole(f"Routing of {name}", "".join(body), f"{STYLE}{_shades(len(history.mod_layers))}")


def _facts(history: History, config: Config, held_out: HeldOut | None) -> str:
    moe, mod, facts = config.model.moe, config.model.mod, []
    if history.steps:
        facts.append(f"{len(history.steps)} log points, steps {history.steps[0]} to {history.steps[-1]}")
    if history.left_out:
        facts.append(f"{history.left_out} records of another shape left out")
    if history.moe_layers:
        noops = f" and {moe.noop_experts} no-op" if moe.noop_experts else ""
        facts.append(f"{moe.num_experts} experts{noops}, top-{moe.top_k}, in {len(history.moe_layers)} layers")
    if history.mod_layers:
        scope = "whole block" if mod.scope == "block" else "feed-forward"
        facts.append(f"depth {mod.capacity:g} of the {scope} in {len(history.mod_layers)} layers")
    if held_out:
        facts.append(f"{int(held_out.filled_RT.sum()):,} held-out tokens, read with the checkpoint of step {held_out.step}")
    return "; ".join(facts) + ". Layers and experts count from 0, as in tensor names."


def _figure(images: dict[str, list[bytes]], name: str, says: str) -> str:
    if name not in images:
        return ""
    light, dark = ("data:image/png;base64," + base64.b64encode(data).decode() for data in images[name])
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(name)}: {escape(says)}"></picture><figcaption>{escape(says)}</figcaption></figure>'
    )


def _typical_tokens(history: History, config: Config, held_out: HeldOut, shown: "Shown") -> str:
    tokens_N = held_out.tokens_RT[held_out.filled_RT]
    parts = [
        "<h3>Typical tokens of each expert</h3><p class=faint>By lift: how many times more often than in the text. "
        f"Tokens that an expert has at least {LEAST_OF_EXPERT} times; the percentage is its share of the layer's choices.</p>"
    ]
    moe = config.model.moe
    for place, layer in enumerate(history.moe_layers):
        chosen_Nk = held_out.experts_LRTk[place][held_out.filled_RT]
        made = max(1, int((chosen_Nk >= 0).sum()))
        rows = []
        for alternative in range(moe.num_experts + moe.noop_experts):
            is_noop = alternative >= moe.num_experts
            among_N = (chosen_Nk == alternative).sum(axis=1)
            found = typical(tokens_N, among_N, LEAST_OF_EXPERT, SHOWN)
            share = among_N.sum() / made
            chips = _chips(found, shown, lambda each: f"{each.times} times, lift {each.lift:.1f}")
            nothing = "none often enough" if among_N.any() else "no token"
            name = f"no-op {alternative - moe.num_experts}" if is_noop else f"{alternative}"
            rows.append(
                f"<tr><th>{name}</th><td class=share>{100 * share:.1f}%</td>"
                f"<td>{chips or f'<span class=faint>{nothing}</span>'}</td></tr>"
            )
        body = f"<div class=wide><table>{''.join(rows)}</table></div>"
        parts.append(f"<details{' open' if place == 0 else ''}><summary>layer {layer}</summary>{body}</details>")
    return "".join(parts)


def _takers_and_skippers(history: History, held_out: HeldOut, shown: "Shown") -> str:
    tokens_N = held_out.tokens_RT[held_out.filled_RT]
    parts = [
        "<h3>Tokens that take each layer, and that skip it</h3><p class=faint>The share of its occurrences in which a token "
        f"takes the layer, of tokens that occur at least {LEAST_OF_DEPTH} times.</p>"
    ]
    for place, layer in enumerate(history.mod_layers):
        taken_N = held_out.taken_LRT[place][held_out.filled_RT]
        sides = zip(("take", "skip"), extremes(tokens_N, taken_N, LEAST_OF_DEPTH, SHOWN), strict=True)
        rows = []
        for side, found in sides:
            chips = _chips(found, shown, lambda each: f"{each.times} times, taken {100 * each.share:.0f}%", share=True)
            rows.append(f"<tr><th>{side}</th><td>{chips or '<span class=faint>none stands out</span>'}</td></tr>")
        body = f"<div class=wide><table>{''.join(rows)}</table></div>"
        summary_line = f"layer {layer}, taken by {100 * taken_N.mean():.0f}%"
        parts.append(f"<details{' open' if place == 0 else ''}><summary>{summary_line}</summary>{body}</details>")
    return "".join(parts)


def _chips(found: Iterable[Typical], shown: "Shown", says: Callable[[Typical], str], share: bool = False) -> str:
    """Tokens as they are read, each with its figure."""
    chips = []
    for each in found:
        figure = f"{100 * each.share:.0f}%" if share else f"{each.lift:.1f}"
        chips.append(f'<span class=chip title="{escape(says(each))}"><code>{shown.token(each.token)}</code>{figure}</span>')
    return " ".join(chips)


def _sample(history: History, held_out: HeldOut, shown: "Shown") -> str:
    """The first row, each token shaded by how many layers it takes."""
    L, layers = len(history.mod_layers), np.array(history.mod_layers)
    filled_T = held_out.filled_RT[0]
    tokens_T, taken_LT = held_out.tokens_RT[0][filled_T][:SAMPLE], held_out.taken_LRT[:, 0, filled_T][:, :SAMPLE]
    spans = []
    for text, t in shown.text(tokens_T):
        taken = taken_LT[:, t]
        which = ", ".join(str(layer) for layer in layers[taken]) or "none"
        spans.append(f'<span class=d{taken.sum()} title="takes layers: {which}">{text}</span>')
    legend = " ".join(f"<span class=d{depth}>&nbsp;{depth}&nbsp;</span>" for depth in _some(L))
    return (
        f"<h3>Held-out text, by how many of its {L} layers with depth a token takes</h3><p>{legend}</p>"
        f"<pre class=sample>{''.join(spans)}</pre>"
    )


def _some(most: int) -> list[int]:
    """At most nine numbers from 0 to `most`."""
    return sorted({round(most * part / min(most, 8)) for part in range(min(most, 8) + 1)})


def _shades(most: int) -> str:
    return "".join(f".d{depth}{{--depth:{depth / most:.3f}}}" for depth in range(most + 1)) if most else ""


STYLE = "[class^=d]{background:rgb(var(--shade)/calc(var(--depth)*.6));border-radius:.15rem}\n"
