"""`lumina data`: prepare, show, check and report on data, and train tokenizers."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from lumina.data.recipe import Recipe, options
from lumina.errors import UsageError

HELD_OUT, VOCAB_SIZE = 0.02, 32_768


def add(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Define the subcommands; those of `arguments` alone get their options."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    about = {
        "prepare": "files, directories or datasets -> a directory of token shards to train on",
        "show": "rendered samples of a file, with ids and loss weights",
        "check": "whether a file can be trained on, and how good it is",
        "report": "a page on a prepared directory",
        "tokenizer": "train a tokenizer, and compare it with others",
    }
    parsers = {name: commands.add_parser(name, help=text, allow_abbrev=False) for name, text in about.items()}
    action = arguments[0] if arguments else ""
    if action == "prepare":
        _add_prepare(parsers["prepare"])
    elif action == "check":
        from lumina.data import checking

        checking.add(parsers["check"])
        parsers["check"].set_defaults(run=checking.tell)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory, glob, -, hf:NAME, stdlib, ...")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="what to make; the same command goes on")
    parser.add_argument(
        "--tokenizer", default="bpe", help="bpe, trained on the sources; gpt2, cl100k_base, o200k_base, a file, or a directory"
    )
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help=f"ids of bpe (default: {VOCAB_SIZE:,})")
    parser.add_argument("--tokenizer-sample-mb", type=float, default=500.0, help="text that bpe is trained on (default: 500)")
    parser.add_argument("--template", default="lumina", help="of conversations: lumina, chatml, instruct or chat")
    parser.add_argument("--held-out", type=float, default=HELD_OUT, help=f"fraction kept for evaluation (default: {HELD_OUT})")
    parser.add_argument("--max-bad", type=float, default=0.5, help="stop above this share of rejected records (default: 0.5)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; 0: this one)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where units are made (default: local)")
    parser.add_argument("--json", action="store_true", help="the manifest's counts as one JSON object on stdout")
    add_recipe(parser)
    parser.set_defaults(run=_prepare)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of a recipe."""
    group = parser.add_argument_group("recipe")
    for name, default, about in options():
        kind, flag = type(default), f"--{name.replace('_', '-')}"
        about = f"{about} (default: {default})" if default else about
        group.add_argument(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=about)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the flags give; raises UsageError for a step that there is not."""
    recipe = Recipe(**{name: getattr(arguments, name) for name, _, _ in options()})
    _ = recipe.named_steps
    return recipe


def _prepare(arguments: argparse.Namespace) -> None:
    from lumina.data.pipeline import Order
    from lumina.data.preparing import prepare_directory
    from lumina.runs.console import Console

    recipe = recipe_of(arguments)
    for flag, value, good, works in (
        ("--held-out", arguments.held_out, 0 < arguments.held_out < 1, "must be between 0 and 1"),
        ("--max-bad", arguments.max_bad, 0 <= arguments.max_bad <= 1, "must be from 0 to 1"),
        ("--workers", arguments.workers, arguments.workers is None or arguments.workers >= 0, "must be at least 0"),
    ):
        if not good:
            raise UsageError(f"{flag} = {value}: {works}")
    console = Console(0)
    workers = os.cpu_count() or 1 if arguments.workers is None else arguments.workers
    order = Order(tuple(arguments.sources), recipe, arguments.held_out, arguments.template)
    manifest = prepare_directory(
        order,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        sample=arguments.tokenizer_sample_mb * 1e6,
        max_bad=arguments.max_bad,
        workers=workers,
        engine=arguments.engine,
        console=console,
    )
    console.done()
    if arguments.json:
        print(json.dumps({name: manifest[name] for name in ("kind", "records", "rejects", "steps", "sources")}))
        return
    print(summary(manifest, arguments.out))


def summary(manifest: dict[str, Any], path: Path) -> str:
    """What a prepared directory holds, and what became of every record."""
    from lumina.data.corpus import SIDES
    from lumina.runs.console import table
    from lumina.runs.units import si

    records, steps = manifest["records"], manifest["steps"]
    rows = [
        ("directory", str(path)),
        ("sources", "\n".join(manifest["source"]["formats"])),
        ("records", f"{records['read']:,} read, {records['kept']:,} kept ({manifest['kind']})"),
    ]
    rows += [("rejected", f"{count:,} {kind}") for kind, count in manifest["rejects"]["counts"].items()]
    for step, about in steps.items():
        told = [f"{about['changed']:,} changed"] if about["changed"] else []
        told += [f"{count:,} removed: {reason}" for reason, count in about["removed"].items()]
        rows.append((step, "\n".join(told) or "nothing changed or removed"))
    for side in SIDES:
        of = manifest[side]
        size = f"{of['bytes'] / 1e6:,.1f} MB, {si(of['tokens'])} tokens"
        rows.append((side.replace("_", " "), f"{of['documents']:,} documents, {size}"))
    size, tokens = (sum(manifest[side][what] for side in SIDES) for what in ("bytes", "tokens"))
    rows.append(("tokenizer", f"{manifest['tokenizer']['name']}, {size / tokens:.2f} bytes a token"))
    return table(rows)
