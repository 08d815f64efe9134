"""A parser of command lines that refuses as the rest of the project does: in one line, with the nearest name."""

import argparse
import sys
from itertools import takewhile
from typing import Any, NoReturn

from lumina.errors import UsageError

FIELD = "--config."  # begins a flag that sets a field of the config: no parser lists those
MISSING = "the following arguments are required: "


class Parser(argparse.ArgumentParser):
    """As argparse's, without abbreviations, but it raises UsageError; `parser` of what it finds is the innermost command's."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **(settings | {"allow_abbrev": False}))
        self.set_defaults(parser=self)
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; for a flag that there is not before one that is missing, as it is likely the same one, misspelt."""
        if message.startswith(MISSING) and not self._subparsers:
            for word in takewhile(lambda word: word != "--", self._given):
                if word.startswith("--") and not word.startswith(FIELD) and _name(word) not in self._option_string_actions:
                    self.refuse(word)
        said = message.removeprefix("argument ").replace(MISSING, "missing: ")
        raise UsageError(f"{said}; see `{self.prog} --help`")

    def refuse(self, word: str) -> NoReturn:
        """Raise UsageError for an argument that there is not."""
        raise UsageError(f"{word}: unknown argument{self.near(word)}; see `{self.prog} --help`")

    def near(self, word: str) -> str:
        """A suggestion for a flag that there is not, or nothing."""
        from lumina.validation import nearest

        is_flag = word.startswith("-") and not word.startswith(FIELD)
        return nearest(_name(word), self._option_string_actions) if is_flag else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        from lumina.validation import nearest

        choices = [str(each) for each in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            said = f"{value}: no such command{nearest(value, choices)}"
        else:
            said = f"{action.option_strings[0]} {value}: must be one of {', '.join(choices)}{nearest(value, choices)}"
        raise UsageError(f"{said}; see `{self.prog} --help`")


def _name(flag: str) -> str:
    return flag.partition("=")[0]
