"""eval_downstream.py: exact metrics, intervals that cover, splits without shared patients, and results that repeat."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import ROOT, launch, phantoms
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn import metrics
from sklearn.calibration import calibration_curve

import eval_downstream
import train_full

CONDITIONS = eval_downstream.CONDITIONS
CXR = ROOT.parent / "shared" / "cxr" / "CXR-pediatric" / "train.csv"
QUICK = {
    "weights": "none", "resolution": 32, "source_resolution": 64, "num_seeds": 1, "num_train_epochs": 2, "train_batch_size": 8,
    "bootstrap_samples": 50,
}  # fmt: skip


def arguments(output_dir, *more, real_csv=None, **changes) -> list[str]:
    options = {"real_csv": real_csv or phantoms(), "output_dir": output_dir, "image_cache_dir": output_dir.parent / "image_cache"}
    return [*(f"--{name}={value}" for name, value in (options | QUICK | changes).items() if value is not None), *map(str, more)]


def run(output_dir, *more, **changes) -> dict:
    """Runs the script in this process and returns its JSON."""
    AcceleratorState._reset_state(reset_partial_state=True)
    eval_downstream.main(eval_downstream.parse_args(arguments(output_dir, *more, **changes)))
    return json.loads((output_dir / "downstream_metrics.json").read_text())


def said(capsys, output_dir, *more, **changes) -> str:
    """The one sentence that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(output_dir, *more, **changes)
    error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert ended.value.code == 2 and len(error) == 1, error
    return error[0]


def row(summary: dict, metric: str, label: str = "all") -> dict:
    return next(r for r in summary["results"] if r["metric"] == metric and r["label"] == label)


def of_split(csv, split: str) -> pd.DataFrame:
    """The frontal rows of a split, as strings, with absolute paths."""
    frame, table = pd.read_csv(csv, dtype=str, keep_default_na=False), train_full.load_image_table(str(csv))
    keep = table["frontal"] & (train_full.assign_splits(table["patient"], 0) == split)
    return frame.assign(Path=table["image"])[keep.to_numpy()]


def as_samples(folder, rows: pd.DataFrame, resize_mode="squash", labels=CONDITIONS) -> str:
    """Writes rows as a folder like sample.py's."""
    folder.mkdir()
    table = rows[labels].replace("", "0").reset_index(drop=True)
    for i, path in enumerate(rows["Path"]):
        Image.open(path).resize((64, 64)).save(folder / f"{i:03d}.png")
    table.insert(0, "file_name", [f"{i:03d}.png" for i in range(len(rows))])
    table.assign(resolution=64, resize_mode=resize_mode).to_csv(folder / "metadata.csv", index=False)
    return str(folder)


@pytest.fixture
def samples(tmp_path) -> str:
    return as_samples(tmp_path / "samples", of_split(phantoms(), "train"))


# ----------------------------------------------------------------------------------------------------------------------
# Metrics and intervals
# ----------------------------------------------------------------------------------------------------------------------


def random_answers(seed: int, n: int = 300):
    generator = np.random.default_rng(seed)
    target = (generator.random(n) < generator.uniform(0.1, 0.9)).astype(np.float64)
    # Rounded, so that there are ties.
    probability = np.round(np.clip(0.3 * target + 0.7 * generator.random(n), 0, 1), 2)
    return target, probability, float(np.round(generator.uniform(0.2, 0.8), 2)), generator.integers(0, 4, n)


def by_scikit_learn(target, probability, threshold) -> dict[str, float]:
    called, share = probability >= 0.5, target.mean()
    bins = np.minimum((probability * 15).astype(int), 14)
    # calibration_curve closes its bins at the other side: a nudge puts values on an edge where ours has them.
    true, predicted = calibration_curve(target, np.minimum(probability + 1e-9, 1), n_bins=15, strategy="uniform")
    sizes = np.array([(bins == b).sum() for b in np.unique(bins)])
    return {
        "accuracy": metrics.accuracy_score(target, called),
        "constant_accuracy": max(share, 1 - share),
        "accuracy_gain": metrics.accuracy_score(target, called) - max(share, 1 - share),
        "predicted_positive_rate": called.mean(),
        "balanced_accuracy": metrics.balanced_accuracy_score(target, called),
        "auroc": metrics.roc_auc_score(target, probability),
        "auprc": metrics.average_precision_score(target, probability),
        "f1": metrics.f1_score(target, probability >= threshold),
        "ece": (sizes * abs(true - predicted)).sum() / len(target),
    }


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_scikit_learns(seed):
    target, probability, threshold, counts = random_answers(seed)
    expected = by_scikit_learn(target, probability, threshold)
    assert eval_downstream.point_metrics(target, probability, threshold) == pytest.approx(expected, abs=1e-8)
    weighted = eval_downstream.weighted_metrics(target, probability, threshold, np.stack([np.ones(len(target)), counts]).astype(float))
    assert {name: values[0] for name, values in weighted.items()} == pytest.approx(expected, abs=1e-8)
    # A weight is a count: the same as an image that is there so often.
    repeated = by_scikit_learn(*(np.repeat(values, counts) for values in (target, probability)), threshold)
    assert {name: values[1] for name, values in weighted.items()} == pytest.approx(repeated, abs=1e-8)


