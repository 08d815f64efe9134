"""The `lumina` command. Each subcommand imports what it needs when it runs, so that --help answers at once."""

import argparse
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from lumina.arguments import FIELD, Parser
from lumina.errors import NOT_CAUSAL, UsageError, exit_with


def main() -> None:
    """Entry point of `lumina`."""
    exit_with(lambda: run(sys.argv[1:]))


def run(arguments: list[str]) -> None:
    """Parse and run one subcommand."""
    parser = Parser(
        prog="lumina",
        description="Sparse language models: train with `python -m lumina_jax.train`, and everything else here.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    params = commands.add_parser("params", help="parameters, FLOPs and memory of configs, side by side")
    params.add_argument(
        "configs", nargs="+", metavar="CONFIG", help="preset, auto, .py, .json or .yaml file, or run directory; NAME:VARIANT"
    )
    params.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    params.set_defaults(run=_params)

    explained = commands.add_parser("explain", help="layers, tensors and their shards, kernels, the batch's path, collectives")
    explained.set_defaults(run=_explain)
    if arguments[:1] == ["explain"]:
        from lumina import explain

        explain.add(explained)

    planned = commands.add_parser("plan", help="whether a config fits devices that are not at hand, and how fast it could be")
    planned.set_defaults(run=_plan)
    if arguments[:1] == ["plan"]:
        from lumina import planning

        planning.add(planned)

    sample = commands.add_parser("sample", help="continue a prompt with a trained run")
    sample.add_argument(
        "run_directory", metavar="RUN", type=Path, help="a run directory, or a canonical one of `lumina export`"
    )
    sample.add_argument("--prompt", default="", help="text to continue; without one a new document begins")
    sample.add_argument("--max-tokens", type=int, help="new tokens (default: 200, or what fits)")
    sample.add_argument("--samples", type=int, default=1, help="continuations, with seeds one after another")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    sample.add_argument("--top-k", type=int, default=0, help="keep the k most likely tokens (default: all)")
    sample.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    sample.add_argument("--min-p", type=float, default=0.0, help="keep tokens at least this share as likely as the likeliest")
    sample.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes tokens in the context less likely")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    sample.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss, not the newest")
    sample.add_argument("--backend", choices=("jax", "torch"), help="what computes (default: what trained the run, else jax)")
    sample.add_argument("--json", action="store_true", help="one JSON object a sample: prompt, text, seed")
    sample.set_defaults(run=_sample)

    certified = commands.add_parser("certify", help="measure that a trained run never sees the future")
    certified.add_argument("run_name", metavar="RUN", help="a run directory, or its name in runs/")
    certified.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out loss, not the newest")
    certified.add_argument("--rows", type=int, default=64, metavar="N", help="of held-out text; 0 takes all (default: 64)")
    certified.add_argument("--json", action="store_true", help="the certificate as one JSON object instead of a table")
    certified.set_defaults(run=_certify)

    supervised = commands.add_parser(
        "run",
        usage="lumina run [--max-restarts N] [--log FILE] -- COMMAND ARG...",
        description="Run a command, and again when it crashes or has stopped and saved (exit 75): not when it is done, refuses "
        "its arguments, config, data or checkpoint (exit 2 to 5), asks for no restart (93), or was asked to stop: SIGINT and "
        "SIGTERM are passed on to it, SIGHUP and SIGUSR1 as SIGTERM. Exits as the last run did.",
        help="run a command, and again when it crashes",
    )
    supervised.add_argument(
        "--max-restarts", type=int, default=20, metavar="N", help="in a row; ten minutes of running end a row (default: 20)"
    )
    supervised.add_argument("--log", type=Path, metavar="FILE", help="append a JSON line at each end of the command")
    supervised.set_defaults(run=_run)

    exported = commands.add_parser("export", help="a run in a format that other software loads, verified")
    imported = commands.add_parser("import", help="a Llama, Mixtral or Qwen3-MoE model to go on from")
    if arguments[:1] in (["export"], ["import"]):
        from lumina.interchange import commands as interchange

        interchange.add_export(exported)
        interchange.add_import(imported)

    compared = commands.add_parser(
        "compare",
        description="How far two models are apart on the same tokens. Exits 0 whatever it finds; --json has `equal`.",
        help="two models on the same text, each in JAX, PyTorch or transformers",
    )
    compared.set_defaults(run=_compare)
    if arguments[:1] == ["compare"]:
        from lumina.interchange import comparing

        comparing.add(compared)

    runs = commands.add_parser("runs", help="list, show, verify, compare and prune runs")
    if arguments[:1] == ["runs"]:
        from lumina.runs.commands import add, spelled

        arguments = spelled(arguments, add(runs))

    routing = commands.add_parser("routing", help="a page on what the routers of a run do, with advice")
    routing.set_defaults(run=_routing)
    if arguments[:1] == ["routing"]:
        from lumina.runs import routing_page

        routing_page.add(routing)

    data = commands.add_parser("data", help="prepare, show, check and report on data; train tokenizers")
    if arguments[:1] == ["data"]:
        from lumina.data.commands import add as add_data

        add_data(data, arguments[1:])

    command = None
    if arguments[:1] == ["run"] and "--" in arguments:  # the command's own arguments are not for this parser to see
        split = arguments.index("--")
        arguments, command = arguments[:split], arguments[split + 1 :]
    known, rest = parser.parse_known_args(arguments)
    known.supervised = command
    if known.command == "run" and not command:
        raise UsageError("no command; give one after --, as in `lumina run -- python -m lumina_jax.train --config b7`")
    overrides = [flag for flag in rest if flag.startswith(FIELD)]
    if (unknown := [flag for flag in rest if flag not in overrides]) or (
        overrides and known.command not in ("params", "explain", "plan")
    ):
        known.parser.refuse((unknown or overrides)[0])
    known.overrides = overrides
    known.run(known)


