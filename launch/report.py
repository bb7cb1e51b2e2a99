"""Turn the JSON files of a study into one report: the paper's Tables 1 to 4 and Figure 2, and which strategies differ.

    python launch/report.py --study study
    python launch/report.py --study study --rows lora dora bitfit difffit --output_dir study/report_peft
    python launch/report.py --study study --real_csv CheXpert-v1.0/train.csv --title "Eleven strategies, 20,000 images"

Reads runs/, samples/, evaluations/ and downstream/ in the study's folder. Writes report.html (one file, nothing to load),
report.md, report.csv (every figure, one a line, in the unit that the scripts wrote) and figure2.png. It computes no metric: it
puts the scripts' rows of results side by side. What was not run is shown as not run.
"""

import argparse
import base64
import contextlib
import csv
import hashlib
import html
import io
import itertools
import json
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ----------------------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------------------

# Copied from train_full.LABELS
LABELS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
# Copied from sample.CONDITIONS
CONDITIONS = ["Cardiomegaly", "Lung Opacity", "Edema", "No Finding", "Pneumothorax", "Pleural Effusion"]
# Copied from train_full.DEFAULT_TABLES
DEFAULT_TABLES = ["CheXpert-v1.0/train.csv", "CheXpert-v1.0-small/train.csv"]
# Copied from train_full.SPLIT_FRACTIONS
SPLIT_FRACTIONS = {"train": 0.353, "val": 0.141, "test": 0.506}
# Copied from train_full.LABEL_VALUES
LABEL_VALUES = {"": math.nan, "1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0}
# Copied from eval_generation.ABBREVIATIONS
ABBREVIATIONS = {
    "Cardiomegaly": "Ca", "Lung Opacity": "Lo", "Edema": "Ed", "No Finding": "Nf", "Pneumothorax": "Pn", "Pleural Effusion": "Pe",
}  # fmt: skip
# Copied from eval_generation.FEW_IMAGES
FEW_IMAGES = 1024
# Table 1: folder, name, what is trained.
STRATEGIES = {
    "unet": ("U-Net", "U-Net"),
    "text_encoder": ("Text Encoder", "text encoder"),
    "vae": ("VAE", "VAE"),
    "unet_text_encoder": ("U-Net + Text Encoder", "U-Net, text encoder"),
    "unet_vae": ("U-Net + VAE", "U-Net, VAE"),
    "vae_text_encoder": ("VAE + Text Encoder", "VAE, text encoder"),
    "unet_vae_text_encoder": ("U-Net + VAE + Text Encoder", "U-Net, VAE, text encoder"),
    "lora": ("LoRA", "low-rank matrices beside the U-Net's attention projections"),
    "dora": ("DoRA", "the same with magnitudes"),
    "bitfit": ("BitFit", "every bias of the U-Net"),
    "difffit": ("DiffFit", "biases, norms and branch scales of the U-Net"),
}
NUMBERS = {row: number for number, row in enumerate(STRATEGIES, 1)}
PEFT = ("lora", "dora", "bitfit", "difffit")
# Names of the rows beside the strategies.
OTHERS = {"base": "base model, untouched", "real": "real images"}
FILES = {
    "runs": ("training_summary.json", ("train_full.py", "train_peft.py")),
    "evaluations": ("generation_metrics.json", ("eval_generation.py",)),
    "downstream": ("downstream_metrics.json", ("eval_downstream.py",)),
}
# What two evaluations must have in common before their sets of images compare.
SAME_IMAGES = ["real images (fingerprint)", "features (fingerprint)", "resolution", "resize mode", "pooling", "number of images n"]
# Two samples of each condition, 128 pixels a side, as the paper's Figure 2 has it.
SAMPLES, TILE, GAP = 2, 128, 2

# ----------------------------------------------------------------------------------------------------------------------
# The paper's figures
# ----------------------------------------------------------------------------------------------------------------------

PAPER_TITLE = "Pixels Under Pressure: Exploring Fine-Tuning Paradigms for Foundation Models in High-Resolution Medical Imaging"
PAPER_LINK = "https://arxiv.org/abs/2508.14931"
# Positives in Table 2: training, validation, test. The rows of the three parts are not printed; they are the sizes of the split
# that the authors published.
PAPER_SPLIT = {
    "Cardiomegaly": (3173, 1195, 4515), "Lung Opacity": (10269, 4075, 14658), "Edema": (6447, 2584, 9210),
    "No Finding": (1801, 722, 2591), "Pneumothorax": (2196, 827, 3027), "Pleural Effusion": (9001, 3505, 12972),
}  # fmt: skip
PAPER_TEST_IMAGES = 28_655
# FID, Vendi, then class consistency in per cent in the order of CONDITIONS.
PAPER_GENERATION = {
    "unet": (3.42, 5.65, 24.1, 10.7, 25.7, 91.6, 15.7, 21.6),
    "unet_text_encoder": (6.57, 2.79, 11.0, 3.1, 8.2, 96.9, 9.99, 5.8),
    "unet_vae": (7.46, 2.59, 12.1, 1.0, 0.7, 98.1, 48.0, 2.0),
    "lora": (5.65, 2.64, 5.0, 0.5, 0.5, 98.9, 1.0, 1.8),
    "dora": (5.72, 3.18, 8.3, 0.8, 0.7, 98.8, 0.9, 1.3),
    "bitfit": (5.05, 5.89, 4.8, 12.6, 9.8, 86.4, 13.4, 5.0),
}
# Accuracy in per cent in the order of CONDITIONS.
PAPER_DOWNSTREAM = {
    "unet": (37.4, 48.8, 67.8, 90.9, 89.4, 51.5),
    "unet_text_encoder": (77.9, 54.0, 67.8, 81.0, 89.4, 55.3),
    "unet_vae": (15.7, 48.8, 67.5, 90.9, 89.4, 54.7),
    "lora": (35.3, 47.6, 60.2, 75.8, 86.4, 53.6),
    "dora": (80.6, 47.4, 52.9, 75.8, 89.3, 52.7),
    "bitfit": (77.3, 50.9, 67.8, 90.9, 76.4, 54.5),
}
# What the paper prints in two ways, or says of a cell that the cell does not bear out.
FOOTNOTES = {
    "parameters": 'The paper\'s text: "full U-Net training approaches that utilize between 83.7 million and 98.3 million parameters". '
    "That cannot be: 83.7 million is the VAE alone (83,653,863), the U-Net alone has 859,520,964, and U-Net with text encoder has "
    "982,581,444, ten times 98.3 million.",
    "excluded": 'The paper leaves out "models # 3, 5, 6, 7 and 11" for "consistently poor image quality". By its own Table 1, number 5 is '
    "VAE + U-Net, which has rows in its Tables 3 and 4; number 2, the text encoder alone, is missing from that list, has no row, and is "
    "named in the same sentence. So 2, 3, 6, 7 and 11 must be meant.",
    "difffit": "What the authors' published code calls DiffFit adds a full-size update to every linear and convolution weight (859 million "
    "parameters) and drops it again on loading, so the paper's verdict on DiffFit is open.",
    "seconds": 'The paper gives "61-70 seconds per epoch" for PEFT and "77-177" for full training on four 80 GB H100 GPUs, without saying '
    "which row took how long.",
    "dora_fid": "5.72 in the paper's Table 3, 5.18 in its text.",
    "bitfit_fid": "The text names LoRA and DoRA as the PEFT methods of competitive FID; BitFit's is lower than both.",
    "unet_edema": 'The text gives 25.7 for "Lung Opacity"; in Table 3 that is Edema, and Lung Opacity is 10.7.',
    "unet_best": 'The paper concludes that full U-Net training "outperforms all parameter-efficient methods across evaluation metrics"; in '
    "this cell of its own table at least one of them is better.",
    "pneumothorax": 'The text says that LoRA and DoRA "maintain high class consistency in major categories like No Finding and '
    'Pneumothorax"; Table 3 has 1.0 and 0.9 for Pneumothorax.',
    "digits": "Printed with two decimals, unlike all others of the column.",
    "no_finding": "81.0 in the paper's Table 4, 94.8 in its text.",
    "highest": 'The text says "highest accuracy across nearly all disease categories"; in Table 4 this row alone is highest for Lung Opacity '
    "and Pleural Effusion, shares the highest for Edema and Pneumothorax, and is not highest here.",
    "transfer": 'The text calls this "robust cross-domain transfer"; the figure is below always answering no (No Finding 90.96 %, '
    "Pneumothorax 89.44 %).",
    "constant": "Equals what giving the same answer for every image scores on the paper's test set (its decimals are cut, not rounded), as "
    "13 of its 36 cells do; 34 of the 36 do not beat the more frequent answer.",
    "split": "The paper's counts are of a split by image (41 % of its test images are of training patients), with uncertain labels counted as "
    "positive.",
    "vae": "Where the VAE trains the latents change, so this diffusion loss compares badly with the other rows'.",
}  # fmt: skip
# (table, row, metric, label) of a paper's cell to its footnotes.
CELL_NOTES = {
    ("3", "dora", "fid", "all"): ["dora_fid"],
    ("3", "bitfit", "fid", "all"): ["bitfit_fid"],
    ("3", "unet", "vendi", "all"): ["unet_best"],
    ("3", "unet", "class_consistency", "Lung Opacity"): ["unet_edema", "unet_best"],
    ("3", "unet", "class_consistency", "Edema"): ["unet_edema"],
    ("3", "unet", "class_consistency", "No Finding"): ["unet_best"],
    ("3", "unet_text_encoder", "class_consistency", "Pneumothorax"): ["digits"],
    ("3", "lora", "class_consistency", "Pneumothorax"): ["pneumothorax"],
    ("3", "dora", "class_consistency", "Pneumothorax"): ["pneumothorax"],
    ("4", "unet", "accuracy", "Cardiomegaly"): ["unet_best"],
    ("4", "unet", "accuracy", "Lung Opacity"): ["unet_best"],
    ("4", "unet", "accuracy", "Pleural Effusion"): ["unet_best"],
    ("4", "unet_text_encoder", "accuracy", "Cardiomegaly"): ["highest"],
    ("4", "unet_text_encoder", "accuracy", "No Finding"): ["no_finding", "highest"],
    **{("4", row, "accuracy", label): ["transfer"] for row in ("lora", "dora") for label in ("No Finding", "Pneumothorax")},
}


def paper_value(table: str, row: str, metric: str, label: str) -> float | None:
    """The paper's figure for a cell in the unit of the scripts (shares, not per cent); None where it printed none."""
    if table == "3" and row in PAPER_GENERATION:
        values = {("fid", "all"): PAPER_GENERATION[row][0], ("vendi", "all"): PAPER_GENERATION[row][1]}
        values |= {("class_consistency", name): round(v / 100, 6) for name, v in zip(CONDITIONS, PAPER_GENERATION[row][2:])}
        return values.get((metric, label))
    if table == "4" and row in PAPER_DOWNSTREAM and metric == "accuracy":
        return {name: round(v / 100, 6) for name, v in zip(CONDITIONS, PAPER_DOWNSTREAM[row])}.get(label)
    if table == "2" and label in PAPER_SPLIT:
        return dict(zip(("images_train", "images_val", "images_test"), PAPER_SPLIT[label])).get(metric)
    return 1.59e6 if (table, row, metric, label) == ("1", "lora", "trainable_parameters", "unet") else None


def paper_notes(table: str, row: str, metric: str, label: str) -> list[str]:
    """The footnotes of a paper's cell."""
    notes = list(CELL_NOTES.get((table, row, metric, label), []))
    value = paper_value(table, row, metric, label)
    if table == "4" and value is not None:
        positives = PAPER_SPLIT[label][2]
        # The paper cuts decimals: 90.96 is printed as 90.9.
        same_answer = {count * 1000 // PAPER_TEST_IMAGES for count in (positives, PAPER_TEST_IMAGES - positives)}
        notes += ["constant"] if round(1000 * value) in same_answer else []
    return notes


# ----------------------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fail
def fail(message: str) -> NoReturn:
    """Ends the script with one sentence on stderr and exit status 2."""
    if os.environ.get("RANK", "0") != "0":
        # What all processes find is said by the first, after which the launcher ends the others; the rest is said here.
        time.sleep(5)
    # One line, whatever the name of a file or the text of a cell has in it.
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# Copied from train_full.OneLineParser
class OneLineParser(argparse.ArgumentParser):
    """argparse with errors in one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists every flag)")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        for text in sys.argv[1:] if args is None else args:
            # A path that is not in UTF-8 could be written to, but not be named in the results.
            try:
                str(text).encode()
            except UnicodeEncodeError:
                self.error(f"{ascii(text)}: not in UTF-8; pass another name")
        return super().parse_args(args, namespace)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is reported")
    group.add_argument("--study", type=Path, default=Path("study"), help="folder with runs/, samples/, evaluations/ and downstream/")
    group.add_argument("--output_dir", type=Path, default=None, help="folder for the report (STUDY/report)")
    group.add_argument(
        "--rows",
        nargs="+",
        choices=list(STRATEGIES),
        default=list(STRATEGIES),
        metavar="ROW",
        help=f"rows of Table 1 to show, any of {', '.join(STRATEGIES)} (all)",
    )
    group.add_argument("--title", default="Which fine-tuning strategy for these radiographs?", help="heading of the report")
    group = parser.add_argument_group("real images of Figure 2")
    group.add_argument("--real_csv", default=None, help="image table with the real images (the evaluations' own, if it is there)")
    group.add_argument("--image_root", default=None, help="folder that its paths are relative to (the evaluations' own)")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------------------
# Data: image tables
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.parse_labels
def parse_labels(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """The label columns of a table of strings as floats: 1, 0, -1, or NaN where the finding is not mentioned."""
    labels = pd.DataFrame(index=frame.index)
    for name in LABELS:
        if name not in frame:
            continue
        text = frame[name].str.strip()
        labels[name] = text.map(LABEL_VALUES)
        unknown = ~text.isin(LABEL_VALUES)
        if unknown.any():
            row = int(unknown.to_numpy().argmax())
            fail(f"{source}: data row {row + 1}, column {name!r}: {text.iloc[row]!r} is none of 1, 0, -1 and blank")
    return labels


# Copied from train_full.resolve_paths
def resolve_paths(paths: pd.Series, csv_path: Path, image_root: str | None) -> list[str]:
    """Absolute paths, from the first root under which one of the table's first thousand images exists.

    CheXpert's paths begin with the data set's own folder, which a resized copy often renames: so each root is tried with
    the path as it stands and without its first folder.
    """
    roots = [Path(image_root)] if image_root else [csv_path.parent, csv_path.resolve().parent.parent]
    for path, root, skip in itertools.product(paths[:1000], roots, (0, 1)):
        if os.path.isfile(root / Path(*Path(path).parts[skip:])):
            return [str((root / Path(*Path(p).parts[skip:])).absolute()) for p in paths]
    return [str((roots[0] / p).absolute()) for p in paths]


# Copied from train_full.load_image_table
def load_image_table(csv: str, image_root: str | None = None) -> pd.DataFrame:
    """Reads an image table: CheXpert's CSV, or any with a path column and some of its label columns.

    Returns a frame with `image` (absolute path), `name` (the path as written), `patient`, `frontal`, `prompt` ("" where the
    table has none) and the label columns found, in the table's order. Ends with exit status 2 on a table that is unusable.
    """
    try:
        with warnings.catch_warnings():
            # A row longer than the header would shift its neighbours' columns, or lose its end, with a warning only.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True, index_col=False, compression=None)
    except pd.errors.EmptyDataError:
        fail(f"{csv}: the file is empty; an image table needs a header and rows")
    except (pd.errors.ParserError, pd.errors.ParserWarning, UnicodeDecodeError) as error:
        fail(f"{csv}: not a CSV in UTF-8 ({' '.join(str(error).split())})")
    column = next((c for c in ("Path", "file_name") if c in frame), None)
    if column is None:
        fail(f"{csv}: no path column; name it Path (CheXpert) or file_name (imagefolder)")
    if not set(LABELS) & set(frame.columns) and "prompt" not in frame:
        fail(f"{csv}: no label column; expected any of {', '.join(LABELS)}")
    if frame.empty:
        fail(f"{csv}: no rows below the header")
    if (frame[column] == "").any():
        fail(f"{csv}: data row {int((frame[column] == '').to_numpy().argmax()) + 1} has no path in column {column!r}")
    view = frame.get("Frontal/Lateral", pd.Series("Frontal", index=frame.index))
    patient = frame[column].str.extract(r"(patient\d+)", expand=False)
    if "patient_id" in frame:
        patient = frame["patient_id"].where(frame["patient_id"] != "", patient)
    table = pd.DataFrame({
        "image": resolve_paths(frame[column], Path(csv), image_root),
        "name": frame[column],
        # An image of unknown origin counts as a patient of its own.
        "patient": patient.fillna(frame[column]),
        "frontal": view.str.strip().str.lower().str.startswith("frontal"),
        "prompt": frame.get("prompt", pd.Series("", index=frame.index)).str.strip(),
    })  # fmt: skip
    return table.join(parse_labels(frame, csv))


# Copied from train_full.assign_splits
def assign_splits(patients: pd.Series, seed: int) -> pd.Series:
    """train, val or test for each row: a hash of (seed, patient), so that it holds in every script and as rows are added."""
    bounds = np.cumsum(list(SPLIT_FRACTIONS.values()))

    def split_of(patient: str) -> str:
        digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
        return list(SPLIT_FRACTIONS)[min(np.searchsorted(bounds, int.from_bytes(digest[:8], "big") / 2**64, "right"), 2)]

    return patients.map({patient: split_of(patient) for patient in patients.unique()})


# ----------------------------------------------------------------------------------------------------------------------
# Data: the study's JSON files
# ----------------------------------------------------------------------------------------------------------------------

Number = (int, float)
Nothing = type(None)
# The fields that the report reads, and their types.
FORMS = {
    "row": {"metric": str, "label": str, "value": (*Number, Nothing), "low": (*Number, Nothing), "high": (*Number, Nothing),
            "n": (int, Nothing), "floor": (*Number, Nothing), "note": (str, Nothing)},
    "runs": {"method": str, "trainable_parameters": dict, "results": list, "base_model": str, "identity": dict, "images": int, "patients": int,
             "steps": int, "global_batch_size": int, "device": str, "arguments": dict, "versions": dict, "notes": list, "resolution": int, "resize_mode": str},
    "evaluations": {"name": str, "arguments": dict, "features": dict, "classifier": dict, "resolution": int, "resize_mode": str, "pool": str,
                    "images": dict, "versions": dict, "warnings": list, "results": list},
    "downstream": {"train_on": str, "settings": dict, "versions": dict, "images": dict, "notes": list, "results": list},
}  # fmt: skip
# The same of fields within these; they may be absent or null.
NESTED = {
    "runs": {"arguments": {"split_seed": int}},
    "evaluations": {"arguments": {"real_csv": str, "image_root": str, "real_split": str, "split_seed": int}, "images": {"real": dict, "synthetic": dict}},
    "downstream": {"settings": {"split_seed": int}},
}  # fmt: skip


def check_form(found: object, form: dict, where: str) -> None:
    """Ends with exit status 2 where a part of a JSON file is not as the scripts write it."""
    if not isinstance(found, dict):
        fail(f"{where}: not a JSON object, so not a file of these scripts; remove it and run the step again")
    for name, kinds in form.items():
        # JSON's true would pass for a number.
        if name not in found or not isinstance(found[name], kinds) or isinstance(found[name], bool):
            what = f"{name!r} is {type(found[name]).__name__}" if name in found else f"no {name!r}"
            fail(f"{where}: {what}, not as these scripts write it; remove the file and run the step again")


def read_result(path: Path, kind: str) -> dict | None:
    """One JSON file of a study, its form checked; None where there is none. Ends with exit status 2 on any other content."""
    if not os.path.isfile(path):
        return None

    def not_a_number(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number of JSON")

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=not_a_number)
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not valid JSON ({' '.join(str(error).split())[:100]}); remove it and run the step again")
    check_form(found, {"script": str}, str(path))
    if found["script"] not in FILES[kind][1]:
        fail(
            f"{path}: of {found['script'][:60]!r}, not of {' or '.join(FILES[kind][1])}; each script's results have a folder of their own in the study"
        )
    check_form(found, FORMS[kind], str(path))
    for name, form in NESTED[kind].items():
        there = {key: kinds for key, kinds in form.items() if found[name].get(key) is not None}
        check_form(found[name], there, f"{path}: {name}")
    for number, row in enumerate(found["results"], 1):
        check_form(row, FORMS["row"], f"{path}: row {number} of results")
        # A whole number of JSON may be too long for a float.
        if any(row[key] is not None and not abs(row[key]) < 1e300 for key in ("value", "low", "high", "floor")):
            fail(f"{path}: row {number} of results holds an infinite number; remove the file and run the step again")
    if kind == "runs" and found["method"] != path.parent.name:
        fail(f"{path}: a run of {found['method'][:60]!r} in the folder of {path.parent.name!r}; name run folders after their method")
    bad = [key for key, value in found.get("trainable_parameters", {}).items() if not isinstance(value, int)]
    if bad:
        fail(f"{path}: trainable_parameters of {bad[0]!r} is not a whole number; remove the file and run the step again")
    return found


class ResultFile:
    """The rows of results of one JSON file by metric and label, and the file's other fields; empty where there is no file."""

    def __init__(self, found: dict | None):
        self.found, self.there = found or {}, found is not None
        self.rows = {(row["metric"], row["label"]): row for row in self.found.get("results", [])}

    def get(self, metric: str, label: str = "all") -> dict | None:
        """The row, or None where it is missing or has no value."""
        row = self.rows.get((metric, label))
        return row if row and row["value"] is not None else None

    def why_not(self, metric: str, label: str = "all") -> str:
        """What stands in a cell that has no figure."""
        row = self.rows.get((metric, label))
        return (row["note"] or "n/a") if row else "n/a"


@dataclass
class Study:
    """What a study's folder holds; each part maps a row to its results."""

    folder: Path
    strategies: list[str]
    runs: dict[str, ResultFile]
    evaluations: dict[str, ResultFile]
    downstream: dict[str, ResultFile]
    settings: dict[str, dict[str, str]] = field(default_factory=dict)  # of the samples

    def first(self, part: str) -> ResultFile:
        """The first file of a part that is there."""
        return next((found for found in getattr(self, part).values() if found.there), ResultFile(None))

    def labels(self, part: str, metric: str) -> list[str]:
        """The labels of a metric in all files of a part: the paper's six in its order, then others; the paper's where there is none."""
        named = list(
            dict.fromkeys(
                label for found in getattr(self, part).values() for name, label in found.rows if name == metric and label != "all"
            )
        )
        return [name for name in CONDITIONS if name in named] + [name for name in named if name not in CONDITIONS] or CONDITIONS


def read_study(args: argparse.Namespace) -> Study:
    """Reads and checks all JSON files of a study. Ends with exit status 2 where there is none, or one is bad."""
    if not os.path.isdir(args.study):
        fail(f"--study {args.study}: no such folder; pass the one that launch/sweep.sh filled")
    strategies = [row for row in STRATEGIES if row in args.rows]
    extra = {"runs": [], "evaluations": ["base"], "downstream": ["base", "real"]}
    parts = {
        part: {row: ResultFile(read_result(args.study / part / row / name, part)) for row in [*strategies, *extra[part]]}
        for part, (name, _) in FILES.items()
    }
    if not any(found.there for part in parts.values() for found in part.values()):
        fail(
            f"--study {args.study}: no runs/*/training_summary.json, evaluations/*/generation_metrics.json or downstream/*/downstream_metrics.json of these rows in it"
        )
    return Study(args.study, strategies, **parts)


def name_of_row(row: str) -> str:
    return STRATEGIES[row][0] if row in STRATEGIES else OTHERS[row]


# ----------------------------------------------------------------------------------------------------------------------
# Are the rows comparable?
# ----------------------------------------------------------------------------------------------------------------------


def dig(found: dict, *path: str) -> object:
    """A nested field, or None."""
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def shown(value: object) -> str:
    """A setting for a reader: fingerprints shortened, numbers with thousands."""
    if isinstance(value, str) and len(value) >= 40:
        return value.removeprefix("xrv-").removeprefix("classifier-")[:8]
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    if isinstance(value, bool) or not isinstance(value, Number):
        return "none" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def listed(names: list[str], last: str = "and") -> str:
    """A, B and C."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else "none"


def difference(what: str, values: dict[str, object]) -> str | None:
    """Which rows have which value, in words; None where all have the same."""
    groups: dict[str, list[str]] = {}
    for row, value in values.items():
        groups.setdefault(json.dumps(value, sort_keys=True, default=str), []).append(row)
    if len(groups) < 2:
        return None
    parts = [
        f"{shown(values[rows[0]])} ({listed([name_of_row(row) for row in rows]) if len(rows) <= 3 else f'{len(rows)} rows'})"
        for rows in groups.values()
    ]
    return f"{what} {listed(parts)}"


def one_sentence(title: str, differences: list[str | None]) -> list[str]:
    """All differences of one kind as one sentence; no sentence where there is none."""
    found = [text for text in differences if text]
    return [f"{title}: {'; '.join(found)}."] if found else []


def budget_problems(study: Study) -> list[str]:
    """What differs between the trainings other than the strategy."""
    there = {row: run.found for row, run in study.runs.items() if run.there}
    fields = {
        "training images": ("images",), "steps": ("steps",), "global batch": ("global_batch_size",), "training data (fingerprint)": ("identity", "data_fingerprint"),
        "base model (fingerprint)": ("identity", "base_fingerprint"), "seed": ("identity", "seed"), "resolution": ("resolution",), "resize mode": ("resize_mode",),
        "uncertain labels": ("uncertain",), "prompts": ("prompt_template",), "caption dropout": ("identity", "caption_dropout"),
        "mixed precision": ("identity", "mixed_precision"), "schedule": ("identity", "lr_scheduler"), "warm-up steps": ("identity", "lr_warmup_steps"),
        "gradient norm": ("identity", "max_grad_norm"), "weight decay": ("identity", "adam_weight_decay"), "SNR gamma": ("identity", "snr_gamma"),
        "noise offset": ("identity", "noise_offset"), "EMA": ("identity", "use_ema"), "8-bit AdamW": ("identity", "use_8bit_adam"),
    }  # fmt: skip
    found = [difference(what, {row: dig(run, *path) for row, run in there.items()}) for what, path in fields.items()]
    for component in ("unet", "text_encoder", "vae"):
        rates = {
            row: dig(run, "arguments", f"{component}_lr")
            for row, run in there.items()
            if row not in PEFT and component in row_components(row)
        }
        found.append(difference(f"learning rate of the {component.replace('_', ' ')} in full training", rates))
    found.append(
        difference("learning rate of PEFT", {row: dig(run, "arguments", "learning_rate") for row, run in there.items() if row in PEFT})
    )
    vae_losses = {row: dig(run, "arguments", "vae_loss") for row, run in there.items() if row not in PEFT and "vae" in row_components(row)}
    found.append(difference("VAE loss", vae_losses))
    return one_sentence("Training budgets differ", found)


def row_components(row: str) -> list[str]:
    """unet_vae_text_encoder: U-Net, VAE and text encoder."""
    return [part for part in ("unet", "text_encoder", "vae") if part in row]


def generation_identity(found: ResultFile) -> dict[str, object]:
    """What two evaluations must have in common before their figures compare."""
    return {
        "real images (fingerprint)": dig(found.found, "images", "real", "fingerprint"),
        "features (fingerprint)": dig(found.found, "features", "fingerprint"),
        "classifier (fingerprint)": dig(found.found, "classifier", "fingerprint"),
        "resolution": dig(found.found, "resolution"), "resize mode": dig(found.found, "resize_mode"), "pooling": dig(found.found, "pool"),
        "uncertain labels": dig(found.found, "arguments", "uncertain"),
        "generated images": {name: count for name, count in (dig(found.found, "images", "synthetic") or {}).items() if name != "fingerprint"},
        "number of images n": (found.get("fid") or {}).get("n"),
    }  # fmt: skip


def downstream_identity(found: ResultFile) -> dict[str, object]:
    """The settings of a classifier's training and test; what it is trained on is the difference that is asked about."""
    names = {
        "test": "real test images (fingerprint)", "labels": "labels", "num_train_images": "training images", "num_val_images": "validation images",
        "arch": "network", "weights": "initial weights", "weights_sha256": "initial weights (fingerprint)", "resolution": "resolution", "num_train_epochs": "epochs",
        "patience": "patience", "train_batch_size": "batch", "learning_rate": "learning rate", "num_seeds": "seeds", "uncertain": "uncertain labels",
        "shuffle_labels": "shuffled labels",
    }  # fmt: skip
    return {what: dig(found.found, "settings", key) for key, what in names.items()}


def identity_problems(study: Study) -> dict[str, list[str]]:
    """What differs between the evaluations and between the downstream runs, in sentences, by part."""
    problems = {}
    for part, identity, title in (
        ("evaluations", generation_identity, "Generation was judged differently"),
        ("downstream", downstream_identity, "Downstream classifiers were made differently"),
    ):
        of_row = {row: identity(found) for row, found in getattr(study, part).items() if found.there}
        texts = [difference(what, {row: values[what] for row, values in of_row.items()}) for what in next(iter(of_row.values()), {})]
        problems[part] = one_sentence(title, texts)
    return problems


def seed_problems(study: Study) -> list[str]:
    """Training and test patients overlap where the scripts split them by different seeds."""
    seeds = {}
    for part, title in (("runs", "training"), ("evaluations", "the evaluation"), ("downstream", "the downstream classifier")):
        for row, found in getattr(study, part).items():
            seed = dig(found.found, "settings" if part == "downstream" else "arguments", "split_seed")
            if seed is not None:
                seeds.setdefault(seed, {})[title] = row
    if len(seeds) < 2:
        return []
    told = "; ".join(f"{seed} in {listed([f'{title} (such as {name_of_row(row)})' for title, row in where.items()])}" for seed, where in seeds.items())
    return [f"Patients were split by different seeds, so training patients may be among the test images: {told}."]


def sampling_problems(study: Study) -> list[str]:
    """What differs between the samples other than their model; and evaluations of other folders' images."""
    names = {
        "seed": "seed",
        "guidance_scale": "guidance",
        "num_inference_steps": "denoising steps",
        "scheduler": "scheduler",
        "resolution": "resolution",
        "images": "number of images",
    }
    found = [difference(what, {row: values.get(key) for row, values in study.settings.items()}) for key, what in names.items()]
    problems = one_sentence("Samples were drawn differently", found)
    wrong = [row for row, result in study.evaluations.items() if result.there and result.found["name"] != row]
    if wrong:
        problems.append(
            "The evaluations of " + listed([f"{name_of_row(row)} (of {study.evaluations[row].found['name']!r})" for row in wrong]) + " are not of the samples that the study has for them."
        )  # fmt: skip
    return problems


# ----------------------------------------------------------------------------------------------------------------------
# Which strategies differ?
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """What the intervals of one figure say of the strategies."""

    measure: str
    direction: str  # what the best is: lowest, highest
    figures: dict[str, dict]  # row of results by strategy, the best first
    digits: int
    base: dict | None = None
    gains: dict[str, dict] = field(default_factory=dict)  # difference to the base model by strategy, where it was taken
    chance: float | None = None
    reason: str = ""  # why nothing is compared

    @property
    def lower(self) -> bool:
        return self.direction == "lowest"

    def better(self, one: dict, other: dict) -> bool:
        """Beyond both intervals; intervals that touch do not differ."""
        return one["high"] < other["low"] if self.lower else one["low"] > other["high"]

    @property
    def best(self) -> str | None:
        return next(iter(self.figures), None)

    @property
    def leaders(self) -> list[str]:
        """The best, and what cannot be told from it."""
        return [row for row, figure in self.figures.items() if not self.better(self.figures[self.best], figure)]

    @property
    def behind(self) -> list[str]:
        return [row for row in self.figures if row not in self.leaders]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(better, worse) of all pairs that differ."""
        return [
            (one, other) for one, other in itertools.permutations(self.figures, 2) if self.better(self.figures[one], self.figures[other])
        ]

    @property
    def beat_base(self) -> list[str]:
        """By the interval of the difference where there is one, else by the two intervals."""
        better = {row: self.gains[row]["low"] > 0 if row in self.gains else self.better(self.figures[row], self.base) for row in self.figures if self.base}
        return [row for row in better if better[row]]

    @property
    def above_chance(self) -> list[str]:
        return [row for row, figure in self.figures.items() if self.chance is not None and figure["low"] > self.chance]


def has_interval(row: dict | None) -> bool:
    return bool(row) and row["value"] is not None and row["low"] is not None and row["high"] is not None


def compare(
    study: Study,
    part: str,
    measure: str,
    metric: str,
    label: str,
    direction: str,
    digits: int,
    needs: list[str],
    chance: float | None = None,
) -> Comparison:
    """Puts the strategies' figures in order; compares nothing where the rows differ in what the figure needs to have in common."""
    identity = generation_identity if part == "evaluations" else downstream_identity
    found = {row: getattr(study, part)[row] for row in study.strategies if has_interval(getattr(study, part)[row].get(metric, label))}
    figures = {row: result.get(metric, label) for row, result in found.items()}
    order = sorted(figures, key=lambda row: figures[row]["value"], reverse=direction != "lowest")
    comparison = Comparison(measure, direction, {row: figures[row] for row in order}, digits, chance=chance)
    if not figures:
        comparison.reason = "not measured for any strategy"
        return comparison
    apart = [what for what in needs if difference(what, {row: identity(result)[what] for row, result in found.items()})]
    if apart:
        return Comparison(measure, direction, {}, digits, chance=chance, reason=f"not compared, since the rows differ in {listed(apart)}")
    base, first = getattr(study, part)["base"], next(iter(found.values()))
    if has_interval(base.get(metric, label)) and all(identity(base)[what] == identity(first)[what] for what in needs):
        comparison.base = base.get(metric, label)
    gains = {row: result.get(f"{metric}_gain", label) for row, result in found.items()}
    comparison.gains = {row: gain for row, gain in gains.items() if has_interval(gain)}
    return comparison


def compare_all(study: Study) -> tuple[Comparison, Comparison, Comparison, Comparison]:
    """FID, Vendi, class consistency (its AUROC, which needs no threshold), downstream AUROC."""
    heads = ["classifier (fingerprint)", "resolution", "resize mode"]
    fid = compare(study, "evaluations", "FID", "fid", "all", "lowest", 2, SAME_IMAGES)
    vendi = compare(study, "evaluations", "Vendi score", "vendi", "all", "highest", 2, SAME_IMAGES)
    prompt = compare(study, "evaluations", "Following the prompt, AUROC", "class_consistency_auroc", "all", "highest", 3, heads, 0.5)
    settings = [
        "real test images (fingerprint)",
        "labels",
        "training images",
        "network",
        "initial weights",
        "resolution",
        "epochs",
        "shuffled labels",
    ]
    downstream = compare(study, "downstream", "Downstream AUROC", "auroc", "all", "highest", 3, settings, 0.5)
    return fid, vendi, prompt, downstream


def names(rows: list[str]) -> str:
    return listed([name_of_row(row) for row in rows])


def some(rows: list[str], of: list[str]) -> str:
    """Which of the rows, in as few words as say it."""
    others = [row for row in of if row not in rows]
    if not rows or not others:
        return "none" if not rows else "both" if len(of) == 2 else "all"
    return f"all but {names(others)}" if len(others) <= 2 < len(rows) else names(rows)


def beyond_the_best(one: Comparison) -> str:
    """What differs and what does not where the best is not among the two: each strategy once, with those that it is better than."""
    others = list(one.figures)[1:]
    beaten = {row: [worse for better, worse in one.pairs if better == row] for row in others}
    if len(others) < 2 or not one.pairs:
        return ""
    if sum(map(len, beaten.values())) == math.comb(len(others), 2):
        return f"{names(others)} all differ from each other"
    if len(others) > 3:
        return "which of the others differ stands below, pair by pair"
    told = [f"{name_of_row(row)} from {some(worse, [other for other in others if other != row])}" for row, worse in beaten.items() if worse]
    if not told:
        return f"{names(others)} do not differ from each other"
    return f"of the others these differ, the better first: {'; '.join(told)}; no other pair does"


def sentence_of(one: Comparison) -> str:
    """The best, what cannot be told from it, what is behind it, and who beats the base model and chance."""
    if len(one.figures) < 2:
        return f"{one.measure}: {one.reason or f'measured for {names(list(one.figures))} only'}."
    best, rest = f"{one.direction} for {name_of_row(one.best)} ({one.figures[one.best]['value']:.{one.digits}f})", one.leaders[1:]
    if not one.pairs:
        text = f"none of the {len(one.figures)} strategies differ beyond their intervals ({best})"
    elif not rest:
        text = f"{best}, beyond the intervals of all others"
    else:
        text = f"{best}, not distinguishable from {names(rest)}"
        text += f"; behind: {names(one.behind)}" if one.behind else ""
    further = beyond_the_best(one)
    text += f"; {further}" if further else ""
    if one.base:
        verb = (
            ("is more varied than" if len(one.beat_base) == 1 else "are more varied than")
            if one.chance is None and not one.lower
            else "beats"
            if len(one.beat_base) == 1
            else "beat"
        )
        text += f"; {some(one.beat_base, list(one.figures))} {verb} the base model ({one.base['value']:.{one.digits}f})"
    if one.chance is not None:
        text += f"; {some(one.above_chance, list(one.figures))} {'is' if len(one.above_chance) == 1 else 'are'} above chance"
    return f"{one.measure}: {text}."


def answer(study: Study, comparisons: tuple) -> list[str]:
    """In plain words: whether there is a winner; then a sentence for each figure."""
    fid, vendi, prompt, downstream = comparisons
    # A strategy that is no better than doing nothing leads nowhere.
    groups = {
        "FID": [row for row in fid.leaders if not fid.base or row in fid.beat_base],
        "following the prompt": [row for row in prompt.leaders if row in prompt.above_chance],
        "downstream AUROC": [row for row in downstream.leaders if row in downstream.above_chance],
    }
    rivals = {what: len(one.figures) for what, one in zip(groups, (fid, prompt, downstream))}
    judged = [what for what, count in rivals.items() if count > 1]
    unjudged = [what for what in rivals if what not in judged]
    common = [row for row in study.strategies if judged and all(row in groups[what] for what in judged)]
    if not judged:
        lead = "No strategy can be recommended: no figure was measured for two strategies in a comparable way."
    elif len(common) == 1 and all(groups[what] == common for what in judged):
        lead = f"{names(common)} is ahead of every other strategy, beyond the 95 % intervals, in {listed(judged)}."
    elif len(common) == 1:
        lead = f"No outright winner, but {names(common)} is the one strategy that no other beats, beyond the 95 % intervals, in {listed(judged)}."
    elif common:
        lead = f"No winner can be named: {names(common)} cannot be told apart as leaders, within the 95 % intervals, in {listed(judged)}."
    else:
        lead = f"No winner can be named: no strategy leads in {listed(judged)}{' at once' if len(judged) > 1 else ''}, allowing for the 95 % intervals."
    if judged and unjudged:
        lead += f" That leaves open {listed(unjudged)}, not compared."
    return [lead, *map(sentence_of, comparisons)]


def cautions(study: Study, fid: Comparison) -> list[str]:
    """What limits every comparison, in short sentences."""
    found = ["Each strategy was trained once: no interval here covers how much a second training would differ."]
    devices = difference("device", {row: run.found["device"] for row, run in study.runs.items() if run.there})
    found += [f"Seconds and memory do not compare between rows: {devices}."] if devices else []
    sizes = sorted({row["n"] for row in (result.get("fid") for result in study.evaluations.values()) if row and row["n"]})
    if sizes and sizes[0] < FEW_IMAGES:
        found.append(
            f"FID is of n = {listed([f'{n:,}' for n in sizes])} images, below {FEW_IMAGES:,}: the covariance is singular and the bias large."
        )
    if any(dig(result.found, "settings", "num_seeds") == 1 for result in study.downstream.values() if result.there):
        found.append("Downstream classifiers were trained with one seed, so their intervals do not cover how much training varies.")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The report's parts
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """One cell of a table. `flags` say in words what grey says by colour; `notes` name footnotes to the paper's figure."""

    text: str
    detail: str = ""  # the interval
    flags: list[str] = field(default_factory=list)
    grey: bool = False
    paper: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[Cell]]
    lead: str = ""
    key: list[str] = field(default_factory=list)


@dataclass
class Part:
    """A section: paragraphs, tables, lists and pictures in order."""

    title: str
    blocks: list = field(default_factory=list)


@dataclass
class Figure2:
    png: bytes
    alt: str
    caption: str


def number_cell(row: dict | None, digits: int, scale: float = 1.0, sign: bool = False, why: str = "n/a") -> Cell:
    """A figure with its interval, or why there is none."""
    if row is None or row["value"] is None:
        return Cell(why if len(why) <= 60 else "n/a")
    form = f"{{:{'+' if sign else ''},.{digits}f}}"
    # Adding 0 takes the sign from a rounded -0.0.
    value, low, high = (
        None if row[key] is None else form.format(round(scale * row[key], digits) + 0.0) for key in ("value", "low", "high")
    )
    return Cell(value, f"{low} to {high}" if low is not None and high is not None else "")


def with_paper(cell: Cell, table: str, row: str, metric: str, label: str, digits: int, scale: float = 1.0) -> Cell:
    """The paper's figure beside ours, with its footnotes."""
    value = paper_value(table, row, metric, label)
    if value is not None:
        printed = {("3", "unet_text_encoder", "Pneumothorax"): "9.99"}.get((table, row, label), f"{scale * value:,.{digits}f}")
        cell.paper, cell.notes = printed, paper_notes(table, row, metric, label)
    return cell


def first_cells(row: str, results: ResultFile, status: str) -> list[Cell]:
    """Number and name, with what is missing here and in the paper."""
    name = Cell(name_of_row(row), flags=[] if results.there else [status])
    if row in STRATEGIES and row not in PAPER_GENERATION:
        name.paper = "not reported"
    if name.paper or row == "unet_vae":
        name.notes = ["excluded", "difffit"] if row == "difffit" else ["excluded"]
    return [Cell(str(NUMBERS.get(row, ""))), name]


def status_of(study: Study, part: str, row: str) -> str:
    """not run, or run but without this part's results."""
    if getattr(study, part)[row].there:
        return ""
    return "not run" if part == "runs" or (row in STRATEGIES and not study.runs[row].there) else "not evaluated"


def change_cell(run: ResultFile, name: str) -> Cell:
    """A held-out loss before and after, and whether its change is beyond its interval."""
    before, after, change = (run.get(f"heldout_{name}{suffix}") for suffix in ("_start", "", "_change"))
    if not (before and after):
        return Cell(run.why_not(f"heldout_{name}"))
    cell = Cell(f"{before['value']:.4f} → {after['value']:.4f}")
    if change and has_interval(change):
        cell.detail = f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})"
        if change["high"] >= 0:
            cell.flags, cell.grey = ["no lower than at the start"], True
    return cell


