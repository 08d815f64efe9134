"""The certificate's verdict, files and words, from measures written by hand."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import pytest

from lumina.runs.certificate import TITLES, as_json, page, terminal, verdict, write

CONTROL = {"applicable": True, "refused": True, "relative": 0.6, "needed": 1e-3, "precision": "float32"}
COMPARED = {
    "holds": True,
    "relative": 3e-7,
    "tolerance": 1e-5,
    "precision": "float32",
    "tokens": 40_896,
    "flips": 0,
    "decisions": 81_792,
    "control": CONTROL,
}
LAYER = {
    "layer": 1,
    "realised_capacity": 0.621,
    "auroc": 0.987,
    "f1": 0.942,
    "precision": None,
    "recall": 0.991,
    "agreement": 0.932,
}
LOSS = {"nats_per_token": 4.9472, "standard_error": 0.0414, "bits_per_byte": 2.789}
MEASURED = {
    "format": 1,
    "run": "runs/<script>alert(1)</script>",
    "step": 150,
    "checkpoint": "newest",
    "config": "c0ffee",
    "data": "da7a",
    "tokenizer": "70ce",
    "jax": "0.10.2",
    "device": "1 x cpu",
    "layers": ["dense", "moe+mod"],
    "rows": 64,
    "tokens": 16_384,
    "sequence_length": 256,
    "precision": "float32",
    "measures": {
        "cross_entropy": {
            "causal": LOSS,
            "top_k": LOSS | {"nats_per_token": 4.9485},
            "gap": {"nats_per_token": 0.0013, "standard_error": 0.0008},
        },
        "prefix": COMPARED,
        "suffix": copy.deepcopy(COMPARED),
        "noise": {
            "holds": True,
            "tokens": 16_384,
            "log_vocabulary": 6.931,
            "causal": {"nats_per_token": 8.751, "above_in_standard_errors": 106.3},
            "top_k": {"nats_per_token": 8.738, "above_in_standard_errors": 105.0},
        },
        "generation": {"holds": True, "prompts": 4, "tokens": 128, "different_tokens": 0, "relative": 0.0},
        "depth": {"label": "no figure of quality", "capacity": 0.5625, "layers": [LAYER]},
    },
}


def changed(*path, **values):
    """The measures with some of those at `path` changed."""
    certificate = copy.deepcopy(MEASURED)
    at = certificate["measures"]
    for name in path:
        at = at[name]
    at.update(values)
    return verdict(certificate)


def test_a_certificate_whose_measures_all_hold_is_causal():
    certificate = verdict(MEASURED)
    assert certificate["causal"]
    assert certificate["failed"] == []
    assert "causal: nothing that is quoted sees the future" in terminal(certificate)


@pytest.mark.parametrize("name", TITLES)
def test_each_measure_that_does_not_hold_is_named(name):
    certificate = changed(name, holds=False)
    assert not certificate["causal"]
    assert [each.partition(":")[0] for each in certificate["failed"]] == [TITLES[name]]
    for text in (terminal(certificate), page(certificate)):
        assert "NOT causal" in text
        assert f"{TITLES[name]}: " in text


@pytest.mark.parametrize("name", ["prefix", "suffix"])
def test_a_control_that_passes_is_a_failure_of_the_measure(name):
    certificate = changed(name, "control", refused=False, relative=1e-6)
    assert not certificate["causal"]
    assert certificate["failed"] == [
        f"{TITLES[name]}: the control was not refused (1.0e-06 of the largest logit), so the measure shows nothing"
    ]
    for text in (terminal(certificate), page(certificate)):
        assert "not shown to be causal" in text
        assert "NOT causal" not in text


def test_a_leak_is_one_even_where_a_control_was_not_refused():
    certificate = changed("prefix", control=CONTROL | {"refused": False}, holds=False)
    assert "NOT causal" in terminal(certificate)


def test_the_table_is_ascii_and_a_name_cannot_steer_the_terminal():
    text = terminal(verdict(MEASURED | {"run": "runs/\x1b[2Jx"}))
    assert text.isascii()
    assert "\x1b" not in text
    assert "runs/\\x1b[2Jx, step 150" in text


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path):
    write(tmp_path, verdict(MEASURED | {"run": "runs/\udcff"}))
    assert "\\udcff" in (tmp_path / "certificate.html").read_text()


def test_a_control_that_is_not_applicable_is_none():
    certificate = changed("prefix", control={"applicable": False, "why": "no depth routing: control not applicable"})
    assert certificate["causal"]
    assert "no depth routing: control not applicable" in terminal(certificate)


def test_a_measure_settled_in_float64_says_what_float32_found():
    text = terminal(
        changed("prefix", relative=2e-16, tolerance=1e-10, precision="float64", in_float32=COMPARED | {"relative": 2e-3})
    )
    assert "2.0e-16 of the largest logit (tolerance 1e-10, float64) over 40,896 tokens; in float32 2.0e-03" in text


def test_flips_of_depth_are_told():
    assert "3 of 81,792 depth decisions differ" in terminal(changed("suffix", holds=False, flips=3))


def test_why_float32_counts_is_told_with_the_choices_that_differ():
    why = "float32 counts: no choice of depth or of experts differed"
    certificate = changed("suffix", holds=False, expert_flips=2, expert_choices=163_584, settled=why)
    assert "2 of 163,584 choices of experts differ; float32 counts: no choice" in certificate["failed"][0]
    assert why in terminal(certificate)


def test_top_k_figures_are_labelled_as_controls_wherever_they_stand():
    for line in terminal(verdict(MEASURED)).splitlines():
        if "4.9485" in line or "8.738" in line:
            assert line.strip().startswith("control: top-k")
    assert "no figure of quality" in page(verdict(MEASURED))


def test_an_undefined_ratio_is_a_dash():
    assert re.search(r"0\.942 +- +0\.991", terminal(verdict(MEASURED)))


def test_a_model_without_depth_routing_has_no_table_of_it():
    certificate = copy.deepcopy(MEASURED)
    certificate["measures"]["depth"] = None
    assert "AUROC" in terminal(verdict(MEASURED))
    assert "AUROC" not in terminal(verdict(certificate)) + page(verdict(certificate))


class Checked(HTMLParser):
    """Every tag closed in order; collects names of tags, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_what_it_quotes_is_text():
    text = page(changed("noise", holds=False))
    checked = Checked(text)
    assert not {"script", "link", "img", "iframe"} & set(checked.tags)
    assert "<script>alert(1)</script>" in checked.text
    assert "//" not in text
    assert "url(" not in text
    assert 'name="viewport"' in text
    assert "color-scheme: light dark" in text
    for shown in ("4.9472", "0.987", "c0ffee", "da7a", "128 tokens after 4 prompts"):
        assert shown in checked.text


def test_numbers_that_are_not_finite_are_null():
    certificate = changed("prefix", relative=math.nan, holds=False)
    assert json.loads(as_json(certificate))["measures"]["prefix"]["relative"] is None
    assert "nan of the largest logit" in page(certificate)


def test_the_files_are_replaced_whole_or_stay(tmp_path, monkeypatch):
    write(tmp_path, verdict(MEASURED))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"certificate.json", "certificate.html"}
    assert json.loads(before["certificate.json"]) == json.loads(as_json(verdict(MEASURED)))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, changed("noise", holds=False))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
