"""The page of `infini-train report` holds what runs have logged, shows it in a real browser, and asks for nothing."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from infini_train.evaluation.__main__ import main as evaluate
from infini_train.inspection import events
from infini_train.inspection.curves import MOST_POINTS, thinned
from infini_train.inspection.evaluations import read_evaluation
from infini_train.inspection.events import Point
from tests.helpers.commands import command
from tests.helpers.datasets import make_dataset
from tests.helpers.results import LENGTHS, tensors
from tests.helpers.runs import fit

pytest.importorskip("matplotlib")

ODD = 'odd $x_1$ <b>&"name'  # neither HTML nor a formula
SAMPLE = "def f(x):\n    return x < 3 & 'ä' </pre><script>alert(1)</script>"
CURVES = {
    "Training loss": ["train/loss"],
    "Validation loss": ["val/loss"],
    "Validation: loss with the memory off, minus on": ["val/memory_benefit"],
    "Gradient norm": ["train/gradient_norm"],
    "Throughput": ["speed/tokens_per_second"],
    "Waiting for data": ["speed/data_wait_share"],
    "memory/M_norm_max": ["memory/M_norm_max"],
    "val/memory_share": ["val/memory_share"],
}
RIGHT, ERRORS = {"on": 0.9, "off": 0.0625, "other": 0.05}, {"on_se": 0.01, "off_se": 0.02, "other_se": 0.01}
RECALL = [
    {"segment": "1", "answers": 40, **RIGHT, **ERRORS},
    {"segment": "all", "answers": 40, **RIGHT, **dict.fromkeys(ERRORS)},
]
CELLS = [
    {"tokens": n, "depth": d, "right": d / 2 + n / 1000, "local": d == 1} for n in (40, 100) for d in (0.0, 0.5, 1.0)
]


class Page(HTMLParser):
    """Tables by caption, the source of SVG elements by the figure's caption, texts to unfold, and all links."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.paths: dict[str, dict[str, str]] = {}  # of a figure: by the id of the element around it
        self.dotted: dict[str, list[str]] = {}  # of a figure
        self.captions: list[str] = []
        self.texts: dict[str, str] = {}
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open = {"figcaption": "", "caption": "", "summary": "", "pre": "", "th": "", "td": ""}
        self.inside: list[str] = []
        self.id = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "srcset", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        self.id = about.get("id", self.id)
        if tag == "path" and "line-" in self.id:
            self.paths.setdefault(self.captions[-1], {})[self.id.partition("-")[2]] = about.get("d", "")
            self.id = ""
        if tag == "path" and "stroke-dasharray: 1,3" in about.get("style", ""):
            self.dotted.setdefault(self.captions[-1], []).append(about["d"])
        if tag in self.open:
            self.open[tag] = ""
            self.inside.append(tag)
        if tag == "table":
            self.rows: list[list[str]] = []
        if tag == "tr":
            self.rows.append([])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        if self.inside:
            self.open[self.inside[-1]] += data

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.inside.pop() == tag
        if tag == "figcaption":
            self.captions.append(self.open[tag])
        if tag in ("th", "td"):
            self.rows[-1].append(self.open[tag])
        if tag == "table":
            caption = self.open["caption"]
            self.tables[f"{self.captions[-1]}: {caption}" if caption in self.tables else caption] = self.rows
        if tag == "pre":
            self.texts[self.open["summary"]] = self.open[tag]


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """A run's curves by tag and step, as tensorboard itself reads them."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: {e.step: e.value for e in board.Scalars(tag)} for tag in board.Tags()["scalars"]}


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def report(out: Path, *words: object) -> Page:
    assert command("report", *words, "--out", out) == 0
    return Page(out.read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that was killed and went on, a copy of its beginning under an odd name, and their page."""
    root = tmp_path_factory.mktemp("report")
    make_dataset(root / "shards", LENGTHS)
    make_dataset(root / "valid", [60, 45], seed=1)
    options = ["--data.validation", str(root / "valid"), "--trainer.val_check_interval", "10"]
    options += ["--checkpoint.every_n_steps", "8", "--model.memory", "selective-delta"]
    run = root / "run"
    assert fit(run, root / "shards", *options, die_at=147).code == -signal.SIGKILL
    odd = shutil.copytree(run, root / ODD)
    changed = yaml.safe_load((odd / "config.yaml").read_text())
    changed["model"]["optimizer"]["lr"] = 0.123
    (odd / "config.yaml").write_text(yaml.dump(changed))
    time.sleep(1)  # names of events files hold whole seconds, and the run may have begun in this one
    with SummaryWriter(str(odd / "tensorboard")) as writer:
        writer.add_text("samples/greedy", SAMPLE, 7)
    ended = fit(run, root / "shards", *options)
    assert ended.code == 0, ended.err
    words = [
        "segments",
        str(run),
        "--dataset",
        str(root / "valid"),
        "--rows",
        "2",
        "--out",
        str(run / "segments.json"),
    ]
    assert evaluate(words) == 0
    about = {"model": "a model", "dataset": "some data"}
    recall = {**about, "chance": 0.0625, "accuracy": {"memory_only": RECALL, "latest": RECALL}}
    (run / "recall.json").write_text(json.dumps(recall))
    (root / "passkey.json").write_text(json.dumps({**about, "cells": CELLS}))
    return root