def learning_rates(run: dict, row: str) -> str:
    arguments = run["arguments"]
    if row in PEFT:
        return shown(arguments.get("learning_rate"))
    names_of = {"unet": "U-Net", "text_encoder": "text encoder", "vae": "VAE"}
    return ", ".join(f"{names_of[part]} {shown(arguments.get(f'{part}_lr'))}" for part in row_components(row))


def table_1(study: Study) -> Table:
    """What was trained, at which cost, and what it did to the held-out loss."""
    header = [
        "#",
        "strategy",
        "parameters",
        "images",
        "steps",
        "global batch",
        "learning rate",
        "seconds per epoch",
        "peak memory, GiB",
        "held-out diffusion loss",
    ]
    rows = []
    for row in study.strategies:
        run, full = study.runs[row], row not in PEFT
        name = Cell(
            STRATEGIES[row][0],
            STRATEGIES[row][1],
            [status_of(study, "runs", row)] if not run.there else [],
            notes=["difffit"] if row == "difffit" else [],
        )
        parameters = Cell(f"{sum(run.found['trainable_parameters'].values()):,}" if run.there else "")
        # The paper says it of "full U-Net training".
        with_unet = full and "unet" in row_components(row)
        parameters.paper = "83.7 to 98.3 million" if with_unet else "1.59 million" if row == "lora" else "not reported"
        parameters.notes = ["parameters"] if with_unet else []
        seconds = number_cell(run.get("seconds_per_epoch"), 1, why="" if not run.there else run.why_not("seconds_per_epoch"))
        seconds.paper, seconds.notes = "77 to 177" if full else "61 to 70", ["seconds"]
        if not run.there:
            rows.append([Cell(str(NUMBERS[row])), name, parameters, *[Cell("")] * 4, seconds, Cell(""), Cell("")])
            continue
        found, loss = run.found, change_cell(run, "diffusion")
        loss.notes = ["vae"] if "vae" in row_components(row) else []
        rows.append([
            Cell(str(NUMBERS[row])), name, parameters, Cell(shown(found["images"])), Cell(shown(found["steps"])), Cell(shown(found["global_batch_size"])),
            Cell(learning_rates(found, row)), seconds, number_cell(run.get("peak_memory_gib"), 2, why=run.why_not("peak_memory_gib")), loss,
        ])  # fmt: skip
    return Table("Table 1. What was trained, and what it cost", header, rows, key=[
        "Held-out loss: before → after, and its change with the 95 % interval, on the same images, noise and timesteps. It does not rank strategies: judge by Tables 3 and 4.",
    ])  # fmt: skip


