"""`--config auto`: the largest preset that this machine's memory trains."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lumina.architecture import counts
from lumina.config import Config, load, presets, validate
from lumina.errors import ConfigError, DataError
from lumina.footprint import footprint
from lumina.runs.units import gib, si

SHARE = 0.8  # of the free memory; the rest is for the compiler, the data and other programs
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def free_memory() -> tuple[int, str]:
    """Bytes that a training step may use, and where: the first NVIDIA GPU's if there is one, else the machine's."""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)  # noqa: S603, a fixed command
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"auto: {smi} did not answer within 30 s; name a preset instead") from error
        if answer.returncode == 0 and answer.stdout.strip():
            return int(answer.stdout.split()[0]) << 20, "on the GPU"
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except OSError:  # not Linux: what is free is not told portably, so count on all of it
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text(encoding="ascii").strip()).isdigit():
        free = min(free, int(limit))
    return free, "in this machine's memory"


def choose(free: int | None = None) -> Config:
    """The preset with the most parameters whose training step fits, with as few micro-batches as fit; says why on stderr.

    A preset whose tokenizer is not at hand is passed over.

    Raises:
        ConfigError: not even the smallest fits.
    """
    from lumina.tokenizer_files import NAMED_ENCODINGS, load_tokenizer

    free, where = (free, "given") if free is not None else free_memory()
    usable, verdicts = int(free * SHARE), []
    configs = sorted(((name, load(name)) for name in presets() if name != "auto"), key=lambda item: -counts(item[1]).total)
    for name, config in configs:
        train = config.train
        splits = [m for m in range(1, train.batch_size + 1) if train.batch_size % m == 0]
        for train.micro_batches in splits:
            if footprint(config).total <= usable:
                break
        needed, size = footprint(config).total, f"{name} ({si(counts(config).total)} parameters)"
        if needed > usable:
            verdicts.append(f"{size} needs {gib(needed)}")
            continue
        try:
            if config.data.tokenizer in NAMED_ENCODINGS:
                load_tokenizer(config.data.tokenizer)
        except DataError:
            verdicts.append(f"{size} fits, but its tokenizer {config.data.tokenizer} is not at hand")
            continue
        rows = train.batch_size // train.micro_batches
        chosen = f"{name}, {si(counts(config).total)} parameters, needs {gib(needed)} with {rows} rows at a time"
        print(f"auto: {gib(free)} free {where}, of which {SHARE:.0%} are used\n  chosen: {chosen}", file=sys.stderr)
        for verdict in verdicts[::-1]:
            print(f"  passed over: {verdict}", file=sys.stderr)
        return validate(config)
    raise ConfigError(f"auto: {gib(free)} free {where}: the smallest preset does not fit; {verdicts[-1]}")
