"""What is done to records between a source and token shards: every option of it, in one place."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from lumina.errors import UsageError

# In this order whatever the order they are named in: what changes a text comes before what judges it.
STEPS = ("repair", "control", "redact", "length", "quality", "language", "decontaminate", "exact", "near")
DEFAULT_STEPS = "control,exact"


def _option(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Recipe:
    """Options of `lumina data prepare`, each a flag: they, the sources and the tokenizer decide all bytes."""

    format: str = _option("", "of all sources, such as jsonl; empty finds it by name and content")
    text_field: str = _option("", "field or column that holds the text; empty finds text, content, message, body or output")
    max_record_mb: float = _option(16.0, "records above this are rejected")
    max_conversations: int = _option(0, "conversations taken of a file of message trees; 0 takes all")
    steps: str = _option(DEFAULT_STEPS, f"of {', '.join(STEPS)}; or all, or none")
    redact: str = _option("email,phone,key", "redact: of url, email, phone, key and code, those that are blanked")
    min_characters: int = _option(1, "length: shorter documents are removed")
    max_characters: int = _option(0, "length: longer documents are removed; 0 removes none")
    languages: str = _option("en", "language: those that are kept, as ISO 639-1 codes")
    language_score: float = _option(0.5, "language: least probability of the language found")
    near_threshold: float = _option(0.8, "near: Jaccard similarity of shingles from which a document is a duplicate")
    near_permutations: int = _option(128, "near: of MinHash; more of them estimate the similarity better")
    near_shingle: int = _option(5, "near: words in a shingle")
    against: str = _option("", "decontaminate: files of evaluation texts, separated by commas")
    against_ngram: int = _option(13, "decontaminate: words in a row that a document may not share with them")

    @property
    def named_steps(self) -> tuple[str, ...]:
        """The steps to take, in order. Raises UsageError for one that does not exist."""
        if self.steps in ("all", "none"):
            return STEPS if self.steps == "all" else ()
        named = {step.strip() for step in self.steps.split(",") if step.strip()}
        if unknown := sorted(named - set(STEPS)):
            raise UsageError(f"--steps: {unknown[0]!r} is no step; there are {', '.join(STEPS)}, all and none")
        return tuple(step for step in STEPS if step in named)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of a recipe."""
    group = parser.add_argument_group("recipe")
    for spec in fields(Recipe):
        about = spec.metadata["help"] + (f" (default: {spec.default})" if spec.default else "")
        kind = type(spec.default)
        group.add_argument(
            f"--{spec.name.replace('_', '-')}", type=kind, default=spec.default, metavar=kind.__name__.upper(), help=about
        )


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the flags give; raises UsageError for a step that there is not."""
    recipe = Recipe(**{spec.name: getattr(arguments, spec.name) for spec in fields(Recipe)})
    _ = recipe.named_steps
    for name, good, works in (
        ("max_record_mb", 0 < recipe.max_record_mb <= 2000, "must be above 0 and at most 2,000"),
        ("max_conversations", recipe.max_conversations >= 0, "must be at least 0"),
        ("language_score", 0 <= recipe.language_score <= 1, "must be from 0 to 1"),
        ("near_threshold", 0 < recipe.near_threshold <= 1, "must be above 0 and at most 1"),
        ("near_permutations", 8 <= recipe.near_permutations <= 4096, "must be from 8 to 4,096"),
        ("near_shingle", recipe.near_shingle >= 1, "must be at least 1"),
        ("against_ngram", recipe.against_ngram >= 1, "must be at least 1"),
    ):
        if not good:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: {works}")
    return recipe
