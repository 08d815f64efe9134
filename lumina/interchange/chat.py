"""One conversation format, as ids and as the Jinja template that other software renders: role token, text, turn end."""

from collections.abc import Iterable, Mapping

from lumina.errors import DataError
from lumina.tokenizer import CONTROL_TOKENS, Tokenizer

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
TURN_END = "<|turn_end|>"

# Rendered text cannot tell a control token from text that spells one, so that such text is refused; `chat_ids` takes it.
TEMPLATE = (
    "{%- set roles = {" + ", ".join(f"'{role}': '{token}'" for role, token in ROLES.items()) + "} -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in roles -%}"
    "{{- raise_exception('role ' ~ message['role'] ~ ': must be one of " + ", ".join(ROLES) + "') -}}"
    "{%- endif -%}"
    "{%- for token in [" + ", ".join(f"'{token}'" for token in CONTROL_TOKENS) + "] -%}"
    "{%- if token in message['content'] -%}"
    "{{- raise_exception('a message spells the control token ' ~ token ~ ', which it would become') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{{- roles[message['role']] ~ message['content'] ~ '" + TURN_END + "' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ROLES["assistant"] + "' -}}{%- endif -%}"
)


def chat_ids(tokenizer: Tokenizer, messages: Iterable[Mapping[str, str]], add_generation_prompt: bool = False) -> list[int]:
    """The ids of a conversation; no text in it becomes a control token. Raises DataError for an unknown role."""
    ids = []
    for message in messages:
        if message["role"] not in ROLES:
            raise DataError(f"role {message['role']!r}: must be one of {', '.join(ROLES)}")
        text = tokenizer.encode(message["content"])
        ids += [tokenizer.control[ROLES[message["role"]]], *text, tokenizer.control[TURN_END]]
    return ids + [tokenizer.control[ROLES["assistant"]]] * add_generation_prompt
