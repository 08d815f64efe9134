"""Our model against transformers, which loads the files that were written: logits, continuations, ids of texts.

N rows, T positions, V vocabulary, D model width.
"""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lumina.config import ModelConfig
from lumina.conversation import render
from lumina.data.records import Turn
from lumina.errors import CheckpointError, DataError, UsageError
from lumina.interchange.huggingface import ARCHITECTURES
from lumina.tokenizer import CONTROL_TOKENS, Tokenizer

FILE = "VERIFY.json"
TOLERANCE = 1e-5  # of the largest logit
# Experts whose scores are so close, relatively, may change places by rounding: what follows in the row tells nothing.
NEAR_TIE = 1e-5
LEAST_COMPARED = 0.5  # of the tokens, or nothing was verified
TOP, CONTINUED, PROMPT = 10, 64, 16
# Beside held-out text: spellings of control tokens, whitespace, line ends, digits, scripts, marks, emoji.
HARD_TEXTS = (
    *CONTROL_TOKENS,
    f"a{CONTROL_TOKENS[0]}b {CONTROL_TOKENS[3]}\n",
    "   ",
    "\n\n\n",
    "a   \n  b\t\t\r\n\r\n c   ",
    "1234567890 12 3",
    "I'll WE'VE it'\u017f",
    "naïve e\u0301 中文字 العربية \u00a0\u2028 🎉👩\u200d🚀 \x00\x1f",
)
MESSAGES = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is\n\n2 + 2?  "},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Naïve 中文 🎉"},
)


def require_transformers() -> None:
    """Raise a UsageError before any work where there is nothing to verify with."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not installed, and nothing goes in or out unverified: pip install 'lumina[transformers]'"
        )


class Ours:
    """The model under canonical names, computed by lumina_torch in float32 on CPU."""

    def __init__(self, model: ModelConfig, tensors: dict[str, np.ndarray]):
        from lumina_torch.model import Transformer, load_state  # noqa: TID251

        # Forms are the training device's; any gives the same result here.
        plain = replace(model, attention_form="auto", moe=replace(model.moe, grouped_form="auto"))
        self._transformer = Transformer(plain)
        load_state(self._transformer, tensors)

    def logits(self, ids_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(logits [T, V] of one document, how nearly each token's experts are tied [T])."""
        import torch  # noqa: TID251

        from lumina_torch.model import CAUSAL  # noqa: TID251

        inputs_1T = torch.as_tensor(ids_T, dtype=torch.int64)[None]
        positions_1T = torch.arange(len(ids_T))[None]
        with torch.inference_mode():
            hidden_1TD, metrics, _ = self._transformer(
                inputs_1T, torch.zeros_like(inputs_1T), positions_1T, dtype=torch.float32, mode=CAUSAL._replace(tell=True)
            )
            logits_TV = (hidden_1TD[0] @ self._transformer.head_DV(torch.float32)).numpy()
        if "moe" not in metrics:
            return logits_TV, np.full(len(ids_T), np.inf)
        return logits_TV, metrics["moe"]["margin_BT"][:, 0].amin(dim=0).numpy()


class Theirs:
    """The files in a directory, as transformers loads and computes them in float32 on CPU."""

    def __init__(self, directory: Path, form: str):
        import torch  # noqa: TID251
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # it reports there what is raised below
                self._model, told = getattr(transformers, ARCHITECTURES[form]).from_pretrained(
                    directory,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    attn_implementation="sdpa",
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        except Exception as error:  # what the library raises
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"transformers cannot load this {form} model: {said}; nothing was written") from error
        for what, names in told.items():
            if names:
                raise CheckpointError(f"transformers finds {what.replace('_', ' ')}: {sorted(map(str, names))[0]}")
        self._model.eval()

    def logits(self, ids_T: np.ndarray) -> np.ndarray:
        """[T, V]."""
        import torch  # noqa: TID251

        with torch.inference_mode():
            return self._model(torch.as_tensor(ids_T, dtype=torch.int64)[None], use_cache=False).logits[0].numpy()

    def continuation(self, ids_T: np.ndarray, count: int, allowed_V: np.ndarray | None = None) -> list[int]:
        """The likeliest tokens, of those that are allowed if not all, one after another, with its key/value cache."""
        import torch  # noqa: TID251

        ids_1T, cache, found = torch.as_tensor(ids_T, dtype=torch.int64)[None], None, []
        barred_V = torch.as_tensor(~allowed_V) if allowed_V is not None else torch.zeros((), dtype=torch.bool)
        with torch.inference_mode():
            for _ in range(count):
                told = self._model(ids_1T, past_key_values=cache, use_cache=True)
                cache = told.past_key_values
                ids_1T = told.logits[:, -1:].masked_fill(barred_V, -torch.inf).argmax(dim=-1)
                found.append(int(ids_1T))
        return found