def test_the_threshold_is_youdens():
    target, probability, _, _ = random_answers(7)
    threshold = eval_downstream.youden_threshold(target, probability)

    def youden(t):
        return (probability[target == 1] >= t).mean() - (probability[target == 0] >= t).mean()

    assert youden(threshold) == pytest.approx(max(youden(t) for t in np.unique(probability)))
    assert eval_downstream.youden_threshold(np.zeros(9), np.linspace(0, 1, 9)) is None


def clustered(generator, patients: int):
    """Images of patients of one to five images each, alike in label and score within a patient, and those patients."""
    index = np.repeat(np.arange(patients), generator.integers(1, 6, patients))
    effect = generator.normal(size=patients)[index]
    target = (effect + 0.5 * generator.normal(size=len(index)) > 0.3).astype(np.float64)
    score = effect * 0.6 + generator.normal(size=patients)[index] + 0.5 * generator.normal(size=len(index))
    return target, 1 / (1 + np.exp(-score)), index


def test_patient_cluster_intervals_cover():
    """95% intervals hold the population's figure in 93 to 97% of 1,000 draws; intervals that ignore patients do not."""
    generator = np.random.default_rng(0)
    target, probability, _ = clustered(generator, 200_000)
    truth = eval_downstream.point_metrics(target, probability, 0.5)
    names = ("auroc", "accuracy", "balanced_accuracy", "auprc")
    by_patient, by_image = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for draw in range(1000):
        target, probability, patients = clustered(generator, 200)
        # The second is so far off that fewer samples show it.
        for covered, clusters, samples in ((by_patient, patients, 1000), (by_image, np.arange(len(target)), 200)):
            drawn = eval_downstream.bootstrap(target, probability, 0.5, clusters, samples, seed=draw)
            for name in names:
                low, high = eval_downstream.interval(drawn[name])
                covered[name] += low <= truth[name] <= high
    print(by_patient, by_image)
    assert all(930 <= count <= 970 for count in by_patient.values()), by_patient
    assert all(count < 900 for count in by_image.values()), by_image


def test_the_interval_covers_what_the_seeds_vary_by():
    """Three trainings of a true mean of 0.7, and a test set that varies too: the interval holds the mean in 93 to 97% of 2,000 draws."""
    generator, covered = np.random.default_rng(0), {0.0: 0, 0.02: 0}
    for draw in range(2000):
        for patients in covered:
            values = 0.7 + generator.normal(scale=0.02, size=3) + generator.normal(scale=patients or 1e-9)
            samples = np.repeat((values.mean() + generator.normal(scale=patients or 1e-9, size=500))[None], 3, axis=0)
            low, high = eval_downstream.interval(eval_downstream.over_seeds("auroc", values, samples, seed=draw))
            covered[patients] += low <= 0.7 <= high
    assert all(0.93 <= count / 2000 <= 0.97 for count in covered.values()), covered
    one = eval_downstream.over_seeds("auroc", np.array([0.5]), np.linspace(0, 1, 9)[None], seed=0)
    assert (one == np.linspace(0, 1, 9)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


def test_uncertain_labels_are_masked():
    table = pd.DataFrame({"Edema": [1.0, 0.0, -1.0, np.nan]})
    targets = {policy: eval_downstream.label_targets(table, ["Edema"], policy)[:, 0] for policy in ("ones", "zeros", "ignore")}
    assert targets["ones"].tolist() == [1, 0, 1, 0] and targets["zeros"].tolist() == [1, 0, 0, 0]
    assert np.isnan(targets["ignore"]).tolist() == [False, False, True, False]
    logits = torch.randn(4, 1, requires_grad=True)
    loss = eval_downstream.masked_bce(logits, torch.from_numpy(targets["ignore"])[:, None])
    kept = [0, 1, 3]
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits[kept, 0], torch.tensor([1.0, 0, 0])).item())
    loss.backward()
    assert logits.grad[2] == 0 and (logits.grad[kept] != 0).all()


