"""launch/report.py on made-up studies: verdicts follow from the pairs, and the page says what the files say."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "launch"))
import report

join = report.join_words
FIELDS = "metric label value low high n floor note".split()
LABELS, DRAWS = report.CONDITIONS, 40
# Metric: the base model's value, the gain by a unit of quality, the standard error of a run and of a pair, and the
# floor.
GENERATION = {
    "fid": (320.0, -60.0, 12.0, 4.0, None),
    "fid_half_n": (350.0, -60.0, 14.0, 5.0, 40.0),
    "class_consistency": (0.4, 0.06, 0.02, 0.02, 0.8),
    "class_consistency_auroc": (0.59, 0.05, 0.015, 0.012, None),
    "vendi": (3.0, 0.3, 0.1, 0.05, 6.0),
    "vendi_ratio": (0.5, 0.05, 0.02, 0.01, 1.0),
    "kid": (0.4, -0.08, 0.02, 0.006, 0.0),
    **dict.fromkeys(("precision", "recall", "density", "coverage"), (0.4, 0.05, 0.03, 0.02, 0.9)),
}
DOWNSTREAM = {"auroc": (0.7, 0.02, 0.012, 0.006, 0.5), "accuracy": (0.72, 0.01, 0.012, 0.008, 0.75)}
BY_LABEL = ("fid", "class_consistency", "class_consistency_auroc", "auroc", "accuracy")


def make_row(metric, value, label="all", half=None, n=384, floor=None, note=None):
    low, high = (None, None) if half is None else (value - half, value + half)
    return dict(zip(FIELDS, (metric, label, value, low, high, n, floor, note)))


def make_figures(table, quality, generator, shared):
    """Return rows and draws; the noise `shared` by all runs makes pairs surer than runs."""
    rows, draws = [], {}
    for metric, (base, gain, error, pair_error, floor) in table.items():
        for label in ["all", *(LABELS if metric in BY_LABEL else [])]:
            own = pair_error * (1.0 if label == "all" else 2.0)
            value = base + gain * quality + own * generator.normal()
            draws[f"{metric}/{label}"] = value + error * shared + own / 2**0.5 * generator.normal(size=DRAWS)
            rows.append(make_row(metric, value, label, 3 * error, floor=floor))
    return rows, draws


def make_training(row):
    trained = {"unet": 80_000} if row in report.PEFT else {part: 3_000_000 for part in ("vae", "unet") if part in row}
    rows = [make_row("trainable_parameters", count, part, n=None) for part, count in trained.items()]
    rows += [make_row("seconds_per_epoch", 6.0 + len(trained)), make_row("peak_memory_gib", 1.31, n=None)]
    rows += [make_row("heldout_diffusion", 0.14, half=0.01), make_row("heldout_diffusion_change", -0.03, half=0.01)]
    rows += [make_row(f"images_{part}", n, label) for part, n in (("train", 90), ("val", 30)) for label in LABELS]
    return {"method": row, "arguments": {"split_seed": 0}, "steps": 200, "base_model": "demo/base", "results": rows}


def make_generation(row, quality, generator, shared):
    rows, draws = make_figures(GENERATION, quality, generator, shared)
    for label in ["all", *LABELS]:
        rows += [make_row("class_consistency_margin", 0.1 * quality, label, 0.08), make_row("images_test", 64, label)]
        rows += [make_row(f"class_consistency{kind}_real", 0.8, label, 0.03) for kind in ("", "_auroc")]
    names = ("colour_visible", "memorisation_nearer_train", "memorisation_suspects", "memorisation_suspects_pixels")
    rows += [make_row(metric, 0.002, half=0.002, floor=0.001) for metric in names]
    network = {"source": "demo/downstream/real/classifier", "fingerprint": "classifier-" + "f" * 64}
    info = {"name": row, "features": network, "classifier": network, "images": {"real": {"fingerprint": "r" * 64}}}
    return info | {"warnings": ["consistency is judged by heads on FID's features"], "results": rows}, draws


def make_downstream(quality, generator, shared):
    rows, draws = make_figures(DOWNSTREAM, quality, generator, shared)
    rows += [make_row("accuracy_gain", -0.02 + 0.02 * quality, label, 0.01) for label in ["all", *LABELS]]
    rows.append(make_row("auroc_of_reference", 0.8, half=0.05))
    return {"settings": {"arch": "resnet18"}, "results": rows}, draws


def write_result(path, info, draws=None, draws_id="a" * 16):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(info))
    if draws:
        save_file(draws, str(path).replace("metrics.json", "draws.safetensors"), {"draws_id": draws_id})


def write_samples(folder):
    folder.mkdir(parents=True)
    lines = ["file_name,prompt,index,seed,guidance_scale"]
    for label in LABELS:
        for index in (1, 0):
            Image.new("L", (64, 64), 90 + 60 * index).save(folder / f"{label}_{index}.png")
            # A prompt may have several lines.
            lines.append(f'{label}_{index}.png,"Chest X-ray of a subject with {label}\nNo tube.",{index},0,7.5')
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def make_study(folder, qualities, seed=0, images=False):
    """Write a study of rows with these qualities (the base model's is 0) and return its folder."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(2, DRAWS))
    for row, quality in ({"base": 0.0} | qualities | {"real": 6.0}).items():
        if row in qualities:
            write_result(folder / f"runs/{row}/training_summary.json", make_training(row))
        if row != "real":
            path = folder / f"evaluations/{row}/generation_metrics.json"
            write_result(path, *make_generation(row, quality, generator, shared[0]))
        if row != "real" and images:
            write_samples(folder / "samples" / row)
        path = folder / f"downstream/{row}/downstream_metrics.json"
        write_result(path, *make_downstream(quality, generator, shared[1]))
    return folder


def read_table(text, title):
    """Return a table of the page as {row: {column: text}}."""
    rows = re.search(f"<h3>{title}.*?</table>", text, re.DOTALL)[0].split("<tr>")[1:]
    rows = [re.findall("<t[dh].*?</t[dh]>", row.replace("\u00a0", " ")) for row in rows]
    head, *rows = [[re.sub("<.*?>", "", cell) for cell in row] for row in rows]
    return {row[head.index("model") if "model" in head else 0]: dict(zip(head, row)) for row in rows}


def make(study, *flags):
    """Run the script; return the page and its answer."""
    report.main(report.parse_args(["--study", str(study), *flags]))
    text = (study / "report/report.html").read_text()
    return text, re.search('<div class="answer">(.*?)</div>', text)[1]


def change(path, edit):
    info = json.loads(path.read_text())
    edit(info, {(row["metric"], row["label"]): row for row in info["results"]})
    path.write_text(json.dumps(info))


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr(report, "plot_forest", lambda *args: None)
    monkeypatch.setattr(report, "plot_cost", lambda *args: None)


@pytest.fixture
def study(tmp_path, no_plots):
    """U-Net is far ahead, LoRA and DoRA are alike."""
    return make_study(tmp_path / "study", {"unet": 4.0, "lora": 1.5, "dora": 1.5})


def test_pairs_are_students_t_of_the_difference_draw_by_draw():
    one, other = np.random.default_rng(0).normal(size=(2, 30))
    difference, low, high, p, n = report.compare_draws(1.5, 0.9, one, other)
    expected = stats.t.interval(0.95, 29, 0.6, np.std(one - other, ddof=1))
    assert (difference, n) == (1.5 - 0.9, 30) and np.allclose((low, high), expected)
    # The standard error is that of a draw, not of the mean of the draws.
    assert np.isclose(p, stats.ttest_1samp(one - other - (one - other).mean() + 0.6 / 30**0.5, 0).pvalue)
    one[3] = np.nan
    same = report.compare_draws(1.0, 1.0, other, other)
    assert report.compare_draws(1.5, 0.9, one, other)[4] == 29 and same[1:4] == (0, 0, 1)


def test_holm_rejects_what_the_step_down_procedure_rejects():
    generator = np.random.default_rng(1)
    for size in (1, 2, 6, 66):
        pairs = [report.Pair("unet", "lora", "all", 0, 0, 0, p, 9) for p in generator.uniform(size=size) ** 4]
        report.correct_holm(pairs)
        for level in generator.uniform(size=20):
            kept = [p for rank, p in enumerate(sorted(pair.p for pair in pairs)) if p * (size - rank) > level]
            assert [pair.p_holm <= level for pair in pairs] == [pair.p < min(kept, default=2) for pair in pairs]


def test_the_answer_follows_from_the_pair_table_in_random_studies(study, tmp_path):
    generator, kinds = np.random.default_rng(3), set()
    for seed in range(16):
        rows = generator.choice([*report.STRATEGIES], generator.integers(2, 5), replace=False)
        qualities = dict(zip(rows, generator.uniform(-0.6, 0.6, size=len(rows)) * (1 + 3 * (seed % 2))))
        text, answer = make(make_study(tmp_path / str(seed), qualities, seed))
        table, lines = read_table(text, "Pair by pair"), pd.read_csv(tmp_path / str(seed) / "report" / "report.csv")
        unbeaten = {measure.metric: set(rows) for measure in report.MEASURES}
        for line in lines[(lines["table"] == "pairs") & (lines["label"] == "all")].to_dict("records"):
            first, second = line["row"].split(" - ")
            measure = next(m for m in report.MEASURES if m.metric == line["metric"])
            words = table[f"{report.NAMES[first]} against {report.NAMES[second]}"][f"{measure.name} {measure.arrow}"]
            differ, lower = line["p_holm"] < 0.05, line["value"] < 0
            assert words.startswith(("lower by" if lower else "higher by") if differ else "not shown to differ"), line
            if differ:
                unbeaten[measure.metric].discard(second if lower == (measure.arrow == "↓") else first)
        deciding = [unbeaten[measure.metric] for measure in report.MEASURES[: report.NUM_DECIDING]]
        common = [report.NAMES[row] for row in report.STRATEGIES if all(row in rows for rows in deciding)]
        kinds.add(len(common[:2]))
        if common:
            assert answer.startswith(f"<p>{join(common)} lead{'s:' if len(common) == 1 else ' together:'} ")
        else:
            unbeaten = re.search("No strategy leads in every metric; unbeaten: (.*?).</p>", answer)[1]
            told = {part.split(" in ")[0] for part in unbeaten.split("; ")}
            names = [join(report.NAMES[row] for row in report.STRATEGIES if row in rows) for rows in deciding]
            assert told == {name or "only the base model" for name in names}
    assert kinds == {0, 1, 2}


def test_the_answer_names_what_speaks_against_the_leader(study):
    answer = make(study)[1]
    assert answer.startswith("<p>U-Net leads: it alone is unbeaten in FID, prompt AUROC and downstream AUROC.</p>")
    once = "each strategy was trained once, which cannot say which is better in general"
    assert answer.endswith(f"<p>Reservations: {once}.</p>")

    flat, chance = "xrv: the features hardly vary among real images", "--classifier: not shown to beat chance"

    def spoil(info, rows):
        for metric in ("memorisation_suspects", "colour_visible"):
            rows[metric, "all"] |= {"value": 0.12, "low": 0.1, "high": 0.14}
        rows["class_consistency_auroc", "Edema"] |= {"value": 0.34, "low": 0.3, "high": 0.38}
        rows["class_consistency_auroc_real", "Pneumothorax"] |= {"low": 0.45}
        info["warnings"] += [flat, chance]

    change(study / "evaluations/unet/generation_metrics.json", spoil)
    path = study / "downstream/unet/downstream_metrics.json"
    change(path, lambda info, rows: rows["accuracy", "Edema"].update(note="CONSTANT"))
    text, answer = make(study)
    for name in ("suspected copies", "visible tint"):
        assert f"<li>{name}: U-Net (12.0 % of images, base model 0.2 %)</li>" in answer
    constant = "CONSTANT classifiers, which give all test images the same answer"
    names = f"suspected copies; visible tint; prompts answered below chance; {constant}; features that hardly vary"
    assert f"<p>Reservations: {names}; a classifier at chance; another row" in answer and f"; {once}.</p>" in answer
    assert f"<li>features that hardly vary: U-Net ({flat})</li>" in answer
    assert f"<li>a classifier at chance: U-Net ({chance}; Pneumothorax)</li>" in answer
    # The same if there is no other strategy to compare with.
    text, alone = make(study, "--rows", "unet")
    assert "each other; U-Net beats the base model in FID, prompt AUROC and downstream AUROC." in alone
    assert f"({flat})" in alone
    assert "<li>visible tint: U-Net (12.0 %" in alone and read_table(text, "Label by label")["Edema"]["FID ↓"] == ""
    below, constant = ("prompts answered below chance: U-Net (Edema 0.34)", "CONSTANT classifiers: U-Net (Edema)")
    assert f"<li>{below}</li><li>{constant}</li>" in answer
    for table, column, flag in (("3c", "visible tint, %", "above"), ("3b", "Ed", "chance"), ("4.", "Ed", "CONSTANT")):
        assert flag in read_table(text, f"Table {table}")["U-Net"][column]


@pytest.mark.parametrize(("field", "draws_id", "key"), [("draws_id", "other", "f"), ("features", "a" * 16, "g")])
def test_results_of_other_draws_or_features_are_not_compared(study, field, draws_id, key):
    info, draws = make_generation("lora", 1.5, np.random.default_rng(5), np.zeros(DRAWS))
    info["features"]["fingerprint"] = "classifier-" + 64 * key
    write_result(study / "evaluations/lora/generation_metrics.json", info, draws, draws_id)
    text, _ = make(study)
    lora, dora = (read_table(text, "Pair by pair")[f"U-Net against {name}"] for name in ("LoRA", "DoRA"))
    assert lora["FID ↓"] == "" and lora["downstream AUROC ↑"] and dora["FID ↓"]
    assert f"Rows are not compared where they differ in these settings of evaluations: {field}" in text


def test_rows_are_compared_if_their_training_images_are_the_same_or_unknown(study):
    for row, digit in (("lora", "a"), ("dora", "b")):
        images = {"real": {"fingerprint": "r" * 64}, "train": {"fingerprint": 64 * digit}}
        path = study / f"evaluations/{row}/generation_metrics.json"
        change(path, lambda info, rows, images=images: info.update(images=images))
    pairs = read_table(make(study)[0], "Pair by pair")
    assert pairs["LoRA against DoRA"]["FID ↓"] == "" and pairs["U-Net against LoRA"]["FID ↓"]


def test_rows_that_differ_in_more_than_the_strategy_are_said(study):
    assert 'class="warnings"' not in make(study)[0]
    edit = {"steps": 1000, "arguments": {"split_seed": 7}}
    change(study / "runs/dora/training_summary.json", lambda info, rows: info.update(edit))
    told = re.search('class="warnings".*?</div>', make(study)[0])[0]
    assert "trainings differ in steps 200 (U-Net and LoRA) and 1,000 (DoRA)." in told and "by seeds 0 and 7" in told
    for row, template in (("lora", "An X-ray with {}"), ("dora", "{} on an X-ray")):
        write_samples(study / "samples" / row)
        (study / "samples" / row / "sampling.json").write_text(json.dumps({"prompt_template": template}))
    differing = "samples differ in prompt_template An X-ray with {} (LoRA) and {} on an X-ray (DoRA)."
    assert differing in make(study)[0]


def test_what_is_missing_is_named_in_one_line_or_leaves_empty_cells(study):
    assert "No strategies could be compared" in make(study, "--rows", "lora")[1]
    text, _ = make(study, "--rows", "unet", "lora", "dora", "bitfit", "vae")
    assert text.count("Not run: VAE and BitFit.") == 1 and "BitFit" not in read_table(text, "Table 3.")
    for path in [*study.glob("*/lora/*_metrics.json"), study / "runs/lora/training_summary.json"]:
        change(path, lambda info, rows: info.update(results=info["results"][:1]))
    (study / "evaluations/dora/generation_draws.safetensors").unlink()
    text = make(study)[0]
    assert read_table(text, "Table 3.")["LoRA"]["Vendi ↑"] == " [2.64]" and "nan" not in text
    assert read_table(text, "Table 4b")["LoRA"]["Ca"] == read_table(text, "Pair")["U-Net against DoRA"]["FID ↓"] == ""


def test_the_csv_has_every_value_of_what_ran(study):
    make(study)
    values = pd.read_csv(study / "report/report.csv", dtype=str, keep_default_na=False)
    values, count = values.set_index(["table", "row", "metric", "label"]).sort_index(), 0
    for table, part in (("1", "runs"), ("3", "evaluations"), ("4", "downstream")):
        for path in (study / part).glob("*/*.json"):
            for row in json.loads(path.read_text())["results"]:
                number = "2" if row["metric"].startswith("images_") else table
                line = values.loc[(number, path.parent.name, row["metric"], row["label"])]
                expected = {name: "" if row[name] is None else str(row[name]) for name in FIELDS[2:7]}
                assert line[FIELDS[2:7]].to_dict() == expected
                count += 1
    assert count + (values.index.get_level_values(0) == "pairs").sum() == len(values)
    assert values.loc[("4", "lora", "accuracy", "Edema")]["paper"] == "0.602"


def test_the_page_of_a_study_like_the_demos(tmp_path):
    study = make_study(tmp_path / "study", {"unet": 2.4, "lora": 1.5, "dora": 1.6}, images=True)
    evil = "<script>alert(1)</script>"
    change(study / "evaluations/lora/generation_metrics.json", lambda info, rows: info["warnings"].append(evil))
    edit = {"steps": evil, "results": [make_row("images_train", 5, evil)]}
    change(study / "runs/unet/training_summary.json", lambda info, rows: info.update(edit))
    text, _ = make(study, "--title", evil)
    assert "<script" not in text and text.count("&lt;script&gt;") == 5
    assert len(re.sub("<style>.*?</style>|<[^>]*>", " ", text, flags=re.DOTALL).split()) < 2000
    assert text.count("<img ") == 6 + len(report.MEASURES) + 4 and text.count("<details>") == 3
    assert set(re.findall('(?:src|href)="(.{22})', text)) == {"data:image/png;base64,", "https://arxiv.org/abs/"}
    with Image.open(study / "report/figure2.png") as figure:
        assert figure.getpixel((60 + report.TILE, 100))[0] - figure.getpixel((60, 100))[0] > 20


def make_trainings(folder, seeds):
    """Write a study of rows trained with these seeds; return the values by row, metric and label, in their order."""
    study, values, shared = make_study(folder, {}), {}, np.zeros(DRAWS)
    for number, (row, row_seeds) in enumerate(seeds.items()):
        for seed in row_seeds:
            name, generator = (
                row if seed == row_seeds[0] else f"{row}_seed{seed}",
                np.random.default_rng([seed, number]),
            )
            training = make_training(row) | {"arguments": {"seed": seed}}
            write_result(study / f"runs/{name}/training_summary.json", training)
            info, draws = make_generation(name, 2 * number, generator, shared)
            write_result(study / f"evaluations/{name}/generation_metrics.json", info, draws)
            path = study / f"downstream/{name}/downstream_metrics.json"
            write_result(path, *make_downstream(2 * number, generator, shared))
            for line in info["results"]:
                values.setdefault((row, line["metric"], line["label"]), []).append(line["value"])
    base = json.loads((study / "evaluations/base/generation_metrics.json").read_text())["results"]
    return study, values | {("base", line["metric"], line["label"]): [line["value"]] * len(row_seeds) for line in base}


@pytest.mark.parametrize("seeds", [(3, 1), (0, 1, 2), (0, 5, 10, 11)])
def test_verdicts_over_trainings_are_paired_t_tests(tmp_path, no_plots, monkeypatch, seeds):
    monkeypatch.setattr(sys.modules[__name__], "DRAWS", 4)  # in one case as many as trainings, yet not paired
    study, values = make_trainings(tmp_path, {"unet": seeds, "lora": seeds, "bitfit": seeds})
    text, answer = make(study)
    assert f"over {len(seeds)} trainings of each strategy" in answer and "once" not in text
    assert 'class="warnings"' not in text
    lines = pd.read_csv(study / "report/report.csv").set_index("table")
    base_draws = load_file(study / "evaluations/base/generation_draws.safetensors")
    generation = [measure for measure in report.MEASURES if measure.part == "evaluations"]
    pairs = lines.loc["pairs"][lines.loc["pairs", "metric"].isin([measure.metric for measure in generation])]
    assert len(pairs) == 6 * sum(7 if measure.metric in BY_LABEL else 1 for measure in generation)
    for line in pairs.to_dict("records"):
        one, other = (values[row, line["metric"], line["label"]] for row in line["row"].split(" - "))
        difference, count = np.mean(one) - np.mean(other), len(seeds)
        if line["row"].endswith("base"):  # trained once, so with the error of its own draws, and independent
            draws = base_draws[f"{line['metric']}/{line['label']}"]
            error = np.hypot(np.std(one, ddof=1) / count**0.5, np.std(draws, ddof=1))
            # Its mean has the standard error of the draws.
            sample = np.mean(other) + (draws - np.mean(draws)) * DRAWS**0.5
            degrees = stats.ttest_ind(one, sample, equal_var=False).df if count > 2 else 1
            half, p = stats.t.ppf(0.975, degrees) * error, 2 * stats.t.sf(abs(difference) / error, degrees)
            expected = [difference, difference - half, difference + half, p, count]
        else:
            test = stats.ttest_rel(one, other)
            expected = [difference, *test.confidence_interval(), test.pvalue, count]
        assert np.allclose([line[key] for key in ("value", "low", "high", "p", "n")], expected)
    fid = lines[(lines["metric"] == "fid") & (lines["label"] == "all") & (lines["row"] == "bitfit")].iloc[0]
    interval = stats.ttest_1samp(values["bitfit", "fid", "all"], 0).confidence_interval()
    assert np.allclose(fid[["low", "high"]].astype(float), interval)


def test_only_complete_trainings_with_seeds_of_all_rows_are_used(tmp_path, no_plots):
    study, _ = make_trainings(tmp_path, {"unet": (0, 1, 2), "lora": (0, 2, 3), "dora": (0, 1, 2)})
    text, answer = make(study)
    assert "over 2 trainings" in answer and "seed 1 of U-Net, 3 of LoRA and 1 of DoRA." in text
    (study / "downstream/dora_seed2/downstream_metrics.json").unlink()
    (text, answer), fewer_rows = make(study), make(study, "--rows", "unet", "lora")
    assert "trained once" in answer and "seed 1 of U-Net, 2 of U-Net, 2 of LoRA, 3 of LoRA and 1 of DoRA" in text
    assert "over 2 trainings" in fewer_rows[1]
    alone = make(study, "--rows", "unet")[1]
    assert "compared with each other" in alone and "over 3 trainings of each strategy.</p>" in alone


def test_what_a_single_training_did_or_had_is_said(tmp_path, no_plots):
    study, _ = make_trainings(tmp_path, {"unet": (0, 1), "lora": (0, 1)})

    def spoil(info, rows):
        rows["colour_visible", "all"] |= {"value": 0.1, "low": 0.08, "high": 0.12}

    for row in ("unet", "lora"):
        change(study / f"evaluations/{row}_seed1/generation_metrics.json", spoil)
    text, answer = make(study)
    assert "10.0 % of images in one training" in answer
    # The interval is no wider than a share can be.
    assert read_table(text, "Table 3c")["LoRA"]["visible tint, %"].startswith("5.1 0.0–")
    for name, pool in (("lora", "unique"), ("lora_seed1", "paper")):
        change(
            study / f"evaluations/{name}/generation_metrics.json", lambda info, rows, pool=pool: info.update(pool=pool)
        )
    text = make(study)[0]
    assert "settings of evaluations: pool unique (LoRA) and paper (LoRA)." in text
    assert read_table(text, "Pair by pair")["U-Net against LoRA"]["FID ↓"] == ""


def test_further_figures_are_shown_where_they_exist(study):
    text = make(study)[0]
    assert "Table 3d" not in text and "Table 4c" not in text and "MS-SSIM" not in text
    lines = [make_row("ms_ssim", 0.312, half=0.01, floor=0.25), make_row("fid@rad-dino", 118.93, half=2)]
    lines += [make_row("fid@rad-dino_baseline", 150.0, half=2), make_row("fid@rad-dino_vae", 4.5, half=1)]
    change(study / "evaluations/lora/generation_metrics.json", lambda info, rows: info["results"].extend(lines))
    line = make_row("auroc_by_group", 0.71, "Sex: Female", half=0.02) | {"note": "mean of 2 of 3 labels"}
    change(study / "downstream/lora/downstream_metrics.json", lambda info, rows: info["results"].append(line))
    text = make(study)[0]
    assert read_table(text, "Table 3c")["LoRA"]["MS-SSIM ↓"] == "0.312 0.302–0.322"
    table = read_table(text, "Table 3d")
    assert table["LoRA"] == {"#": "8", "model": "LoRA", "FID by rad-dino": "118.93 116.93–120.93"}
    assert read_table(text, "Table 4c")["LoRA"]["Sex: Female"] == "0.710 0.690–0.730 2 of 3 labels"


def test_fid_by_other_features_is_compared_in_pairs_and_does_not_decide(tmp_path, monkeypatch):
    monkeypatch.setitem(GENERATION, "fid@rad-dino", (300.0, -60.0, 12.0, 4.0, None))
    study = make_study(tmp_path, {"unet": 3.0, "lora": 1.0})
    text, answer = make(study)
    pairs = read_table(text, "Pair by pair, other features")
    assert pairs["U-Net against LoRA"]["FID by rad-dino ↓"].startswith("lower by")
    assert list(read_table(text, "Pair by pair<")["U-Net against LoRA"])[1] == "FID ↓" and "rad-dino" not in answer
    assert 'alt="FID by rad-dino, difference to the base model"' in text
    lines = pd.read_csv(study / "report/report.csv")
    lines = lines[(lines["table"] == "pairs") & (lines["metric"] == "fid@rad-dino")]
    assert list(lines["row"]) == ["unet - lora", "unet - base", "lora - base"] and lines["p_holm"].max() < 0.05


def test_what_the_notes_say_of_the_papers_accuracies():
    images = 28_655  # of the split that the authors published
    cells = [cell for row in report.PAPER_VALUES.values() for cell in zip(row[-1], report.PAPER_SPLIT["test"])]
    assert sum(value <= 100 * max(n, images - n) / images for value, n in cells) == 34
    assert sum(round(10 * value) in (1000 * n // images, 1000 * (images - n) // images) for value, n in cells) == 13


def test_mistakes_end_with_one_sentence(study, tmp_path, capsys):
    write_result(study / "runs/lora/training_summary.json", make_training("dora"))
    for path, told in ((tmp_path / "none", "no results"), (study, "runs/lora is a run of dora")):
        with pytest.raises(SystemExit, match="2"):
            make(path)
        assert told in capsys.readouterr().err