# ----------------------------------------------------------------------------------------------------------- logits


@dataclass
class Comparison:
    """Sums over the tokens seen so far."""

    largest: float = 0.0  # absolute logit of ours
    difference: float = 0.0  # largest, absolute
    kl: float = 0.0  # sum over tokens of KL(ours || theirs), nats
    overlap: int = 0  # of the ten likeliest tokens of each
    tokens: int = 0
    near_ties: int = 0
    left_out: int = 0  # tokens that follow one, or have one themselves
    finite: bool = True
    about: dict[str, Any] = field(default_factory=dict)

    def add(self, ours_TV: np.ndarray, theirs_TV: np.ndarray, margin_T: np.ndarray) -> None:
        """Compare one document, up to where experts are nearly tied."""
        tied_T = margin_T < NEAR_TIE
        kept = int(np.argmax(tied_T)) if tied_T.any() else len(tied_T)
        self.near_ties += bool(tied_T.any())
        self.left_out += len(tied_T) - kept
        ours_TV, theirs_TV = ours_TV[:kept].astype(np.float64), theirs_TV[:kept].astype(np.float64)
        if not kept:
            return
        self.finite &= bool(np.isfinite(ours_TV).all() and np.isfinite(theirs_TV).all())
        self.largest = max(self.largest, float(np.max(np.abs(ours_TV))))
        self.difference = max(self.difference, float(np.max(np.abs(ours_TV - theirs_TV))))
        ours_log_TV, theirs_log_TV = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (ours_TV, theirs_TV))
        self.kl += float(np.sum(np.exp(ours_log_TV) * (ours_log_TV - theirs_log_TV)))
        count = min(TOP, ours_TV.shape[1])
        for ours_V, theirs_V in zip(ours_TV, theirs_TV, strict=True):
            self.overlap += len(
                set(np.argsort(-ours_V, kind="stable")[:count]) & set(np.argsort(-theirs_V, kind="stable")[:count])
            )
        self.about["top_count"] = count
        self.tokens += kept

    def figures(self) -> dict[str, Any]:
        tokens = max(self.tokens, 1)
        return {
            "largest_difference": self.difference / (self.largest or 1.0),  # relative to the largest logit
            "tolerance": TOLERANCE,
            "largest_logit": self.largest,
            "kl_per_token": self.kl / tokens,
            "top_10_overlap": self.overlap / (tokens * self.about.get("top_count", TOP)),
            "tokens": self.tokens,
            "rows_with_near_ties": self.near_ties,
            "tokens_left_out_after_near_ties": self.left_out,
        }