def test_augmentation_is_small_and_flips_only_when_asked():
    args = eval_downstream.parse_args(["--train_on=real", f"--real_csv={phantoms()}"])
    flipping = eval_downstream.parse_args(["--train_on=real", f"--real_csv={phantoms()}", "--horizontal_flip"])
    image = torch.zeros(1, 1, 64, 64)
    image[..., 20:30, 8:16] = 0.5
    still = torch.zeros(1, 6)
    assert torch.allclose(eval_downstream.augment(image, still, args), image, atol=1e-6)
    mirrored = torch.tensor([[0.0, 0, 0, 0, 0, -1]])
    assert torch.allclose(eval_downstream.augment(image, mirrored, args), image, atol=1e-6)
    assert torch.allclose(eval_downstream.augment(image, mirrored, flipping), image.flip(3), atol=1e-6)
    brighter = eval_downstream.augment(image, torch.tensor([[0.0, 0, 0, 0, 1, 0]]), args)
    assert brighter.max() == pytest.approx(0.55)
    # One twentieth of 64 pixels; the content moves against the grid.
    moved = eval_downstream.augment(image, torch.tensor([[0.0, -1, 0, 0, 0, 0]]), args)[0, 0]
    centre = (moved.sum(0) * torch.arange(64)).sum() / moved.sum()
    assert centre.item() == pytest.approx(11.5 + 3.2, abs=0.1)
    larger = eval_downstream.augment(image, torch.tensor([[0.0, 0, 0, 1, 0, 0]]), args)
    assert larger.sum().item() / image.sum().item() == pytest.approx(1.21, abs=0.05)
    turned = eval_downstream.augment(image, torch.tensor([[1.0, 0, 0, 0, 0, 0]]), args)[0, 0]
    angles = []
    for picture in (image[0, 0], turned):
        x, y = (((picture.sum(d) * torch.arange(64)).sum() / picture.sum() - 31.5).item() for d in (0, 1))
        angles.append(np.degrees(np.arctan2(y, x)))
    assert abs(angles[0] - angles[1]) == pytest.approx(7, abs=0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> tuple:
    """A classifier trained on real phantoms, long enough to learn; its folder, its JSON and its table."""
    folder, csv = tmp_path_factory.mktemp("learnt"), phantoms(300)
    options = {"num_train_epochs": 40, "train_batch_size": 16, "learning_rate": 3e-3, "resolution": 64, "source_resolution": 128, "patience": 0}
    return folder / "real", run(folder / "real", train_on="real", real_csv=csv, **(options | {"bootstrap_samples": 200})), csv


def test_a_classifier_of_real_phantoms_finds_the_findings(learnt):
    folder, summary, _ = learnt
    auroc = row(summary, "auroc")
    assert auroc["value"] >= 0.9 and auroc["low"] > 0.8, auroc
    assert all(row(summary, "auroc", label)["low"] > 0.5 for label in CONDITIONS)
    assert row(summary, "accuracy_gain")["low"] > 0
    assert "CONSTANT in 0" not in (folder / "downstream_table.md").read_text()
    for name in ("roc.png", "reliability.png", "training.png"):
        assert np.asarray(Image.open(folder / name)).std() > 5


def test_the_saved_classifier_is_the_one_that_was_scored(learnt, tmp_path):
    folder, summary, csv = learnt
    model, spec = eval_downstream.load_classifier(str(folder / "classifier"))
    assert spec["labels"] == CONDITIONS and spec["arch"] == "efficientnet_b0" and not model.training
    table = train_full.load_image_table(str(csv))
    test = table[table["frontal"] & (train_full.assign_splits(table["patient"], 0) == "test")]
    i = int(np.flatnonzero(test["Edema"].to_numpy() == 1)[0])
    gray = eval_downstream.to_gray(train_full.load_image(test["image"].iloc[i], 128, "squash"), 64)
    logits = model(eval_downstream.classifier_inputs(torch.tensor(gray)[None, None].float() / 255, spec["normalisation"]))
    saved = load_file(folder / "seeds" / "seed-0" / "predictions.safetensors")["test"]
    assert torch.allclose(logits[0], saved[i], atol=1e-4)
    seen = table[table["frontal"] & (train_full.assign_splits(table["patient"], 0) != "test")]["patient"]
    assert set(spec["split"]["patients"]) == {eval_downstream.patient_hash(p) for p in seen}
    assert spec["thresholds"] == summary["seeds"][0]["thresholds"]
    assert spec["real_test_auroc"]["Edema"]["value"] == row(summary, "auroc", "Edema")["value"]
    again = run(tmp_path / "again", f"--classifier={folder / 'classifier'}", real_csv=csv, source_resolution=None)
    assert again["images"]["patients_in_training_and_test"] == 0 and again["train_on"] == "nothing"
    for label in CONDITIONS:
        assert row(again, "auroc", label)["value"] == pytest.approx(row(summary, "auroc", label)["value"], abs=1e-6)
        assert row(again, "f1", label)["value"] == pytest.approx(row(summary, "f1", label)["value"], abs=0.02)
    # Its own training patients are noticed, by their hashes.
    whole = run(tmp_path / "whole", f"--classifier={folder / 'classifier'}", "--split=all", real_csv=csv, source_resolution=None)
    assert whole["images"]["patients_in_training_and_test"] == seen.nunique()


def test_the_best_seed_is_saved_with_its_own_figures(samples, tmp_path):
    summary = run(tmp_path / "out", f"--synthetic={samples}", num_seeds=2)
    best = min(summary["seeds"], key=lambda seed: min(seed["validation_losses"]))
    spec = json.loads((tmp_path / "out" / "classifier" / "classifier.json").read_text())
    assert {label: figure["value"] for label, figure in spec["real_test_auroc"].items()} == best["metrics"]["auroc"]
    assert spec["thresholds"] == best["thresholds"] and row(summary, "auroc", "Edema")["value"] != best["metrics"]["auroc"]["Edema"]


def test_labels_that_are_all_negative_give_a_constant_classifier(tmp_path):
    rows = of_split(phantoms(300), "train")
    rows[CONDITIONS] = "0"
    rows.to_csv(tmp_path / "negative.csv", index=False)
    summary = run(tmp_path / "out", f"--synthetic={tmp_path / 'negative.csv'}", "--learning_rate=3e-3", real_csv=phantoms(300), num_train_epochs=15)
    for label in CONDITIONS:
        accuracy = row(summary, "accuracy", label)
        assert accuracy["value"] == accuracy["floor"] == row(summary, "constant_accuracy", label)["value"]
        assert accuracy["note"] == row(summary, "predicted_positive_rate", label)["note"] == "CONSTANT"
        assert row(summary, "accuracy_gain", label)["note"] == "does not beat the constant predictor"
        auroc = row(summary, "auroc", label)
        assert auroc["value"] is None and auroc["note"] == "n/a: negatives only among the training images"
    assert row(summary, "accuracy")["note"] == "CONSTANT in 6 of 6 labels"
    table = (tmp_path / "out" / "downstream_table.md").read_text()
    assert table.count("**CONSTANT**") == 12 and "in 0 of 6 labels; 6 of 6 give the same answer" in table


def test_shuffled_labels_teach_nothing(tmp_path):
    options = {"train_on": "real", "real_csv": phantoms(600), "num_train_epochs": 8, "num_seeds": 3, "learning_rate": 3e-3}
    # What the same training learns from the labels as they are: without it, a training that learns nothing would pass below.
    assert row(run(tmp_path / "plain", **options), "auroc")["value"] > 0.6
    summary = run(tmp_path / "out", "--shuffle_labels", **options)
    aurocs = [row(summary, "auroc", label) for label in (*CONDITIONS, "all")]
    missed = [auroc for auroc in aurocs if not auroc["low"] <= 0.5 <= auroc["high"]]
    # Each 95% interval misses the truth in one run of twenty, so of seven one or another may; the mean may not be off.
    assert len(missed) <= 2 and abs(aurocs[-1]["value"] - 0.5) < 0.1, aurocs
    level = [auroc for auroc in aurocs if auroc["low"] <= 0.5]
    assert all(auroc["note"] == "no better than chance" for auroc in level)
    assert (tmp_path / "out" / "downstream_table.md").read_text().count("**no better than chance**") == len(level)
    # A control is no classifier to judge images by.
    assert not (tmp_path / "out" / "classifier").exists()


def test_every_way_of_training_sees_as_many_images(samples, tmp_path):
    summaries = {kind: run(tmp_path / kind, f"--synthetic={samples}", train_on=kind, num_train_epochs=1) for kind in ("synthetic", "real", "both")}
    counts = {(s["images"]["train"], s["images"]["validation"]) for s in summaries.values()}
    assert len(counts) == 1 and all(n > 0 for n in counts.pop())
    assert len({s["settings"]["test"] for s in summaries.values()}) == 1
    assert len({s["settings"]["training"] for s in summaries.values()}) == 3
    specs = {kind: json.loads((tmp_path / kind / "classifier" / "classifier.json").read_text()) for kind in summaries}
    assert not specs["synthetic"]["split"]["patients"] and specs["both"]["split"]["patients"]
    # As a share of the real run's figures, from the same draws of patients.
    compared = run(tmp_path / "synthetic", f"--synthetic={samples}", f"--reference={tmp_path / 'real'}", num_train_epochs=1)
    for label in ("all", "Edema"):
        ratio = row(compared, "auroc_of_reference", label)
        assert ratio["value"] == pytest.approx(row(compared, "auroc", label)["value"] / row(summaries["real"], "auroc", label)["value"])
        assert ratio["low"] < ratio["value"] < ratio["high"]
    same = run(tmp_path / "real", f"--synthetic={samples}", f"--reference={tmp_path / 'real'}", train_on="real", num_train_epochs=1)
    assert row(same, "auroc_of_reference")["low"] == row(same, "auroc_of_reference")["high"] == 1


def test_the_same_seed_gives_the_same_bytes_killed_or_not(samples, tmp_path):
    options = {"num_train_epochs": 3, "num_seeds": 2}
    run(tmp_path / "whole", f"--synthetic={samples}", **options)
    whole = (tmp_path / "whole" / "downstream_metrics.json").read_bytes()
    command = [sys.executable, ROOT / "eval_downstream.py", *arguments(tmp_path / "cut", f"--synthetic={samples}", **options)]
    for last in ("seed-0/progress.safetensors", "seed-1/progress.safetensors"):
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        # Killed as soon as an epoch is saved, so that the next one starts in the middle of a seed.
        while not (tmp_path / "cut" / "seeds" / last).exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "cut" / "downstream_metrics.json").exists()
    run(tmp_path / "cut", f"--synthetic={samples}", **options)
    assert (tmp_path / "cut" / "downstream_metrics.json").read_bytes() == whole
    weights = [load_file(tmp_path / name / "classifier" / "model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not list(tmp_path.glob("cut/seeds/*/progress.safetensors")) and not list(tmp_path.rglob(".*part"))
    other = run(tmp_path / "other", f"--synthetic={samples}", "--seed=5", **options)
    assert row(other, "auroc")["value"] != row(json.loads(whole), "auroc")["value"]


def test_images_are_decoded_once(samples, tmp_path, monkeypatch):
    first = run(tmp_path / "a", f"--synthetic={samples}")

    def decoded_again(*args):
        raise AssertionError("an image was decoded again")

    monkeypatch.setattr(eval_downstream, "load_image", decoded_again)
    second = run(tmp_path / "b", f"--synthetic={samples}")
    assert first["results"] == second["results"]
    cached = sorted((tmp_path / "image_cache").glob("*.npy"))
    assert len(cached) == 2 and all(np.load(path, mmap_mode="r").dtype == np.uint8 for path in cached)


def test_two_processes(samples, tmp_path):
    done = launch(ROOT / "eval_downstream.py", *arguments(tmp_path / "two", f"--synthetic={samples}"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "two" / "downstream_metrics.json").read_text())
    assert summary["settings"]["processes"] == 2 and 0 < row(summary, "auroc")["value"] < 1
    # What is saved scores what was reported, so each process predicted its share of the same network.
    again = run(tmp_path / "one", f"--classifier={tmp_path / 'two' / 'classifier'}")
    assert row(again, "auroc")["value"] == pytest.approx(row(summary, "auroc")["value"], abs=1e-6)


def test_patients_shared_by_ready_made_tables_are_counted(samples, tmp_path, capsys):
    train, test = of_split(phantoms(300), "train"), of_split(phantoms(), "test")
    shared = train.iloc[:3]
    train.to_csv(tmp_path / "train.csv", index=False)
    pd.concat([test, shared]).to_csv(tmp_path / "test.csv", index=False)
    summary = run(tmp_path / "out", train_on="real", real_csv=tmp_path / "train.csv", test_csv=tmp_path / "test.csv")
    patients = shared["Path"].str.extract(r"(patient\d+)")[0].nunique()
    assert summary["images"]["patients_in_training_and_test"] == patients > 0
    warning = f"{patients:,} patients are in both the training and the test table"
    assert warning in capsys.readouterr().out and f"{patients:,} patients are in both" in (tmp_path / "out" / "downstream_table.md").read_text()
    assert run(tmp_path / "own", train_on="real")["images"]["patients_in_training_and_test"] == 0


def test_a_ready_made_triple_is_used_whole(tmp_path):
    parts = {name: of_split(phantoms(), name) for name in ("train", "val", "test")}
    for name, rows in parts.items():
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    tables = {"real_csv": tmp_path / "train.csv", "validation_csv": tmp_path / "val.csv", "test_csv": tmp_path / "test.csv"}
    summary = run(tmp_path / "out", train_on="real", **tables)
    assert [summary["images"][name] for name in ("train", "validation", "test")] == [len(rows) for rows in parts.values()]


def test_a_label_with_one_class_is_scored_na_and_the_rest_goes_on(tmp_path):
    rows = of_split(phantoms(), "train")
    rows["Edema"] = "1"
    synthetic = as_samples(tmp_path / "s", rows)
    frame = pd.read_csv(phantoms(), dtype=str, keep_default_na=False)
    frame.assign(Path=train_full.load_image_table(str(phantoms()))["image"], Pneumothorax="0").to_csv(tmp_path / "real.csv", index=False)
    summary = run(tmp_path / "out", f"--synthetic={synthetic}", real_csv=tmp_path / "real.csv")
    assert row(summary, "auroc", "Edema")["note"] == "n/a: positives only among the training images"
    assert row(summary, "accuracy", "Edema")["value"] is not None
    for metric in eval_downstream.METRICS:
        dropped = row(summary, metric, "Pneumothorax")
        assert dropped["value"] is None and dropped["note"] == "n/a: negatives only among the test images"
        assert row(summary, metric, "Cardiomegaly")["value"] is not None
    assert row(summary, "auroc")["note"].endswith("mean of 4 of 6 labels")
    assert " n/a |" in (tmp_path / "out" / "downstream_table.md").read_text()


def test_sizes_that_differ_are_said_once(samples, tmp_path, capsys):
    run(tmp_path / "a", f"--synthetic={samples}")
    out = capsys.readouterr().out
    assert out.count("  resized  images of") == 1 and "to 64x64 by squash" in out


def test_initial_weights_from_a_file(samples, tmp_path):
    network = eval_downstream.build_classifier("efficientnet_b0", 1000)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "imagenet.safetensors")
    model = eval_downstream.build_classifier("efficientnet_b0", 6)
    eval_downstream.load_initial_weights(None, model, "efficientnet_b0", str(tmp_path / "imagenet.safetensors"))
    equal = {name: torch.equal(tensor, network.state_dict()[name]) for name, tensor in model.state_dict().items() if "classifier" not in name}
    assert len(equal) > 300 and all(equal.values())
    assert run(tmp_path / "out", f"--synthetic={samples}", weights=tmp_path / "imagenet.safetensors")["settings"]["weights_sha256"]


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "resnet50"])
def test_other_architectures(arch, samples, tmp_path):
    run(tmp_path / "out", f"--synthetic={samples}", f"--arch={arch}", num_train_epochs=1)
    model, spec = eval_downstream.load_classifier(str(tmp_path / "out" / "classifier"))
    assert spec["arch"] == arch and type(model).__name__.lower() == arch.rstrip("0123456789")


@pytest.mark.skipif(not CXR.exists(), reason="no ../shared/cxr")
def test_real_radiographs(tmp_path):
    """Pneumonia against No Finding, from scratch: far above chance on held-out patients after a few epochs."""
    options = {"num_train_epochs": 12, "learning_rate": 1e-3, "resolution": 64, "source_resolution": 128, "train_batch_size": 16, "patience": 0}
    summary = run(tmp_path / "out", "--labels", "Pneumonia", "No Finding", train_on="real", real_csv=CXR, **options)
    assert row(summary, "auroc", "Pneumonia")["low"] > 0.6


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


def test_bad_input(samples, tmp_path, capsys, monkeypatch):
    def refused(words, *more, folder="refused", **changes):
        error = said(capsys, tmp_path / folder, *more, **changes)
        assert words in error, error
        assert folder != "refused" or not (tmp_path / folder).exists()

    synthetic = f"--synthetic={samples}"
    refused("--validation_csv needs --real_csv and --test_csv", "--train_on=real", validation_csv=phantoms())
    refused("invalid choice: 'vgg'", synthetic, "--arch=vgg")
    refused("needs --synthetic FOLDER", train_on="both")
    (tmp_path / "empty").mkdir()
    refused("no metadata.csv in it; let sample.py finish", f"--synthetic={tmp_path / 'empty'}")
    refused("no such folder or CSV", "--synthetic=absent")
    refused("no such file", synthetic, real_csv="absent.csv")
    refused("'Oedema' is none of", synthetic, "--labels", "Oedema")
    refused("a pickle is converted by: python -c", synthetic, weights="weights.pth")
    refused("the tables share none of", f"--synthetic={as_samples(tmp_path / 'other', of_split(phantoms(), 'train'), labels=['Fracture'])}")
    refused("no column 'Edema', which --labels names", f"--synthetic={tmp_path / 'other'}", "--labels", "Edema")
    padded = as_samples(tmp_path / "padded", of_split(phantoms(), "train"), resize_mode="pad")
    refused("the tables were made differently", f"--synthetic={padded}", "--resize_mode=squash")
    assert run(tmp_path / "padded_out", f"--synthetic={padded}")["settings"]["resize_mode"] == "pad"
    assert run(tmp_path / "mixed", f"--synthetic={padded}", "--resize_mode=squash", "--mixed_geometry")["settings"]["resize_mode"] == "squash"
    refused("synthetic images for training, 9,999 needed", synthetic, "--num_train_images=9999")
    refused("these patients are trained on", synthetic, "--split=all", train_on="real")
    refused("no finished run", synthetic, f"--reference={tmp_path / 'empty'}")
    refused("is not trained on real images", synthetic, f"--reference={tmp_path / 'mixed'}")
    run(tmp_path / "control", synthetic, "--shuffle_labels", train_on="real")
    refused("made with another shuffle_labels", synthetic, f"--reference={tmp_path / 'control'}")
    (tmp_path / "control" / "downstream_metrics.json").write_text("{}")
    refused("no finished run", synthetic, f"--reference={tmp_path / 'control'}")
    broken = of_split(phantoms(300), "train")
    (tmp_path / "broken.jpg").write_bytes(open(broken["Path"].iloc[0], "rb").read()[:500])
    broken["patient_id"], broken["Path"] = broken["Path"], str(tmp_path / "broken.jpg")
    broken.to_csv(tmp_path / "broken.csv", index=False)
    refused("broken.jpg", f"--synthetic={tmp_path / 'broken.csv'}")
    assert not list((tmp_path / "image_cache").glob("*.part"))
    refused("not the weights of resnet50", synthetic, "--arch=resnet50", weights=tmp_path / "mixed" / "classifier" / "model.safetensors", folder="other_arch")

    run(tmp_path / "done", synthetic)
    refused("holds results made with another seed", synthetic, "--seed=3", folder="done")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    refused("not empty and not a folder of this script", synthetic, folder="mine")
    (tmp_path / "file").write_text("")
    refused("cannot be written", synthetic, f"--image_cache_dir={tmp_path / 'image_cache'}", folder="file/x")
    refused("--image_cache_dir", synthetic, f"--image_cache_dir={tmp_path / 'file' / 'cache'}")
    refused("names a finding twice", synthetic, "--labels", "Edema", "Edema")
    sides = ((f"file_name,Edema,resolution\n000.png,1,{side}\n", f"{side!r}, which is none of sample.py's") for side in ("0", "²", "-1", "9" * 5000))
    for text, words in (("", "the file is empty"), ("file_name,Edema,resize_mode\n000.png,1,stretch\n", "'stretch', which is none of sample.py's"), *sides):
        (tmp_path / "s.csv").write_text(text, encoding="utf-8")
        refused(words, f"--synthetic={tmp_path / 's.csv'}")
    of_split(phantoms(), "test").to_csv(tmp_path / "test_only.csv", index=False)
    refused("no real images for training in the split by patient", synthetic, real_csv=tmp_path / "test_only.csv")

    with zipfile.ZipFile(tmp_path / "samples.zip", "w") as file:
        file.writestr("metadata.csv", "file_name,Edema\n000.png,1\n")
    refused("samples.zip: ", f"--synthetic={tmp_path / 'samples.zip'}")

    classifier = tmp_path / "done" / "classifier"
    spec = json.loads((classifier / "classifier.json").read_text())
    refused("cannot be read", f"--classifier={tmp_path / 'empty'}")
    for key in ("labels", "thresholds", "split"):
        (classifier / "classifier.json").write_text(json.dumps({k: v for k, v in spec.items() if k != key}))
        refused(f"{key!r} is missing or not as these scripts write it; save the classifier anew", f"--classifier={classifier}")
    changed = spec | {"split": {key: value for key, value in spec["split"].items() if key != "fingerprint"}}
    (classifier / "classifier.json").write_text(json.dumps(changed | {"spec_sha256": eval_downstream.spec_digest(changed)}))
    refused("'split' is not as these scripts write it", f"--classifier={classifier}")
    (classifier / "classifier.json").write_text(json.dumps(spec | {"labels": spec["labels"][:3], "thresholds": {}}))
    refused("does not match classifier.json", f"--classifier={classifier}")
    (classifier / "classifier.json").write_text(json.dumps(spec))
    for change in ({"labels": spec["labels"][::-1]}, {"thresholds": {}}, {"normalisation": {"mean": [0] * 3, "std": [1] * 3}}):
        (classifier / "classifier.json").write_text(json.dumps(spec | change))
        refused("does not match classifier.json", f"--classifier={classifier}")
    (classifier / "classifier.json").write_text(json.dumps(spec))
    with open(classifier / "model.safetensors", "ab") as file:
        file.write(b"x")
    refused("not the file that classifier.json was written for", f"--classifier={classifier}")

    monkeypatch.setattr(eval_downstream, "get_model", lambda *args, **options: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(eval_downstream, "build_classifier", lambda arch, n: torch.nn.Linear(2, n))
    refused("cannot be loaded (no network); pass --weights FILE or --weights none", synthetic, weights="imagenet", folder="offline")


def test_types_within_classifier_json_are_checked(tmp_path, capsys):
    """Its digest is right, which anybody can compute."""
    eval_downstream.save_tensors(eval_downstream.build_classifier("resnet18", 1).state_dict(), tmp_path / "model.safetensors")
    sound = {
        "arch": "resnet18", "labels": ["Edema"], "resolution": 32, "source_resolution": 64, "resize_mode": "squash", "train_on": "real",
        "normalisation": {"mean": [0.5] * 3, "std": [0.2] * 3}, "thresholds": {"Edema": 0.5}, "split": {"fingerprint": "0", "patients": ["0" * 16]},
        "real_test_auroc": {"Edema": {"value": 0.7, "low": None, "high": 0.9, "n": 90, "note": "a note"}},
        "model_sha256": hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip

    def write(**changes):
        spec = sound | changes
        (tmp_path / "classifier.json").write_text(json.dumps(spec | {"spec_sha256": eval_downstream.spec_digest(spec)}))

    wrong = [("arch", "maskrcnn_resnet50_fpn"), ("labels", []), ("labels", [["Edema"]]), ("resize_mode", "stretch"), ("split", {"patients": [7]}), ("split", {"patients": "all"})]
    wrong += [("thresholds", {"Edema": value}) for value in ("0.5", [0.5], True, float("nan"), float("inf"), 1.5, 10**400)]
    wrong += [("thresholds", {}), ("resolution", True), ("resolution", 0), ("source_resolution", -1), ("source_resolution", 10**9)]
    wrong += [("normalisation", {"mean": [0.5] * 3, "std": std}) for std in ([0, 0, 0], [-1.0] * 3, [float("nan")] * 3, [0.2], 0.2, ["a"] * 3, None)]
    wrong += [("normalisation", {"mean": mean, "std": [0.2] * 3}) for mean in ([10**400] * 3, [[0.5]] * 3, {"a": 1})]
    wrong += [("real_test_auroc", {"Edema": figure}) for figure in (0.7, {"value": "0.7"}, {"value": float("nan")}, {"low": [0.1]})]
    for field, value in wrong:
        write(**{field: value})
        error = said(capsys, tmp_path / "out", f"--classifier={tmp_path}")
        assert f"classifier.json: {field!r} is not as these scripts write it; save the classifier anew" in error, (field, value)
    for arch in eval_downstream.ARCHITECTURES:
        write(arch=arch)
        assert arch == "resnet18" or "does not match classifier.json" in said(capsys, tmp_path / "out", f"--classifier={tmp_path}")
    assert not (tmp_path / "out").exists()
    write()
    assert eval_downstream.load_classifier(str(tmp_path))[1]["labels"] == ["Edema"]
    write(thresholds={"Edema": None}, real_test_auroc={})
    assert eval_downstream.load_classifier(str(tmp_path))[1]["thresholds"] == {"Edema": None}


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_is_refused(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert f"{name} is not supported" in said(capsys, tmp_path / "out", train_on="real")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU has fp16")
def test_half_precision_on_a_cpu_is_refused(tmp_path, capsys):
    assert "fp16 needs a GPU; pass bf16 or no" in said(capsys, tmp_path / "out", train_on="real", mixed_precision="fp16")
    assert not list(tmp_path.iterdir())


def test_tables_are_read_alike(tmp_path):
    (tmp_path / "s.csv").write_bytes(b"\xef\xbb\xbfresolution, file_name, Edema, resize_mode\n 64, 0.png, 1, pad\n")
    assert len(train_full.load_image_table(str(tmp_path / "s.csv"))) == 1
    assert eval_downstream.read_geometry(str(tmp_path / "s.csv")) == {"resize_mode": ["pad"], "resolution": ["64"]}


# ----------------------------------------------------------------------------------------------------------------------
# Bad images, damaged files, a full disk
# ----------------------------------------------------------------------------------------------------------------------


def spoil(folder: Path) -> list[str]:
    """One image missing, one cut short, one of 16 bits, one animated; their names."""
    names = [f"{i:03d}.png" for i in range(4)]
    missing, short, deep, animated = (folder / name for name in names)
    missing.unlink()
    short.write_bytes(short.read_bytes()[:100])
    Image.new("I;16", (64, 64), 3000).save(deep)
    frames = [Image.new("L", (64, 64), level) for level in (0, 255)]
    frames[0].save(animated, format="GIF", save_all=True, append_images=frames[1:])
    return names


def test_bad_images_stop_or_are_skipped(samples, tmp_path, capsys):
    names, synthetic = spoil(Path(samples)), f"--synthetic={samples}"
    error = said(capsys, tmp_path / "out", synthetic)
    assert "4 of " in error and all(error.count(name) == 1 for name in names), error
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]
    # Left out before the tables are equalised, so a run on the other table trains on as many.
    real = run(tmp_path / "real", synthetic, "--on_bad_image=skip", train_on="real")
    out = capsys.readouterr().out
    assert out.count("  skipped  ") == 4 and all(out.count(name) == 1 for name in names)
    # The same on every process, and told once by all of them.
    done = launch(ROOT / "eval_downstream.py", *arguments(tmp_path / "two", synthetic, "--on_bad_image=skip", train_on="real"), processes=2)
    assert done.returncode == 0 and done.stdout.count("  skipped  ") == 4, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "downstream_metrics.json").read_text())["images"] == real["images"]
    summary = run(tmp_path / "out", synthetic, "--on_bad_image=skip", f"--reference={tmp_path / 'real'}")
    assert summary["images"]["left_out"]["unreadable"] == real["images"]["left_out"]["unreadable"] == 4
    assert summary["images"]["train"] == real["images"]["train"] and row(summary, "auroc_of_reference")["value"] is not None
    for name in names:
        (Path(samples) / name).unlink(missing_ok=True)
    frame = pd.read_csv(Path(samples) / "metadata.csv", dtype=str, keep_default_na=False)
    frame[~frame["file_name"].isin(names)].to_csv(Path(samples) / "metadata.csv", index=False)
    without = run(tmp_path / "without", synthetic)
    assert without["results"] == [figure for figure in summary["results"] if not figure["metric"].endswith("_of_reference")]


@pytest.mark.parametrize("answer", ["stop", "skip"])
def test_an_image_that_goes_after_the_check_ends_with_a_sentence(answer, samples, tmp_path, capsys, monkeypatch):
    load = eval_downstream.load_image

    def load_and_lose(image, resolution, resize_mode):
        pixels = load(image, resolution, resize_mode)
        if resolution == 64 and image.endswith("000.png"):
            os.unlink(image)
        return pixels

    monkeypatch.setattr(eval_downstream, "load_image", load_and_lose)
    error = said(capsys, tmp_path / "out", f"--synthetic={samples}", f"--on_bad_image={answer}")
    assert error.endswith("000.png: no such file") and not (tmp_path / "out").exists()
    assert not list((tmp_path / "image_cache").glob("*.part"))


@pytest.mark.parametrize("damage", ["short", "flipped", "no json", "old json", "json"])
def test_a_damaged_image_cache_is_made_again(damage, tmp_path, capsys, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    images, accelerator = list(of_split(phantoms(), "val")["Path"])[:3], Accelerator()

    def cached():
        (pixels,), sizes = eval_downstream.cache_pixels(accelerator, [images], 64, "squash", 32, tmp_path)
        return np.array(pixels), dict(sizes)

    pixels, sizes = cached()
    (path,) = tmp_path.glob("*.npy")
    index = path.with_suffix(".json")
    whole = path.read_bytes(), index.read_bytes()
    if damage == "short":
        path.write_bytes(whole[0][:-100])
    elif damage == "flipped":
        path.write_bytes(whole[0][:-1] + bytes([whole[0][-1] ^ 1]))
    elif damage == "no json":
        index.unlink()
    else:
        index.write_text(json.dumps(sizes) if damage == "old json" else "[")
    again = cached()
    assert "damaged, computed again" in capsys.readouterr().err
    assert (again[0] == pixels).all() and again[1] == sizes and sum(sizes.values()) == 3
    assert (path.read_bytes(), index.read_bytes()) == whole and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(eval_downstream, "load_image", None)
    assert (cached()[0] == pixels).all() and not capsys.readouterr().err


def test_a_full_disk_leaves_nothing_half_written_and_the_next_start_goes_on(samples, tmp_path, capsys, monkeypatch):
    full = None

    def until_full(write):
        def write_half(path, content, *options, **more):
            if path.name != f".{full}.part":
                return write(path, content, *options, **more)
            write(path, content[: len(content) // 2], *options, **more)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        return write_half

    monkeypatch.setattr(Path, "write_text", until_full(Path.write_text))
    monkeypatch.setattr(Path, "write_bytes", until_full(Path.write_bytes))
    names = ["settings.json", "progress.safetensors", "predictions.safetensors", "classifier.json", "downstream_table.md", "downstream_metrics.json"]
    for full in names:
        error = said(capsys, tmp_path / "out", f"--synthetic={samples}", num_train_epochs=1)
        assert "No space left on device" in error and not list((tmp_path / "out").rglob(full)), error
        assert full.startswith("downstream") == (tmp_path / "out" / "classifier").exists()
    full = None
    summary = run(tmp_path / "out", f"--synthetic={samples}", num_train_epochs=1)
    assert summary == run(tmp_path / "whole", f"--synthetic={samples}", num_train_epochs=1)
    assert not list((tmp_path / "out").rglob(".*part")) and eval_downstream.load_classifier(str(tmp_path / "out" / "classifier"))
