"""`lumina data prepare` on text made from the standard library, beside tiktoken alone and datasets.map, as one JSON object.

    python benchmarks/prepare.py --mb 2000 --peers-mb 200 --workdir /tmp/prepare

The peers encode a part of the same documents with the same tokenizer and as many cores, before and after ours, so that a
machine whose speed drifts slows all alike. Memory is the most that the command and its workers held together, read from /proc,
in two forms: what is private to them, and with what they share or map from files, which the kernel takes back at need.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lumina.config import DataConfig
from lumina.data.sources import held_out_texts
from lumina.errors import exit_with
from lumina.tokenizer_files import load_tokenizer

TICK_SECONDS = 0.1


def write_text(path: Path, size: int) -> None:
    """About `size` bytes of .jsonl: lines of the library in new orders, so that no two documents are equal."""
    files = [text.splitlines(keepends=True) for text in held_out_texts(DataConfig(source="stdlib", held_out=0.999999))]
    rng = random.Random(0)  # noqa: S311
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            lines = files[int(rng.random() * len(files))]
            start = int(rng.random() * len(lines))
            part = lines[start : start + 20 + int(rng.random() * 200)]
            cut = int(rng.random() * len(part))
            text = f"# {written}\n" + "".join(part[cut:] + part[:cut])
            written += file.write(json.dumps({"text": text}) + "\n")


def texts(path: Path, size: int) -> Iterator[str]:
    """The first documents of a file, `size` bytes of it."""
    read = 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            if (read := read + len(line)) > size:
                return
            yield json.loads(line)["text"]


def with_tiktoken(path: Path, size: int, tokenizer: str) -> dict[str, float]:
    """tiktoken's own batch encoding with a thread a core, of texts that are in memory."""
    import tiktoken

    made = load_tokenizer(tokenizer)
    encoding: tiktoken.Encoding = made._encoding  # type: ignore[attr-defined]
    documents = list(texts(path, size))
    began = time.perf_counter()
    tokens = sum(map(len, encoding.encode_ordinary_batch(documents, num_threads=os.cpu_count() or 1)))
    return _rates(sum(len(text.encode()) for text in documents), tokens, time.perf_counter() - began)


