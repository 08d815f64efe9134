"""The leak certificate as a verdict, a file, a page and a table: what was measured is `lumina_jax/certify.py`'s to say."""

import json
import time
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from lumina.runs.console import Console, printable, table
from lumina.runs.directory import replace_file
from lumina.runs.journal import finite
from lumina.runs.units import duration

FORMAT = 1
SHOW_EVERY = 0.3  # seconds
TITLES = {
    "prefix": "prefixes alone",
    "suffix": "swapped suffixes",
    "noise": "random tokens",
    "generation": "generation",
}


class Passes:
    """How far the measures are, in passes through the model, on the live line."""

    def __init__(self, console: Console, total: int):
        self._console, self._total, self._done, self._name = console, total, 0, ""
        self._began = self._shown = time.perf_counter()

    def begin(self, name: str) -> None:
        """The next measure."""
        self._name = name
        self._console.status(f"certify: {name}")

    def advance(self) -> None:
        """One more pass is done."""
        self._done, now = self._done + 1, time.perf_counter()
        if self._console.live and now - self._shown > SHOW_EVERY:
            self._shown, total = now, max(self._total, self._done)  # what is measured again comes on top
            left = (now - self._began) / self._done * (total - self._done)
            self._console.status(f"certify: {self._name}  {self._done}/{total} passes  eta {duration(left)}")

    def end(self) -> None:
        self._console.done()


# ---------------------------------------------------------------------------------------------------------- verdict


def verdict(certificate: dict[str, Any]) -> dict[str, Any]:
    """The certificate with `causal`; `leaks`, when a measure did not hold; and `failed`: each of those, and each whose control
    was not refused, which shows nothing either way."""
    failed, leaks = [], False
    for name, title in TITLES.items():
        measure = certificate["measures"][name]
        if not measure["holds"]:
            leaks = True
            failed.append("; ".join(filter(None, [f"{title}: {_finding(name, measure)}", measure.get("settled")])))
        control = measure.get("control", {})
        if control.get("applicable") and not control["refused"]:
            failed.append(f"{title}: the control was not refused ({_share(control['relative'])}), so the measure shows nothing")
    return {"causal": not failed, "leaks": leaks, "failed": failed, **certificate}


def write(directory: Path, certificate: dict[str, Any]) -> None:
    """certificate.json and certificate.html in a run's directory, each whole or not at all."""
    for name, text in (("certificate.json", as_json(certificate)), ("certificate.html", page(certificate))):
        replace_file(directory / name, partial(Path.write_text, data=text, encoding="utf-8", errors="backslashreplace"))


def as_json(certificate: dict[str, Any]) -> str:
    """A number that is not finite becomes null."""
    return json.dumps(finite(certificate), indent=2, allow_nan=False) + "\n"


# ------------------------------------------------------------------------------------------------------------ words


def _share(value: float) -> str:
    return f"{value:.1e} of the largest logit"


def _finding(name: str, measure: dict[str, Any]) -> str:
    """What a measure found, in a few words."""
    if name == "noise":
        causal = measure["causal"]
        return (
            f"{causal['nats_per_token']:.3f} nats a token, log V {measure['log_vocabulary']:.3f}: "
            f"{causal['above_in_standard_errors']:+.1f} standard errors over {measure['tokens']:,} tokens"
        )
    if name == "generation":
        tokens = f"{measure['tokens']:,} tokens after {measure['prompts']} prompts"
        differ = (
            f"{measure['different_tokens']} of {tokens} are not those without cache, by up to {_share(measure['relative'])}"
        )
        return differ if measure["different_tokens"] or not measure["holds"] else f"{tokens} are those without cache"
    flips = f"; {measure['flips']} of {measure['decisions']:,} depth decisions differ" if measure.get("flips") else ""
    experts = ""
    if measure.get("expert_flips"):
        experts = f"; {measure['expert_flips']} of {measure['expert_choices']:,} choices of experts differ"
    again = f"; in float32 {_share(measure['in_float32']['relative'])}" if "in_float32" in measure else ""
    within = f"tolerance {measure['tolerance']:.0e}, {measure['precision']}"
    return f"{_share(measure['relative'])} ({within}) over {measure['tokens']:,} tokens{flips}{experts}{again}"


def _control(measure: dict[str, Any]) -> str:
    control = measure["control"]
    if not control["applicable"]:
        return control["why"]
    return f"{_share(control['relative'])}: {'refused, as it must be' if control['refused'] else 'NOT refused'}"


