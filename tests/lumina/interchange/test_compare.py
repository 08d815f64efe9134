"""`lumina compare` without a backend: its arithmetic beside slow loops, its rows beside those of training, and its refusals.

N tokens, T positions, V vocabulary.
"""

import json
import math

import numpy as np
import pytest

from lumina import cli
from lumina.data.rows import Batches, Rows
from lumina.errors import CheckpointError, ConfigError, DataError, UsageError
from lumina.interchange import comparing
from lumina.interchange.compare import NEAR_TIE, TOLERANCE, Distance, Routing, verdict, weights_that_differ
from lumina.interchange.side import Pass, Side, one_document
from lumina.runs.console import Console
from lumina.tokenizer import train_bpe
from tests.lumina.interchange.families import model_config
from tests.lumina.interchange.runs import run_of, tokenizer

QUIET = Console(0, None)
N, V, K = 37, 23, 4
END = 7


def logits(seed, rows=N, columns=V):
    return 3 * np.random.default_rng(seed).standard_normal((rows, columns))


def nothing_saved(*pair):
    pass


# --------------------------------------------------------------------------------------------------------- arithmetic


def slowly(a_NV, b_NV, targets_N):
    """The same figures, a token at a time."""

    def probabilities(x_V):
        whole = math.fsum(math.exp(x) for x in x_V)
        return [math.exp(x) / whole for x in x_V]

    def likeliest(x_V):
        return sorted(range(len(x_V)), key=lambda i: -x_V[i])[:K]

    found = {"difference": [], "kl": [], "overlap": 0, "same": 0, "loss": [0.0, 0.0], "largest": 0.0}
    for a_V, b_V, target in zip(a_NV.tolist(), b_NV.tolist(), targets_N.tolist(), strict=True):
        p, q = probabilities(a_V), probabilities(b_V)
        found["difference"].append(max(abs(x - y) for x, y in zip(a_V, b_V, strict=True)))
        found["kl"].append(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        found["overlap"] += len(set(likeliest(a_V)) & set(likeliest(b_V)))
        found["same"] += likeliest(a_V)[0] == likeliest(b_V)[0]
        found["loss"][0] -= math.log(p[target])
        found["loss"][1] -= math.log(q[target])
        found["largest"] = max(found["largest"], *map(abs, a_V + b_V))
    return found


@pytest.mark.parametrize("step", [1, 10, N])
def test_figures_are_those_of_a_loop_over_tokens_in_however_many_parts_they_come(step):
    a_NV = logits(0)
    b_NV = a_NV + np.where(a_NV > 0, 0.5, 0.1) * logits(1)
    targets_N = np.random.default_rng(2).integers(0, V, N)
    distance = Distance(K)
    for start in range(0, N, step):  # two rows, the first of 20 tokens
        for row, first, last in ((0, start, min(start + step, 20)), (1, max(start, 20), start + step)):
            part = slice(first, min(last, N))
            if part.start < part.stop:
                none = np.zeros(part.stop - part.start, bool)
                distance.add((row, part.start - 20 * row), a_NV[part], b_NV[part], targets_N[part], none)
    found, expected = distance.figures(V, 50), slowly(a_NV, b_NV, targets_N)

    def at(values):
        place = values.index(max(values))
        return {"row": int(place >= 20), "position": place % 20}

    assert found["tokens"] == N
    assert found["logits"]["largest_logit"] == expected["largest"]
    assert found["logits"]["largest_difference"] == pytest.approx(max(expected["difference"]) / expected["largest"], rel=1e-12)
    assert found["logits"]["where"] == at(expected["difference"])
    assert found["kl"]["mean"] == pytest.approx(sum(expected["kl"]) / N, rel=1e-9)
    assert found["kl"]["max"] == pytest.approx(max(expected["kl"]), rel=1e-9)
    assert found["kl"]["where"] == at(expected["kl"])
    assert found["top"] == {"k": K, "overlap": expected["overlap"] / (N * K)}
    assert 0.3 < found["top"]["overlap"] < 1
    assert found["same_likeliest"] == expected["same"] / N
    for side, total in zip("ab", expected["loss"], strict=True):
        assert found["loss"][side]["nats_per_token"] == pytest.approx(total / N, rel=1e-12)
        assert found["loss"][side]["bits_per_byte"] == pytest.approx(total / math.log(2) / 50, rel=1e-12)
    assert found["loss"]["a"] != found["loss"]["b"]


def test_kl_is_of_a_from_b_and_not_the_other_way_round():
    a_NV, b_NV = np.array([[9.0, 0.0, 0.0]]), np.zeros((1, 3))
    kl = []
    for pair in ((a_NV, b_NV), (b_NV, a_NV)):
        distance = Distance(1)
        distance.add((0, 0), *pair, np.zeros(1, int), np.zeros(1, bool))
        kl.append(distance.figures(3, 1)["kl"]["mean"])
    share = math.exp(9) / (math.exp(9) + 2)
    assert kl[0] == pytest.approx(share * math.log(3 * share) + (1 - share) * math.log(3 * (1 - share) / 2))
    assert kl[1] == pytest.approx(-(math.log(share) + 2 * math.log((1 - share) / 2)) / 3 - math.log(3))


def test_what_a_flip_may_have_reached_is_apart_and_a_k_above_the_vocabulary_is_all_of_it():
    a_NV, reached_N = logits(0), np.arange(N) >= 30
    b_NV = a_NV + np.where(reached_N, 1.0, 1e-6)[:, None]
    distance = Distance(V + 5)
    distance.add((0, 0), a_NV, b_NV, np.zeros(N, int), reached_N)
    found = distance.figures(V, 1)
    assert found["logits"]["largest_difference"] * found["logits"]["largest_logit"] == pytest.approx(1.0)
    assert found["logits"]["largest_difference_before_flips"] * found["logits"]["largest_logit"] == pytest.approx(1e-6)
    assert found["top"] == {"k": V, "overlap": 1.0}


def test_weights_differ_that_only_one_has():
    assert weights_that_differ({"x": "1", "y": "2", "z": "3"}, {"x": "1", "y": "9", "w": "3"}) == ["y", "z", "w"]
    assert weights_that_differ({"x": "1"}, {"x": "1"}) == []


# ------------------------------------------------------------------------------------------------------------ routing

KINDS = ["moe", "dense", "moe+mod"]
T = 12


def told(seed=0):
    """What a model of KINDS might tell of a row; no decision is near a tie."""
    draw = np.random.default_rng(seed)
    logit_LT = draw.choice([-1.0, 1.0], (1, T)) * draw.uniform(0.5, 2, (1, T))
    experts_LTk = np.stack([draw.permutation(5)[:2] for _ in range(2 * T)]).reshape(2, T, 2)
    return {
        "logit_LT": logit_LT,
        "taken_LT": logit_LT > 0,
        "experts_LTk": experts_LTk,
        "margin_LT": draw.uniform(0.1, 1, (2, T)),
    }


def row(segments=(0,) * T):
    whole = one_document(np.arange(T))
    return whole._replace(segments_T=np.array(segments, np.int32))


def flip_experts(of, layer, position, margin):
    of["experts_LTk"][layer, position] = (of["experts_LTk"][layer, position] + 1) % 5
    of["margin_LT"][layer, position] = margin


def test_the_order_in_which_a_token_took_its_experts_is_no_flip():
    a, b = told(), told()
    b["experts_LTk"] = b["experts_LTk"][:, :, ::-1]
    a["margin_LT"][0, 3] = b["margin_LT"][0, 3] = np.inf
    routing = Routing(KINDS)
    assert not routing.add(0, row(), a, b).any()
    found = routing.found()
    assert (found["decisions"], found["flips"], found["first_layer_with_a_flip"]) == (3 * T, 0, None)
    assert [(stage["layer"], stage["of"]) for stage in found["stages"]] == [(0, "experts"), (2, "depth"), (2, "experts")]
    assert all(stage["largest_change"] == 0 for stage in found["stages"])


def test_flips_that_another_may_have_caused_are_no_first_flips():
    a, b = told(), told()
    b["taken_LT"][0, 4] ^= True
    b["logit_LT"][0, 4] *= -0.1  # the margin is the larger of the two
    flip_experts(b, 1, 3, 0.02)  # before it in the row
    flip_experts(b, 1, 4, 0.9)  # where it is
    flip_experts(b, 1, 9, 0.9)  # after it
    routing = Routing(KINDS)
    reached_T = routing.add(5, row(), a, b)
    assert reached_T.tolist() == [t >= 3 for t in range(T)]
    found = routing.found()
    assert (found["flips"], found["first_layer_with_a_flip"]) == (4, 2)
    depth, experts = found["stages"][1:]
    largest = max(np.abs(a["logit_LT"]).max(), np.abs(b["logit_LT"]).max())
    expected = max(abs(a["logit_LT"][0, 4]), abs(b["logit_LT"][0, 4])) / largest
    assert depth["first_flips"] == 1
    assert depth["shown"] == [{"row": 5, "position": 4, "margin": pytest.approx(expected)}]
    assert (experts["flips"], experts["first_flips"]) == (3, 1)
    assert experts["shown"][0]["position"] == 3
    assert experts["largest_margin"] == max(0.02, a["margin_LT"][1, 3])
    assert found["largest_margin_of_a_first_flip"] == pytest.approx(max(expected, a["margin_LT"][1, 3]))


def test_a_flip_reaches_no_other_document_of_its_row():
    a, b = told(), told()
    flip_experts(b, 0, 2, 0.5)
    flip_experts(b, 1, 8, 0.25)
    routing = Routing(KINDS)
    reached_T = routing.add(0, row([0] * 5 + [1] * 7), a, b)
    assert np.flatnonzero(reached_T).tolist() == [2, 3, 4, 8, 9, 10, 11]
    assert [stage["first_flips"] for stage in routing.found()["stages"]] == [1, 0, 1]


def test_what_a_router_sees_counts_where_nothing_flipped():
    a, b = told(), told()
    b["margin_LT"][1, 7] += 0.03
    flip_experts(b, 1, 9, 5.0)
    b["logit_LT"][0, 2] *= 1.01
    routing = Routing(KINDS)
    routing.add(0, row(), a, b)
    depth, experts = routing.found()["stages"][1:]
    assert experts["largest_change"] == pytest.approx(0.03)
    assert depth["largest_change"] == pytest.approx(0.01 * abs(a["logit_LT"][0, 2]) / np.abs(b["logit_LT"]).max())


# ------------------------------------------------------------------------------------------------------------ verdict


def figures(difference, before=None, weights=None, finite=True, **stages):
    """Of two layers with experts; stages as layer_1=(flips, margin, change)."""
    made = []
    for layer in range(2):
        flips, margin, change = stages.get(f"layer_{layer}", (0, 0.0, 0.0))
        made.append({"layer": layer, "of": "experts", "flips": flips, "largest_margin": margin, "largest_change": change})
    flipped = [stage for stage in made if stage["flips"]]
    routing = {
        "flips": sum(stage["flips"] for stage in made),
        "largest_margin_of_a_first_flip": max(stage["largest_margin"] for stage in made),
        "first_layer_with_a_flip": flipped[0]["layer"] if flipped else None,
        "stages": made,
    }
    apart = {"largest_difference": difference, "largest_difference_before_flips": difference if before is None else before}
    return {"finite": finite, "logits": apart, "routing": routing, "weights": weights}


SAME = {"tensors": 9, "differ": 0, "first": None}
OTHER = {"tensors": 9, "differ": 2, "first": "blocks.3.moe.router"}
HEAD = {"tensors": 9, "differ": 1, "first": "final_norm.scale"}


@pytest.mark.parametrize(
    ("found", "equal", "says"),
    [
        (figures(0.0), True, "equal, bit for bit"),
        (figures(TOLERANCE), True, "equal within float32 rounding"),
        (figures(2 * TOLERANCE), False, "differ, and nothing tells in which layer"),
        (
            figures(0.1, TOLERANCE, layer_1=(3, NEAR_TIE, 0.0)),
            True,
            "up to near-ties that fall either way, the first in layer 1",
        ),
        (figures(0.1, 2 * TOLERANCE, SAME, layer_1=(3, NEAR_TIE, 0.0)), False, "nothing tells in which layer; the weights are"),
        (
            figures(0.1, 0.0, SAME, layer_1=(3, 2 * NEAR_TIE, 0.0)),
            False,
            "from layer 1 on: its experts routing decides otherwise",
        ),
        (figures(1e-7, layer_1=(3, 0.5, 0.0)), False, "differ from layer 1 on"),
        (figures(0.1, None, SAME, layer_0=(0, 0.0, 0.01)), False, "from layer 0 on, or before: its experts router sees"),
        (figures(0.1, None, OTHER, layer_0=(0, 0.0, 0.01)), False, "from layer 3 on: blocks.3.moe.router is another"),
        (figures(0.1, None, HEAD), False, "differ from final_norm.scale on"),
        (figures(0.0, finite=False), False, "not finite"),
    ],
)
def test_the_verdict(found, equal, says):
    assert verdict(found)[0] is equal
    assert says in verdict(found)[1]


# --------------------------------------------------------------------------------------------------------------- rows


class Stream:
    name = "held_out"

    def __init__(self, ids):
        self.ids, self.num_tokens = np.array(ids, np.int32), len(ids)

    def read(self, start, stop):
        return self.ids[start:stop]


DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 8, 9, 10, 11, 12, 13, 14], [15, 16]]


