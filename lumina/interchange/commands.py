"""`lumina export` and `lumina import`: their arguments, and what they print."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lumina.interchange.exporting import CANONICAL, FORMATS, export
from lumina.interchange.importing import import_directory
from lumina.runs import library
from lumina.runs.console import Console, printable, table


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lumina export`."""
    parser.add_argument("run_name", metavar="RUN", help="a run of either backend, its name in runs/, or a canonical directory")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format; canonical keeps all there is")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the directory to make")
    parser.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss, not the newest")
    parser.add_argument("--json", action="store_true", help="what was verified as one JSON object instead of a table")
    parser.set_defaults(run=_export)


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `lumina import`."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a Llama, Mixtral or Qwen3-MoE model in safetensors")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="the directory to make")
    parser.add_argument("--json", action="store_true", help="what was verified as one JSON object instead of a table")
    parser.set_defaults(run=_import)


def _export(arguments: argparse.Namespace) -> None:
    console = Console(0, sys.stderr)
    run = library.find(arguments.run_name)
    told = export(run.path, arguments.to, arguments.out, arguments.best, console.status)
    console.done()
    _tell(arguments, told)


def _import(arguments: argparse.Namespace) -> None:
    console = Console(0, sys.stderr)
    told = import_directory(arguments.directory, arguments.out, console.status)
    console.done()
    _tell(arguments, told)


def _tell(arguments: argparse.Namespace, told: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps({**told, "out": str(arguments.out)}, indent=2))
        return
    print(printable(table(_rows(told, arguments.out))))


def _rows(told: dict[str, Any], out: Path) -> list[tuple[str, str]]:
    rows = [("written", str(out)), ("from", str(told["source"]))]
    if told["format"] == CANONICAL:
        return [*rows, ("step", str(told["step"])), ("optimizer", "with it" if told["optimizer"] else "the weights alone")]
    rows.append(("format", told["format"]))
    logits, text = told["logits"], told["text"]
    rows.append(
        (
            "logits",
            f"within {logits['largest_difference']:.1e} of the largest, on {logits['tokens']} tokens of {text['source']}",
        )
    )
    if logits["tokens_left_out_after_near_ties"]:
        rows.append(
            ("near ties", f"{logits['tokens_left_out_after_near_ties']} tokens after experts too close to call left out")
        )
    continued = logits["greedy"]
    same = (
        "equal"
        if continued["equal"]
        else f"the same up to token {continued['first_differs_at']}, where ours is {continued['ahead']:.1e} ahead"
    )
    rows.append(("continuation", f"{continued['tokens']} tokens {same}"))
    if "tokenizer" in told:
        chat = ", and of a conversation" if told["tokenizer"]["chat_template"] else ""
        rows.append(("ids", f"equal, of {told['tokenizer']['texts']} texts{chat}"))
    if (embedding := told.get("embedding", {"scale": 1}))["scale"] != 1:
        error = embedding["largest_relative_error"]
        exactly = "exactly" if error == 0 else f"within {error:.1e}"
        untied = "; no longer the head's" if embedding["untied"] else ""
        rows.append(("embedding", f"multiplied by {embedding['scale']:.6g}, {exactly}{untied}"))
    if told.get("rows_added"):
        rows.append(("rows added", f"{told['rows_added']}, for control tokens, each the mean of the others"))
    rows += [("note", note) for note in told.get("notes", [])]
    return rows
