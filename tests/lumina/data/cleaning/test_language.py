"""Languages found in planted texts."""
# ruff: noqa: RUF001  # letters of other alphabets are what this is about

import sys
import sysconfig
from pathlib import Path

import pytest

from lumina.data.cleaning.language import UNDETERMINED, Language, detect
from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import UsageError

PLANTED = {
    "en": "The train was late again this morning, so we walked along the river. Nobody seemed to mind the rain.",
    "de": "Der Zug hatte heute Morgen wieder Verspätung, also gingen wir am Fluss entlang. Niemand störte sich am Regen.",
    "fr": "Le train était encore en retard ce matin, alors nous avons longé la rivière. Personne ne craignait la pluie.",
    "es": "El tren llegó tarde otra vez esta mañana, así que caminamos junto al río. A nadie le molestaba la lluvia.",
    "it": "Anche stamattina il treno era in ritardo, così abbiamo seguito il fiume. A nessuno dava fastidio la pioggia.",
    "pt": "O comboio atrasou-se outra vez esta manhã, por isso caminhámos ao longo do rio. Ninguém se importava com a chuva.",
    "nl": "De trein had vanmorgen weer vertraging, dus liepen we langs de rivier. Niemand leek de regen erg te vinden.",
    "sv": "Tåget var försenat igen i morse, så vi gick längs floden. Ingen verkade bry sig om regnet.",
    "fi": "Juna oli taas myöhässä tänä aamuna, joten kävelimme joen rantaa pitkin. Kukaan ei näyttänyt välittävän sateesta.",
    "pl": "Pociąg znowu spóźnił się dziś rano, więc poszliśmy wzdłuż rzeki. Nikomu nie przeszkadzał deszcz.",
    "cs": "Vlak měl dnes ráno zase zpoždění, a tak jsme šli podél řeky. Nikomu zřejmě déšť nevadil.",
    "hu": "A vonat ma reggel megint késett, ezért a folyó mentén sétáltunk. Úgy tűnt, senkit sem zavar az eső.",
    "tr": "Tren bu sabah yine gecikti, bu yüzden nehir boyunca yürüdük. Yağmur kimseyi rahatsız etmiyor gibiydi.",
    "ru": "Сегодня утром поезд снова опоздал, поэтому мы пошли вдоль реки. Казалось, дождь никому не мешал.",
    "uk": "Сьогодні вранці потяг знову запізнився, тому ми пішли вздовж річки. Здавалося, дощ нікому не заважав.",
    "el": "Το τρένο άργησε πάλι σήμερα το πρωί, γι' αυτό περπατήσαμε κατά μήκος του ποταμού. Κανέναν δεν πείραζε η βροχή.",
    "ar": "تأخر القطار مرة أخرى هذا الصباح، لذلك مشينا على طول النهر. لم يبد أن أحدا ينزعج من المطر.",
    "he": "הרכבת איחרה שוב הבוקר, ולכן הלכנו לאורך הנהר. נראה שהגשם לא הפריע לאיש.",
    "hi": "आज सुबह ट्रेन फिर देर से आई, इसलिए हम नदी के किनारे पैदल चले। बारिश से किसी को परेशानी नहीं हुई।",
    "ja": "今朝も電車が遅れたので、私たちは川沿いを歩きました。雨を気にする人は誰もいないようでした。",
    "ko": "오늘 아침에도 기차가 늦어서 우리는 강을 따라 걸었습니다. 아무도 비를 신경 쓰지 않는 것 같았습니다.",
    "zh": "今天早上火车又晚点了，所以我们沿着河边走。似乎没有人介意下雨。",
    "vi": "Sáng nay tàu lại đến muộn nên chúng tôi đi bộ dọc theo bờ sông. Dường như không ai bận tâm đến cơn mưa.",
    "id": "Kereta terlambat lagi pagi ini, jadi kami berjalan kaki menyusuri sungai. Tidak ada yang keberatan dengan hujan.",
}


def answer(text, **options):
    result = Language(Recipe(**options))(Document("x", text))
    return result if isinstance(result, str) else "kept"


@pytest.mark.parametrize("code", PLANTED)
def test_planted_texts_are_found_to_be_in_their_language(code):
    found, probability = detect(PLANTED[code])
    assert found == code
    assert probability > (0.9 if code != "id" else 0.5)  # Malay is much the same
    assert answer(PLANTED[code], languages=code) == "kept"
    assert answer(PLANTED[code], languages="eo") == f"language {code}"


def test_several_languages_can_be_kept():
    kept = [code for code, text in PLANTED.items() if answer(text, languages="de, fr,ja") == "kept"]
    assert kept == ["de", "fr", "ja"]


@pytest.mark.parametrize("text", ["", "12345 67890", "|---|---|\n|   |   |", "\n", "💻 + 💻"])
def test_a_text_without_letters_is_undetermined(text):
    assert detect(text) == (UNDETERMINED, 0.0)
    assert answer(text) == "language undetermined"
    assert answer(text, languages="en,und") == "kept"


def test_a_text_below_the_score_is_undetermined():
    doubtful = "OK 7"
    assert answer(doubtful) == "language undetermined"
    assert answer(doubtful, languages="en,und") == "kept"
    assert answer(PLANTED["de"], language_score=1.01) == "language undetermined"


def test_source_code_counts_as_the_language_of_its_words():
    """Of the standard library, which is in English: nearly all, and what is not is undetermined rather than foreign."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:100]
    answers = [answer(path.read_text("utf-8", "replace")) for path in paths]
    assert answers.count("kept") >= 90
    assert set(answers) <= {"kept", "language undetermined"}


def test_a_long_text_is_looked_at_in_several_places():
    licence = PLANTED["en"] * 6
    assert detect(licence + PLANTED["de"] * 60)[0] == "de"
    assert detect(PLANTED["de"] * 60 + licence)[0] == "de"


@pytest.mark.parametrize(("languages", "named"), [("en,xx", "'xx'"), ("English", "'English'"), (" , ", "names none")])
def test_languages_that_do_not_exist_are_refused(languages, named):
    with pytest.raises(UsageError, match=f"--languages: .*{named}"):
        Language(Recipe(languages=languages))


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in [name for name in sys.modules if name.startswith("py3langid")]:
        monkeypatch.delitem(sys.modules, name)
    detect.cache_clear()
    assert detect(PLANTED["sv"])[0] == "sv"
