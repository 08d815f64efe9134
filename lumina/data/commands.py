"""`lumina data`: what can be done with data, each in a module of its own, which is loaded when it runs."""

import argparse
import importlib

from lumina.data import options

ACTIONS = {  # name -> module and what it does
    "prepare": ("preparing.directory", "files, directories or datasets -> a directory of token shards to train on"),
    "show": ("reports.show", "a record of a file as it is learned: turns, ids and loss weights"),
    "check": ("reports.checking", "whether files can be trained on, and how good they are"),
    "report": (
        "reports.report_page",
        "a page on a prepared directory: lengths, sources, duplicates, tokens, samples",
    ),
    "tokenizer": ("reports.tokenizers", "train a tokenizer, and compare it with others on text it has not seen"),
}


def add(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Define the subcommands; the one that `arguments` begin with gets its options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    parsers = {name: actions.add_parser(name, help=about) for name, (_, about) in ACTIONS.items()}
    if arguments and arguments[0] in ACTIONS:
        getattr(options, arguments[0])(parsers[arguments[0]])
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    importlib.import_module(f"lumina.data.{ACTIONS[arguments.action][0]}").tell(arguments)
