"""Check intervals, verdicts and floors on simulated data whose truth is known (about an hour on one core).

    python tests/simulate_verdicts.py
    python tests/simulate_verdicts.py --what memorisation perfect --runs 100

differences   Two strategies against the same real images: how often the interval of their difference covers the truth,
              and how often a difference is seen, by pairs and by intervals that do not overlap.
downstream    Two strategies with classifiers of three seeds, tested on the same patients: how often the difference in
              AUROC is covered.
trainings     Several trainings of two strategies, and a base model with draws of its own: likewise.
memorisation  Generators that copy nothing, a fifth or a half: how often each metric raises an alarm.
perfect       Real images of other patients as generated ones: how often their FID is within the floor's interval.

Exits with status 1 if a share is out of its bounds.
"""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

import report

import eval_downstream as downstream
import eval_generation as evaluation

# devnull: no score is cached.
ARGS = evaluation.parse_args(["--synthetic", __file__, "--real_csv", __file__, "--feature_cache_dir", os.devnull])
ALL_METRICS = evaluation.set_metrics
failures = []


def check(text, share, low=0.0, high=1.0):
    print(f"{text:<100} {100 * share:5.1f} %", flush=True)
    if not low <= share <= high:
        failures.append(f"{text}: {share:.3f} is not within {low:.3f} and {high:.3f}")


def check_coverage(text, pairs, truth, high_share=0.97):
    """Check that 93 to 97 % of the intervals cover the truth, give or take two standard errors of the share itself."""
    low, high = np.array(pairs)[:, 1:3].T
    slack = 2 * (0.95 * 0.05 / len(pairs)) ** 0.5
    share = ((low <= truth) & (truth <= high)).mean()
    check(f"{text}: interval covers (± {50 * slack:.1f})", share, 0.93 - slack, high_share + slack)


def evaluate(sources, *names):
    """Return the Results of some set metrics for "all"."""
    results = evaluation.Results([], {}, "", None)
    evaluation.set_metrics = lambda seed: [metric for metric in ALL_METRICS(seed) if metric.names[0] in names]
    evaluation.add_set_metrics(results, *sources, "all", 0, ARGS)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Differences
# ---------------------------------------------------------------------------------------------------------------------


def compare_strategies(generator, n, dim, fids, names):
    """Return the difference of two strategies, (difference, low, high, p, draws), by metric, and if they overlap.

    The generated images differ from the real ones in the mean of one feature, so FID is the square of that.
    """
    scales, results = np.arange(1, dim + 1) ** -0.5, []
    sets = [0.5 + scales * generator.standard_normal((n, dim)) for _ in range(3)]
    for images, fid in zip(sets[1:], fids):
        images[:, 0] += fid**0.5
        samples = [evaluation.Sample(features, np.arange(n).astype(str), b"") for features in (sets[0], images)]
        results.append(evaluate(samples, *names))
    differences = {}
    for key in results[0].draws:
        name = key.removesuffix("/all")
        values = [found.find(name) for found in results]
        differences[name] = report.compare_draws(*values, *(found.draws[key] for found in results))
    (low, high), (other_low, other_high) = ([r.find("fid", "all", end) for end in ("low", "high")] for r in results)
    return differences, low <= other_high and other_low <= high


