# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib>=3.9", "numpy>=2.0", "pandas>=2.2.2", "pillow", "safetensors>=0.5", "scipy>=1.13"]
# ///
"""Report which fine-tuning strategies of a study differ, with the paper's Tables 1 to 4 and Figure 2.

    python launch/report.py --study study
    python launch/report.py --study study --rows lora dora bitfit difffit --output_dir study/report_peft

Reads runs/, samples/, evaluations/ and downstream/ in the study's folder, as launch/sweep.sh fills them. Writes
report.html (self-contained), report.csv (one value per line) and figure2.png. It computes no metrics; it only tests
whether two strategies differ: over their trainings or, if trained once, with the draws that the evaluations saved.
"""

import argparse
import base64
import html
import io
import json
import os
import re
import sys
from collections import Counter, namedtuple
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from scipy import stats

# Copied from sample.CONDITIONS
CONDITIONS = ["Cardiomegaly", "Lung Opacity", "Edema", "No Finding", "Pneumothorax", "Pleural Effusion"]
# The rows of Table 1: folder and name.
STRATEGIES = {
    "unet": "U-Net",
    "text_encoder": "Text Encoder",
    "vae": "VAE",
    "unet_text_encoder": "U-Net + Text Encoder",
    "unet_vae": "U-Net + VAE",
    "vae_text_encoder": "VAE + Text Encoder",
    "unet_vae_text_encoder": "U-Net + VAE + Text Encoder",
}
PEFT = {"lora": "LoRA", "dora": "DoRA", "bitfit": "BitFit", "difffit": "DiffFit"}
STRATEGIES |= PEFT
NAMES = STRATEGIES | {"base": "base model", "real": "real images"}
NUMBERS = {row: str(number) for number, row in enumerate(STRATEGIES, 1)}
SHORT = STRATEGIES | dict(zip(CONDITIONS, ["Ca", "Lo", "Ed", "Nf", "Pn", "Pe"]))  # column headings
FILES = {"runs": "training_summary.json", "samples": "metadata.csv"}
FILES |= {"evaluations": "generation_metrics.json", "downstream": "downstream_metrics.json"}
COSTS = ("trainable_parameters", "seconds_per_epoch")
SAMPLES, TILE, MAX_PROMPTS, PLOT_DPI = 2, 128, 6, 160
ALPHA = 0.05  # significance level, after Holm's correction

# The metrics that strategies are compared by: key in the JSON files, folder in the study, name, better direction, and
# what the floor stands for (real images, or a trivial predictor).
Measure = namedtuple("Measure", "metric part name arrow floor")
Measure.heading = property(lambda measure: f"{measure.name}\u00a0{measure.arrow}")
MEASURES = [
    Measure("fid", "evaluations", "FID", "↓", "real images, n/2"),
    Measure("class_consistency_auroc", "evaluations", "prompt AUROC", "↑", "real images"),
    Measure("auroc", "downstream", "downstream AUROC", "↑", "chance"),
    Measure("kid", "evaluations", "KID × 1000", "↓", "real images"),
    Measure("class_consistency", "evaluations", "class consistency, %", "↑", "real images"),
    Measure("vendi_ratio", "evaluations", "Vendi / real", "↑", "real images"),
    Measure("accuracy", "downstream", "downstream accuracy, %", "↑", "constant answer"),
]
# The answer rests on the first three. The others depend on a threshold or the share of positives, or reward noise.
NUM_DECIDING = 3
# (decimal places, factor) to show a metric with; (2, 1) for others.
UNITS = dict.fromkeys(["accuracy", "class_consistency", "colour_visible", "memorisation_nearer_train"], (1, 100))
UNITS |= dict.fromkeys(["memorisation_suspects", "memorisation_suspects_pixels"], (1, 100)) | {"kid": (2, 1000)}
UNITS |= dict.fromkeys(["trainable_parameters", "images_train", "images_val", "images_test"], (0, 1))
UNITS |= dict.fromkeys(["auroc", "auroc_by_group", "class_consistency_auroc", "ms_ssim"], (3, 1))
UNITS |= dict.fromkeys(["heldout_diffusion", "heldout_diffusion_change"], (4, 1)) | {"seconds_per_epoch": (1, 1)}
# Metrics between 0 and 1.
FRACTIONS = re.compile(r"accuracy|(class_consistency_)?auroc|auroc_by_group|class_consistency|colour_visible|memori.*")
# Phrases in the warnings of eval_generation.py that the report repeats.
SERIOUS = ("hardly vary", "10 times", "not shown to beat chance")
# Settings that should be the same in all rows: fields of the JSON files, but for samples columns of metadata.csv. The
# report warns of any that differ, and does not compare rows that differ in one of evaluations or downstream.
SHARED = {
    "runs": "images steps global_batch_size identity.data_fingerprint identity.base_fingerprint resolution "
    "resize_mode uncertain prompt_template mixed_precision device arguments.seed arguments.caption_dropout "
    "arguments.lr_scheduler arguments.lr_warmup_steps arguments.max_grad_norm arguments.adam_weight_decay "
    "arguments.snr_gamma arguments.noise_offset arguments.use_ema arguments.use_8bit_adam arguments.learning_rate "
    "arguments.unet_lr arguments.text_encoder_lr arguments.vae_lr arguments.vae_loss",
    "samples": "number seed guidance_scale num_inference_steps scheduler resolution prompt_template",
    "evaluations": "draws_id images.real.fingerprint images.train.fingerprint features.fingerprint "
    "classifier.fingerprint resolution resize_mode pool arguments.uncertain",
    "downstream": "draws_id settings.test settings.labels settings.num_train_images settings.arch settings.weights "
    "settings.resolution settings.num_train_epochs settings.learning_rate settings.train_batch_size "
    "settings.weight_decay settings.patience settings.rotation settings.translation settings.scale "
    "settings.brightness settings.horizontal_flip settings.mixed_precision settings.num_val_images "
    "settings.source_resolution settings.num_seeds settings.uncertain settings.shuffle_labels settings.weights_sha256",
}