@pytest.fixture(scope="module")
def page(runs):
    return report(runs / "page.html", runs / "run", runs / ODD, "--results", runs / "passkey.json")


@pytest.mark.parametrize(("title", "tags"), CURVES.items())
def test_curves_are_those_of_the_events(runs, page, title, tags):
    """Tables hold values at some steps; a line in the picture is a scaled copy of all points."""
    header, *rows = page.tables[title]
    assert header == ["step", "run", ODD]
    scales = []
    for i, run in enumerate((runs / "run", runs / ODD)):
        points = scalars(run)[tags[0]]
        shown = {int(row[0]): float(row[1 + i].replace(",", "")) for row in rows if row[1 + i] != "-"}
        assert shown == {step: pytest.approx(points[step], rel=1e-5) for step in shown}
        assert {min(points), max(points)} <= set(shown)
        drawn = numbers(page.paths[title][f"line-{i}"])
        steps, values = map(list, zip(*sorted(points.items()), strict=True))
        values = [math.log(value) for value in values] if title == "Gradient norm" and logarithmic(page) else values
        assert len(drawn) == len(points)
        for given, place in zip((steps, values), zip(*drawn, strict=True), strict=True):
            if len(set(given)) > 1:
                scale = np.polyfit(given, place, 1)
                assert np.abs(np.polyval(scale, given) - place).max() < 1e-3 * max(1, np.ptp(place))
                scales.append(scale)
        if i == 0:  # where the run went on after it was killed
            (mark,) = {x for x, _ in numbers(page.dotted[title][0])}
            assert mark == pytest.approx(np.polyval(scales[0], 8), abs=1e-2)
            assert len(page.dotted[title]) == 1
    assert scales[0] == pytest.approx(scales[len(scales) // 2], rel=1e-3)  # both runs on the same axes


def logarithmic(page: Page) -> bool:
    """Whether gradient norms spread over more than a decade."""
    shown = [float(value) for row in page.tables["Gradient norm"][1:] for value in row[1:] if value != "-"]
    return max(shown) > 10 * min(shown)


def test_history_equals_tensorboard(runs):
    """Of every tag, over the restart; what the first process did beyond the checkpoint is dropped."""
    for name in ("run", ODD):
        found = events.history(runs / name / "tensorboard")
        assert {tag: {p.step: p.value for p in points} for tag, points in found.points.items()} == scalars(
            runs / name
        )
    assert events.history(runs / "run" / "tensorboard").resumed == [8]
    assert events.history(runs / ODD / "tensorboard").resumed == []


def test_overview(runs, page):
    header, *rows = page.tables["Runs"]
    for name, row in zip(("run", ODD), rows, strict=True):
        shown, curves = dict(zip(header, row, strict=True)), scalars(runs / name)
        last = max(curves["train/loss"])
        assert shown["run"] == name
        assert shown["step"] == f"{last} of 20"
        assert shown["training loss"] == f"{curves['train/loss'][last]:.4f}"
        validated = max(curves["val/loss"])
        assert shown["validation loss"] == f"{curves['val/loss'][validated]:.4f}"
        lowest = min(curves["val/loss"], key=curves["val/loss"].get)
        assert shown["lowest validation loss"] == f"{curves['val/loss'][lowest]:.4f} at step {lowest}"
        assert shown["restarts"] == ("1" if name == "run" else shown["restarts"])
    assert rows[0][1] == "finished"


def test_loss_by_segment(runs, page):
    header, *rows = page.tables["Last validation of each run: loss by segment, nats per token"]
    assert header[1:] == ["run: memory on", "run: memory off", f"{ODD}: memory on", f"{ODD}: memory off"]
    for i, (name, end) in enumerate([("run", ""), ("run", "_memory_off"), (ODD, ""), (ODD, "_memory_off")]):
        curves = scalars(runs / name)
        for row in rows:
            points = curves[f"val/segment_{row[0]}{end}"]
            assert float(row[1 + i]) == pytest.approx(points[max(points)], rel=1e-5)
    measured = json.loads((runs / "run" / "segments.json").read_text())
    header, *rows = page.tables["Loss by segment, nats per token"]
    assert [row[0] for row in rows] == [row["segment"] for row in measured["segments"]]
    for shown, row in zip(rows, measured["segments"], strict=True):
        for title, key in zip(header[2:], ("on", "off", "off_minus_on", "other", "other_minus_on"), strict=True):
            text = shown[header.index(title)]
            assert text == ("-" if row[key] is None else f"{row[key]:.4f} ± {row[f'{key}_se']:.4f}")


def test_gates_and_heads(runs, page):
    """The last heat map is of the weights of the last checkpoint, in steps of 1/255."""
    found = tensors(runs / "run" / "checkpoints" / "step-00000020")
    gates = [torch.sigmoid(found[f"weight/model.model.layers.{layer}.self_attn.gate"]) for layer in range(2)]
    header, *rows = page.tables["gate: sigmoid(beta), step 20"]
    assert header == ["layer", "head 0", "head 1", "head 2", "head 3"]
    for layer, row in enumerate(rows):
        assert [float(value) for value in row[1:]] == pytest.approx(gates[layer].tolist(), abs=0.01)
    measured = json.loads((runs / "run" / "segments.json").read_text())["heads"]
    for layer, row in enumerate(page.tables["memory's share of the mix"][1:]):
        assert [float(value) for value in row[1:]] == pytest.approx(measured["share"][layer], abs=0.006)


def test_recall_and_passkeys(runs, page):
    header, *rows = page.tables["Accuracy: memory only"]
    assert header == ["segment", "answers", "on", "off", "other"]
    assert rows[0] == ["1", "40", "0.9000 ± 0.0100", "0.0625 ± 0.0200", "0.0500 ± 0.0100"]
    assert page.tables["Accuracy: latest"] == page.tables["Accuracy: memory only"]
    assert page.tables["Passkeys recalled"] == [
        ["depth", "40 tokens", "100 tokens"],
        *(["0", "0.04", "0.10"], ["0.5", "0.29", "0.35"], ["1", "0.54", "0.60"]),
    ]
    assert f"Passkeys: a model on some data ({runs / 'passkey.json'})" in page.captions
    assert f"Recall: a model on some data ({runs / 'run' / 'recall.json'})" in page.captions


def test_configuration_and_samples(runs, page):
    assert page.tables["Options that differ"][1:] == [["model.optimizer.lr", "0.0003", "0.123"]]
    for name in ("run", ODD):
        file = runs / name / "config.yaml"
        assert yaml.safe_load(page.texts[str(file)]) == yaml.safe_load(file.read_text())
    assert page.texts[f"{ODD}: samples/greedy, step 7"] == SAMPLE


def test_page_needs_nothing_else(page):
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_one_run(runs, tmp_path, capsys):
    """Without comparisons, also if it is given twice."""
    page = report(tmp_path / "page.html", runs / "run", runs / "run" / ".." / "run")
    assert page.tables["Learning rates"][0] == ["step", "lr_gates", "lr_matrices", "lr_vectors"]
    assert len(page.tables["Runs"]) == 2 and "Options that differ" not in page.tables
    assert re.search(r"page.html: 1 run, \d+ figures, 2 evaluations, 0.\d MB\n", capsys.readouterr().out)


def test_validation_datasets_with_names(tmp_path):
    """Their tags hold the name of the dataset."""
    run = tmp_path / "run"
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for i, name in enumerate(("", "books/", "code/")):
            writer.add_scalar(f"val/{name}loss", 3.0 + i, 5)
            writer.add_scalar(f"val/{name}segment_2-3", 2.0 + i, 5)
            writer.add_scalar(f"val/{name}segment_2-3_memory_off", 4.0 + i, 5)
    page = report(tmp_path / "page.html", run)
    assert page.tables["Validation loss"] == [["step", "books/loss", "code/loss", "loss"], ["5", "4", "5", "3"]]
    header, row = page.tables["Last validation: loss by segment, nats per token"]
    assert dict(zip(header, row, strict=True)) == {
        "segment": "2-3",
        **{"memory on": "2", "memory off": "4", "books: memory on": "3", "books: memory off": "5"},
        **{"code: memory on": "4", "code: memory off": "6"},
    }
    before = (tmp_path / "page.html").read_text()
    with SummaryWriter(str(run / "tensorboard"), filename_suffix=".later") as writer:
        writer.add_scalar("val/loss", 2.5, 6)
    again = report(tmp_path / "page.html", run)  # replaces the first
    assert again.tables["Validation loss"] == [*page.tables["Validation loss"], ["6", "-", "-", "2.5"]]
    for file in (run / "tensorboard").glob("*.later"):
        file.unlink()
    report(tmp_path / "page.html", run)
    date = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d \w+")
    assert date.sub("", (tmp_path / "page.html").read_text()) == date.sub("", before)


def test_runs_with_steps_of_different_sizes(tmp_path):
    """Their losses are compared by tokens, too."""
    for name, size in (("a", 100), ("b", 300)):
        with SummaryWriter(str(tmp_path / name / "tensorboard")) as writer:
            for step in range(1, 4):
                writer.add_scalar("train/tokens", step * size, step)
                writer.add_scalar("train/loss", 10 - step, step)
    page = report(tmp_path / "page.html", tmp_path / "a", tmp_path / "b")
    assert page.tables["Training loss"][1:] == [["1", "9", "9"], ["2", "8", "8"], ["3", "7", "7"]]
    assert page.tables["Training loss by tokens"] == [
        *(["tokens", "a", "b"], ["100", "9", "-"], ["200", "8", "-"], ["300", "7", "9"], ["600", "-", "8"]),
        ["900", "-", "7"],
    ]
    assert "Training loss by tokens" not in report(tmp_path / "page.html", tmp_path / "a").tables


def test_long_curves_are_means_in_a_band():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1003)
    values[:5] = math.nan
    values[600] = math.inf
    points = [Point(step, 0.0, value) for step, value in enumerate(values)]
    steps, mean, low, high = thinned(points)
    assert len(steps) == MOST_POINTS
    covered = 0
    for i, middle in enumerate(steps):
        size = 3 if i < 1003 - 2 * MOST_POINTS else 2
        own = [v for v in values[covered : covered + size] if math.isfinite(v)]
        assert middle == covered + (size - 1) / 2
        expected = (sum(own) / len(own), min(own), max(own)) if own else (math.nan,) * 3
        assert (mean[i], low[i], high[i]) == pytest.approx(expected, nan_ok=True)
        covered += size
    assert covered == 1003
    assert thinned(points[:3]) == ([0, 1, 2], [pytest.approx(math.nan, nan_ok=True)] * 3, None, None)


def test_a_curve_that_is_never_finite(tmp_path):
    with SummaryWriter(str(tmp_path / "run" / "tensorboard")) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", math.nan, step)
            writer.add_scalar("train/gradient_norm", math.inf, step)
    page = report(tmp_path / "page.html", tmp_path / "run")
    assert [row[1] for row in page.tables["Training loss"][1:]] == ["nan"] * 3
    assert [row[1] for row in page.tables["Gradient norm"][1:]] == ["inf"] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such directory; expected that of a run"),
        (["nowhere", "shards"], "shards: not a run's directory"),  # both are named
        (["passkey.json"], "found a file, expected the directory of a run"),
        (["silent"], "found no point of a curve in"),
        (["run", "--results", "nothing.json"], "nothing.json: no such file; expected what `infini-train evaluate"),
        (["run", "--results", "run/run.json"], "run.json: found other content; expected what `infini-train evaluate"),
        (["run", "--results", "torn.json"], "torn.json: damaged: found no JSON"),
        (["run", "--results", "rows.json"], "rows.json: segments: segments: found a row without off, segment"),
        (["run", "--results", "cells.json"], "cells.json: cells: found some lengths without some depths"),
        (["run", "--results", "heads.json"], "heads.json: heads: found no share and read_norm of equal size"),
        (["run", "--out", "none/page.html"], "none: no such directory to write page.html to"),
        (["run", "--out", "shards"], "shards: found a directory, expected the HTML file to write"),
        (["run", "--out", "passkey.json"], "passkey.json: exists and is no report"),
    ],
)
def test_bad_input_is_one_clear_error(runs, capsys, monkeypatch, words, message):
    monkeypatch.chdir(runs)
    (runs / "silent" / "tensorboard").mkdir(parents=True, exist_ok=True)
    measured = json.loads((runs / "run" / "segments.json").read_text())
    (runs / "torn.json").write_text(json.dumps(measured)[:100])
    rows = [{**measured["segments"][0], "off": None, "segment": 3}]
    (runs / "rows.json").write_text(json.dumps({**measured, "segments": rows}))
    (runs / "cells.json").write_text(json.dumps({"dataset": "d", "cells": CELLS[:-1]}))
    heads = {"share": [[0.5, 0.5]], "read_norm": [[0.5]]}
    (runs / "heads.json").write_text(json.dumps({**measured, "heads": heads}))
    words = words if "--out" in words else [*words, "--out", "other.html"]
    assert command("report", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("infini-train report: error: ") and message in error and "Traceback" not in error
    assert error.count("\n") == 1
    if words[:2] == ["nowhere", "shards"]:
        assert "nowhere: no such directory" in error
    assert not (runs / "other.html").exists()


def test_without_matplotlib(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("infini_train.plots.find_spec", lambda name: None)
    assert command("report", runs / "run", "--out", tmp_path / "page.html") == 2
    assert "matplotlib is not installed; pip install" in capsys.readouterr().err


def test_damage_is_left_out(runs, tmp_path, capsys):
    """A file that looks like an evaluation, a configuration, and the end of the events."""
    run = shutil.copytree(runs / "run", tmp_path / "run")
    (run / "segments.json").write_text("{")
    (run / "config.yaml").write_text("a: [")
    newest = sorted((run / "tensorboard").glob("events*"))[-1]
    os.truncate(newest, newest.stat().st_size - 20)
    page = report(tmp_path / "page.html", run)
    assert "warning: left out" in (error := capsys.readouterr().err) and "segments.json: damaged" in error
    assert page.texts[str(run / "config.yaml")] == "This file cannot be read."
    assert "Loss by segment, nats per token" not in page.tables and len(page.tables["Training loss"]) == 21


def browse(page: Path, shot: Path, dark: bool) -> tuple[str, list[str]]:
    """Show a page in Chromium: the elements that it made of it, and the addresses that the page asked for."""
    home = shot.with_suffix(".home")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--dump-dom"]
    words += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={home}", f"--screenshot={shot}"]
    words += [f"--log-net-log={home}.json", "--window-size=1200,4000"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", page.as_uri()]
    program = shutil.which("chromium")
    assert program is not None
    # It waits for processes that it has left behind unless these write elsewhere.
    with open(f"{home}.html", "w") as out:
        subprocess.run([program, *words], stdout=out, stderr=subprocess.DEVNULL, timeout=120, check=True)
    log = json.loads(Path(f"{home}.json").read_text())
    begins = log["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    asked = [event["params"] for event in log["events"] if event["type"] == begins and "params" in event]
    # The browser itself asks its maker for updates, with "not an origin"; a page of a file has the origin "null".
    own = [about["url"] for about in asked if about.get("url") and about.get("initiator") != "not an origin"]
    return Path(f"{home}.html").read_text(), own


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser(runs, page, tmp_path):
    """Light and dark, figures and tables are there; nothing is asked for, even where the page does not forbid it."""
    control = tmp_path / "control.html"
    control.write_text('<!doctype html><title>x</title><img src="http://127.0.0.1:9/a.png">')
    assert browse(control, tmp_path / "control.png", dark=False)[1] == ["http://127.0.0.1:9/a.png"]
    whole = (runs / "page.html").read_text()
    open_page, count = re.subn(r"<meta http-equiv[^>]*>", "", whole)
    assert count == 1
    (tmp_path / "page.html").write_text(open_page)
    image = pytest.importorskip("matplotlib.image")
    for dark in (False, True):
        made, asked = browse(tmp_path / "page.html", tmp_path / f"{dark}.png", dark)
        assert asked == []
        shown = Page(made)
        assert shown.tables == page.tables and shown.texts == page.texts
        assert shown.tags.count("svg") == len(page.captions)
        pixels = image.imread(tmp_path / f"{dark}.png")[..., :3]
        assert pixels.shape[:2] == (4000, 1200)
        background, text = pixels[5, 5].mean(), pixels[:400].mean(-1)
        assert (background < 0.3 and text.max() > 0.8) if dark else (background > 0.9 and text.min() < 0.2)
        for colour in ((0x3A, 0x87, 0xD4), (0xE0, 0x70, 0x1B)):  # a line of each run
            near = np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02
            assert near.sum() > 500


def test_what_evaluations_write_is_recognised(runs):
    assert read_evaluation(runs / "run" / "segments.json").kind == "segments"
    assert read_evaluation(runs / "run" / "run.json") is None
