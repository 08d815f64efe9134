"""What a run reads, step by step: stages, each with its steps, row length and mixture of sources, from `data` of a config.

Nothing is opened here: a config is refused before anything expensive.
"""

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from lumina.errors import ConfigError

if TYPE_CHECKING:
    from lumina.config import Config, DataConfig

DEFAULT_SOURCE = "stdlib"  # of `DataConfig.source`
MODES = ("base_only", "finetuning_only", "hybrid", "interleaved")
LONGEST_PERIOD = 100_000  # rows after which the order of sources repeats; a table of it is kept
_HEAD = re.compile(r"(?:(\d+)\s*)?(?:x\s*(\d+)\s*)?:(.*)", re.DOTALL)  # STEPS x LENGTH: MIXTURE
_MEANT = re.compile(r"\d(?:[^/@.,:]|,(?=\d))*:")  # begins a stage, as no source does, and yet may not be a _HEAD
_WEIGHT = re.compile(r"(.*[^@\s])\s*@\s*(\d+(?:\.\d*)?|\.\d+)", re.DOTALL)

Mixture = tuple[tuple[str, int], ...]  # sources and whole weights without a common factor


class Stage(NamedTuple):
    """Some steps in a row that read rows of one length from one mixture."""

    steps: int
    sequence_length: int
    mixture: Mixture

    def __str__(self) -> str:
        return f"{self.steps:,} steps of rows of {self.sequence_length:,} tokens from {spelled(self.mixture)}"


def spelled(mixture: Mixture) -> str:
    """A mixture as a config has it."""
    return ", ".join(f"{source}@{weight}" for source, weight in mixture) if len(mixture) > 1 else mixture[0][0]


def stages(config: "Config") -> list[Stage]:
    """The stages of a run in order; their steps add up to train.steps.

    Raises:
        ConfigError: `data` cannot be read as stages, or asks for what cannot be.
    """
    data, steps = config.data, config.train.steps
    if data.stages:
        if data.source != DEFAULT_SOURCE:
            works = "name it in a stage, or leave out one of the two (--config.data.stages= sets no stages)"
            raise ConfigError(f"data.source = {data.source!r}: is not read where data.stages is set; {works}")
        return _listed(data.stages, data.mode, steps, data.sequence_length)
    base = _shares(data.source, "data.source")
    if data.mode == "base_only":
        return [Stage(steps, data.sequence_length, _whole(base, "data.source"))]
    tuning = _shares(data.finetuning, "data.finetuning")
    if data.mode == "finetuning_only":
        return [Stage(steps, data.sequence_length, _whole(tuning, "data.finetuning"))]
    ratio = Fraction(data.ratio).limit_denominator(LONGEST_PERIOD)
    if data.mode == "interleaved":
        both = {source: share * (1 - ratio) for source, share in base.items()}
        for source, share in tuning.items():
            both[source] = both.get(source, Fraction()) + share * ratio
        return [Stage(steps, data.sequence_length, _whole(both, "data.ratio"))]
    later = min(max(round(ratio * steps), 1), steps - 1)
    if steps < 2:
        raise ConfigError(f"data.mode = 'hybrid': has two stages, and train.steps = {steps}; use at least 2")
    mixtures = _whole(base, "data.source"), _whole(tuning, "data.finetuning")
    return [Stage(n, data.sequence_length, each) for n, each in zip((steps - later, later), mixtures, strict=True)]


READS = {"base_only": {"data.source"}, "finetuning_only": {"data.finetuning"}}  # other modes read all of SOURCES
SOURCES = {"data.source", "data.finetuning", "data.ratio"}


def heed(data: "DataConfig", flags: set[str]) -> None:
    """Give flags the last word on what is read: what a config says otherwise of it is set aside, in place.

    `data.source` or `data.mode` sets aside stages, `data.stages` the source and the mode. With `checkpoint.init_from`,
    `data.source` by itself is all that is read, whatever mode the config has; elsewhere it is that mode's base.

    Raises:
        ConfigError: a flag would not be read.
    """
    given = flags & {*SOURCES, "data.mode"}
    if "data.stages" in flags and data.stages:
        if given:
            raise ConfigError(f"--config.{min(given)}: is not read beside --config.data.stages; leave out one of the two")
        data.mode, data.source = "base_only", DEFAULT_SOURCE
        return
    if flags & {"data.source", "data.mode"}:
        data.stages = ""
    if flags >= {"checkpoint.init_from", "data.source"} and given == {"data.source"}:
        data.mode = "base_only"
    read = set() if data.stages else READS.get(data.mode, SOURCES)
    if unread := sorted(given - read - {"data.mode"}):
        what = "data.stages is set" if data.stages else f"data.mode = {data.mode!r}"
        works = "set that to nothing" if data.stages else f"another mode does, or use {' and '.join(sorted(read))}"
        raise ConfigError(f"--config.{unread[0]}: is not read where {what}; {works}")


