"""Conversations as token ids: the one renderer of training, evaluation, chat and export, its parser, and the loss of each role.

Headers and texts are encoded apart and joined as ids, and a control token ends each turn: no text makes a turn or a header.
N tokens.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lumina.errors import ConfigError, DataError
from lumina.tokenizer import CONTROL_TOKENS, Tokenizer

if TYPE_CHECKING:  # lumina.data renders, so that this module is loaded before it
    from lumina.data.records import Turn

# Whose words a token is, one code a token. NONE: headers and what lies between turns, which nobody learns.
NONE, SYSTEM, USER, ASSISTANT, TEXT = 0, 1, 2, 3, 4
CODES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
ROLES = tuple(CODES)
DEFAULT_LOSS_WEIGHTS = "assistant=1"

_CONTROL = re.compile(r"<\|[a-z_]+\|>")


class Template(NamedTuple):
    """What stands around the texts of a conversation."""

    headers: dict[str, tuple[str, ...]]  # by role: control tokens and text that open a turn
    end: str  # the control token that ends it, learned with its text
    lead: str = ""  # before a turn's text and encoded with it, where pre-tokenizers cut: other software has the same ids
    between: str = ""  # before the header of each turn but the first, and encoded with it
    after: str = ""  # after each turn's end

    @property
    def control(self) -> tuple[str, ...]:
        """The control tokens that a tokenizer must have."""
        pieces = [piece for header in self.headers.values() for piece in header if _CONTROL.fullmatch(piece)]
        return tuple(dict.fromkeys([*pieces, self.end]))

    @property
    def extra(self) -> tuple[str, ...]:
        """Those of them that not every tokenizer has: what to load or train one with."""
        return tuple(token for token in self.control if token not in CONTROL_TOKENS)

    @property
    def prompted(self) -> str:
        """The part of `lead` that is a token by itself and so belongs to a prompt: the model goes on after it."""
        return self.lead if self.lead.endswith("\n") else ""


TEMPLATES = {
    "lumina": Template({role: (f"<|{role}|>",) for role in ROLES}, "<|turn_end|>"),
    "chatml": Template({role: ("<|im_start|>", role) for role in ROLES}, "<|im_end|>", lead="\n", after="\n"),
    "instruct": Template(
        {"system": ("### System",), "user": ("### Instruction",), "assistant": ("### Response",)},
        "<|turn_end|>",
        lead=":\n",
        between="\n\n",
    ),
    "chat": Template({role: (f"{role.title()}:",) for role in ROLES}, "<|turn_end|>", lead=" ", between="\n"),
}


class Rendered(NamedTuple):
    """A conversation as ids."""

    ids: np.ndarray  # int32 [N]
    roles: np.ndarray  # uint8 [N]: NONE, or whose words each token is
    turns: np.ndarray  # int64 [turns]: where each begins


def named(template: str) -> Template:
    """The template of a name. Raises ConfigError for one that does not exist."""
    if template not in TEMPLATES:
        raise ConfigError(f"template {template!r}: there is none of that name; use {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def render(tokenizer: Tokenizer, turns: "Sequence[Turn]", template: str, add_generation_prompt: bool = False) -> Rendered:
    """The ids of `turns`, and after them the header of an answer if asked for. No text in it becomes a control token.

    The token that ends a turn is of its role; the header is of nobody's.

    Raises:
        ConfigError: there is no such template. DataError: an unknown role, or a template that this tokenizer cannot render.
    """
    form, frame = named(template), _frame(tokenizer, template)
    ids: list[int] = []
    roles: list[int] = []
    starts = []
    for role, text in turns:
        if role not in CODES:
            raise DataError(f"role {role!r}: must be one of {', '.join(ROLES)}")
        starts.append(len(ids))
        ids += frame.headers(not ids)[role]
        said = tokenizer.encode(form.lead + text)
        own = len(said) + 1 - (len(frame.prompted) if said[: len(frame.prompted)] == frame.prompted else 0)
        ids += [*said, frame.end]
        roles += [NONE] * (len(ids) - own - len(roles)) + [CODES[role]] * own
        ids += frame.after
        roles += [NONE] * len(frame.after)
    if add_generation_prompt:
        ids += [*frame.headers(not ids)["assistant"], *frame.prompted]
        roles += [NONE] * (len(ids) - len(roles))
    return Rendered(np.array(ids, np.int32), np.array(roles, np.uint8), np.array(starts, np.int64))


def parse(tokenizer: Tokenizer, ids: Iterable[int], template: str) -> "list[Turn]":
    """The turns that `ids` say, up to a document end: what `render` was given, as far as the tokenizer loses nothing.

    A last turn that has not ended is one too, with the text so far: what a model is writing.

    Raises:
        DataError: no header begins a turn, or a control token is inside of one; and as in `render`.
    """
    from lumina.data.records import Turn

    form, frame = named(template), _frame(tokenizer, template)
    control, stop = set(tokenizer.control.values()), tokenizer.control[CONTROL_TOKENS[0]]
    turns: list[Turn] = []
    for part in _turns([int(i) for i in itertools.takewhile(lambda i: i != stop, ids)], frame):
        heads = frame.headers(not turns)
        role = next((role for role, head in heads.items() if part[: len(head)] == head), "")
        if not role:
            raise DataError(f"no turn of the template {template} begins with {tokenizer.decode(part[:8])!r}")
        said = part[len(heads[role]) :]
        if inside := control.intersection(said):
            raise DataError(f"a turn of the template {template} has {tokenizer.decode([min(inside)])} in its text")
        turns.append(Turn(role, tokenizer.decode(said).removeprefix(form.lead)))
    return turns


def _turns(ids: list[int], frame: "_Frame") -> Iterator[list[int]]:
    """The ids of each turn, without what ends it."""
    at = 0
    for end in [*(place for place, i in enumerate(ids) if i == frame.end), len(ids)]:
        if at and ids[at : at + len(frame.after)] == frame.after:
            at += len(frame.after)
        if at < len(ids):
            yield ids[at:end]
        at = end + 1


class _Frame(NamedTuple):
    """A template as ids of a tokenizer."""

    first: dict[str, list[int]]  # header of the first turn, by role
    later: dict[str, list[int]]  # of those after it
    prompted: list[int]
    end: int
    after: list[int]

    def headers(self, first: bool) -> dict[str, list[int]]:
        return self.first if first else self.later


_FRAMES: dict[tuple[str, str], _Frame] = {}  # by the tokenizer's fingerprint, which decides its ids, and the template


def _frame(tokenizer: Tokenizer, template: str) -> _Frame:
    key = (tokenizer.fingerprint, template)
    if key not in _FRAMES:
        _FRAMES[key] = _framed(tokenizer, template)
    return _FRAMES[key]


def _framed(tokenizer: Tokenizer, template: str) -> _Frame:
    form = named(template)
    if missing := [token for token in form.control if token not in tokenizer.control]:
        fitting = ", ".join(name for name, each in TEMPLATES.items() if set(each.control) <= set(tokenizer.control))
        raise DataError(
            f"template {template!r}: needs {' and '.join(missing)}, which the tokenizer {tokenizer.name} lacks; use {fitting}, "
            "or train or load a tokenizer for this template"
        )

    def header(role: str, between: str) -> list[int]:
        ids: list[int] = []
        for piece in form.headers[role]:
            ids += [tokenizer.control[piece]] if piece in tokenizer.control else tokenizer.encode(between + piece)
            between = ""
        return ids

    first, later = ({role: header(role, between) for role in ROLES} for between in ("", form.between))
    for heads in (first, later):
        for role, head in heads.items():
            alike = [other for other in ROLES if other != role and heads[other][: len(head)] == head]
            if alike:
                raise DataError(
                    f"template {template!r}: the tokenizer {tokenizer.name} cannot tell {role} from {alike[0]} in it"
                )
    after = tokenizer.encode(form.after) if form.after else []
    prompted = tokenizer.encode(form.prompted) if form.prompted else []
    return _Frame(first, later, prompted, tokenizer.control[form.end], after)


def loss_weights(spec: str) -> np.ndarray:
    """float32 [5]: the weight of a target by its code, from such as "assistant=1.5,user=1".

    A role that is not named has none; NONE has none; TEXT, a document that is no conversation, has 1.

    Raises:
        ConfigError: an unknown or repeated role, a weight below 0 or not finite, or none above 0.
    """
    weights = np.zeros(5, np.float32)
    weights[TEXT] = 1
    seen = set()
    for part in filter(None, (part.strip() for part in spec.split(","))):
        role, _, number = (piece.strip() for piece in part.partition("="))
        if role not in CODES or role in seen:
            what = "is named twice" if role in seen else f"is no role; there are {', '.join(ROLES)}"
            raise ConfigError(f"loss_weights = {spec!r}: {role!r} {what}")
        seen.add(role)
        weights[CODES[role]] = _weight(spec, role, number)
    if not weights[list(CODES.values())].any():
        raise ConfigError(f"loss_weights = {spec!r}: nothing is learned; give a role a weight above 0, as in assistant=1")
    return weights


def _weight(spec: str, role: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= float(np.finfo(np.float32).max):
        raise ConfigError(f"loss_weights = {spec!r}: {role} has {number!r}; must be a number of at least 0, as in {role}=1.5")
    return weight


def jinja(template: str, control: Iterable[str] = CONTROL_TOKENS) -> str:
    """The template in Jinja, for software that renders a text of at least one message and then encodes it.

    A rendered text cannot tell a control token from text that spells one: such a text is refused there, and not in `render`.

    Args:
        control: the tokenizer's control tokens.
    """
    form = named(template)
    heads = ", ".join(f"{_quoted(role)}: {_quoted(''.join(form.headers[role]))}" for role in ROLES)
    between = _quoted(form.between) + " ~ " if form.between else ""
    before = f"('' if loop.first else {_quoted(form.between)}) ~ " if form.between else ""
    lead, end, prompted = (f" ~ {_quoted(text)}" if text else "" for text in (form.lead, form.end + form.after, form.prompted))
    return (
        f"{{%- set roles = {{{heads}}} -%}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] not in roles -%}"
        "{{- raise_exception('role ' ~ message['role'] ~ ': must be one of " + ", ".join(ROLES) + "') -}}"
        "{%- endif -%}"
        "{%- for token in [" + ", ".join(map(_quoted, control)) + "] -%}"
        "{%- if token in message['content'] -%}"
        "{{- raise_exception('a message spells the control token ' ~ token ~ ', which it would become') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{{- " + before + "roles[message['role']]" + lead + " ~ message['content']" + end + " -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- " + between + "roles['assistant']" + prompted + " -}}{%- endif -%}"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("\n", "\\n") + "'"