def compare_models(ours: Ours, theirs: Theirs, rows_NT: np.ndarray, say: Callable[[str], None]) -> dict[str, Any]:
    """Figures of both on real text. Raises CheckpointError when they are not the same model."""
    seen, vocabulary = Comparison(), None
    for number, ids_T in enumerate(rows_NT, 1):
        say(f"verifying with transformers: row {number}/{len(rows_NT)}")
        ours_TV, margin_T = ours.logits(ids_T)
        theirs_TV = theirs.logits(ids_T)
        vocabulary = min(ours_TV.shape[1], theirs_TV.shape[1])  # an import may have added rows for control tokens
        seen.add(ours_TV[:, :vocabulary], theirs_TV[:, :vocabulary], margin_T)
    figures = seen.figures()
    if not seen.finite or not figures["largest_difference"] <= TOLERANCE:
        raise CheckpointError(
            f"transformers gives other logits: they differ by {figures['largest_difference']:.1e} of the largest, "
            f"{figures['largest_logit']:.3g}, and may by {TOLERANCE:.0e}; nothing was written"
        )
    if seen.tokens < LEAST_COMPARED * rows_NT.size:
        raise CheckpointError(
            f"{seen.left_out} of {rows_NT.size} tokens follow experts tied within {NEAR_TIE:.0e}: too little can be compared; "
            "nothing was written"
        )
    say(f"verifying with transformers: {CONTINUED} tokens of a continuation")
    continued = greedy(ours, theirs, rows_NT[0][:PROMPT], vocabulary or 0)
    # Logits that are each within the tolerance may change places where two are no farther apart than twice that.
    if continued.get("ahead", 0.0) > 2 * TOLERANCE * figures["largest_logit"] and not continued["after_near_tie"]:
        raise CheckpointError(
            f"transformers continues otherwise from token {continued['first_differs_at']} on, where our choice is ahead by "
            f"{continued['ahead']:.3g}; nothing was written"
        )
    return figures | {"greedy": continued}


def greedy(ours: Ours, theirs: Theirs, prompt_T: np.ndarray, vocabulary: int) -> dict[str, Any]:
    """Whether both continue alike; else where not first, by how much ours was ahead there (0 is a tie), and whether experts
    were nearly tied at or before it."""
    found = theirs.continuation(prompt_T, CONTINUED)
    logits_TV, margin_T = ours.logits(np.concatenate([prompt_T, found[:-1]]))
    choices_nV = logits_TV[len(prompt_T) - 1 :, :vocabulary]  # of ours after what theirs wrote: the same until they differ
    chosen = choices_nV.argmax(axis=1)
    if not (differing := np.flatnonzero(chosen != found)).size:
        return {"tokens": CONTINUED, "equal": True}
    first = int(differing[0])
    ahead = float(choices_nV[first, chosen[first]] - choices_nV[first, found[first]])
    tied = bool(np.any(margin_T[: len(prompt_T) + first] < NEAR_TIE))
    return {"tokens": CONTINUED, "equal": False, "first_differs_at": first, "ahead": ahead, "after_near_tie": tied}


# -------------------------------------------------------------------------------------------------------------- ids


def compare_ids(theirs: Any, tokenizer: Tokenizer, texts: list[str], chat: bool, template: str = "lumina") -> dict[str, Any]:
    """Whether a tokenizer of transformers gives the same ids, of conversations in `template` as well if `chat`.

    Raises CheckpointError, with the text, when not.
    """
    for text in texts:
        # Lumina encodes no text to a control token; they do unless told not to.
        if theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"] != tokenizer.encode(text):
            raise CheckpointError(
                f"transformers' tokenizer gives other ids for {shortened(text)!r} than {tokenizer.name}; nothing was written"
            )
    same: dict[str, Any] = {"texts": len(texts), "equal": True, "chat_template": chat}
    turns = [Turn(message["role"], message["content"]) for message in MESSAGES]
    for prompted in (False, True) if chat else ():
        rendered = theirs.apply_chat_template(list(MESSAGES), add_generation_prompt=prompted, return_dict=False)
        if rendered != render(tokenizer, turns, template, prompted).ids.tolist():
            raise CheckpointError("transformers gives other ids for a conversation; nothing was written")
    return same | ({"chat_equal": True} if chat else {})


def load_tokenizer(directory: Path, alone: bool = False) -> Any:
    """transformers' tokenizer of a directory, of tokenizer.json `alone` if asked; no code in the directory is run."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    if alone:
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."


def versions() -> dict[str, str]:
    """What the comparison was made with."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy")}


# ------------------------------------------------------------------------------------------------------------- text


def rows_of(texts: Iterator[str], tokenizer: Tokenizer, positions: int, rows: int) -> np.ndarray:
    """Ids [N, T] of texts one after another: at most `rows` rows, fewer if there is less; raises DataError if there is none."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.control["<|document_end|>"]]
        if len(ids) >= rows * positions:
            break
    if (count := min(rows, len(ids) // positions)) == 0:
        raise DataError(f"the held-out text has {len(ids)} tokens, and verifying takes {positions}; hold out more")
    return np.array(ids[: count * positions], np.int64).reshape(count, positions)