def test_rows_are_those_of_training_and_what_is_left():
    ended = [[*document, END] for document in DOCUMENTS]
    found = list(comparing.cut(iter(ended), 6, END, apart=False))
    stream = [token for document in ended for token in document]
    batches = list(Batches(Rows(Stream(stream), 6, END), 1, 0, shuffle=False).evaluation())
    assert len(found) == len(batches) + 1
    for each, batch in zip(found, batches, strict=False):
        for array_T, name in zip(each, ("inputs", "targets", "segments", "positions"), strict=True):
            assert array_T.tolist() == batch[name][0].tolist(), name
    assert [*found[-1].inputs_T, found[-1].targets_T[-1]] == stream[6 * len(batches) :]


def test_rows_of_one_document_each_join_no_two():
    found = list(comparing.cut(iter(DOCUMENTS), 4, END, apart=True))
    assert [each.inputs_T.tolist() for each in found] == [[1, 2], [5, 6, 8, 9], [10, 11, 12, 13], [15]]
    assert [each.targets_T.tolist() for each in found] == [[2, 3], [6, 8, 9, 10], [11, 12, 13, 14], [16]]
    assert all(not each.segments_T.any() for each in found)
    assert all(each.positions_T.tolist() == list(range(len(each.positions_T))) for each in found)


