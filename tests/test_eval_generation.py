"""eval_generation.py: each figure against an independent reference, the whole on phantoms, and every kind of bad input."""

import errno
import hashlib
import json
import os
import re
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import BASE, REAL_CSV, ROOT, launch, phantoms
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

import eval_generation as evaluation
import train_full

LABELS = ["Edema", "No Finding"]
FILES = ("generation_metrics.json", "generation_metrics.md", "consistency.png", "fid.png", "nearest_neighbours.png")


# ----------------------------------------------------------------------------------------------------------------------
# What the tests work on
# ----------------------------------------------------------------------------------------------------------------------


def real_csv() -> Path:
    """Phantoms in the place of real radiographs, enough of them for FID at several sizes."""
    return phantoms(160)


@torch.no_grad()
def set_batch_norms(model: torch.nn.Module, inputs: torch.Tensor) -> None:
    """Statistics of some images, without which an untrained network says nearly the same of every image, or overflows."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model.train()(inputs)
    model.eval()


@pytest.fixture(scope="session")
def xrv_file(tmp_path_factory) -> Path:
    """torchxrayvision's DenseNet-121 with seeded random weights, as a user's converted file."""
    torch.manual_seed(0)
    model = evaluation.xrv.models.DenseNet(weights=None)
    paths = evaluation.load_image_table(str(real_csv()))["image"][:12]
    set_batch_norms(model, torch.from_numpy(np.stack([evaluation.xrv_pixels(evaluation.load_image(path, 64, "squash")) for path in paths])))
    path = tmp_path_factory.mktemp("xrv") / "xrv.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()} | {"op_threshs": torch.full((18,), 0.2)}, path)
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A classifier folder of eval_downstream.py, small and untrained."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = evaluation.build_classifier("efficientnet_b0", 3)
    paths = evaluation.load_image_table(str(real_csv()))["image"][:40]
    gray = np.stack([evaluation.to_gray(evaluation.load_image(path, 64, "squash"), 32) for path in paths])
    normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}
    set_batch_norms(model, evaluation.classifier_inputs(torch.from_numpy(gray)[:, None].float() / 255, normalisation))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    spec = {
        "arch": "efficientnet_b0", "labels": ["Edema", "Cardiomegaly", "No Finding"], "resolution": 32, "source_resolution": 64,
        "resize_mode": "squash", "normalisation": normalisation,
        "thresholds": {"Edema": 0.4, "Cardiomegaly": 0.5, "No Finding": None}, "train_on": "real", "uncertain": "ignore",
        "split": {"seed": 0, "fingerprint": "0", "patients": []}, "real_test_auroc": {},
        "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    spec["spec_sha256"] = evaluation.spec_digest(spec)
    (folder / "classifier.json").write_text(json.dumps(spec))
    return folder


def write_samples(folder: Path, images: dict[str, list], resolution: int = 64, resize_mode: str = "squash") -> Path:
    """A folder as sample.py leaves it, of images or paths by label."""
    rows = []
    for label, own in images.items():
        (folder / label.replace(" ", "_")).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(own):
            name = f"{label.replace(' ', '_')}/{i:06d}.png"
            image = image if isinstance(image, Image.Image) else Image.open(image)
            image.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS).save(folder / name)
            marks = {column: float(column == label) for column in evaluation.LABELS}
            rows.append({"file_name": name, "prompt": label, **marks, "resolution": resolution, "resize_mode": resize_mode})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


def real_images(label: str, split: str) -> list[str]:
    table = evaluation.load_split(str(real_csv()), None, split, 0)
    return list(table["image"][evaluation.positives(table, label, "ignore")])


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> Path:
    """Phantoms in the place of generated images: blurred ones of the test patients."""
    images = {label: [Image.open(path).filter(ImageFilter.GaussianBlur(4)) for path in real_images(label, "train")] for label in LABELS}
    return write_samples(tmp_path_factory.mktemp("samples"), images)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("feature_cache")


def flags_of(output_dir: Path, samples: Path, classifier: Path, cache: Path) -> list:
    flags = {"synthetic": samples, "real_csv": real_csv(), "features": classifier, "feature_cache_dir": cache, "output_dir": output_dir}
    return [f"--{name}={value}" for name, value in flags.items()] + ["--num_subsamples=3"]


def run(output_dir: Path, samples: Path, classifier: Path, cache: Path, *more) -> dict:
    """Evaluates in this process; what comes later in `more` wins."""
    evaluation.main(evaluation.parse_args([*flags_of(output_dir, samples, classifier, cache), *map(str, more)]))
    return json.loads((output_dir / "generation_metrics.json").read_text())


def value(summary: dict, metric: str, label: str = "all", key: str = "value"):
    return next(row[key] for row in summary["results"] if (row["metric"], row["label"]) == (metric, label))


def correlated(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    return (generator.standard_normal((n, d)) @ mixing + shift).astype(np.float32)


def sample_of(features: np.ndarray, images_per_patient: int = 1) -> "evaluation.Sample":
    return evaluation.Sample(features, np.array([f"p{i // images_per_patient}" for i in range(len(features))]))


# ----------------------------------------------------------------------------------------------------------------------
# FID
# ----------------------------------------------------------------------------------------------------------------------


def test_fid_is_that_of_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    one, two = correlated(3000, 1024, 1), correlated(3000, 1024, 2, 0.05)
    features = torch.nn.Identity()
    features.num_features = 1024
    metric = FrechetInceptionDistance(feature=features)
    metric.update(torch.from_numpy(one).double(), real=True)
    metric.update(torch.from_numpy(two).double(), real=False)
    assert evaluation.fid(one, two) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_of_gaussians_with_known_moments():
    mean, scale1, scale2 = np.arange(6) / 3, np.arange(1, 7.0), np.arange(6, 0, -1.0)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]
    exact = np.square(mean).sum() + np.square(scale1 - scale2).sum()
    cov1, cov2 = turn * scale1**2 @ turn.T, turn * scale2**2 @ turn.T
    assert evaluation.frechet_distance(np.zeros(6), cov1, mean, cov2) == pytest.approx(exact, rel=1e-9)
    # Covariances that do not commute: tr (S1 S2)^½ from the eigenvalues of the product itself.
    other = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    cov3 = other * scale2**2 @ other.T
    trace = np.sqrt(np.linalg.eigvals(cov1 @ cov3).real).sum()
    assert evaluation.frechet_distance(np.zeros(6), cov1, mean, cov3) == pytest.approx(
        np.square(mean).sum() + np.trace(cov1 + cov3) - 2 * trace, rel=1e-9
    )
    generator = np.random.default_rng(2)
    errors = []
    for n in (1000, 100_000):
        one = generator.standard_normal((n, 6)) * scale1 @ turn.T
        two = generator.standard_normal((n, 6)) * scale2 @ turn.T + mean
        errors.append(abs(evaluation.fid(one, two) / exact - 1))
    assert errors[1] < 0.01 and errors[1] < errors[0] + 0.01


@pytest.mark.parametrize("n", [10, 63, 64, 65, 300])
def test_fid_of_a_set_with_itself_and_of_few_images(n):
    one, two = 5 * correlated(n, 64, 1), 5 * correlated(n + 3, 64, 2)
    assert 0 <= evaluation.fid(one, one) < 1e-3 and 0 <= evaluation.fid(one, one[::-1]) < 1e-3
    assert evaluation.fid(one, two) > 0
    # The short form for few images is the same number; singular covariances cost the long one digits.
    assert evaluation.fid(one, two) == pytest.approx(
        evaluation.frechet_distance(*evaluation.moments(one), *evaluation.moments(two)), rel=1e-5
    )


def test_fid_is_never_negative():
    for seed in range(20):
        one = correlated(8, 32, seed)
        one[:, 5:] = 0
        assert evaluation.fid(one, one + 1e-9) >= 0
        assert evaluation.frechet_distance(*evaluation.moments(one), *evaluation.moments(one)) >= 0


def test_fid_at_infinity_takes_the_bias_away():
    """Two samples of one distribution: FID is all bias, which falls as 1/n."""
    args = evaluation.parse_args(["--synthetic=x", f"--real_csv={__file__}", "--num_subsamples=4"])
    real, other = (sample_of(correlated(2000, 32, seed)) for seed in (1, 2))
    rows, curve = evaluation.fid_rows(real, other, "all", 1000, 500, evaluation.real_floors(real, 1000, 500, args), args)
    found = {row["metric"]: row for row in rows}
    assert found["fid"]["value"] == pytest.approx(evaluation.fid(real.features, other.features))
    assert found["fid_half_n"]["value"] == pytest.approx(2 * found["fid"]["value"], rel=0.2)
    assert found["fid_common_n"]["value"] == pytest.approx(4 * found["fid"]["value"], rel=0.25)
    assert found["fid_half_n"]["floor"] == pytest.approx(found["fid_half_n"]["value"], rel=0.25)
    assert abs(found["fid_infinity"]["value"]) < 0.25 * found["fid"]["value"]
    assert found["fid_infinity"]["low"] < 0.1 * found["fid"]["value"] and len(set(curve["sizes"])) >= 5
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_subsets_are_without_replacement_and_by_patient(monkeypatch):
    sample = sample_of(np.arange(60.0)[:, None], images_per_patient=3)
    order = evaluation.draw(sample.patients, 0, "x")
    assert sorted(order) == list(range(60)) and not np.array_equal(order, evaluation.draw(sample.patients, 1, "x"))
    assert all(len(set(sample.patients[order[i : i + 3]])) == 1 for i in range(0, 60, 3))
    for seed in range(5):
        one, two = evaluation.split_halves(sample.patients, seed)
        assert not set(sample.patients[one]) & set(sample.patients[two]) and len(one) + len(two) == 60 and abs(len(one) - len(two)) <= 3
    seen = []
    monkeypatch.setattr(evaluation, "fid", lambda one, two: seen.append((one, two)) or 0.0)
    evaluation.fid_series(sample, sample, [30, 20], 0, 3)
    assert len(seen) == 6 and all(len(np.unique(own)) == len(own) for pair in seen for own in pair)


# ----------------------------------------------------------------------------------------------------------------------
# The other figures
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [40, 300])
def test_vendi_is_that_of_vendi_score(n):
    from vendi_score.vendi import score_dual

    features = np.abs(correlated(n, 64, 1)).astype(np.float64)
    expected = [score_dual(features, q=q) for q in (1, 2)]
    assert evaluation.vendi_scores(features.astype(np.float32)) == pytest.approx(expected, rel=1e-6)
    assert evaluation.vendi_scores(np.eye(7, dtype=np.float32)) == pytest.approx([7, 7])
    features[3] = 0
    with pytest.raises(ValueError, match="zeros"):
        evaluation.vendi_scores(features)


def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    one, two = correlated(90, 48, 1), correlated(90, 48, 2, 0.3)
    expected = float(poly_mmd(torch.from_numpy(one).double(), torch.from_numpy(two).double()))
    # Subsets of the whole size are the whole set.
    assert evaluation.kid(one, two, 90, 0) == pytest.approx(np.full(100, expected))
    parts = evaluation.kid(one, two, 30, 0)
    assert parts.mean() == pytest.approx(expected, abs=4 * parts.std() / 10) and parts.std() > 0
    assert abs(evaluation.kid(one, correlated(90, 48, 3), 30, 0).mean()) < expected / 5


def test_prdc_is_its_formulas_written_out(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    real, other, k = correlated(60, 5, 1).astype(np.float64), correlated(50, 5, 2, 0.4).astype(np.float64), 5

    def distance(x, y):
        return np.sqrt(np.square(x - y).sum())

    radius_real = [sorted(distance(x, y) for j, y in enumerate(real) if i != j)[k - 1] for i, x in enumerate(real)]
    radius_other = [sorted(distance(x, y) for j, y in enumerate(other) if i != j)[k - 1] for i, x in enumerate(other)]
    expected = {
        "precision": np.mean([any(distance(y, x) < r for x, r in zip(real, radius_real)) for y in other]),
        "recall": np.mean([any(distance(y, x) < r for y, r in zip(other, radius_other)) for x in real]),
        "density": sum(distance(y, x) < r for y in other for x, r in zip(real, radius_real)) / (k * len(other)),
        "coverage": np.mean([any(distance(y, x) < r for y in other) for x, r in zip(real, radius_real)]),
    }
    assert 0.05 < min(expected.values()) and expected["precision"] < 1
    assert {name: values.mean() for name, values in evaluation.prdc(real, other).items()} == pytest.approx(expected)


def test_memory_does_not_grow_with_the_number_of_pairs():
    real, other = correlated(6000, 8, 1), correlated(6000, 8, 2)
    tracemalloc.start()
    evaluation.prdc(real, other)
    evaluation.nearest(real, other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # One matrix of all pairs has 288 MB in float64.
    assert peak < 120e6


def test_intervals_and_auroc_are_the_textbooks():
    from scipy import stats
    from sklearn.metrics import roc_auc_score

    for hits, n in ((0, 12), (7, 30), (40, 40)):
        expected = stats.binomtest(hits, n).proportion_ci(0.95, "wilson")
        assert evaluation.wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    generator = np.random.default_rng(0)
    positive, negative = np.round(generator.random(50) + 0.2, 1), np.round(generator.random(70), 1)
    row = evaluation.auroc_row("a", positive, negative, "x")
    assert row["value"] == pytest.approx(roc_auc_score([1] * 50 + [0] * 70, np.concatenate([positive, negative])))
    assert row["low"] < row["value"] < row["high"] and row["n"] == 50
    # Newcombe (1998), table II, example (a): 56/70 against 48/80, 0.2 (0.0524 to 0.3339).
    row = evaluation.margin_row("m", np.arange(70) < 56, np.arange(80) < 48, "x")
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    row = evaluation.percentile_row("p", np.arange(1000.0), 0.99)
    assert row["value"] == pytest.approx(989, abs=1) and 980 <= row["low"] <= 986 and 993 <= row["high"] <= 998


def test_class_consistency_on_heads_that_are_known():
    """Four prompts for Edema, four for No Finding, one that names two findings and is no prompt for either alone."""
    table = pd.DataFrame(
        {"Edema": [1, 1, 1, 1, 0, 0, 0, 0, 1], "No Finding": [0, 0, 0, 0, 1, 1, 1, 1, 0], "Cardiomegaly": [0] * 8 + [1]}
    ).astype(float)
    heads = np.zeros((9, 3), np.float32)
    heads[:, 0] = [0.9, 0.8, 0.45, 0.1, 0.7, 0.2, 0.2, 0.2, 0.9]
    heads[:, 2] = [0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9, 0.1, 0.1]

    class Network(evaluation.ClassifierNetwork):
        labels, thresholds = ["Edema", "Cardiomegaly", "No Finding"], {"Edema": 0.4, "Cardiomegaly": 0.5, "No Finding": None}

        def __init__(self):
            pass

    rows_of = {label: np.flatnonzero(table[label] == 1) for label in ("Edema", "No Finding")}
    source = evaluation.Source("synthetic", table, rows_of, np.arange(9), probabilities=heads)
    rows = evaluation.consistency_rows(source, ["Edema", "No Finding"], Network(), "ignore", {("class_consistency", "Edema"): 0.7})
    found = {(row["metric"], row["label"]): row["value"] for row in rows}
    assert found["class_consistency", "Edema"] == 0.5 and found["class_consistency_youden", "Edema"] == 0.75
    assert found["class_consistency", "No Finding"] == 0.75 and found["class_consistency_alone", "No Finding"] == 0.5
    assert found["class_consistency_youden", "No Finding"] is None
    assert found["fires", "Edema -> No Finding"] == 0.25 and found["fires", "No Finding -> Edema"] == 0.25
    assert found["class_consistency_margin", "Edema"] == 0.25
    assert found["class_consistency_auroc", "Edema"] == pytest.approx(11 / 16)
    assert rows[0]["floor"] == 0.7 and rows[0]["n"] == 4
    # The mean of the labels, its interval that of two independent shares.
    one, two, mean = (next(r for r in rows if (r["metric"], r["label"]) == ("class_consistency", label)) for label in ("Edema", "No Finding", "all"))
    assert mean["value"] == 0.625 and mean["n"] == 8
    assert mean["value"] - mean["low"] == pytest.approx(np.hypot(one["value"] - one["low"], two["value"] - two["low"]) / 2)
    # A label without a threshold is not in the mean.
    assert found["class_consistency_youden", "all"] == 0.75 and ("class_consistency_alone", "all") not in found


@pytest.fixture(scope="module")
def film() -> np.ndarray:
    """Decoded radiographs, real ones where they are on this machine."""
    csv = REAL_CSV if REAL_CSV.is_file() else real_csv()
    table = evaluation.load_image_table(str(csv))
    return [evaluation.load_image(path, 512, "squash") for path in table["image"][:6]]


def test_pixels_are_those_of_torchxrayvision(film):
    for rgb in film:
        gray = np.asarray(Image.fromarray(rgb).convert("L"), np.float32)
        assert np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(gray, rgb[..., 0])
        expected = evaluation.xrv.datasets.XRayResizer(224)(gray[None])
        assert np.array_equal(evaluation.xrv_pixels(rgb), evaluation.xrv.utils.normalize(expected, 255))
        pixels = evaluation.xrv_pixels(rgb)
        assert pixels.shape == (1, 224, 224) and pixels.dtype == np.float32 and -1024 <= pixels.min() < -255 and 255 < pixels.max() <= 1024


def test_features_are_those_of_torchxrayvision(film, xrv_file, tmp_path):
    network = evaluation.XRVNetwork(evaluation.load_xrv(str(xrv_file)), torch.device("cpu"))
    model = evaluation.xrv.models.DenseNet(weights=None)
    weights = load_file(xrv_file)
    operating = weights.pop("op_threshs")
    model.load_state_dict(weights)
    model.eval()
    pixels = torch.from_numpy(np.stack([network.prepare(rgb) for rgb in film[:3]]))
    found = network.compute([network.prepare(rgb) for rgb in film[:3]])
    with torch.no_grad():
        assert np.array_equal(found["features"], model.features2(pixels).numpy()) and found["features"].shape == (3, 1024)
        probabilities = torch.sigmoid(model(pixels)).numpy()
        model.op_threshs = operating
        # With operating thresholds the network's own output is none.
        assert not np.allclose(model(pixels).numpy(), probabilities)
    heads = [model.targets.index(evaluation.XRV_NAMES.get(label, label)) for label in network.labels]
    assert np.array_equal(found["probabilities"], probabilities[:, heads])
    assert "No Finding" not in network.labels and set(evaluation.CONDITIONS) - set(network.labels) == {"No Finding"}
    assert network.thresholds["Edema"] == pytest.approx(0.2)
    save_file(load_file(xrv_file) | {"op_threshs": torch.full((18,), torch.inf)}, tmp_path / "endless.safetensors")
    assert set(evaluation.XRVNetwork(evaluation.load_xrv(str(tmp_path / "endless.safetensors")), torch.device("cpu")).thresholds.values()) == {None}


# ----------------------------------------------------------------------------------------------------------------------
# The whole
# ----------------------------------------------------------------------------------------------------------------------


def test_everything_is_written_and_the_same_every_time(tmp_path, samples, classifier, cache, monkeypatch, capsys):
    more = ["--train_csv", real_csv(), "--baseline", samples, "--vae", BASE]
    summary = run(tmp_path / "one", samples, classifier, cache, *more)
    assert all((tmp_path / "one" / name).is_file() for name in FILES)
    assert all(np.asarray(Image.open(tmp_path / "one" / name).convert("RGB")).std() > 10 for name in FILES[2:])
    rows = summary["results"]
    assert all(set(row) == {"metric", "label", "value", "low", "high", "n", "floor", "note"} for row in rows)
    assert len({(row["metric"], row["label"]) for row in rows}) == len(rows)
    assert all(row["value"] is not None or row["note"] for row in rows)
    for suffix in ("", "_baseline", "_vae"):
        for label in ("all", *LABELS):
            assert value(summary, f"fid{suffix}", label) > 0 and value(summary, f"vendi{suffix}", label) >= 1
    # The baseline is the same folder here.
    assert value(summary, "fid") == value(summary, "fid_baseline")
    gain = next(row for row in summary["results"] if row["metric"] == "fid_gain")
    assert (gain["value"], gain["low"], gain["high"]) == (0, 0, 0)
    for metric in ("fid_half_n", "kid", "precision", "recall", "density", "coverage", "vendi", "colour_mean", "memorisation_nearer_train"):
        assert value(summary, metric, key="floor") is not None and value(summary, metric, key="n") > 0, metric
    assert len({value(summary, "fid_common_n", label, "n") for label in ("all", *LABELS)}) == 1
    assert {f"{i} -> {j}" for i in LABELS for j in LABELS} == {row["label"] for row in rows if row["metric"] == "fires_real"}
    text = (tmp_path / "one" / "generation_metrics.md").read_text()
    assert "| images | n | FID | Vendi | Ed | Nf |" in text and "< 1,024]" in text and "fewer synthetic images than the 5,000" in text

    # Again: nothing is computed, and the same bytes come out.
    first = (tmp_path / "one" / "generation_metrics.json").read_bytes()
    assert ", 0 not in the cache" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.ClassifierNetwork, "compute", lambda *args: pytest.fail("computed again"))
        # The black image is the loader's own trial.
        patch.setattr(evaluation.ThroughVAE, "__call__", lambda self, rgb: pytest.fail("computed again") if rgb.any() else rgb)
        run(tmp_path / "one", samples, classifier, cache, *more)
    assert ", 0 not in the cache" in capsys.readouterr().out
    assert (tmp_path / "one" / "generation_metrics.json").read_bytes() == first
    # From nothing: the same bytes but for the cache's name.
    run(tmp_path / "one", samples, classifier, tmp_path / "fresh", *more)
    assert (tmp_path / "one" / "generation_metrics.json").read_text() == first.decode().replace(str(cache), str(tmp_path / "fresh"))
    assert not list(tmp_path.rglob("*.part"))


def test_two_processes_say_the_same(tmp_path, samples, classifier, cache):
    one = run(tmp_path / "one", samples, classifier, cache)
    done = launch(ROOT / "eval_generation.py", *flags_of(tmp_path / "two", samples, classifier, tmp_path / "cache"), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "generation_metrics.json").read_text())
    assert len(two["results"]) == len(one["results"])
    for a, b in zip(one["results"], two["results"]):
        assert (a["metric"], a["label"], a["n"]) == (b["metric"], b["label"], b["n"])
        assert a["value"] is b["value"] is None or a["value"] == pytest.approx(b["value"], rel=1e-3, abs=1e-6), a["metric"]


def test_the_gain_over_the_base_model_has_the_interval_of_the_difference():
    """Sets that began from the same noise vary together, so a gain shows that the two FIDs' intervals would hide."""
    generator = np.random.default_rng(0)
    args = evaluation.parse_args(["--synthetic=none", f"--real_csv={__file__}", "--num_subsamples=20"])
    names = np.array([f"{i:03d}.png" for i in range(300)])
    real = evaluation.Sample(generator.standard_normal((300, 4)).astype(np.float32), names)
    # Few of the images are far away, which are in a subset or not.
    noise = (generator.standard_normal((300, 4)) * np.where(np.arange(300) % 60 == 0, 30, 1)[:, None]).astype(np.float32)
    base, better = (evaluation.Sample(noise + shift, names) for shift in (np.float32(1.5), np.float32(0.5)))
    row = evaluation.gain_row(real, better, base, args)
    assert row["value"] == pytest.approx(evaluation.fid(real.features, base.features) - evaluation.fid(real.features, better.features))
    fids = {name: evaluation.fid_rows(real, sample, "all", 150, 150, None, args)[0][0] for name, sample in (("base", base), ("better", better))}
    assert fids["better"]["high"] > fids["base"]["low"] and 0 < row["low"] < row["value"] < row["high"]
    reverse = evaluation.gain_row(real, base, better, args)
    assert reverse["value"] == pytest.approx(-row["value"]) and reverse["high"] < 0
    assert evaluation.gain_row(real, better, evaluation.Sample(base.features[:3], names[:3]), args)["value"] is None


