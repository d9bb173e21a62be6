"""What the report of runs shows, section by section: figures, tables and texts."""

import math
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from infini_train import plots
from infini_train.run_files import CONFIG, HEAT_MAP_CELL

from . import evaluations as of
from .curves import curves
from .evaluations import Evaluation
from .parts import NO_VALUE, Drawing, Figure, Section, Table, Text, cell
from .runs import Run
from .show import UNKNOWN, number, real

# The dataset's name if it has one, the segments, and whether the memory is off.
BY_SEGMENT = re.compile(r"val/(?:(.+)/)?segment_(\d+(?:-\d+)?)(_memory_off)?")
HEAT_MAPS = {  # by the two ends of a tag
    ("gates/", "layer_by_head"): "gate: sigmoid(beta)",
    ("heads/", "memory_share"): "memory's share of the mix",
    ("heads/", "read_norm_of_both"): "norm of reads, of reads + local",
}


def sections(runs: Sequence[Run], evaluations: Sequence[Evaluation], draw: Drawing) -> Iterator[Section]:
    """Yield the sections of the page; one without parts has nothing to show."""
    yield overview(runs)
    yield curves(runs, draw)
    yield by_segment(runs, [e for e in evaluations if e.kind == of.SEGMENTS], draw)
    yield heads(runs, draw)
    yield recall([e for e in evaluations if e.kind == of.RECALL], draw)
    yield passkeys([e for e in evaluations if e.kind == of.PASSKEY], draw)
    yield samples(runs)
    yield configuration(runs)


def overview(runs: Sequence[Run]) -> Section:
    """Return a table with a row for each run, and the numbers of its last step."""
    header = ["run", "state", "step", "tokens", "training loss", "validation loss", "lowest validation loss"]
    header += ["memory off - on", "tokens/s", "waiting for data", "restarts"]
    rows = []
    for run in runs:
        s = run.state
        lowest = min(
            (p for p in run.points("val/loss") if math.isfinite(p.value)), key=lambda p: p.value, default=None
        )
        wait = run.points("speed/data_wait_share")
        causes = ", ".join(f"{count} x {cause}" for cause, count in s.restart_causes.items())
        rows.append(
            [
                run.name,
                f"{s.state}: {s.detail}" if s.detail else s.state,
                f"{number(s.step)} of {number(s.max_steps)}",
                number(s.tokens),
                real(s.loss),
                real(s.validation_loss),
                f"{real(lowest.value)} at step {lowest.step:,}" if lowest else UNKNOWN,
                real(s.memory_benefit),
                number(s.tokens_per_second),
                f"{wait[-1].value:.1%}" if wait else UNKNOWN,
                f"{s.restarts}: {causes}" if causes else str(s.restarts),
            ]
        )
    cells = [[NO_VALUE if cell == UNKNOWN else cell for cell in row] for row in rows]
    note = "The numbers are those of the last step; losses are in nats per token."
    return Section("overview", "Overview", note, [Table("Runs", header, cells)])


def by_segment(runs: Sequence[Run], evaluations: Sequence[Evaluation], draw: Drawing) -> Section:
    """Return losses by segment: those of each run's last validation, and those of evaluations."""
    parts = [figure for figure in [validation_by_segment(runs, draw)] if figure]
    for path, _, found in evaluations:
        rows = [row for row in found["segments"] if row["tokens"]]
        columns = {"on": "on", "off": "off", "off - on": "off_minus_on", "other": "other"}
        columns["other - on"] = "other_minus_on"
        cells = [
            [row["segment"], f"{row['tokens']:,.0f}", *(with_error(row, key) for key in columns.values())]
            for row in rows
        ]
        tables = [Table("Loss by segment, nats per token", ["segment", "tokens", *columns], cells)]
        use = found.get("heads")
        titles = {"share": "memory's share of the mix", "read_norm": "norm of reads over that of local attention"}
        tables += [head_table(title, use[key]) for key, title in titles.items()] if use else []
        parts.append(draw(plots.segments(rows, use), about("Loss by segment", path, found), *tables))
    note = (
        "Loss by the number of the segment in its document. Off: no layer reads its memory. Other: the document "
        "continues with the memory that another document left. Errors are standard errors over documents."
    )
    return Section("segments", "Loss by segment", note, parts)