def compare_aurocs(generator, shifts, n=400):
    """Return the difference in AUROC of two strategies whose scores of positives are shifted."""
    rows, found = np.arange(n), []
    weights = evaluation.patient_weights(rows.astype(str), range(1 + evaluation.BOOTSTRAP_DRAWS))
    for shift in shifts:
        scores = generator.standard_normal(n) + shift * (rows < n // 2)
        found.append(evaluation.weighted_auroc(scores, rows[: n // 2], rows[n // 2 :])(weights))
    return report.compare_draws(found[0][0], found[1][0], found[0][1:], found[1][1:])


def simulate_differences(runs):
    generator, base = np.random.default_rng(0), 1.5
    # A strategy's FID of n images has a standard error of sqrt(4 FID / n); that of the difference is sqrt(2) times it.
    error = (8 * base / 5000) ** 0.5
    for gap in (0.0, 2 * error, 0.157):
        text, found, overlaps = f"FID {base + gap:.3f} against {base}", [], []
        for _ in tqdm(range(runs), text, leave=False):
            differences, overlap = compare_strategies(generator, 5000, 32, (base + gap, base), ["fid"])
            found.append(differences["fid"])
            overlaps.append(overlap)
        check_coverage(text, found, gap)
        seen = np.mean([p < report.ALPHA for _, _, _, p, _ in found])
        check(f"{text}: seen by pairs", seen, 0.7 if gap == 0.157 else 0.0)
        check(f"{text}: seen by intervals that do not overlap", 1 - np.mean(overlaps))
    for shift in (0.0, 0.3):
        found = defaultdict(list)
        for _ in tqdm(range(runs), "other metrics", leave=False):
            names = ["fid", "kid", "precision", "vendi"]
            differences, _ = compare_strategies(generator, 500, 16, (0.5 + shift, 0.5), names)
            differences["class_consistency_auroc"] = compare_aurocs(generator, (0.5 + shift, 0.5))
            for name, difference in differences.items():
                found[name].append(difference)
        for name, pairs in found.items():
            mean = np.mean([difference for difference, *_ in pairs])
            check_coverage(f"difference in {name} of {mean:+.3f}, n = 500, 16 features", pairs, mean)


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers and trainings
# ---------------------------------------------------------------------------------------------------------------------


def compare_classifiers(generator, shifts, seed_spread=0.15, draws=200):
    """Return the difference in AUROC of two strategies on 150 patients of two images.

    All classifiers find the same patients difficult, and those of a strategy the same images. `seed_spread` is the
    standard deviation of what a classifier's seed changes.
    """
    patients, targets = np.repeat(np.arange(150), 2), (generator.random((300, 1)) < 0.3).astype(np.float64)
    difficulty, found = generator.standard_normal((150, 1))[patients], []
    for shift in shifts:
        gains = shift + seed_spread * generator.standard_normal(3)
        known = 0.5 * difficulty + generator.standard_normal((300, 1))
        logits = [gain * targets + known + seed_spread * generator.standard_normal((300, 1)) for gain in gains]
        figures = downstream.score(targets, patients, [1 / (1 + np.exp(-logit)) for logit in logits], draws)
        noise = downstream.training_noise(3, draws, generator.integers(1 << 62))
        found.append(downstream.result_rows(["Edema"], {}, figures, noise, targets)[1]["auroc/Edema"])
    return report.compare_draws(found[0][0], found[1][0], found[0][1:], found[1][1:])


def simulate_downstream(runs):
    generator = np.random.default_rng(3)
    for shift in (0.0, 0.4):
        differences = [compare_classifiers(generator, (1 + shift, 1)) for _ in tqdm(range(runs), leave=False)]
        mean = np.mean([difference for difference, *_ in differences])
        # With so few seeds, the interval of a single run would be too narrow if that of a pair were narrower.
        check_coverage(f"difference in downstream AUROC of {mean:+.3f}", differences, mean, 0.985)
        check("... seen", np.mean([p < report.ALPHA for _, _, _, p, _ in differences]), 0.0, 1.0 if shift else 0.07)


def as_result(value, draws=None):
    rows = [{"metric": "fid", "label": "all", "value": value, "low": value, "high": value, "note": None}]
    return report.ResultFile({"results": rows}, {"fid/all": draws})


def simulate_trainings(runs):
    """Trainings vary by 1; the evaluation varies by 0.5, which strategies share and the base model's draws show."""
    generator = np.random.default_rng(4)
    for count in (2, 3, 5):
        pairs, with_base = [], []
        for _ in range(runs):
            shared, (lora, unet) = (
                0.5 * generator.standard_normal(),
                generator.standard_normal((2, count)) + [[2], [0]],
            )
            files = [
                report.merge_trainings([as_result(value + shared) for value in values]) for values in (lora, unet)
            ]
            files.append(as_result(0.5 * generator.standard_normal(), 0.5 * generator.standard_normal(30)))
            values, draws = zip(*((file.get("fid")["value"], file.draws["fid/all"]) for file in files))
            pairs.append(report.compare_draws(values[0], values[1], draws[0], draws[1]))
            with_base.append(report.compare_draws(values[0] - shared, values[2], draws[0], draws[2]))
        check_coverage(f"difference over {count} trainings", pairs, 2)
        if count > 2:  # two have one degree of freedom whatever the base model's error: too wide
            check_coverage(f"difference of {count} trainings and the base model", with_base, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Memorisation
# ---------------------------------------------------------------------------------------------------------------------


def make_source(name, features, patients, labels=None):
    table = pd.DataFrame({"name": [f"{name}{i:06d}" for i in range(len(features))], "patient": patients})
    source = evaluation.Source(name, table if labels is None else table.join(labels), {}, np.zeros(len(table), int))
    source.features = source.thumbnails = features
    return source


def make_radiographs(generator, patients, spread=1.8):
    """Return features, (2 * patients, 16), and patients of two images each; a twentieth are near the centre (hubs)."""
    centres = generator.standard_normal((patients, 16)) * np.where(generator.random((patients, 1)) < 0.05, 0.5, spread)
    features = np.repeat(centres, 2, axis=0) + 0.6 * generator.standard_normal((2 * patients, 16))
    return 2 + features, np.repeat([f"{generator.integers(1 << 62)}" for _ in range(patients)], 2)


def memorisation_alarms(generator, variety, copied, duplicates):
    """Return whether each metric raises an alarm for 300 generated images, a share of them copies."""
    seen, unseen, other = (make_radiographs(generator, patients) for patients in (150, 150, 300))
    if variety != "full":  # images like those of half as many patients, or of ten
        chosen = generator.integers(300 if variety == "half" else 20, size=300)
        other = (other[0][chosen] + 0.3 * generator.standard_normal((300, 16)), other[1])
    generated = other[0][:300].copy()
    count = round(copied * 300)
    generated[:count] = seen[0][generator.integers(300, size=count)] + 0.05 * generator.standard_normal((count, 16))
    unseen[0][:duplicates] = seen[0][:duplicates]
    real, train = make_source("real", *unseen), make_source("train", *seen)
    source = make_source("synthetic", generated, [f"g{i}" for i in range(300)])
    weights = evaluation.patient_weights(source.patients, range(1 + evaluation.BOOTSTRAP_DRAWS))
    results = evaluation.Results([], {}, "", weights)
    evaluation.add_memorisation(results, source, real, train, ARGS)
    found = report.ResultFile({"results": results.rows})
    study = SimpleNamespace(evaluations={"lora": found, "base": report.ResultFile()})
    suspects = bool(report.find_excess(study, "lora", "memorisation_suspects"))
    return results.find("memorisation_nearer_train", key="low") > 0.5, suspects


def simulate_memorisation(runs):
    generator = np.random.default_rng(1)
    cases = [("full", 0, 0), ("half", 0, 0), ("collapsed", 0, 0), ("full", 0.2, 0), ("full", 0.5, 0), ("full", 0.5, 1)]
    for variety, copied, duplicates in cases:
        text = f"{variety} variety, {copied:.0%} copies, {duplicates} training images among the unseen"
        alarms = [memorisation_alarms(generator, variety, copied, duplicates) for _ in tqdm(range(runs), leave=False)]
        for name, share in zip(("nearer to training", "suspected copies"), np.mean(alarms, axis=0)):
            seen_again = copied == 0.5 and name == "suspected copies"
            check(f"{text}: {name}", share, 0.95 if seen_again else 0.0, 1.0 if copied else 0.04)


# ---------------------------------------------------------------------------------------------------------------------
# A perfect generator
# ---------------------------------------------------------------------------------------------------------------------


def make_patients(generator, name, patients, dim=16):
    """Return a Source of one to three images a patient, whose labels occur together and shift the features."""
    owner = np.repeat(np.arange(patients), generator.integers(1, 4, size=patients))
    labels = evaluation.CONDITIONS[:3]
    severity = generator.standard_normal((patients, 1))
    present = (generator.standard_normal((patients, 3)) + severity > 0.3)[owner]
    shifts = 1.5 * np.eye(3, dim)
    style = 0.5 * generator.standard_normal((patients, dim))[owner]
    features = present @ shifts + style + generator.standard_normal((len(owner), dim))
    marks = pd.DataFrame(present.astype(float), columns=labels)
    return make_source(name, features, [f"{name}{i}" for i in owner], marks)


def fid_and_floor(generator, pool, alone):
    """Return FID at n/2 of real images of other patients, and the floor's row; `alone`: with single findings."""
    real, other = make_patients(generator, "real", 400), make_patients(generator, "synthetic", 1200)
    labels = evaluation.CONDITIONS[:3]
    positive = other.table[labels].sum(axis=1)
    keep = (positive == 1 if alone else positive > 0).to_numpy()
    table = other.table[keep].reset_index(drop=True)
    args = SimpleNamespace(**vars(ARGS) | {"pool": pool})
    plan = SimpleNamespace(tables={"real": real.table, "synthetic": table}, labels=labels, warnings=[])
    sources = evaluation.make_sources(plan, args)
    sources["real"].features, sources["synthetic"].features = real.features, other.features[keep]
    results = evaluate([sources[name].sample("all") for name in ("real", "synthetic")], "fid_half_n")
    floor = next(row for row in results.rows if row["metric"] == "fid_real_halves_half_n")
    return results.find("fid_half_n"), floor


def simulate_perfect(runs):
    generator = np.random.default_rng(2)
    for pool in ("unique", "paper"):
        for alone in (False, True):
            found = [fid_and_floor(generator, pool, alone) for _ in tqdm(range(runs), pool, leave=False)]
            within = np.mean([floor["low"] <= fid <= floor["high"] for fid, floor in found])
            prompts = "prompts of single findings" if alone else "the prompts' combinations"
            check(f"perfect generator, --pool {pool}, {prompts}: FID within the floor's interval", within, 0.9)


SIMULATIONS = {"differences": simulate_differences, "downstream": simulate_downstream}
SIMULATIONS |= {"trainings": simulate_trainings, "memorisation": simulate_memorisation, "perfect": simulate_perfect}


def main(args):
    for name in args.what:
        SIMULATIONS[name](args.runs)
    print("\n".join(["", *failures]) if failures else "all within their bounds")
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=SIMULATIONS, default=SIMULATIONS)
    parser.add_argument("--runs", type=int, default=500, help="simulated experiments of each case")
    raise SystemExit(main(parser.parse_args()))