def with_datasets(path: Path, size: int, tokenizer: str, workdir: Path) -> dict[str, float]:
    """datasets.map over the same documents with a process a core, from a .jsonl file to Arrow files."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HOME"] = str(workdir / "huggingface")
    import datasets

    datasets.disable_progress_bars()
    part = workdir / "part.jsonl"
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(path, size)), encoding="utf-8")
    began = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=str(part), split="train", cache_dir=str(workdir / "datasets"))
    mapped = loaded.map(
        _Encode(tokenizer), batched=True, num_proc=os.cpu_count(), remove_columns=["text"], load_from_cache_file=False
    )
    seconds = time.perf_counter() - began
    tokens = sum(len(ids) for batch in mapped.iter(1000) for ids in batch["ids"])
    shutil.rmtree(workdir / "datasets")
    return _rates(sum(len(text.encode()) for text in texts(path, size)), tokens, seconds)


class _Encode:
    """Encodes a batch; each process of datasets.map loads its own tokenizer."""

    def __init__(self, tokenizer: str):
        self.tokenizer = tokenizer

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encode = _loaded(self.tokenizer).encode
        return {"ids": [encode(text) for text in batch["text"]]}


_loaded = functools.lru_cache(1)(load_tokenizer)


def started(*arguments: object) -> "subprocess.Popen[bytes]":
    """`lumina data prepare` in a process of its own."""
    command = [sys.executable, "-m", "lumina.cli", "data", "prepare", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603, ourselves


def with_lumina(path: Path, tokenizer: str, out: Path, workers: int, *flags: str) -> dict[str, object]:
    """The command, in a process of its own, with what it and its workers held at most."""
    began = time.perf_counter()
    private, whole = 0, 0
    with started(path, "--out", out, "--tokenizer", tokenizer, "--workers", workers, "--json", *flags) as process:
        while process.poll() is None:
            now = [_memory(pid) for pid in _family(process.pid)]
            private, whole = max(private, sum(each[0] for each in now)), max(whole, sum(each[1] for each in now))
            time.sleep(TICK_SECONDS)
        told = json.loads(process.stdout.read() if process.stdout else b"")
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = time.perf_counter() - began
    manifest = json.loads((out / "manifest.json").read_text())
    size, tokens = (sum(manifest[side][what] for side in ("train", "held_out")) for what in ("bytes", "tokens"))
    rates = _rates(size, tokens, seconds)
    return rates | {"peak_private_mib": private >> 20, "peak_resident_mib": whole >> 20, "records": told["records"]}


def _family(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        found.append(each := waiting.pop())
        try:
            for task in Path(f"/proc/{each}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:  # it has ended
            pass
    return found


def _memory(pid: int) -> tuple[int, int]:
    """(anonymous, resident) bytes."""
    try:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return tuple(int(lines[name].split()[0]) << 10 for name in ("RssAnon", "VmRSS"))  # type: ignore[return-value]
    except (OSError, KeyError):
        return 0, 0


def _rates(size: int, tokens: int, seconds: float) -> dict[str, float]:
    return {
        "mb": round(size / 1e6, 1),
        "seconds": round(seconds, 1),
        "mb_per_second": round(size / 1e6 / seconds, 2),
        "tokens_per_second": round(tokens / seconds),
    }


def digest(directory: Path) -> str:
    """Of every file of a prepared directory."""
    found = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"):
        found.update(str(path.relative_to(directory)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def killed(path: Path, tokenizer: str, out: Path, workers: int, seconds: float) -> None:
    """The command killed, with its workers, after so many seconds."""
    with started(path, "--out", out, "--tokenizer", tokenizer, "--workers", workers) as process:
        time.sleep(seconds)
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=float, default=2000)
    parser.add_argument("--peers-mb", type=float, default=200)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kill-after", type=float, default=0.0, help="seconds; 0 leaves this part out")
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "lumina-prepare")
    arguments = parser.parse_args()
    work: Path = arguments.workdir
    work.mkdir(parents=True, exist_ok=True)
    path, peers, tokenizer = work / "text.jsonl", int(arguments.peers_mb * 1e6), str(work / "small" / "tokenizer")
    if not path.exists():
        write_text(work / "text.part", int(arguments.mb * 1e6))
        (work / "text.part").rename(path)
    if not Path(tokenizer).exists():
        with started("stdlib", "--out", work / "small", "--vocab-size", arguments.vocab_size) as process:
            process.communicate()
    found: dict[str, object] = {"cores": os.cpu_count(), "load_before": os.getloadavg()[0], "vocab_size": arguments.vocab_size}
    before = with_tiktoken(path, peers, tokenizer), with_datasets(path, peers, tokenizer, work)
    shutil.rmtree(work / "out", ignore_errors=True)
    ours = with_lumina(path, tokenizer, work / "out", arguments.workers)
    after = with_tiktoken(path, peers, tokenizer), with_datasets(path, peers, tokenizer, work)
    found |= {"lumina": ours, "tiktoken": (before[0], after[0]), "datasets": (before[1], after[1])}
    for name, pair in (("tiktoken", 0), ("datasets", 1)):
        rates = [each[pair]["mb_per_second"] for each in (before, after)]
        found[f"rate_over_{name}"] = round(float(ours["mb_per_second"]) / (sum(rates) / 2), 3)  # type: ignore[arg-type]
    if arguments.kill_after:
        shutil.rmtree(work / "killed", ignore_errors=True)
        killed(path, tokenizer, work / "killed", arguments.workers, arguments.kill_after)
        found["units_done_when_killed"] = len(list((work / "killed" / "work").glob("unit-*[0-9]")))
        found["after_kill"] = with_lumina(path, tokenizer, work / "killed", arguments.workers)
        found["same_bytes_after_kill"] = digest(work / "killed") == digest(work / "out")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    exit_with(main)
