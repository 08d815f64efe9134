import json
import re
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest

from lumina.cli import run
from lumina.config import DataConfig
from lumina.conversation import ASSISTANT, NONE, USER
from lumina.data import packing
from lumina.data.corpus import SIDES, open_corpus
from lumina.data.preparing.directory import prepare_directory
from lumina.data.preparing.pipeline import Order
from lumina.data.recipe import Recipe
from lumina.data.reports import charts
from lumina.data.reports.report_page import page, tails
from lumina.data.reports.statistics import figures, sampled_texts
from lumina.errors import DataError, UsageError
from lumina.runs.console import Console
from lumina.runs.text import rows_of
from lumina.runs.units import decimal_bytes

EVIL = "<script>alert('x')</script>"


def chat(i):
    asked = [{"role": "user", "content": f"{EVIL} What is {i} squared?"}, {"role": "assistant", "content": f"It is {i * i}."}]
    return {
        "messages": asked if i % 3 else [*asked, {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    }


def pair(i):
    said = [{"role": "user", "content": f"Which is {i}?"}]
    long, brief = "That one, without any doubt at all.", f"{i}"
    answers = (long, brief) if i % 4 else (brief, long)
    chosen, rejected = ([*said, {"role": "assistant", "content": answer}] for answer in answers)
    return {"chosen": chosen, "rejected": rejected}


def text(i):
    return {
        "text": f"Document {i} says {EVIL} and {i * i}, then {i**3} as well, with some more words in it. {'More. ' * (i % 9)}"
    }


def prepared(directory, records, name="data.jsonl", recipe=Recipe(), template="lumina"):  # noqa: B008
    directory.mkdir(exist_ok=True)
    source = directory / name
    source.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    order = Order((str(source),), recipe, 0.2, template)
    asked = {"tokenizer": "bpe", "vocab_size": 300, "sample": 1e6, "max_bad": 0.5, "engine": "local"}
    prepare_directory(order, directory / "out", workers=0, console=Console(0, None), **asked)
    return directory / "out"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A prepared directory of each kind."""
    base = tmp_path_factory.mktemp("corpora")
    bad = [f'{{"text": 3, "{EVIL}": 1}}', "{", *[text(4)] * 2]
    return {
        "text": prepared(
            base / "text", [*map(text, range(80)), *bad], "<b>.jsonl", Recipe(steps="control,length,exact", min_characters=98)
        ),
        "conversation": prepared(base / "chats", map(chat, range(60))),
        "preference": prepared(base / "pairs", map(pair, range(40))),
    }


@pytest.fixture(scope="module")
def pages(corpora):
    return {kind: page("name", figures(open_corpus(path))) for kind, path in corpora.items()}


KINDS = ("text", "conversation", "preference")


# ------------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_a_loop_over_the_tokens(corpora, kind, monkeypatch):
    monkeypatch.setattr("lumina.data.reports.statistics.BLOCK_TOKENS", 100)
    corpus = open_corpus(corpora[kind])
    found = figures(corpus)
    for side in SIDES:
        stream = getattr(corpus, side)
        ids = stream.read(0, stream.num_tokens).tolist()
        assert found.ids[side].tolist() == [ids.count(i) for i in range(corpus.tokenizer.vocab_size)]
        ends = [place for place, i in enumerate(ids) if i == corpus.document_end_id]
        assert np.cumsum(found.sizes[side]).tolist() == [end + 1 for end in ends]
        if kind != "text":
            codes = corpus.roles(side).read(0, stream.num_tokens).tolist()
            assert found.roles[side].tolist() == [codes.count(code) for code in range(5)]
            users = corpus.tokenizer.control["<|user|>"]
            first = 0
            for end, turns in zip(ends, found.turns[side], strict=True):
                assert 2 * ids[first:end].count(users) == turns
                first = end


def test_languages_are_told_from_words_and_not_from_headers(tmp_path):
    corpus = open_corpus(prepared(tmp_path, map(chat, range(30)), template="instruct"))
    texts = sampled_texts(corpus)
    assert len(texts) == corpus.manifest["train"]["documents"]
    for said in texts:
        assert re.fullmatch(
            rf"[:\s]*{re.escape(EVIL)} What is \d+ squared\?[:\s]*It is \d+\.([:\s]*Sure\?[:\s]*Yes\.)?\s*", said
        )
    assert "### Instruction" in corpus.tokenizer.decode(corpus.train.read(0, 30).tolist())
    assert sum(figures(corpus).languages.values()) == len(texts)


def test_packing_is_that_of_training(corpora):
    corpus = open_corpus(corpora["text"])
    for length, waste, cut in figures(corpus).packing:
        report = packing.plan(np.asarray(corpus.documents("train")), length).report
        assert (waste, cut) == (report.waste, report.cut_documents)


def test_conversations_are_packed_as_in_training(corpora, monkeypatch):
    lengths = tuple(range(20, 60))
    monkeypatch.setattr("lumina.data.reports.statistics.PACKED", lengths)
    corpus = open_corpus(corpora["conversation"])
    told = figures(corpus).packing
    reports = [rows_of(corpus, "train", DataConfig(rows="packed"), length).plan.report for length in lengths]
    assert told == [(length, of.waste, of.split_conversations) for length, of in zip(lengths, reports, strict=True)]
    documents, turns = np.asarray(corpus.documents("train")), np.asarray(corpus.turns("train"))
    anywhere = [packing.plan(documents, length, turns).report.waste for length in lengths]
    assert anywhere != [waste for _, waste, _ in told]  # where a user's turn begins matters here


def test_unknown_tokens_are_counted(tmp_path):
    records = [{"text": f"Some text of {i}\ufffd{i} and so on"} for i in range(60)]
    found = figures(open_corpus(prepared(tmp_path, records)))
    assert found.unknown == 60
    assert found.damaged == found.sampled


# --------------------------------------------------------------------------------------------------------------- page


VOID = ("meta", "br")


class Strict(HTMLParser):
    """Tags that open and close as they should, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.data = [], set(), [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_data(self, data):
        self.data.append(data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_whole_and_needs_nothing_else(pages, kind):
    found = Strict(pages[kind])
    assert not found.open
    assert "script" not in found.tags
    assert not found.tags & {"img", "link", "iframe", "object", "base", "form"}
    assert not [each for each in found.attributes if each[1] in ("src", "href", "srcset") or each[1].startswith("on")]
    assert "url(" not in pages[kind]
    assert "default-src 'none'" in pages[kind]
    assert "prefers-color-scheme:dark" in pages[kind]
    assert "width=device-width" in pages[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_directory_gives_the_same_bytes(corpora, pages, kind):
    assert page("name", figures(open_corpus(corpora[kind]))) == pages[kind]


def test_texts_names_and_rejects_are_no_markup(pages):
    text_ = pages["text"]
    assert "<script" not in text_
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text_.replace("</span><span class=w4>", "")
    assert "&lt;b&gt;.jsonl" in text_
    assert "<b>.jsonl" not in text_
    shown = "".join(Strict(text_).data)
    assert f'{{"text": 3, "{EVIL}": 1}}'[:80] in shown  # of a rejected record


def test_a_page_tells_what_the_manifest_and_the_tokens_say(corpora, pages):
    manifest = json.loads((corpora["text"] / "manifest.json").read_text())
    shown = " ".join(Strict(pages["text"]).data)
    assert f"{manifest['records']['read']:,} records were read and {manifest['records']['kept']:,} kept" in shown
    removed = sum(manifest["steps"]["exact"]["removed"].values())
    assert removed == 2
    assert f"{removed} of {manifest['records']['kept'] + removed}" in shown
    assert "not looked for (--steps near)" in shown
    for kind, count in manifest["rejects"]["counts"].items():
        assert f"{kind} {count}" in shown
    characters, tokens = (sum(manifest[side][what] for side in SIDES) for what in ("characters", "tokens"))
    assert f"characters a token, held out ones too {characters / tokens:.3f}" in re.sub(r"\s+", " ", shown)
    least = manifest["steps"]["length"]["removed"]
    assert f"{next(iter(least.values()))} shorter than 98 characters" in shown


def test_the_figures_at_the_top_are_of_the_same_documents(corpora, pages):
    train = json.loads((corpora["text"] / "manifest.json").read_text())["train"]
    top = pages["text"].split("<section>")[0]
    tiles = dict(re.findall(r"<div><b>([^<]*)</b>([^<]*)</div>", top))
    assert tiles[decimal_bytes(train["bytes"])] == "of training text"
    assert tiles[f"{train['characters'] / train['tokens']:.2f}"] == "characters a training token"
    assert "training documents" in tiles.values()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["/data/user/x/alpaca.csv", "stdlib", "hf:a/b:train"], ["alpaca.csv", "stdlib", "hf:a/b:train"]),
        (["/a/one/x.txt", "/a/two/x.txt", "y/z.txt"], ["one/x.txt", "two/x.txt", "z.txt"]),
        (["/x.txt", "a/x.txt", "x.txt"], ["/x.txt", "a/x.txt", "x.txt"]),
    ],
)
def test_a_source_is_called_by_the_end_of_its_path_that_no_other_has(names, told):
    assert tails(names) == told


def test_a_table_of_sources_shows_the_end_of_a_path_and_has_all_of_it(corpora, pages):
    whole_name = escape(str(corpora["conversation"].parent / "data.jsonl"))
    assert f'<span class=name title="{whole_name}">data.jsonl</span>' in pages["conversation"]


def test_the_share_of_each_role_is_told(corpora, pages):
    corpus = open_corpus(corpora["conversation"])
    codes = corpus.roles("train").read(0, corpus.train.num_tokens)
    for name, code in (("headers", NONE), ("user", USER), ("assistant", ASSISTANT)):
        assert f"{name} {100 * np.mean(codes == code):.1f}%" in pages["conversation"]
    assert "Whose words" not in pages["text"]


def test_a_preference_tells_whether_the_longer_answer_wins(corpora, pages):
    sizes = np.diff(open_corpus(corpora["preference"]).documents("train"))
    share = np.mean(sizes[0::2] > sizes[1::2])
    assert 0.5 < share < 1
    assert f"the longer one in {100 * share:.1f}% of the training pairs" in pages["preference"]
    assert "0, chosen" in pages["preference"]


def test_bars_are_as_high_as_their_shares():
    drawn = charts.bars(["a", "b", "c"], {"one": [0.5, 0.25, 0.0], "two": [0.1, 0.7, 0.2]}, "about", "x")
    found = re.findall(r'<rect class="s(\d)" x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', drawn)
    heights = {(int(series), float(x)): float(height) for series, x, _, height in found}
    full = (charts.HEIGHT - charts.TOP - charts.BOTTOM) / 0.8  # the axis ends at 80%
    assert [round(height / full, 2) for _, height in sorted(heights.items())] == [0.5, 0.25, 0.1, 0.7, 0.2]
    assert all(abs(float(y) + float(height) - (charts.HEIGHT - charts.BOTTOM)) < 0.11 for _, _, y, height in found)
    assert "80%" in drawn


def test_powers_are_short():
    assert [charts.short(number) for number in (0, 1, 512, 1024, 2**19, 2**20, 10, 1000, 10**6)] == [
        *("0", "1", "512", "1K", "512K", "1M", "10", "1K", "1M")
    ]


# ------------------------------------------------------------------------------------------------------------ command


def test_the_command_writes_the_page_where_it_is_told(corpora, tmp_path, capsys):
    out = tmp_path / "report.html"
    run(["data", "report", str(corpora["text"]), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert out.read_text(encoding="utf-8") == page("out", figures(open_corpus(corpora["text"])))


def test_what_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is no prepared directory"):
        run(["data", "report", str(tmp_path)])


@pytest.mark.parametrize("out", [".", "nowhere/report.html"])
def test_a_page_that_cannot_be_written_is_refused_first(corpora, tmp_path, monkeypatch, out):
    monkeypatch.setattr("lumina.data.reports.report_page.figures", None)
    with pytest.raises(UsageError, match="name a file to write"):
        run(["data", "report", str(corpora["text"]), "--out", str(tmp_path / out)])


def test_a_damaged_directory_is_told_of(tmp_path):
    path = prepared(tmp_path, map(text, range(60)))
    (path / "samples.json").write_text("{")
    with pytest.raises(DataError, match=r"samples\.json: cannot be read"):
        run(["data", "report", str(path)])
    (path / "train-documents.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-documents\.npy"):
        run(["data", "report", str(path)])