@pytest.mark.parametrize("uncertain", ["ignore", "ones"])
def test_memorisation_looks_at_the_images_that_were_trained_on(uncertain):
    flags = [f"--uncertain={uncertain}", "--split_seed=3", "--max_train_samples=25"]
    args = train_full.parse_args(["--train_unet", f"--data_csv={real_csv()}", *flags])
    table = evaluation.load_training_images(evaluation.parse_args(["--synthetic=none", f"--real_csv={__file__}", f"--train_csv={real_csv()}", *flags]))
    assert list(table["image"]) == list(train_full.load_training_data(args).train["image"]) and len(table) == 25


def labelled(edema: int, both: int, cardiomegaly: int) -> pd.DataFrame:
    rows = [(1.0, 0.0)] * edema + [(1.0, 1.0)] * both + [(0.0, 1.0)] * cardiomegaly
    names = [f"{i}.png" for i in range(len(rows))]
    return pd.DataFrame(rows, columns=["Edema", "Cardiomegaly"]).assign(name=names, patient=names)


@pytest.mark.parametrize("pool", ["unique", "paper"])
def test_overall_both_sides_have_the_same_mixture_of_labels(pool):
    """As many images of a label as the side with fewer has; the paper counts an image of two findings once for each."""
    labels = ["Edema", "Cardiomegaly"]
    args = evaluation.parse_args(["--synthetic=none", f"--real_csv={__file__}", f"--pool={pool}"])
    matched = {"Edema": 20, "Cardiomegaly": 60}
    real = evaluation.select_source("real", labelled(30, 10, 50), labels, matched, args)
    synthetic = evaluation.select_source("synthetic", labelled(20, 0, 200), labels, matched, args)
    assert [int(synthetic.table[label].to_numpy()[synthetic.pool].sum()) for label in labels] == [20, 60]
    assert {label: len(rows) for label, rows in real.rows_of.items()} == {"Edema": 40, "Cardiomegaly": 60}
    assert len(synthetic.rows_of["Cardiomegaly"]) == 200
    if pool == "paper":
        assert len(real.pool) == 80 > len(np.unique(real.pool))
    else:
        assert len(real.pool) == len(np.unique(real.pool)) < 80