# -------------------------------------------------------------------------------------------------- sides from tables


class Bigrams(Side):
    """Logits by the token alone."""

    def __init__(self, name, logits_VV, of=None, positions=24):
        super().__init__(name, of or tokenizer(), positions, logits_VV.shape[1])
        self.logits_VV = logits_VV.astype(np.float32)

    def read(self, row):
        return Pass(lambda start, stop: self.logits_VV[row.inputs_T[start:stop]], {})

    def continuation(self, prompt_T, count):
        found = [int(prompt_T[-1])]
        for _ in range(count):
            found.append(int(self.logits_VV[found[-1]].argmax()))
        return found[1:]


def table(seed=0, columns=300):
    return np.random.default_rng(seed).standard_normal((310, columns))


def test_logits_are_streamed_in_parts_and_written_with_where_they_are_from(tmp_path, monkeypatch):
    a, b = Bigrams("a", table()), Bigrams("b", table(columns=310))
    rows, source = comparing.rows_and_source(a, b, "the cat and the dog\n" * 9, "some.txt", 0)
    assert source == "some.txt"
    monkeypatch.setattr(comparing, "AT_ONCE", 5 * 300)
    shapes = []
    with comparing.saving(tmp_path / "out", a, b, rows) as save:

        def watched(*pair):
            shapes.append([logits_nV.shape for logits_nV in pair])
            save(*pair)

        found = comparing.compare(a, b, rows, 3, QUIET, watched)
        assert not (tmp_path / "out").exists()
    assert max(shape[0][0] for shape in shapes) == 5
    index_N4 = np.load(tmp_path / "out" / "index.npy", allow_pickle=False)
    assert len(index_N4) == found["tokens"] == sum(len(each.inputs_T) for each in rows)
    for name, side in (("a", a), ("b", b)):
        written_NV = np.load(tmp_path / "out" / f"{name}.npy", allow_pickle=False)
        assert written_NV.dtype == np.float32
        assert np.array_equal(written_NV, side.logits_VV[index_N4[:, 2]])
    for number, position, token, target in index_N4.tolist():
        assert (rows[number].inputs_T[position], rows[number].targets_T[position]) == (token, target)
    # B has columns that A has not, such as those of control tokens: they are left out.
    a_NV, b_NV = (side.logits_VV[index_N4[:, 2], :300].astype(np.float64) for side in (a, b))
    assert found["kl"]["mean"] == pytest.approx(sum(slowly(a_NV, b_NV, index_N4[:, 3])["kl"]) / len(index_N4))
    assert found["text"]["bytes"] == len(b"the cat and the dog\n") * 9 - len(a.tokenizer.decode([int(rows[0].inputs_T[0])]))
    where = found["logits"]["where"]
    assert where["token"] == a.tokenizer.decode([int(rows[where["row"]].inputs_T[where["position"]])])


