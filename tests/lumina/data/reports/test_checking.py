import io
import json
import re
from collections import Counter

import pytest

from lumina.cli import run
from lumina.data.reading import readers
from lumina.data.recipe import Recipe
from lumina.data.records import Turn, place
from lumina.data.reports import checking, survey
from lumina.data.reports.checking import check, text, written
from lumina.errors import DataError, UsageError
from lumina.tokenizer import train_bpe

PROSE = (
    "The harbour was quiet when the first boats came back with the morning. People who had waited for them all night went down "
    "to the water and counted the lanterns. There were as many as there had been the day before, and that was what they wanted."
)


def write(path, records):
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def essay(i):
    """Different prose in each."""
    return {
        "text": f"{PROSE} In year {i} it rained on day {i * 7}, and {i % 13} more boats than {i * 31} came. So it was written."
    }


def chat(i, answer=None):
    answer = answer or f"There are {i * i} of them, as far as the oldest of us can remember it."
    return {"messages": [{"role": "user", "content": f"How many are {i} times {i}?"}, {"role": "assistant", "content": answer}]}


def of(found, name):
    return next(part["share"] for part in found["score"]["parts"] if part["name"] == name)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([PROSE, "How many are there? There are many."] * 3, 300)


# ------------------------------------------------------------------------------------------------------------- counts


def test_every_record_is_told_of(tmp_path):
    records = [
        *map(essay, range(30)),
        "{",
        {"nothing": 1},
        {"text": "  "},
        essay(3),
        essay(7),
        {"text": "short"},
        {"text": "a\ufffdb"},
    ]
    found = check([write(tmp_path / "a.jsonl", records)], Recipe(steps="length,exact", min_characters=4))
    assert found["records"] == {"read": 37, "kept": 33}
    assert found["rejects"]["counts"] == {"empty text": 1, "no text field": 1, "not JSON": 1}
    assert found["rejects"]["examples"][0]["name"].endswith("a.jsonl:31")
    assert found["steps"] == {"length": {"changed": 0, "removed": {"shorter than 4 characters": 1}}}
    assert found["duplicates"]["exact"]["documents"] == 2
    pairs = [
        (pair["name"].rpartition(":")[2], pair["as"].rpartition(":")[2]) for pair in found["duplicates"]["exact"]["examples"]
    ]
    assert pairs == [("34", "4"), ("35", "8")]
    sizes = [*sorted(len(essay(i)["text"]) for i in (*range(30), 3, 7)), 5]
    assert found["characters"]["sum"] == sum(sizes)
    assert (found["characters"]["min"], found["characters"]["max"]) == (5, sizes[-2])
    assert found["damaged"] == 0  # it was too short
    assert not found["unusable"]


def test_of_no_document_nothing_is_measured_and_no_rule_is_kept(tmp_path):
    found = check([write(tmp_path / "a.jsonl", ["{", {"text": " "}])], Recipe(), max_bad=1)
    told = text(found)
    assert "holds no document" in found["unusable"]
    assert not re.search("^ *(languages|quality) ", told, re.MULTILINE)
    assert "no rule is broken" not in told


def test_what_is_cut_ends_in_an_ellipsis(tmp_path):
    name = write(tmp_path / "a.jsonl", ["x" * 79 + "y" * 3, "short"])
    assert [each["sample"] for each in check([name], Recipe())["rejects"]["examples"]] == ["x" * 79 + "y...", "short"]


def test_the_score_is_the_weighted_mean_of_its_parts(tmp_path):
    records = [*map(essay, range(16)), essay(0), essay(1), {"text": "too short"}, {"text": "lost \ufffd"}, "{"]
    found = check([write(tmp_path / "a.jsonl", records)], Recipe(steps="none"))
    assert of(found, "usable") == pytest.approx(20 / 21)
    assert of(found, "not repeated") == pytest.approx(18 / 20)
    assert of(found, "of fair length") == pytest.approx(18 / 20)
    assert of(found, "undamaged") == pytest.approx(19 / 20)
    assert of(found, "well written") == pytest.approx(18 / 20)  # the two short ones are not
    parts = found["score"]["parts"]
    mean = sum(part["weight"] * part["share"] for part in parts) / sum(part["weight"] for part in parts)
    assert found["score"]["score"] == pytest.approx(100 * mean)
    told = text(found)
    assert f"{100 * mean:.1f} of 100" in told
    assert all(part["formula"] in told for part in parts)
    assert not any(part["name"] == "own answers" for part in parts)


