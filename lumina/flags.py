"""The command line that both trainers share: --config, --workdir, and a flag for any field of the config."""

from pathlib import Path

from lumina.arguments import Parser
from lumina.config import Config, load, override
from lumina.runs.directory import ACCEPT


def parse(program: str, arguments: list[str]) -> tuple[Config, Path, bool]:
    """The validated config, the run directory (default: runs/ and the config's name), and whether changes are accepted.

    Raises:
        UsageError: an argument is unknown, or the config file does not exist.
        ConfigError: a field is unknown, of the wrong type, or impossible.
    """
    parser = Parser(
        prog=f"python -m {program}",
        description="Train a model; the same command resumes.",
        epilog="Any field of the config is a flag: --config.train.steps=100 --config.model.moe.top_k=2",
    )
    parser.add_argument(
        "--config", required=True, help="preset, auto, .py, .json or .yaml file, or run directory; NAME:VARIANT"
    )
    parser.add_argument("--workdir", type=Path, help="run directory (default: runs/NAME)")
    parser.add_argument(
        ACCEPT, action="store_true", help="go on with a run although its config or data changed, from its newest checkpoint"
    )
    known, rest = parser.parse_known_args(arguments)
    for word in filter(parser.near, rest):
        parser.refuse(word)
    config = override(load(known.config), _joined(rest))
    name, _, variant = known.config.partition(":")
    workdir = known.workdir or Path("runs") / "-".join(filter(None, [Path(name).stem, variant]))
    return config, workdir, known.accept_changes


def _joined(flags: list[str]) -> list[str]:
    """`--config.a 1` as `--config.a=1`."""
    joined: list[str] = []
    for flag in flags:
        if joined and "=" not in joined[-1] and not flag.startswith("--"):
            joined[-1] += "=" + flag
        else:
            joined.append(flag)
    return joined
