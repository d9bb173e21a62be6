"""Loss by segment under three memories, against loops over one document, one segment at a time."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from infini_train import plots
from infini_train.data.index import DatasetIndex
from infini_train.evaluation.__main__ import main
from infini_train.evaluation.segments import SegmentLosses, segment_losses
from infini_train.model import InfiniConfig, InfiniForCausalLM, cross_entropy
from tests.helpers.datasets import make_dataset

S = 8
LENGTHS = [300, 2, 45, 7, 120, 64, 33, 65]  # 64: exactly 8 segments; 65: one more, without a label


def make_model(memory: str = "paper-linear") -> InfiniForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = InfiniConfig(**sizes, **heads, segment_length=S, memory=memory, initializer_range=0.5)
    return InfiniForCausalLM(config).double().eval()


def bucket(segment: int) -> str:
    low = 0 if segment == 0 else 2 ** int(math.log2(segment))
    high = max(low, 2 * low - 1)
    return f"{low}" if low == high else f"{low}-{high}"


def per_document(model, documents, rows: int) -> list[list[dict[str, float]]]:
    """For each document and segment with labels, sums by explicit loops. Each document alone: whole for "on", each
    segment by itself for "off"; for "other" its segments one by one with the memory that a forward over its
    neighbour's beginning left."""
    order = sorted(range(len(documents)), key=lambda d: -len(documents[d]))
    found = []
    with torch.no_grad():
        for d in order:
            group = order[order.index(d) // rows * rows :][:rows]
            ids = torch.from_numpy(documents[d].astype("int64"))
            whole = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            found.append([])
            for i, part in enumerate(ids.split(S)):
                labels = ids[i * S + 1 : (i + 1) * S + 1]
                n = len(labels)
                if not n:
                    continue

                def loss(memory, part=part, labels=labels, n=n) -> float:
                    logits = model(part[None], memory=memory).logits[0, :n]
                    return F.cross_entropy(logits, labels, reduction="sum").item()

                on = whole[i * S : i * S + n].sum().item()
                found[-1].append({"tokens": n, "on": on, "off": loss(None), "compared": 0, "on_too": 0, "other": 0})
                there = [e for e in group if len(documents[e]) > i * S]
                if len(there) > 1:
                    other = torch.from_numpy(documents[there[(there.index(d) + 1) % len(there)]].astype("int64"))
                    memory = None
                    if i:  # the matrices of the other document, the last inputs of the own one
                        memory, theirs = (model(x[None, : i * S], use_cache=False).memory for x in (ids, other))
                        for mine, layer in zip(memory, theirs, strict=True):
                            mine |= {name: layer[name] for name in ("M", "z") if name in layer}
                    found[-1][-1] |= {"compared": n, "on_too": on, "other": loss(memory)}
    return found


def mean_and_error(sums: list[float], counts: list[float]) -> tuple[float | None, float | None]:
    """The textbook's ratio estimator: the deviation of the residuals over root n, over the mean count."""
    pairs = [(s, c) for s, c in zip(sums, counts, strict=True) if c]
    if not pairs:
        return None, None
    mean = sum(s for s, _ in pairs) / sum(c for _, c in pairs)
    if len(pairs) == 1:
        return mean, None
    deviation = statistics.stdev([s - mean * c for s, c in pairs])  # their mean is 0
    return mean, deviation / math.sqrt(len(pairs)) / statistics.mean([c for _, c in pairs])


def expected(model, documents, rows: int) -> dict[str, dict[str, float]]:
    """The table, from `per_document`."""
    found, result = per_document(model, documents, rows), {}
    for name in [*dict.fromkeys(bucket(i) for parts in found for i in range(len(parts))), "all"]:
        sums = [
            {
                key: sum(part[key] for i, part in enumerate(parts) if name in ("all", bucket(i)))
                for key in ("tokens", "on", "off", "compared", "on_too", "other")
            }
            for parts in found
        ]
        row = {"documents": sum(s["tokens"] > 0 for s in sums)}
        for count, keys in (
            ("tokens", {"on": "on", "off": "off", "off_minus_on": "off-on"}),
            ("compared", {"compared_on": "on_too", "other": "other", "other_minus_on": "other-on_too"}),
        ):
            for key, of in keys.items():
                plus, _, minus = of.partition("-")
                values = [s[plus] - (s[minus] if minus else 0) for s in sums]
                row[key], row[f"{key}_se"] = mean_and_error(values, [s[count] for s in sums])
        result[name] = row | {
            "tokens": sum(s["tokens"] for s in sums),
            "compared_tokens": sum(s["compared"] for s in sums),
        }
    return result


def table(losses) -> dict[str, dict[str, float]]:
    return {row.pop("segment"): row for row in losses.rows()}


def close(found, wanted) -> bool:
    """1e-6: RoPE's angles are float32; the batch sums in another order."""

    def flat(rows):  # pytest.approx takes no None
        return {(name, key): -1 if x is None else x for name, row in rows.items() for key, x in row.items()}

    return flat(found) == pytest.approx(flat(wanted), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("memory", ["paper-linear", "paper-delta", "selective-delta"])
@pytest.mark.parametrize("rows", [3, 5])
def test_three_memories_equal_explicit_loops(tmp_path, monkeypatch, memory, rows):
    documents = make_dataset(tmp_path / "shards", LENGTHS, vocab_size=40)
    index, model = DatasetIndex.load(tmp_path / "shards"), make_model(memory)
    monkeypatch.setattr(cross_entropy, "LOSS_CHUNK", 7)  # the head in pieces of 7 tokens
    wanted = expected(model, documents, rows)
    found = table(segment_losses(model, index, rows=rows)[0])
    assert close(found, wanted), (found, wanted)
    assert found["all"]["tokens"] == sum(LENGTHS) - len(LENGTHS)
    # The three differ where they should, and only there: no earlier segment, nothing to read.
    assert found["0"]["off_minus_on"] == pytest.approx(0, abs=1e-12)
    assert found["0"]["other_minus_on"] == pytest.approx(0, abs=1e-12)
    for name in ("1", "2-3", "4-7"):
        assert abs(found[name]["off_minus_on"]) > 1e-3
        assert abs(found[name]["other_minus_on"]) > 1e-3
    # The longest document is alone at its end: nothing to compare with.
    assert found["16-31"]["compared_tokens"] == 0
    assert found["16-31"]["other"] is None


def test_limits_take_the_longest_documents_and_their_beginnings(tmp_path):
    documents = make_dataset(tmp_path / "shards", LENGTHS, vocab_size=40)
    index, model = DatasetIndex.load(tmp_path / "shards"), make_model()
    found = table(segment_losses(model, index, rows=2, documents=3, max_tokens=48)[0])
    # The label of the 48th token is the 49th, so that one is needed too.
    wanted = expected(model, [documents[i][:49] for i in (0, 4, 7)], 2)
    assert close(found, wanted), (found, wanted)


def test_a_row_that_ends_leaves_the_others_as_they_were(tmp_path):
    """Side by side or alone, "on" and "off" are the same."""
    make_dataset(tmp_path / "shards", LENGTHS, vocab_size=40)
    index, model = DatasetIndex.load(tmp_path / "shards"), make_model()
    alone, together = (table(segment_losses(model, index, rows=n)[0]) for n in (1, 8))
    for name, row in alone.items():
        assert (row["on"], row["off"]) == pytest.approx((together[name]["on"], together[name]["off"]), rel=1e-9)
        assert row["other"] is None


def test_growth_is_the_slope_within_documents(tmp_path):
    """Of a regression on the bucket's number with a constant for each document, by dummy variables; segment 0 left
    out. Its error against a bootstrap of documents."""
    rng = np.random.default_rng(0)
    count = rng.integers(0, 50, size=(5, 60)) * (np.arange(5)[:, None] <= rng.integers(1, 6, size=60))
    count[:, 0] = [9, 0, 7, 0, 0]  # a single bucket besides segment 0: tells nothing
    x = np.arange(5)[:, None]
    difference = rng.normal(3, 2, size=60) + (0.3 + rng.normal(0, 0.2, size=60)) * x + rng.normal(0, 0.3, (5, 60))
    zero = np.zeros(count.shape)
    losses = SegmentLosses(zero, difference * count, zero, zero, count.astype(float), zero)

    def slope(documents) -> float:
        rows, values = [], []
        for which, d in enumerate(documents):
            for b in range(1, 5):
                weight = math.sqrt(count[b, d])
                rows.append(np.append(weight * (np.arange(len(documents)) == which), weight * b))
                values.append(weight * difference[b, d])
        return np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0][-1]

    found = losses.growth()
    assert found["off_minus_on"] == pytest.approx(slope(range(60)))
    draws = [slope(rng.integers(60, size=60)) for _ in range(200)]
    assert found["off_minus_on_se"] == pytest.approx(np.std(draws), rel=0.2)
    assert found["other_minus_on"] is None


def command(tmp_path, *extra: str) -> list[str]:
    return ["segments", str(tmp_path / "model"), "--dataset", str(tmp_path / "shards"), *extra]


def test_command_writes_the_table(tmp_path, capsys):
    documents = make_dataset(tmp_path / "shards", LENGTHS, vocab_size=40)
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "table.json"
    assert main(command(tmp_path, "--rows", "3", "--dtype", "float64", "--out", str(out))) == 0
    written = json.loads(out.read_text())
    found = {row.pop("segment"): row for row in written["segments"]}
    wanted = expected(model, documents, 3)
    assert close(found, wanted)
    shown = capsys.readouterr().out
    for key in ("on", "off", "off_minus_on", "other", "other_minus_on"):
        assert f"{wanted['all'][key]:.4f} ± {wanted['all'][f'{key}_se']:.4f}" in shown
    assert f"off - on {written['growth']['off_minus_on']:.4f} ±" in " ".join(shown.split())
    assert (written["rows"], written["segment_length"], written["memory"]) == (3, S, "paper-linear")


def test_plot_shows_the_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    documents = make_dataset(tmp_path / "shards", LENGTHS, vocab_size=40)
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    assert main(command(tmp_path, "--rows", "3", "--dtype", "float64", "--plot", str(tmp_path / "a.png"))) == 0
    wanted = expected(model, documents, 3)
    del wanted["all"]
    losses, differences = saved[0].axes[:2]
    drawn = dict(
        zip(
            ("on", "off", "other", "off_minus_on", "other_minus_on"),
            [*losses.containers, *differences.containers],
            strict=True,
        )
    )
    for key, bars in drawn.items():
        there = {name: row for name, row in wanted.items() if row[key] is not None}
        assert bars.lines[0].get_ydata().tolist() == pytest.approx([row[key] for row in there.values()], abs=1e-6)
        errors = [(high - low) / 2 for (_, low), (_, high) in bars.lines[2][0].get_segments()]
        assert errors == pytest.approx([row[f"{key}_se"] or 0 for row in there.values()], abs=1e-6)


@pytest.mark.parametrize(
    ("damage", "extra", "message"),
    [
        (None, ["--rows", "0"], "rows: found 0, expected at least 1"),
        (None, ["--out", "{tmp}/shards"], "exists"),
        (None, ["--out", "{tmp}/nowhere/a.json"], "nowhere: no such directory to write a.json to"),
        (None, ["--dataset", "{tmp}/none"], "none"),
        ("config", [], "no config.json in it"),
        ("heads", [], "config.json: InfiniConfig: num_key_value_heads: found 3"),
        ("cut", [], "config.json: "),
        ("kind", [], "model_type: found 'llama', expected 'infini'"),
        ("gates", [], "self_attn.gate"),
        ("vocabulary", [], "vocabulary: found 40 tokens, expected at most the model's 30"),
        ("tokenizer", [], "found another tokenizer"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, damage, extra, message):
    make_dataset(tmp_path / "shards", [20, 9], vocab_size=40)
    model = make_model()
    if damage == "vocabulary":
        model.resize_token_embeddings(30)
    state = model.state_dict()
    if damage == "gates":
        state = {name: x for name, x in state.items() if "gate" not in name.split(".")}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    config = tmp_path / "model" / "config.json"
    if damage == "config":
        config.unlink()
    change = {"kind": {"model_type": "llama"}, "heads": {"num_key_value_heads": 3}}.get(damage)
    if change:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    if damage == "cut":
        config.write_text(config.read_text()[:-3])
    if damage == "tokenizer":
        (tmp_path / "model" / "tokenizer.model").write_bytes(b"another one")
    assert main(command(tmp_path, *(word.format(tmp=tmp_path) for word in extra))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("infini-train evaluate segments: error: "), error
    assert message in error, error
