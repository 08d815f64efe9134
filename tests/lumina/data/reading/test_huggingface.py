import json

import pytest

from lumina.data.reading import huggingface, readers
from lumina.data.reading.huggingface import HubDataset, parse
from lumina.data.reading.readers import plan, read
from lumina.data.recipe import Recipe
from lumina.errors import DataError

datasets = pytest.importorskip("datasets")


def texts_of(spec):
    planned = plan([spec], Recipe())
    return planned.formats, [record.text for unit in planned.units for record in read(unit, Recipe())]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories as `datasets` writes them: one data set, in three shards, and of two splits."""
    top = tmp_path_factory.mktemp("saved")
    whole = datasets.Dataset.from_list([{"text": f"text {n}", "label": n} for n in range(50)])
    datasets.disable_progress_bars()
    whole.save_to_disk(str(top / "shards"), num_shards=3)
    whole.select([7, 3]).save_to_disk(str(top / "chosen"))
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(str(top / "splits"))
    datasets.DatasetDict(one=whole, two=whole).save_to_disk(str(top / "unlike"))
    (top / "loose" / "data").mkdir(parents=True)
    whole.to_parquet(str(top / "loose" / "data" / "train-00000-of-00001.parquet"))
    whole.select([2]).to_parquet(str(top / "loose" / "data" / "test-00000-of-00001.parquet"))
    (top / "void").mkdir()
    return top


def test_what_save_to_disk_wrote_is_read_in_the_order_of_its_shards(saved, monkeypatch):
    expected = [f"text {n}" for n in range(50)]
    formats, texts = texts_of(f"hf:{saved}/shards")
    assert texts == expected == list(datasets.load_from_disk(str(saved / "shards"))["text"])
    assert formats == [f"hf:{saved}/shards: 3 files: arrow, texts (text)"]
    monkeypatch.setattr(readers, "UNIT_BYTES", 1)
    assert texts_of(f"hf:{saved}/shards")[1] == expected
    assert texts_of(f"hf:{saved}/chosen")[1] == ["text 7", "text 3"]


@pytest.mark.parametrize(("spec", "count"), [("splits", 50), ("splits:test", 1), ("loose", 50), ("loose:test", 1)])
def test_a_split_is_train_or_the_one_that_is_named_and_the_others_are_told_of(saved, spec, count):
    formats, texts = texts_of(f"hf:{saved}/{spec}")
    assert len(texts) == count
    assert formats[-1] == f"hf:{saved}/{spec}: split {'test' if count == 1 else 'train'} of test, train"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("splits:dev", "has no split dev; it has test, train: name one, such as hf:.*/splits:test"),
        ("unlike", "has no split train; it has one, two: name one"),
        ("void", "holds no data set; name what Dataset.save_to_disk wrote"),
        ("outside", r"outside: names a file outside of it, \.\./secret"),
        ("broken", "state.json: is not JSON; save the data set again"),
    ],
)
def test_a_directory_that_is_not_read_says_why(saved, spec, says):
    for name, content in (("outside", json.dumps({"_data_files": [{"filename": "../secret"}]})), ("broken", "{")):
        (saved / name).mkdir(exist_ok=True)
        (saved / name / "state.json").write_text(content)
    with pytest.raises(DataError, match=says):
        plan([f"hf:{saved}/{spec}"], Recipe())


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("hf:gsm8k@abc", HubDataset("gsm8k", "abc", "", "train")),
        ("hf:openai/gsm8k@v1.0:main", HubDataset("openai/gsm8k", "v1.0", "main", "train")),
        ("hf:openai/gsm8k@abc:main:test", HubDataset("openai/gsm8k", "abc", "main", "test")),
        ("hf:openai/gsm8k@abc::test", HubDataset("openai/gsm8k", "abc", "", "test")),
    ],
)
def test_a_name_has_a_revision_and_perhaps_a_config_and_a_split(spec, found):
    assert parse(spec) == found
    assert parse(str(found)) == found


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hf:openai/gsm8k", "no such directory, and as a data set of the Hub it needs a revision.*hf:openai/gsm8k@COMMIT"),
        ("hf:./missing", "no such directory"),
        ("hf:a b@c", "nor a data set's name"),
        ("hf:", "nor a data set's name"),
    ],
)
def test_a_name_without_a_revision_is_refused(spec, says):
    with pytest.raises(DataError, match=says):
        plan([spec], Recipe())


def test_without_network_the_hub_is_refused_in_one_line_with_the_way_around(monkeypatch):
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set; .*Dataset\.save_to_disk writes a directory .* hf:DIR"):
        plan(["hf:openai/gsm8k@main"], Recipe())
    import huggingface_hub

    def fail(*arguments, **options):
        raise ConnectionError("no route\nto the Hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(DataError, match="cannot be read from the Hub: no route; where there is network") as refusal:
        plan(["hf:openai/gsm8k@main"], Recipe())
    assert "\n" not in str(refusal.value)


def test_the_shards_of_a_stream_are_together_all_of_it(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.jsonl").write_text("".join(f'{{"text": "{n} {row}"}}\n' for row in range(4)))
    stream = datasets.load_dataset(
        "json",
        data_files=[str(tmp_path / f"{n}.jsonl") for n in range(3)],
        split="train",
        streaming=True,
        cache_dir=str(tmp_path),
    )
    assert stream.num_shards == 3
    rows = [row for shard in range(3) for row in huggingface.named_rows(stream, "hf:name", shard, 3)]
    assert rows == [(f"hf:name[{n}][{row}]", {"text": f"{n} {row}"}) for n in range(3) for row in range(4)]
