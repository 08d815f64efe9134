"""What is done to records between a source and token shards: every option of it, in one place."""

import argparse
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lumina.errors import UsageError

# In this order whatever the order they are named in: what changes a text comes before what judges it.
STEPS = ("repair", "control", "redact", "length", "quality", "language", "decontaminate", "exact", "near")
AMONG_DOCUMENTS = ("exact", "near")  # steps that look at several
DEFAULT_STEPS = "control,exact"


def _option(default: Any, about: str, step: str = "") -> Any:
    """An option of all records, or of those of `step`."""
    return field(default=default, metadata={"help": f"{step}: {about}" if step else about, "step": step})


@dataclass(frozen=True)
class Recipe:
    """Options of `lumina data prepare`, each a flag: they, the sources and the tokenizer decide all bytes."""

    format: str = _option("", "of all sources, such as jsonl; empty finds it by name and content")
    text_field: str = _option("", "field or column that holds the text; empty finds text, content, message, body or output")
    max_record_mb: float = _option(16.0, "records above this are rejected")
    max_conversations: int = _option(0, "conversations taken of a file of message trees; 0 takes all")
    steps: str = _option(DEFAULT_STEPS, f"of {', '.join(STEPS)}; or all, or none")
    redact: str = _option("email,phone,key", "of url, email, phone, key and code, those that are blanked", "redact")
    min_characters: int = _option(1, "shorter documents are removed", "length")
    max_characters: int = _option(0, "longer documents are removed; 0 removes none", "length")
    languages: str = _option("en", "those that are kept, as ISO 639-1 codes", "language")
    language_score: float = _option(0.5, "least probability of the language found", "language")
    near_threshold: float = _option(0.8, "Jaccard similarity of shingles from which a document is a duplicate", "near")
    near_permutations: int = _option(128, "of MinHash; more of them estimate the similarity better", "near")
    near_shingle: int = _option(5, "words in a shingle", "near")
    against: str = _option("", "files of evaluation texts, separated by commas", "decontaminate")
    against_ngram: int = _option(13, "words in a row that a document may not share with them", "decontaminate")

    @property
    def named_steps(self) -> tuple[str, ...]:
        """The steps to take, in order. Raises UsageError for one that does not exist."""
        if self.steps in ("all", "none"):
            return STEPS if self.steps == "all" else ()
        named = {step.strip() for step in self.steps.split(",") if step.strip()}
        if unknown := sorted(named - set(STEPS)):
            raise UsageError(f"--steps: {unknown[0]!r} is no step; there are {', '.join(STEPS)}, all and none")
        return tuple(step for step in STEPS if step in named)

    @property
    def done(self) -> dict[str, Any]:
        """By name, the options that decide something: those of steps that are not taken decide nothing."""
        return {name: value for name, value in asdict(self).items() if _step_of(name) in ("", *self.named_steps)}


def _step_of(name: str) -> str:
    return next(str(spec.metadata["step"]) for spec in fields(Recipe) if spec.name == name)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A flag for each option of a recipe; one that is not given is no attribute of what is parsed."""
    group = parser.add_argument_group("recipe")
    for spec in fields(Recipe):
        about = spec.metadata["help"] + (f" (default: {spec.default})" if spec.default else "")
        kind, default = type(spec.default), argparse.SUPPRESS
        group.add_argument(_flag(spec.name), type=kind, default=default, metavar=kind.__name__.upper(), help=about)


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the flags give. Raises UsageError for what cannot be, as `_require_possible`, before anything is read."""
    given = {spec.name: getattr(arguments, spec.name) for spec in fields(Recipe) if hasattr(arguments, spec.name)}
    recipe = Recipe(**given)
    _require_possible(recipe, given)
    return recipe


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _require_possible(recipe: Recipe, given: dict[str, Any]) -> None:
    """Raise a UsageError for a step that there is not, an option of one that is not taken, a value that is none, or a library
    that a step lacks."""
    from lumina.data.cleaning.steps import require_options

    for name, value in given.items():
        step = _step_of(name)
        if step and step not in recipe.named_steps:
            steps = ",".join(each for each in STEPS if each in (step, *recipe.named_steps))
            raise UsageError(f"{_flag(name)} {value}: needs the step {step}; use --steps {steps}")
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
            raise UsageError(f"{_flag(name)} {getattr(recipe, name)}: {works}")
    require_options(recipe)