def test_the_plan_matches_the_labels_and_counts_uncertain_findings_if_asked(tmp_path, samples, classifier, cache):
    flags = ["--real_split=all", "--labels", "Edema", "Cardiomegaly"]
    unique = run(tmp_path / "unique", samples, classifier, cache, *flags)["images"]
    # No generated image shows the second label.
    assert unique["real"]["all"] == unique["synthetic"]["all"] == unique["synthetic"]["Edema"] < unique["real"]["Edema"]
    unique = unique["real"]
    ones = run(tmp_path / "ones", samples, classifier, cache, *flags, "--uncertain=ones")["images"]["real"]
    assert ones["Edema"] > unique["Edema"]
    few = run(tmp_path / "few", samples, classifier, cache, *flags, "--max_per_label=5")
    assert few["images"]["real"]["Edema"] == 5 and value(few, "fid", "Edema", "n") == 5
    # A label without generated images is not left out.
    assert value(few, "fid", "Cardiomegaly") is None and value(few, "class_consistency", "Cardiomegaly") is None


def test_tinted_blurred_and_copied_images_are_caught(tmp_path, classifier, cache):
    """Other patients' images do well; a tint, a blur and copies of training images are each found by their own figure."""
    train = {label: real_images(label, "train") for label in LABELS}
    unseen = {label: real_images(label, "val") + real_images(label, "test") for label in LABELS}

    def tint(image):
        pixels = np.asarray(image.convert("RGB"), float) + np.array([12, 0, -12])
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    folders = {
        "copies": {label: [Image.open(path) for path in paths] for label, paths in train.items()},
        "tinted": {label: [tint(Image.open(path)) for path in paths] for label, paths in unseen.items()},
        "blurred": {label: [Image.open(path).filter(ImageFilter.GaussianBlur(6)) for path in paths] for label, paths in unseen.items()},
        "other": {label: [Image.open(path) for path in paths] for label, paths in unseen.items()},
    }
    # All findings, so that the real images are at least as many as the training images.
    flags = [
        "--train_csv",
        real_csv(),
        "--labels",
        *(label for label in evaluation.LABELS if label not in ("Lung Lesion", "Pleural Other")),
    ]
    found = {
        name: run(tmp_path / name, write_samples(tmp_path / "s" / name, images), classifier, cache, *flags)
        for name, images in folders.items()
    }
    assert value(found["copies"], "memorisation_nearer_train") == value(found["copies"], "memorisation_nearer_train_pixels") == 1
    assert value(found["copies"], "memorisation_p99") > 0.9999 and value(found["copies"], "memorisation_suspects") == 1
    assert value(found["copies"], "memorisation_suspects_pixels") == 1 and value(found["other"], "memorisation_suspects_pixels") < 0.1
    assert value(found["tinted"], "colour_visible") > 0.99 and value(found["other"], "colour_visible") == 0
    assert value(found["tinted"], "colour_mean", key="low") > 5 > value(found["tinted"], "colour_mean", key="floor") == 0
    for label in LABELS:
        assert value(found["blurred"], "fid", label) > 2 * value(found["other"], "fid", label)
        assert value(found["blurred"], "coverage", label) < value(found["other"], "coverage", label)