def sources(config: "Config") -> list[str]:
    """Every source of the stages once, in order of appearance."""
    return list(dict.fromkeys(source for stage in stages(config) for source, _ in stage.mixture))


def lengths(config: "Config") -> list[int]:
    """Every row length of the stages once, in order of appearance."""
    return list(dict.fromkeys(stage.sequence_length for stage in stages(config)))


def first_source(data: "DataConfig") -> str:
    """The source of a run that has but one, else the first of its first stage."""
    spec = data.finetuning if data.mode == "finetuning_only" else data.source
    if data.stages:
        first = data.stages.split(";")[0]
        head = _HEAD.fullmatch(first.strip())
        spec = head[3] if head and (head[1] or head[2]) else first
    return next(iter(_shares(spec, "data.source")))


def _listed(spec: str, mode: str, steps: int, longest: int) -> list[Stage]:
    named = f"data.stages = {spec!r}"
    if mode != "base_only":
        raise ConfigError(f"data.mode = {mode!r}: has stages of its own, and data.stages is set; use one of the two")
    found: list[Stage] = []
    parts = spec.rstrip("; ").split(";")
    for number, part in enumerate(parts, 1):
        head = _HEAD.fullmatch(part.strip())
        count, length, mixture = head.groups() if head and (head[1] or head[2]) else (None, None, part)
        if count is None and number < len(parts):
            works = "STEPS: MIXTURE, or STEPS x LENGTH: MIXTURE; only the last stage may leave out its steps"
            raise ConfigError(f"{named}: stage {number} does not say how many steps it has; write {works}")
        if count is None and length is None and (meant := _MEANT.match(part.strip())):
            works = "STEPS: MIXTURE, or STEPS x LENGTH: MIXTURE, such as 900 x 128: stdlib"
            raise ConfigError(f"{named}: stage {number} begins with {meant[0]!r}; write {works}")
        own = steps - sum(stage.steps for stage in found) if count is None else int(count)
        if own < 1:
            what = "no step is left for it" if count is None else "it has no step"
            raise ConfigError(
                f"{named}: stage {number}: {what}; train.steps = {steps}, and each stage takes at least 1 of them"
            )
        T = longest if length is None else int(length)
        if not 2 <= T <= longest:
            works = f"must be from 2 to data.sequence_length = {longest}, the longest"
            raise ConfigError(f"{named}: stage {number} has rows of {T} tokens, which {works}")
        where = f"{named}: stage {number}"
        found.append(Stage(own, T, _whole(_shares(mixture, where), where)))
    if (total := sum(stage.steps for stage in found)) != steps:
        raise ConfigError(f"{named}: its stages have {total} steps, and train.steps = {steps}; make them equal")
    return found


def _shares(spec: str, where: str) -> dict[str, Fraction]:
    """Sources and their shares, which add up to 1: `stdlib@3, notes/*.txt@1` has two, `a.txt, b.txt` one of two files."""
    parts = [part.strip() for part in spec.split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"{where} = {spec!r}: names no source; use such as stdlib, or stdlib@3,notes/*.txt@1")
    # A revision of a dataset is none: hf:NAME@REVISION@WEIGHT.
    weighted = [_WEIGHT.fullmatch(part) if part.count("@") > part.startswith("hf:") else None for part in parts]
    if not any(weighted):
        return {",".join(parts): Fraction(1)}
    found: dict[str, Fraction] = {}
    for part, match in zip(parts, weighted, strict=True):
        if match is None:
            works = f"write such as {part.split('@')[0]}@3, a number above 0"
            raise ConfigError(f"{where}: {part!r} has no weight, and others of its mixture do; {works}")
        source, weight = match[1].strip(), Fraction(match[2])
        if weight <= 0:
            raise ConfigError(f"{where}: {part!r} has weight 0; leave it out, or use a weight above 0")
        if source in found:
            raise ConfigError(f"{where}: names {source} twice in a mixture; name it once")
        found[source] = weight
    total = sum(found.values())
    return {source: weight / total for source, weight in found.items()}


def _whole(shares: dict[str, Fraction], where: str) -> Mixture:
    """The shares as the smallest whole weights."""
    period = math.lcm(*(share.denominator for share in shares.values()))
    if period > LONGEST_PERIOD:
        raise ConfigError(
            f"{where}: these weights repeat after {period:,} rows, above {LONGEST_PERIOD:,}; use rounder ones, such as 3 and 1"
        )
    return tuple((source, int(share * period)) for source, share in shares.items())