SPLIT_PARTS = {"images_train": ("runs", "training"), "images_val": ("runs", "validation"), "images_test": ("evaluations", "test")}


def split_counts(study: Study) -> dict[tuple[str, str], dict[str, dict]]:
    """(metric, label) to the rows of results with a count of the split, by the row that recorded it."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for metric, (part, _) in SPLIT_PARTS.items():
        for row, results in getattr(study, part).items():
            for (name, label), figure in results.rows.items():
                if name == metric and figure["value"] is not None:
                    found.setdefault((metric, label), {})[row] = figure
    return found


def table_2(study: Study) -> tuple[Table, list[str]]:
    """The split that was used, by finding; and where the rows disagree about it."""
    counts = split_counts(study)
    labels = [*CONDITIONS, *dict.fromkeys(label for _, label in counts if label not in CONDITIONS and label != "all"), "all"]
    rows, problems = [], []
    for label in labels:
        cells = [Cell("all images" if label == "all" else label)]
        for metric, (_, title) in SPLIT_PARTS.items():
            of_rows = {row: figure["value"] for row, figure in counts.get((metric, label), {}).items()}
            told = difference(f"{title} images{'' if label == 'all' else f' with {label}'}:", of_rows)
            problems += [f"The rows used different splits: {told}."] if told else []
            cell = Cell("the rows differ" if told else f"{next(iter(of_rows.values())):,}" if of_rows else "not recorded")
            value = paper_value("2", "", metric, label)
            cell.paper, cell.notes = ("" if value is None else f"{value:,}"), ([] if value is None else ["split"])
            cells.append(cell)
        rows.append(cells)
    lead = "Images with each finding in the split that was used. An image can have several. In training and validation, images without a positive finding are left out, since they have no prompt."
    return Table("Table 2. The split", ["finding", *(title for _, title in SPLIT_PARTS.values())], rows, lead), problems


def fid_cell(study: Study, row: str, base: dict | None) -> Cell:
    """FID, grey where it is not lower than the base model's beyond the intervals; reaching real images' own is good."""
    results = study.evaluations[row]
    cell = number_cell(results.get("fid"), 2, why=results.why_not("fid") if results.there else "")
    figure, gain, half, floor = (results.get(name) for name in ("fid", "fid_gain", "fid_half_n", "fid_real_halves_half_n"))
    apart = gain["low"] > 0 if has_interval(gain) else bool(base) and has_interval(figure) and figure["high"] < base["low"]
    if row != "base" and base and has_interval(figure) and not apart:
        cell.grey, cell.flags = True, ["no lower than the base model"]
    if has_interval(half) and has_interval(floor) and half["low"] <= floor["high"]:
        cell.flags.append("as low as real images")
    return cell


def consistency_cell(results: ResultFile, label: str) -> Cell:
    """The share that fires, grey where the head fires no more often than for the other prompts."""
    cell = number_cell(
        results.get("class_consistency", label), 1, 100, why=results.why_not("class_consistency", label) if results.there else ""
    )
    margin = results.get("class_consistency_margin", label)
    if results.get("class_consistency", label) and has_interval(margin) and margin["low"] <= 0:
        cell.grey, cell.flags = True, ["no more than for other prompts"]
    return cell


def base_for_fid(study: Study) -> dict | None:
    """The base model's FID where it compares with the strategies'."""
    return compare(study, "evaluations", "FID", "fid", "all", "lowest", 2, SAME_IMAGES).base


def table_3(study: Study) -> Table:
    """FID, Vendi and class consistency, with the floors of real images below."""
    labels, base, source = study.labels("evaluations", "class_consistency"), base_for_fid(study), study.first("evaluations")
    rows = []
    for row in [*study.strategies, "base"]:
        results = study.evaluations[row]
        figure = results.get("fid")
        cells = [
            *first_cells(row, results, status_of(study, "evaluations", row)),
            Cell(f"{figure['n']:,}" if figure and figure["n"] else ""),
        ]
        cells.append(with_paper(fid_cell(study, row, base), "3", row, "fid", "all", 2))
        cells.append(number_cell(results.get("fid_half_n"), 2, why=results.why_not("fid_half_n") if results.there else ""))
        cells.append(
            with_paper(
                number_cell(results.get("vendi"), 2, why=results.why_not("vendi") if results.there else ""), "3", row, "vendi", "all", 2
            )
        )
        cells += [with_paper(consistency_cell(results, label), "3", row, "class_consistency", label, 1, 100) for label in labels]
        rows.append(cells)
    if source.there:
        half, vendi, whole = source.get("fid_real_halves_half_n"), source.get("vendi"), source.get("fid")
        real = Cell(f"{vendi['floor']:.2f}" if vendi and vendi["floor"] is not None else "n/a")
        heads = [number_cell(source.get("class_consistency_real", label), 1, 100) for label in labels]
        rows.append(
            [
                Cell(""),
                Cell("real images", "against other patients' real images"),
                Cell(f"{whole['n']:,}" if whole and whole["n"] else ""),
                Cell("", "see half of n"),
                number_cell(half, 2),
                real,
                *heads,
            ]
        )
        through = [
            number_cell(source.get("fid_vae"), 2),
            number_cell(source.get("fid_half_n_vae"), 2),
            number_cell(source.get("vendi_vae"), 2),
        ]
        if source.get("fid_vae"):
            rows.append(
                [
                    Cell(""),
                    Cell("real images through the VAE"),
                    Cell(shown(source.get("fid_vae")["n"])),
                    *through,
                    *(number_cell(source.get("class_consistency_vae", label), 1, 100) for label in labels),
                ]
            )
    return Table(
        "Table 3. Are the images like real ones, varied, and what the prompt says?",
        ["#", "images", "n of FID", "FID ↓", "FID at half of n", "Vendi ↑", *(f"{ABBREVIATIONS.get(label, label)}, % ↑" for label in labels)], rows,
        "Class consistency: the share of a prompt's images for which the classifier's head fires at 0.5. 95 % intervals below each figure.",
        [
            "no lower than the base model (grey): the FID is not below the untouched base model's, beyond the interval of the difference, which is taken over the same images and so is narrower than the two intervals.",
            "as low as real images: at half of n the FID reaches that of real images against other patients' real images. Nothing can be expected to be lower.",
            ("no more than for other prompts (grey): the head fires no more often for its own prompt than for the others (margin of Table 3b not above 0), as "
            "with a model that ignores its prompt."),
            "Vendi above real images' is not better: noise is varied too.",
            *([", ".join(f"{ABBREVIATIONS[label]}: {label}" for label in labels if label in ABBREVIATIONS) + "."] if any(label in ABBREVIATIONS for label in labels) else []),
        ],
    )  # fmt: skip


def prompts_table(study: Study, title: str, metric: str, lead: str, chance: float, flag: str, digits: int, scale: float = 1.0) -> Table:
    """By label, whether the prompt shows; grey where a figure is not above chance, for real images too."""
    labels, rows = study.labels("evaluations", metric), []
    for row in [*study.strategies, "base", "real"]:
        results, suffix = (study.first("evaluations"), "_real") if row == "real" else (study.evaluations[row], "")
        cells = [
            Cell(str(NUMBERS.get(row, ""))),
            Cell(name_of_row(row), flags=[status_of(study, "evaluations", row)] if not results.there else []),
        ]
        for label in labels:
            figure = results.get(metric + suffix, label)
            cell = number_cell(
                figure, digits, scale, sign=chance == 0, why=results.why_not(metric + suffix, label) if results.there else ""
            )
            if has_interval(figure) and figure["low"] <= chance:
                cell.grey, cell.flags = True, [flag]
            cells.append(cell)
        rows.append(cells)
    unit = ", %" if scale == 100 else ""
    return Table(title, ["#", "images", *(f"{ABBREVIATIONS.get(label, label)}{unit} ↑" for label in labels)], rows, lead)


def pairs_table(study: Study, comparisons: tuple) -> Table:
    """Every pair of strategies: for each figure, which a strategy is better than and which it cannot be told from."""

    def cell(one: Comparison, row: str) -> Cell:
        if row not in one.figures or len(one.figures) < 2:
            return Cell("not compared")
        better = [other for other in study.strategies if (row, other) in one.pairs]
        level = [other for other in study.strategies if other in one.figures and other != row and not {(row, other), (other, row)} & set(one.pairs)]
        told = [f"{words} {', '.join(str(NUMBERS[other]) for other in rows)}" for words, rows in (("better than", better), ("level with", level)) if rows]
        return Cell("; ".join(told) or "worse than all")

    rows = [[Cell(str(NUMBERS[row])), Cell(name_of_row(row)), *(cell(one, row) for one in comparisons)] for row in study.strategies]
    return Table(
        "Pair by pair, beyond the 95 % intervals", ["#", "strategy", *(one.measure for one in comparisons)], rows,
        "By the numbers in the first column. Level with: the intervals overlap. Better in Vendi means more varied.",
    )  # fmt: skip


def images_table(study: Study) -> Table:
    """What Table 3 does not see: variety against real images, colour, and nearness to the training images."""
    columns = {
        "KID x 1000 ↓": ("kid", 1000, 2), "Vendi / real": ("vendi_ratio", 1, 2), "precision ↑": ("precision", 1, 3), "recall ↑": ("recall", 1, 3),
        "visible colour, % ↓": ("colour_visible", 100, 1), "nearer to training images, %": ("memorisation_nearer_train", 100, 1),
        "suspected copies, % (pixels)": ("memorisation_suspects_pixels", 100, 1),
    }  # fmt: skip
    rows, base = [], compare(study, "evaluations", "KID", "kid", "all", "lowest", 2, SAME_IMAGES).base
    for row in [*study.strategies, "base"]:
        results = study.evaluations[row]
        cells = [
            Cell(str(NUMBERS.get(row, ""))),
            Cell(name_of_row(row), flags=[] if results.there else [status_of(study, "evaluations", row)]),
        ]
        for metric, scale, digits in columns.values():
            figure = results.get(metric)
            cell = number_cell(figure, digits, scale, why=results.why_not(metric) if results.there else "")
            if metric == "kid" and row != "base" and base and has_interval(figure) and figure["high"] >= base["low"]:
                cell.grey, cell.flags = True, ["no lower than the base model"]
            if (
                metric.startswith(("memorisation", "colour"))
                and has_interval(figure)
                and figure["floor"] is not None
                # One image of many is not beyond chance, though the interval of a share above 0 never reaches 0.
                and figure["low"] > max(figure["floor"], 0.005)
            ):
                cell.flags = ["more than expected"]
            cells.append(cell)
        rows.append(cells)
    source, floors = study.first("evaluations"), []
    for metric, scale, digits in columns.values():
        figure = source.get(metric)
        floors.append(Cell("n/a" if not figure or figure["floor"] is None else f"{scale * figure['floor']:.{digits}f}"))
    if source.there:
        rows.append([Cell(""), Cell("expected of real images"), *floors])
    return Table(
        "Table 3d. Variety, colour and copies", ["#", "images", *columns], rows,
        "Visible colour: images with a tint that can be seen. Nearer to training images: share nearer to a training image than to as many of other patients (50 % is expected).",
        ["no lower than the base model (grey): the KID is not below the untouched base model's, beyond the intervals. Precision and recall are at half of n, like what is expected.",
         "more than expected: beyond the interval, more colour than real images have, or nearer to the training images than images of other patients are."],
    )  # fmt: skip


def table_4(study: Study) -> Table:
    """Accuracy of classifiers trained on each strategy's images, beside the constant predictor's."""
    labels, rows = study.labels("downstream", "accuracy"), []
    source = study.first("downstream")
    constants = [number_cell(source.get("constant_accuracy", label), 1, 100) for label in labels]
    if source.there:
        rows.append([Cell(""), Cell("floor: always the more frequent answer"), *constants])
    for row in [*study.strategies, "base", "real"]:
        results = study.downstream[row]
        cells = first_cells(row, results, status_of(study, "downstream", row))
        for label in labels:
            figure, gain = results.get("accuracy", label), results.get("accuracy_gain", label)
            cell = number_cell(figure, 1, 100, why=results.why_not("accuracy", label) if results.there else "")
            if figure and (
                gain["low"] <= 0 if has_interval(gain) else figure["floor"] is not None and (figure["low"] or 0) <= figure["floor"]
            ):
                cell.grey, cell.flags = True, ["not above the floor"]
            if figure and "constant" in (figure["note"] or "").lower():
                cell.flags = [figure["note"], *cell.flags]
            cells.append(with_paper(cell, "4", row, "accuracy", label, 1, 100))
        rows.append(cells)
    return Table(
        "Table 4. Accuracy of a classifier that is trained on these images and tested on real ones",
        ["#", "trained on images of", *(f"{ABBREVIATIONS.get(label, label)}, %" for label in labels)], rows,
        "Accuracy at 0.5 says little where a finding is rare: read Table 4b.",
        [
            "not above the floor (grey): no better than always giving the more frequent answer, beyond the interval of the difference.",
            "CONSTANT: the classifier gives at least 99.5 % of the images the same answer.",
            "In the paper, 34 of 36 cells do not beat the more frequent answer and 13 equal a constant predictor.",
        ],
    )  # fmt: skip


def auroc_table(study: Study) -> Table:
    """What needs no threshold, and the share of what real images reach."""
    labels, rows = study.labels("downstream", "auroc"), []
    for row in [*study.strategies, "base", "real"]:
        results = study.downstream[row]
        cells = [
            Cell(str(NUMBERS.get(row, ""))),
            Cell(name_of_row(row), flags=[] if results.there else [status_of(study, "downstream", row)]),
        ]
        for label in ["all", *labels]:
            figure = results.get("auroc", label)
            cell = number_cell(figure, 3, why=results.why_not("auroc", label) if results.there else "")
            if has_interval(figure) and figure["low"] <= 0.5:
                cell.grey, cell.flags = True, ["not above chance"]
            cells.append(cell)
        ratio = results.get("auroc_of_reference")
        cells.append(
            Cell("1 by definition")
            if row == "real" and results.there
            else number_cell(ratio, 3, why="no reference run" if results.there else "")
        )
        rows.append(cells)
    return Table(
        "Table 4b. The same classifiers without a threshold", ["#", "trained on images of", "mean AUROC ↑", *(f"{ABBREVIATIONS.get(label, label)} AUROC" for label in labels), "mean AUROC, share of the real images'"], rows,
        "AUROC at 0.5 is chance. The last column compares with as many real images: 1 means that synthetic images teach as much.",
    )  # fmt: skip


def verdict_table(study: Study, comparisons: tuple) -> Table:
    """One line per figure: who leads, who cannot be told from it, who is behind, who beats the base model."""
    rows = []
    for one in comparisons:
        if not one.figures:
            rows.append([Cell(one.measure), Cell(one.reason), *[Cell("")] * 4])
            continue
        best = one.figures[one.best]
        lead = number_cell(best, one.digits)
        lead.text = f"{name_of_row(one.best)} {lead.text}"
        rows.append([
            Cell(f"{one.measure}, {one.direction}", f"n = {best['n']:,}" if best["n"] else ""), lead, Cell(names(one.leaders[1:])), Cell(names(one.behind)),
            Cell(some(one.beat_base, list(one.figures)) if one.base else "not evaluated"), Cell(some(one.above_chance, list(one.figures)) if one.chance is not None else ""),
        ])  # fmt: skip
    pairs, differ = sum(math.comb(len(one.figures), 2) for one in comparisons), sum(len(one.pairs) for one in comparisons)
    key = [
        (f"Two strategies differ where their 95 % intervals do not overlap: {differ:,} of {pairs:,} pairs here. That is a careful rule: by chance alone it happens to 0.6 % of "
        "pairs with equally wide intervals, and to 5 % at most. With many pairs expect some by chance; nothing is corrected for their number."),
        "Higher Vendi means more varied, which noise is too: it does not decide the answer above.",
        "Following the prompt: AUROC of the classifier's head for images of its own prompt against those of the other prompts, mean of the labels.",
    ]  # fmt: skip
    return Table(
        "Who differs from the best, beyond the 95 % intervals",
        ["figure", "best", "not distinguishable from it", "behind it", "better than the base model", "above chance"],
        rows,
        "",
        key,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Figure 2
# ----------------------------------------------------------------------------------------------------------------------


def single_label(table: pd.DataFrame) -> pd.Series:
    """The label of rows that have one alone; "" for others."""
    positive = table.reindex(columns=LABELS).isin([1.0])
    return positive.idxmax(axis=1).where(positive.sum(axis=1) == 1, "")


def read_table(csv: str, image_root: str | None = None) -> pd.DataFrame:
    """An image table; one that cannot be read ends with exit status 2 too."""
    try:
        return load_image_table(csv, image_root)
    except OSError as error:
        fail(f"{csv}: cannot be read ({error.strerror})")


def sampled_images(study: Study, row: str) -> dict[str, list[str]]:
    """The first samples of each condition by index, and notes the samples' settings in the study."""
    path = study.folder / "samples" / row / "metadata.csv"
    if not os.path.isfile(path):
        return {}
    table = read_table(str(path))
    # As load_image_table reads it, so that the rows are the same.
    form = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "skipinitialspace": True, "index_col": False, "compression": None}
    settings = pd.read_csv(path, **form)
    names = ("seed", "guidance_scale", "num_inference_steps", "scheduler", "resolution")
    study.settings[row] = {name: ", ".join(settings[name].unique()) for name in names if name in settings} | {
        "images": f"{len(settings):,}"
    }
    index = pd.to_numeric(settings["index"], errors="coerce") if "index" in settings else pd.Series(range(len(settings)))
    table = table.assign(condition=single_label(table), order=index).sort_values("order", kind="stable")
    return {label: list(rows["image"][:SAMPLES]) for label, rows in table.groupby("condition", sort=False) if label}


