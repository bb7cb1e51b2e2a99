"""launch/report.py on small made-up studies: what it prints is what the files say, and what it concludes follows from the intervals."""

import copy
import csv
import errno
import importlib.util
import io
import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from common import ROOT
from PIL import Image

spec = importlib.util.spec_from_file_location("report", ROOT / "launch" / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules["report"] = report
spec.loader.exec_module(report)

CONDITIONS = report.CONDITIONS


def row(metric, value, label="all", half=None, n=2000, floor=None, note=None) -> dict:
    low, high = (None, None) if half is None or value is None else (value - half, value + half)
    return {"metric": metric, "label": label, "value": value, "low": low, "high": high, "n": n, "floor": floor, "note": note}


def training(method, steps=300, **changes) -> dict:
    peft = method in report.PEFT
    parameters = {"unet": 1000 + len(method)} if peft else dict.fromkeys(report.row_components(method), 5000)
    rates = {"learning_rate": 1e-4} if peft else {"unet_lr": 1e-5, "text_encoder_lr": 1e-6, "vae_lr": 1e-6, "vae_loss": "anchored"}
    return {
        "script": "train_peft.py" if peft else "train_full.py", "method": method, "trainable_parameters": parameters, "base_model": "launch/demo/base",
        "identity": {"base_fingerprint": "b" * 64, "data_fingerprint": "d" * 64, "seed": 0}, "images": 200, "patients": 150, "steps": steps,
        "global_batch_size": 8, "device": "cpu", "arguments": rates, "versions": {"torch": "2.0"}, "notes": [], "resolution": 64, "resize_mode": "squash",
        "results": [
            *(row("trainable_parameters", count, name, n=None) for name, count in parameters.items()),
            row("seconds_per_epoch", 1.25, n=200), row("peak_memory_gib", 2.5, n=None),
            row("heldout_diffusion_start", 0.2, half=0.01), row("heldout_diffusion", 0.1, half=0.01), row("heldout_diffusion_change", -0.1, half=0.02),
        ],
    } | changes  # fmt: skip


def generation(name, fid=10.0, margin=0.3, auroc=0.8, vendi=3.0, n=2000, real="r" * 64) -> dict:
    """An evaluation whose intervals are fid ± 1, vendi ± 0.1, margin ± 0.05, auroc ± 0.03."""
    rows = [
        row("fid", fid, half=1.0, n=n), row("fid_half_n", fid + 2, half=1.0, n=n // 2, floor=2.0), row("fid_real_halves_half_n", 2.0, half=0.5, n=n // 2),
        row("vendi", vendi, half=0.1, floor=4.0), row("vendi_ratio", vendi / 4, half=0.05, floor=1.0),
        row("colour_visible", 0.0, half=0.0, floor=0.0), row("memorisation_nearer_train", 0.6, half=0.05, floor=0.5),
    ]  # fmt: skip
    for label in CONDITIONS:
        rows += [row("class_consistency", 0.6, label, 0.05), row("class_consistency_margin", margin, label, 0.05), row("class_consistency_auroc", auroc, label, 0.03)]
        rows += [row("class_consistency_real", 0.9, label, 0.05), row("class_consistency_margin_real", 0.5, label, 0.05), row("class_consistency_auroc_real", 0.9, label, 0.03)]
    rows.append(row("class_consistency_auroc", auroc, "all", 0.03))
    return {
        "script": "eval_generation.py", "name": name, "arguments": {"seed": 0, "uncertain": "ignore", "real_csv": None}, "features": {"fingerprint": "f" * 64},
        "classifier": {"fingerprint": "c" * 64}, "resolution": 64, "resize_mode": "squash", "pool": "unique", "images": {"real": {"fingerprint": real, "all": n}},
        "versions": {"torch": "2.0"}, "warnings": ["a warning of all"], "results": rows,
    }  # fmt: skip


def with_gain(result: dict, gain: float, half: float) -> dict:
    """An evaluation that has the FID's difference to the base model's."""
    return result | {"results": [*result["results"], row("fid_gain", gain, half=half)]}


def downstream(auroc=0.7, gain=0.05, note=None, **settings) -> dict:
    """A downstream run whose intervals are auroc ± 0.03 and gain ± 0.02."""
    rows = [row("auroc", auroc, half=0.03, floor=0.5)]
    for label in CONDITIONS:
        rows += [
            row("accuracy", 0.8 + gain, label, 0.02, floor=0.8, note=note), row("constant_accuracy", 0.8, label, 0.02),
            row("accuracy_gain", gain, label, 0.02, floor=0.0), row("auroc", auroc, label, 0.03, floor=0.5),
        ]  # fmt: skip
    return {
        "script": "eval_downstream.py", "train_on": "synthetic", "settings": {"test": "t" * 64, "labels": CONDITIONS, "num_train_images": 500, "num_seeds": 3, "seed": 0} | settings,
        "versions": {"torch": "2.0"}, "images": {"test": 900, "test_patients": 700}, "notes": [], "results": rows,
    }  # fmt: skip


def write_study(folder, runs=None, evaluations=None, downstreams=None):
    """Writes the JSON files of a study; the parts map rows to what their file holds."""
    parts = {"runs": runs, "evaluations": evaluations, "downstream": downstreams}
    for part, (name, _) in report.FILES.items():
        for key, found in (parts[part] or {}).items():
            (folder / part / key).mkdir(parents=True, exist_ok=True)
            (folder / part / key / name).write_text(found if isinstance(found, str) else json.dumps(found))
    return folder


@pytest.fixture
def three(tmp_path):
    """U-Net is best in all that decides; LoRA cannot be told from BitFit; the base model is far behind."""
    return write_study(
        tmp_path / "study",
        {name: training(name) for name in ("unet", "lora", "bitfit")},
        {"unet": generation("unet", 5.0, auroc=0.95), "lora": generation("lora", 10.0), "bitfit": generation("bitfit", 11.0, margin=0.05), "base": generation("base", 40.0, margin=0.0, auroc=0.5)},
        {"unet": downstream(0.9), "lora": downstream(0.7), "bitfit": downstream(0.72, gain=0.02, note="CONSTANT"), "base": downstream(0.5, gain=-0.1), "real": downstream(0.95, gain=0.15)},
    )  # fmt: skip


def make(study, *flags):
    """Runs the script; returns the HTML, the Markdown, and the lines of the CSV."""
    report.main(report.parse_args(["--study", str(study), *flags]))
    folder = study / "report"
    lines = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    return (folder / "report.html").read_text(), (folder / "report.md").read_text(), lines


class Page(HTMLParser):
    """A page's tables as texts of cells with their classes, its addresses, and its tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.addresses, self.tags, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [(tag, name, attributes[name]) for name in ("src", "href", "srcset", "action", "data") if name in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", attributes.get("class") or ""])

    def handle_data(self, data):
        self.text.append(data)
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1][0] += data + "\n"

    def table(self, *header: str) -> dict[str, dict[str, list]]:
        """The first table whose head has these words: cells by the row's name (its second column) and the column's."""
        for head, *rows in self.tables:
            columns = [text.strip() for text, _ in head]
            if all(any(word in column for column in columns) for word in header):
                return {cells[1][0].split("\n")[0]: dict(zip(columns, cells)) for cells in rows}
        raise AssertionError(f"no table with {header}")


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def test_csv_has_every_figure_as_the_files_have_it(three):
    _, _, lines = make(three)
    found = {(line["table"], line["row"], line["metric"], line["label"]): line for line in lines}
    assert len(found) == len(lines)
    count = 0
    for part, (name, _) in report.FILES.items():
        for path in (three / part).glob(f"*/{name}"):
            for figure in json.loads(path.read_text())["results"]:
                table = {"runs": "1", "evaluations": "3", "downstream": "4"}[part]
                line = found[table, path.parent.name, figure["metric"], figure["label"]]
                for key in ("value", "low", "high", "n", "floor"):
                    assert line[key] == ("" if figure[key] is None else repr(figure[key])), (line, key)
                count += 1
    assert count > 200
    assert float(found["3", "unet", "fid", "all"]["paper"]) == 3.42 and float(found["3", "bitfit", "class_consistency", "Edema"]["paper"]) == 0.098
    # What the paper has and this study has not.
    assert found["3", "dora", "fid", "all"]["value"] == "" and float(found["3", "dora", "fid", "all"]["paper"]) == 5.72
    assert found["2", "paper", "images_test", "Edema"]["paper"] == "9210"
    assert found["1", "vae", "status", "all"]["note"] == "not run"


def test_real_files_of_the_scripts_are_read(tmp_path):
    """The rows that the scripts' own functions make have the report's form."""
    import eval_downstream
    import eval_generation
    import train_full

    changes = {"start": np.array([0.2, 0.3, 0.25]), "end": np.array([0.1, 0.15, 0.2])}
    rows = train_full.heldout_rows({"diffusion": changes["start"]}, {"diffusion": changes["end"]})
    margins = [eval_generation.margin_row("class_consistency_margin", np.array([1.0, 1, 0, 1]), np.array([0.0, 0, 1, 0]), "Edema")]
    scored = [eval_downstream.result_row("auroc", 0.7, "all", 0.6, 0.8, 100, 0.5, None)]
    study = write_study(tmp_path, {"unet": training("unet", results=rows)}, {"unet": generation("unet") | {"results": margins}}, {"unet": downstream() | {"results": scored}})
    page = Page(make(study, "--rows", "unet")[0])
    cell = page.table("held-out diffusion loss")["U-Net"]["held-out diffusion loss"][0]
    assert "0.2500 → 0.1500" in cell and "-0.1000" in cell
    assert "0.700" in page.table("mean AUROC ↑")["U-Net"]["mean AUROC ↑"][0]


def test_cells_have_value_interval_and_the_papers_figure(three):
    page = Page(make(three)[0])
    cell = page.table("FID ↓")["U-Net"]["FID ↓"][0]
    assert cell.split() == ["5.00", "4.00", "to", "6.00", "paper:", "3.42"]
    assert "60.0" in page.table("FID ↓")["LoRA"]["Pn, % ↑"][0] and "paper: 1.0" in page.table("FID ↓")["LoRA"]["Pn, % ↑"][0]
    assert page.table("parameters")["LoRA"]["parameters"][0].split() == ["1,004", "paper:", "1.59", "million"]
    assert "85.0" in page.table("trained on images of", "Ca, %")["LoRA"]["Ca, %"][0]


def test_rows_that_are_missing_are_shown(three):
    (three / "evaluations" / "lora" / "generation_metrics.json").unlink()
    html, markdown, _ = make(three)
    page = Page(html)
    assert list(page.table("parameters")) == [name for name, _ in report.STRATEGIES.values()]
    assert "not run" in page.table("parameters")["VAE"]["strategy"][0]
    assert "not evaluated" in page.table("FID ↓")["LoRA"]["images"][0] and "not run" in page.table("FID ↓")["DoRA"]["images"][0]
    assert "not evaluated" not in page.table("FID ↓")["BitFit"]["images"][0]
    assert "Not run: Text Encoder, VAE, U-Net + Text Encoder, U-Net + VAE, VAE + Text Encoder, U-Net + VAE + Text Encoder, DoRA and DiffFit." in markdown
    assert "Run, but not fully evaluated: LoRA." in markdown
    assert list(Page(make(three, "--rows", "lora", "unet")[0]).table("parameters")) == ["U-Net", "LoRA"]


# ----------------------------------------------------------------------------------------------------------------------
# Greying and footnotes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fid", "grey"), [(37.9, False), (38.0, True), (45.0, True)])
def test_fid_is_grey_unless_below_the_base_models_interval(three, fid, grey):
    write_study(three, evaluations={"lora": generation("lora", fid)})
    text, style = Page(make(three)[0]).table("FID ↓")["LoRA"]["FID ↓"]
    assert ("grey" in style) == ("no lower than the base model" in text) == grey


@pytest.mark.parametrize(("gain", "beats"), [(2.0, True), (1.0, False)])
def test_the_difference_to_the_base_model_decides_where_it_was_taken(three, gain, beats):
    """The intervals of 38.5 and 40 overlap; the difference's own, of half width 1, is above 0 or touches it."""
    write_study(three, evaluations={"lora": with_gain(generation("lora", 38.5), gain, 1.0)})
    page, markdown, _ = make(three)
    assert ("grey" in Page(page).table("FID ↓")["LoRA"]["FID ↓"][1]) != beats
    assert f"; {'all' if beats else 'U-Net and BitFit'} beat the base model (40.00)" in markdown


@pytest.mark.parametrize(("fid", "reached"), [(1.5, True), (1.6, False)])
def test_fid_that_reaches_real_images_is_said_and_not_grey(three, fid, reached):
    write_study(three, evaluations={"lora": generation("lora", fid)})
    text, style = Page(make(three)[0]).table("FID ↓")["LoRA"]["FID ↓"]
    assert ("as low as real images" in text) == reached and "grey" not in style


@pytest.mark.parametrize(("margin", "grey"), [(0.051, False), (0.05, True), (-0.2, True)])
def test_consistency_is_grey_where_the_head_fires_no_more_for_its_own_prompt(three, margin, grey):
    write_study(three, evaluations={"lora": generation("lora", margin=margin)})
    page = Page(make(three)[0])
    text, style = page.table("FID ↓")["LoRA"]["Ca, % ↑"]
    assert ("grey" in style) == ("no more than for other prompts" in text) == grey
    assert page.table("FID ↓")["U-Net"]["Ca, % ↑"][1] == "figure"


@pytest.mark.parametrize(("gain", "grey"), [(0.021, False), (0.02, True), (-0.1, True)])
def test_accuracy_is_grey_unless_above_the_constant_predictor(three, gain, grey):
    write_study(three, downstreams={"lora": downstream(gain=gain)})
    text, style = Page(make(three)[0]).table("trained on images of", "Ca, %")["LoRA"]["Ca, %"]
    assert ("grey" in style) == ("not above the floor" in text) == grey and "CONSTANT" not in text


def test_constant_is_said(three):
    cells = Page(make(three)[0]).table("trained on images of", "Ca, %")
    assert "CONSTANT" in cells["BitFit"]["Pe, %"][0] and "CONSTANT" not in cells["U-Net"]["Pe, %"][0]


def test_fingerprints_are_shortened_to_what_tells_them_apart():
    assert {report.shown(kind + "0123456789abcdef" * 4) for kind in ("", "xrv-", "classifier-")} == {"01234567"}


@pytest.mark.parametrize(("auroc", "grey"), [(0.531, False), (0.53, True)])
def test_auroc_is_grey_at_chance(three, auroc, grey):
    write_study(three, downstreams={"lora": downstream(auroc)})
    text, style = Page(make(three)[0]).table("mean AUROC ↑")["LoRA"]["mean AUROC ↑"]
    assert ("grey" in style) == ("not above chance" in text) == grey


def test_footnotes_are_on_exactly_the_right_cells(three):
    html = make(three)[0]
    page, numbers = Page(html), {}
    for number, text in re.findall(r'<li id="note-(\d+)">(.*?)</li>', html):
        numbers[next(key for key, note in report.FOOTNOTES.items() if report.html.escape(note) == text)] = f"[{number}]"

    def marked(cells: dict, key: str) -> set:
        return {(name, column) for name, columns in cells.items() for column, (text, _) in columns.items() if numbers[key] in text.split()}

    three_, four, one = page.table("FID ↓"), page.table("trained on images of", "Ca, %"), page.table("parameters")
    assert marked(three_, "dora_fid") == {("DoRA", "FID ↓")}
    assert marked(four, "no_finding") == {("U-Net + Text Encoder", "Nf, %")}
    assert marked(three_, "unet_edema") == {("U-Net", "Lo, % ↑"), ("U-Net", "Ed, % ↑")}
    assert marked(three_, "pneumothorax") == {("LoRA", "Pn, % ↑"), ("DoRA", "Pn, % ↑")}
    assert marked(one, "parameters") == {(name, "parameters") for row, (name, _) in report.STRATEGIES.items() if row not in report.PEFT and "unet" in row}
    excluded = {"Text Encoder", "VAE", "U-Net + VAE", "VAE + Text Encoder", "U-Net + VAE + Text Encoder", "DiffFit"}
    assert marked(three_, "excluded") == {(name, "images") for name in excluded}
    assert {name for name, columns in three_.items() if "not reported" in columns["images"][0]} == excluded - {"U-Net + VAE"}
    # 13 of the paper's 36 cells are those of a constant predictor, and 34 do not beat the more frequent answer.
    assert len(marked(four, "constant")) == 13
    cells = [(v, report.PAPER_SPLIT[label][2] / report.PAPER_TEST_IMAGES) for values in report.PAPER_DOWNSTREAM.values() for v, label in zip(values, CONDITIONS)]
    assert sum(value <= 100 * max(p, 1 - p) for value, p in cells) == 34


def test_the_papers_claims_that_the_footnotes_deny_are_denied_by_its_tables():
    rows, columns = report.PAPER_DOWNSTREAM, {"fid": 0, "vendi": 1}
    peft = ("lora", "dora", "bitfit")
    for (table, name, metric, label), notes in report.CELL_NOTES.items():
        values = {r: (report.PAPER_GENERATION[r][columns[metric]] if metric in columns else report.paper_value(table, r, metric, label)) for r in rows}
        if "unet_best" in notes:
            assert max(values[r] for r in peft) > values["unet"]
        if "highest" in notes:
            assert max(values.values()) > values[name]
        if "transfer" in notes:
            assert values[name] < 1 - report.PAPER_SPLIT[label][2] / report.PAPER_TEST_IMAGES
    noted = {key for key, notes in report.CELL_NOTES.items() if "unet_best" in notes}
    better = {(t, "unet", m, c) for t, m, labels in (("3", "vendi", ["all"]), ("3", "class_consistency", CONDITIONS), ("4", "accuracy", CONDITIONS)) for c in labels
              if max(report.paper_value(t, r, m, c) for r in peft) > report.paper_value(t, "unet", m, c)}  # fmt: skip
    assert noted == better


# ----------------------------------------------------------------------------------------------------------------------
# Conclusions
# ----------------------------------------------------------------------------------------------------------------------


def test_a_winner_beyond_the_intervals_is_named(three):
    markdown = make(three)[1]
    assert "U-Net is ahead of every other strategy, beyond the 95 % intervals, in FID, following the prompt and downstream AUROC." in markdown
    assert "FID: lowest for U-Net (5.00), beyond the intervals of all others; LoRA and BitFit do not differ from each other; all beat the base model (40.00)." in markdown
    assert "Vendi score: none of the 3 strategies differ beyond their intervals" in markdown


@pytest.mark.parametrize(
    ("dora", "told"),
    [
        (20.0, "of the others these differ, the better first: LoRA from DoRA; BitFit from DoRA; no other pair does"),
        (12.5, "of the others these differ, the better first: LoRA from DoRA; no other pair does"),
        (10.5, "LoRA, DoRA and BitFit do not differ from each other"),
    ],
)
def test_what_differs_behind_the_best_is_said(three, dora, told):
    """Intervals are ± 1: LoRA 10, BitFit 11."""
    write_study(three, evaluations={"dora": generation("dora", dora)})
    assert f"FID: lowest for U-Net (5.00), beyond the intervals of all others; {told}; all beat" in make(three)[1]
    write_study(three, evaluations={"bitfit": generation("bitfit", 14.0), "dora": generation("dora", 17.0)})
    assert "; LoRA, BitFit and DoRA all differ from each other; all beat" in make(three)[1]


def test_every_pair_is_in_a_table(three):
    write_study(three, evaluations={"dora": generation("dora", 12.5)})
    page, markdown, _ = make(three, "--rows", "unet", "text_encoder", "lora", "dora", "bitfit")
    cells = Page(page).table("strategy", "FID", "Vendi score", "Downstream AUROC")
    fid = {name: row["FID"][0].strip() for name, row in cells.items()}
    assert fid == {
        "U-Net": "better than 8, 9, 10",
        "Text Encoder": "not compared",
        "LoRA": "better than 9; level with 10",
        "DoRA": "level with 10",
        "BitFit": "level with 8, 9",
    }
    assert cells["DoRA"]["Downstream AUROC"][0].strip() == "not compared"
    write_study(three, evaluations={"difffit": generation("difffit", 30.0)})
    page, markdown, _ = make(three)
    assert "FID: lowest for U-Net (5.00), beyond the intervals of all others; which of the others differ stands below, pair by pair; all beat" in markdown
    assert Page(page).table("strategy", "FID", "Vendi score")["DiffFit"]["FID"][0].strip() == "worse than all"


@pytest.mark.parametrize(("fid", "tied"), [(7.0, True), (7.01, False)])
def test_intervals_that_touch_do_not_differ(three, fid, tied):
    write_study(three, evaluations={"lora": generation("lora", fid)})
    markdown = make(three)[1]
    assert ("FID: lowest for U-Net (5.00), not distinguishable from LoRA; behind: BitFit" in markdown) == tied
    assert ("U-Net is ahead of every other strategy" in markdown) != tied
    assert ("No outright winner, but U-Net is the one strategy" in markdown) == tied


def test_no_winner_where_the_leaders_differ_or_beat_nothing(three):
    write_study(three, downstreams={"lora": downstream(0.98)})
    assert "No winner can be named: no strategy leads in FID, following the prompt and downstream AUROC at once" in make(three)[1]
    write_study(three, evaluations={"base": generation("base", 5.0)})
    assert "none beat the base model (5.00)" in make(three)[1]


def test_figures_of_different_images_are_not_ranked(three):
    write_study(three, evaluations={"lora": generation("lora", 10.0, real="s" * 64)})
    markdown = make(three)[1]
    assert "FID: not compared, since the rows differ in real images (fingerprint)." in markdown
    assert "**Not comparable as they stand**" in markdown and "ssssssss (LoRA)" in markdown
    write_study(three, evaluations={"lora": generation("lora", 10.0, n=500)})
    markdown = make(three)[1]
    assert "FID: not compared, since the rows differ in number of images n." in markdown and "below 1,024" in markdown


def test_what_was_not_compared_is_left_open(three):
    for row in ("unet", "lora", "bitfit"):
        (three / "downstream" / row / "downstream_metrics.json").unlink()
    markdown = make(three)[1]
    assert "U-Net is ahead of every other strategy, beyond the 95 % intervals, in FID and following the prompt. That leaves open downstream AUROC, not compared." in markdown
    assert "Downstream AUROC: not measured for any strategy." in markdown


def test_different_budgets_are_said_loudly(three):
    page = make(three)
    assert "Training budgets differ" not in page[1] and "Not comparable" not in page[0] and "once: no interval here covers" in page[1]
    write_study(three, {"lora": training("lora", steps=1000)})
    html, markdown, _ = make(three)
    assert "- Training budgets differ: steps 300 (U-Net and BitFit) and 1,000 (LoRA)." in markdown and 'role="alert"' in html
    assert "the rows are not comparable as they stand" in markdown
    changed = training("bitfit")
    changed["arguments"]["learning_rate"] = 1e-2
    write_study(three, {"lora": training("lora"), "bitfit": changed})
    assert "Training budgets differ: learning rate of PEFT 0.0001 (LoRA) and 0.01 (BitFit)." in make(three)[1]


def test_splits_by_different_seeds_are_said_loudly(three):
    assert "split by different seeds" not in make(three)[1]
    run, judged = training("lora"), generation("lora", 10.0)
    run["arguments"]["split_seed"], judged["arguments"]["split_seed"] = 1, 0
    write_study(three, {"lora": run}, {"lora": judged})
    assert "Patients were split by different seeds, so training patients may be among the test images: 1 in training (such as LoRA); 0 in the evaluation (such as LoRA)." in make(three)[1]


def test_the_split_is_counted_and_disagreement_is_said(three):
    counted = training("unet")
    counted["results"] += [row("images_train", 90, "Edema"), row("images_train", 200), row("images_val", 30, "Edema")]
    judged = generation("unet", 5.0)
    judged["results"].append(row("images_test", 70, "Edema"))
    write_study(three, {"unet": counted}, {"unet": judged})

    def edema() -> list[str]:
        table = next(t for t in Page(make(three)[0]).tables if t[0][0][0].strip() == "finding")
        return next([re.sub(r"\[\d+\]", "", text).split() for text, _ in cells] for cells in table if cells[0][0].strip() == "Edema")

    assert edema() == [["Edema"], ["90", "paper:", "6,447"], ["30", "paper:", "2,584"], ["70", "paper:", "9,210"]]
    other = training("lora")
    other["results"].append(row("images_train", 91, "Edema"))
    write_study(three, {"lora": other})
    assert edema()[1][:3] == ["the", "rows", "differ"]
    _, markdown, lines = make(three)
    assert "The rows used different splits: training images with Edema: 90 (U-Net) and 91 (LoRA)." in markdown
    assert {line["value"] for line in lines if line["table"] == "2" and line["metric"] == "images_train" and line["label"] == "Edema"} == {"90", "91"}


# ----------------------------------------------------------------------------------------------------------------------
# The files themselves
# ----------------------------------------------------------------------------------------------------------------------


def add_samples(study, tmp_path, names=("base", "unet", "lora")) -> str:
    """Three images of each of two conditions, each of one grey level; returns a table of real images."""
    levels = {}
    for i, name in enumerate(names):
        lines = ["file_name,prompt,index,Cardiomegaly,Edema,seed,guidance_scale"]
        # In reverse, so that the index is what orders them.
        for j, (cardiomegaly, edema, index) in enumerate([(1.0, "", 2), (1.0, "", 1), (1.0, "", 0), ("", 1.0, 0), ("", 1.0, 1), (1.0, 1.0, 0)]):
            levels[name, j] = 20 + 60 * i + 5 * j
            (study / "samples" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), levels[name, j]).save(study / "samples" / name / f"{j}.png")
            lines.append(f"{j}.png,a prompt,{index},{cardiomegaly},{edema},0,7.5")
        (study / "samples" / name / "metadata.csv").write_text("\n".join(lines) + "\n")
    real = tmp_path / "real"
    real.mkdir(exist_ok=True)
    lines = ["Path,patient_id,Frontal/Lateral,Cardiomegaly,Edema"]
    for j, (patient, view, cardiomegaly, edema) in enumerate([("a", "Lateral", 1, ""), ("b", "Frontal", 1, 1), ("c", "Frontal", 1, ""), ("d", "Frontal", 1, ""), ("e", "Frontal", "", 1)]):
        Image.new("L", (16, 16), 200 + 10 * j).save(real / f"{j}.png")
        lines.append(f"{j}.png,{patient},{view},{cardiomegaly},{edema}")
    (real / "table.csv").write_text("\n".join(lines) + "\n")
    return str(real / "table.csv")


def test_figure_2_is_the_first_samples_of_each_condition(three, tmp_path):
    table = add_samples(three, tmp_path)
    judged = generation("unet", 5.0)
    judged["arguments"] |= {"real_split": "all"}
    write_study(three, evaluations={"unet": judged})
    html, markdown, _ = make(three, "--rows", "unet", "lora", "--real_csv", table)
    picture = Image.open(three / "report" / "figure2.png")
    step, left, top = report.TILE + report.GAP, 280, 34
    assert picture.size == (left + 2 * (2 * step + 2 * report.GAP), top + 4 * step)

    def level(line, column, i):
        return picture.getpixel((left + column * (2 * step + 2 * report.GAP) + i * step + 60, top + line * step + 20))[0]

    # Real images: frontal; those with one finding first.
    assert [level(0, 0, 0), level(0, 0, 1), level(0, 1, 0), level(0, 1, 1)] == [220, 230, 240, 210]
    # The base model, then the strategies; by index.
    assert [level(1, 0, 0), level(1, 0, 1), level(1, 1, 0), level(1, 1, 1)] == [30, 25, 35, 40]
    assert [level(2, 0, 0), level(3, 1, 1)] == [90, 160]
    assert "![Grid of chest radiographs. Rows: real images, base model, untouched, U-Net, LoRA" in markdown
    (source,) = [value for tag, name, value in Page(html).addresses if tag == "img"]
    assert source.startswith("data:image/png;base64,") and 'alt="Grid of chest radiographs.' in html


def test_samples_of_different_settings_are_said(three, tmp_path):
    add_samples(three, tmp_path)
    path = three / "samples" / "lora" / "metadata.csv"
    path.write_text(path.read_text().replace(",7.5", ",3.0"))
    markdown = make(three)[1]
    assert "Samples were drawn differently: guidance 7.5 (base model, untouched and U-Net) and 3.0 (LoRA)." in markdown
    assert "No real images: no evaluation names a table of real images; pass --real_csv" in markdown


def test_the_page_loads_nothing(three, tmp_path):
    page = Page(make(three, "--real_csv", add_samples(three, tmp_path))[0])
    outside = [(tag, value) for tag, _, value in page.addresses if not value.startswith(("#", "data:image/png;base64,"))]
    assert outside and {tag for tag, _ in outside} == {"a"} and all(value.startswith("https://arxiv.org/") for _, value in outside)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in report.STYLE and "@import" not in report.STYLE


def test_what_files_say_is_escaped(three):
    evil = "<script>alert(1)</script>|\n`x`"
    judged = generation(evil, 5.0)
    judged["warnings"] = [evil]
    judged["results"] += [row("class_consistency", 0.5, evil, 0.1), row("class_consistency_auroc", None, evil, note=evil), row("fires", 0.5, evil)]
    run = training("unet", base_model=evil, device=evil, versions={evil: evil})
    write_study(three, {"unet": run}, {"unet": judged})
    html, markdown, lines = make(three, "--title", f"A {evil}")
    assert "script" not in Page(html).tags and "<script" not in html and "<script" not in markdown
    assert html.count("&lt;script&gt;") >= 6
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert any("&lt;script&gt;" in line for line in tables)
    # Each table's lines have as many cells as its head.
    counts = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    rules = [i for i, line in enumerate(tables) if line.startswith("| --- ")]
    for start, end in zip(rules, [*(i - 1 for i in rules[1:]), len(tables)]):
        assert set(counts[start - 1 : end]) == {counts[start]}
    assert any(line["label"] == evil for line in lines)


def test_arguments_are_not_printed(three):
    run = training("unet")
    run["arguments"] |= {"hub_token": "hf_secret", "output_dir": "/home/someone/runs"}
    write_study(three, {"unet": run})
    assert not any("hf_secret" in text or "/home/someone" in text for text in (*make(three)[:2], (three / "report" / "report.csv").read_text()))


def test_the_same_input_gives_the_same_bytes(three, tmp_path):
    table = add_samples(three, tmp_path)
    make(three, "--real_csv", table)
    first = {path.name: path.read_bytes() for path in (three / "report").iterdir()}
    assert set(first) == {"report.html", "report.md", "report.csv", "figure2.png"}
    make(three, "--real_csv", table)
    assert {path.name: path.read_bytes() for path in (three / "report").iterdir()} == first


def changed(found: dict, *path, value) -> dict:
    found = copy.deepcopy(found)
    part = found
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return found


@pytest.mark.parametrize(
    ("part", "content", "words"),
    [
        ("runs", "{", "not valid JSON"),
        ("runs", "[]", "not a JSON object"),
        ("runs", "\x00\xff", "not valid JSON"),
        ("runs", '{"script": 3}', "'script' is int"),
        ("runs", generation("lora"), "not of train_full.py or train_peft.py"),
        ("runs", training("bitfit"), "a run of 'bitfit' in the folder of 'lora'"),
        ("runs", changed(training("lora"), "trainable_parameters", "unet", value="many"), "not a whole number"),
        ("runs", changed(training("lora"), "steps", value=True), "'steps' is bool"),
        ("evaluations", changed(generation("lora"), "results", 0, "value", value="5"), "row 1 of results: 'value' is str"),
        ("evaluations", changed(generation("lora"), "results", 1, value=[]), "row 2 of results"),
        ("evaluations", json.dumps(changed(generation("lora"), "results", 0, "value", value=float("nan"))), "NaN is not a number"),
        ("evaluations", json.dumps(generation("lora")).replace("10.0", "1e999", 1), "infinite"),
        ("evaluations", changed(generation("lora"), "results", 0, "value", value=10**400), "infinite"),
        ("evaluations", changed(generation("lora"), "images", "synthetic", value=[1]), "images: 'synthetic' is list"),
        ("evaluations", changed(generation("lora"), "images", "real", value="all"), "images: 'real' is str"),
        ("evaluations", changed(generation("lora"), "arguments", "real_csv", value=5), "arguments: 'real_csv' is int"),
        ("evaluations", changed(generation("lora"), "arguments", "image_root", value=["a"]), "arguments: 'image_root' is list"),
        ("evaluations", changed(generation("lora"), "arguments", "real_split", value=True), "arguments: 'real_split' is bool"),
        ("runs", changed(training("lora"), "arguments", "split_seed", value=[0]), "arguments: 'split_seed' is list"),
        ("downstream", changed(downstream(), "settings", "split_seed", value={}), "settings: 'split_seed' is dict"),
        ("downstream", {key: value for key, value in downstream().items() if key != "settings"}, "no 'settings'"),
    ],
)  # fmt: skip
def test_bad_files_end_with_one_sentence(three, capsys, part, content, words):
    write_study(three, **{{"runs": "runs", "evaluations": "evaluations", "downstream": "downstreams"}[part]: {"lora": content}})
    with pytest.raises(SystemExit) as end:
        make(three)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and words in said and f"{part}/lora" in said
    assert not (three / "report").exists()


def test_bad_flags_and_folders_end_with_one_sentence(three, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    add_samples(three, tmp_path)
    for flags, words in (
        (["--study", str(tmp_path / "none")], "no such folder"),
        (["--study", str(tmp_path / "empty")], "no runs/*/training_summary.json"),
        (["--study", str(three), "--rows", "measles"], "invalid choice"),
        (["--study", str(three), "--real_csv", "none.csv"], "none.csv: no such file"),
        (["--study", str(three), "--output_dir", str(tmp_path / "file" / "report")], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as end:
            report.main(report.parse_args(flags))
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and words in said
    (three / "samples" / "lora" / "2.png").write_text("no image")
    with pytest.raises(SystemExit):
        make(three)
    assert "2.png: not a readable image" in capsys.readouterr().err and not (three / "report").exists()


def test_a_figure_without_a_number_of_images_is_shown(three):
    judged = generation("unet", 5.0)
    judged["results"].append(row("fid_vae", 3.0, half=1.0, n=None))
    write_study(three, evaluations={"unet": judged})
    assert "3.00" in Page(make(three)[0]).table("FID ↓")["real images through the VAE"]["FID ↓"][0]


def ended(capsys, study, *flags) -> str:
    """The one sentence that the script ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        make(study, *flags)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1, said
    return said


def test_pictures_that_are_no_still_image_of_8_bits(three, tmp_path, capsys):
    table = add_samples(three, tmp_path)
    picture = three / "samples" / "lora" / "2.png"
    picture.write_bytes(picture.read_bytes()[:45])
    assert "2.png: not a readable image" in ended(capsys, three, "--real_csv", table)
    Image.new("I;16", (16, 16), 3000).save(picture)
    assert "2.png: not a readable image (1 frames of type I;16" in ended(capsys, three, "--real_csv", table)
    frames = [Image.new("L", (16, 16), level) for level in (0, 255)]
    frames[0].save(picture, format="GIF", save_all=True, append_images=frames[1:])
    assert "2.png: not a readable image (2 frames" in ended(capsys, three, "--real_csv", table)
    assert not (three / "report").exists()
    picture.unlink()
    make(three, "--rows", "unet", "lora", "--real_csv", table)
    figure, top = Image.open(three / "report" / "figure2.png"), 34 + 3 * (report.TILE + report.GAP)
    assert [figure.getpixel((280 + i * (report.TILE + report.GAP) + 2, top + 2))[0] for i in (0, 1)] == [0xEE, 145]


def test_a_samples_table_with_spaces_is_read_as_the_scripts_read_it(three, tmp_path):
    add_samples(three, tmp_path)
    make(three)
    figure = (three / "report" / "figure2.png").read_bytes()
    for path in three.glob("samples/*/metadata.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b",", b", "))
    make(three)
    assert (three / "report" / "figure2.png").read_bytes() == figure


def test_a_table_that_cannot_be_read_ends_with_one_sentence(three, tmp_path, capsys, monkeypatch):
    add_samples(three, tmp_path)

    def closed(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(report.pd, "read_csv", closed)
    assert "metadata.csv: cannot be read (Permission denied)" in ended(capsys, three)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_the_report_before_stays_where_the_new_one_cannot_be_written(three, tmp_path, capsys, monkeypatch, number):
    make(three, "--real_csv", add_samples(three, tmp_path))
    before = {path.name: path.read_bytes() for path in (three / "report").iterdir()}
    write = Path.write_bytes

    def write_half(path, content):
        write(path, content[: len(content) // 2])
        if path.name == ".report.md.part":
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    assert f"cannot be written ({os.strerror(number)})" in ended(capsys, three, "--title", "Another")
    assert {path.name: path.read_bytes() for path in (three / "report").iterdir()} == before
