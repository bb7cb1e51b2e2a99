"""eval_downstream.py: exact metrics, draws that pair runs, splits without shared patients, and results that repeat."""

import itertools
import json
import shutil
import threading

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import REAL_CSV, ROOT, launch, phantoms
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn import metrics
from torchvision.models import get_model

import eval_downstream
import eval_generation
import train_full

QUICK = {"arch": "resnet18", "weights": "none", "resolution": 32, "source_resolution": 64, "num_seeds": 1}
QUICK |= {"num_train_epochs": 1, "train_batch_size": 8, "bootstrap_samples": 50, "learning_rate": 3e-3}


def arguments(output_dir, *more, **changes):
    options = {"real_csv": phantoms(), "output_dir": output_dir, "image_cache_dir": output_dir.parent / "image_cache"}
    options |= QUICK | changes
    return [*(f"--{name}={value}" for name, value in options.items() if value is not None), *map(str, more)]


def run(output_dir, *more, **changes):
    """Run the script in this process and return its JSON."""
    AcceleratorState._reset_state(reset_partial_state=True)
    eval_downstream.main(eval_downstream.parse_args(arguments(output_dir, *more, **changes)))
    return json.loads((output_dir / "downstream_metrics.json").read_text())


def by_name(rows):
    return {(row["metric"], row["label"]): row for row in rows}


def row(summary, metric, label="all"):
    return by_name(summary["results"])[metric, label]


def of_split(split):
    """Return the phantoms' frontal rows of a split, as strings, with absolute paths."""
    table = train_full.load_image_table(phantoms())
    frame = pd.read_csv(phantoms(), dtype=str, keep_default_na=False).assign(Path=table["image"])
    return frame[table["frontal"] & (train_full.split_of(table, 0) == split)]


def as_samples(folder, rows):
    """Write rows as a folder like sample.py's."""
    folder.mkdir()
    names = [f"{i:03d}.png" for i in range(len(rows))]
    for name, path in zip(names, rows["Path"]):
        Image.open(path).resize((64, 64)).save(folder / name)
    table = rows.assign(Path=names, resolution=64, resize_mode="squash").drop(columns=["Frontal/Lateral", "Fracture"])
    table.to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.fixture
