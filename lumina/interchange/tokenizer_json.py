"""Lumina's tokenizers in the files of Hugging Face: tokenizer.json and tokenizer_config.json, with the same ids."""

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from lumina.conversation import TEMPLATES, jinja, render
from lumina.data.records import Turn
from lumina.errors import DataError
from lumina.tokenizer import CONTROL_TOKENS, FILE, Tokenizer
from lumina.tokenizer_files import byte_of_character


def write(directory: Path, tokenizer: Tokenizer, positions: int, template: str = "lumina") -> bool:
    """Write tokenizer.json and tokenizer_config.json; `positions`: tokens that the model takes.

    `template` is that of lumina.conversation which the model has learned.

    Returns whether the chat template is with them: not where a copied tokenizer encodes a text otherwise after a control token.

    Raises:
        DataError: the tokenizer is SentencePiece's, or its file has a token of a control token's name.
    """
    spec, config = tokenizer_json(tokenizer), tokenizer_config(positions, tokenizer, template)
    if not (chat := _renders_alike(spec, tokenizer, template)):
        del config["chat_template"]
    for name, values in (("tokenizer.json", spec), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return chat


def _renders_alike(spec: dict[str, Any], tokenizer: Tokenizer, template: str) -> bool:
    """Whether a rendered text has the ids of `render`: some tokenizers put a space before the first text alone."""
    import tokenizers

    texts = ("What is\n\n2?", "", " 4. ")
    form, turns = TEMPLATES[template], [Turn("user", text) for text in texts]
    head = "".join(form.headers["user"]) + form.lead
    rendered = form.between.join(f"{head}{text}{form.end}{form.after}" for text in texts)
    loaded = tokenizers.Tokenizer.from_str(json.dumps(spec))
    return bool(loaded.encode(rendered, add_special_tokens=False).ids == render(tokenizer, turns, template).ids.tolist())


def tokenizer_config(positions: int, tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    """tokenizer_config.json.

    `split_special_tokens` stays off, as with it a rendered conversation would have no control token either; with it in a call,
    `tokenizer(text, split_special_tokens=True)`, no text becomes one, which is how Lumina encodes.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "eos_token": "<|document_end|>",
        "pad_token": "<|padding|>",
        "additional_special_tokens": list(tokenizer.control)[2:],
        "chat_template": jinja(template, tokenizer.control),
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json, the control tokens added to it. A copied one is handed through, but that it adds nothing to a text."""
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save(Path(saved))
        values = json.loads((Path(saved) / FILE).read_text(encoding="utf-8"))
        kind = values["kind"]
        if kind == "bpe":
            spec = _byte_level([token.encode("latin-1") for token in values["ranks"]], values["pattern"])
        elif kind == "huggingface":
            spec = json.loads((Path(saved) / "tokenizer.json").read_text(encoding="utf-8"))
            spec |= {"truncation": None, "padding": None, "post_processor": None}
        else:
            raise DataError(f"tokenizer {tokenizer.name}: is of SentencePiece, which has no tokenizer.json; use --to canonical")
    its_own = {each["content"] for each in spec["added_tokens"]} - set(CONTROL_TOKENS)
    spec["added_tokens"] += [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token, i in tokenizer.control.items()
        if token not in its_own
    ]
    _require_control_ids(spec, tokenizer)
    return spec


def _require_control_ids(spec: dict[str, Any], tokenizer: Tokenizer) -> None:
    """A token's own name wins over the id beside it, so that the library may give another id than is written."""
    import tokenizers

    loaded = tokenizers.Tokenizer.from_str(json.dumps(spec))
    for token, i in tokenizer.control.items():
        if (found := loaded.token_to_id(token)) != i:
            raise DataError(
                f"tokenizer {tokenizer.name}: its file has {token} as id {found}, and Lumina as {i}; use --to canonical"
            )


def _byte_level(ranks: list[bytes], pattern: str) -> dict[str, Any]:
    """A byte-level BPE of tiktoken: of all pairs that join to a token, the one whose token has the lowest rank joins first."""
    character_of = {byte: character for character, byte in byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges = [halves for token in ranks if (halves := _halves(token, rank_of))]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": oniguruma(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is taken whole, as in tiktoken
            "vocab": {spelled(token): rank for rank, token in enumerate(ranks)},
            "merges": [[spelled(left), spelled(right)] for left, right in merges],
        },
    }


def _halves(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that join to this one last; None for a byte, and for a token that no pairs lead to.

    There is one such pair: within a text, too, what joins inside of a token's bytes before it joins is decided by them alone.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [rank_of.get(a + b, len(rank_of)) for a, b in pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        if joined[best] == len(rank_of):
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def oniguruma(pattern: str) -> str:
    r"""A pattern of tiktoken (fancy-regex) for the engine of `tokenizers` (Oniguruma, in Ruby's syntax).

    There `{1,3}+` repeats a repetition instead of being possessive, which a pattern's last item need not be. `$` is also a
    line's end, but the `\s++` before it leaves no line end to stop at.
    """
    return pattern.replace(r"\p{N}{1,3}+", r"\p{N}{1,3}")