def _params(arguments: argparse.Namespace) -> None:
    from lumina.architecture import counts
    from lumina.config import load, override
    from lumina.footprint import footprint
    from lumina.runs.units import gib, si

    found: dict[str, dict[str, Any]] = {}
    for spec in arguments.configs:
        config = override(load(spec), arguments.overrides)
        name, _, variant = spec.partition(":")
        found[":".join(filter(None, [Path(name).stem, variant]))] = {
            "sequence_length": config.data.sequence_length,
            "rows": config.train.batch_size // config.train.micro_batches,
            **counts(config)._asdict(),
            **{f"{part}_bytes": value for part, value in footprint(config)._asdict().items()},
            "memory_bytes": footprint(config).total,
        }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    header = [
        "config",
        "mean active",
        "most active",
        "total",
        "FLOPs/token",
        "training",
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "temporaries",
        "memory",
        "of rows x T",
    ]
    lines = [header]
    for name, row in found.items():
        numbers = [si(row[key]) for key in ("mean_active", "most_active", "total", "forward_flops", "training_flops")]
        sizes = [gib(row[f"{part}_bytes"]) for part in footprint(config)._fields]
        lines.append([name, *numbers, *sizes, gib(row["memory_bytes"]), f"{row['rows']} x {row['sequence_length']}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def _explain(arguments: argparse.Namespace) -> None:
    from lumina.explain import tell

    def kernels(config: Any, platform: str) -> Any:
        from lumina_jax.device import forms

        return forms(config, platform)

    tell(arguments, kernels)


def _plan(arguments: argparse.Namespace) -> None:
    from lumina.planning import tell

    tell(arguments)


def _sample(arguments: argparse.Namespace) -> None:
    if not (arguments.run_directory / "config.json").is_file():
        raise UsageError(f"{arguments.run_directory}: not a run directory, it has no config.json")
    for flag, value in (("--samples", arguments.samples), ("--max-tokens", arguments.max_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} = {value}: must be at least 1")
    from lumina.generation import Sampling
    from lumina.interchange.state import backend_of
    from lumina.runs.console import printable

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    settings = {name: getattr(arguments, name) for name in names}
    Sampling(**settings)  # refuse bad values before the model is loaded
    backend = _backend(arguments.backend or backend_of(arguments.run_directory), "generate")
    generator = backend.load_generator(arguments.run_directory, best=arguments.best)
    length = arguments.max_tokens
    if length is None:
        length = min(200, generator.room(arguments.prompt))
    for seed in range(arguments.seed, arguments.seed + arguments.samples):
        pieces = generator.text(arguments.prompt, length, Sampling(**settings, seed=seed), arguments.stop)
        if arguments.json:
            print(json.dumps({"prompt": arguments.prompt, "text": "".join(pieces), "seed": seed}))
            continue
        print(arguments.prompt, end="", flush=True)
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print("\n" + "-" * 72 if seed + 1 < arguments.seed + arguments.samples else "")


def _compare(arguments: argparse.Namespace) -> None:
    from lumina.interchange.comparing import tell

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would leave PyTorch none of a GPU's memory
    tell(arguments, lambda backend, name, path: _backend(backend, "side").open_side(name, path))


def _backend(name: str, module: str) -> Any:
    """A module of lumina_jax or of lumina_torch; raises UsageError where the framework is not installed."""
    if not importlib.util.find_spec(name):
        raise UsageError(f"{name} is not installed: pip install 'lumina[torch]', or choose jax")
    return importlib.import_module(f"lumina_{name}.{module}")


def _routing(arguments: argparse.Namespace) -> None:
    from lumina.runs.routing_page import tell

    def look(*about: Any) -> Any:
        from lumina_jax.routing import look

        return look(*about)

    tell(arguments, look)


def _certify(arguments: argparse.Namespace) -> None:
    from lumina.runs import certificate
    from lumina.runs.console import Console
    from lumina.runs.library import find

    run = find(arguments.run_name)
    if arguments.rows < 0 or arguments.rows == 1:
        raise UsageError(f"--rows = {arguments.rows}: must be at least 2, or 0 for all held-out text")
    from lumina_jax.certify import certify

    found = certify(str(run.path), arguments.rows, arguments.best, Console(0))
    certificate.write(run.path, found)
    text, encoding = (
        certificate.as_json(found) if arguments.json else certificate.terminal(found),
        sys.stdout.encoding or "utf-8",
    )
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.exit(0 if found["causal"] else NOT_CAUSAL)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.max_restarts < 0:
        raise UsageError(f"--max-restarts = {arguments.max_restarts}: must be at least 0")
    from lumina.runs.supervisor import supervise

    sys.exit(supervise(arguments.supervised, arguments.max_restarts, arguments.log))


if __name__ == "__main__":
    main()