def test_conversations_are_told_by_role_and_turn(tmp_path):
    records = [chat(i, "No." if i % 4 == 0 else None) for i in range(20)]
    records[5]["messages"] += [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    found = check([write(tmp_path / "a.jsonl", records)], Recipe(steps="none"))
    assert found["kinds"] == {"conversation": 20}
    turns = found["turns"]
    assert (turns["a_conversation"]["min"], turns["a_conversation"]["max"], turns["a_conversation"]["sum"]) == (2, 4, 42)
    said = Counter()
    for record in records:
        for message in record["messages"]:
            said[message["role"]] += len(message["content"])
    assert {role: about["characters"] for role, about in turns["roles"].items()} == said
    assert turns["roles"]["user"]["turns"] == 21
    assert turns["repeated_answers"] == 4  # "No." is given five times
    assert of(found, "own answers") == pytest.approx(16 / 20)


def test_near_duplicates_are_counted_beside_exact_ones(tmp_path):
    almost = {"text": essay(2)["text"].replace("So it was written", "So it was")}
    records = [
        essay(2),
        {"text": "Nothing at all like that, and of other things: ships, ropes, salt and weather."},
        almost,
        essay(2),
    ]
    path = write(tmp_path / "a.jsonl", records)
    found = check([path], Recipe(steps="none"))["duplicates"]
    assert found["exact"]["documents"] == 1
    assert found["near"]["documents"] == 1
    assert found["near"]["compared"] == 4
    assert [pair["name"].rpartition(":")[2] for pair in found["near"]["examples"]] == ["3"]


def test_near_duplicates_of_a_large_source_are_looked_for_in_its_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "COMPARED", 3)
    path = write(tmp_path / "a.jsonl", [essay(i) for i in range(8)])
    near = check([path], Recipe(steps="none"))["duplicates"]["near"]
    assert near["compared"] == 3
    assert "after the first 3; --steps near" in near["left_out"]
    assert check([path], Recipe(steps="near"))["duplicates"]["near"]["compared"] == 8


def test_units_change_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [essay(i % 17) for i in range(40)] + ["{"])
    whole = check([path], Recipe())
    monkeypatch.setattr(readers, "UNIT_BYTES", 900)
    assert len(readers.plan([path], Recipe()).units) > 5
    assert check([path], Recipe()) == whole


def test_a_limit_counts_records_good_and_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "UNIT_BYTES", 900)
    path = write(tmp_path / "a.jsonl", [essay(0), "{", essay(1), *["{"] * 500, essay(2)])
    found = check([path], Recipe(), limit=10)
    assert found["records"] == {"read": 10, "kept": 2}
    assert found["rejects"]["counts"] == {"not JSON": 8}
    assert "read (the first 10)" in text(found)


def test_a_large_source_is_sampled_by_its_texts_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "SAMPLE_DOCUMENTS", 10)
    records = [essay(i) for i in range(60)]
    found = check([write(tmp_path / "a.jsonl", records)], Recipe())
    assert found["sample"]["documents"] == 10
    lowest = sorted((place(record["text"]), record["text"]) for record in records)[:10]
    assert found["sample"]["characters"] == sum(len(said) for _, said in lowest)
    again = check([write(tmp_path / "b.jsonl", records[::-1])], Recipe())
    assert again["sample"] == found["sample"]


def test_a_missing_library_leaves_a_part_out_and_says_so(tmp_path, monkeypatch):
    def missing(module, what, extra="data"):
        raise UsageError(f"{what} needs {module}, which is not installed")

    for module in ("language", "quality", "duplicates"):
        monkeypatch.setattr(f"lumina.data.cleaning.{module}.need", missing)
    from lumina.data.cleaning.language import detect, language_model

    language_model.cache_clear()
    detect.cache_clear()
    found = check([write(tmp_path / "a.jsonl", [essay(i) for i in range(5)])], Recipe())
    assert not found["unusable"]
    assert {part["name"] for part in found["score"]["parts"]}.isdisjoint({"not similar", "one language"})
    assert "not looked at: --steps near needs rensa" in text(found)
    assert "not measured: --steps language needs py3langid" in text(found)