def test_nothing_is_left_of_logits_whose_comparison_fails(tmp_path):
    a = Bigrams("a", table())
    rows, _ = comparing.rows_and_source(a, a, "some text", "", 0)
    with pytest.raises(CheckpointError), comparing.saving(tmp_path / "out", a, a, rows):
        raise CheckpointError("it fails")
    assert list(tmp_path.iterdir()) == []


def test_a_continuation_is_the_same_up_to_the_first_token_that_differs_with_how_far_each_was_ahead():
    a_VV = table()
    prompt = one_document(np.arange(100, 124))
    chain = [111]  # the last of a prompt of half the row
    for _ in range(5):
        chain.append(int(a_VV[chain[-1]].argmax()))
    assert len(set(chain)) == 6
    b_VV = a_VV.copy()
    b_VV[chain[4], 250] = 9.0  # what follows the fourth token that is written
    a, b = Bigrams("a", a_VV), Bigrams("b", b_VV)
    assert comparing.greedy(a, a, prompt, 300) == {"prompt": 12, "tokens": 12, "equal": True}
    found = comparing.greedy(a, b, prompt, 300)
    assert found["first_differs_at"] == 4
    assert found["token"] == {"a": a.tokenizer.decode([chain[5]]), "b": a.tokenizer.decode([250])}
    assert found["ahead"]["a"] == pytest.approx(a_VV[chain[4], chain[5]] - a_VV[chain[4], 250], rel=1e-5)
    assert found["ahead"]["b"] == pytest.approx(9.0 - a_VV[chain[4], chain[5]], rel=1e-5)


