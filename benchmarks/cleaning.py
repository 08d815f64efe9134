"""What the cleaning steps find and how fast: planted near duplicates, texts of this machine, MB/s a step. Prints JSON.

    python benchmarks/cleaning.py                  # all of it: about ten minutes of one core
    python benchmarks/cleaning.py near --pairs=50  # one part: near, quality, language or speed

Near duplicates are made of chunks of the standard library, changed word by word or by one cut until their exact Jaccard
similarity is the one asked for. Speeds are in processor seconds of one core, which other processes disturb least.
"""

import argparse
import gettext
import itertools
import json
import os
import random
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lumina.data.cleaning.duplicates import NearDuplicates, bands, exact_key, signature
from lumina.data.cleaning.language import detect
from lumina.data.cleaning.quality import fault
from lumina.data.cleaning.steps import steps
from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import exit_with

SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
WORDS = 400  # of a chunk
LANGUAGES = "bg ca cs da de el en es fi fr hu id it ja ko nl pl pt ro ru sr sv tr uk vi zh".split()  # noqa: SIM905
CATALOGS, TEXTS = Path("/usr/share/locale"), Path("/usr/share/doc")


def standard_library() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            yield path.read_text("utf-8", "replace")


def shingles(words: list[str], length: int) -> set[tuple[str, ...]]:
    """The obvious way, which shares nothing with what it judges."""
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other)


def chunks(length: int) -> Iterator[list[str]]:
    """Lists of words with hardly a shingle in common."""
    seen: set[tuple[str, ...]] = set()
    for text in standard_library():
        words = re.findall(r"[a-z0-9]+", text.lower())
        for start in range(0, len(words) - WORDS, WORDS):
            chunk = words[start : start + WORDS]
            mine = shingles(chunk, length)
            if len(mine) > 0.9 * WORDS and len(mine & seen) < 0.05 * WORDS:
                seen |= mine
                yield chunk


def changed(words: list[str], similarity: float, cut: bool, length: int, draw: random.Random) -> tuple[list[str], float]:
    """(words, their exact similarity): other words in places drawn at random, or in one stretch, until it is `similarity`."""
    original, copy, first = shingles(words, length), list(words), draw.randrange(WORDS)
    places = [(first + i) % WORDS for i in range(WORDS)] if cut else draw.sample(range(WORDS), WORDS)
    for count, place in enumerate(places):
        copy[place] = f"word{count}of{draw.randrange(10**9)}"
        if (reached := jaccard(original, shingles(copy, length))) <= similarity + 0.005:
            return copy, reached
    raise AssertionError("every word is another, and the texts are still similar")


def near(pairs: int) -> dict[str, Any]:
    """Recall and precision over planted pairs, at each similarity and overall."""
    recipe, draw = Recipe(), random.Random(0)  # noqa: S311
    originals = list(itertools.islice(chunks(recipe.near_shingle), pairs * len(SIMILARITIES)))
    if len(originals) < pairs * len(SIMILARITIES):
        raise SystemExit(
            f"the standard library has {len(originals)} chunks: at most --pairs={len(originals) // len(SIMILARITIES)}"
        )
    planted = [
        (number, wanted, *changed(words, wanted, number % 2 == 0, recipe.near_shingle, draw))
        for number, (words, wanted) in enumerate(zip(originals, itertools.cycle(SIMILARITIES), strict=False))
    ]
    index = NearDuplicates(recipe)
    numbers = [index.earlier(_signature(words, recipe)) for words in originals]
    mistaken = sum(number >= 0 for number in numbers)
    numbers = list(itertools.accumulate(number < 0 for number in numbers))  # of each, among those kept, from 1
    draw.shuffle(planted)
    exact = dict.fromkeys(SIMILARITIES, 0.0)
    rows: dict[float, Counter[str]] = {wanted: Counter() for wanted in SIMILARITIES}
    for number, wanted, words, reached in planted:
        found = index.earlier(_signature(words, recipe))
        rows[wanted].update(pairs=1, found=found >= 0, right=found + 1 == numbers[number])
        exact[wanted] += reached
    total = sum(rows.values(), Counter[str]())
    true_found = sum(row["right"] for wanted, row in rows.items() if wanted >= recipe.near_threshold)
    found = total["found"] + mistaken
    below = [row for wanted, row in rows.items() if wanted < 0.7]
    return {
        "threshold": recipe.near_threshold,
        "bands_rows": bands(recipe.near_threshold, recipe.near_permutations),
        "distinct_documents": len(originals),
        "distinct_documents_taken_for_duplicates": mistaken,
        "by_similarity": {
            str(wanted): {
                "mean_exact": round(exact[wanted] / row["pairs"], 3),
                "pairs": row["pairs"],
                "found": row["found"],
                "share": round(row["found"] / row["pairs"], 3),
            }
            for wanted, row in rows.items()
        },
        "recall": round(true_found / sum(row["pairs"] for wanted, row in rows.items() if wanted >= recipe.near_threshold), 4),
        "precision": round(true_found / found, 4),
        "precision_without_0.7_and_0.75": round(true_found / (true_found + mistaken + sum(row["found"] for row in below)), 4),
        "named_another_document": total["found"] - total["right"],
    }


def _signature(words: list[str], recipe: Recipe) -> Any:
    return signature(Document("planted", " ".join(words)), recipe)


