"""The options of each `lumina data` command, apart from what it does, so that --help answers at once."""

import argparse
from pathlib import Path

from lumina.data.recipe import add_recipe

HELD_OUT, VOCAB_SIZE, SAMPLE_MB = 0.02, 32_768, 500.0  # where nothing is said


def prepare(parser: argparse.ArgumentParser) -> None:
    """Of `lumina data prepare`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory, glob, -, hf:NAME, stdlib, ...")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="what to make; the same command goes on")
    parser.add_argument(
        "--tokenizer", default="bpe", help="bpe, trained on the sources; gpt2, cl100k_base, o200k_base, a file, or a directory"
    )
    parser.add_argument(
        "--vocab-size", type=int, help=f"ids of bpe (default: {VOCAB_SIZE:,}, or as many as a smaller text is enough for)"
    )
    parser.add_argument("--tokenizer-sample-mb", type=float, help=f"text that bpe is trained on (default: {SAMPLE_MB:g})")
    parser.add_argument("--template", default="lumina", help="of conversations: lumina, chatml, instruct or chat")
    parser.add_argument(
        "--held-out",
        type=float,
        help=f"fraction kept for evaluation (default: {HELD_OUT}, or one that few documents have on both sides)",
    )
    parser.add_argument("--max-bad", type=float, default=0.5, help="stop above this share of rejected records (default: 0.5)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; 0: this one)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where units are made (default: local)")
    parser.add_argument("--json", action="store_true", help="the manifest's counts as one JSON object on stdout")
    add_recipe(parser)


def show(parser: argparse.ArgumentParser) -> None:
    """Of `lumina data show`."""
    parser.add_argument(
        "file", metavar="FILE", help="or another source: -, a directory, a glob, stdlib, docstrings, preferences"
    )
    parser.add_argument("--record", type=int, default=1, metavar="N", help="which one, rejected ones counted (default: 1)")
    parser.add_argument("--template", default="lumina", help="of conversations: lumina, chatml, instruct or chat")
    parser.add_argument(
        "--tokenizer", default="", help="as in training; without one, a small one is trained on the first records"
    )
    parser.add_argument(
        "--loss-weights",
        default="",
        help="of roles, as assistant=1.5,user=1 (default: the assistant's alone)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_recipe(parser)


def check(parser: argparse.ArgumentParser) -> None:
    """Of `lumina data check`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory, glob, -, hf:NAME, stdlib, ...")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="look at the first N records (default: at all)")
    parser.add_argument(
        "--tokenizer", default="", help="render the samples and count tokens with it, such as gpt2 or a directory"
    )
    parser.add_argument("--template", default="lumina", help="of conversations: lumina, chatml, instruct or chat")
    parser.add_argument(
        "--max-bad", type=float, default=0.5, help="unusable above this share of rejected records (default: 0.5)"
    )
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object on stdout")
    add_recipe(parser)


def report(parser: argparse.ArgumentParser) -> None:
    """Of `lumina data report`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="a prepared directory")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: DIR/report.html)")


def tokenizer(parser: argparse.ArgumentParser) -> None:
    """Of `lumina data tokenizer`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory, glob, -, hf:NAME, stdlib, ...")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the tokenizer is saved")
    parser.add_argument(
        "--kind", choices=("bpe", "sentencepiece"), default="bpe", help="byte-level BPE, or SentencePiece's unigram model"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, help=f"ids, control tokens included (default: {VOCAB_SIZE:,})"
    )
    parser.add_argument(
        "--min-frequency", type=int, default=0, metavar="N", help="leave out merges of bpe that the sample has less often"
    )
    parser.add_argument("--sample-mb", type=float, help="text to train on (default: 500; 50 of sentencepiece, which is slow)")
    parser.add_argument("--template", default="lumina", help="whose control tokens it gets: lumina, chatml, instruct or chat")
    parser.add_argument("--held-out", type=float, default=HELD_OUT, help=f"fraction to compare on (default: {HELD_OUT})")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="TOKENIZER",
        help="another one to compare with, as --tokenizer in training: a directory, a file, a name; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="the comparison as one JSON object on stdout")
    add_recipe(parser)