# Table 2: positives in the order of CONDITIONS.
PAPER_SPLIT = {
    "train": (3173, 10269, 6447, 1801, 2196, 9001),
    "val": (1195, 4075, 2584, 722, 827, 3505),
    "test": (4515, 14658, 9210, 2591, 3027, 12972),
}
# Tables 3 and 4: FID, Vendi, class consistency and accuracy; the last two in % and in the order of CONDITIONS.
PAPER_VALUES = {
    "unet": (3.42, 5.65, (24.1, 10.7, 25.7, 91.6, 15.7, 21.6), (37.4, 48.8, 67.8, 90.9, 89.4, 51.5)),
    "unet_text_encoder": (6.57, 2.79, (11.0, 3.1, 8.2, 96.9, 9.99, 5.8), (77.9, 54.0, 67.8, 81.0, 89.4, 55.3)),
    "unet_vae": (7.46, 2.59, (12.1, 1.0, 0.7, 98.1, 48.0, 2.0), (15.7, 48.8, 67.5, 90.9, 89.4, 54.7)),
    "lora": (5.65, 2.64, (5.0, 0.5, 0.5, 98.9, 1.0, 1.8), (35.3, 47.6, 60.2, 75.8, 86.4, 53.6)),
    "dora": (5.72, 3.18, (8.3, 0.8, 0.7, 98.8, 0.9, 1.3), (80.6, 47.4, 52.9, 75.8, 89.3, 52.7)),
    "bitfit": (5.05, 5.89, (4.8, 12.6, 9.8, 86.4, 13.4, 5.0), (77.3, 50.9, 67.8, 90.9, 76.4, 54.5)),
}
PAPER_NOTES = [
    "Table 1: the text gives PEFT 61 to 70 seconds per epoch and full training 77 to 177, on four H100 GPUs.",
    "The text excludes models 3, 5, 6, 7 and 11, but 5 (U-Net + VAE) is in Tables 3 and 4, and 2 is in neither.",
    "FID: DoRA's is 5.72 in Table 3, 5.18 in the text. The text calls LoRA and DoRA competitive; BitFit's is lower.",
    "Class consistency: the U-Net's 25.7 is Edema's in Table 3, Lung Opacity's in the text. The text calls LoRA's and "
    "DoRA's for Pneumothorax (1.0 and 0.9) high.",
    "The text says U-Net outperforms PEFT; a PEFT row is higher in Vendi, two consistencies and three accuracies.",
    "Accuracy of U-Net + text encoder: 81.0 for No Finding in Table 4, 94.8 in the text. The text calls it highest "
    "nearly everywhere; it alone is highest in two of six columns.",
]


def paper_value(row, metric, label):
    """Return the paper's value, or None; shares are in %, and "all" is the mean of their labels."""
    value = dict(zip(("fid", "vendi", "class_consistency", "accuracy"), PAPER_VALUES.get(row, ()))).get(metric)
    if isinstance(value, tuple):  # by label
        return sum(value) / 6 if label == "all" else dict(zip(CONDITIONS, value)).get(label)
    return value if label == "all" else None


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fail
def fail(message):
    """Print a one-line error to stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, usage="%(prog)s [options]")
    flag = parser.add_argument_group("report").add_argument
    flag("--study", type=Path, default=Path("study"), help="folder that launch/sweep.sh filled")
    flag("--output_dir", type=Path, help="folder for the report (default: report/ in the study)")
    flag("--rows", nargs="+", choices=STRATEGIES, default=[*STRATEGIES], metavar="ROW", help="default: all rows")
    flag("--title", default="Which fine-tuning strategy for these radiographs?", help="heading of the report")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class ResultFile:
    """A JSON file's rows by (metric, label) and its draws, or the means of several `trainings`. It may be missing."""

    def __init__(self, info=None, draws=None):
        self.exists, self.info, self.draws, self.trainings = info is not None, info or {}, draws or {}, [self]
        self.rows = {(row["metric"], row["label"]): row for row in self.info.get("results", [])}

    def get(self, metric, label="all"):
        """Return a row that has a value, or None."""
        row = self.rows.get((metric, label))
        return row if row and row["value"] is not None else None

    def by_label(self, metric):
        """Return {label: row} of the rows of a metric that have a value, without "all"."""
        rows = {label: row for (name, label), row in self.rows.items() if name == metric and label != "all"}
        return {label: row for label, row in rows.items() if row["value"] is not None}

    def dig(self, path, default=None):
        """Return a nested field, e.g. "images.real.fingerprint"."""
        found = self.info
        for key in path.split("."):
            found = found.get(key, default) if isinstance(found, dict) else default
        return found


def read_results(path):
    """Read a JSON file and the draws next to it, or of metadata.csv the distinct values of each column."""
    if not path.is_file():
        return ResultFile()
    if path.suffix == ".csv":
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        settings = {name: ", ".join(table[name].unique()) for name in SHARED["samples"].split() if name in table}
        if path.with_name("sampling.json").is_file():
            settings |= json.loads(path.with_name("sampling.json").read_text(encoding="utf-8"))
        return ResultFile(settings | {"number": len(table), "table": table, "folder": path.parent})
    info, draws = json.loads(path.read_text(encoding="utf-8")), {}
    draws_path = path.with_name(path.stem.replace("_metrics", "_draws") + ".safetensors")
    if draws_path.is_file():
        with safe_open(draws_path, "np") as file:
            info["draws_id"] = (file.metadata() or {}).get("draws_id")
            draws = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return ResultFile(info, draws)


def read_trainings(folder, row):
    """Return the complete trainings of a row by their seed: the one in ROW first, then those in ROW_seedK."""
    names = {path.name for part in FILES for path in (folder / part).glob(f"{row}_seed*")}
    trainings, needed = {}, set()
    for name in [row, *sorted(names)]:
        training = {part: read_results(folder / part / name / file) for part, file in FILES.items()}
        method = training["runs"].info.get("method", row)
        if method != row:
            fail(f"{folder / 'runs' / name} is a run of {method}; name run folders after their method")
        parts = {part for part, results in training.items() if results.exists}
        needed = needed or parts
        if parts and parts >= needed:
            seed = str(training["runs"].dig("arguments.seed", name.removeprefix(row).removeprefix("_seed")))
            if seed in trainings:
                fail(f"{folder / 'runs' / name} has seed {seed}, as another training of {row} has; remove one")
            trainings[seed] = training
    return trainings


def merge_trainings(files):
    """Return the results of several trainings as one: means, with Student's t intervals over the trainings.

    Draw k is mean + (value of training k - mean) / sqrt(n), so that the standard deviation of the difference of two
    rows' draws is the standard error of their mean difference. A value that all trainings share keeps its interval.
    """
    if len(files) == 1 or not files[0].exists:
        return files[0]
    merged, root = ResultFile(files[0].info), len(files) ** 0.5
    merged.trainings = files
    for key, first in merged.rows.items():
        rows = [file.get(*key) for file in files]
        if None in rows:
            merged.rows[key] = first | dict.fromkeys(("value", "low", "high"))
            continue
        values = np.array([row["value"] for row in rows], dtype=float)
        mean, half = values.mean(), stats.t.ppf(0.975, len(files) - 1) * values.std(ddof=1) / root
        merged.draws["/".join(key)] = mean + (values - mean) / root
        if np.ptp(values) > 0:
            notes = dict.fromkeys([f"mean of {len(files)} trainings", *(row["note"] for row in rows if row["note"])])
            ends = (0, 1) if FRACTIONS.fullmatch(key[0]) else (-np.inf, np.inf)
            new = {"value": mean, "low": max(mean - half, ends[0]), "high": min(mean + half, ends[1])}
            merged.rows[key] = first | new | {"note": "; ".join(notes)}
            # Of the single trainings, for find_excess and is_below_chance.
            if None not in [row["low"] for row in rows]:
                merged.rows[key]["max_value"] = max(values)
                merged.rows[key]["max_low"] = max(row["low"] for row in rows)
                merged.rows[key]["min_high"] = min(row["high"] for row in rows)
    return merged


