"""Errors that a user can act on, each with the exit code that a script can branch on."""

import sys
from collections.abc import Callable

NOT_CAUSAL = 6  # of `lumina certify`: no crash, but an answer
STOPPED_AND_SAVED = 75
DO_NOT_RETRY = 93
INTERRUPTED = 130
OUTPUT_CLOSED = 141  # as a shell tells of SIGPIPE


class LuminaError(Exception):
    """A refusal: one line that names the thing, the value it had, and what would work."""

    exit_code = 1


class UsageError(LuminaError):
    """The command line is wrong, or a path on it cannot be used."""

    exit_code = 2


class ConfigError(LuminaError):
    """The config asks for something impossible."""

    exit_code = 3


class DataError(LuminaError):
    """The text, the tokenizer file or the token shards cannot be used."""

    exit_code = 4


class CheckpointError(LuminaError):
    """A checkpoint is missing, damaged, does not fit the model or could not be written."""

    exit_code = 5


class DoNotRetryError(LuminaError):
    """Training cannot go on by itself: the same command would end the same way."""

    exit_code = DO_NOT_RETRY


def exit_with(main: Callable[[], None]) -> None:
    """Run `main` and leave the process with the exit code of what happened; user errors print one line."""
    try:
        main()
    except LuminaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        print("; ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # `lumina params ... | head`: nobody reads on, but the work is not done either
        sys.stderr.close()
        sys.exit(OUTPUT_CLOSED)
