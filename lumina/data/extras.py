"""Libraries that only some sources and steps need."""

import importlib
from types import ModuleType

from lumina.errors import UsageError


def need(module: str, what: str, extra: str = "data") -> ModuleType:
    """The module; raises UsageError, naming `what` it is for and what installs it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{what} needs {error.name or module}, which is not installed: pip install 'lumina[{extra}]'"
        ) from error
