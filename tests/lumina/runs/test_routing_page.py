"""`lumina routing`: what the page and the JSON hold, that nothing in them is markup, and how it refuses."""

import importlib.util
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lumina import cli
from lumina.config import Config, MoDConfig, ModelConfig, MoEConfig, save, validate
from lumina.errors import CheckpointError, DataError, UsageError
from lumina.runs import page as page_module
from lumina.runs import routing_page, routing_plots
from lumina.runs.page import Shown, visible
from lumina.runs.routing import history_of
from lumina.runs.routing_page import page
from lumina.runs.routing_plots import draw
from lumina.runs.routing_text import HeldOut

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="the extra plots is not installed")
KINDS = {"moe": ("all", "none"), "mod": ("none", "all"), "hybrid": ("1", "all"), "dense": ("none", "none")}
PIECES = [
    b"<script>",
    b"alert(1)",
    b"</pre>",
    b"&amp;",
    b" x",
    b"\n",
    b"\xe2\x86",
    b"\x92",
    b"\x1b[2J",
    "\u202e".encode(),
    b"\"'",
]


class Tokenizer:
    """Pieces as above, and a control token after them."""

    def decode_bytes(self, ids):
        return b"".join([*PIECES, b""][i] for i in ids)

    def decode(self, ids):
        return "".join("<|document_end|>" if i == len(PIECES) else PIECES[i].decode("utf-8", "replace") for i in ids)


class Feeding:
    """Text as soon as its bytes are whole, as the real decoder gives it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.held = tokenizer, b""

    def feed(self, token):
        if token == len(PIECES):
            return "<|document_end|>"
        self.held += PIECES[token]
        try:
            text, self.held = self.held.decode(), b""
        except UnicodeDecodeError:
            return ""
        return text


def config(kind="hybrid", **moe):
    experts, depth = KINDS[kind]
    model = ModelConfig(moe=MoEConfig(pattern=experts, num_experts=4, **moe), mod=MoDConfig(pattern=depth, capacity=0.5))
    return validate(Config(model=model))


def history(cfg, steps=6):
    moe, mod = (sum(1 for kind in kinds if kind) for kinds in _layers(cfg))
    A = cfg.model.moe.num_experts + cfg.model.moe.noop_experts
    record = {
        "kind": "train",
        "moe_load": [[1 / A] * A] * moe,
        "moe_dropped": [0.01] * moe,
        "moe_entropy": [0.8] * moe,
        "mod_causal_capacity": [0.5] * mod,
        "mod_agreement": [0.9] * mod,
    }
    return [{"step": 10 * (i + 1), **record} for i in range(steps)]


def _layers(cfg):
    from lumina.architecture import layer_kinds

    kinds = layer_kinds(cfg.model)
    return [kind.startswith("moe") for kind in kinds], [kind.endswith("mod") for kind in kinds]


def held_out(cfg, T=24):
    moe, mod = (sum(flags) for flags in _layers(cfg))
    tokens_RT = np.arange(8 * T).reshape(8, T) % (len(PIECES) + 1)
    experts = np.stack([tokens_RT % cfg.model.moe.num_experts] * moe)[..., None] if moe else np.zeros((0, 8, T, 1), int)
    taken = np.stack([tokens_RT % 2 == layer for layer in range(mod)]) if mod else np.zeros((0, 8, T), bool)
    return HeldOut(60, tokens_RT, np.ones((8, T), bool), experts, taken)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Small plots, and a decoder for the tokenizer above."""
    monkeypatch.setattr(routing_plots, "DOTS", 30)
    monkeypatch.setattr(page_module, "StreamDecoder", Feeding)


@pytest.fixture
def run(tmp_path):
    """Makes a run directory with a config and metrics."""

    def make(kind="hybrid", steps=6, name="run"):
        directory = tmp_path / name
        directory.mkdir()
        cfg = config(kind)
        save(cfg, directory / "config.json")
        lines = [json.dumps(record) + "\n" for record in history(cfg, steps)]
        (directory / "metrics.jsonl").write_text("".join(lines) + '{"kind": "train", "st')
        return directory

    return make


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def made(kind="hybrid", name="run", images=None, **changes):
    cfg = config(kind)
    about = {"held_out": held_out(cfg), "tokenizer": Tokenizer(), "missing": ""} | changes
    return page(name, history_of(history(cfg), cfg), cfg, images or {}, **about)