def test_every_token_that_is_not_finite_makes_the_two_different():
    broken_VV = table()
    broken_VV[:, 3] = np.nan
    a, b = Bigrams("a", table()), Bigrams("b", broken_VV)
    rows, _ = comparing.rows_and_source(a, b, "some text", "", 0)
    found = comparing.compare(a, b, rows, 3, QUIET, nothing_saved)
    assert (found["equal"], found["verdict"]) == (False, "differ: there are logits that are not finite")


# ----------------------------------------------------------------------------------------------------------- refusals


def test_other_ids_for_the_text_are_refused_with_the_first_token_that_differs():
    other = train_bpe(["zebra zoo zigzag buzz " * 20], 275)
    a, b = Bigrams("a", table()), Bigrams("b", table(), other)
    text = "12 zebra"
    ids, others = tokenizer().encode(text), other.encode(text)
    place = next(i for i, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1])
    assert place > 0
    with pytest.raises(DataError) as refused:
        comparing.rows_and_source(a, b, text, "", 0)
    assert str(refused.value).startswith(f"the two have other tokens, from token {place} of '12 zebra' on: a has {ids[place]} ")
    assert f"b has {others[place]} {other.decode([others[place]])!r}" in str(refused.value)


def test_a_token_without_a_logit_is_refused():
    a = Bigrams("a", table(columns=10))
    with pytest.raises(DataError, match=r"^a: has 10 logits, and the text has token \d+"):
        comparing.rows_and_source(a, a, "text", "", 0)


def test_too_little_text_is_refused():
    a = Bigrams("a", table())
    with pytest.raises(DataError, match="no two tokens that follow each other; give more text with --text"):
        comparing.rows_and_source(a, a, "", "", 0)


@pytest.fixture
def run(tmp_path):
    run_of(tmp_path / "run", model_config())
    return tmp_path / "run"


def test_what_cannot_be_used_is_refused_before_anything_is_opened(run, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    monkeypatch.setattr(cli, "_backend", lambda *about: pytest.fail("a backend was opened"))
    for arguments, error, said in (
        ([run, run, "--rows", "-1"], UsageError, "--rows = -1: must be at least 0"),
        ([run, run, "--top-k", "0"], UsageError, "--top-k = 0: must be at least 1"),
        ([run, f"{run}s"], UsageError, "no such run"),
        ([f"hf:{run}", run], UsageError, f"is no directory of Hugging Face; jax:{run} or torch:{run} would work"),
        ([f"torch:{tmp_path}/theirs", run], UsageError, f"is of Hugging Face; hf:{tmp_path}/theirs would work"),
        ([f"{tmp_path}/theirs", run], ConfigError, "model_type = 'gpt2': must be one of llama, mixtral, qwen3_moe"),
        ([run, run, "--save-logits", run], UsageError, "exists already; choose another --save-logits"),
        ([run, run, "--text", tmp_path / "none"], DataError, "cannot be read as UTF-8 text"),
        ([run, run, "--text", tmp_path / "latin"], DataError, "cannot be read as UTF-8 text"),
    ):
        with pytest.raises(error) as refused:
            cli.run(["compare", *map(str, arguments)])
        assert said in str(refused.value), arguments
        assert "\n" not in str(refused.value)


def test_a_backend_that_is_not_installed_is_refused(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for arguments in (["compare", f"torch:{run}", str(run)], ["sample", str(run), "--backend", "torch"]):
        with pytest.raises(UsageError, match=r"torch is not installed: pip install 'lumina\[torch\]'"):
            cli.run(arguments)