@pytest.mark.skipif(not REAL_CSV.is_file(), reason="the real radiographs are not on this machine")
def test_real_images_of_two_findings_are_further_apart_than_two_halves(tmp_path, xrv_file):
    """Even random weights tell Pneumonia from No Finding better than one half of the patients from the other."""
    table = evaluation.load_image_table(str(REAL_CSV))
    network = evaluation.XRVNetwork(evaluation.load_xrv(str(xrv_file)), torch.device("cpu"))
    rows = np.concatenate([np.flatnonzero(table[label] == 1)[:40] for label in ("Pneumonia", "No Finding")])
    prepared = [network.prepare(evaluation.load_image(path, 512, "squash")) for path in table["image"].iloc[rows]]
    features = np.concatenate([network.compute(prepared[i : i + 20])["features"] for i in range(0, 80, 20)])
    sick, healthy = features[:40], features[40:]
    patients = table["patient"].to_numpy()[rows][:40]
    floors = [evaluation.fid(sick[one], sick[two]) for one, two in (evaluation.split_halves(patients, seed) for seed in range(5))]
    assert evaluation.fid(sick[:20], healthy[:20]) > 1.5 * np.mean(floors)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path, samples, classifier, cache, capsys):
    def check(words: str, *flags) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "refused", samples, classifier, cache, *flags)
        # Progress bars go to stderr too, and end or clear their lines.
        error = capsys.readouterr().err.split("\r")[-1].strip().splitlines()[-1]
        assert ended.value.code == 2 and words in error, error
        assert not list((tmp_path / "refused").glob("generation_metrics*"))
        return error

    return check