# -------------------------------------------------------------------------------------------------------------- page


def test_neither_tokens_nor_names_become_markup():
    found = Tags(text := made(name='<script>x</script>"'))
    assert "script" not in found.tags
    assert "<script>" in "".join(found.text)  # it is there, as text
    assert text.count("</pre>") == 1
    assert "&amp;amp;" in text


def test_what_is_missing_is_escaped_too():
    assert "<b>" not in made(held_out=None, tokenizer=None, missing="<b>gone</b>")


def test_the_page_asks_no_other_machine_for_anything():
    text = made(images={"load": [b"light", b"dark"]})
    assert re.findall(r"https?:", text) == []
    assert "default-src 'none'; img-src data:" in text


def test_plots_are_in_the_page_light_and_dark():
    text = made(images={"load": [b"light", b"dark"]})
    assert 'srcset="data:image/png;base64,ZGFyaw=="' in text
    assert 'src="data:image/png;base64,bGlnaHQ="' in text


@pytest.mark.parametrize(("kind", "there", "absent"), [("moe", "Experts", "Depth"), ("mod", "Depth", "Experts")])
def test_a_run_of_one_kind_of_router_has_no_section_of_the_other(kind, there, absent):
    text = made(kind)
    assert f"<h2>{there}</h2>" in text
    assert f"<h2>{absent}</h2>" not in text


def test_an_expert_is_shown_with_its_share_and_its_tokens():
    rows = re.findall(r"<tr><th>(\d)</th><td class=share>(.*?)%</td><td>(.*?)</td></tr>", made("moe"))
    assert [row[0] for row in rows] == ["0", "1", "2", "3"] * 2
    assert all(float(row[1]) == pytest.approx(25, abs=0.1) for row in rows)
    assert "&lt;script&gt;" in rows[0][2]  # token 0 goes to expert 0
    assert "&lt;script&gt;" not in "".join(row[2] for row in rows[1:4])


def test_no_op_alternatives_are_named_so():
    cfg = config("moe", noop_experts=2)
    text = page("run", history_of(history(cfg), cfg), cfg, {}, held_out(cfg), Tokenizer(), "")
    assert "<th>no-op 1</th>" in text
    assert "no token" in text


def test_tokens_that_take_and_that_skip_a_layer_are_told_apart():
    (take, skip) = re.findall(r"<tr><th>(?:take|skip)</th><td>(.*?)</td></tr>", made("mod"))[:2]
    assert "&lt;script&gt;" in take  # token 0 takes layer 0
    assert "alert(1)" in skip


def test_the_sample_shades_each_token_by_the_layers_that_it_takes():
    sample = re.search(r"<pre class=sample>(.*?)</pre>", made("mod"), re.DOTALL)[1]
    assert sample.startswith('<span class=d1 title="takes layers: 0">&lt;script&gt;</span>')
    assert '<span class=d1 title="takes layers: 1">alert(1)</span>' in sample
    assert 'title="takes layers: 1">\u2192</span>' in sample  # of tokens 6 and 7: as the last one


def test_text_shows_what_cannot_be_seen():
    assert visible(" a\tb\n") == "␣a⇥b↵"
    assert visible("\x1b[2J\u202e\u200b") == "\\x1b[2J\\u202e\\u200b"
    shown = Shown(Tokenizer())
    assert shown.token(6) == "\\xe2\\x86"  # bytes that are no text by themselves
    assert shown.token(len(PIECES)) == "&lt;|document_end|&gt;"


def test_a_character_of_several_tokens_appears_with_the_last():
    shown = Shown(Tokenizer())
    newline = "<span class=faint>↵</span>\n"
    assert list(shown.text(np.array([4, 6, 7, 5]))) == [(" x", 0), ("\u2192", 2), (newline, 3)]


def test_a_page_without_held_out_text_says_why():
    assert "not looked at: no whole checkpoint" in made(held_out=None, tokenizer=None, missing="no whole checkpoint")


# ------------------------------------------------------------------------------------------------------------- plots


