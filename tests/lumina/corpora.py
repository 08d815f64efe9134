"""Small files of texts and of conversations, for runs that read both, and what a run makes of one source."""

import json

from lumina.data.sources import prepare_all

WORDS = ["add", "sort", "find", "join", "move", "read", "scale", "shift", "split", "sum", "trim", "mix"]


def texts(path, count=60):
    """A .jsonl of short texts; returns its name."""
    lines = [{"text": " ".join(WORDS[(n * k) % 12] for k in range(1, 9 + n % 30)) + f" {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def chats(path, count=60):
    """A .jsonl of conversations in which an assistant repeats a word in capitals; returns its name."""
    lines = []
    for n in range(count):
        turns = []
        for k in range(1 + n % 3):
            word = WORDS[(n + 5 * k) % 12]
            turns += [{"role": "user", "content": f"say {word} {n}"}, {"role": "assistant", "content": word.upper()}]
        lines.append({"messages": turns})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def preferences(path, count=40):
    """A .jsonl of preferences; returns its name."""
    lines = [{"prompt": f"say {n}", "chosen": f"well: {n}", "rejected": f"no {n * n}"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def corpus_of(data, vocab_size, say=lambda line: None):
    """The corpus of `data.source` alone, as a run finds or makes it."""
    (corpus,) = prepare_all([data.source], data, vocab_size, say)
    return corpus