def test_bad_flags_and_tables(tmp_path, samples, refused):
    refused("no such file", "--real_csv=absent.csv")
    refused("no such file", "--train_csv=absent.csv")
    refused("'Oedema' is none of", "--labels", "Oedema")
    refused("--labels names a finding twice", "--labels", "Edema", "Edema")
    refused("--image_root absent: no such folder", "--image_root=absent")
    for flag in ("real_csv", "train_csv", "features", "image_root"):
        refused(f"--{flag}", f"--{flag}={'x' * 5000}")
    refused("no metadata.csv in it", f"--synthetic={tmp_path}")
    refused("no such folder or CSV", "--synthetic=absent")
    refused("--baseline absent: no metadata.csv", "--baseline=absent")
    refused("neither xrv, nor a safetensors file", "--features=absent.safetensors")
    refused("no VAE can be loaded", f"--vae={tmp_path}")
    refused("none of them has any of", "--labels", "Fracture")
    (tmp_path / "laterals.csv").write_text("Path,Frontal/Lateral,Edema\na.jpg,Lateral,1\n")
    refused("no frontal row", f"--real_csv={tmp_path / 'laterals.csv'}")
    (tmp_path / "file").write_text("")
    refused("cannot be written", f"--output_dir={tmp_path / 'file' / 'e'}")
    with zipfile.ZipFile(tmp_path / "table.zip", "w") as file:
        file.write(samples / "metadata.csv", "metadata.csv")
    refused("table.zip", f"--synthetic={tmp_path / 'table.zip'}")
    assert not (tmp_path / "refused").exists()