@needs_matplotlib
@pytest.mark.parametrize("kind", ["moe", "mod", "hybrid"])
@pytest.mark.parametrize("steps", [0, 1, 6])
def test_plots_are_drawn_of_what_there_is(tmp_path, kind, steps):
    cfg = config(kind)
    position = None if kind == "moe" else np.full((2, 8), 0.5)
    names = draw(tmp_path, history_of(history(cfg, steps), cfg), cfg, position)
    experts, depth = (["load", "experts"] if steps else []), (["depth"] if steps else []) + ["position"]
    assert names == {"moe": experts, "mod": depth, "hybrid": experts + depth}[kind]
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}-dark.png").read_bytes() != (tmp_path / f"{name}.png").read_bytes()


@needs_matplotlib
def test_plots_do_not_change_how_others_plot(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    cfg = config()
    draw(tmp_path, history_of(history(cfg), cfg), cfg, None)
    assert dict(matplotlib.rcParams) == before


# ----------------------------------------------------------------------------------------------------------- command


def never(*about):
    raise AssertionError("held-out text was looked at")


def test_json_holds_history_verdicts_and_advice_and_makes_no_page(run, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # nor does it need matplotlib
    directory = run()
    cli.run(["routing", str(directory), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["log_points"], found["last_step"]) == (6, 60)
    assert found["verdicts"] == [{"kind": "healthy", "layers": [0, 1], "says": found["advice"][0]}]
    assert sorted(found["layers"][0]) == ["agreement", "causal_capacity", "layer"]
    assert not (directory / "routing").exists()


def test_a_dense_run_has_nothing_to_show(run):
    with pytest.raises(UsageError, match="a dense run, no layer of it routes"):
        cli.run(["routing", str(run("dense"))])


@pytest.mark.parametrize(
    ("arguments", "says"), [(["nowhere"], "no such run"), (["run", "--rows=-1"], "--rows = -1: must be at least 0")]
)
def test_mistakes_are_refused(arguments, says):
    with pytest.raises(UsageError, match=says):
        cli.run(["routing", *arguments])


def test_without_matplotlib_the_extra_is_named_before_anything_expensive(run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(routing_page, "_held_out", never)
    with pytest.raises(UsageError, match=r"lumina\[plots\]"):
        cli.run(["routing", str(run())])


@needs_matplotlib
def test_the_page_of_a_run_without_checkpoints_or_data_says_so(run, capsys, monkeypatch):
    def gone(*about):
        raise DataError("data.source = 'x': <gone>")

    monkeypatch.setattr(routing_page, "corpora_of", gone)
    directory = run()
    cli.run(["routing", str(directory)])
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(directory / "routing" / "index.html")
    assert "held-out text was not looked at" in said
    assert "&lt;gone&gt;" in (directory / "routing" / "index.html").read_text(encoding="utf-8")
    assert (directory / "routing" / "load.png").is_file()


@needs_matplotlib
def test_no_rows_need_neither_data_nor_checkpoint(run, tmp_path, monkeypatch):
    monkeypatch.setattr(routing_page, "corpora_of", never)
    cli.run(["routing", str(run(name="<i>a")), "--rows=0", "--out", str(tmp_path / "deep" / "out")])
    text = (tmp_path / "deep" / "out" / "index.html").read_text(encoding="utf-8")
    assert "<title>Routing of &lt;i&gt;a</title>" in text


def test_a_best_checkpoint_that_is_missing_is_an_error(monkeypatch, tmp_path):
    from types import SimpleNamespace

    corpus = SimpleNamespace(manifest={}, fingerprint="x", tokenizer=None)
    monkeypatch.setattr(routing_page, "corpora_of", lambda *about: {"stdlib": corpus})
    run = SimpleNamespace(check_same_data=lambda data: None, tokenizer=tmp_path / "tokenizer")

    def broken(*about):
        raise CheckpointError("no whole checkpoint")

    assert routing_page._held_out(run, Config(), 4, False, broken) == (None, None, "no whole checkpoint")
    with pytest.raises(CheckpointError):
        routing_page._held_out(run, Config(), 4, True, broken)


@needs_matplotlib
def test_a_place_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file.*choose another --out"):
        cli.run(["routing", str(run()), "--rows=0", "--out", str(tmp_path / "file")])