class Study(namedtuple("Study", ["strategies", "missing", "num_trainings", "unused", *FILES])):
    """A study's results: for each part, {row: ResultFile}, with rows "base" and "real" besides the strategies."""

    def existing(self, part):
        return {row: found for row, found in getattr(self, part).items() if found.exists}

    def files(self, part):
        """Return (row, file) of each training."""
        return [(row, file) for row, results in self.existing(part).items() for file in results.trainings]

    def first(self, part):
        return next(iter(self.existing(part).values()), ResultFile())

    def labels(self, part, metric):
        """Return the labels that a metric has in any file of a part, the paper's first."""
        found = {label for results in self.existing(part).values() for name, label in results.rows if name == metric}
        return [label for label in CONDITIONS if label in found] + sorted(found - {"all", *CONDITIONS})


def read_study(folder, rows):
    """Read each row's trainings with the seeds that every row has or, if there are none, each row's first training."""
    rows = [row for row in STRATEGIES if row in rows]
    found = {row: read_trainings(folder, row) for row in [*rows, "base", "real"]}
    ran = [row for row in rows if found[row]]
    if not ran:
        fail(f"--study {folder}: no results for --rows; pass the folder that launch/sweep.sh filled")
    seeds = [seed for seed in found[ran[0]] if all(seed in found[row] for row in ran)]
    parts, unused = {part: {} for part in FILES}, []
    for row in [*ran, "base", "real"]:
        used = seeds if seeds and row in ran else [*found[row]][:1]
        unused += [f"{seed} of {NAMES[row]}" for seed in found[row] if seed not in used]
        for part, files in parts.items():
            files[row] = merge_trainings([found[row][seed][part] for seed in used] or [ResultFile()])
    return Study(ran, [row for row in rows if row not in ran], max(1, len(seeds)), unused, **parts)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons and answer
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """The difference between two rows in one metric and label, first minus second, in the unit of the JSON files."""

    first: str
    second: str
    label: str
    value: float
    low: float
    high: float
    p: float
    n: int  # draws
    p_holm: float = 1.0
    better: str | None = None  # None if not shown to differ
    worse: str | None = None


def compare_draws(value, other, draws, other_draws, paired=True):
    """Return (difference, low, high, p, n) of two values whose draws, (n,), are on the same images, patients or seeds.

    The standard error is the standard deviation of the differences draw by draw; the 95% interval and the two-sided p
    are Student's t with n - 1 degrees of freedom. Draws without any spread say nothing: p is 1. If not `paired`
    (several trainings against the base model, which has one), draws are independent, with Welch's degrees of freedom.
    """
    if paired and draws.shape == other_draws.shape:
        differences = (draws - other_draws)[np.isfinite(draws - other_draws)]
        error, n = differences.std(ddof=1), len(differences)
        degrees = n - 1
    else:
        variances, n = np.array([np.nanvar(values, ddof=1) for values in (draws, other_draws)]), len(draws)
        error = variances.sum() ** 0.5
        # With two trainings, Welch's intervals would cover 91 %.
        degrees = error**4 / np.sum(variances**2 / [n - 1, len(other_draws) - 1]) if n > 2 else 1
    difference = value - other
    half = stats.t.ppf(0.975, degrees) * error
    p = 2 * stats.t.sf(abs(difference) / error, degrees) if error > 1e-9 * abs(difference) else 1.0
    return difference, difference - half, difference + half, p, n


def correct_holm(pairs):
    """Set `p_holm` of a family of pairs (Holm, 1979)."""
    adjusted = 0.0
    for i, pair in enumerate(sorted(pairs, key=lambda pair: pair.p)):
        adjusted = max(adjusted, min(1.0, (len(pairs) - i) * pair.p))
        pair.p_holm = adjusted


def are_comparable(one, other, measure, label):
    """Return whether two results have draws of a metric on the same images or patients, with the same settings."""
    files = one.trainings + other.trainings
    rows = [file.get(measure.metric, label) for file in files]
    if None in rows or len({row["n"] for row in rows}) > 1 or one.dig("draws_id") is None:
        return False
    if any(len(find_values(enumerate(files), path)) > 1 for path in SHARED[measure.part].split()):
        return False
    draws = [results.draws.get(f"{measure.metric}/{label}", np.empty(0)) for results in (one, other)]
    if len(one.trainings) != len(other.trainings):
        return min(map(len, draws)) > 1
    return draws[0].shape == draws[1].shape and np.isfinite(draws[0] - draws[1]).sum() > 1


class Comparison(namedtuple("Comparison", "measure pairs")):
    """All pairs of rows in one measure, overall and by label; the base model always comes second."""

    def of(self, label="all", *rows):
        """Return the pairs of a label that include all these rows."""
        return [pair for pair in self.pairs if pair.label == label and {*rows} <= {pair.first, pair.second}]

    def compared(self, label="all"):
        """Return the strategies that were compared with another."""
        return {row for pair in self.of(label) if pair.second != "base" for row in (pair.first, pair.second)}

    def leaders(self, label="all"):
        """Return the compared strategies that no other row beats, in Table 1's order."""
        unbeaten = self.compared(label) - {pair.worse for pair in self.of(label)}
        return [row for row in STRATEGIES if row in unbeaten]


def further_measures(study):
    """Return a Measure of FID for each further network of eval_generation.py's --features."""
    metrics = [metric for results in study.existing("evaluations").values() for metric, _ in results.rows]
    names = [name for name in dict.fromkeys(metrics) if name.startswith("fid@") and not name.endswith(VARIANTS)]
    return [Measure(name, "evaluations", f"FID by {name.removeprefix('fid@')}", "↓", "real images") for name in names]


def compare_measure(study, measure):
    """Compare all rows in a measure, with one Holm correction over the overall pairs and one over those by label."""
    files, pairs = getattr(study, measure.part), []
    for label in ["all", *study.labels(measure.part, measure.metric)]:
        for first, second in combinations([*study.strategies, "base"], 2):
            if are_comparable(files[first], files[second], measure, label):
                values = [files[row].get(measure.metric, label)["value"] for row in (first, second)]
                draws = [files[row].draws[f"{measure.metric}/{label}"] for row in (first, second)]
                paired = len(files[first].trainings) == len(files[second].trainings)
                pairs.append(Pair(first, second, label, *compare_draws(*values, *draws, paired)))
    correct_holm([pair for pair in pairs if pair.label == "all"])
    correct_holm([pair for pair in pairs if pair.label != "all"])
    for pair in pairs:
        if pair.p_holm < ALPHA:
            first_is_better = (pair.value < 0) == (measure.arrow == "↓")
            pair.better, pair.worse = (pair.first, pair.second) if first_is_better else (pair.second, pair.first)
    return Comparison(measure, pairs)