def validation_by_segment(runs: Sequence[Run], draw: Drawing) -> Figure | None:
    """Return the losses by segment of each run's last validation, or None if no run has validated."""
    values: dict[str, dict[str, float]] = {}  # by label and segment
    for run in runs:
        found = {tag: match for tag in run.logged.points if (match := BY_SEGMENT.fullmatch(tag))}
        last = max((run.points(tag)[-1].step for tag in found), default=None)
        for tag, match in found.items():
            point, (dataset, segment, off) = run.points(tag)[-1], match.groups()
            if point.step == last:
                words = [run.name if len(runs) > 1 else "", dataset or "", "memory off" if off else "memory on"]
                values.setdefault(": ".join(filter(None, words)), {})[segment] = point.value
    if not values:
        return None
    names = sorted(set().union(*values.values()), key=lambda name: int(name.partition("-")[0]))
    rows: list[dict[str, Any]] = []
    for name in names:
        known = {label: there.get(name) for label, there in values.items()}
        rows.append({"segment": name, **known, **{f"{label}_se": None for label in known}})
    title = "Last validation of each run" if len(runs) > 1 else "Last validation"
    cells = [[row["segment"], *(cell(row[label]) for label in values)] for row in rows]
    drawn = plots.losses_by_segment(rows, {label: label for label in values})
    return draw(drawn, title, Table(f"{title}: loss by segment, nats per token", ["segment", *values], cells))


def heads(runs: Sequence[Run], draw: Drawing) -> Section:
    """Return the last heat maps of layers and heads of each run."""
    parts = []
    for run in runs:
        maps, tables = {}, []
        for (begin, end), title in HEAT_MAPS.items():
            for tag, (step, image) in sorted(run.logged.images.items()):
                if tag.startswith(begin) and tag.endswith(end):
                    dataset = tag.removeprefix(begin).removesuffix(end).strip("/")
                    name = f"{dataset}: {title}" if dataset else title
                    maps[name] = values_of(image)
                    tables.append(head_table(f"{name}, step {step:,}", maps[name]))
        if maps:
            parts.append(draw(plots.head_maps(maps), run.name, *tables))
    note = (
        "Gates and shares of the memory by layer and head, as last logged, from 0 (nothing from the memory) to 1. "
        "Shares and norms are means over the tokens of a validation."
    )
    return Section("heads", "Gates and reads", note, parts)