def samples(tmp_path):
    return as_samples(tmp_path / "samples", of_split("train"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing is most of the time of such short runs."""
    monkeypatch.setattr(eval_downstream, "plot_roc", lambda *args: args[-1].touch())


def by_scikit_learn(target, probability, weights):
    called, share, weighted = probability >= 0.5, np.average(target, weights=weights), {"sample_weight": weights}
    accuracy, constant = metrics.accuracy_score(target, called, **weighted), max(share, 1 - share)
    return {
        "accuracy": accuracy,
        "constant_accuracy": constant,
        "accuracy_gain": accuracy - constant,
        "predicted_positive_rate": np.average(called, weights=weights),
        "balanced_accuracy": metrics.balanced_accuracy_score(target, called, **weighted),
        "auroc": metrics.roc_auc_score(target, probability, **weighted),
        "auprc": metrics.average_precision_score(target, probability, **weighted),
        "f1": metrics.f1_score(target, called, **weighted),
    }


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_scikit_learns(seed):
    """In every draw; probabilities have ties, and masked images do not count."""
    generator = np.random.default_rng(seed)
    target = (generator.random(300) < generator.uniform(0.1, 0.9)).astype(np.float64)
    probability = np.round(np.clip(0.3 * target + 0.7 * generator.random(300), 0, 1), 2)
    masked, patients = np.where(np.arange(300) < 100, np.nan, target), np.repeat(np.arange(100), 3)
    figures = eval_downstream.score(masked[:, None], patients, [probability[:, None]], 60)
    assert list(figures) == eval_downstream.METRICS
    for draw in (0, 1, 55):
        weights = eval_downstream.patient_weights(patients, [draw])[0, 100:]
        expected = by_scikit_learn(target[100:], probability[100:], weights)
        assert {name: values[0, 0, draw] for name, values in figures.items()} == pytest.approx(expected, abs=1e-12)


def test_draws_take_patients_and_depend_on_their_number_alone():
    patients, first = np.array(["a", "a", "b", "c", "c", "c", "d"], dtype=object), [0, 2, 3, 6]
    weights = eval_downstream.patient_weights(patients, range(200))
    assert (weights[0] == 1).all() and (weights[:, first].sum(axis=1) == 4).all()
    assert np.allclose(weights[1:].mean(axis=0), 1, atol=0.2)
    assert all((weights[:, patients == name] == weights[:, [i]]).all() for i, name in zip(first, "abcd"))
    order = np.random.default_rng(0).permutation(7)
    assert (eval_downstream.patient_weights(patients[order], range(7, 9)) == weights[7:9][:, order]).all()


def test_intervals_cover_what_patients_and_seeds_vary_by():
    """The interval of a mean of three trainings on a varying test set holds the truth in 93 to 97% of 2,000 cases."""
    generator, covered = np.random.default_rng(0), 0
    for k in range(2000):
        values = 0.7 + generator.normal(scale=0.02, size=(1, 3)) + generator.normal(scale=0.02)
        draws = values.mean() + generator.normal(scale=0.02, size=500)
        draws = draws + (values - values.mean()) @ eval_downstream.training_noise(3, 500, k)
        covered += np.prod(np.subtract(eval_downstream.interval(draws), 0.7)) <= 0
    assert 0.93 <= covered / 2000 <= 0.97, covered


def test_rows_come_from_the_draws():
    generator = np.random.default_rng(0)
    targets = (generator.random((200, 3)) < 0.4).astype(np.float32)
    targets[:, 2] = 0
    # Two seeds; the second label is always called negative.
    probabilities = [(0.5 * targets + 0.5 * generator.random((200, 3))) * [1, 0.4, 1] for _ in range(2)]
    figures = eval_downstream.score(targets, np.arange(200) // 2, probabilities, 40)
    noise = eval_downstream.training_noise(2, 40, 5)
    rows, draws = eval_downstream.result_rows(["A", "B", "C"], {}, figures, noise, targets)
    found = by_name(rows)
    for metric in eval_downstream.METRICS:
        one = found[metric, "A"]
        assert one["value"] == pytest.approx(figures[metric][0, :, 0].mean())
        other = found[metric, "C"]
        assert other["value"] is None and other["note"].startswith("n/a: one class only")
        assert found[metric, "all"]["note"].endswith("mean of 2 of 3 labels")
        assert draws[f"{metric}/A"].shape == (41,) and draws[f"{metric}/A"][0] == one["value"]
        limits = np.percentile(draws[f"{metric}/A"][1:], [2.5, 97.5]).clip(-1 if metric == "accuracy_gain" else 0, 1)
        assert [one["low"], one["high"]] == pytest.approx(limits)
        assert np.allclose(draws[f"{metric}/all"], (draws[f"{metric}/A"] + draws[f"{metric}/B"]) / 2)
    assert np.allclose(draws["accuracy_gain/A"], draws["accuracy/A"] - draws["constant_accuracy/A"])
    assert found["accuracy", "B"]["note"] == found["predicted_positive_rate", "B"]["note"] == "CONSTANT"
    assert found["accuracy", "all"]["note"].startswith("CONSTANT in 1 of 2 labels")
    one = found["accuracy", "B"]
    assert one["value"] == one["floor"] == pytest.approx(1 - targets[:, 1].mean())
    assert found["accuracy_gain", "B"]["note"] == "not shown to beat the constant predictor"


def test_auroc_by_group_is_scikit_learns_mean_over_labels(tmp_path, monkeypatch):
    columns = {"Sex": ["Female", "Male", "Male", "Unknown", "Female"], "AP/PA": ["AP", "AP", "PA", ""]}
    columns |= {"Age": ["17", "18", "39", "40", "59", "80", "97", ""], "Frontal/Lateral": ["", *["Frontal"] * 6]}
    table = of_split("test")
    table = table.assign(**{name: np.resize(values, len(table)) for name, values in columns.items()})
    table.to_csv(tmp_path / "t.csv", index=False)
    test = table[table["Frontal/Lateral"] == "Frontal"]
    logits = np.random.default_rng(0).normal(size=(2, len(test), 6)).astype(np.float32)
    monkeypatch.setattr(eval_downstream, "train_seed", lambda args, accelerator, seed, images: (logits[seed], [0.5]))
    monkeypatch.setattr(eval_downstream, "training_noise", lambda seeds, draws, seed: np.zeros((seeds, draws)))
    summary = run(tmp_path / "out", "--shuffle_labels", train_on="real", test_csv=tmp_path / "t.csv", num_seeds=2)
    targets = test[eval_downstream.CONDITIONS].apply(pd.to_numeric).fillna(0).replace(-1, np.nan).to_numpy()
    patients = test["Path"].str.extract(r"(patient\d+)")[0].to_numpy(object)
    draws = load_file(tmp_path / "out" / "downstream_draws.safetensors")
    groups = {"Sex: Female": ["Female"], "Sex: Male": ["Male"], "AP/PA: AP": ["AP"], "AP/PA: PA": ["PA"]}
    groups |= {"Age: 0-17": ["17"], "Age: 18-39": ["18", "39"], "Age: 40-59": ["40", "59"], "Age: 80+": ["80", "97"]}
    assert {label for metric, label in by_name(summary["results"]) if metric == "auroc_by_group"} == groups.keys()
    for name, values in groups.items():
        inside, found = test[name.split(":")[0]].isin(values).to_numpy(), row(summary, "auroc_by_group", name)
        weights = eval_downstream.patient_weights(patients, [0, 7])
        known = [inside & ~np.isnan(column) for column in targets.T]
        scored = [i for i in range(6) if len(np.unique(targets[known[i], i])) == 2]
        assert found["n"] == inside.sum() and f"mean of {len(scored)} of 6 labels" in found["note"]
        for weight, value in zip(weights, (found["value"], float(draws[f"auroc_by_group/{name}"][6]))):
            aurocs = []
            for i, logit in itertools.product(scored, logits):
                drawn = known[i] & (weight > 0)
                both = len(np.unique(targets[drawn, i])) == 2
                options = {"sample_weight": weight[drawn]}
                aurocs.append(metrics.roc_auc_score(targets[drawn, i], logit[drawn, i], **options) if both else np.nan)
            assert value == pytest.approx(np.mean(aurocs), abs=1e-12, nan_ok=True)


def test_a_label_that_was_not_trained_keeps_only_rates():
    figures = {name: np.ones((2, 1, 3)) for name in [*eval_downstream.METRICS, "Sex: Female"]}
    eval_downstream.clear_untrained(figures, np.float32([[1, 1], [0, np.nan]]))
    assert all((values[0] == 1).all() for values in figures.values())
    assert {name for name, values in figures.items() if not np.isnan(values[1]).all()} == {*eval_downstream.RATES}
    assert eval_downstream.interval(np.array([np.nan, np.nan])) == [None, None]


def test_the_ratio_of_auroc_is_above_chance():
    def run_of(seed):
        return {"auroc/A": 0.02 * np.random.default_rng(seed).random(101) + 0.6 + 0.2 * seed}

    def ratio_of(ours, theirs):
        rows, draws = [], dict(ours)
        eval_downstream.add_ratio(rows, draws, ["A", "B"], theirs, "real")
        return by_name(rows), draws

    ours, theirs = run_of(0), run_of(1)
    rows, draws = ratio_of(ours, theirs)
    expected = (ours["auroc/A"] - 0.5) / (theirs["auroc/A"] - 0.5)
    assert np.allclose(draws["auroc_of_reference/A"], expected)
    auroc = rows["auroc_of_reference", "all"]
    limits = expected[0], *np.percentile(expected[1:], [2.5, 97.5])
    assert [auroc[key] for key in ("value", "low", "high")] == pytest.approx(limits)
    assert rows["auroc_of_reference", "B"]["note"].endswith("lacks the figure")
    theirs["auroc/A"] -= 0.32  # at chance
    rows, _ = ratio_of(ours, theirs)
    assert "of real is not shown to be above 0.5" in rows["auroc_of_reference", "A"]["note"]


def test_uncertain_labels_are_masked():
    table = pd.DataFrame({"Edema": [1.0, 0.0, -1.0, np.nan]})
    targets = {kind: eval_downstream.label_targets(table, ["Edema"], kind) for kind in ("ones", "zeros", "ignore")}
    assert targets["ones"].ravel().tolist() == [1, 0, 1, 0] and targets["zeros"].ravel().tolist() == [1, 0, 0, 0]
    assert np.isnan(targets["ignore"]).ravel().tolist() == [False, False, True, False]
    logits = torch.randn(4, 1)
    expected = F.binary_cross_entropy_with_logits(logits[[0, 1, 3], 0], torch.tensor([1.0, 0, 0]))
    assert torch.allclose(eval_downstream.masked_bce(logits, torch.from_numpy(targets["ignore"])), expected)


def test_the_same_seed_gives_the_same_results_killed_or_not(samples, tmp_path, monkeypatch):
    options = {"synthetic": samples, "num_train_epochs": 3, "num_seeds": 2}
    whole = run(tmp_path / "whole", **options)
    train_epoch, trained = eval_downstream.train_epoch, []

    def train_and_die(*args):
        train_epoch(*args)
        trained.append(args[-2:])
        if len(trained) in (1, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(eval_downstream, "train_epoch", train_and_die)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", **options)
    assert run(tmp_path / "cut", **options) == whole
    # The first classifier is not trained again once it is finished.
    assert trained == [(0, 0), (0, 0), (0, 1), (0, 2), (1, 0), (1, 0), (1, 1), (1, 2)]
    for name in ("seeds/seed-0/model.safetensors", "seeds/seed-1/model.safetensors", "downstream_draws.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.tmp"))
    best = min(whole["seeds"], key=lambda seed: min(seed["validation_losses"]))
    spec = json.loads((tmp_path / "whole" / "classifier" / "classifier.json").read_text())
    assert {label: figure["value"] for label, figure in spec["real_test_auroc"].items()} == best["metrics"]["auroc"]


def test_runs_on_the_same_test_images_compare(samples, tmp_path):
    kinds, ids, draws = ("synthetic", "real", "both"), set(), {}
    found = {kind: run(tmp_path / kind, synthetic=samples, train_on=kind) for kind in kinds}
    assert len({(summary["images"]["train"], summary["images"]["validation"]) for summary in found.values()}) == 1
    assert [len({found[kind]["settings"][key] for kind in kinds}) for key in ("test", "training")] == [1, 3]
    for kind in kinds:
        with safe_open(tmp_path / kind / "downstream_draws.safetensors", "np") as file:
            draws[kind] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ids.add(file.metadata()["draws_id"])
        json.dumps(found[kind], allow_nan=False)
        for name, values in draws[kind].items():
            figure, limits = row(found[kind], *name.split("/", 1)), np.nanpercentile(values, [2.5, 97.5])
            assert values.shape == (50,) and [figure["low"], figure["high"]] == pytest.approx(limits, abs=1e-12)
        # It depends on the patients of a draw alone.
        assert (draws[kind]["constant_accuracy/all"] == draws["synthetic"]["constant_accuracy/all"]).all()
    assert len(ids) == 1
    for kind in ("synthetic", "real"):
        summary = run(tmp_path / kind, synthetic=samples, train_on=kind, reference=tmp_path / "real")
        ratio = row(summary, "auroc_of_reference", "Edema")
        one, two = (draws[other]["auroc/Edema"] - 0.5 for other in (kind, "real"))
        expected = np.percentile(one / two, [2.5, 97.5]) if np.percentile(two, 2.5) > 0 else [None, None]
        assert [ratio["low"], ratio["high"]] == pytest.approx(list(expected))
    assert {ratio["low"], ratio["value"], ratio["high"]} in ({1.0}, {None})


def test_the_saved_classifier_is_the_one_that_was_scored(tmp_path):
    summary = run(tmp_path / "out", train_on="real")
    model, spec = eval_downstream.load_classifier(tmp_path / "out" / "classifier")
    assert spec["labels"] == eval_downstream.CONDITIONS and not model.training
    image = train_full.load_image(of_split("test")["Path"].iloc[3], 64, "squash")
    gray = eval_downstream.to_gray(image).resize((32, 32), Image.Resampling.LANCZOS)
    gray = torch.from_numpy(np.array(gray))[None, None].float() / 255
    saved = load_file(tmp_path / "out" / "seeds" / "seed-0" / "predictions.safetensors")["test"]
    logits = model(eval_downstream.classifier_inputs(gray, spec["normalisation"]))
    assert torch.allclose(logits[0], saved[3], atol=1e-4)
    seen = pd.concat([of_split("train"), of_split("val")])["Path"].str.extract(r"(patient\d+)")[0]
    assert set(spec["split"]["patients"]) == {eval_downstream.patient_hash(patient) for patient in seen}
    options = {"classifier": tmp_path / "out" / "classifier", "source_resolution": None}
    again = run(tmp_path / "again", **options)
    assert again["images"]["patients_in_training_and_test"] == 0 and again["train_on"] == "nothing"
    for label in eval_downstream.CONDITIONS:
        expected = row(summary, "auroc", label)["value"]
        assert row(again, "auroc", label)["value"] == pytest.approx(expected, abs=1e-6)
        assert spec["real_test_auroc"][label]["value"] == expected
    # Its own training patients are noticed, by their hashes.
    whole = run(tmp_path / "whole", "--split=all", **options)
    assert whole["images"]["patients_in_training_and_test"] == seen.nunique()


def test_a_classifier_with_more_labels_than_the_table_is_scored_on_those_of_both(samples, tmp_path):
    whole = run(tmp_path / "out", train_on="real")
    of_split("test").drop(columns="No Finding").to_csv(tmp_path / "t.csv", index=False)
    options = {
        "classifier": tmp_path / "out" / "classifier",
        "source_resolution": None,
        "real_csv": tmp_path / "t.csv",
    }
    found = run(tmp_path / "again", "--split=all", **options)
    assert any(note.endswith("t.csv has no No Finding: not scored") for note in found["notes"])
    labels = [label for label in eval_downstream.CONDITIONS if label != "No Finding"]
    assert found["settings"]["labels"] == labels
    for label in labels:
        assert row(found, "auroc", label)["value"] == pytest.approx(row(whole, "auroc", label)["value"], abs=1e-6)


def load_tables(tmp_path, *more, **changes):
    args = eval_downstream.parse_args(arguments(tmp_path / "out", *more, **changes))
    return eval_downstream.load_tables(args, {}, Accelerator(cpu=True))


def test_sizes_that_no_table_records_are_looked_at(samples, tmp_path, capsys):
    table = pd.read_csv(samples / "metadata.csv", dtype=str).drop(columns=["resolution", "resize_mode"])
    table.to_csv(samples / "metadata.csv", index=False)
    options = {"synthetic": samples, "source_resolution": None}
    assert load_tables(tmp_path, **options).geometry == (64, "squash")
    for name in table["Path"][table["Edema"] == "1.0"]:
        Image.open(samples / name).resize((32, 32)).save(samples / name)
    with pytest.raises(SystemExit):
        load_tables(tmp_path, **options)
    assert "images of different sizes (32, 64 px)" in capsys.readouterr().err
    assert load_tables(tmp_path, "--mixed_geometry", **options).geometry == (64, "squash")


def test_a_dataset_is_split_and_read_like_its_table(samples, tmp_path):
    """Its images are bytes in a parquet file, and its patients are those of the column Path."""
    table, rows = train_full.load_image_table(phantoms()), pd.read_csv(phantoms(), dtype=str, keep_default_na=False)
    images = [{"path": None, "bytes": open(path, "rb").read()} for path in table["image"]]
    columns = {"picture": images, **rows.to_dict("list")}
    features = datasets.Features({"picture": datasets.Image()} | {name: datasets.Value("string") for name in rows})
    (tmp_path / "d").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "d" / "train.parquet")
    flags = [f"--dataset_name={tmp_path / 'd'}", "--image_column=picture"]
    ours, theirs = (
        load_tables(tmp_path, *more, synthetic=samples, real_csv=csv)
        for more, csv in ((flags, None), ([], phantoms()))
    )
    assert list(ours.test["patient"]) == list(theirs.test["patient"]) and ours.counts == theirs.counts
    assert [open(path, "rb").read() for path in ours.test["image"]] == [
        open(path, "rb").read() for path in theirs.test["image"]
    ]
    hashes = []
    for more in (flags, [f"--real_csv={phantoms()}"]):
        args = eval_generation.parse_args([f"--synthetic={samples}", f"--output_dir={tmp_path / 'g'}", *more])
        hashes.append(list(eval_generation.plan_evaluation(args, Accelerator(cpu=True)).tables["real"]["hash"]))
    assert hashes[0] and hashes[0] == hashes[1]


def test_ready_made_tables_are_used_whole_and_shared_patients_counted(tmp_path, capsys):
    parts = {name: of_split(name) for name in ("train", "val", "test")}
    parts["test"] = pd.concat([parts["test"], parts["train"].iloc[:3]])
    for name, rows in parts.items():
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    tables = {f"{flag}_csv": tmp_path / f"{n}.csv" for flag, n in zip(("real", "validation", "test"), parts)}
    images = run(tmp_path / "out", train_on="real", **tables)["images"]
    assert [images[name] for name in ("train", "validation", "test")] == [len(rows) for rows in parts.values()]
    patients = images["patients_in_training_and_test"]
    assert patients == parts["train"]["Path"].iloc[:3].str.extract(r"(patient\d+)")[0].nunique()
    assert f"warning  {patients} patients are in both training and test" in capsys.readouterr().out


def test_real_images_of_equal_content_count_once(tmp_path):
    rows = pd.concat([of_split(name) for name in ("train", "val", "test")])
    copies = rows.assign(Path=[shutil.copy(path, tmp_path / f"{i}.png") for i, path in enumerate(rows["Path"])])
    copies = copies.assign(patient_id=rows["Path"].str.extract(r"(patient\d+)"))
    pd.concat([rows, rows[:3], copies]).to_csv(tmp_path / "twice.csv")
    twice = run(tmp_path / "twice", real_csv=tmp_path / "twice.csv", train_on="real")
    left_out = twice["images"]["left_out"]
    assert left_out["identical to another image"] == len(rows) and left_out["repeated"] == 3
    rows.to_csv(tmp_path / "once.csv")
    assert twice["results"] == run(tmp_path / "once", real_csv=tmp_path / "once.csv", train_on="real")["results"]


def test_a_label_with_one_class_is_not_scored(tmp_path):
    synthetic = as_samples(tmp_path / "s", of_split("train").assign(Edema="1"))
    real = pd.concat([of_split(split) for split in ("train", "val", "test")]).assign(Pneumothorax="0")
    real.to_csv(tmp_path / "r.csv", index=False)
    summary = run(tmp_path / "out", synthetic=synthetic, real_csv=tmp_path / "r.csv")
    assert row(summary, "auroc", "Edema")["value"] is None and row(summary, "accuracy", "Edema")["value"] is not None
    assert row(summary, "accuracy", "Pneumothorax")["note"] == "n/a: one class only among the training or test images"
    assert row(summary, "auroc")["note"].endswith("mean of 4 of 6 labels")


def test_images_are_decoded_once_and_bad_ones_stop_or_are_left_out(samples, tmp_path, capsys, monkeypatch):
    bad = [samples / f"00{i}.png" for i in range(3)]
    bad[0].unlink()
    bad[1].write_bytes(bad[1].read_bytes()[:100])
    Image.new("I;16", (64, 64), 3000).save(bad[2])
    with pytest.raises(SystemExit):
        run(tmp_path / "out", synthetic=samples)
    error = capsys.readouterr().err
    assert "3 images cannot be used" in error and all(error.count(str(path)) == 1 for path in bad)
    assert not (tmp_path / "out").exists()
    # Left out before rows are drawn, so that a run on the other table trains on as many.
    options = {"synthetic": samples, "on_bad_image": "skip"}
    found = [run(tmp_path / kind, train_on=kind, **options) for kind in ("synthetic", "real")]
    assert all(summary["images"]["left_out"]["unreadable"] == 3 for summary in found)
    assert found[0]["images"]["train"] == found[1]["images"]["train"]
    monkeypatch.setattr(eval_downstream, "load_image", None)
    assert run(tmp_path / "again", **options)["results"] == found[0]["results"]


def test_gray_is_the_rounded_mean_over_channels():
    rgb = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    assert np.array_equal(eval_downstream.to_gray(rgb), np.rint(rgb.mean(axis=2)))


def test_images_are_decoded_ahead_of_the_caller():
    """The workers go on while the caller computes, but not far enough to fill the memory."""
    started, problems, ahead = [], {}, threading.Semaphore(0)

    def decode(i):
        started.append(i)
        ahead.release()
        if i == 3:
            raise ValueError("bad")
        return 2 * i

    decoded = eval_downstream.decode_images(range(200), decode, problems)
    assert next(decoded) == (0, 0) and all(ahead.acquire(timeout=20) for _ in range(64))
    assert len(started) <= 65
    assert list(decoded) == [(i, 2 * i) for i in range(1, 200) if i != 3] and problems == {3: "bad"}


ERRORS = {
    "--train_on=both": "needs --synthetic FOLDER",
    "{synthetic} --labels Oedema": "expected prompt, text or any of Oedema; see --labels",
    "{synthetic} --validation_csv={csv}": "needs --real_csv and --test_csv",
    "{synthetic} --real_csv=absent.csv": "--real_csv absent.csv: not found",
    "--train_on=real --split=all": "these patients are trained on",
    "--classifier={samples}": "pass the classifier folder",
    "--synthetic=absent": "--synthetic absent: not found",
    "{synthetic} --source_resolution=128": "images of different sizes (64, 128 px)",
    "--synthetic={bare}": "have in common: none",
    "--synthetic={unfinished}": "not finished by sample.py",
    "{synthetic} --labels Fracture": "have in common: No Finding",
    "{synthetic} --resize_mode=pad": "--resize_mode pad and squash",
    "{synthetic} --weights=w.pth": "--weights w.pth: cannot be loaded",
    "{synthetic} --weights={other}": "cannot be loaded into resnet18",
    "{synthetic} --reference={samples}": "no finished run",
    "{synthetic} --reference={done}": "not a run with --train_on real",
    "{synthetic} --output_dir={samples}": "not empty and not a result folder",
    "{synthetic} --train_on=real --resize_mode=squash --output_dir={done}": "different mixed_geometry, resize_mode",
    "{synthetic} --num_train_images=500": "too few images for training: ",
}


def test_everyday_mistakes_end_with_a_sentence(samples, tmp_path, capsys):
    done, other = tmp_path / "done", tmp_path / "other.safetensors"
    run(done, "--mixed_geometry", synthetic=samples, resize_mode="pad")
    save_file({k: v.contiguous() for k, v in get_model("densenet121").state_dict().items()}, other)
    (samples.parent / "bare").mkdir()
    Image.new("L", (64, 64)).save(samples.parent / "bare" / "1.png")
    unfinished = shutil.copytree(samples.parent / "bare", samples.parent / "unfinished")
    (unfinished / "sampling.json").touch()
    more = {"bare": samples.parent / "bare", "unfinished": unfinished}
    places = more | dict(synthetic=f"--synthetic={samples}", samples=samples, csv=phantoms(), done=done, other=other)
    for line, words in ERRORS.items():
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "refused", *line.format(**places).split())
        assert ended.value.code == 2 and words in capsys.readouterr().err, line
    spec = json.loads((done / "classifier" / "classifier.json").read_text())
    (done / "classifier" / "classifier.json").write_text(json.dumps(spec | {"thresholds": {}}))
    with pytest.raises(SystemExit):
        run(tmp_path / "refused", f"--classifier={done / 'classifier'}")
    assert "has no thresholds" in capsys.readouterr().err and not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", ["num_train_images", "max_test_images", "source_resolution", "bootstrap_samples"])
def test_counts_below_one_are_refused(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        eval_downstream.parse_args(arguments(tmp_path / "out", "--train_on=real", f"--{name}=0"))
    assert ended.value.code == 2 and f"--{name} must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(samples, tmp_path):
    done = launch(ROOT / "eval_downstream.py", *arguments(tmp_path / "two", f"--synthetic={samples}"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "two" / "downstream_metrics.json").read_text())
    again = run(tmp_path / "one", classifier=tmp_path / "two" / "classifier", source_resolution=None)
    assert row(again, "auroc")["value"] == pytest.approx(row(summary, "auroc")["value"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_CSV.exists(), reason="no ../shared/cxr")
def test_pneumonia_is_learnt_and_shuffled_labels_teach_nothing(tmp_path, monkeypatch):
    monkeypatch.undo()
    options = {"num_train_epochs": 12, "resolution": 64, "source_resolution": 128, "train_batch_size": 16}
    options |= {"train_on": "real", "real_csv": REAL_CSV, "arch": "efficientnet_b0", "patience": 0}
    learnt = run(tmp_path / "learnt", "--labels", "Pneumonia", "No Finding", **options)
    control = run(tmp_path / "control", "--shuffle_labels", "--labels", "Pneumonia", "No Finding", **options)
    assert row(learnt, "auroc", "Pneumonia")["low"] > 0.6 and row(learnt, "accuracy_gain")["low"] > 0
    assert abs(row(control, "auroc")["value"] - 0.5) < 0.15 and not (tmp_path / "control" / "classifier").exists()
    assert np.asarray(Image.open(tmp_path / "learnt" / "roc.png")).std() > 5