def test_tables_of_other_geometry(tmp_path, samples, classifier, cache, refused):
    images = {"Edema": [Image.new("L", (64, 64), level) for level in range(0, 250, 12)]}
    padded = write_samples(tmp_path / "padded", images, resize_mode="pad")
    refused("different resize_mode are not compared", f"--baseline={padded}")
    refused("different resize_mode are not compared", f"--resize_mode={'crop'}")
    refused("different resolution are not compared", "--resolution=128")
    summary = run(tmp_path / "e", samples, classifier, cache, f"--baseline={padded}", "--mixed_geometry")
    assert summary["resize_mode"] == "squash" and any("in spite of different resize_mode" in note for note in summary["warnings"])
    refused("the classifier saw images made with --resize_mode squash", f"--synthetic={padded}")


@pytest.mark.parametrize("column, text", [("resolution", "0"), ("resolution", "²"), ("resolution", "-64"), ("resolution", "9" * 5000), ("resize_mode", "evil")])
def test_a_geometry_that_is_none_is_refused(column, text, tmp_path, samples, refused):
    shutil.copytree(samples, tmp_path / "s")
    pd.read_csv(samples / "metadata.csv", dtype=str).assign(**{column: text}).to_csv(tmp_path / "s" / "metadata.csv", index=False)
    refused(f"{tmp_path / 's' / 'metadata.csv'}: the {column} {text[:300]!r}"[:200], f"--synthetic={tmp_path / 's'}")
    # Of two tables, the one that says it is named.
    pd.read_csv(samples / "metadata.csv", dtype=str).drop(columns=column).to_csv(tmp_path / "plain.csv", index=False)
    shutil.copytree(samples, tmp_path / "plain")
    (tmp_path / "plain.csv").replace(tmp_path / "plain" / "metadata.csv")
    refused(f"{tmp_path / 's' / 'metadata.csv'}: the {column} ", f"--synthetic={tmp_path / 'plain'}", f"--baseline={tmp_path / 's'}")