# ------------------------------------------------------------------------------------------------------------ samples


def test_samples_are_the_first_the_middle_and_one_by_hash(tmp_path):
    records = [essay(i) for i in range(9)]
    shown = check([write(tmp_path / "a.jsonl", records)], Recipe())["samples"]
    assert [each["which"] for each in shown] == ["first", "middle", "by hash"]
    assert [each["name"].rpartition(":")[2] for each in shown[:2]] == ["1", "5"]
    others = [record["text"] for i, record in enumerate(records) if i not in (0, 4)]
    assert shown[2]["text"] == min(others, key=place)


@pytest.mark.parametrize("template", ["lumina", "instruct", "chat"])
def test_a_sample_without_a_tokenizer_is_what_one_renders(tmp_path, tokenizer, template):
    path = write(tmp_path / "a.jsonl", [chat(i) for i in range(3)])
    plain, rendered = (check([path], Recipe(), template, which)["samples"] for which in (None, tokenizer))
    assert [each["text"] for each in plain] == [each["text"] for each in rendered]
    assert all(each["tokens"] > 10 for each in rendered)


def test_a_preference_is_shown_with_both_sides(tmp_path):
    asked = [{"role": "user", "content": "Which?"}]
    records = [
        {
            "chosen": [*asked, {"role": "assistant", "content": f"This {i}"}],
            "rejected": [*asked, {"role": "assistant", "content": "That"}],
        }
        for i in range(4)
    ]
    found = check([write(tmp_path / "a.jsonl", records)], Recipe())
    assert found["kinds"] == {"preference": 4}
    assert "[chosen]\n<|user|>Which?<|turn_end|><|assistant|>This 0" in found["samples"][0]["text"]
    assert "[rejected]\n<|user|>Which?<|turn_end|><|assistant|>That" in found["samples"][0]["text"]


def test_a_turn_is_written_as_its_template_says():
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    assert written(turns, "chatml") == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


# ------------------------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([essay(0)], "holds one document"),
        ([essay(0)] * 5, "holds 5 documents that are all equal"),
        (["{"], "1 of 1 records are bad, above --max-bad 0.5"),
        ([essay(0), essay(1), *["{"] * 3], "3 of 5 records are bad, above --max-bad 0.5"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}, essay(0), essay(1)], "preferences cannot be prepared together"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_after_it_was_told(tmp_path, capsys, records, why):
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError, match=why) as refusal:
        run(["data", "check", path])
    assert refusal.value.exit_code == 4
    assert "records" in capsys.readouterr().out


def test_more_bad_records_may_be_allowed(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [essay(0), essay(1), *["{"] * 3])
    run(["data", "check", path, "--max-bad", "0.6"])
    assert "3 not JSON" in capsys.readouterr().out


def test_json_holds_all_that_is_told(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.jsonl", [essay(i) for i in range(4)])
    run(["data", "check", path, "--json", "--steps", "control,length"])
    assert json.loads(capsys.readouterr().out) == check([path], Recipe(steps="control,length"))


def test_standard_input_is_checked(tmp_path, capsys, monkeypatch):
    content = "".join(json.dumps(essay(i)) + "\n" for i in range(4)).encode()
    monkeypatch.setattr(checking.sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    run(["data", "check", "-", "--format", "jsonl", "--json"])
    told = capsys.readouterr().out
    assert json.loads(told)["records"] == {"read": 4, "kept": 4}
    assert '"<stdin>:1"' in told
    assert "lumina-check" not in told


def test_what_a_text_holds_does_not_steer_the_terminal(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"text": f"\x1b[2J red {i} {PROSE}"} for i in range(3)])
    run(["data", "check", path, "--steps", "none"])
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\\x1b[2J red 0" in told


@pytest.mark.parametrize("flags", [["--limit", "-1"], ["--max-bad", "2"]])
def test_impossible_options_are_refused(tmp_path, flags):
    with pytest.raises(UsageError, match=flags[0]):
        run(["data", "check", write(tmp_path / "a.jsonl", [essay(0)]), *flags])