def _loss(part: dict[str, Any]) -> str:
    return f"{part['nats_per_token']:.4f} +- {part['standard_error']:.4f} nats a token, {part['bits_per_byte']:.3f} bits/byte"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _about(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    rows, length = certificate["rows"], certificate["sequence_length"]
    layers = certificate["layers"]
    return [
        ("run", f"{certificate['run']}, step {certificate['step']} ({certificate['checkpoint']} checkpoint)"),
        ("layers", ", ".join(f"{layers.count(kind)} x {kind}" for kind in dict.fromkeys(layers))),
        ("held-out text", f"{rows:,} rows of {length:,}, {certificate['tokens']:,} tokens"),
        ("precision", certificate["precision"]),
        ("device", certificate["device"]),
    ]


def _found(certificate: dict[str, Any]) -> list[tuple[str, str]]:
    measures = certificate["measures"]
    quality = measures["cross_entropy"]
    lines = [("cross-entropy", _loss(quality["causal"]))]
    if "top_k" in quality:
        gap = quality["gap"]
        lines += [
            ("control: top-k", f"{_loss(quality['top_k'])} (sees the future: no figure of quality)"),
            ("gap", f"{gap['nats_per_token']:+.4f} +- {gap['standard_error']:.4f} nats a token, top-k minus causal"),
        ]
    for name, title in TITLES.items():
        measure = measures[name]
        lines.append((title, f"{'holds' if measure['holds'] else 'FAILS'}: {_finding(name, measure)}"))
        if "control" in measure:
            lines.append(("control", _control(measure)))
        if name == "noise" and "top_k" in measure:
            lines.append(("control: top-k", f"{measure['top_k']['nats_per_token']:.3f} nats a token"))
    return lines


def _layers(depth: dict[str, Any] | None) -> list[list[str]]:
    """A line for each layer with depth routing, after one of headings."""
    if depth is None:
        return []
    names = ("auroc", "f1", "precision", "recall", "agreement")
    lines = [["layer", "taken", "capacity", "AUROC", "F1", "precision", "recall", "agreement"]]
    for each in depth["layers"]:
        taken = [f"{each['realised_capacity']:.3f}", f"{depth['capacity']:.3f}"]
        lines.append([str(each["layer"]), *taken, *(_ratio(each[name]) for name in names)])
    return lines


def _says(certificate: dict[str, Any]) -> str:
    if certificate["causal"]:
        return "causal: nothing that is quoted sees the future"
    return "NOT causal" if certificate["leaks"] else "not shown to be causal: a control was not refused"


def terminal(certificate: dict[str, Any]) -> str:
    """The certificate as a table."""
    lines = _layers(certificate["measures"]["depth"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    depth = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    rows = _about(certificate) + _found(certificate) + ([("depth routing", depth)] if depth else [])
    return printable(table([*rows, ("verdict", "\n".join([_says(certificate), *certificate["failed"]]))]))


# ------------------------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .25rem; }
.verdict { border-left: .4rem solid #2a8a4a; padding: .5rem .75rem; background: #2a8a4a22; }
.verdict.no { border-color: #c0392b; background: #c0392b22; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #8886; }
small { overflow-wrap: anywhere; }
"""


def page(certificate: dict[str, Any]) -> str:
    """The certificate as one page of HTML that needs nothing else."""
    name = escape(f"{Path(certificate['run']).name or certificate['run']}, step {certificate['step']}")
    failed = "".join(f"<li>{escape(each)}</li>" for each in certificate["failed"])
    lines = _layers(certificate["measures"]["depth"])
    depth = ""
    if lines:
        head, *body = (
            "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>"
            for line, tag in zip(lines, ["th"] + ["td"] * (len(lines) - 1), strict=True)
        )
        label = escape(certificate["measures"]["depth"]["label"])
        depth = f'<h2>Depth routing</h2><p>{label}.</p><div class="wide"><table>{head}{"".join(body)}</table></div>'
    marks = ("config", "data", "tokenizer", "jax")
    made_of = "; ".join(f"{mark} {escape(str(certificate[mark]))}" for mark in marks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Leak certificate: {name}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Leak certificate: {name}</h1>
<div class="verdict{"" if certificate["causal"] else " no"}"><strong>{escape(_says(certificate))}</strong>
{f"<ul>{failed}</ul>" if failed else ""}</div>
<h2>What was examined</h2>{_list(_about(certificate))}
<h2>What was found</h2>{_list(_found(certificate))}
{depth}
<p><small>Measured, not proved: on this text, at this step. {made_of}</small></p>
</body>
</html>
"""


def _list(rows: list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"
