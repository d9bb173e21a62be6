"""Recall is measured on models that know exactly what they should: by a dictionary, for a while, or not at all."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.__main__ import main as data_prep
from infini_train import plots
from infini_train.evaluation import commands
from infini_train.evaluation.__main__ import main
from infini_train.hf.commands import export
from infini_train.inspection.evaluations import given_evaluation
from infini_train.metrics import recall
from infini_train.metrics.ratios import ratio
from infini_train.metrics.recall import correct_predictions, passkey_cells, recall_counts, spelled
from infini_train.model import InfiniConfig, InfiniForCausalLM
from infini_train.model.configuration import MEMORY_RULES
from infini_train.synthetic import EVALUATION, PasskeyTask, RecallTask, SyntheticDocument, Vocabulary, documents
from tests.helpers.datasets import make_dataset
from tests.helpers.runs import fit
from tests.helpers.synthetic_replay import replay, words

S = 9
VOCABULARY = Vocabulary(keys=6, values=5, noise=4)
FIRST_VALUE, PASSKEY, DIGITS = 14 + 6, 3, range(4, 14)


class Dictionary:
    """Stands for a model: notes what keys, and the digits of passkeys, were told, and answers with it.

    A segment reads what was noted before it and, local attention, in itself. Notes are forgotten after `segments`
    segments.
    """

    def __init__(self, segments: int = 10**6, sliding_window: int | None = None):
        self.segments = segments
        self.config = SimpleNamespace(segment_length=S, vocab_size=VOCABULARY.size, sliding_window=sliding_window)
        self.device = torch.device("cpu")
        self.lm_head = torch.nn.Identity()
        self.reading = True

    def init_memory(self, rows: int) -> list[dict[str, torch.Tensor]]:
        """By key (or place in a passkey): the token told, and when; the token before; digits since `passkey`."""
        size = VOCABULARY.size + 10
        sizes = {"told": size, "when": size, "before": 1, "place": 1, "now": 1}
        return [{name: torch.zeros(rows, n, dtype=torch.long) for name, n in sizes.items()}]

    @contextmanager
    def memory_off(self):
        self.reading = False
        yield
        self.reading = True

    def with_memory_of_next_row(self, memory):
        return [{name: x.roll(-1, 0) for name, x in memory[0].items()}]

    def __call__(self, x_BT: torch.Tensor, memory, logits_to_keep: torch.Tensor) -> SimpleNamespace:
        out = self.model(x_BT, memory)
        return SimpleNamespace(logits=self.lm_head(out.last_hidden_state[:, logits_to_keep]), memory=out.memory)

    def model(self, x_BT: torch.Tensor, memory) -> SimpleNamespace:
        (state,) = memory
        state = {name: tensor.clone() for name, tensor in state.items()}
        choice = torch.zeros_like(x_BT)
        for b, row in enumerate(x_BT.tolist()):
            told, when = state["told"][b], state["when"][b]
            before, place, now = (state[name][b].item() for name in ("before", "place", "now"))
            for t, token in enumerate(row):
                if t % S == 0:
                    now += 1
                    known = {i: told[i].item() for i in torch.nonzero(told)[:, 0].tolist()} if self.reading else {}
                    known = {i: v for i, v in known.items() if now - when[i] <= self.segments}
                noted = None
                if FIRST_VALUE <= token < FIRST_VALUE + VOCABULARY.values:
                    noted = before
                elif token == PASSKEY:
                    place = 1
                elif token in DIGITS and place:
                    noted, place = VOCABULARY.size + place - 1, place + 1
                else:
                    place = 0
                if noted is not None:
                    known[noted] = told[noted] = token
                    when[noted] = now
                choice[b, t] = known.get(VOCABULARY.size + place - 1 if place else token, 0)
                before = token
            state["before"][b], state["place"][b], state["now"][b] = before, place, now
        return SimpleNamespace(last_hidden_state=F.one_hot(choice, VOCABULARY.size).float(), memory=[state])


def drawn(task, count: int, seed: int = 0) -> list[SyntheticDocument]:
    return list(documents(task, VOCABULARY, count, seed=seed, stream=EVALUATION))


def knows_of(other: list[str], key: str, own: list[str], begin: int) -> str | None:
    """What a reader of `own` takes for the value of `key` in the segment from `begin`, if it remembers `other`."""
    told = {other[i - 1]: other[i] for i in range(1, begin) if other[i][0] == "v"}
    if own[begin][0] == "v":  # a pair that the border divides: the value goes to the key remembered
        told[other[begin - 1]] = own[begin]
    return told.get(key)


@pytest.mark.parametrize("window", [None, S + 4, 2 * S])  # what local attention sees does not count
def test_a_perfect_memory_recalls_everything_and_only_its_own(window):
    task, rows = RecallTask(200, change=0.15, noise=0.2), 3
    found = recall_counts(Dictionary(sliding_window=window), task, VOCABULARY, count=6, rows=rows, seed=0)
    texts = [words(d, VOCABULARY) for d in drawn(task, 6)]
    expected: dict[tuple[int, str], list[int]] = {}  # kind, bucket: answers, right with another's memory
    for d, own in enumerate(texts):
        other = texts[d // rows * rows + (d + 1) % rows]
        for place, (only, several) in replay(own, S, window).items():
            segment = (place - 1) // S
            low = 2 ** int(math.log2(segment)) if segment else 0
            hit = knows_of(other, own[place - 1], own, segment * S) == own[place]
            for kind in (0, 1) if several else (0,):
                for name in (f"{low}-{2 * low - 1}" if low > 1 else f"{low}", "all"):
                    sums = expected.setdefault((kind, name), [0, 0])
                    sums[0] += only
                    sums[1] += only and hit
    for kind in (0, 1):
        table = {row["segment"]: row for row in found.rows(kind)}
        assert table.keys() == {name for (k, name), (answers, _) in expected.items() if k == kind and answers}
        assert {"2-3", "4-7", "8-15", "16-31", "all"} <= table.keys()
        for name, row in table.items():
            answers, hits = expected[kind, name]
            assert (row["answers"], row["on"], row["off"]) == (answers, 1.0, 0.0)
            assert row["other"] == pytest.approx(hits / answers)
        assert table["all"]["answers"] > 50
        assert 0 < table["all"]["other"] < 0.5


def test_a_guess_is_right_once_in_values():
    draw = torch.Generator().manual_seed(0)

    def guess(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:2], VOCABULARY.size)
        values = slice(FIRST_VALUE, FIRST_VALUE + VOCABULARY.values)
        logits[..., values] = torch.rand(*hidden.shape[:2], VOCABULARY.values, generator=draw)
        return logits

    model = Dictionary()
    model.lm_head = guess
    *_, row = recall_counts(model, RecallTask(600), VOCABULARY, count=10, rows=5, seed=0).rows(0)
    chance = 1 / VOCABULARY.values
    error = math.sqrt(chance * (1 - chance) / row["answers"])
    assert row["answers"] > 500
    for mode in ("on", "off", "other"):
        assert row[mode] == pytest.approx(chance, abs=4 * error)
        assert row[f"{mode}_se"] == pytest.approx(error, rel=0.8)  # of 10 documents only


@pytest.mark.parametrize("window", [None, S + 4])
def test_what_is_forgotten_shows_by_length_and_depth(window):
    """A memory of 12 segments: passkeys told longer ago are not recalled. Longer windows change nothing."""
    lengths, depths = [60, 150, 333], [0.0, 0.25, 0.8, 1.0]
    expected = []
    for length in lengths:
        for depth in depths:
            told, asked = 2 + round(depth * (length - 14)), length - 6  # the first digit, and where it is asked
            first, last = [(asked - 1 + i) // S - (told + i) // S for i in (0, 4)]
            seen = min(first, last) == 0 if window is None else asked - 1 - told < window and min(first, last) < 2
            expected.append((length, depth, float(max(first, last) <= 12), seen))
            assert max(first, last) <= 12 or min(first, last) > 12, "choose other lengths: a key half forgotten"
    reader = Dictionary(12, window)
    found = passkey_cells(
        reader, PasskeyTask(100), VOCABULARY, lengths=lengths, depths=depths, samples=3, rows=2, seed=0
    )
    assert [(c["tokens"], c["depth"], c["right"], c["local"]) for c in found] == expected
    assert {right for _, _, right, _ in expected} == {0.0, 1.0}


def test_a_passkey_counts_if_every_digit_is_right():
    class NoNines(Dictionary):
        def model(self, x_BT, memory):
            out = super().model(x_BT, memory)
            out.last_hidden_state[..., DIGITS[9]] = 0
            return out

    options = {"lengths": [80], "depths": [0.2], "samples": 40, "rows": 40, "seed": 5}
    (cell,) = passkey_cells(NoNines(), PasskeyTask(80), VOCABULARY, **options)
    whole = ["d9" not in words(d, VOCABULARY) for d in drawn(PasskeyTask(80, depth=0.2), 40, seed=5)]
    assert cell["right"] == np.mean(whole)
    assert 0.3 < cell["right"] < 0.9


def test_each_cell_asks_for_other_keys(monkeypatch):
    asked = []

    def listen(model, read, wanted_BT, **_):
        asked.extend(tuple(d.tokens_T[wanted].tolist()) for d, wanted in zip(read, wanted_BT, strict=True))
        return {"on": wanted_BT}

    monkeypatch.setattr(recall, "correct_predictions", listen)
    options = {"samples": 5, "rows": 2, "seed": 0}
    passkey_cells(
        small_model("paper-linear"), PasskeyTask(80), VOCABULARY, lengths=[64, 96], depths=[0, 1], **options
    )
    assert len(asked) == len(set(asked)) == 2 * 2 * 5


def test_standard_errors():
    """Equal documents: of a mean. Unequal ones: as draws of whole documents scatter."""
    rng = np.random.default_rng(0)
    hits = rng.integers(0, 11, size=30)
    value, error = ratio(hits, np.full(30, 10))
    assert value == pytest.approx(hits.mean() / 10)
    assert error == pytest.approx((hits / 10).std(ddof=1) / math.sqrt(30))
    answers = rng.integers(5, 100, size=200)
    hits = rng.binomial(answers, rng.uniform(0.2, 0.9, size=200))
    value, error = ratio(hits, answers)
    draws = rng.integers(200, size=(4000, 200))
    assert value == pytest.approx(hits.sum() / answers.sum())
    assert error == pytest.approx((hits[draws].sum(1) / answers[draws].sum(1)).std(), rel=0.1)
    # Documents without an answer do not count; a single one has no error.
    assert ratio(np.append(hits, 0), np.append(answers, 0)) == (value, error)
    assert ratio(np.array([3, 0]), np.array([4, 0])) == (0.75, None)


def small_model(memory: str) -> InfiniForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY.size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = InfiniConfig(**sizes, **heads, segment_length=S, memory=memory, initializer_range=0.5)
    return InfiniForCausalLM(config).double().eval()


@pytest.mark.parametrize("memory", MEMORY_RULES)
def test_choices_equal_those_of_whole_documents(memory):
    """Of a real model: on, one forward over all; off, each segment alone; other, after the next one's beginning."""
    model = small_model(memory)
    read = drawn(RecallTask(5 * S + 4), 3)
    ids = torch.from_numpy(np.stack([d.tokens_T for d in read]).astype(np.int64))
    wanted = np.random.default_rng(0).random(ids.shape) < 0.7
    wanted[:, 0] = False  # BOS is never chosen
    with torch.no_grad():
        chosen = {"on": model(ids).logits.argmax(-1)}
        parts = ids.split(S, 1)
        chosen["off"] = torch.cat([model(part).logits.argmax(-1) for part in parts], 1)
        memories = [None, *(model(ids[:, : i * S], use_cache=False).memory for i in range(1, len(parts)))]
        others = [m and [{k: x[[1, 2, 0]] for k, x in layer.items()} for layer in m] for m in memories]
        pairs = zip(parts, others, strict=True)
        chosen["other"] = torch.cat(
            [model(part, memory=m, use_cache=False).logits.argmax(-1) for part, m in pairs], 1
        )
    expected = {mode: F.pad((c[:, :-1] == ids[:, 1:]), (1, 0)).numpy() & wanted for mode, c in chosen.items()}
    found = correct_predictions(model, read, wanted, ("on", "off", "other"))
    for mode in expected:
        assert np.array_equal(found[mode], expected[mode]), mode
    assert len({found[mode].tobytes() for mode in found}) == 3
    for window in (2 * S, 100 * S):
        assert np.array_equal(correct_predictions(model, read, wanted, window=window)["on"], expected["on"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps on synthetic documents by `infini-train fit`, as on any dataset; the run, and its export."""
    root = tmp_path_factory.mktemp("recall")
    options = (
        "--documents 60 --tokens 64 --shortest 16 --keys 8 --values 6 --noise-tokens 5 --change 0.2 --passkey 0.3"
    )
    words = ["synth", "--out", str(root / "data"), *options.split(), "--validation-fraction", "0.1"]
    assert data_prep(words) == 0
    run = fit(
        root / "run",
        root / "data" / "train",
        *("--data.validation", str(root / "data" / "valid"), "--trainer.max_steps", "3", "--model.vocab_size", "33"),
        *("--model.initializer_range", "0.4"),
    )
    assert run.code == 0, run.err
    export(root / "run" / "checkpoints", root / "export")
    return root


RECALL = ["--times", "3", "--documents", "4", "--rows", "2"]
DEEP = ["--lengths", "40", "100", "--depths", "3", "--samples", "2", "--rows", "3"]


@pytest.mark.parametrize(
    ("command", "options"), [("recall", RECALL), ("passkey", DEEP), ("segments", ["--rows", "2"])]
)
def test_command_takes_checkpoints_and_exports(trained, tmp_path, capsys, command, options):
    results = []
    for model in ("run/checkpoints", "run/checkpoints/step-00000003", "export"):
        out = tmp_path / f"{len(results)}.json"
        given = [command, str(trained / model), "--dataset", str(trained / "data" / "valid"), *options]
        assert main([*given, "--out", str(out)]) == 0, capsys.readouterr().err
        results.append(json.loads(out.read_text()))
        assert given_evaluation(out).kind == command  # `infini-train report` knows it
        assert results[-1].pop("model") == str(trained / model)
    assert results[0] == results[1] == results[2]
    shown = capsys.readouterr().out
    if command == "recall":
        (first, *_, last) = results[0]["accuracy"]["memory_only"]
        assert (results[0]["task"]["tokens"], results[0]["task"]["change"], last["segment"]) == (192, 0.2, "all")
        assert f"{first['on']:.4f}" in shown
        expected = [
            replay(words(d, Vocabulary(8, 6, 5)), 8)
            for d in documents(RecallTask(192, change=0.2), Vocabulary(8, 6, 5), 4, seed=0, stream=EVALUATION)
        ]
        assert last["answers"] == sum(only for answers in expected for only, _ in answers.values())
    elif command == "passkey":
        places = [(cell["tokens"], cell["depth"]) for cell in results[0]["cells"]]
        assert places == [(n, depth) for n in (40, 100) for depth in (0.0, 0.5, 1.0)]


def cells_of(*model, lengths, depths, **options) -> list[dict]:
    return [{"tokens": n, "depth": d, "right": d / 2 + n / 1000, "local": d == 1} for n in lengths for d in depths]


def test_table_of_passkeys(trained, capsys, monkeypatch):
    monkeypatch.setattr(commands, "passkey_cells", cells_of)
    assert main(["passkey", str(trained / "export"), "--dataset", str(trained / "data" / "valid"), *DEEP]) == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if line[0] == "│"]
    assert rows == [["0", "0.04", "0.10"], ["0.5", "0.29", "0.35"], ["1", "0.54*", "0.60*"]]


def test_plots_show_the_numbers():
    pytest.importorskip("matplotlib")
    (axes, _) = plots.heat_map(cells_of(lengths=[40, 100, 300], depths=[0.0, 1.0]), "title").axes
    assert axes.images[0].get_array().tolist() == [[0.04, 0.1, 0.3], [0.54, 0.6, 0.8]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["40", "100", "300"]
    assert [text.get_text() for text in axes.texts] == ["0.04", "0.10", "0.30", "0.54", "0.60", "0.80"]
    rows = [
        {"segment": s, "on": y, "on_se": 0.1, "off": y / 2, "off_se": None} for s, y in (("1", 0.2), ("2-3", 0.8))
    ]
    (axes,) = plots.accuracy_lines({"x": [*rows, {**rows[0], "segment": "all"}]}, ["on", "off"], 0.1).axes
    lines = [container.lines[0].get_ydata().tolist() for container in axes.containers]
    assert lines == [[0.2, 0.8], [0.1, 0.4]]


@pytest.mark.parametrize(("command", "options"), [("recall", RECALL), ("passkey", DEEP)])
def test_plots(trained, tmp_path, capsys, monkeypatch, command, options):
    given = [command, str(trained / "export"), "--dataset", str(trained / "data" / "valid"), *options]
    given += ["--plot", str(tmp_path / "a.png")]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "find_spec", lambda name: None)
        assert main(given) == 2
        assert "matplotlib is not installed" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    assert main(given) == 0
    assert image.open(tmp_path / "a.png").size > (300, 200)


@pytest.mark.parametrize(
    ("command", "extra", "message"),
    [
        ("recall", ["--rows", "1"], "rows: found 1, expected at least 2"),
        ("recall", ["--times", "nan"], "times: found nan, expected more than 0"),
        ("recall", ["--rows", "3", "--documents", "4"], "documents: found 4, expected a multiple of --rows, 3"),
        ("recall", ["--times", "0.1"], "ask nothing"),
        ("recall", ["--out", "{root}/export"], "exists"),
        ("recall", ["--dataset", "{root}/text"], "expected a dataset that `infini-train prep synth` drew"),
        ("passkey", ["--depths", "1"], "depths: found 1, expected at least 2"),
        ("passkey", ["--lengths", "13"], "tokens: found 13, expected at least 14"),
        ("passkey", ["--model", "{root}/data"], "complete checkpoint"),
        ("passkey", ["--model", "{root}/none"], "none"),
    ],
)
def test_bad_input_ends_in_one_line(trained, capsys, command, extra, message):
    if not (trained / "text").exists():
        make_dataset(trained / "text", [20, 9], vocab_size=33)
    extra = [word.format(root=trained) for word in extra]
    model = extra[1] if extra[0] == "--model" else str(trained / "export")
    options = [] if extra[0] == "--model" else extra
    assert main([command, model, "--dataset", str(trained / "data" / "valid"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error, error


def test_generate_spells_what_a_loop_without_cache_would():
    model = small_model("selective-delta")
    model.generation_config.eos_token_id = None  # which a model with random weights may choose at any place
    read = list(documents(PasskeyTask(80, depth=0.3), VOCABULARY, 3, seed=0, stream=EVALUATION))
    tokens_BT = torch.from_numpy(np.stack([d.tokens_T for d in read]).astype(np.int64))
    for place in range(80 - 6, 80 - 1):  # of the five digits before EOS
        with torch.no_grad():
            tokens_BT[:, place] = model(tokens_BT[:, :place], use_cache=False).logits[:, -1].argmax(-1)
    tokens_BT[1, 78] = (tokens_BT[1, 78] + 1) % VOCABULARY.size
    read = [replace(d, tokens_T=row.numpy().astype(np.uint16)) for d, row in zip(read, tokens_BT, strict=True)]
    assert spelled(model, read, 5).tolist() == [True, False, True]
