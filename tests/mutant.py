"""What the lists of `make mutants` are made of."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A mistake, where it goes, and what must notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str  # a file, or a test in it, below tests/ or in parity_tests/
