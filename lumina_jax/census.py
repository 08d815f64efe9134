"""What a traced program does, counted with the trip counts of its loops: products, kernels, and what devices send each other.

XLA's own count of a compiled program takes the body of a loop once, and a kernel as nothing.
"""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax.extend.core

KINDS = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "pmax": "all_reduce",
    "pmin": "all_reduce",
    "all_to_all": "all_to_all",
    "ppermute": "permute",
}
LARGE = 2**16  # bytes of an array that belongs among the arguments of a program


class Census(NamedTuple):
    """Of one device, in one run of the program."""

    flops: int  # of matrix products, two each multiplication and addition
    kernels: dict[str, int]  # calls of Pallas kernels, whose products are not counted
    collectives: dict[tuple[str, tuple[str, ...]], tuple[int, int]]  # (kind, axes) -> (bytes it sends, operations)
    constants: int  # bytes of large arrays that are embedded
    equations: int  # size of the program: a loop's body counts once


def census(jaxpr: Any) -> Census:
    """Count a closed jaxpr. Shapes within `shard_map` are one device's; a `while` loop of unknown length counts once."""
    flops = 0
    kernels: Counter[str] = Counter()
    sent: Counter[tuple[str, tuple[str, ...]]] = Counter()
    operations: Counter[tuple[str, tuple[str, ...]]] = Counter()
    constants = equations = 0
    todo = [(jaxpr, 1, dict[str, int]())]
    while todo:
        program, times, sizes = todo.pop()
        for constant in getattr(program, "consts", ()):
            size = getattr(constant, "nbytes", 0)
            constants += size if size >= LARGE else 0
        for equation in getattr(program, "jaxpr", program).eqns:
            equations += 1
            name = equation.primitive.name
            if name == "pallas_call":
                kernels[str(equation.params.get("name") or "pallas")] += times
                continue
            if name in ("dot_general", "ragged_dot_general", "ragged_dot"):
                flops += times * _products(equation)
            elif name in KINDS:
                key, size = _collective(equation, sizes)
                sent[key] += times * size
                operations[key] += times
            inner = dict(equation.params["mesh"].shape) if name == "shard_map" else sizes
            more = times * (equation.params["length"] if name == "scan" else 1)
            todo += [(part, more, inner) for part in _inside(equation)]
    collectives = {key: (sent[key], operations[key]) for key in sorted(sent) if sent[key]}
    return Census(flops, dict(kernels), collectives, constants, equations)


def _inside(equation: Any) -> list[Any]:
    """The programs that an equation runs; of alternatives the longest."""
    if equation.primitive.name == "cond":
        return [max(equation.params["branches"], key=lambda branch: len(branch.jaxpr.eqns))]
    kinds = (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)
    return [value for value in equation.params.values() if isinstance(value, kinds)]


def _products(equation: Any) -> int:
    left, right = (variable.aval for variable in equation.invars[:2])
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[d] for d in contracted)
    # Each row goes through one group: [rows, a] with [groups, a, b], or [rows, a] with [rows, b].
    out = equation.outvars[0].aval.shape
    if len(out) == 3:
        return 2 * left.shape[0] * left.shape[1] * right.shape[1]
    return 2 * math.prod(out) * left.shape[1]


def _collective(equation: Any, sizes: dict[str, int]) -> tuple[tuple[str, tuple[str, ...]], int]:
    """((kind, axes), bytes that one device sends), by the algorithms that send least."""
    name, params = equation.primitive.name, equation.params
    given = params.get("axes", params.get("axis_name"))
    axes = tuple(given) if isinstance(given, tuple | list) else (given,)
    devices = math.prod(sizes.get(axis, 1) for axis in axes)
    kind = KINDS[name]
    arrays = equation.outvars if kind == "all_gather" else equation.invars
    size = sum(variable.aval.size * variable.aval.dtype.itemsize for variable in arrays)
    if devices == 1:
        return (kind, axes), 0
    if kind == "permute":
        return (kind, axes), size
    return (kind, axes), (2 if kind == "all_reduce" else 1) * size * (devices - 1) // devices
