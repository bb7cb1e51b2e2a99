"""eval_generation.py: each figure against an independent reference, whole runs on phantoms, and everyday mistakes."""

import functools
import itertools
import json
import math
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from common import BASE, ROOT, change_weights, launch, phantoms
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file
from scipy import stats

import eval_generation as evaluation
import train_full

LABELS = ["Edema", "No Finding"]
real_csv = functools.partial(phantoms, 160)


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    """MS-SSIM takes most of the time of a small run."""
    monkeypatch.setattr(evaluation, "MAX_PAIRS", 8)


@torch.no_grad()
def set_batch_norms(model, inputs):
    """Without the statistics of some images, an untrained network returns nearly the same for every image."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    model.train()(inputs)
    model.eval()


def xrv_inputs(paths, side=64):
    """Return torchxrayvision's own inputs for gray images, (n, 1, 224, 224)."""
    images = [Image.open(path).convert("L").resize((side, side), Image.Resampling.LANCZOS) for path in paths]
    grays = [np.asarray(image) for image in images]
    resize = evaluation.xrv.datasets.XRayResizer(224)
    return np.stack([evaluation.xrv.utils.normalize(resize(gray.astype(np.float32)[None]), 255) for gray in grays])


@pytest.fixture(scope="session")
def xrv_file(tmp_path_factory):
    """torchxrayvision's DenseNet-121 with seeded random weights, as a user's converted file."""
    torch.manual_seed(0)
    model = evaluation.xrv.models.DenseNet(weights=None)
    set_batch_norms(model, torch.from_numpy(xrv_inputs(evaluation.load_image_table(str(real_csv()))["image"][:12])))
    path = tmp_path_factory.mktemp("xrv") / "xrv.safetensors"
    save_file(model.state_dict() | {"op_threshs": torch.full((18,), 0.2)}, path)
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A classifier folder of eval_downstream.py, small and untrained."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    labels, normalisation = ["Edema", "Cardiomegaly", "No Finding"], {"mean": [0.5] * 3, "std": [0.25] * 3}
    model = evaluation.build_classifier("resnet18", 3)
    paths = evaluation.load_split(str(real_csv()))["image"][:40]
    gray = np.stack([np.asarray(Image.open(path).convert("L").resize((32, 32))) for path in paths])[:, None]
    set_batch_norms(model, evaluation.classifier_inputs(torch.from_numpy(gray / np.float32(255)), normalisation))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    spec = {"arch": "resnet18", "labels": labels, "resolution": 32, "source_resolution": 64, "resize_mode": "squash"}
    spec |= {"normalisation": normalisation, "thresholds": dict.fromkeys(labels, 0.5), "train_on": "real"}
    spec |= {"split": {"seed": 0, "fingerprint": "0", "patients": []}}
    spec |= {"real_test_auroc": {label: {"value": 0.8, "low": 0.7, "high": 0.9} for label in labels}}
    (folder / "classifier.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """A folder of transformers with a small, untrained Dinov2 and its image processor."""
    folder = tmp_path_factory.mktemp("vision") / "dino"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    transformers.BitImageProcessor(**size, image_mean=[0.53] * 3, image_std=[0.26] * 3).save_pretrained(folder)
    return folder


def write_samples(folder, images, resize_mode="squash"):
    """Write a folder as sample.py leaves it, from images by label."""
    rows = []
    for label, own in images.items():
        (folder / label.replace(" ", "_")).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(own):
            name = f"{label.replace(' ', '_')}/{i:06d}.png"
            image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS).save(folder / name)
            marks = {column: float(column == label) for column in evaluation.LABELS}
            settings = {"seed": 0, "resolution": 64, "resize_mode": resize_mode}
            rows.append({"file_name": name, "prompt": label, "index": i, **marks, **settings})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


def real_images(*splits):
    """Return phantoms by label, those that show only one of LABELS."""
    table = pd.concat([evaluation.load_split(str(real_csv()), None, split, 0) for split in splits])
    table = table[(table[LABELS] == 1).sum(axis=1) == 1]
    return {label: [Image.open(path) for path in table["image"][table[label] == 1]] for label in LABELS}


def changed(images, change):
    return {label: [change(image) for image in own] for label, own in images.items()}


def blur(image, radius=4):
    return image.filter(ImageFilter.GaussianBlur(radius))


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """Blurred phantoms of the training patients in the place of generated images."""
    return write_samples(tmp_path_factory.mktemp("samples"), changed(real_images("train"), blur))


@pytest.fixture
def run(tmp_path, samples, classifier, capsys):
    """Evaluate in this process, with a cache that all tests share, or end with an error; later flags win."""

    def evaluate(name, *more, error=None):
        argv = command(tmp_path / name, samples, classifier, *more)
        if error is None:
            evaluation.main(evaluation.parse_args(argv))
            return json.loads((tmp_path / name / "generation_metrics.json").read_text())
        with pytest.raises(SystemExit, match="2"):
            evaluation.main(evaluation.parse_args(argv))
        assert error in capsys.readouterr().err

    return evaluate


def command(output_dir, samples, classifier, *more):
    flags = {"synthetic": samples, "real_csv": real_csv(), "features": classifier, "output_dir": output_dir}
    flags |= {"num_subsamples": 3, "feature_cache_dir": classifier.parent / "cache"}
    return [f"--{name}={value}" for name, value in flags.items()] + [*map(str, more)]


def find(summary, metric, label="all", key="value"):
    return next(row[key] for row in summary["results"] if (row["metric"], row["label"]) == (metric, label))


def correlated(n, d, seed, shift=0.0):
    mixing = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d)
    return (np.random.default_rng(seed).standard_normal((n, d)) @ mixing + shift).astype(np.float32)


def test_fid_is_that_of_torchmetrics_and_of_known_gaussians():
    from torchmetrics.image.fid import FrechetInceptionDistance

    one, two = correlated(900, 96, 1), correlated(900, 96, 2, 0.05)
    features = torch.nn.Identity()
    features.num_features = 96
    metric = FrechetInceptionDistance(feature=features)
    metric.update(torch.from_numpy(one).double(), real=True)
    metric.update(torch.from_numpy(two).double(), real=False)
    assert evaluation.fid(one, two) == pytest.approx(float(metric.compute()), rel=1e-6)
    # Sets with commuting covariances: ||m1 - m2||² + sum of (s1 - s2)². Columns of an orthogonal matrix without means
    # are uncorrelated.
    mean, scale, n = np.arange(6) / 3, np.arange(1, 7.0), 50
    generator = np.random.default_rng(0)
    white = np.linalg.qr(np.column_stack([np.ones(n), generator.standard_normal((n, 6))]))[0][:, 1:] * math.sqrt(n - 1)
    turn = np.linalg.qr(generator.standard_normal((6, 6)))[0]
    exact = np.square(mean).sum() + np.square(scale - scale[::-1]).sum()
    assert evaluation.fid(white * scale @ turn, white * scale[::-1] @ turn + mean) == pytest.approx(exact, rel=1e-9)
    # Fewer images than features, against the matrix square root.
    one, two = 5 * correlated(40, 64, 1).astype(float), 5 * correlated(40, 64, 2).astype(float)
    cov1, cov2 = np.cov(one.T), np.cov(two.T)
    distance = np.square(one.mean(axis=0) - two.mean(axis=0)).sum() + np.trace(cov1 + cov2)
    distance -= 2 * np.sqrt(np.linalg.eigvals(cov1 @ cov2).real.clip(min=0)).sum()
    assert evaluation.fid(one, two) == pytest.approx(distance, rel=1e-5) and evaluation.fid(one, one) < 1e-3


def test_kid_and_vendi_are_those_of_their_libraries():
    from vendi_score import vendi

    one, two = correlated(90, 48, 1), correlated(90, 48, 2, 0.3)
    # The mean over ordered pairs of different rows, written out.
    kernel = [(a.astype(float) @ b.T.astype(float) / 48 + 1) ** 3 for a, b in ((one, one), (two, two), (one, two))]
    within = [np.delete(k.ravel(), np.arange(90) * 91).mean() for k in kernel[:2]]
    expected = sum(within) - 2 * kernel[2].mean()
    assert evaluation.mmd(one, two) == pytest.approx(expected, rel=1e-9)
    assert evaluation.kid(one, two, 0) == pytest.approx(expected, rel=0.2)
    unit = one.astype(float) / np.linalg.norm(one.astype(float), axis=1, keepdims=True)
    assert evaluation.vendi(one, one) == pytest.approx((vendi.score_K(unit @ unit.T), 1.0))
    assert evaluation.vendi(one, np.eye(48)[:7])[0] == pytest.approx(7)


def test_prdc_is_its_formulas_written_out(monkeypatch):
    monkeypatch.setattr(evaluation, "CHUNK", 7)
    real, other = correlated(60, 5, 1).astype(np.float64), correlated(50, 5, 2, 0.4).astype(np.float64)
    # A row's own distance of 0 comes first.
    radii = [np.sort(np.linalg.norm(x[:, None] - x, axis=2), axis=1)[:, 5] for x in (real, other)]
    inside = np.linalg.norm(other[:, None] - real, axis=2) < radii[0]
    recall = (np.linalg.norm(other[:, None] - real, axis=2) < radii[1][:, None]).any(axis=0).mean()
    expected = [inside.any(axis=1).mean(), recall, inside.sum() / (5 * len(other)), inside.any(axis=0).mean()]
    assert min(expected) > 0.05 and evaluation.prdc(real, other) == pytest.approx(expected)


def test_intervals_of_shares_are_wilsons():
    # Independent images: the effective sample size is n. Draws that do not vary count as `units` images.
    draws = np.random.default_rng(0).binomial(60, 0.25, 20_000) / 60
    expected = stats.binomtest(15, 60).proportion_ci(method="wilson")
    found = evaluation.confidence_interval(0.25, draws, (0, 1), 60)
    assert found == pytest.approx(tuple(expected), abs=2e-3)
    expected = stats.binomtest(5, 5).proportion_ci(method="wilson")
    found = evaluation.confidence_interval(1.0, np.ones(20_000), (0, 1), 5)
    assert found == pytest.approx(tuple(expected), abs=1e-3)
    # A margin is a share of its bounds.
    found = evaluation.confidence_interval(-0.5, 2 * draws - 1, (-1, 1), 60)
    assert found == pytest.approx([2 * end - 1 for end in evaluation.confidence_interval(0.25, draws, (0, 1), 60)])


def test_intervals_without_units_are_students_t_within_their_bounds():
    draws = np.random.default_rng(0).normal(0.9, 0.1, 30)
    half = stats.t.ppf(0.975, 29) * draws.std(ddof=1)
    assert evaluation.confidence_interval(0.9, draws, (-np.inf, np.inf)) == pytest.approx((0.9 - half, 0.9 + half))
    results = evaluation.Results([], {}, "", None)
    for metric in ("memorisation_nearer_train", "memorisation_nearer_train_pixels", "fid", "kid"):
        for value in (0.9, 0.1):
            results.add(metric, value, str(value), draws - 0.9 + value)
    ends = {(row["metric"][:3], row["value"]): (row["low"], row["high"]) for row in results.rows}
    assert ends["mem", 0.9] == pytest.approx((0.9 - half, 1)) and ends["mem", 0.1] == pytest.approx((0, 0.1 + half))
    assert ends["fid", 0.9][1] > 1 and ends["fid", 0.1][0] == 0 > ends["kid", 0.1][0]


def test_subsets_are_without_replacement_and_by_patient():
    patients = np.array([f"p{i // 3}" for i in range(60)])
    order = evaluation.shuffle_patients(patients, 0, "x")
    assert sorted(order) == list(range(60)) and (patients[order].reshape(20, 3) == patients[order][::3, None]).all()
    one, two = evaluation.split_halves(patients, 0)
    assert not set(patients[one]) & set(patients[two]) and {len(one), len(two)} == {30}


def test_intervals_of_set_metrics_have_the_width_of_repeated_experiments(monkeypatch):
    monkeypatch.setattr(evaluation, "KID_SUBSETS", 10)
    args = evaluation.parse_args(["--synthetic", __file__, "--real_csv", __file__, "--feature_cache_dir", os.devnull])
    patients, found = np.array([f"p{i // 2:03d}" for i in range(120)]), {}
    for seed in range(25):
        real, other = correlated(120, 4, 2 * seed), correlated(120, 4, 2 * seed + 1, 0.4)
        results = evaluation.Results([], {}, "", None)
        samples = evaluation.Sample(real, patients, b""), evaluation.Sample(other, np.arange(120).astype(str), b"")
        evaluation.add_set_metrics(results, *samples, "all", 30, args)
        for row in results.rows:
            found.setdefault(row["metric"], []).append((row["value"], (row["high"] - row["low"]) / 2, row["floor"]))
    assert results.find("fid") == pytest.approx(evaluation.fid(real, other))
    for metric in ("fid", "fid_half_n", "kid", "precision", "recall", "density", "coverage", "vendi"):
        values, widths, floors = zip(*found[metric])
        assert 0.6 < np.mean(widths) / stats.t.ppf(0.975, 9) / np.std(values, ddof=1) < 2.2, metric
        assert metric == "fid" or None not in floors
    assert np.diff(np.mean(found["fid_half_n"], axis=0)[[0, 2]]) < 0  # the floor is lower


def test_class_consistency_on_known_heads():
    """Four prompts for Edema, four for No Finding, and one that names two findings."""
    marks = {"Edema": [1, 1, 1, 1, 0, 0, 0, 0, 1], "No Finding": [0, 0, 0, 0, 1, 1, 1, 1, 0]}
    table = pd.DataFrame(marks | {"Cardiomegaly": [0] * 8 + [1], "patient": list("abcdefghi")})
    edema, normal = [0.9, 0.8, 0.45, 0.1, 0.7, 0.2, 0.2, 0.2, 0.9], [0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.9, 0.1, 0.1]
    heads = np.array([edema, [0] * 9, normal], np.float32).T
    rows_of = {label: np.flatnonzero(table[label] == 1) for label in LABELS} | {"Fracture": np.array([], int)}
    source = evaluation.Source("synthetic", table, rows_of, None, probabilities=heads)
    results = evaluation.Results([], {}, "", evaluation.patient_weights(source.patients, range(51)))
    evaluation.add_consistency(results, source, ["Edema", "Cardiomegaly", "No Finding"], "ignore")
    expected = {"class_consistency/Edema": 0.6, "class_consistency/No Finding": 0.75, "class_consistency/all": 0.675}
    expected |= {"class_consistency_margin/Edema": 0.35, "class_consistency_auroc/Edema": 15 / 20}
    expected |= {"fires/Edema -> No Finding": 0.2, "class_consistency_alone/No Finding": 0.5}
    assert {key: results.find(*key.split("/")) for key in expected} == pytest.approx(expected)
    draws = [results.draws[f"class_consistency/{label}"] for label in LABELS]
    assert np.array_equal(results.draws["class_consistency/all"], np.mean(draws, axis=0))
    assert results.find("class_consistency", "Fracture", "note") == "the classifier has no such head"


def test_memorisation_sees_copies_and_allows_for_hubs():
    """See simulate_verdicts.py for false alarms."""
    generator = np.random.default_rng(0)
    # A twentieth of the images is near the centre and so nearest to many others.
    scales = [np.where(generator.random((n, 1)) < 0.05, 0.5, 1.8) for n in (150, 150, 300)]
    seen, unseen, generated = (2 + scale * generator.standard_normal((len(scale), 16)) for scale in scales)
    patients = np.repeat(np.arange(75), 2).astype(str), np.repeat(np.arange(75, 150), 2).astype(str)
    args = SimpleNamespace(feature_cache_dir=os.devnull)
    share, draws = evaluation.nearer_to_training(generated, seen, unseen, patients, args)
    assert evaluation.confidence_interval(share, draws, (0, 1))[0] < 0.5
    (seen_row, to_seen), (unseen_row, to_unseen) = (evaluation.nearest(generated, own, args) for own in (seen, unseen))
    times = np.bincount(np.where(to_seen > to_unseen, seen_row // 2, 75 + unseen_row // 2))
    assert draws.std() == pytest.approx(np.sqrt(np.square(times).sum()) / (2 * len(generated)), rel=0.15)
    generated[:100] = seen[:100]
    share, draws = evaluation.nearer_to_training(generated, seen, unseen, patients, args)
    assert share > 0.6 and evaluation.confidence_interval(share, draws, (0, 1))[0] > 0.5


def test_inputs_and_outputs_are_those_of_torchxrayvision(xrv_file, monkeypatch):
    network = evaluation.XRVNetwork(str(xrv_file), torch.device("cpu"))
    paths = list(evaluation.load_image_table(str(real_csv()))["image"][:3])
    for side in (64, 512):
        prepared = [network.prepare(*one) for one in gray_inputs(paths, side)[0]]
        inputs = network.inputs(prepared)
        # Two matrix products in the place of its resizer: at most four float32 steps, 6e-5 of 255 grey levels, apart.
        assert np.abs(inputs.numpy() - xrv_inputs(paths, side)).max() <= 4 * np.spacing(np.float32(1024))
        assert inputs.std() > 100 and inputs.abs().max() <= 1024
    model = evaluation.xrv.models.DenseNet(weights=None).eval()
    model.load_state_dict({name: tensor for name, tensor in load_file(xrv_file).items() if name != "op_threshs"})
    with torch.no_grad():
        features, probabilities = model.features2(inputs).numpy(), torch.sigmoid(model(inputs)).numpy()
    heads = [model.targets.index(evaluation.XRV_NAMES.get(label, label)) for label in network.labels]
    expected = np.concatenate([features, probabilities[:, heads]], axis=1)
    # Equal but for float32's rounding: channels-last convolutions sum in another order.
    np.testing.assert_allclose(network.compute(prepared), expected, rtol=0, atol=1e-5)
    assert set(evaluation.CONDITIONS) - set(network.labels) == {"No Finding"}
    # The download, which also has operating thresholds, is the same network.
    model.op_threshs = torch.full((18,), 0.2)
    monkeypatch.setattr(evaluation.xrv.models, "DenseNet", lambda weights: model)
    assert evaluation.XRVNetwork("xrv", torch.device("cpu")).key == network.key


@pytest.mark.parametrize("arch", ["resnet18", "densenet121", "efficientnet_b0"])
def test_classifier_features_are_the_inputs_of_its_last_layer(classifier, tmp_path, arch):
    """Also while several threads compute."""
    folder = shutil.copytree(classifier, tmp_path / "classifier")
    spec = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps(spec | {"arch": arch}))
    torch.manual_seed(0)
    model, inputs = evaluation.build_classifier(arch, len(spec["labels"])), []
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    network = evaluation.ClassifierNetwork(folder, torch.device("cpu"))
    batches = np.random.default_rng(0).integers(256, size=(8, 2, 32, 32), dtype=np.uint8)
    with ThreadPoolExecutor(4) as pool:
        outputs = np.concatenate(list(pool.map(network.compute, batches)))
    last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
    last.register_forward_pre_hook(lambda layer, given: inputs.append(given[0]))
    gray = torch.from_numpy(batches).flatten(0, 1)[:, None] / 255
    with torch.no_grad():
        probabilities = torch.sigmoid(model.eval()(evaluation.classifier_inputs(gray, spec["normalisation"])))
    np.testing.assert_allclose(outputs, torch.cat([*inputs, probabilities], dim=1), rtol=1e-4, atol=1e-5)


def gray_inputs(paths, side=64):
    """Return what a network prepares from, and the gray images for a reference."""
    decoded = [evaluation.load_image(path, side, "squash") for path in paths]
    prepared = [(np.moveaxis(rgb, 2, 0), evaluation.to_gray(rgb)) for rgb in decoded]
    return prepared, [Image.open(path).convert("L").resize((side, side), Image.Resampling.LANCZOS) for path in paths]


def test_vision_features_are_transformers_own_pooled_output(vision, tmp_path):
    network = evaluation.load_network(str(vision), torch.device("cpu"))
    inputs, images = gray_inputs(evaluation.load_image_table(str(real_csv()))["image"][:3])
    model = transformers.Dinov2Model.from_pretrained(vision).eval()
    processed = transformers.BitImageProcessor.from_pretrained(vision)(
        [i.convert("RGB") for i in images], return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**processed).pooler_output.numpy()
    features = network.compute([network.prepare(*one) for one in inputs])
    assert features.std(axis=0).min() > 0 and np.abs(features - expected).max() < 1e-5
    # Another normalisation is another network, for the cache.
    shutil.copytree(vision, tmp_path / "dino")
    transformers.BitImageProcessor(size={"shortest_edge": 56}).save_pretrained(tmp_path / "dino")
    assert evaluation.load_network(str(tmp_path / "dino"), torch.device("cpu")).key != network.key


def test_inception_features_are_those_of_torchmetrics(monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import FrechetInceptionDistance

    module = FeatureExtractorInceptionV3.__module__
    inputs, images = gray_inputs(evaluation.load_image_table(str(real_csv()))["image"][:4])
    pixels = torch.from_numpy(np.stack([np.asarray(image)[None].repeat(3, axis=0) for image in images]))
    with monkeypatch.context() as patch:
        # Random weights instead of the download.
        patch.setattr(f"{module}.load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    set_batch_norms(model, pixels)
    monkeypatch.setattr(f"{module}.load_state_dict_from_url", lambda *args, **kwargs: model.state_dict())
    network = evaluation.load_network("inception", torch.device("cpu"))
    features = network.compute([network.prepare(*one) for one in inputs])
    expected = FrechetInceptionDistance(feature=2048).inception(pixels).numpy()
    assert features.shape == (4, 2048) and expected.std() > 0 and np.abs(features - expected).max() < 1e-5


def test_further_features_add_rows_and_draws_of_their_own(run, tmp_path, samples, classifier, vision):
    flags = ["--baseline", samples, "--max_per_label=20"]
    alone, summary = run("alone", *flags), run("both", *flags, "--features", classifier, vision)
    # The first network's figures are the same as alone.
    own = [row for row in summary["results"] if "@" not in row["metric"]]
    assert own == alone["results"]
    names = {
        row["metric"] for row in summary["results"] if "@" in row["metric"] and not row["metric"].endswith("line")
    }
    sets = "fid fid_half_n fid_real_halves_half_n kid precision recall density coverage vendi vendi_ratio".split()
    assert names == {f"{metric}@dino" for metric in sets}
    draws = load_arrays(tmp_path / "both" / "generation_draws.safetensors")
    second = run("second", *flags, f"--features={vision}", f"--classifier={classifier}")
    for metric in sets:
        found, expected = (find(s, m) for s, m in ((summary, f"{metric}@dino"), (second, metric)))
        assert found == expected and draws[f"{metric}@dino/all"].shape == (3,)
    assert find(summary, "fid@dino") != find(summary, "fid")
    for metric in ("fid_half_n@dino", "kid@dino", "vendi@dino"):
        assert find(summary, metric, key="floor") is not None
    # The base model is the same folder here.
    assert np.array_equal(draws["fid@dino/all"], draws["fid@dino_baseline/all"])
    (further,) = summary["further_features"]
    assert further == second["features"] and summary["features"] == alone["features"]
    # Without --classifier, nothing judges the prompts.
    headless = run("headless", *flags, f"--features={vision}")
    assert "pass --classifier" in find(headless, "class_consistency", "Edema", "note")
    assert headless["classifier"]["labels"] == [] and not (tmp_path / "headless" / "consistency.png").exists()


def test_ms_ssim_is_1_of_a_collapsed_model_and_sees_what_is_less_varied(run, tmp_path):
    images = real_images("val", "test")
    # Two prompts for each label; all samples of a prompt are equal.
    same = {label: [own[i % 2] for i in range(len(own))] for label, own in images.items()}
    table = pd.read_csv(write_samples(tmp_path / "samples" / "same", same) / "metadata.csv")
    prompts = table["prompt"] + (table["index"] % 2).astype(str)
    table.assign(prompt=prompts).to_csv(tmp_path / "samples" / "same" / "metadata.csv", index=False)
    alike = {
        label: [Image.blend(own[0], image.resize(own[0].size), 0.3) for image in own] for label, own in images.items()
    }
    for name, own in {"varied": images, "alike": alike}.items():
        write_samples(tmp_path / "samples" / name, own)
    names = ("varied", "alike", "same")
    found = {name: run(name, f"--synthetic={tmp_path / 'samples' / name}", "--real_split=all") for name in names}
    assert find(found["alike"], "ms_ssim", key="low") > find(found["varied"], "ms_ssim", key="high")
    assert 0 < find(found["varied"], "ms_ssim_real") == find(found["alike"], "ms_ssim", key="floor") < 1
    assert find(found["same"], "ms_ssim") == pytest.approx(1)
    assert load_arrays(tmp_path / "alike" / "generation_draws.safetensors")["ms_ssim/all"].std() > 0
    copies = len(table) - prompts.nunique()
    assert any(f"synthetic: {copies} images are identical to another" in note for note in found["same"]["warnings"])


def test_a_run_writes_everything_and_the_same_again(run, tmp_path, samples, monkeypatch):
    more = ["--train_csv", real_csv(), "--baseline", samples, "--vae", BASE, "--max_per_label=20"]
    summary = run("one", *more)
    for name in ("consistency.png", "nearest_neighbours.png"):
        assert np.asarray(Image.open(tmp_path / "one" / name).convert("RGB")).std() > 10
    rows, draws = summary["results"], load_arrays(tmp_path / "one" / "generation_draws.safetensors")
    assert all(row["value"] is not None or row["note"] for row in rows)
    fids = [find(summary, f"fid{suffix}", label) for suffix in ("", "_baseline", "_vae") for label in ("all", *LABELS)]
    assert min(fids) > 0 and len({find(summary, "fid_common_n", label, "n") for label in ("all", *LABELS)}) == 1
    for metric in ("fid_half_n", "kid", "precision", "vendi", "class_consistency", "colour_mean"):
        assert find(summary, metric, key="floor") is not None
    # The base model is the same folder here.
    assert np.array_equal(draws["fid/all"], draws["fid_baseline/all"])
    assert find(summary, "memorisation_nearer_train_baseline") == find(summary, "memorisation_nearer_train")
    for row in rows:
        key = f"{row['metric']}/{row['label']}"
        assert (key in draws) == (row["low"] is not None)
        if row["metric"] in ("fid_half_n", "kid", "vendi_ratio", "density"):
            half = stats.t.ppf(0.975, 2) * draws[key].std(ddof=1)
            assert row["high"] == pytest.approx(row["value"] + half)
    # Once more: nothing is computed, and the same bytes are written.
    first = (tmp_path / "one" / "generation_metrics.json").read_bytes()
    monkeypatch.setattr(evaluation, "save_array", lambda path, array: pytest.fail(f"computed again: {path}"))
    run("one", *more)
    assert (tmp_path / "one" / "generation_metrics.json").read_bytes() == first


def test_runs_on_the_same_real_images_share_their_draws(run, tmp_path, samples):
    shutil.copytree(samples, tmp_path / "twin")
    other, draws, ids = write_samples(tmp_path / "other", changed(real_images("train"), lambda i: blur(i, 2))), {}, {}
    for name, folder in {"one": samples, "twin": tmp_path / "twin", "other": other, "few": samples}.items():
        run(name, f"--synthetic={folder}", f"--max_per_label={9 if name == 'few' else 5000}")
        path = tmp_path / name / "generation_draws.safetensors"
        draws[name], ids[name] = load_arrays(path), safe_open(path, "np").metadata()["draws_id"]
    assert ids["one"] == ids["twin"] == ids["other"] != ids["few"]
    assert all(np.array_equal(draws["one"][key], draws["twin"][key]) for key in draws["one"])
    assert np.array_equal(draws["one"]["class_consistency_real/all"], draws["other"]["class_consistency_real/all"])
    assert not np.array_equal(draws["one"]["fid/all"], draws["other"]["fid/all"])


def test_scores_of_the_base_model_and_of_real_images_are_kept(run, tmp_path, samples, monkeypatch):
    """A second model is scored alone; after a change of the script, everything is scored again."""
    monkeypatch.setattr(evaluation, "MAX_VAE_IMAGES", 30)
    other, calls, counts = (
        write_samples(tmp_path / "other", changed(real_images("train"), lambda i: blur(i, 2))),
        [],
        {},
    )

    def count(name):
        original = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda *args, **more: calls.append(name) or original(*args, **more))

    count("fid")
    count("multiscale_structural_similarity_index_measure")
    more = ["--baseline", samples, "--vae", BASE, f"--feature_cache_dir={tmp_path / 'cache'}"]
    for name, folder in {"base": samples, "one": other, "again": other}.items():
        if name == "again":
            monkeypatch.setattr(evaluation, "code_fingerprint", lambda: "changed")
        calls.clear()
        summary = run(name, f"--synthetic={folder}", *more)
        counts[name] = Counter(calls)
    first, second = counts["again"], counts["one"]
    assert 0 < second["fid"] < 0.4 * first["fid"]
    assert [found["multiscale_structural_similarity_index_measure"] for found in (first, second)] == [3, 1]
    assert summary["results"] == json.loads((tmp_path / "one" / "generation_metrics.json").read_text())["results"]
    assert any(note.startswith("through the VAE: 30 of") for note in summary["warnings"])


def test_tints_blurs_and_copies_are_each_seen_by_their_own_figure(run, tmp_path):
    train, unseen = real_images("train"), real_images("val", "test")
    tinted = changed(unseen, lambda image: Image.merge("RGB", [image.point(lambda v: min(255, v + 12)), image, image]))
    blurred, found = changed(unseen, lambda image: blur(image, 6)), {}
    for name, images in {"copies": train, "other": unseen, "blurred": blurred, "tinted": tinted}.items():
        folder = write_samples(tmp_path / "samples" / name, images)
        found[name] = run(name, f"--synthetic={folder}", f"--train_csv={real_csv()}")
    for kind in ("", "_pixels"):
        assert find(found["copies"], f"memorisation_suspects{kind}") > 0.9
        assert find(found["other"], f"memorisation_suspects{kind}") < 0.1
        assert find(found["copies"], f"memorisation_nearer_train{kind}", key="low") > 0.5
    assert find(found["tinted"], "colour_visible") > 0.99 > 0 == find(found["other"], "colour_visible")
    assert find(found["tinted"], "colour_mean", key="low") > 5 > find(found["tinted"], "colour_mean", key="floor")
    for label in LABELS:
        assert find(found["blurred"], "fid", label) > 1.5 * find(found["other"], "fid", label)


def test_images_listed_three_times_count_once(run, tmp_path, samples):
    """By the same path and as copies under another name, in a folder of sample.py and in another generator's."""
    options = ["--labels", *LABELS, "--max_per_label=9"]
    once, table = run("once", *options), pd.read_csv(samples / "metadata.csv")
    shutil.copytree(samples, tmp_path / "s")
    shutil.copytree(samples, tmp_path / "s" / "copy")
    table = pd.concat([table, table, table.assign(file_name="copy/" + table["file_name"])])
    root, listed = real_csv().parent.parent, pd.read_csv(real_csv())
    shutil.copytree(root, tmp_path / "copy")
    copies = listed.assign(Path=f"{tmp_path}/copy/" + listed["Path"])
    pd.concat([listed, listed, copies]).to_csv(tmp_path / "real.csv", index=False)
    real = [f"--real_csv={tmp_path / 'real.csv'}", f"--image_root={root}"]
    for name, listed in {"ours": table, "another": table.drop(columns="index")}.items():
        listed.to_csv(tmp_path / "s" / "metadata.csv", index=False)
        thrice = run(name, f"--synthetic={tmp_path / 's'}", *real, *options)
        notes = " ".join(thrice["warnings"])
        assert f"synthetic: {len(table) * 2 // 3} rows repeat" in notes and notes.count("rows repeat") == 2
        assert thrice["results"] == once["results"]


def test_an_image_that_a_generator_gives_for_every_prompt_counts_once_per_prompt(run, tmp_path):
    image = real_images("val")["Edema"][0]
    folder = write_samples(tmp_path / "s", {label: [image] * 8 for label in LABELS})
    pd.read_csv(folder / "metadata.csv").drop(columns="index").to_csv(folder / "metadata.csv", index=False)
    found = run("e", f"--synthetic={folder}")
    assert [found["images"]["synthetic"][label] for label in LABELS] == [1] * len(LABELS)
    assert any("the model has collapsed" in note for note in found["warnings"])


def test_merged_rows_keep_what_any_of_them_says():
    table = pd.DataFrame({"hash": list("aabbc"), "name": list("vwxyz")})
    table["Edema"], table["Fracture"] = [-1.0, 0.0, 1.0, -1.0, np.nan], [np.nan, 0.0, np.nan, np.nan, -1.0]
    expected = pd.DataFrame({"hash": list("abc"), "name": list("vxz")})
    expected["Edema"], expected["Fracture"] = [-1.0, 1.0, np.nan], [0.0, np.nan, -1.0]
    pd.testing.assert_frame_equal(evaluation.merge_duplicates(table, "hash"), expected)


def test_what_cannot_be_computed_is_null_with_a_note(run):
    summary = run("e", "--real_split=all", "--labels", "Edema", "Cardiomegaly", "Fracture")
    notes = {"fid/Cardiomegaly": "too few", "class_consistency/Fracture": "no such head"}
    notes |= {
        "class_consistency/Cardiomegaly": "no image with the label",
        "memorisation_nearer_train/all": "pass --train_csv",
    }
    for key, note in notes.items():
        assert find(summary, *key.split("/")) is None and note in find(summary, *key.split("/"), "note")
    assert any("is below 10 times the 512 features" in note for note in summary["warnings"])


def test_pools_have_as_many_images_of_each_combination_of_labels(run, tmp_path, samples):
    """Of Edema alone three, of both 20, which no real image has, and of neither two."""
    frame = pd.DataFrame({"Edema": [1] * 23 + [0] * 2, "No Finding": [0] * 3 + [1] * 20 + [0] * 2})
    paths = pd.read_csv(samples / "metadata.csv")["file_name"][: len(frame)]
    frame = frame.assign(file_name=[samples / path for path in paths])
    frame.to_csv(tmp_path / "made.csv", index=False)
    flags = [f"--synthetic={tmp_path / 'made.csv'}", "--resolution=64", "--labels", "Edema", "No Finding"]
    table = evaluation.load_split(str(real_csv()), None, "test", 0)
    edema, normal = (table["Edema"] == 1).sum(), (table["No Finding"] == 1).sum()
    assert edema > 3
    found = run("e", *flags)
    assert found["images"]["real"] | {"fingerprint": 0} == {"Edema": 3, "No Finding": 0, "all": 3, "fingerprint": 0}
    assert found["images"]["synthetic"]["all"] == 3 and find(found, "class_consistency", "No Finding", "n") == 20
    assert f"real: {normal} of {edema + normal} images have labels" in found["warnings"][1]
    assert any("synthetic: 20 of 23 images have labels" in note for note in found["warnings"])
    frame.assign(**dict.fromkeys(LABELS, 1)).to_csv(tmp_path / "made.csv", index=False)
    run("refused", *flags[:2], "--labels", "No Finding", "Edema", error="sample the real combinations with sample.py")


def test_pools_match_below_the_cap_per_label():
    flags = [f"--synthetic={__file__}", f"--real_csv={__file__}", "--max_per_label=50"]
    args, tables = evaluation.parse_args(flags), {}
    for name, counts in {"real": (200, 50, 90), "synthetic": (40, 50, 20)}.items():
        labels = np.repeat([[1, 0], [1, 1], [0, 1]], counts, axis=0)
        names = [f"{name}{i}" for i in range(sum(counts))]
        tables[name] = pd.DataFrame(labels, columns=LABELS).assign(name=names, patient=names)
    plan = SimpleNamespace(tables=tables, labels=LABELS, warnings=[])
    real, synthetic = evaluation.make_sources(plan, args).values()
    for label, rows in real.pool.items():
        assert Counter(real.codes[rows]) == Counter(synthetic.codes[synthetic.pool[label]]) and len(rows) > 20
    assert max(map(len, (real.rows_of[label] for label in LABELS))) == 50


def test_tables_without_labels_are_compared_as_a_whole(run, tmp_path, samples):
    table = pd.read_csv(samples / "metadata.csv").drop(columns=evaluation.LABELS)
    table["file_name"] = [str(samples / name) for name in table["file_name"]]
    for name, rows in {"real": table[:30], "synthetic": table[10:36]}.items():
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    flags = [f"--real_csv={tmp_path / 'real.csv'}", f"--synthetic={tmp_path / 'synthetic.csv'}", "--real_split=all"]
    found = run("e", *flags)
    assert find(found, "fid", key="n") == 26 and find(found, "ms_ssim") > 0
    assert {row["label"] for row in found["results"]} == {"all"}


def test_a_bare_folder_is_one_set_and_its_size_is_that_of_its_images(run, tmp_path, samples, capsys):
    """As the table of its images that records 64 pixels; images of two sizes are refused."""
    bare = shutil.copytree(samples, tmp_path / "bare_0.5", ignore=lambda *names: ["metadata.csv"])
    assert evaluation.run_name(bare) == "bare_0.5"
    table = pd.read_csv(samples / "metadata.csv")[["file_name", "resolution"]]
    table.assign(file_name=f"{samples}/" + table["file_name"], prompt="X-ray").to_csv(tmp_path / "t.csv", index=False)
    bare_rows, rows = (run(path.stem, f"--synthetic={path}")["results"] for path in (bare, tmp_path / "t.csv"))
    assert [(row["metric"], row["value"]) for row in bare_rows] == [(row["metric"], row["value"]) for row in rows]
    assert "no view column" in capsys.readouterr().out
    path = next(bare.rglob("*.png"))
    Image.open(path).resize((32, 32)).save(path)
    run("refused", f"--synthetic={bare}", error="images of different resolution")


def test_an_interrupted_pass_goes_on(run, tmp_path, monkeypatch):
    flags = [f"--feature_cache_dir={tmp_path / 'cache'}", "--max_per_label=8", "--batch_size=4"]
    compute, calls, computed = evaluation.ClassifierNetwork.compute, itertools.count(), []

    def interrupt(network, prepared):
        if next(calls) == 2:
            raise KeyboardInterrupt
        computed.append(len(prepared))
        return compute(network, prepared)

    monkeypatch.setattr(evaluation.ClassifierNetwork, "compute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("e", *flags)
    assert not (tmp_path / "e").exists() and not list(tmp_path.rglob(f".{os.getpid()}-*"))
    first = sum(computed)
    summary = run("e", *flags)
    assert 0 < first < sum(computed) == sum(source["all"] for source in summary["images"].values())
    assert summary["results"] == run("f", "--max_per_label=8")["results"]


def test_memorisation_looks_at_the_images_that_were_trained_on():
    flags = ["--split_seed=3", "--max_train_samples=25"]
    trained = train_full.parse_args([f"--data_csv={real_csv()}", "--train_unet", *flags])
    args = [f"--{name}={real_csv()}" for name in ("synthetic", "real_csv", "train_csv")]
    ours = evaluation.load_training_images(evaluation.parse_args([*args, *flags]))
    assert list(ours["image"]) == list(train_full.load_training_data(trained).train["image"])


def test_a_classifier_that_knows_too_much_or_too_little_is_warned_of(run, tmp_path, classifier):
    shutil.copytree(classifier, tmp_path / "c")
    spec = json.loads((classifier / "classifier.json").read_text())
    table = evaluation.load_split(str(real_csv()), None, "test", 0)
    known = table["patient"][table["Edema"] == 1].unique()[:3]
    spec["split"]["patients"] = [evaluation.patient_hash(patient) for patient in known]
    spec["real_test_auroc"]["Edema"] = {"value": 0.55, "low": 0.45, "high": 0.65}
    (tmp_path / "c" / "classifier.json").write_text(json.dumps(spec))
    # A collapsed network: nearly the same features for every image.
    weights = load_file(classifier / "model.safetensors")
    weights["layer4.1.bn2.bias"] += 1e4
    save_file(weights, tmp_path / "c" / "model.safetensors")
    notes = " ".join(run("e", f"--features={tmp_path / 'c'}", "--max_per_label=30")["warnings"])
    assert "trained on 3 of" in notes and "not shown to beat chance on real test images (AUROC): Edema" in notes
    assert "the features hardly vary" in notes


@pytest.mark.slow
def test_two_processes_give_the_same(run, tmp_path, samples, classifier):
    one, own_cache = run("one"), f"--feature_cache_dir={tmp_path / 'cache'}"
    flags = command(tmp_path / "two", samples, classifier, own_cache)
    done = launch(ROOT / "eval_generation.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "generation_metrics.json").read_text())
    for a, b in zip(one["results"], two["results"], strict=True):
        assert a["value"] is b["value"] is None or a["value"] == pytest.approx(b["value"], rel=1e-3, abs=1e-6), a


def test_everyday_mistakes_end_in_a_sentence(run, tmp_path, classifier, xrv_file, vision):
    padded = write_samples(tmp_path / "pad", {"Edema": real_images("val")["Edema"][:4]}, resize_mode="pad")
    dead = {name: torch.zeros_like(tensor) for name, tensor in load_file(xrv_file).items()}
    save_file(dead, tmp_path / "dead.safetensors")
    save_file(dead | {"classifier.bias": torch.full((18,), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    shutil.copytree(vision, tmp_path / "part")
    change_weights(tmp_path / "part", lambda tensors: tensors.pop("layernorm.weight"))
    pd.DataFrame({"Path": ["gone.png"], "Edema": [1]}).to_csv(tmp_path / "gone.csv", index=False)
    for error, *flags in (
        ("expected prompt, text or any of Oedema; see --labels", "--labels", "Oedema"),
        ("--max_per_label must be at least 1", "--max_per_label=0"),
        ("no images, or not finished by sample.py", f"--synthetic={tmp_path / 'part'}"),
        ("--real_csv none.csv: no such file", "--real_csv=none.csv"),
        ("--features none: neither a classifier nor", "--features=none"),
        ("none of its images exist", f"--real_csv={tmp_path / 'gone.csv'}", "--real_split=all"),
        ("synthetic images: none has any of Fracture", "--labels", "Fracture"),
        ("different resize_mode", f"--baseline={padded}"),
        ("different resolution", "--resolution=128"),
        ("trained with --resize_mode squash", f"--synthetic={padded}"),
        ("no such file; pass the classifier folder", f"--classifier={tmp_path}"),
        ("cannot load torchxrayvision's", f"--features={tmp_path / 'a.safetensors'}"),
        ("not finite", f"--features={tmp_path / 'nan.safetensors'}", "--max_per_label=2"),
        ("all zero or not finite", f"--features={tmp_path / 'dead.safetensors'}", "--max_per_label=2"),
        ("cannot load a VAE", f"--vae={classifier}"),
        ("neither a classifier nor a vision model", f"--features={tmp_path}"),
        ("it has no layernorm.weight", f"--features={tmp_path / 'part'}"),
        ("two end in the same name", "--features", classifier, f"elsewhere/{classifier.name}"),
    ):
        run("refused", *flags, error=error)


def test_bad_images_stop_the_run(run, tmp_path, samples):
    shutil.copytree(samples, tmp_path / "s")
    names = list(pd.read_csv(samples / "metadata.csv")["file_name"][[0, 2, 5]])
    (tmp_path / "s" / names[0]).unlink()
    (tmp_path / "s" / names[1]).write_bytes((samples / names[1]).read_bytes()[:200])
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(tmp_path / "s" / names[2])
    run("refused", f"--synthetic={tmp_path / 's'}", error="3 images cannot be used")