def values_of(image: bytes) -> list[list[float]]:
    """Return the values, from 0 to 1 in steps of 1/255, of a heat map that a run logged as PNG."""
    from matplotlib.image import imread

    pixels = imread(BytesIO(image), format="png")[..., 0]
    return pixels[HEAT_MAP_CELL // 2 :: HEAT_MAP_CELL, HEAT_MAP_CELL // 2 :: HEAT_MAP_CELL].tolist()


def head_table(title: str, values: Sequence[Sequence[float]]) -> Table:
    """Return a table of values, a row for each layer."""
    rows = [[str(layer), *(f"{value:.2f}" for value in row)] for layer, row in enumerate(values)]
    return Table(title, ["layer", *(f"head {head}" for head in range(len(values[0])))], rows)


def recall(evaluations: Sequence[Evaluation], draw: Drawing) -> Section:
    """Return the accuracies of evaluations of recall."""
    parts = []
    for path, _, found in evaluations:
        named = {name.replace("_", " "): rows for name, rows in found["accuracy"].items()}
        tables = []
        for name, rows in named.items():
            cells = [
                [r["segment"], f"{r['answers']:,.0f}", *(with_error(r, mode) for mode in of.MODES)] for r in rows
            ]
            shades = [[0, *(row[mode] for mode in of.MODES)] for row in rows]
            tables.append(Table(f"Accuracy: {name}", ["segment", "answers", *of.MODES], cells, shades))
        drawn = plots.accuracy_lines(named, of.MODES, found["chance"])
        parts.append(draw(drawn, about("Recall", path, found), *tables))
    note = (
        "Right answers by the segment of the question, with the document's own memory (on), none (off) and another "
        "document's (other). Memory only: local attention does not see where the key was last told. Latest: of "
        "these, the key has had several values."
    )
    return Section("recall", "Recall", note, parts)


def passkeys(evaluations: Sequence[Evaluation], draw: Drawing) -> Section:
    """Return the heat maps of evaluations of passkeys."""
    parts = []
    for path, _, found in evaluations:
        cells = {(cell["depth"], cell["tokens"]): cell["right"] for cell in found["cells"]}
        depths, lengths = (sorted(set(values)) for values in zip(*cells, strict=True))
        shades = [[cells[depth, length] for length in lengths] for depth in depths]
        rows = [[f"{depth:g}", *(f"{value:.2f}" for value in row)] for depth, row in zip(depths, shades, strict=True)]
        header = ["depth", *(f"{length:,} tokens" for length in lengths)]
        table = Table("Passkeys recalled", header, rows, shades)
        parts.append(draw(plots.heat_map(found["cells"], ""), about("Passkeys", path, found), table))
    note = "Share of passkeys with every digit right, by length of the document and depth of the key in it."
    return Section("passkeys", "Passkeys", note, parts)


def samples(runs: Sequence[Run]) -> Section:
    """Return the last text of each tag that runs have logged."""
    parts = []
    for run in runs:
        for tag, texts in run.logged.texts.items():
            step, text = texts[-1]
            parts.append(Text(f"{run.name}: {tag.removesuffix('/text_summary')}, step {step:,}", text))
    return Section("samples", "Samples of text", "The last text of each kind that a run has logged.", parts)


def configuration(runs: Sequence[Run]) -> Section:
    """Return the options in which runs differ, and all options of each run."""
    parts: list[Table | Text] = []
    options = [flat(run.config) for run in runs]
    if len(runs) > 1:
        names = sorted(set().union(*options) - {"run"})
        rows = [[name, *(found.get(name, NO_VALUE) for found in options)] for name in names]
        different = [row for row in rows if len(set(row[1:])) > 1] or [["none", *([NO_VALUE] * len(runs))]]
        parts.append(Table("Options that differ", ["option", *(run.name for run in runs)], different))
    for run in runs:
        file = run.path / CONFIG
        text = file.read_text(errors="replace") if run.config is not None else "This file cannot be read."
        parts.append(Text(str(file), text))
    return Section("configuration", "Configuration", "The options of the last start of each run.", parts)


def flat(tree: Any, name: str = "") -> dict[str, str]:
    """Return the values of nested dictionaries as texts, by their names joined with dots."""
    if isinstance(tree, dict) and tree:
        return {
            k: v for key, value in tree.items() for k, v in flat(value, f"{name}.{key}" if name else str(key)).items()
        }
    return {name: "null" if tree is None else str(tree)} if name else {}


def with_error(row: dict[str, Any], key: str) -> str:
    """Format a value and, if there is one, its standard error."""
    if row[key] is None:
        return NO_VALUE
    return f"{row[key]:.4f}" + ("" if row[f"{key}_se"] is None else f" ± {row[f'{key}_se']:.4f}")


def about(what: str, path: Path, found: dict[str, Any]) -> str:
    """Return the caption of an evaluation."""
    return f"{what}: {found.get('model', 'a model')} on {found['dataset']} ({path})"
