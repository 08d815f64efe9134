"""Time the forms of the grouped feed-forward, forward and backward, and print one JSON object.

    python benchmarks/grouped.py --rounds 15

Each shape has experts with capacity (factor 1.25), the form that this platform chooses (see --form), and as the yardstick a
dense feed-forward that does the same work. They take turns in one process, so that a machine whose speed drifts slows all
alike; ratios are medians over the rounds. Loads: "balanced" is random; in "skewed" expert e is chosen in proportion to
1 / (e + 1); in "one" the first choice of every token is one expert and its others are none; in "none" all are none.
"""

import argparse
import json
import math
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lumina.errors import UsageError, exit_with
from lumina_jax.context import Row
from lumina_jax.feedforward import ACTIVATIONS
from lumina_jax.grouped import FORMS, choose_grouped, grouped_feedforward
from lumina_jax.moe import experts_capacity

ACTIVATION, ROW = "swiglu", 512  # tokens of a row, within which capacity is counted

# (N tokens, k choices, E experts, D model width, F feed-forward width)
SHAPES = {
    "2048x2_of_8": (2048, 2, 8, 256, 512),
    "2048x1_of_8_narrow": (2048, 1, 8, 128, 608),
    "4096x1_of_8_wide": (4096, 1, 8, 512, 1024),
    "4096x4_of_64_fine": (4096, 4, 64, 256, 128),
}


def loads(N, k, E):
    """Experts [N, k] by the name of the load."""
    rng = np.random.default_rng(0)
    popularity_E = np.log(1 / np.arange(1, E + 1))
    ranked = {
        name: np.argsort(-(p + rng.gumbel(size=(N, E))), axis=1)[:, :k]
        for name, p in (("balanced", 0), ("skewed", popularity_E))
    }
    one_Nk = np.where(np.arange(k) == 0, 0, np.full((N, k), -1))
    return {**ranked, "one": one_Nk, "none": np.full((N, k), -1)}


def with_gradients(feedforward):
    """The compiled gradients of a scalar of the output."""
    return jax.jit(jax.grad(lambda x, weights, experts: jnp.sum(jnp.sin(feedforward(x, weights, experts))), argnums=(0, 1)))


def contenders(shape, forms, dtype):
    """name -> (compiled function, its arguments)."""
    N, k, E, D, F = shape
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / math.sqrt(shape[-2]), dtype)

    x_ND, gates_Nk = normal(N, D), jnp.full((N, k), 1 / k, dtype)
    weights = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    experts = {name: jnp.asarray(chosen, jnp.int32) for name, chosen in loads(N, k, E).items()}
    capacity, rows = math.ceil(1.25 * ROW * k / E), (N // ROW, ROW, -1)

    def with_capacity(x_ND, weights, experts_Nk):
        grouped = (a.reshape(rows) for a in (x_ND, experts_Nk, gates_Nk))
        return experts_capacity(*grouped, weights, ACTIVATION, capacity, Row(ROW, 1))[0]

    def dense(x_ND, weights, experts_Nk):
        return (ACTIVATIONS[ACTIVATION](x_ND @ weights[0]) * (x_ND @ weights[1])) @ weights[2]

    made = {
        "dense": (with_gradients(dense), (x_ND, (normal(D, k * F), normal(D, k * F), normal(k * F, D)), None)),
        "capacity": (with_gradients(with_capacity), (x_ND, weights, experts["balanced"])),
    }
    for form in forms:

        def grouped(x_ND, weights, experts_Nk, form=form):
            return jnp.einsum("nkd,nk->nd", grouped_feedforward(x_ND, experts_Nk, weights, ACTIVATION, form), gates_Nk)

        compiled = with_gradients(grouped)
        made |= {f"{form}_{load}": (compiled, (x_ND, weights, chosen)) for load, chosen in experts.items()}
    return made


def measure(shape, forms, dtype, rounds: int) -> dict[str, object]:
    """Milliseconds of each, and ratios to capacity and to dense work within each round."""
    made = contenders(shape, forms, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(-2, rounds):  # two rounds to compile and warm up
        for name, (function, arguments) in made.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)

    def ratios(to: str) -> dict[str, float]:
        pairs = {name: zip(times, seconds[to], strict=True) for name, times in seconds.items() if name != to}
        return {name: round(statistics.median(a / b for a, b in times), 3) for name, times in pairs.items()}

    return {
        "shape_NkEDF": shape,
        "milliseconds": {name: round(1e3 * statistics.median(times), 2) for name, times in seconds.items()},
        "milliseconds_fastest": {name: round(1e3 * min(times), 2) for name, times in seconds.items()},
        "times_capacity": ratios("capacity"),
        "times_dense": ratios("dense"),
    }


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--form", action="append", choices=sorted(FORMS), help="time this form (default: the platform's)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of all floats (default: float32)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are timed (default: 15)")
    known = parser.parse_args()
    if known.rounds < 1:
        raise UsageError(f"--rounds = {known.rounds}: must be at least 1")
    platform = jax.default_backend()
    forms = known.form or [choose_grouped("auto", platform)[0]]
    figures = {name: measure(shape, forms, known.dtype, known.rounds) for name, shape in SHAPES.items()}
    print(json.dumps({"platform": platform, "jax": jax.__version__, "dtype": known.dtype, "shapes": figures}, indent=2))


if __name__ == "__main__":
    exit_with(main)