def real_images(study: Study, args: argparse.Namespace, conditions: list[str]) -> tuple[dict[str, list[str]], str]:
    """The first frontal images of the test split with each condition, those with no other first; and a word about them.

    Ends with exit status 2 on a --real_csv that is unusable; a table that an evaluation names and that is gone is said.
    """
    arguments = study.first("evaluations").found.get("arguments", {})
    table_path = args.real_csv or arguments.get("real_csv") or next(filter(os.path.isfile, DEFAULT_TABLES), None)
    if not table_path:
        return {}, "no evaluation names a table of real images; pass --real_csv"
    if not os.path.isfile(table_path):
        if args.real_csv:
            fail(f"--real_csv {args.real_csv}: no such file")
        return {}, "the evaluations' table of real images is not on this machine; pass --real_csv"
    table = read_table(table_path, args.image_root or (None if args.real_csv else arguments.get("image_root")))
    table = table[table["frontal"]].drop_duplicates("image")
    split, seed = arguments.get("real_split") or "test", arguments.get("split_seed") or 0
    if split != "all":
        table = table[assign_splits(table["patient"], seed) == split]
    # Lung Opacity stands above most other findings, and Support Devices is none.
    others = table.reindex(columns=[name for name in LABELS if name not in ("Lung Opacity", "Support Devices")]).isin([1.0, -1.0])
    found = {}
    for label in conditions:
        if label in table:
            rows = table[table[label] == 1]
            alone = ~others.loc[rows.index].drop(columns=label, errors="ignore").any(axis=1)
            found[label] = list(pd.concat([rows[alone], rows[~alone]]).drop_duplicates("patient")["image"][:SAMPLES])
    return found, f"of the {split} patients" if split != "all" else "of the test table"