def texts() -> Iterator[str]:
    """Documentation, licences and READMEs of this machine, each once."""
    seen = set()
    packages = Path(sysconfig.get_paths()["purelib"])
    for path in sorted([*TEXTS.rglob("*"), *packages.rglob("*")]):
        name = path.name.lower()
        if path.suffix in (".md", ".rst", ".txt") or name.startswith(("readme", "licen", "copying", "copyright", "notice")):
            try:
                text = path.read_text("utf-8") if path.is_file() else ""
            except (OSError, UnicodeDecodeError):
                continue
            if text.strip() and text not in seen:
                seen.add(text)
                yield text


def quality(limit: int = 4000) -> dict[str, Any]:
    """How many English texts of this machine and sources are kept, and why the others are not."""
    kinds = {"documentation": itertools.islice(texts(), limit), "python": itertools.islice(standard_library(), limit)}
    result = {}
    for kind, documents in kinds.items():
        reasons = Counter(fault(text) for text in documents if detect(text)[0] == "en")
        result[kind] = {"english": reasons.total(), "kept": reasons.pop("", 0), "removed": dict(reasons.most_common())}
    return result


def language() -> dict[str, Any]:
    """Accuracy on translated messages of this machine's programs, alone and eight in a row."""
    found = {}
    for code in LANGUAGES:
        messages = sorted(set(_messages("zh_CN" if code == "zh" else "de" if code == "en" else code, english=code == "en")))
        few = messages[:: max(1, len(messages) // 200)][:200]
        found[code] = {"messages": few, "paragraphs": [" ".join(few[i : i + 8]) for i in range(0, len(few), 8)]}
    result: dict[str, Any] = {}
    for kind in ("messages", "paragraphs"):
        start, right = time.process_time(), {}
        for code, examples in found.items():
            right[code] = sum(detect(text)[0] == code for text in examples[kind])
        count = {code: len(examples[kind]) for code, examples in found.items()}
        result[kind] = {
            "texts": sum(count.values()),
            "accuracy": round(sum(right.values()) / sum(count.values()), 4),
            "worst": sorted((round(right[code] / count[code], 3), code) for code in right if count[code])[:4],
            "texts_a_second": round(sum(count.values()) / (time.process_time() - start)),
        }
    return result


def _messages(folder: str, english: bool) -> Iterator[str]:
    for path in sorted((CATALOGS / folder / "LC_MESSAGES").glob("*.mo")):
        try:
            with open(path, "rb") as file:
                catalog = vars(gettext.GNUTranslations(file))["_catalog"]
        except (OSError, UnicodeDecodeError):
            continue
        for key, value in catalog.items():
            if isinstance(key, str) and key and value != key:
                text = key if english else value
                if len(text) > (60 if text.isascii() or text[0] < "\u3000" else 25) and not re.search(r"[%\n{}<>=]|--", text):
                    yield text


def speed(megabytes: int) -> dict[str, Any]:
    """MB/s of each step over the standard library, again and again up to `megabytes`."""
    recipe, documents, size = Recipe(steps="all", redact="url,email,phone,key,code"), [], 0
    for text in itertools.cycle(list(standard_library())):
        if size >= megabytes * 1e6:
            break
        documents.append(Document("stdlib", text))
        size += len(text.encode("utf-8"))
    against = [document.text[:5000] for document in documents[:20]]
    result: dict[str, Any] = {"documents": len(documents), "MB": round(size / 1e6, 1)}
    calls: list[tuple[str, Callable[[Document], Any]]] = [(step.name, step) for step in steps(recipe, against)]
    signatures: list[Any] = []
    calls += [("exact", exact_key), ("signature", lambda document: signatures.append(signature(document, recipe)))]
    for name, call in calls:
        call(documents[0])
        documents = [Document("stdlib", document.plain) for document in documents]  # none has its text cached
        result[name] = {"MB_a_second": round(size / 1e6 / _seconds(call, documents), 1)}
    index = NearDuplicates(recipe)
    found: list[int] = []
    seconds = _seconds(lambda each: found.append(index.earlier(each)), signatures)
    result["near"] = {"us_a_document": round(seconds / len(documents) * 1e6, 1), "kept": index.kept}
    many = np.random.default_rng(0).integers(0, 2**32, (200_000, recipe.near_permutations), np.uint32)
    before, index = _memory(), NearDuplicates(recipe)
    seconds = _seconds(index.earlier, many)
    result["near_of_200000_others"] = {
        "us_a_document": round(seconds / len(many) * 1e6, 1),
        "bytes_a_document": round((_memory() - before) / len(many)),
    }
    return result


def _seconds(call: Callable[[Any], Any], values: Iterable[Any]) -> float:
    start = time.process_time()
    for value in values:
        call(value)
    return time.process_time() - start


def _memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("all", "near", "quality", "language", "speed"), default="all")
    parser.add_argument("--pairs", type=int, default=200, help="planted at each similarity")
    parser.add_argument("--megabytes", type=int, default=50, help="of text for the speeds")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "near": lambda: near(arguments.pairs),
        "quality": quality,
        "language": language,
        "speed": lambda: speed(arguments.megabytes),
    }
    print(json.dumps({name: part() for name, part in parts.items() if arguments.part in ("all", name)}, indent=2))


if __name__ == "__main__":
    exit_with(main)