def test_what_a_table_says_cannot_break_the_report(tmp_path, samples, classifier, cache, capsys):
    evil = "a|b\n| c | <script>[x](y)</script> `d`\x1b[2J"
    for name in ("base", "odd | <b>name"):
        shutil.copytree(samples, tmp_path / name)
    pd.read_csv(samples / "metadata.csv").assign(resize_mode=evil).to_csv(tmp_path / "base" / "metadata.csv", index=False)
    summary = run(tmp_path / "e", tmp_path / "odd | <b>name", classifier, cache, f"--baseline={tmp_path / 'base'}", "--mixed_geometry")
    # As it was found in the JSON, whose own rules quote it.
    assert any(evil in note for note in summary["warnings"]) and summary["name"] == "odd | <b>name"
    shown, text = capsys.readouterr().out, (tmp_path / "e" / "generation_metrics.md").read_text()
    assert "\x1b" not in text + shown and len([line for line in shown.splitlines() if line.startswith("  warning  ")]) == len(summary["warnings"])
    bare = re.sub(r"\\.", "", text)
    assert not set("<>`") & set(bare.replace(" < 1,024]", "")) and "](" not in bare
    cells = [line.count("|") for line in bare.splitlines() if line.startswith("|") and "odd" in line]
    assert cells == [2 + 5, 2 + 5, 5] and len([line for line in text.splitlines() if "- **Warning:**" in line]) == len(summary["warnings"])


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "16-bit", "float", "pipe"])
def test_bad_images(kind, tmp_path, samples, refused):
    folder = tmp_path / "samples"
    shutil.copytree(samples, folder)
    name = pd.read_csv(folder / "metadata.csv")["file_name"][3]
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    if kind == "text":
        path.write_text("no image")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "16-bit":
        Image.fromarray(np.zeros((64, 64), np.uint16)).save(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "float":
        Image.fromarray(np.zeros((64, 64), np.float32)).save(path, format="TIFF")
    refused(name, f"--synthetic={folder}")
    assert not (tmp_path / "refused").exists()


def test_every_bad_image_is_told_or_skipped_and_counted(tmp_path, samples, classifier, cache, refused, capsys):
    folder = tmp_path / "samples"
    shutil.copytree(samples, folder)
    table = pd.read_csv(folder / "metadata.csv")
    names = list(table["file_name"][[0, 2, 5, 7]])
    for name in names[:2]:
        (folder / name).unlink()
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:200])
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / names[3])
    # A name that no file can have.
    names.append("nul\0byte.png")
    pd.concat([table, table.iloc[[0]].assign(file_name=names[-1])]).to_csv(folder / "metadata.csv", index=False)
    told = [name.replace("\0", " ") for name in names]
    error = refused(": error: 5 of ", f"--synthetic={folder}")
    assert all(name in error for name in told) and "no such file" in error and "pixels of type I;16" in error and not (tmp_path / "refused").exists()
    summary = run(tmp_path / "e", folder, classifier, cache, "--on_bad_image=skip", f"--baseline={samples}")
    assert summary["unreadable"] == {"synthetic": 5}
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  skipped  ")]
    assert len(skipped) == 5 and all(sum(name in line for line in skipped) == 1 for name in names[:4])
    counts = [sum(summary["images"][source][label] for label in LABELS) for source in ("base model", "synthetic")]
    assert counts == [len(table), len(table) - 4]
    # The same on every process, and told once by all of them.
    done = launch(ROOT / "eval_generation.py", *flags_of(tmp_path / "two", folder, classifier, cache), "--on_bad_image=skip", processes=2)
    assert done.returncode == 0 and done.stdout.count("  skipped  ") == 5, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "generation_metrics.json").read_text())
    assert two["unreadable"] == {"synthetic": 5} and two["images"]["synthetic"] == summary["images"]["synthetic"]


def full_disk(monkeypatch, ending: str) -> None:
    def full(source, target, replace=os.replace):
        if str(target).endswith(ending):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize("ending", [".safetensors", "consistency.png", "generation_metrics.json"])
def test_a_full_disk_ends_in_a_sentence_and_the_next_start_goes_on(ending, tmp_path, samples, classifier, refused, monkeypatch):
    more = ["--max_per_label=4", f"--feature_cache_dir={tmp_path / 'cache'}"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        full_disk(patch, ending)
        run(tmp_path / "e", samples, classifier, tmp_path / "cache", *more)
    assert ended.value.code == 2 and not (tmp_path / "e" / "generation_metrics.json").exists()
    assert not list((tmp_path / "cache").rglob("*.part"))
    kept = [path.read_bytes() for path in sorted((tmp_path / "cache").rglob("*.safetensors"))]
    assert bool(kept) == (ending != ".safetensors")
    run(tmp_path / "e", samples, classifier, tmp_path / "cache", *more)
    assert not list(tmp_path.rglob("*.part"))
    with monkeypatch.context() as patch:
        full_disk(patch, ".safetensors")
        refused("No space left on device", *more, f"--feature_cache_dir={tmp_path / 'other'}")


def test_a_damaged_feature_cache_is_computed_again(tmp_path, samples, classifier, capsys):
    first = run(tmp_path / "e", samples, classifier, tmp_path / "cache", "--max_per_label=4")
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    for path in files:
        content = bytearray(path.read_bytes())
        # In the last number of the last array, where nothing but its value shows it.
        content[-3] ^= 1
        path.write_bytes(content)
    capsys.readouterr()
    assert run(tmp_path / "e", samples, classifier, tmp_path / "cache", "--max_per_label=4") == first
    assert f"passed over  {len(files)} files" in capsys.readouterr().out
    # They were written anew.
    run(tmp_path / "e", samples, classifier, tmp_path / "cache", "--max_per_label=4")
    shown = capsys.readouterr().out
    assert "passed over" not in shown and ", 0 not in the cache" in shown


def named(folder: Path, content: bytes) -> Path:
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "other network's", "text", "wrong types", "other arrays", "folder"])
def test_a_file_of_features_that_is_not_as_it_was_written_is_passed_over(damage, tmp_path, capsys):
    keys = [hashlib.sha256(bytes([i])).hexdigest() for i in range(4)]
    arrays = {"features": np.arange(8, dtype=np.float32).reshape(2, 4)}
    store = evaluation.FeatureStore(tmp_path, "network")
    store.add(keys[:2], arrays)
    store.add(keys[2:], {"features": arrays["features"] + 1})
    store.read()
    path = store.where[keys[0]][0]
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-4])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "other network's":
        shutil.copy(store.where[keys[2]][0], path)
    else:
        path.unlink()
        header = json.dumps({"hashes": {"dtype": 7, "shape": "two", "data_offsets": None}}).encode()
        forged = {"text": b"{}", "wrong types": len(header).to_bytes(8, "little") + header, "other arrays": evaluation.save({"a": np.zeros(3)})}
        if damage in forged:
            path = named(store.folder, forged[damage])
        else:
            path = store.folder / "a.safetensors"
            path.mkdir()
    again = evaluation.FeatureStore(tmp_path, "network")
    assert again.damaged == [path] and set(again.where) == set(keys[2:])
    with pytest.raises(SystemExit) as ended:
        again.get(keys, "features")
    assert ended.value.code == 2 and "damaged or taken away" in capsys.readouterr().err
    again.add(keys[:2], arrays)
    again.read()
    assert np.array_equal(again.get(keys, "features"), np.concatenate([arrays["features"], arrays["features"] + 1]))