def join_words(words, last="and"):
    """Return "A, B and C"."""
    words = list(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def join_names(rows):
    return join_words(NAMES[row] for row in rows)


def format_number(value, digits):
    """Return a number as text, with a typographic minus and no negative zero."""
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def format_setting(value):
    """Return a setting as text, but only the first eight digits of a fingerprint."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    digest = re.search("[0-9a-f]{40,64}$", text)
    return digest[0][:8] if digest else text


def describe_pair(pair, metric):
    """Return a Cell: "lower by 21.6" or "not shown to differ", with the interval (of the decrease, if "lower by")."""
    (digits, scale), lower = UNITS.get(metric, (2, 1)), bool(pair.better) and pair.value < 0
    values = (-pair.value, -pair.high, -pair.low) if lower else (pair.value, pair.low, pair.high)
    size, low, high = (format_number(scale * value, digits) for value in values)
    words = f"{'lower' if lower else 'higher'} by {size}" if pair.better else "not shown to differ"
    return Cell(words, f"({low} to {high})", grey=not pair.better)


def write_lead(study, deciding):
    """Return the first sentence of the answer, and the strategies it names, which no other row beats."""
    leaders = {c.measure.name: c.leaders() for c in deciding if c.compared()}
    if not leaders:
        text = "No strategies could be compared with each other"
        for row in study.strategies:
            better = [c.measure.name for c in deciding for pair in c.of("all", row, "base") if pair.better == row]
            text += f"; {NAMES[row]} beats the base model in {join_words(better)}" if better else ""
        return f"{text}.", []
    common = [row for row in STRATEGIES if all(row in rows for rows in leaders.values())]
    if len(common) == 1:
        alone = [name for name, rows in leaders.items() if rows == common]
        if len(alone) == len(leaders):
            return f"{join_names(common)} leads: it alone is unbeaten in {join_words(leaders)}.", common
        text = f"{join_names(common)} leads: no other strategy beats it in {join_words(leaders, 'or')}"
        return (f"{text}; in {join_words(alone)} it alone is unbeaten." if alone else f"{text}."), common
    if common:
        return f"{join_names(common)} lead together: no strategy beats them in {join_words(leaders, 'or')}.", common
    unbeaten = {}
    for name, rows in leaders.items():
        unbeaten.setdefault(join_names(rows) or "only the base model", []).append(name)
    unbeaten = "; ".join(f"{rows} in {join_words(names)}" for rows, names in unbeaten.items())
    named = [row for row in STRATEGIES if any(row in rows for rows in leaders.values())]
    return f"No strategy leads in every metric; unbeaten: {unbeaten}.", named


def is_below_chance(found):
    """Return whether an AUROC and its interval are below 0.5; of several trainings, the mean and one's interval."""
    return found["low"] is not None and found["value"] < 0.5 and found.get("min_high", found["high"]) < 0.5


def labels_at_chance(results):
    """Return the labels that the judging classifier is not shown to tell from others on real images."""
    real = results.by_label("class_consistency_auroc_real")
    return [label for label, row in real.items() if row["low"] is not None and row["low"] <= 0.5]


def find_excess(study, row, metric):
    """Return the share of a row's images as text if it is well above its floor, "" if not, None if unknown."""
    found, base = study.evaluations[row].get(metric), study.evaluations["base"].get(metric)
    if not found or found["low"] is None:
        return None
    floor = found["floor"] or 0.0
    if base and metric.startswith("memorisation"):
        floor = max(floor, base["value"])  # the base model has not seen the training images
    excess = found.get("max_low", found["low"]) > max(2 * floor, 0.005)
    share = f"{100 * found.get('max_value', found['value']):.1f} % of images"
    share += " in one training" if "max_value" in found else ""
    share += f", base model {100 * base['value']:.1f} %" if base else ""
    return share if excess else ""


def check_strategy(study, row, deciding):
    """Return what each check has against a strategy: a text, "" for nothing, None if it could not be checked."""
    with_base = [(c.measure.name, pair) for c in deciding for pair in c.of("all", row, "base")]
    not_better = [name for name, pair in with_base if pair.better != row]
    aurocs = study.evaluations[row].by_label("class_consistency_auroc")
    accuracies = study.downstream[row].by_label("accuracy")
    told = study.evaluations[row].dig("warnings", None)
    chance = [text for text in told or [] if "to beat chance" in text] + labels_at_chance(study.evaluations[row])
    below = [f"{label} {found['value']:.2f}" for label, found in aurocs.items() if is_below_chance(found)]
    constant = [label for label, found in accuracies.items() if "CONSTANT" in (found["note"] or "")]
    beaten = [pair.label for c in deciding for pair in c.pairs if pair.worse == row and pair.label != "all"]
    same_answer = "CONSTANT classifiers, which give all test images the same answer"
    return {
        "not shown to beat the base model": ", ".join(not_better) if with_base else None,
        "suspected copies": find_excess(study, row, "memorisation_suspects"),
        "suspected copies by pixels": find_excess(study, row, "memorisation_suspects_pixels"),
        "visible tint": find_excess(study, row, "colour_visible"),
        "prompts answered below chance": ", ".join(below) if aurocs else None,
        same_answer: ", ".join(constant) if accuracies else None,
        "features that hardly vary": told and "; ".join(text for text in told if "hardly vary" in text),
        "a classifier at chance": None if told is None else "; ".join(chance),
        "another row is better for some labels, see the table Label by label": ", ".join(dict.fromkeys(beaten)),
    }


def write_reservations(study, leaders, deciding):
    """Return the answer's second sentence, on what the checks have against the leaders, and a list of the details."""
    leaders = leaders or study.strategies
    checks, found, details, unknown = [check_strategy(study, row, deciding) for row in leaders], [], [], []
    for name in checks[0]:
        short, texts = name.split(",")[0], {row: check[name] for row, check in zip(leaders, checks) if check[name]}
        if texts:
            found.append(f"{name} ({join_names(texts)})" if len(leaders) > 1 else name)
            details.append(f"{short}: {'; '.join(f'{NAMES[row]} ({text})' for row, text in texts.items())}")
        if any(check[name] is None for check in checks):
            unknown.append(short)
    if study.num_trainings == 1:
        found.append("each strategy was trained once, which cannot say which is better in general")
    if unknown:
        found.append(f"not checked: {', '.join(unknown)}")
    return f"Reservations: {'; '.join(found) or 'none'}.", details


def find_values(files, path):
    """Return {value as text: the rows that have it} of a setting, from pairs of (row, file)."""
    found = {}
    for row, file in files:
        value = file.dig(path, "absent")
        if value != "absent":
            found.setdefault(format_setting(value), {})[row] = None
    return found


def find_differences(study, part):
    """Return the SHARED settings in which the rows differ, e.g. "steps 300 (U-Net) and 500 (LoRA)"."""
    found = []
    for path in SHARED[part].split():
        name = path.removeprefix("arguments.").removeprefix("settings.")
        files = [(row, file) for row, file in study.files(part) if row != "real"]
        if name.endswith("_lr"):  # of a component, which other rows do not train
            files = [(row, file) for row, file in files if name.removesuffix("_lr") in row]
        values = find_values(files, path)
        if len(values) > 1 and not (path == "arguments.seed" and study.num_trainings > 1):
            found.append(f"{name} {join_words(f'{value} ({join_names(rows)})' for value, rows in values.items())}")
    return found


def find_warnings(study, deciding):
    """Return a sentence for each thing that makes rows incomparable or values meaningless."""
    titles = {"runs": "The trainings differ in", "samples": "The samples differ in"}
    for part in ("evaluations", "downstream"):
        titles[part] = f"Rows are not compared where they differ in these settings of {part}:"
    differences = {title: find_differences(study, part) for part, title in titles.items()}
    found = [f"{title} {'; '.join(settings)}." for title, settings in differences.items() if settings]
    if study.unused:
        unused = join_words(study.unused)
        found.append(f"Ignored, since not every strategy has a complete training with that seed: seed {unused}.")
    files = [file for part in titles for _, file in study.files(part)]
    seeds = {file.dig(path) for file in files for path in ("arguments.split_seed", "settings.split_seed")} - {None}
    if len(seeds) > 1:
        found.append(f"Patients were split by seeds {join_words(map(str, seeds))}: test patients may be in training.")
    evaluations = study.files("evaluations")
    wrong = {row: None for row, file in evaluations if file.info.get("name", row).split("_seed")[0] != row}
    if wrong:
        found.append(f"The evaluations of {join_names(wrong)} are not of the study's samples.")
    chance = labels_at_chance(study.first("evaluations"))
    if chance:
        text = f"The classifier is not shown to beat chance on real images of {join_words(chance)}"
        found.append(f"{text}: prompt AUROC and class consistency mean nothing there.")
    texts = dict.fromkeys(text for _, file in evaluations for text in file.dig("warnings") or [])
    found += [f"Warning: {text}." for text in texts if any(phrase in text for phrase in SERIOUS)]
    for comparison in deciding:
        absent = [row for row in study.strategies if row not in comparison.compared()]
        if absent and len(study.strategies) > 1:
            found.append(f"Not compared with other strategies in {comparison.measure.name}: {join_names(absent)}.")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Plots and Figure 2
# ---------------------------------------------------------------------------------------------------------------------


def encode(save, **options):
    """Return the bytes of the PNG that a picture's save or a figure's savefig writes."""
    buffer = io.BytesIO()
    save(buffer, format="png", **options)
    return buffer.getvalue()


def finish_plot(figure, axis, measure, xlabel):
    axis.set_title(measure.heading, fontsize=10, fontweight="bold", loc="left")
    axis.set_xlabel(xlabel, fontsize=8)
    axis.tick_params(which="both", labelsize=8)
    return encode(figure.savefig, dpi=PLOT_DPI, metadata={"Software": None})


def plot_forest(study, comparison):
    """Return a PNG of each strategy's difference to the base model and its 95% interval, or None."""
    measure, files = comparison.measure, getattr(study, comparison.measure.part)
    pairs = [pair for pair in comparison.of() if pair.second == "base"]
    if not pairs:
        return None
    scale = UNITS.get(measure.metric, (2, 1))[1]
    base = scale * files["base"].get(measure.metric)["value"]
    figure = Figure(figsize=(4.2, 1.3 + 0.28 * len(pairs)), layout="constrained")
    axis, rows = figure.subplots(), range(len(pairs))
    low, middle, high = scale * np.array([(pair.low, pair.value, pair.high) for pair in pairs]).T
    # FID's floor is that of two halves of the real images. It is stored with fid_half_n, because FID depends on n.
    floor = (files[pairs[0].first].get("fid_half_n" if measure.metric == "fid" else measure.metric) or {}).get("floor")
    ends = [0.0, *low, *high] + ([] if floor is None else [scale * floor - base])
    margin = 0.06 * (max(ends) - min(ends) or 1.0)
    left, right = min(ends) - margin, max(ends) + margin
    if floor is not None:
        # Shade what is as good as real images, or no better than a trivial predictor.
        above, x = "real" in measure.floor and measure.arrow == "↑", scale * floor - base
        color = "#d8ecd8" if "real" in measure.floor else "#dcdcdc"
        axis.axvspan(x, right if above else left, color=color, linewidth=0)
        side = "right" if above or x > (left + right) / 2 else "left"
        axis.text(x, len(pairs) - 0.55, f" {measure.floor} ", fontsize=7, color="0.3", ha=side)
    axis.hlines(rows, low, high, color="#1f4e79", linewidth=2)
    faces = ["#1f4e79" if pair.better else "white" for pair in pairs]
    axis.scatter(middle, rows, 36, facecolors=faces, edgecolors="#1f4e79", zorder=3)
    same_labels = measure.metric == "fid" or study.labels(measure.part, measure.metric) == CONDITIONS
    for y, pair in enumerate(pairs):
        paper = paper_value(pair.first, measure.metric, "all")
        if paper is not None and same_labels:
            x = min(max(paper - base, left + margin / 3), right - margin / 3)
            axis.plot(x, y, "D" if x == paper - base else "<" if x < 0 else ">", color="#c55a11", markersize=5)
    axis.axvline(0, color="0.2", linewidth=1)
    axis.set(xlim=(left, right), ylim=(len(pairs) - 0.5, -0.5))
    axis.set_yticks(rows, [NAMES[pair.first] for pair in pairs])
    axis.secondary_xaxis("top", functions=(lambda x: x + base, lambda x: x - base)).tick_params(labelsize=8)
    return finish_plot(figure, axis, measure, "difference to the base model (top: value)")


def plot_cost(study, measure, cost):
    """Return a PNG of a measure and its 95% interval against a training cost, None for fewer than two rows."""
    figure, scale = Figure(figsize=(3.1, 2.6), layout="constrained"), UNITS.get(measure.metric, (2, 1))[1]
    axis, files = figure.subplots(), getattr(study, measure.part)
    found = {row: files[row].get(measure.metric) for row in study.strategies}
    found = {row: values for row, values in found.items() if values and values["low"] is not None}
    rows = sorted(found, key=lambda row: -found[row]["value"])
    gaps = [np.inf, *-np.diff([found[row]["value"] for row in rows]), np.inf]
    for i, row in enumerate(rows):
        costs = [result["value"] for (metric, _), result in study.runs[row].rows.items() if metric == cost]
        if any(costs):
            x, y, low, high = sum(costs), *(scale * found[row][key] for key in ("value", "low", "high"))
            axis.plot([x, x], [low, high], color="#9db7d1", linewidth=2)
            axis.plot(x, y, "s" if row in PEFT else "o", color="#1f4e79")
            name = NAMES[row] if len(study.strategies) < 5 else NUMBERS[row]
            offset = (6, 4 if gaps[i] >= gaps[i + 1] else -9)  # away from the nearest other row
            axis.annotate(name, (x, y), offset, textcoords="offset points", fontsize=8)
    if cost == "trainable_parameters":
        axis.set_xscale("log")
    axis.margins(x=0.25, y=0.1)
    return finish_plot(figure, axis, measure, cost.replace("_", " ")) if len(axis.texts) > 1 else None


def draw_figure_2(study):
    """Return a picture of each row's first samples by prompt, which is named without the prompts' common beginning."""
    samples, pictures, line = study.existing("samples"), {}, 20
    samples = {row: samples[row].info for row in ("base", *study.strategies) if row in samples}
    counts = Counter(prompt for info in samples.values() for prompt in info["table"]["prompt"])
    prompts = [prompt for prompt, _ in counts.most_common(MAX_PROMPTS)]
    start = os.path.commonprefix(prompts).rfind(" ") + 1 if len(prompts) > 1 else 0  # noqa: RUF071
    for prompt in prompts:
        picture = Image.new("RGB", (SAMPLES * (TILE + 2) + 6, line + len(samples) * (TILE + line)), "white")
        pen = ImageDraw.Draw(picture)
        title = " ".join(prompt[start:].split())[:60]  # prompts may be reports
        width = pen.textlength(title, ImageFont.load_default(16))
        pen.text((0, 0), title, "black", ImageFont.load_default(min(16, 15 * picture.width / width)))
        for y, (row, info) in zip(range(2 * line, picture.height, TILE + line), samples.items()):
            pen.text((0, y - line + 2), NAMES[row], "#444444", ImageFont.load_default(14))
            chosen = info["table"][info["table"]["prompt"] == prompt]
            chosen = chosen.iloc[chosen["index"].astype(int).argsort(kind="stable")[:SAMPLES]]
            for i, name in enumerate(chosen["file_name"]):
                with Image.open(info["folder"] / name) as image:
                    tile = image.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
                    picture.paste(tile, (i * (TILE + 2), y))
        pictures[prompt[start:]] = picture
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# Tables and page
# ---------------------------------------------------------------------------------------------------------------------

# `detail` is the interval, `paper` the paper's value, `flag` a remark; grey if not shown to be above the floor.
Cell = namedtuple("Cell", "text detail paper flag grey", defaults=("", "", "", False))
Table = namedtuple("Table", "title header rows lead", defaults=("",))
REAL, VAE = ("real images", "_real"), ("real images through the VAE", "_vae")
VARIANTS = ("_real", "_baseline", "_vae")
# Part of the study, title, columns as "heading:metric" (* for a column per label, @ for one per network of features),
# and any reference rows: a name and a suffix of the metrics.
TABLES = [
    (
        "runs",
        "Table 1. Trained parameters, cost, and held-out loss (which does not rank strategies)",
        "*:trainable_parameters|seconds per epoch:seconds_per_epoch|memory, GiB:peak_memory_gib|"
        "held-out loss:heldout_diffusion|its change:heldout_diffusion_change",
    ),
    ("evaluations", "Table 3. FID, Vendi, consistency (%)", "FID ↓:fid|Vendi ↑:vendi|*:class_consistency", REAL, VAE),
    ("evaluations", "Table 3b. Prompt AUROC", "mean:class_consistency_auroc|*:class_consistency_auroc", REAL),
    (
        "evaluations",
        "Table 3c. Variety, colour and copies",
        "FID at n/2:fid_half_n|KID × 1000:kid|Vendi / real:vendi_ratio|MS-SSIM ↓:ms_ssim|precision:precision|"
        "recall:recall|density:density|coverage:coverage|visible tint, %:colour_visible|"
        "nearer to training, %:memorisation_nearer_train|suspected copies, %:memorisation_suspects|"
        "copies by pixels, %:memorisation_suspects_pixels",
        ("real images, or no copying", "_floor"),
    ),
    ("evaluations", "Table 3d. FID by other features", "@:fid", VAE),
    ("downstream", "Table 4. Downstream accuracy, %", "*:accuracy", ("constant answer", "_floor")),
    ("downstream", "Table 4b. Downstream AUROC", "mean:auroc|*:auroc|gain over chance / real:auroc_of_reference"),
    ("downstream", "Table 4c. Downstream AUROC by group", "*:auroc_by_group"),
]


def number_cell(row, metric, paper=None, flag="", grey=False):
    """Return the cell of a result row, with only the paper's value if the row has none."""
    digits, scale = UNITS.get(metric, (2, 1))
    paper = "" if paper is None else f"{paper:,.{digits}f}"
    if not row or row["value"] is None:
        return Cell("", "", paper)
    ends = [format_number(scale * row[key], digits) for key in ("low", "high") if row[key] is not None]
    separator = " to " if any("−" in end for end in ends) else "–"
    return Cell(format_number(scale * row["value"], digits), separator.join(ends), paper, flag, grey)


def row_cell(study, part, row, metric, label):
    """Return the cell of a row in a table, flagged or grey if its value is not shown to be better than its floor."""
    results = getattr(study, part)[row]
    found, flag, grey = results.get(metric, label), "", False
    if found and found["low"] is not None:
        # Accuracy against a constant answer, class consistency against the images of other prompts.
        gains = {"accuracy": "accuracy_gain", "class_consistency": "class_consistency_margin"}
        gain = results.get(gains.get(metric), label)
        grey = bool(gain) and gain["low"] is not None and gain["low"] <= 0
        if metric in ("auroc", "class_consistency_auroc"):
            grey, flag = found["low"] <= 0.5, "below chance" if is_below_chance(found) else ""
        elif metric == "accuracy" and "CONSTANT" in (found["note"] or ""):
            flag = "CONSTANT"
        elif metric.startswith(("memorisation_suspects", "colour_visible")) and find_excess(study, row, metric):
            flag = "above floor"
        elif metric == "auroc_by_group":
            counts = re.search(r"(\d+) of (\d+) labels", found["note"] or "")
            flag = counts[0] if counts and counts[1] != counts[2] else ""
    return number_cell(found, metric, paper_value(row, metric, label), flag, grey)


def metric_table(study, part, title, headings, *references):
    """Return one of TABLES with the rows that ran."""
    columns, first, lines = [], study.first(part), []
    metrics = dict.fromkeys(metric for results in study.existing(part).values() for metric, _ in results.rows)
    for heading, metric in (column.split(":") for column in headings.split("|")):
        if heading == "*":
            columns += [(SHORT.get(label, label), metric, label) for label in study.labels(part, metric)]
        elif heading == "@":
            columns += [(measure.name, measure.metric, "all") for measure in further_measures(study)]
        elif metric in metrics:
            columns.append((heading, metric, "all"))
    for row in study.existing(part):
        cells = [row_cell(study, part, row, metric, label) for _, metric, label in columns]
        lines.append([Cell(NUMBERS.get(row, "")), Cell(NAMES[row]), *cells])
    for name, suffix in references:
        cells = []
        for _, metric, label in columns:
            found, row = first.get(metric + suffix, label), first.get(metric, label)
            if not found and row and suffix != "_vae":  # floors are without the VAE
                found = {"value": row["floor"], "low": None, "high": None}
            cells.append(number_cell(found, metric))
        if any(cell.text for cell in cells):
            lines.append([Cell(""), Cell(name), *cells])
    return Table(title, ["#", "model", *(heading for heading, _, _ in columns)], lines if columns else [])


def split_table(study):
    """Return Table 2, from the first run and the first evaluation."""
    parts, lines = {"train": "runs", "val": "runs", "test": "evaluations"}, []
    labels = [label for name, part in parts.items() for label in study.labels(part, f"images_{name}")]
    for label in dict.fromkeys(labels):
        cells = []
        for name, part in parts.items():
            paper = dict(zip(CONDITIONS, PAPER_SPLIT[name])).get(label)
            cells.append(number_cell(study.first(part).get(f"images_{name}", label), f"images_{name}", paper))
        lines.append([Cell(label), *cells])
    return Table("Table 2. Images with each finding", ["finding", "training", "validation", "test"], lines)


def pair_table(title, study, comparisons, lead=""):
    """Return the table of every pair of rows in some measures."""
    lines = []
    for first, second in combinations([*study.strategies, "base"], 2):
        cells = []
        for comparison in comparisons:
            (pair,) = comparison.of("all", first, second) or [None]
            cells.append(describe_pair(pair, comparison.measure.metric) if pair else Cell(""))
        if any(cell.text for cell in cells):
            lines.append([Cell(f"{NAMES[first]} against {NAMES[second]}"), *cells])
    return Table(title, ["pair", *(c.measure.heading for c in comparisons)], lines, lead)


def label_table(study, comparisons):
    """Return the table of the strategies that no other row beats, by label."""
    lines = []
    for label in dict.fromkeys(pair.label for c in comparisons for pair in c.pairs if pair.label != "all"):
        lines.append([Cell(label)])
        for comparison in comparisons:
            leaders, nobody = comparison.leaders(label), "only the base model" if comparison.compared(label) else ""
            lines[-1].append(Cell("all" if leaders == study.strategies else join_names(leaders) or nobody))
    return Table("Label by label", ["label", *(c.measure.heading for c in comparisons)], lines, LABELS_LEAD)


SAMPLES_LEAD = "The first of each prompt. The study's folder has more in samples/ROW/.contact_sheets."
FOREST_LEAD = (
    "Dots: difference to the base model with its 95 % interval, hollow where not shown to differ. Green: as good as "
    "real images (FID: as halves of n, which have a higher FID; Vendi: noise can be, too). Grey: no better than "
    "chance or a constant answer. Orange: the paper's value (arrow: beyond the axis). Prompt AUROC: how well a "
    "classifier of real images tells the samples of a prompt from the others. Downstream: classifiers trained on the "
    "samples, tested on real images."
)
TABLES_LEAD = (
    "Small: 95 % intervals. [In brackets]: the paper's values. Grey: not shown to differ, or not shown to be above "
    "chance, a constant answer or the images of other prompts. CONSTANT: the classifier gives all test "
    "images (99.5 % or more) the same answer. FID's interval is that of the expected FID at this number of images. "
    f"{', '.join(f'{SHORT[label]}: {label}' for label in CONDITIONS)}."
)
PAIRS_LEAD = (
    "First minus second, with the 95 % interval of this pair alone: over the choice of images or, with several "
    "trainings of each strategy, over trainings judged on the same images. Lower or higher: p < 0.05 after Holm's "
    "correction over the column; an interval that excludes 0 may not be enough."
)
COSTS_LEAD = "Squares: PEFT. Lines: 95 % intervals. Numbers, if any: rows of Table 1."
LABELS_LEAD = "Strategies that no other row beats, after Holm's correction over the column. report.csv has the pairs."
STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; color: #1c1e21; margin: 0; }
main { max-width: 1240px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { margin: 2rem 0 .5rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: 1rem; } summary { margin-top: .75rem; cursor: pointer; font-weight: 600; }
p, li { max-width: 60rem; margin: .35rem 0; } .scroll { overflow-x: auto; }
@media (max-width: 600px) { table { width: max-content; } }
.answer { background: #eef4fb; border-left: 5px solid #2b6cb0; padding: .5rem 1rem; }
.answer p:first-child { font-size: 1.15rem; font-weight: 600; }
.warnings { background: #fdf0ee; border-left: 5px solid #b3261e; padding: .25rem 1rem; margin: 1rem 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; } .pictures img { max-width: 100%; height: auto; }
.columns img { width: 9.5rem; flex: 1 1 9.5rem; max-width: 16rem; }
table { border-collapse: collapse; font-size: .8rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: top; overflow-wrap: normal; }
td { border-bottom: 1px solid #e1e4e8; } th { vertical-align: bottom; border-bottom: 2px solid #8a919a; }
td:first-child, td:nth-child(2) { white-space: nowrap; }
td span { display: block; white-space: nowrap; font-size: .72rem; color: #57606a; }
td .paper { color: #2a5d9f; } td .flag { color: #8a3b00; } td.grey { background: #e9ebee; }
"""


def html_cell(cell):
    spans = {"detail": cell.detail, "paper": cell.paper and f"[{cell.paper}]", "flag": cell.flag}
    spans = "".join(f' <span class="{name}">{html.escape(text)}</span>' for name, text in spans.items() if text)
    return f"<td{' class=grey' if cell.grey else ''}>{html.escape(cell.text)}{spans}</td>"


def html_table(table):
    title, lead = html.escape(table.title), f"<p>{html.escape(table.lead)}</p>" if table.lead else ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    body = "\n".join(f"<tr>{''.join(map(html_cell, row))}</tr>" for row in table.rows)
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{title}">'
    table_html = f"{box}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    if len(table.rows) > 15:
        table_html = f"<details><summary>{len(table.rows)} rows</summary>{table_html}</details>"
    return f"<h3>{title}</h3>{lead}{table_html}"


def html_notes(title, items):
    """Return a collapsed list, or "" for no items."""
    lines = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<details><summary>{title}</summary><ul>{lines}</ul></details>" if items else ""


def html_images(title, text, images, style=""):
    """Return a section of PNGs, {alt text: bytes or None}, or "" for no images."""
    tags = []
    for alt, png in images.items():
        if png:
            pixels = int.from_bytes(png[16:20], "big")  # the width, from the PNG's header
            source, width = base64.b64encode(png).decode(), pixels * 96 // PLOT_DPI
            tags.append(f'<img src="data:image/png;base64,{source}" alt="{html.escape(alt)}" width="{width}">')
    return f'<h2>{title}</h2><p>{text}</p><div class="pictures {style}">{"".join(tags)}</div>' if tags else ""


def list_sources(study):
    """Return the models, images and devices behind the values, e.g. "runs.device: NVIDIA H200"."""
    fields = "runs.base_model runs.device evaluations.features.source evaluations.images.real.all"
    values = {field: find_values(study.files(field.split(".")[0]), field.split(".", 1)[1]) for field in fields.split()}
    return [f"{field}: {', '.join(found)}" for field, found in values.items() if found]


def list_warnings(study):
    """Return each warning that the scripts recorded, with the rows that have it if they are one or two."""
    rows_by_text = {}
    for part, path in (("runs", "notes"), ("evaluations", "warnings"), ("downstream", "notes")):
        for row, file in study.files(part):
            for text in file.dig(path) or []:
                rows_by_text.setdefault(str(text), {})[row] = None
    return [text + (f" ({join_names(rows)})" if len(rows) < 3 else "") for text, rows in rows_by_text.items()]


def make_page(title, study, comparisons, answer, warnings, pictures):
    """Return the HTML page."""
    samples = {f"Samples of {prompt}": encode(image.save) for prompt, image in pictures.items()}
    forests = {f"{c.measure.name}, difference to the base model": plot_forest(study, c) for c in comparisons}
    pairs = [(measure, cost) for measure in MEASURES if measure.metric in ("fid", "auroc") for cost in COSTS]
    costs = {f"{measure.name} against {cost}": plot_cost(study, measure, cost) for measure, cost in pairs}
    table_1, *others = [metric_table(study, *table) for table in TABLES]
    usual, further = comparisons[: len(MEASURES)], comparisons[len(MEASURES) :]
    verdicts = [pair_table("Pair by pair", study, usual, PAIRS_LEAD)]
    verdicts += [pair_table("Pair by pair, other features", study, further)]
    verdicts += [label_table(study, comparisons[:NUM_DECIDING])]
    tables = [*verdicts, table_1, split_table(study), *others]
    sources = find_values(study.files("evaluations"), "features.source")
    features = f"FID and the like are of features by {', '.join(sources)}." if sources else ""
    lead, reservations, details = answer
    answer_html = f"<p>{html.escape(lead)}</p><p>{html.escape(reservations)}</p>{html_notes('Details', details)}"
    problems = "".join(f"<p>{html.escape(text)}</p>" for text in warnings)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>',
        f'<body><main><h1>{html.escape(title)}</h1><div class="answer">{answer_html}</div>',
        f'<div class="warnings" role="alert">{problems}</div>' if problems else "",
        f"<p>Not run: {join_names(study.missing)}.</p>" if study.missing else "",
        html_images("Figure 2. Samples", SAMPLES_LEAD, samples, "columns"),
        html_images("Against the base model", FOREST_LEAD, forests),
        html_images("Quality against cost", COSTS_LEAD, costs),
        f"<h2>Tables</h2><p>{TABLES_LEAD} {html.escape(features)}</p>",
        *(html_table(table) for table in tables if table.rows),
        html_notes("Where the paper contradicts itself", PAPER_NOTES),
        html_notes("Models and images behind the values", list_sources(study)),
        html_notes("Warnings of the scripts", list_warnings(study)),
        '<p>The paper: TehraniNasab, Kumar, Arbel, <a href="https://arxiv.org/abs/2508.14931">Pixels Under '
        "Pressure</a>, 2025.</p></main></body></html>\n",
    ]
    return "\n".join(filter(None, parts))


def list_values(study, comparisons):
    """Return the table of report.csv: every value and every pair, in the unit of the JSON files."""
    lines = []
    for table, part in (("1", "runs"), ("3", "evaluations"), ("4", "downstream")):
        for row, results in study.existing(part).items():
            for (metric, label), found in results.rows.items():
                paper = paper_value(row, metric, label)
                if paper is not None and metric in ("class_consistency", "accuracy"):
                    # A fraction, as in the JSON files. The paper does not print the mean.
                    paper = None if label == "all" else round(paper / 100, 4)
                number = "2" if metric.startswith("images_") else table
                lines.append(found | {"table": number, "row": row, "paper": paper})
    for comparison in comparisons:
        for pair in comparison.pairs:
            line = {"table": "pairs", "row": f"{pair.first} - {pair.second}", "metric": comparison.measure.metric}
            lines.append(line | vars(pair))
    fields = "table row metric label value low high n floor p p_holm paper note".split()
    return pd.DataFrame(lines, columns=fields, dtype=object)


def main(args):
    study = read_study(args.study, args.rows)
    comparisons = [compare_measure(study, measure) for measure in [*MEASURES, *further_measures(study)]]
    deciding = comparisons[:NUM_DECIDING]
    lead, leaders = write_lead(study, deciding)
    if study.num_trainings > 1 and any(comparison.pairs for comparison in deciding):
        lead = f"{lead.removesuffix('.')}, over {study.num_trainings} trainings of each strategy."
    reservations, details = write_reservations(study, leaders, deciding)
    warnings = find_warnings(study, deciding)
    pictures = draw_figure_2(study)
    output_dir = args.output_dir or args.study / "report"
    output_dir.mkdir(parents=True, exist_ok=True)
    page = make_page(args.title, study, comparisons, (lead, reservations, details), warnings, pictures)
    (output_dir / "report.html").write_text(page, encoding="utf-8")
    list_values(study, comparisons).to_csv(output_dir / "report.csv", index=False)
    if pictures:
        figure = np.hstack([np.asarray(picture) for picture in pictures.values()])
        Image.fromarray(figure).save(output_dir / "figure2.png")
    print(lead, reservations, *(f"  - {text}" for text in details), *warnings, sep="\n")
    print(f"report: {output_dir / 'report.html'}")


if __name__ == "__main__":
    main(parse_args())