def tile(path: str) -> Image.Image:
    """A picture in one tile; ends with exit status 2 on a file that is not an 8-bit still image."""
    try:
        # Not all that Pillow knows: it hands some formats to other programs.
        with Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")) as image:
            # Without a window 16 bits would come out white, and of an animation the first frame alone would be seen.
            if image.mode[0] in "IF" or getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{getattr(image, 'n_frames', 1)} frames of type {image.mode}, and an 8-bit still image is needed")
            return ImageOps.exif_transpose(image).convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow's readers raise whatever a broken file makes of them
        fail(f"{path}: not a readable image ({' '.join(str(error).split())[:100]}); put it back, or draw the samples again if it is one of them")


def draw_figure(study: Study, args: argparse.Namespace) -> Figure2 | None:
    """Methods down, conditions across, two samples each; real images first. None where there is no picture at all."""
    sampled = {row: sampled_images(study, row) for row in ["base", *study.strategies]}
    drawn = {label for images in sampled.values() for label in images}
    labels = [label for label in study.labels("evaluations", "class_consistency") if label in drawn]
    labels += [label for label in LABELS if label in drawn and label not in labels]
    if not labels:
        return None
    real, about = real_images(study, args, labels)
    rows = {"real": real, "base": sampled["base"], **{row: sampled[row] for row in study.strategies}}
    left, top, step = 280, 34, TILE + GAP
    picture = Image.new("RGB", (left + len(labels) * (SAMPLES * step + 2 * GAP), top + len(rows) * step), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    for column, label in enumerate(labels):
        pen.text((left + column * (SAMPLES * step + 2 * GAP), 6), label, "black", font)
    for line, (row, images) in enumerate(rows.items()):
        y = top + line * step
        pen.text((4, y + TILE // 2 - 12), f"{NUMBERS[row]}  {name_of_row(row)}" if row in NUMBERS else name_of_row(row), "black", font)
        for column, label in enumerate(labels):
            for i in range(SAMPLES):
                x = left + column * (SAMPLES * step + 2 * GAP) + i * step
                paths = images.get(label, [])[i : i + 1]
                if paths and os.path.isfile(paths[0]):
                    picture.paste(tile(paths[0]), (x, y))
                else:
                    pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), "#eeeeee")
                    why = "file missing" if paths else "not available" if row == "real" else "no sample" if images else "not run"
                    pen.text((x + 6, y + TILE // 2 - 12), why, "#555555", font)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    have = [name_of_row(row) for row, images in rows.items() if images]
    alt = f"Grid of chest radiographs. Rows: {', '.join(have)}. Columns, two images each: {', '.join(labels)}."
    first = (
        f"The first row has real images {about}, frontal, the first two patients with the finding and, where there are any, no other"
        if real
        else f"No real images: {about}"
    )
    caption = f"The first {SAMPLES} samples by index of each prompt, not chosen by eye. {first}. Methods down, prompts across."
    return Figure2(
        buffer.getvalue(), alt, caption + (" Real radiographs may be passed on only as their data set's agreement allows." if real else "")
    )


# ----------------------------------------------------------------------------------------------------------------------
# The whole report
# ----------------------------------------------------------------------------------------------------------------------


def provenance(study: Study) -> Table:
    """What each row's figures were made from: real images, networks and seeds."""
    rows = []
    for row in [*study.strategies, "base", "real"]:
        run, judged, down = (getattr(study, part).get(row, ResultFile(None)).found for part in ("runs", "evaluations", "downstream"))
        if not (run or judged or down):
            continue
        real, test = dig(judged, "images", "real") or {}, down.get("images", {})
        seeds = {
            "training": dig(run, "identity", "seed"),
            "samples": study.settings.get(row, {}).get("seed"),
            "evaluation": dig(judged, "arguments", "seed"),
            "downstream": dig(down, "settings", "seed"),
        }
        trained = (
            f"{shown(run['images'])} of {shown(run['patients'])} patients, {shown(dig(run, 'identity', 'data_fingerprint'))}" if run else ""
        )
        rows.append([
            Cell(name_of_row(row)), Cell(trained), Cell(f"{shown(real.get('all'))}, {shown(real.get('fingerprint'))}" if judged else ""),
            Cell(shown(dig(judged, "features", "fingerprint")) if judged else ""), Cell(shown(dig(judged, "classifier", "fingerprint")) if judged else ""),
            Cell(f"{shown(test.get('test'))} of {shown(test.get('test_patients'))} patients, {shown(dig(down, 'settings', 'test'))}" if down else ""),
            Cell(f"{shown(dig(down, 'settings', 'num_train_images'))}, {shown(dig(down, 'settings', 'num_seeds'))} classifiers" if down else ""),
            Cell(", ".join(f"{what} {seed}" for what, seed in seeds.items() if seed is not None)),
        ])  # fmt: skip
    header = [
        "row",
        "trained on images",
        "judged against real images",
        "features",
        "classifier",
        "downstream: real test images",
        "downstream: trained on",
        "seeds",
    ]
    return Table(
        "What the figures rest on", header, rows, "Numbers of images, then the first eight digits of fingerprints of what is in them."
    )


def file_notes(study: Study) -> list[str]:
    """The warnings that the scripts wrote into their files, each once, with the rows that have it."""
    found: dict[str, list[str]] = {}
    for part, key in (("runs", "notes"), ("evaluations", "warnings"), ("downstream", "notes")):
        for row, results in getattr(study, part).items():
            for text in results.found.get(key, []):
                rows = found.setdefault(str(text), [])
                rows += [row] if row not in rows else []
    everywhere = {row for part in ("runs", "evaluations", "downstream") for row, results in getattr(study, part).items() if results.there}
    return [
        f"{text} ({'all rows' if set(rows) == everywhere else names(rows) if len(rows) <= 3 else f'{len(rows)} rows'})"
        for text, rows in found.items()
    ]


def version_lines(study: Study) -> list[str]:
    """The libraries' versions by script, each set of them once."""
    found: dict[str, list[str]] = {}
    for part in ("runs", "evaluations", "downstream"):
        for row, results in getattr(study, part).items():
            if results.there:
                text = ", ".join(f"{name} {version}" for name, version in results.found["versions"].items())
                found.setdefault(f"{part}: {text}", []).append(row)
    return [f"{text} ({names(rows) if len(rows) <= 3 else f'{len(rows)} rows'})" for text, rows in found.items()]


def base_line(study: Study) -> list[str]:
    found = {
        (run.found["base_model"].rstrip("/").rsplit("/", 1)[-1], shown(dig(run.found, "identity", "base_fingerprint")), run.found["device"])
        for run in study.runs.values()
        if run.there
    }
    return [f"Base model {name} (fingerprint {mark}), trained on {device}." for name, mark, device in sorted(found)]


def build(args: argparse.Namespace, study: Study) -> tuple[list[Part], Figure2 | None, str]:
    """The report's sections, its figure, and the paragraph at its top."""
    figure = draw_figure(study, args)
    comparisons = compare_all(study)
    two, split_problems = table_2(study)
    by_part = identity_problems(study)
    problems = [*budget_problems(study), *sampling_problems(study), *seed_problems(study), *split_problems, *by_part["evaluations"], *by_part["downstream"]]
    lines = answer(study, comparisons)
    if problems:
        lines[0] += " And the rows are not comparable as they stand (below): this is about these runs, not about the strategies."
    missing = [row for row in study.strategies if not study.runs[row].there]
    unjudged = [
        row for row in study.strategies if study.runs[row].there and not (study.evaluations[row].there and study.downstream[row].there)
    ]
    limits = cautions(study, comparisons[0])
    limits += [f"Not run: {names(missing)}."] if missing else []
    limits += [f"Run, but not fully evaluated: {names(unjudged)}."] if unjudged else []
    limits += (
        ["The base model was not evaluated, so it is not known whether any strategy gains over it."]
        if not study.evaluations["base"].there
        else []
    )
    top = Part(
        "", [("answer", lines), *([("problems", problems)] if problems else []), ("list", limits), verdict_table(study, comparisons), pairs_table(study, comparisons)]
    )
    context = (
        "The paper's figures stand beside ours as context, not as a target: its FID and Vendi are biased by their own n, over 25,133 images of which 17,032 are "
        "unique; its classifier, its split and its real images are others; and it gives no intervals."
    )
    followed = [
        prompts_table(study, "Table 3b. Does the prompt show? By the classifier at 0.5", "class_consistency_margin",
                      "Margin: how much more often the head fires for its own prompt than for the others (recall minus false-fire rate).", 0, "not above 0", 1, 100),
        prompts_table(study, "Table 3c. Does the prompt show? Without a threshold", "class_consistency_auroc",
                      "AUROC of the head for images of its own prompt against those of the others; 0.5 is chance.", 0.5, "not above chance", 3),
    ]  # fmt: skip
    parts = [
        top,
        Part("Training", [("text", context), table_1(study), two]),
        Part("Generated images", [table_3(study), *followed, images_table(study)]),
        Part("Use for training classifiers", [table_4(study), auroc_table(study)]),
        Part("Figure 2. Samples", [figure or ("text", "No samples in the study's folder.")]),
        Part("How this came about", [
            provenance(study), ("list", [*base_line(study), *version_lines(study)]), *([("text", "Warnings of the scripts:"), ("list", file_notes(study))] if file_notes(study) else []),
            ("text", ("To repeat it, start launch/sweep.sh with the same data, base model and seeds, then launch/report.py. report.csv holds every figure with its interval, n, floor and note. "
             "Synthetic radiographs show no patient and are not for diagnosis.")),
        ]),
    ]  # fmt: skip
    return parts, figure, " ".join([*lines, *limits])


def number_footnotes(parts: list[Part]) -> dict[str, int]:
    """Footnotes in the order in which a reader meets them."""
    tables = [block for part in parts for block in part.blocks if isinstance(block, Table)]
    keys = dict.fromkeys(key for table in tables for row in table.rows for cell in row for key in cell.notes)
    return {key: number for number, key in enumerate(keys, 1)}


# ----------------------------------------------------------------------------------------------------------------------
# Results: HTML, Markdown, CSV
# ----------------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c1e21; background: #fff; margin: 0; }
main { max-width: 1240px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ccd0d5; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
p, li { max-width: 52rem; }
p { margin: .5rem 0; }
.answer { font-size: 1.15rem; background: #eef4fb; border-left: 5px solid #2b6cb0; padding: .75rem 1rem; margin: 0 0 1rem; max-width: none; }
.problems { background: #fdf0ee; border-left: 5px solid #b3261e; padding: .5rem 1rem; margin: 0 0 1rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e1e4e8; overflow-wrap: normal; }
.many { min-width: 46rem; }
th { border-bottom: 2px solid #8a919a; vertical-align: bottom; }
tbody tr:hover td { background: #f6f8fa; }
sup { line-height: 0; }
td:nth-child(2) { min-width: 7.5em; }
.figure .value { font-weight: 600; }
.detail, .paper, .flag { display: block; font-size: .78rem; color: #57606a; min-width: 5.5em; }
.figure .detail { white-space: nowrap; }
.flag { color: #8a3b00; }
td.grey { background: #e4e6e9; }
td.grey .value { color: #57606a; font-weight: 400; }
.answer p { font-weight: 600; margin: 0 0 .5rem; max-width: none; }
.answer ul { font-size: 1rem; margin: 0; padding-left: 1.2rem; }
.answer li { max-width: none; }
.paper { color: #2a5d9f; white-space: nowrap; }
.key { font-size: .85rem; color: #444b53; padding-left: 1.2rem; margin: .25rem 0; }
img { display: block; max-width: none; width: 100%; min-width: 900px; height: auto; }
@media (max-width: 760px) { .scroll:has(.many, img)::before { content: "scrolls sideways \\2192"; position: sticky; left: 0; font-size: .78rem; color: #57606a; } }
@media (max-width: 600px) { .answer { font-size: 1rem; } h1 { font-size: 1.3rem; } }
@media print { .scroll { overflow: visible; } }
"""


def html_cell(cell: Cell, numbers: dict[str, int]) -> str:
    refs = "".join(f'<sup><a href="#note-{number}">[{number}]</a></sup>' for number in sorted(numbers[key] for key in cell.notes))
    parts = [
        f'<span class="value">{html.escape(cell.text)}</span>' if cell.text else "",
        *(f'<span class="flag">{html.escape(flag)}</span>' for flag in cell.flags),
    ]
    if cell.detail:
        parts.insert(1, f'<span class="detail">{html.escape(cell.detail)}</span>')
    if cell.paper:
        parts.append(f'<span class="paper">paper: {html.escape(cell.paper)}{refs}</span>')
    elif refs:
        parts.insert(1, refs)
    # An interval is one line; other details are text.
    kinds = ["figure"] * (" to " in cell.detail and cell.detail[0] in "+-0123456789") + ["grey"] * cell.grey
    style = ' class="' + " ".join(kinds) + '"' if kinds else ""
    return f"<td{style}>{''.join(parts)}</td>"


def html_list(items: list[str], style: str = "") -> str:
    style = f' class="{style}"' if style else ""
    return f"<ul{style}>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def html_table(table: Table, numbers: dict[str, int]) -> str:
    title = html.escape(table.title)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    body = "\n".join("<tr>" + "".join(html_cell(cell, numbers) for cell in row) + "</tr>" for row in table.rows)
    lead, many = f"<p>{html.escape(table.lead)}</p>" if table.lead else "", ' class="many"' if len(table.header) > 4 else ""
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{title}"><table{many}><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    return f"<h3>{title}</h3>\n{lead}{box}\n{html_list(table.key, 'key') if table.key else ''}"


def html_block(block, numbers: dict[str, int]) -> str:
    if isinstance(block, Table):
        return html_table(block, numbers)
    if isinstance(block, Figure2):
        source = base64.b64encode(block.png).decode()
        picture = f'<div class="scroll" role="region" tabindex="0" aria-label="Figure 2"><img src="data:image/png;base64,{source}" alt="{html.escape(block.alt)}"></div>'
        return f"{picture}\n<p>{html.escape(block.caption)}</p>"
    kind, content = block
    if kind == "problems":
        return f'<div class="problems" role="alert"><strong>Not comparable as they stand</strong>{html_list(content)}</div>'
    if kind == "answer":
        return f'<div class="answer"><p>{html.escape(content[0])}</p>{html_list(content[1:])}</div>'
    return html_list(content) if kind == "list" else f"<p>{html.escape(content)}</p>"


def html_report(title: str, parts: list[Part]) -> str:
    """The report as one file that loads nothing."""
    numbers = number_footnotes(parts)
    sections = [
        f"<h2>{html.escape(part.title)}</h2>\n" * bool(part.title) + "\n".join(html_block(block, numbers) for block in part.blocks)
        for part in parts
    ]
    notes = "".join(f'<li id="note-{number}">{html.escape(FOOTNOTES[key])}</li>' for key, number in numbers.items())
    sections.insert(-1, f"<h2>Footnotes on the paper's figures</h2>\n<ol>{notes}</ol>" if notes else "")
    paper = f'<p>The paper: TehraniNasab, Kumar, Arbel, <a href="{PAPER_LINK}">{PAPER_TITLE}</a>, 2025.</p>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(sections) + f"\n{paper}\n</main></body></html>\n"
    )  # fmt: skip


def markdown_text(text: str) -> str:
    """Text in which nothing is Markdown or HTML, on one line."""
    text = " ".join(html.escape(text, quote=False).split())
    for mark in "\\|*`[]":
        text = text.replace(mark, f"\\{mark}")
    return text


def markdown_cell(cell: Cell, numbers: dict[str, int]) -> str:
    refs = "".join(f" [{number}]" for number in sorted(numbers[key] for key in cell.notes))
    text = markdown_text(cell.text) + (f" ({markdown_text(cell.detail)})" if cell.detail else "")
    text += "".join(f" *{markdown_text(flag)}*" for flag in cell.flags)
    text += f"; paper: {markdown_text(cell.paper)}" if cell.paper else ""
    return (text + refs).removeprefix("; ").strip()


def markdown_block(block, numbers: dict[str, int]) -> str:
    if isinstance(block, Table):
        lines = [
            [markdown_text(name) for name in block.header],
            ["---"] * len(block.header),
            *([markdown_cell(cell, numbers) for cell in row] for row in block.rows),
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join(
            filter(
                None,
                [
                    f"### {markdown_text(block.title)}",
                    markdown_text(block.lead),
                    table,
                    "\n".join(f"- {markdown_text(item)}" for item in block.key),
                ],
            )
        )
    if isinstance(block, Figure2):
        return f"![{markdown_text(block.alt)}](figure2.png)\n\n{markdown_text(block.caption)}"
    kind, content = block
    if kind in ("problems", "list"):
        return ("**Not comparable as they stand**\n\n" if kind == "problems" else "") + "\n".join(
            f"- {markdown_text(item)}" for item in content
        )
    if kind == "answer":
        return f"**{markdown_text(content[0])}**\n\n" + "\n".join(f"- {markdown_text(item)}" for item in content[1:])
    return markdown_text(content)


def markdown_report(title: str, parts: list[Part]) -> str:
    numbers = number_footnotes(parts)
    sections = [
        "\n\n".join([f"## {part.title}"] * bool(part.title) + [markdown_block(block, numbers) for block in part.blocks]) for part in parts
    ]
    if numbers:
        sections.insert(
            -1,
            "## Footnotes on the paper's figures\n\n"
            + "\n".join(f"{number}. {markdown_text(FOOTNOTES[key])}" for key, number in numbers.items()),
        )
    return (
        "\n\n".join(
            [f"# {markdown_text(title)}", *sections, f"The paper: TehraniNasab, Kumar, Arbel, [{PAPER_TITLE}]({PAPER_LINK}), 2025."]
        )
        + "\n"
    )


CSV_FIELDS = ("table", "row", "metric", "label", "value", "low", "high", "n", "floor", "paper", "note")


def csv_lines(study: Study) -> list[dict]:
    """Every row of results, and every cell of the paper, one a line; what was not run or not evaluated has a line that says so."""
    lines = []
    for part, table in (("runs", "1"), ("evaluations", "3"), ("downstream", "4")):
        for row, results in getattr(study, part).items():
            for figure in results.found.get("results", []):
                of_split = figure["metric"] in SPLIT_PARTS
                lines.append(figure | {"table": "2" if of_split else table, "row": row})
            if not results.there:
                lines.append({"table": table, "row": row, "metric": "status", "label": "all", "note": status_of(study, part, row)})
    known = {(line["table"], line["row"], line["metric"], line["label"]) for line in lines}
    cells = [
        ("3", row, metric, label)
        for row in PAPER_GENERATION
        for metric, label in [("fid", "all"), ("vendi", "all"), *(("class_consistency", name) for name in CONDITIONS)]
    ]
    cells += [("4", row, "accuracy", label) for row in PAPER_DOWNSTREAM for label in CONDITIONS]
    cells = (
        [("1", "lora", "trainable_parameters", "unet"), *(cell for cell in cells if cell[1] in study.strategies)]
        if "lora" in study.strategies
        else [cell for cell in cells if cell[1] in study.strategies]
    )
    recorded = {(line["metric"], line["label"]) for line in lines if line["table"] == "2"}
    cells += [("2", "paper", metric, label) for label in PAPER_SPLIT for metric in SPLIT_PARTS if (metric, label) not in recorded]
    lines += [dict(zip(("table", "row", "metric", "label"), cell)) | {"note": "only in the paper"} for cell in cells if cell not in known]
    for line in lines:
        key = (line["table"], line["row"], line["metric"], line["label"])
        line["paper"] = paper_value(*key)
        line["note"] = "; ".join(filter(None, [line.get("note"), *(FOOTNOTES[note] for note in paper_notes(*key))]))
    return sorted(lines, key=lambda line: line["table"])


def csv_report(study: Study) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(csv_lines(study))
    return buffer.getvalue()


def write_report(output_dir: Path, files: dict[str, str | bytes]) -> None:
    """Writes all files beside and renames them into place together; a figure of an earlier report does not belong to this one."""
    parts = {output_dir / name: output_dir / f".{name}.part" for name in files}
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for (path, part), content in zip(parts.items(), files.values()):
            part.write_bytes(content if isinstance(content, bytes) else content.encode())
        for path, part in parts.items():
            os.replace(part, path)
        if "figure2.png" not in files:
            (output_dir / "figure2.png").unlink(missing_ok=True)
    except OSError as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        fail(f"--output_dir {output_dir}: cannot be written ({error.strerror}); make room or pass another")


def main(args: argparse.Namespace) -> None:
    study = read_study(args)
    parts, figure, summary = build(args, study)
    output_dir = args.output_dir or args.study / "report"
    files = {
        "report.html": html_report(args.title, parts),
        "report.md": markdown_report(args.title, parts),
        "report.csv": csv_report(study),
    }
    write_report(output_dir, ({"figure2.png": figure.png} if figure else {}) | files)
    print(summary)
    for name in (*files, *(["figure2.png"] if figure else [])):
        print(output_dir / name)


if __name__ == "__main__":
    main(parse_args())