@pytest.mark.parametrize("part", ["wrong form", "wrong values"])
def test_a_vae_whose_settings_are_wrong_is_refused(part, tmp_path, capsys):
    shutil.copytree(BASE, tmp_path / "base")
    path = tmp_path / "base" / "vae" / "config.json"
    whole = json.loads(path.read_text())
    changes = [{"block_out_channels": 7}, {"act_fn": "evil"}, {"norm_num_groups": 3}, {"out_channels": 1}, {"in_channels": "3"}, {"latent_channels": None}]
    for content in [[], None, 7, "text", {"a": 1}] if part == "wrong form" else [whole | change for change in changes]:
        path.write_text(json.dumps(content))
        with pytest.raises(SystemExit) as ended:
            evaluation.ThroughVAE(str(tmp_path / "base"), torch.device("cpu"))
        assert ended.value.code == 2 and "no VAE can be loaded from it" in capsys.readouterr().err, content


def test_networks_that_cannot_be_used(tmp_path, xrv_file, classifier, refused):
    dead = {name: torch.zeros_like(tensor) for name, tensor in load_file(xrv_file).items()}
    save_file(dead, tmp_path / "zero.safetensors")
    refused("its features are all zero or not finite", f"--features={tmp_path / 'zero.safetensors'}", "--max_per_label=2")
    # Weights that are numbers, whose sum over an image is none.
    dead["features.norm5.bias"] += 3e38
    save_file(dead, tmp_path / "endless.safetensors")
    refused("its features are all zero or not finite", f"--features={tmp_path / 'endless.safetensors'}", "--max_per_label=2")
    dead["features.conv0.weight"] += torch.nan
    save_file(dead, tmp_path / "nan.safetensors")
    refused("DenseNet-121 (weights that are not finite)", f"--features={tmp_path / 'nan.safetensors'}")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    refused("not a safetensors file of torchxrayvision's DenseNet-121", f"--features={tmp_path / 'other.safetensors'}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.pt")
    refused("not a safetensors file of torchxrayvision's DenseNet-121", f"--features={tmp_path / 'pickle.pt'}")
    for key in ("labels", "thresholds", "split", "real_test_auroc"):
        folder = tmp_path / f"without_{key}"
        shutil.copytree(classifier, folder)
        spec = json.loads((folder / "classifier.json").read_text())
        del spec[key]
        (folder / "classifier.json").write_text(json.dumps(spec))
        refused(f"{key!r} is missing or not as", f"--classifier={folder}")
    folder = tmp_path / "without_fingerprint"
    shutil.copytree(classifier, folder)
    spec = json.loads((folder / "classifier.json").read_text())
    del spec["split"]["fingerprint"]
    (folder / "classifier.json").write_text(json.dumps(spec | {"spec_sha256": evaluation.spec_digest(spec)}))
    refused("'split' is not as", f"--classifier={folder}")
    refused("classifier.json: cannot be read", f"--classifier={tmp_path}")


def test_what_a_reader_must_know_is_a_warning(tmp_path, samples, classifier, cache, capsys):
    """Patients of the classifier's training in the real test set are counted, and no row hides it."""
    table = evaluation.load_split(str(real_csv()), None, "test", 0)
    patients = list(table["patient"][evaluation.positives(table, "Edema", "ignore")].unique())[:3]
    folder = tmp_path / "classifier"
    shutil.copytree(classifier, folder)
    spec = json.loads((folder / "classifier.json").read_text())
    spec["split"]["patients"] = [evaluation.patient_hash(patient) for patient in patients]
    (folder / "classifier.json").write_text(json.dumps(spec))
    summary = run(tmp_path / "e", samples, classifier, cache, f"--classifier={folder}", "--train_csv", real_csv(), "--train_split=all")
    shown = capsys.readouterr().out
    for text in (shown, (tmp_path / "e" / "generation_metrics.md").read_text(), "\n".join(summary["warnings"])):
        assert "3 of the" in text and "were the classifier's to train on" in text
        assert "patients are in the training images and in the real images" in text
        assert "fewer synthetic images than the 5,000 asked for" in text
    assert value(summary, "memorisation_nearer_train") is None and "of a patient in --train_csv" in value(
        summary, "memorisation_nearer_train", key="note"
    )
    assert "below 1,024" in value(summary, "fid", key="note")


def test_a_table_of_prompts_alone_is_scored_as_one_set(tmp_path, samples, classifier, cache):
    folder = tmp_path / "samples"
    shutil.copytree(samples, folder)
    pd.read_csv(folder / "metadata.csv")[["file_name", "prompt"]].to_csv(folder / "metadata.csv", index=False)
    summary = run(tmp_path / "e", folder / "metadata.csv", classifier, cache, "--resolution=64")
    assert summary["name"] == "samples"
    # All but the counts of the real table, which has labels.
    scored = [row for row in summary["results"] if row["metric"] != "images_test"]
    assert {row["label"] for row in scored} == {"all"} and value(summary, "fid") > 0
    assert not (tmp_path / "e" / "consistency.png").exists() and "does not say its resize_mode" in " ".join(summary["warnings"])
