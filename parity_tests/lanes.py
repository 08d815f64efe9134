"""What must hold between JAX and PyTorch, and one device and several: python -m parity_tests.lanes [--out docs/parity.md]

Tests hold their figures to a lane with `record`. Run as a program this runs all of them, and writes the largest figure of each
case beside the bound.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

TESTS = ("parity_tests", "tests/lumina_torch/test_zero.py", "tests/lumina_jax/test_sharding.py")
RECORD = "LUMINA_PARITY_RECORD"  # a file to which each figure is added as a line of JSON


class Lane(NamedTuple):
    """A bound, and what is bounded. Differences are relative to the tensor's largest value, unless it says otherwise."""

    bound: float | None  # None: told, not bounded
    what: str


LANES = {
    "float32": Lane(5e-6, "logits, loss, every metric and the gradient of every tensor, in one training step"),
    "float64": Lane(1e-12, "the same in float64"),
    "trajectory, replayed": Lane(1e-5, "parameters after 200 steps, relative L2, PyTorch taking JAX's routing decisions"),
    "flips": Lane(
        1e-5, "how far from a tie any decision was that PyTorch alone would have made otherwise; 0 where there was none"
    ),
    "trajectory, float64": Lane(1e-12, "parameters after those 200 steps in float64"),
    "flips, float64": Lane(1e-12, "how far from a tie any decision was that differed there: equal tokens do tie"),
    "trajectory": Lane(None, "parameters after 200 steps, relative L2, each framework deciding for itself"),
    "decisions that differed": Lane(None, "share of those decisions: one flip leads to others"),
    "first flip": Lane(1e-5, "how far from a tie the first of them was"),
    "bf16, KL": Lane(1e-3, "KL divergence of the mean token, in nats, between the two in bfloat16"),
    "bf16, cosine": Lane(1e-3, "1 - cosine of the logits in bfloat16"),
    "generation": Lane(0, "greedy tokens that differ, with a key/value cache and causal routing"),
    "interchange": Lane(0, "bits that differ in weights, moments and biases: JAX to PyTorch to JAX"),
    "resume": Lane(1e-5, "parameters after K steps in one and K in the other against 2K in one, relative L2"),
    "sharded": Lane(5e-6, "JAX on several devices against one: the gradient of every tensor and the losses of one step"),
    "sharded, float64": Lane(1e-11, "the same in float64: parameters, moments and biases after two steps, and losses"),
    "ZeRO": Lane(1e-5, "parameters of two processes under ZeRO against one process, relative L2"),
}


def record(lane: str, case: str, figure: float) -> None:
    """Hold a figure to its lane, and write it down where the table is being made."""
    if path := os.environ.get(RECORD):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"lane": lane, "case": case, "figure": figure}) + "\n")
    bound = LANES[lane].bound
    assert bound is None or figure <= bound, f"{lane}, {case}: {figure:.3g} is beyond {bound:g} ({LANES[lane].what})"


def table(figures: list[dict]) -> str:
    """docs/parity.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
    lines = [
        "# Parity: the largest difference seen between JAX and PyTorch",
        "",
        "Made by `make parity`, which runs `parity_tests/`; not written by hand. Both frameworks compute from the same weights",
        "and batches on a CPU. Differences are relative to the tensor's largest value, unless the lane says otherwise.",
        "",
        f"Python {platform.python_version()}, {versions}, {platform.machine()}.",
    ]
    for lane, (bound, what) in LANES.items():
        largest: dict[str, float] = {}
        for each in figures:
            if each["lane"] == lane:
                largest[each["case"]] = max(each["figure"], largest.get(each["case"], 0.0))
        if largest:
            limit = "no bound" if bound is None else f"bound {bound:g}"
            lines += ["", f"## {lane}: {limit}", "", f"{what[0].upper()}{what[1:]}.", "", "| case | largest |", "|---|---|"]
            lines += [f"| {case} | {figure:.2g} |" for case, figure in largest.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the parity tests and write the table."""
    parser = argparse.ArgumentParser(description="run parity_tests/ and write the table of what was seen")
    parser.add_argument("--out", type=Path, default=Path("docs/parity.md"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "figures.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *TESTS]
        done = subprocess.run(command, env=os.environ | {RECORD: str(path)}, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        figures = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if silent := LANES.keys() - {each["lane"] for each in figures}:
        sys.exit(f"no figure for {', '.join(sorted(silent))}: nothing was shown there")
    out.write_text(table(sorted(figures, key=lambda each: each["case"])), encoding="utf-8")
    print(f"{len(figures)} figures in {out}")


if __name__ == "__main__":
    main()
