# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "accelerate>=1.10", "safetensors>=0.5", "scikit-learn>=1.5", "matplotlib>=3.8",
#   "numpy>=1.26", "pandas>=2.2", "pillow>=10.3", "tqdm>=4.66",
# ]
# ///
"""Is the synthetic data any use? Train a classifier on synthetic radiographs, real ones or both, and test it on real ones.

    accelerate launch eval_downstream.py --synthetic samples/bitfit                       # the paper's Table 4
    accelerate launch eval_downstream.py --synthetic samples/bitfit --train_on real       # as many real images instead
    accelerate launch eval_downstream.py --synthetic samples/bitfit --reference downstream/real_bitfit   # and the ratio
    accelerate launch eval_downstream.py --train_on real                                  # the classifier of eval_generation.py
    python eval_downstream.py --classifier downstream/real/classifier --real_csv other_hospital.csv --split all

Writes downstream_metrics.json, downstream_table.md, plots and the classifier to --output_dir. Stopped and started again, it
goes on where it was.
"""

import argparse
import datetime
import errno
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list, gather_object
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from torchvision.models import get_model
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

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
ARCHITECTURES = ("efficientnet_b0", "resnet18", "resnet50", "densenet121")
# Of ImageNet's pictures, on which the initial weights of --weights imagenet were trained; kept for the other weights.
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# Not further from always giving the same answer than this share of the images.
CONSTANT_RATE = 0.005
ECE_BINS = 15
# What the bootstrap gives an interval to, in the tables' order.
METRICS = {
    "accuracy": "accuracy at 0.5", "constant_accuracy": "accuracy of the constant predictor", "accuracy_gain": "accuracy above the constant predictor's",
    "predicted_positive_rate": "predicted positive at 0.5", "balanced_accuracy": "balanced accuracy at 0.5", "auroc": "AUROC",
    "auprc": "AUPRC", "f1": "F1 at the validation threshold", "ece": "calibration error (ECE)",
}  # fmt: skip
# What a label with one class only in training cannot have: it was never shown the difference.
NEEDS_BOTH_CLASSES = ("auroc", "auprc", "f1", "ece")


# Copied from train_full.BadImage
class BadImage(Exception):
    """An image that cannot be read; the message names it and says why."""


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


# Copied from train_full.plain_sentence
def plain_sentence(error: Exception, smaller: str) -> str | None:
    """What to do about an error that is no fault of the code; None for any other. `smaller` says what takes less memory."""
    text = str(error).strip()
    if isinstance(error, BadImage):
        # From a loader's worker the message comes with the worker's traceback in front of it.
        return text.rsplit("BadImage: ", 1)[-1]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(told in text for told in ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")):
        return f"out of memory ({text[:150]}); {smaller}"
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    closed = (*full, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG)
    if (isinstance(error, OSError) and error.errno in closed) or text.startswith("Symlink loop") or any(f"(os error {number})" in text for number in full):
        return f"a file cannot be written or read ({text[:300]}); make room, or pass another folder, and start again: what is there already stays"
    if isinstance(error, RuntimeError) and "DataLoader worker" in text and any(told in text for told in ("exited unexpectedly", "killed by signal")):
        return f"a process that loads images was ended, by too little memory as a rule ({text[:150]}); lower --dataloader_num_workers and start again"
    if isinstance(error, RuntimeError) and any(told in text for told in ("closed by peer", "reset by peer", "Broken pipe")):
        return f"another process of this run has ended, see what it said; start again as before ({text[:150]})"
    return None


# Copied from train_full.plain_errors
def plain_errors(smaller: str):
    """Ends a script whose `main` meets a bad image, a full disk or memory, or a lost process with a sentence."""

    def decorate(function):
        @functools.wraps(function)
        def wrapped(args: argparse.Namespace):
            try:
                return function(args)
            except Exception as error:
                sentence = plain_sentence(error, smaller)
                if sentence is None:
                    raise
                fail(sentence)

        return wrapped

    return decorate


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


# Copied from train_full.positive_int
def positive_int(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1 and less than 2**31")
    return int(text)


# Copied from train_full.whole_number
def whole_number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


# Copied from train_full.non_negative
def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value


# Copied from train_full.fraction
def fraction(text: str) -> float:
    value = non_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


# fmt: off
def add_table_arguments(parser):
    group = parser.add_argument_group("images")
    group.add_argument("--synthetic", help="folder of sample.py, or any image table of synthetic images")
    group.add_argument("--real_csv", help=f"image table of real images in CheXpert's form (default: the first of {', '.join(DEFAULT_TABLES)} that exists)")
    group.add_argument("--validation_csv", help="ready-made real validation table, beside --test_csv; --real_csv is then for training only")
    group.add_argument("--test_csv", help="ready-made real test table; --real_csv is then for training and validation only")
    group.add_argument("--image_root", help="folder that the real tables' paths start from (default: the table's folder or its parent)")
    group.add_argument("--train_on", choices=["synthetic", "real", "both"], default="synthetic", help="what the classifier is trained and validated on; both takes half of each")
    group.add_argument("--labels", nargs="+", metavar="LABEL", help=f"findings to learn, in quotes where they have spaces (default: those of {', '.join(CONDITIONS)} that the tables have)")
    group.add_argument("--split", choices=["train", "val", "test", "all"], help="part of the real patients to test on (default: test; all with --test_csv)")
    group.add_argument("--split_seed", type=whole_number, default=0, help="seed of the split by patient, which is the same in every script, and of subsets")
    group.add_argument("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="what -1 means: positive (the paper's data), negative, or masked in training and scoring")
    group.add_argument("--num_train_images", type=positive_int, help="training images, a seeded subset (default: as many as both the synthetic and the real table have)")
    group.add_argument("--max_test_images", type=positive_int, help="test on a seeded subset of this many real images (default: all)")
    group.add_argument("--source_resolution", type=positive_int, help="side of the square that every image is brought to first, in pixels (default: the synthetic images', else 512)")
    group.add_argument("--resize_mode", choices=["squash", "pad", "crop"], help="how a real image becomes that square (default: as the synthetic images' model was trained, else squash)")
    group.add_argument("--mixed_geometry", action="store_true", help="compare tables of different --resize_mode all the same")
    group.add_argument("--on_bad_image", choices=["stop", "skip"], default="stop", help="an image that cannot be read: stop ends the script; skip decodes all images first, leaves it out, tells it once and counts it")
    group.add_argument("--image_cache_dir", help="folder of the decoded images, shared by runs (default: image_cache beside --output_dir)")


def add_classifier_arguments(parser):
    group = parser.add_argument_group("classifier")
    group.add_argument("--arch", choices=ARCHITECTURES, default="efficientnet_b0", help="torchvision's network; the last layer has one sigmoid per label")
    group.add_argument("--weights", default="imagenet", metavar="imagenet|none|FILE", help="initial weights: torchvision's download, random, or a safetensors file of the network; never of a network that has seen the test data")
    group.add_argument("--resolution", type=positive_int, default=224, help="side of the network's input in pixels")
    group.add_argument("--classifier", metavar="DIR", help="score this saved classifier on the real test images instead of training one")


def add_training_arguments(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--num_train_epochs", type=positive_int, default=20, help="passes over the training images, at most")
    group.add_argument("--patience", type=whole_number, default=5, help="epochs without a better validation loss before training stops; 0 never stops early")
    group.add_argument("--train_batch_size", type=positive_int, default=32, help="images per process and step")
    group.add_argument("--learning_rate", type=non_negative, default=3e-4, help="peak rate of AdamW, after 5%% of the steps and before a cosine to 0")
    group.add_argument("--weight_decay", type=non_negative, default=1e-2, help="AdamW's weight decay; 0 turns it off")
    group.add_argument("--rotation", type=non_negative, default=7.0, help="largest random rotation in degrees; 0 turns it off")
    group.add_argument("--translation", type=fraction, default=0.05, help="largest random shift as a share of the side; 0 turns it off")
    group.add_argument("--scale", type=fraction, default=0.1, help="largest random change of size, as a share; 0 turns it off")
    group.add_argument("--brightness", type=fraction, default=0.1, help="largest random change of brightness, as a share; 0 turns it off")
    group.add_argument("--horizontal_flip", action="store_true", help="flip half of the training images, though left and right differ in a chest")
    group.add_argument("--shuffle_labels", action="store_true", help="a control: training and validation labels are dealt out among the images anew for each seed, so that every AUROC should be at chance")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast type in training (default: accelerate's configuration); scoring is in float32")


def add_run_arguments(parser):
    group = parser.add_argument_group("runs and output")
    group.add_argument("--seed", type=whole_number, default=0, help="first seed of initial weights, order and augmentation")
    group.add_argument("--num_seeds", type=positive_int, default=3, help="classifiers trained, with seeds that follow each other")
    group.add_argument("--bootstrap_samples", type=positive_int, default=1000, help="draws of patients, with replacement, for the 95%% intervals")
    group.add_argument("--reference", metavar="DIR", help="finished run with --train_on real and as many images, to give each figure as a share of that run's")
    group.add_argument("--output_dir", help="result folder (default: downstream/, --train_on and the name of --synthetic)")
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_arguments(parser)
    add_classifier_arguments(parser)
    add_training_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    unknown = [label for label in args.labels or [] if label not in LABELS]
    if unknown:
        parser.error(f"--labels: {unknown[0]!r} is none of {', '.join(LABELS)}")
    if len(set(args.labels or [])) < len(args.labels or []):
        parser.error("--labels names a finding twice")
    if args.classifier and (args.synthetic or args.labels or args.reference):
        parser.error("--classifier scores a saved classifier on real images, with the labels it has; leave out --synthetic, --labels and --reference")
    if args.train_on != "real" and not args.synthetic and not args.classifier:
        parser.error(f"--train_on {args.train_on} needs --synthetic FOLDER, a folder of sample.py")
    if args.validation_csv and not (args.real_csv and args.test_csv):
        parser.error("--validation_csv needs --real_csv and --test_csv beside it, since no table is then split")
    for flag in ("real_csv", "validation_csv", "test_csv"):
        value = getattr(args, flag)
        if value and not os.path.isfile(value):
            parser.error(f"--{flag} {value}: no such file; pass the path of a CheXpert-style CSV")
    if not args.real_csv and not args.test_csv and not any(map(os.path.isfile, DEFAULT_TABLES)):
        parser.error(f"no table of real images: looked for {' and '.join(DEFAULT_TABLES)} in {Path.cwd()}; pass --real_csv FILE")
    if args.image_root and not os.path.isdir(args.image_root):
        parser.error(f"--image_root {args.image_root}: no such folder")
    if args.weights not in ("imagenet", "none"):
        if not args.weights.endswith(".safetensors"):
            convert = "import torch, safetensors.torch as s; s.save_file(torch.load('IN.pth', weights_only=True), 'OUT.safetensors')"
            parser.error(f'--weights {args.weights}: imagenet, none or a .safetensors file; a pickle is converted by: python -c "{convert}"')
        if not os.path.isfile(args.weights):
            parser.error(f"--weights {args.weights}: no such file")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Data: tables
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


def find_synthetic_table(path: str) -> str:
    """The image table of a folder of sample.py, or the table itself; ends with exit status 2 where there is none."""
    csv = Path(path) / "metadata.csv" if os.path.isdir(path) else Path(path)
    if not os.path.isfile(csv):
        missing = "no metadata.csv in it; let sample.py finish" if os.path.isdir(path) else "no such folder or CSV"
        fail(f"--synthetic {path}: {missing}")
    return str(csv)


def read_geometry(csv: str) -> dict[str, list]:
    """The values of `resize_mode` and `resolution` that a table of sample.py has in its rows, [] for other tables."""
    names = ("resize_mode", "resolution")
    # Read as load_image_table does, which has found the table sound.
    form = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "skipinitialspace": True, "index_col": False, "compression": None}
    columns = pd.read_csv(csv, usecols=lambda name: name in names, **form)
    return {name: [v for v in columns.get(name, pd.Series(dtype=str)).unique() if v] for name in names}


def settle_geometry(recorded: dict[str, list], resolution: int | None, resize_mode: str | None, mixed: bool) -> tuple[int, str]:
    """Side and resize mode that real images are brought to, which must be how the synthetic images came about."""
    modes = set(recorded["resize_mode"]) | ({resize_mode} if resize_mode else set())
    if len(modes) > 1 and not mixed:
        fail(
            f"the tables were made differently: the synthetic images with --resize_mode {', '.join(recorded['resize_mode'])}, the real ones "
            f"with {resize_mode or 'one of these'}; leave --resize_mode out, or pass --mixed_geometry to compare them all the same"
        )
    unknown = [mode for mode in recorded["resize_mode"] if mode not in ("squash", "pad", "crop")]
    # Not str.isdigit, to which "²" is a digit.
    unknown += [side for side in recorded["resolution"] if not re.fullmatch("[1-9][0-9]{0,4}", side)]
    if unknown:
        way_out = "mend the column or take it out"
        fail(f"--synthetic: its table has the resolution or resize_mode {unknown[0]!r}, which is none of sample.py's; {way_out}")
    sides = [int(side) for side in recorded["resolution"]]
    return resolution or max(sides, default=512), resize_mode or next(iter(recorded["resize_mode"]), "squash")


def label_targets(table: pd.DataFrame, labels: list[str], uncertain: str) -> np.ndarray:
    """(n, len(labels)) float32: 1 positive, 0 negative or unmentioned, NaN masked."""
    values = table[labels].fillna(0.0).replace(-1.0, {"ones": 1.0, "zeros": 0.0, "ignore": math.nan}[uncertain])
    return values.to_numpy(np.float32, copy=True)


def patient_hash(patient: str) -> str:
    """16 hexadecimal digits that stand for a patient in files that are passed on."""
    return hashlib.sha256(f"patient:{patient}".encode()).hexdigest()[:16]


@dataclass
class Tables:
    """The rows that a run uses, and how they came about."""

    train: pd.DataFrame
    val: pd.DataFrame
    test: pd.DataFrame
    labels: list[str]
    source_resolution: int
    resize_mode: str
    left_out: dict[str, int]
    shared_patients: int
    notes: list[str]


def load_frontal(csv: str, image_root: str | None, left_out: dict[str, int]) -> pd.DataFrame:
    """The frontal rows of a table; the others are counted."""
    table = load_image_table(csv, image_root)
    left_out["not frontal"] = left_out.get("not frontal", 0) + int((~table["frontal"]).sum())
    if not table["frontal"].any():
        fail(f"{csv}: no frontal row; see the column Frontal/Lateral")
    return table[table["frontal"]]


def choose_labels(wanted: list[str] | None, tables: dict[str, pd.DataFrame]) -> list[str]:
    """The labels to learn, in the order asked for; ends with exit status 2 where a table lacks one, or all."""
    for csv, table in tables.items():
        missing = [label for label in wanted or [] if label not in table]
        if missing:
            fail(f"{csv}: no column {missing[0]!r}, which --labels names; it has {', '.join(c for c in LABELS if c in table)}")
    labels = wanted or [label for label in CONDITIONS if all(label in table for table in tables.values())]
    if not labels:
        columns = "; ".join(f"{csv}: {', '.join(c for c in LABELS if c in table) or 'none'}" for csv, table in tables.items())
        fail(f"the tables share none of {', '.join(CONDITIONS)} ({columns}); pass --labels")
    return labels


def subset(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    return table.sample(n=count, random_state=seed % 2**32) if count < len(table) else table


def load_tables(args: argparse.Namespace, spec: dict, accelerator: Accelerator) -> Tables:
    """Loads the tables, splits by patient and equalises; patients in training and test are counted (none in a split of ours).

    `spec` is the classifier.json of --classifier, with which nothing is trained, or {}.
    """
    left_out, notes, pools = {}, [], {}
    real_csv = args.real_csv or next((p for p in DEFAULT_TABLES if Path(p).is_file()), None)
    test_csv = args.test_csv or real_csv
    synthetic_csv = find_synthetic_table(args.synthetic) if args.synthetic and not args.classifier else None
    roots = {csv: None if csv == synthetic_csv else args.image_root for csv in (synthetic_csv, real_csv, args.validation_csv, test_csv) if csv}
    sources = {csv: load_frontal(csv, root, left_out) for csv, root in roots.items()}
    recorded = {"resize_mode": [], "resolution": []}
    if spec:
        recorded = {"resize_mode": [spec["resize_mode"]], "resolution": [str(spec["source_resolution"])]}
    elif synthetic_csv:
        recorded = read_geometry(synthetic_csv)
    source_resolution, resize_mode = settle_geometry(recorded, args.source_resolution, args.resize_mode, args.mixed_geometry)
    labels = choose_labels(spec.get("labels") or args.labels, sources)
    split = args.split or ("all" if args.test_csv else "test")
    test = sources[test_csv]
    test = test if split == "all" else test[assign_splits(test["patient"], args.split_seed) == split]
    if test.empty:
        fail(f"{test_csv}: no patient in split {split!r} to test on; see --split and --split_seed")
    if (test["patient"] == test["name"]).any():
        notes.append("real rows without a patient (patient_id or patientNNNNN in the path) are split by image")

    for name, csv in (("synthetic", synthetic_csv), ("real", real_csv)):
        # A real table of which all or another part is tested on is no source of training images.
        if csv and not args.classifier and (name == "synthetic" or split == "test" or args.test_csv):
            table, ready_made = sources[csv], name == "synthetic" or bool(args.test_csv)
            # A table without test rows has a split of its own, since it may be one part of the usual one.
            parts = assign_splits(table["patient"], args.split_seed + int(ready_made))
            pools[name] = (table[(parts == "train") | ((parts == "test") & ready_made)], table[parts == "val"])
            if name == "real" and args.validation_csv:
                pools[name] = (table, sources[args.validation_csv])
    if args.train_on != "synthetic" and pools and not args.test_csv and split != "test":
        fail(f"--split {split}: these patients are trained on; leave --split out, or pass --test_csv")
    if args.on_bad_image == "skip":
        # Before the tables are equalised, so that runs on one or the other still train on as many images.
        images = list(dict.fromkeys(itertools.chain(test["image"], *(part["image"] for pool in pools.values() for part in pool))))
        bad = {images[i] for i in check_images(accelerator, images, skip=True)}
        if bad:
            left_out["unreadable"] = len(bad)
        test = test[~test["image"].isin(bad)]
        pools = {name: tuple(part[~part["image"].isin(bad)] for part in pool) for name, pool in pools.items()}
        if test.empty:
            fail(f"{test_csv}: none of the images to test on can be used; see --image_root")
    train, val = equalise(args, pools, left_out)
    if "real" in pools and not args.test_csv:
        assert split != "test" or not {*pools["real"][0]["patient"], *pools["real"][1]["patient"]} & set(test["patient"])
    shared = len({*train["patient"], *val["patient"]} & set(test["patient"]))
    if spec:
        shared = len({patient_hash(patient) for patient in test["patient"]} & set(spec["split"]["patients"]))
    if shared:
        notes.append(f"{shared:,} patients are in both the training and the test table: the scores are not of unseen patients")
    test = subset(test, args.max_test_images or len(test), args.split_seed)
    return Tables(train, val, test, labels, source_resolution, resize_mode, left_out, shared, notes)


def equalise(
    args: argparse.Namespace, pools: dict[str, tuple[pd.DataFrame, pd.DataFrame]], left_out: dict[str, int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training and validation rows of --train_on, as many whichever it is: what the smaller of the tables given has."""
    if not pools:
        return pd.DataFrame(columns=["patient"]), pd.DataFrame(columns=["patient"])
    used = ["synthetic", "real"] if args.train_on == "both" else [args.train_on]
    if set(used) - set(pools):
        fail(f"--train_on {args.train_on}: no real table to train on; pass --real_csv FILE")
    parts = []
    for i, (part, wanted) in enumerate((("training", args.num_train_images), ("validation", None))):
        smallest = min(pools, key=lambda name: len(pools[name][i]))
        count = wanted or len(pools[smallest][i])
        if not count:
            way_out = "pass a larger table, or --test_csv FILE for a table of test images alone"
            fail(f"no {smallest} images for {part} in the split by patient; {way_out}")
        if not wanted and len(used) == 1 and len(pools[used[0]][i]) > count:
            beyond = len(pools[used[0]][i]) - count
            left_out[f"{used[0]} beyond the {count:,} {part} images that both tables have"] = beyond
        shares = [count // len(used) + (k < count % len(used)) for k in range(len(used))]
        for name, share in zip(used, shares):
            found = len(pools[name][i])
            if found < max(share, 1):
                way_out = "pass a larger table or a smaller --num_train_images"
                fail(f"{found:,} {name} images for {part}, {max(share, 1):,} needed; {way_out}")
        drawn = [subset(pools[name][i], share, args.split_seed).assign(real=name == "real") for name, share in zip(used, shares)]
        parts.append(pd.concat(drawn, ignore_index=True))
    return parts[0], parts[1]


# ----------------------------------------------------------------------------------------------------------------------
# Data: images
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.DatasetImage
class DatasetImage:
    """One image of a Hugging Face dataset, read when asked for; stands where a path stands in the image table."""

    def __init__(self, dataset, column: str, index: int):
        self.dataset, self.column, self.index = dataset, column, index

    def __str__(self) -> str:
        return f"row {self.index}, column {self.column!r} of the dataset"

    def open(self) -> io.BytesIO:
        value = self.dataset[self.index][self.column]
        if value is None:
            raise BadImage(f"{self}: no image")
        return io.BytesIO(value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes())


# Copied from train_full.open_image
def open_image(image: "str | DatasetImage") -> Image.Image:
    """Opens an 8-bit still image without decoding it; BadImage says what is wrong with any other."""
    # Not all that Pillow knows: some formats it hands to other programs, of others it does not tell the depth.
    formats = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
    if isinstance(image, str) and os.path.exists(image) and not os.path.isfile(image):
        # A pipe would be waited for.
        raise BadImage(f"{image}: not a file")
    try:
        opened = Image.open(image if isinstance(image, str) else image.open(), formats=formats)
        frames, bits = getattr(opened, "n_frames", 1), max(getattr(opened, "tag_v2", {}).get(258, (8,)))
    except FileNotFoundError:
        raise BadImage(f"{image}: no such file") from None
    except Image.DecompressionBombError:
        raise BadImage(f"{image}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels (a decompression bomb, or to be made smaller first)") from None
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken file makes of them
        raise BadImage(f"{image}: not a readable image ({type(error).__name__}); {', '.join(formats)} are read") from None
    kind = opened.mode if opened.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr") else None
    # Of deeper colour Pillow drops bits without a word; what it decodes from says so, and TIFF's BitsPerSample.
    if not kind and (bits > 8 or re.search(";16[BLN]", str(opened.tile))):
        kind = f"{opened.mode} of 16 bits"
    if kind:
        raise BadImage(f"{image}: pixels of type {kind}; convert it to 8 bits first, with a window that suits it")
    if frames > 1:
        raise BadImage(f"{image}: {frames} frames; a still image is needed")
    return opened


# Copied from train_full.load_image
def load_image(image: "str | DatasetImage", resolution: int, resize_mode: str) -> np.ndarray:
    """Decodes an image to a square of `resolution` pixels: uint8, (resolution, resolution, 3)."""
    size = (resolution, resolution)
    try:
        with open_image(image) as opened:
            rgb = ImageOps.exif_transpose(opened).convert("RGB")
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # as in open_image
        raise BadImage(f"{image}: cannot be decoded ({' '.join(str(error).split())})") from None
    if resize_mode == "squash":
        return np.asarray(rgb.resize(size, Image.Resampling.LANCZOS))
    if resize_mode == "pad":
        return np.asarray(ImageOps.pad(rgb, size, Image.Resampling.LANCZOS, color=0))
    return np.asarray(ImageOps.fit(rgb, size, Image.Resampling.LANCZOS))


# Copied from train_full.image_problem
def image_problem(image: "str | DatasetImage", decode: bool = False) -> str | None:
    """What is wrong with an image, from its header and its end; decoded to be sure if asked for or without a proper end."""
    try:
        with open_image(image) as opened:
            opened.fp.seek(-min(opened.fp.seek(0, io.SEEK_END), 64), io.SEEK_END)
            tail = opened.fp.read()
            complete = {"JPEG": b"\xff\xd9" in tail, "PNG": b"IEND" in tail}.get(opened.format, False)
        if decode or not complete:
            load_image(image, 8, "squash")
    except BadImage as error:
        return str(error)
    return None


# Copied from train_full.check_images
def check_images(accelerator: Accelerator, images: list, skip: bool = False) -> list[int]:
    """The positions of bad images, the same on every process, each told; without `skip` they end the script with exit status 2.

    With `skip` every image is decoded, since those that are left are then taken for sound.
    """
    problems = None
    if accelerator.is_main_process:
        with ThreadPoolExecutor(16) as pool:
            found = pool.map(functools.partial(image_problem, decode=skip), images)
            problems = dict(enumerate(tqdm(found, "checking images", len(images), unit="image", leave=False)))
            problems = {i: problem for i, problem in problems.items() if problem}
    problems = broadcast_object_list([problems])[0]
    if problems and not skip:
        listed = "; ".join(list(problems.values())[:20]) + (f"; and {len(problems) - 20:,} more" if len(problems) > 20 else "")
        fail(f"{len(problems):,} of {len(images):,} images cannot be used, repair them, take their rows out or pass --on_bad_image skip: {listed}")
    if len(problems) == len(images) and images:
        fail(f"none of {len(images):,} images can be used, such as {problems[0]}; see --image_root")
    if accelerator.is_main_process:
        for problem in dict.fromkeys(problems.values()):
            print(f"  skipped  {problem}", flush=True)
    return list(problems)


# Copied from train_full.stream_seed
def stream_seed(*key) -> int:
    """A 63-bit seed that is a function of the key alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


def to_gray(rgb: np.ndarray, resolution: int) -> np.ndarray:
    """(H, W, 3) to (resolution, resolution), uint8: the mean over the channels, so that a tint is no cue, then Lanczos."""
    gray = np.rint(rgb.mean(axis=2)).astype(np.uint8)
    return np.asarray(Image.fromarray(gray).resize((resolution, resolution), Image.Resampling.LANCZOS))


# Copied from train_full.seal_of
def seal_of(path: Path, keys: list[str]) -> str:
    """SHA-256 over a cache file's bytes and the keys of its rows."""
    digest = hashlib.sha256("".join(keys).encode())
    digest.update(np.memmap(path, np.uint8, "r"))
    return digest.hexdigest()


# Copied from train_full.is_whole
def is_whole(path: Path) -> bool:
    """Whether a cache file is as it was written, by the seal in the JSON beside it."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        return index["seal"] == seal_of(path, index["keys"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def write_pixels(path: Path, images: list[str], source_resolution: int, resize_mode: str, resolution: int) -> None:
    """Decodes images into a cache file, (n, resolution, resolution) uint8; its seal and the size of each go into the JSON beside it."""
    part = path.with_suffix(f".{os.getpid()}.part")
    index = part.with_suffix(".json.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"{path.stem}.*.part"):
            # Left by a process that was killed; another may be at work on the same images.
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()
        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (len(images), resolution, resolution))
        # All its room at once: a disk that is full later would end the process without a word.
        if hasattr(os, "posix_fallocate"):
            with part.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    except OSError as error:
        if part.exists():
            part.unlink()
        fail(f"--image_cache_dir {path.parent}: cannot be written ({error.strerror}); pass another, or another --output_dir")

    def decode(i: int) -> str:
        pixels[i] = to_gray(load_image(images[i], source_resolution, resize_mode), resolution)
        # Not Image.open: an image that has gone by now is a bad one too.
        with open_image(images[i]) as opened:
            return f"{opened.width}x{opened.height}"

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            sizes = list(tqdm(pool.map(decode, range(len(images))), "decoding images", len(images), unit="image", leave=False))
        pixels.flush()
        # First, since a file that does not fit its seal counts as damaged.
        index.write_text(json.dumps({"seal": seal_of(part, sizes), "keys": sizes}))
        os.replace(index, path.with_suffix(".json"))
        os.replace(part, path)
    except BaseException:
        for left in (part, index):
            left.unlink(missing_ok=True)
        raise


def cache_pixels(
    accelerator: Accelerator, parts: list[list[str]], source_resolution: int, resize_mode: str, resolution: int, directory: Path
) -> tuple[list[np.ndarray], dict]:
    """The images of each part decoded and resized once: (n, resolution, resolution) uint8, memory-mapped; and the count of each size found.

    A part's file is named by what determines it: the geometry, and each image's path, size and time.
    """
    geometry, paths = (source_resolution, resize_mode, resolution), []
    for images in parts:
        digest = hashlib.sha256("/".join(map(str, geometry)).encode())
        for image in images:
            stat = os.stat(image) if os.path.isfile(image) else None
            digest.update(f"{image}/{stat and stat.st_size}/{stat and stat.st_mtime_ns}".encode())
        paths.append(directory / f"{digest.hexdigest()[:32]}.npy")
    missing = [i for i, path in enumerate(paths) if not is_whole(path)] if accelerator.is_main_process else None
    missing = broadcast_object_list([missing])[0]
    if missing:
        # All before any is decoded: bad ones are then told together, and nothing is written.
        check_images(accelerator, list(dict.fromkeys(image for i in missing for image in parts[i])))
        for i in missing if accelerator.is_main_process else ():
            if paths[i].exists():
                print(f"{paths[i]}: damaged, computed again", file=sys.stderr)
            write_pixels(paths[i], parts[i], *geometry)
        accelerator.wait_for_everyone()
    sizes = Counter(size for path in paths for size in json.loads(path.with_suffix(".json").read_text())["keys"])
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths], sizes


def augment(images: torch.Tensor, draws: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Turns, shifts, scales and brightens (b, 1, h, w) in [0, 1]; `draws`, (b, 6) uniform in [-1, 1], say how far."""
    angle, shift, scale = draws[:, 0] * math.radians(args.rotation), 2 * args.translation * draws[:, 1:3], 1 + args.scale * draws[:, 3]
    flip = torch.where(draws[:, 5] < 0, -1.0, 1.0) if args.horizontal_flip else torch.ones_like(angle)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    matrix = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return (moved * (1 + args.brightness * draws[:, 4])[:, None, None, None]).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def build_classifier(arch: str, num_labels: int) -> torch.nn.Module:
    """torchvision's network with one output (logit) per label, and random weights."""
    return get_model(arch, weights=None, num_classes=num_labels).to(memory_format=torch.channels_last)


def classifier_inputs(gray: torch.Tensor, normalisation: dict[str, list[float]]) -> torch.Tensor:
    """(b, 1, h, w) in [0, 1] to the network's (b, 3, h, w), in the memory format that convolutions are faster in."""
    mean, std = (torch.tensor(normalisation[key], device=gray.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return ((gray.expand(-1, 3, -1, -1) - mean) / std).contiguous(memory_format=torch.channels_last)


def load_initial_weights(accelerator: Accelerator, model: torch.nn.Module, arch: str, weights: str) -> None:
    """Puts pre-trained weights below the last layer, which stays random; ends with exit status 2 where they do not fit."""
    if weights == "none":
        return
    try:
        if weights == "imagenet":
            with accelerator.local_main_process_first():
                saved = get_model(arch, weights="DEFAULT").state_dict()
        else:
            saved = load_file(weights)
        if not all(tensor.isfinite().all() for tensor in saved.values()):
            raise ValueError("weights that are not finite")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        way_out = "; pass --weights FILE or --weights none" if weights == "imagenet" else ""
        fail(f"--weights {weights}: cannot be loaded ({' '.join(str(error).split())[:200]}){way_out}")
    head = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    # Older files lack the counters of batch normalisation, which nothing here reads.
    saved = {name: tensor for name, tensor in saved.items() if not name.endswith("num_batches_tracked")}
    body = {name: tensor for name, tensor in saved.items() if not name.startswith(f"{head}.")}
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{head}.")}
    names = {name for name in own.keys() | body.keys() if not name.endswith("num_batches_tracked")}
    differing = sorted(name for name in names if name not in own or name not in body or own[name].shape != body[name].shape)
    if differing:
        fail(f"--weights {weights}: not the weights of {arch}, {len(differing)} tensors do not match, such as {differing[0]}; pass its --arch")
    model.load_state_dict(body, strict=False)


# Copied from train_full.read_json
def read_json(path: Path, way_out: str, **types) -> dict:
    """A JSON object with fields of these types; ends with exit status 2 on anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        # Half a character, which no file could be written with.
        json.dumps(found, ensure_ascii=False).encode()
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path}: not valid JSON ({error}); {way_out}")
    if not isinstance(found, dict):
        fail(f"{path}: holds no JSON object, as these scripts write it; {way_out}")
    wrong = [name for name, kind in types.items() if not isinstance(found.get(name), kind)]
    if wrong:
        fail(f"{path}: {wrong[0]!r} is missing or not as these scripts write it; {way_out}")
    return found


def spec_digest(spec: dict) -> str:
    """SHA-256 of what a classifier.json says of its weights: a head scored under another label's name would go unnoticed."""
    keys = ("arch", "labels", "resolution", "source_resolution", "resize_mode", "normalisation", "thresholds", "train_on", "model_sha256")
    return hashlib.sha256(json.dumps([spec.get(key) for key in keys], sort_keys=True).encode()).hexdigest()


def load_classifier(folder: str) -> tuple[torch.nn.Module, dict]:
    """A saved classifier in evaluation mode, float32, on the CPU, and its classifier.json.

    Ends with exit status 2 where the two do not belong together.
    """
    path = Path(folder) / "classifier.json"
    if not os.path.isfile(path):
        fail(f"{path}: cannot be read, no such file; pass a classifier folder of eval_downstream.py")
    form = {
        "arch": str, "labels": list, "resolution": int, "source_resolution": int, "resize_mode": str, "normalisation": dict, "thresholds": dict,
        "split": dict, "real_test_auroc": dict, "train_on": str, "model_sha256": str, "spec_sha256": str,
    }  # fmt: skip
    spec = read_json(path, "save the classifier anew with eval_downstream.py", **form)

    def number(value, low: float, high: float) -> bool:
        # Python counts true as a number; NaN and Infinity, which its JSON reader lets pass, are in no range.
        return type(value) in (int, float) and low <= value <= high

    labels, thresholds, patients, aurocs = spec["labels"], spec["thresholds"], spec["split"].get("patients"), spec["real_test_auroc"].values()
    scale = [(spec["normalisation"].get(key), low) for key, low in (("mean", -1e6), ("std", 1e-6))]
    sound = {
        # Not any network of torchvision, since building some downloads weights.
        "arch": spec["arch"] in ("efficientnet_b0", "resnet18", "resnet50", "densenet121"),
        "labels": labels and all(label in LABELS for label in labels),
        "thresholds": labels == list(thresholds) and all(value is None or number(value, 0, 1) for value in thresholds.values()),
        "resolution": number(spec["resolution"], 1, 4096), "source_resolution": number(spec["source_resolution"], 1, 99_999),
        "resize_mode": spec["resize_mode"] in ("squash", "pad", "crop"),
        "normalisation": all(isinstance(values, list) and len(values) == 3 and all(number(v, low, 1e6) for v in values) for values, low in scale),
        "split": isinstance(spec["split"].get("fingerprint"), str) and isinstance(patients, list) and all(isinstance(patient, str) for patient in patients),
        "real_test_auroc": all(isinstance(of, dict) and all(of[key] is None or number(of[key], 0, 1e9) for key in of if key != "note") for of in aurocs),
    }  # fmt: skip
    weights = path.with_name("model.safetensors")
    try:
        if hashlib.sha256(weights.read_bytes()).hexdigest() != spec["model_sha256"]:
            raise ValueError("it is not the file that classifier.json was written for")
        if spec_digest(spec) != spec["spec_sha256"]:
            raise ValueError("classifier.json has been changed since it was written")
        wrong = [name for name, right in sound.items() if not right]
        if wrong:
            fail(f"{path}: {wrong[0]!r} is not as these scripts write it; save the classifier anew with eval_downstream.py")
        model = build_classifier(spec["arch"], len(labels))
        model.load_state_dict(load_file(weights))
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError("weights that are not finite")
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        fail(f"{weights}: does not match {path.name} ({' '.join(str(error).split())[:200]}); copy the folder anew, or save the classifier anew")
    return model.eval(), spec


def masked_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy over the labels that are known; targets are 1, 0 or NaN, both (b, labels)."""
    known = ~targets.isnan()
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.nan_to_num(0.0), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def predict(accelerator: Accelerator, model: torch.nn.Module, pixels: np.ndarray, normalisation: dict, batch_size: int = 64) -> np.ndarray:
    """Logits in float32, (n, labels), each process computing its share of the images."""
    model.eval()
    mine, logits = np.arange(accelerator.process_index, len(pixels), accelerator.num_processes), []
    for start in range(0, len(mine), batch_size):
        gray = torch.from_numpy(pixels[mine[start : start + batch_size]]).to(accelerator.device)[:, None].float() / 255
        logits.append(model(classifier_inputs(gray, normalisation)).cpu().numpy())
    shares = gather_object([(mine, np.concatenate(logits) if logits else None)])
    result = np.empty((len(pixels), next(share.shape[1] for _, share in shares if share is not None)), np.float32)
    for indices, share in shares:
        if share is not None:
            result[indices] = share
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Images:
    """Decoded images with what is known of them."""

    pixels: np.ndarray
    targets: np.ndarray
    patients: np.ndarray


def shuffle_labels(images: Images, seed: int) -> Images:
    """The same images with the labels of others."""
    order = np.random.default_rng(stream_seed(seed, "shuffled labels")).permutation(len(images.targets))
    return Images(images.pixels, images.targets[order], images.patients)


# Copied from train_full.flatten
def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": x}} to {"a/b": x}: an optimizer's state as names, for safetensors and JSON."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# Copied from train_full.unflatten
def unflatten(flat: dict) -> dict:
    """The inverse of `flatten`; keys that are numbers become integers, as torch.optim names its parameters."""
    tree = {}
    for name, value in flat.items():
        *path, last = [int(part) if part.isdigit() else part for part in name.split("/")]
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def tensors_digest(tensors: dict[str, torch.Tensor], notes: dict) -> str:
    """SHA-256 over names, shapes and bytes, and what is noted beside them."""
    sha = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, **notes) -> None:
    """A safetensors file that is whole or absent, with notes and the digest of all of it in its header."""
    # Copies, since safetensors refuses tensors that share memory.
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    part = path.with_name(f".{path.name}.part")
    # Not save_file, which writes to a name of its own that a kill would leave behind.
    part.write_bytes(save(tensors, {"notes": json.dumps({"notes": notes, "sha256": tensors_digest(tensors, notes)})}))
    os.replace(part, path)


def load_tensors(path: Path, way_out: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and notes of `save_tensors`; ends with exit status 2 where they are not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["notes"])
        tensors = load_file(path)
        if header["sha256"] != tensors_digest(tensors, header["notes"]):
            raise ValueError("not what was written")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{path}: damaged ({error}); {way_out}")
    return tensors, header["notes"]


def load_progress(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Puts a seed's state back; returns its best weights so far and its counters."""
    tensors, counters = load_tensors(path, "delete it to train this seed anew")
    parts = ({k.removeprefix(f"{name}/"): v for k, v in tensors.items() if k.startswith(f"{name}/")} for name in ("model", "best", "optimizer"))
    weights, best, state = parts
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": unflatten(state), "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        # Fused kernels go through memory as it lies: a moment, contiguous in the file, has to lie there as its weight does.
        moments = {name: torch.empty_like(parameter).copy_(value) for name, value in values.items() if value.shape == parameter.shape}
        values.update(moments)
    return best, counters


def learning_rate(peak: float, step: int, total_steps: int) -> float:
    """Linear warm-up over 5% of the steps, then a cosine to 0 (arXiv 1608.03983, eq. 5)."""
    warmup = max(1, total_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def train_epoch(args, accelerator, model, optimizer, data: Images, seed: int, epoch: int, progress: tqdm) -> None:
    """One pass over the images in an order that is a function of (seed, epoch); what does not fill a batch waits for the next."""
    model.train()
    batch = args.train_batch_size * accelerator.num_processes
    steps = max(1, len(data.pixels) // batch)
    generator = torch.Generator().manual_seed(stream_seed(seed, "epoch", epoch))
    order = torch.randperm(len(data.pixels), generator=generator)
    # Fewer images than one batch are taken more than once.
    order = order.repeat(-(-batch // len(order)))
    for step in range(steps):
        # Drawn for all processes together, of which each takes its part.
        draws = torch.rand(batch, 6, generator=generator) * 2 - 1
        part = slice(accelerator.process_index * args.train_batch_size, (accelerator.process_index + 1) * args.train_batch_size)
        chosen = order[step * batch : (step + 1) * batch][part].numpy()
        gray = torch.from_numpy(data.pixels[chosen]).to(accelerator.device)[:, None].float() / 255
        inputs = classifier_inputs(augment(gray, draws[part].to(accelerator.device), args), NORMALISATION)
        loss = masked_bce(model(inputs), torch.from_numpy(data.targets[chosen]).to(accelerator.device))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.learning_rate, epoch * steps + step, args.num_train_epochs * steps)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            progress.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", refresh=False)
        progress.update(batch)


def train_seed(args: argparse.Namespace, accelerator: Accelerator, seed: int, num_labels: int, train: Images, val: Images, folder: Path) -> tuple[torch.nn.Module, list[float]]:
    """Trains one classifier; returns it with the weights of the epoch whose validation loss was lowest, and these losses."""
    torch.manual_seed(stream_seed(seed, "initial weights"))
    model = build_classifier(args.arch, num_labels)
    load_initial_weights(accelerator, model, args.arch, args.weights)
    fused = accelerator.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=fused)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    # Scores in float32, whatever the precision that accelerate gives to the wrapped one.
    scorer = build_classifier(args.arch, num_labels).to(accelerator.device)
    path, losses, best = folder / "progress.safetensors", [], {}
    if accelerator.scaler:
        # As it is before the first seed, whichever seed this process begins with.
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    if broadcast_object_list([path.exists()])[0]:
        best, counters = load_progress(path, model, optimizer)
        losses = counters["losses"]
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(counters["scaler"])
    steps = max(1, len(train.pixels) // (args.train_batch_size * accelerator.num_processes))
    images = steps * args.train_batch_size * accelerator.num_processes
    description = f"seed {seed} ({seed - args.seed + 1} of {args.num_seeds})"
    with tqdm(total=images * args.num_train_epochs, initial=images * len(losses), desc=description, unit="image", disable=not accelerator.is_main_process) as progress:
        for epoch in range(len(losses), args.num_train_epochs):
            if args.patience and losses and len(losses) - 1 - int(np.argmin(losses)) >= args.patience:
                break
            # Dropout and stochastic depth draw from the global generator.
            torch.manual_seed(stream_seed(seed, "dropout", epoch, accelerator.process_index))
            train_epoch(args, accelerator, wrapped, optimizer, train, seed, epoch, progress)
            for buffer in model.buffers():
                # Each process has batch statistics of its own images; the first one's count.
                buffer.copy_(broadcast(buffer))
            scorer.load_state_dict(model.state_dict())
            logits = torch.from_numpy(predict(accelerator, scorer, val.pixels, NORMALISATION)).double()
            losses.append(float(masked_bce(logits, torch.from_numpy(val.targets))))
            if not math.isfinite(losses[-1]):
                fail(f"the validation loss is not finite after epoch {epoch} of seed {seed}; lower --learning_rate or pass --mixed_precision no")
            if losses[-1] == min(losses):
                best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
            if accelerator.is_main_process:
                scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
                # Everything that the seed needs to go on after this epoch.
                state = flatten({"model": model.state_dict(), "best": best, "optimizer": optimizer.state_dict()["state"]})
                save_tensors(state, path, losses=losses, scaler=scaler)
    scorer.load_state_dict(best)
    return scorer, losses


def run_seed(args, accelerator, seed: int, num_labels: int, train: Images, val: Images, test: Images, folder: Path) -> None:
    """Trains a seed's classifier and writes its weights and its logits on the validation and the test images, if they are not there."""
    done = folder / "predictions.safetensors"
    if broadcast_object_list([done.exists()])[0]:
        return
    folder.mkdir(parents=True, exist_ok=True)
    model, losses = train_seed(args, accelerator, seed, num_labels, train, val, folder)
    # The one look at the test images, after everything about the classifier is settled.
    logits = {name: torch.from_numpy(predict(accelerator, model, part.pixels, NORMALISATION)) for name, part in (("val", val), ("test", test))}
    if accelerator.is_main_process:
        save_tensors(model.state_dict(), folder / "model.safetensors")
        save_tensors(logits, done, losses=losses)
        (folder / "progress.safetensors").unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def read_predictions(folder: Path) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Probabilities on the validation and the test images, float64, and the validation losses by epoch."""
    logits, notes = load_tensors(folder / "predictions.safetensors", f"delete {folder} and run again")
    val, test = (logits[name].double().sigmoid().numpy() for name in ("val", "test"))
    return val, test, notes["losses"]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics
# ----------------------------------------------------------------------------------------------------------------------


def youden_threshold(target: np.ndarray, probability: np.ndarray) -> float | None:
    """The threshold with the highest sensitivity + specificity (Youden 1950); None where a class is missing. NaN are left out."""
    known = ~np.isnan(target)
    target, probability = target[known], probability[known]
    if len(np.unique(target)) < 2:
        return None
    false_positive, true_positive, thresholds = roc_curve(target, probability)
    # The first entry is infinite: nothing called.
    return float(thresholds[1:][np.argmax((true_positive - false_positive)[1:])])


def probability_bins(probability: np.ndarray) -> np.ndarray:
    """The index of each probability's bin, of ECE_BINS of equal width."""
    return np.minimum((probability * ECE_BINS).astype(int), ECE_BINS - 1)


def calibration_error(target: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error over equal-width bins (arXiv 1706.04599, eq. 3) for each row of `weights` (draws, n)."""
    members = np.eye(ECE_BINS)[probability_bins(probability)]
    return np.abs((weights * (target - probability)) @ members).sum(axis=1) / weights.sum(axis=1)


def point_metrics(target: np.ndarray, probability: np.ndarray, threshold: float | None) -> dict[str, float]:
    """METRICS of one label on the test images, by scikit-learn; NaN where they are not defined."""
    called, both = probability >= 0.5, len(np.unique(target)) == 2
    accuracy, constant = accuracy_score(target, called), max((target == 1).mean(), (target == 0).mean())
    return {
        "accuracy": accuracy,
        "constant_accuracy": constant,
        "accuracy_gain": accuracy - constant,
        "predicted_positive_rate": called.mean(),
        "balanced_accuracy": balanced_accuracy_score(target, called) if both else math.nan,
        "auroc": roc_auc_score(target, probability) if both else math.nan,
        "auprc": average_precision_score(target, probability) if both else math.nan,
        "f1": f1_score(target, probability >= threshold, zero_division=0) if both and threshold is not None else math.nan,
        "ece": calibration_error(target, probability, np.ones((1, len(target))))[0],
    }


def weighted_metrics(target: np.ndarray, probability: np.ndarray, threshold: float | None, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The same as `point_metrics` for each row of `weights` (draws, n): thousands of draws at once, which scikit-learn cannot."""
    positive, called, total = target == 1, probability >= 0.5, weights.sum(axis=1)
    positives = weights[:, positive].sum(axis=1)
    negatives = total - positives
    accuracy, constant = weights[:, called == positive].sum(axis=1) / total, np.maximum(positives, negatives) / total
    sensitivity = weights[:, called & positive].sum(axis=1) / positives
    specificity = weights[:, ~called & ~positive].sum(axis=1) / negatives
    # Sums over images of the same probability, from the lowest up, so that ties count half in the ROC curve.
    order = np.argsort(probability, kind="stable")
    starts = np.flatnonzero(np.diff(probability[order], prepend=-1.0))
    by_score = np.add.reduceat(weights[:, order], starts, axis=1)
    positive_by_score = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    negative_by_score = by_score - positive_by_score
    below = np.cumsum(negative_by_score, axis=1) - negative_by_score / 2
    true_positives = np.cumsum(positive_by_score[:, ::-1], axis=1)
    precision = true_positives / np.maximum(np.cumsum(by_score[:, ::-1], axis=1), 1e-300)
    above = probability >= (math.inf if threshold is None else threshold)
    hits = weights[:, above & positive].sum(axis=1)
    f1 = 2 * hits / np.maximum(weights[:, above].sum(axis=1) + positives, 1e-300)
    return {
        "accuracy": accuracy,
        "constant_accuracy": constant,
        "accuracy_gain": accuracy - constant,
        "predicted_positive_rate": weights[:, called].sum(axis=1) / total,
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "auroc": (positive_by_score * below).sum(axis=1) / (positives * negatives),
        "auprc": (positive_by_score[:, ::-1] * precision).sum(axis=1) / positives,
        "f1": np.where(negatives * positives > 0, f1, math.nan) if threshold is not None else np.full(len(weights), math.nan),
        "ece": calibration_error(target, probability, weights),
    }


def draw_patients(patients: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """(draws, n): how often each image is in a sample of as many patients, drawn with replacement."""
    names, index = np.unique(patients, return_inverse=True)
    return generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)[:, index].astype(np.float64)


def bootstrap(target, probability, threshold, patients: np.ndarray, draws: int, seed: int, chunk: int = 50) -> dict[str, np.ndarray]:
    """METRICS of one label in `draws` patient-cluster bootstrap samples (Field and Welsh 2007); NaN where a class is missing.

    The draws are a function of the patients and the seed, so figures of two classifiers on the same images are paired.
    Masked images (target NaN) are left out after the draw.
    """
    generator, known, parts = np.random.default_rng(seed), ~np.isnan(target), []
    for start in range(0, draws, chunk):
        weights = draw_patients(patients, min(chunk, draws - start), generator)[:, known]
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(weighted_metrics(target[known], probability[known], threshold, weights))
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of bootstrap samples, NaN left out."""
    defined = samples[~np.isnan(samples)]
    return tuple(np.percentile(defined, [2.5, 97.5]).tolist()) if len(defined) else (math.nan, math.nan)


@dataclass
class Scores:
    """All figures of a run: by metric (labels, seeds), and their bootstrap samples (labels, seeds, draws)."""

    values: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]


def score(test: Images, predictions: list[tuple], thresholds: list[list], missing: list[str | None], draws: int, seed: int) -> Scores:
    """METRICS for every label and seed; what a label cannot have is NaN. `missing` says which labels lack a class in training."""
    values = {name: np.full((len(missing), len(predictions)), math.nan) for name in METRICS}
    samples = {name: np.full((len(missing), len(predictions), draws), math.nan) for name in METRICS}
    for label, reason in enumerate(missing):
        target = test.targets[:, label].astype(np.float64)
        known = ~np.isnan(target)
        if len(np.unique(target[known])) < 2:
            continue
        for k, (_, probability, _) in enumerate(predictions):
            threshold = thresholds[k][label]
            points = point_metrics(target[known], probability[known, label], threshold)
            drawn = bootstrap(target, probability[:, label], threshold, test.patients, draws, seed)
            for name in METRICS:
                if not (reason and name in NEEDS_BOTH_CLASSES):
                    values[name][label, k], samples[name][label, k] = points[name], drawn[name]
    return Scores(values, samples)


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.result_row
def result_row(metric, value, label="all", low=None, high=None, n=None, floor=None, note=None) -> dict:
    """One row of the form that all results share; a value that could not be computed is null with a note."""
    return {"metric": metric, "label": label, "value": value, "low": low, "high": high, "n": n, "floor": floor, "note": note}


# Copied from train_full.write_text
def write_text(path: Path, text: str) -> None:
    """Writes beside and renames into place."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def over_seeds(metric: str, values: np.ndarray, samples: np.ndarray, seed: int) -> np.ndarray:
    """Samples of the mean over seeds, (draws,), from a figure's values (seeds,) and bootstrap samples (seeds, draws).

    What the patients vary by is in the samples. What training varies by is added as Student's t with the standard error of the
    values: resampling so few seeds would make the interval too short.
    """
    drawn = samples.mean(axis=0)
    if len(values) > 1:
        error = values.std(ddof=1) / math.sqrt(len(values))
        drawn = drawn + error * np.random.default_rng(seed).standard_t(len(values) - 1, size=drawn.shape)
    return drawn.clip(-1.0 if metric == "accuracy_gain" else 0.0, 1.0)


def floor_of(metric: str, positives: float, constant: float) -> float | None:
    """What an answer without looking scores, at a share of positives: always the same class; chance; always positive (F1)."""
    always_positive = 2 * positives / (1 + positives)
    return {"accuracy": constant, "accuracy_gain": 0.0, "balanced_accuracy": 0.5, "auroc": 0.5, "auprc": positives, "f1": always_positive}.get(metric)


def verdict(metric: str, low: float, rates: np.ndarray, seeds: int) -> str | None:
    """What a reader must see beside a figure; `rates` are the predicted-positive rates, (labels, seeds)."""
    constant = (rates < CONSTANT_RATE) | (rates > 1 - CONSTANT_RATE)
    if metric in ("accuracy", "predicted_positive_rate") and constant.any():
        if len(rates) > 1:
            return f"CONSTANT in {constant.all(axis=1).sum()} of {len(rates)} labels" if constant.all(axis=1).any() else None
        return "CONSTANT" if constant.all() else f"constant in {constant.sum()} of {seeds} seeds"
    if metric == "auroc" and low <= 0.5:
        return "no better than chance"
    if metric == "accuracy_gain" and low <= 0:
        return "does not beat the constant predictor"
    return None


def result_rows(labels: list[str], scores: Scores, test: Images, reasons: list[str | None], seed: int) -> list[dict]:
    """Rows for each metric and label, and the mean over the labels that have it; `reasons` say why a label has not."""
    rates, rows = scores.values["predicted_positive_rate"], []
    positives = np.nanmean(test.targets, axis=0)
    counts = (~np.isnan(test.targets)).sum(axis=0)
    seeds = rates.shape[1]
    for metric in METRICS:
        values, samples = scores.values[metric], scores.samples[metric]
        defined = ~np.isnan(values).any(axis=1)
        constants = scores.values["constant_accuracy"].mean(axis=1)
        floors = [floor_of(metric, float(p), float(c)) for p, c in zip(positives, constants)]
        for i, label in enumerate(labels):
            if not defined[i]:
                reason = reasons[i] or "no threshold, since the validation images have one class only"
                rows.append(result_row(metric, None, label, n=int(counts[i]), note=f"n/a: {reason}"))
                continue
            low, high = interval(over_seeds(metric, values[i], samples[i], seed))
            note = verdict(metric, low, rates[i : i + 1], seeds)
            rows.append(result_row(metric, float(values[i].mean()), label, low, high, int(counts[i]), floors[i], note))
        if not defined.any():
            rows.append(result_row(metric, None, note="n/a: no label has it"))
            continue
        low, high = interval(over_seeds(metric, values[defined].mean(axis=0), samples[defined].mean(axis=0), seed))
        floor = float(np.mean([f for f, d in zip(floors, defined) if d])) if floors[0] is not None else None
        notes = [verdict(metric, low, rates[defined], seeds), None if defined.all() else f"mean of {defined.sum()} of {len(labels)} labels"]
        note = "; ".join(filter(None, notes)) or None
        rows.append(result_row(metric, float(values[defined].mean()), "all", low, high, len(test.targets), floor, note))
    return rows


def ratio_rows(labels: list[str], scores: Scores, reference: Scores, name: str, seed: int) -> list[dict]:
    """Each figure as a share of the reference's, with intervals from the same draws of patients for both."""
    rows = []
    for metric in ("accuracy", "balanced_accuracy", "auroc", "auprc", "f1"):
        ours, theirs = scores.values[metric], reference.values[metric]
        both = ~np.isnan(ours).any(axis=1) & ~np.isnan(theirs).any(axis=1)
        selections = [(label, np.arange(len(labels)) == i) for i, label in enumerate(labels)] + [("all", np.full(len(labels), True))]
        for label, chosen in selections:
            chosen = chosen & both
            if not chosen.any() or not theirs[chosen].mean():
                reason = f"the figure of {name} is 0" if chosen.any() else "this run or the reference lacks the figure"
                rows.append(result_row(f"{metric}_of_reference", None, label, note=f"n/a: {reason}"))
                continue
            # The seeds of the two runs are drawn apart, the patients together.
            drawn = over_seeds(metric, ours[chosen].mean(axis=0), scores.samples[metric][chosen].mean(axis=0), seed)
            others = over_seeds(metric, theirs[chosen].mean(axis=0), reference.samples[metric][chosen].mean(axis=0), seed + 1)
            low, high = interval(drawn / np.maximum(others, 1e-12))
            ratio = float(ours[chosen].mean() / theirs[chosen].mean())
            rows.append(result_row(f"{metric}_of_reference", ratio, label, low, high, note=f"of the figure of {name}"))
    return rows


def cell(row: dict, percent: bool) -> str:
    """A figure with its interval and what must be seen beside it."""
    if row["value"] is None:
        return "n/a"
    unit, form = (100, "{:.1f}") if percent else (1, "{:.3f}")
    # Adding 0 takes the sign from a rounded -0.0.
    text = form.format(round(unit * row["value"], 6) + 0.0)
    if row["low"] is not None and not math.isnan(row["low"]):
        text += f" [{form.format(unit * row['low'])}, {form.format(unit * row['high'])}]"
    flag = (row["note"] or "").split(";")[0]
    return f"{text} **{flag}**" if flag.startswith(("CONSTANT", "constant", "no better")) else text


def table_markdown(title: str, labels: list[str], rows: list[dict], lead: str, footnotes: list[str]) -> str:
    """Table 4's form (labels across), the floors first, then the figures that tell more than accuracy."""
    found = {(row["metric"], row["label"]): row for row in rows}
    columns = [*labels, "all"]

    def line(name: str, cells) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    beaten = {label: found["accuracy_gain", label] for label in columns}
    marks = {label: "" if row["value"] is None or row["low"] > 0 else " (≤ floor)" for label, row in beaten.items()}
    lines = [f"# {title}", "", lead, "", line("accuracy at 0.5, %", [*labels, "mean"]), "|---" * (len(columns) + 1) + "|"]
    floors = [cell(found["constant_accuracy", label] | {"low": None}, True) for label in columns]
    lines.append(line("floor: always the more frequent class", floors))
    lines.append(line("**this classifier**", [cell(found["accuracy", label], True) + marks[label] for label in columns]))
    lines += ["", line("beside accuracy", [*labels, "mean"]), "|---" * (len(columns) + 1) + "|"]
    for metric, name in METRICS.items():
        if metric in ("accuracy", "constant_accuracy"):
            continue
        percent = metric in ("accuracy_gain", "predicted_positive_rate")
        lines.append(line(f"{name}{', %' if percent else ''}", [cell(found[metric, label], percent) for label in columns]))
        if metric in ("auprc", "f1"):
            floor = {"auprc": "floor: the share of positives", "f1": "floor: F1 of always positive"}[metric]
            values = [found[metric, label]["floor"] for label in columns]
            lines.append(line(floor, ["n/a" if value is None else f"{value:.3f}" for value in values]))
    for metric in ("auroc", "accuracy", "balanced_accuracy", "auprc", "f1"):
        if (f"{metric}_of_reference", "all") in found:
            shares = [cell(found[f"{metric}_of_reference", label], False) for label in columns]
            lines.append(line(f"{METRICS[metric]}, share of the reference's", shares))
    return "\n".join([*lines, "", *(f"- {note}" for note in footnotes), ""])


def panels(labels: list[str], title: str, x: str, y: str):
    """A figure with one square panel in [0, 1] for each label, and its panels."""
    columns = min(3, len(labels))
    rows = math.ceil(len(labels) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.7 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title)
    for axis, label in itertools.zip_longest(axes.flat, labels):
        if label is None:
            axis.axis("off")
            continue
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
        axis.set(title=label, xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure, axes.flat


def save_figure(figure: Figure, path: Path) -> None:
    """Writes beside and renames into place."""
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=130, bbox_inches="tight")
    os.replace(part, path)


def plot_curves(labels, rows: list[dict], test: Images, predictions: list[tuple], title: str, output_dir: Path) -> None:
    """roc.png and reliability.png: a panel for each label, a line for each seed."""
    auroc = {row["label"]: row for row in rows if row["metric"] == "auroc"}
    roc, roc_axes = panels(labels, f"ROC on real test images, {title}", "false positive rate", "true positive rate")
    reliability, reliability_axes = panels(labels, f"Reliability on real test images, {title}", "predicted probability", "share of positives")
    for i, label in enumerate(labels):
        known = ~np.isnan(test.targets[:, i])
        target = test.targets[known, i]
        row = auroc[label]
        if len(np.unique(target)) < 2:
            for axes in (roc_axes, reliability_axes):
                axes[i].text(0.5, 0.5, "n/a: one class only\namong the test images", ha="center", va="center", color="0.4")
            continue
        for _, probability, _ in predictions:
            false_positive, true_positive, _ = roc_curve(target, probability[known, i])
            roc_axes[i].plot(false_positive, true_positive, linewidth=1.3)
            bins = probability_bins(probability[known, i])
            filled = [bins == b for b in np.unique(bins)]
            points = [(probability[known, i][inside].mean(), target[inside].mean()) for inside in filled]
            reliability_axes[i].plot(*zip(*points), linewidth=1, color="C0", alpha=0.5)
            # A dot's area is the share of the images in it.
            reliability_axes[i].scatter(*zip(*points), s=[4 + 200 * inside.mean() for inside in filled], color="C0", alpha=0.5)
        ece = next(r for r in rows if r["metric"] == "ece" and r["label"] == label)
        for axes, text in ((roc_axes, f"AUROC {cell(row, False).split(' **')[0]}"), (reliability_axes, f"ECE {cell(ece, False)}")):
            axes[i].text(0.97, 0.04, text, ha="right", va="bottom", fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8})
    save_figure(roc, output_dir / "roc.png")
    save_figure(reliability, output_dir / "reliability.png")


def plot_training(predictions: list[tuple], first_seed: int, output_dir: Path) -> None:
    """training.png: the validation loss by epoch; a dot marks the epoch that was kept."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for k, (_, _, losses) in enumerate(predictions):
        epochs = np.arange(1, len(losses) + 1)
        axis.plot(epochs, losses, linewidth=1.3, label=f"seed {first_seed + k}")
        axis.scatter(epochs[np.argmin(losses)], min(losses), s=25)
    axis.set(xlabel="epoch", ylabel="validation loss (masked BCE)", title="Training; the epoch kept is marked")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    save_figure(figure, output_dir / "training.png")


def save_classifier(args, tables: Tables, rows: list[dict], thresholds: list[float | None], weights: Path, output_dir: Path) -> None:
    """classifier/: the weights and all that a user of them must know, renamed into place together."""
    part = output_dir / ".classifier.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_tensors(load_tensors(weights, f"delete {weights.parent} and run again")[0], part / "model.safetensors")
    # Synthetic images have no patients.
    real = pd.concat([table[table["real"]] for table in (tables.train, tables.val)])["patient"]
    patients = sorted({patient_hash(patient) for patient in real})
    # JSON has no NaN, which an interval is when no draw of patients had both classes.
    rows = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    aurocs = [row for row in rows if row["metric"] == "auroc" and row["label"] != "all"]
    spec = {
        "script": "eval_downstream.py", "arch": args.arch, "labels": tables.labels, "resolution": args.resolution,
        "source_resolution": tables.source_resolution, "resize_mode": tables.resize_mode, "channels": "mean, repeated three times",
        "normalisation": NORMALISATION, "thresholds": dict(zip(tables.labels, thresholds)), "train_on": args.train_on, "uncertain": args.uncertain,
        "split": {"seed": args.split_seed, "fingerprint": hashlib.sha256("\n".join(patients).encode()).hexdigest(), "patients": patients},
        "real_test_auroc": {row["label"]: {key: row[key] for key in ("value", "low", "high", "n", "note")} for row in aurocs},
        "model_sha256": hashlib.sha256((part / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    spec["spec_sha256"] = spec_digest(spec)
    write_text(part / "classifier.json", json.dumps(spec, indent=2) + "\n")
    shutil.rmtree(output_dir / "classifier", ignore_errors=True)
    os.replace(part, output_dir / "classifier")


def headline(labels: list[str], rows: list[dict]) -> str:
    """What the figures say, in two sentences."""
    found = {(row["metric"], row["label"]): row for row in rows}
    gains = [found["accuracy_gain", label] for label in labels]
    scored = [row for row in gains if row["value"] is not None]
    beaten = sum(row["low"] > 0 for row in scored)
    constant = sum("CONSTANT" == found["predicted_positive_rate", label]["note"] for label in labels)
    aurocs = [found["auroc", label] for label in labels if found["auroc", label]["value"] is not None]
    better = sum(row["low"] > 0.5 for row in aurocs)
    mean = found["auroc", "all"]
    text = f"Accuracy beats always naming the more frequent class, beyond its interval, in {beaten} of {len(scored)} labels"
    text += f"; {constant} of {len(scored)} give the same answer for every image (CONSTANT). " if constant else ". "
    if mean["value"] is None:
        return text + "No label has an AUROC."
    return text + f"AUROC is above chance, beyond its interval, in {better} of {len(aurocs)}; its mean is {cell(mean, False).split(' **')[0]}."


def footnotes(args: argparse.Namespace, tables: Tables) -> list[str]:
    """How the figures came about, and what limits them."""
    notes = [
        f"95% intervals: {args.bootstrap_samples:,} draws of {tables.test['patient'].nunique():,} patients ({len(tables.test):,} images) "
        + ("with replacement." if args.classifier or args.num_seeds == 1 else f"with replacement, widened by what the {args.num_seeds} seeds vary by."),
        f"CONSTANT: at 0.5 the same answer for at least {1 - CONSTANT_RATE:.1%} of the images in every seed. (≤ floor): accuracy is "
        "not above the constant predictor's, beyond the interval of their difference.",
        f"Uncertain labels: {args.uncertain}. Images: {tables.resize_mode} to {tables.source_resolution} pixels, the mean of the "
        "channels, then the network's input.",
        f"{tables.shared_patients:,} patients are in both training and test.",
    ]  # fmt: skip
    return notes + [note for note in tables.notes if "patients are in both" not in note]


def one_class(targets: np.ndarray, where: str) -> list[str | None]:
    """For each label, why it cannot be told apart in these images, or None."""
    reasons = []
    for column in targets.T:
        values = np.unique(column[~np.isnan(column)])
        words = {0: "no known value", 1: "negatives only" if 0 in values else "positives only"}
        reasons.append(f"{words[len(values)]} among the {where} images" if len(values) < 2 else None)
    return reasons


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 of what the images show and what is known of them."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).data if array.dtype != object else "\n".join(map(str, array)).encode())
    return sha.hexdigest()


def open_output(output_dir: Path, settings: dict) -> None:
    """Ends with exit status 2 where the folder holds results made in another way, or other files; else notes how these are made."""
    path = output_dir / "settings.json"
    try:
        if path.is_file():
            saved = read_json(path, f"delete {output_dir} and run again")
            differing = [key for key in settings.keys() | saved.keys() if settings.get(key) != saved.get(key)]
            if differing:
                fail(f"{output_dir} holds results made with another {', '.join(sorted(differing))}; pass another --output_dir or delete it")
        # What a start that met a full disk left does not make it another's folder.
        elif output_dir.is_dir() and any(found.name != f".{path.name}.part" for found in output_dir.iterdir()):
            fail(f"--output_dir {output_dir}: not empty and not a folder of this script; pass another")
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        fail(f"--output_dir {output_dir}: cannot be written ({error.strerror})")


def load_reference(folder: str, labels: list[str], settings: dict, test: Images, draws: int, seed: int) -> Scores:
    """The scores of a finished --train_on real run on the same test images; ends with exit status 2 where the two do not compare."""
    path = Path(folder) / "downstream_metrics.json"
    try:
        found = json.loads(path.read_text())
        theirs, entries, reasons = dict(found["settings"]), list(found["seeds"]), list(found["training_reasons"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"--reference {folder}: no finished run ({error}); pass the output folder of one with --train_on real")
    # All but what is trained on, which is the difference that is asked about, and the seeds.
    free = ("train_on", "training", "seed", "mixed_geometry")
    differing = [key for key in settings if theirs.get(key) != settings[key] and key not in free]
    if theirs.get("train_on") != "real" or differing:
        what = "is not trained on real images" if theirs.get("train_on") != "real" else f"was made with another {', '.join(differing)}"
        fail(f"--reference {folder}: {what}; the ratio needs the same test images, labels, number of images and schedule")
    try:
        # A number, so that no name leads out of the folder.
        seeds = [Path(folder) / "seeds" / f"seed-{int(entry['seed'])}" for entry in entries]
        thresholds = [[entry["thresholds"][label] for label in labels] for entry in entries]
        if any(value is not None and not isinstance(value, float) for values in thresholds for value in values) or len(reasons) != len(labels):
            raise TypeError("thresholds or training_reasons of another form")
    except (KeyError, TypeError, ValueError) as error:
        fail(f"--reference {folder}: downstream_metrics.json is not as this script writes it ({error}); run it again")
    return score(test, [read_predictions(path) for path in seeds], thresholds, reasons, draws, seed)


def describe_run(args: argparse.Namespace, tables: Tables, train: Images, test: Images, sizes: dict, output_dir: Path) -> None:
    """What is trained and tested on, before it happens."""
    lines = []
    if len(train.targets):
        network = f"{args.arch} from {args.weights}, {args.num_seeds} seeds"
        lines.append(f"{'train':>9}  {len(tables.train):,} images ({args.train_on}), validation {len(tables.val):,}; {network}")
    lines.append(f"{'test':>9}  {len(tables.test):,} real images of {tables.test['patient'].nunique():,} patients")
    for i, label in enumerate(tables.labels):
        targets = [part.targets[:, i] for part in (train, test) if len(part.targets)]
        counts = [f"{int(np.nansum(t)):,} positive, {int(np.isnan(t).sum()):,} masked of {len(t):,}" for t in targets]
        lines.append(f"{'label':>9}  {label}: {' in training; '.join(counts)} in test")
    left = ", ".join(f"{count:,} {reason}" for reason, count in tables.left_out.items() if count)
    if left:
        lines.append(f"{'left out':>9}  {left}")
    if len(sizes) > 1:
        target = f"{tables.source_resolution}x{tables.source_resolution} by {tables.resize_mode}"
        lines.append(f"{'resized':>9}  images of {len(sizes):,} sizes, such as {', '.join(list(sizes)[:3])}, to {target}")
    lines.append(f"{'output':>9}  {output_dir}")
    print("\n".join([*lines, *(f"{'warning':>9}  {note}" for note in tables.notes)]), flush=True)


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    sharded = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]
    if sharded:
        fail(f"{sharded[0]} is not supported: these models fit on one device, so use plain data parallelism (launch/accelerate/)")
    accelerator = Accelerator(
        # Without this, processes that torchrun starts on a machine without a GPU would each train for themselves.
        cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        # The others wait while the first process decodes the images.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        fail("--mixed_precision fp16 needs a GPU; pass bf16 or no")
    # The same seed is to give the same figures; and scores are not rounded to TF32.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False, False
    return accelerator


def load_images(args, accelerator, tables: Tables, resolution: int, output_dir: Path) -> tuple[Images, Images, Images, dict]:
    """Training, validation and test images, decoded once, and the count of each size that was found."""
    cache_dir = Path(args.image_cache_dir or output_dir.parent / "image_cache")
    geometry = (tables.source_resolution, tables.resize_mode, resolution)
    none, parts = np.empty((0, len(tables.labels)), np.float32), (tables.train, tables.val, tables.test)
    targets = [label_targets(table, tables.labels, args.uncertain) if len(table) else none for table in parts]
    patients = [table["patient"].to_numpy(dtype=object) for table in parts]
    count = len(tables.train)
    images = [list(tables.test["image"]), *([[*tables.train["image"], *tables.val["image"]]] if count else [])]
    (test_pixels, *training), sizes = cache_pixels(accelerator, images, *geometry, cache_dir)
    pixels = training[0] if training else np.empty((0, resolution, resolution), np.uint8)
    parts = zip((pixels[:count], pixels[count:], test_pixels), targets, patients)
    return *(Images(*part) for part in parts), sizes


def summarise(args, settings, tables, scores, rows, predictions, thresholds, training_reasons) -> dict:
    """downstream_metrics.json: a function of the data and the settings alone, so the same command writes the same bytes."""
    seeds = []
    for k, (_, _, losses) in enumerate(predictions):
        by_label = {name: [None if math.isnan(value) else float(value) for value in scores.values[name][:, k]] for name in METRICS}
        metrics = {name: dict(zip(tables.labels, values)) for name, values in by_label.items()}
        thresholds_of = dict(zip(tables.labels, thresholds[k]))
        seeds.append({"seed": args.seed + k, "validation_losses": losses, "thresholds": thresholds_of, "metrics": metrics})
    return {
        "script": "eval_downstream.py", "train_on": "nothing" if args.classifier else args.train_on, "settings": settings,
        "arguments": {key: value for key, value in vars(args).items() if key not in ("output_dir", "image_cache_dir")},
        "versions": {name: version(name) for name in ("torch", "torchvision", "accelerate", "scikit-learn", "numpy")},
        "images": {
            "train": len(tables.train), "validation": len(tables.val), "test": len(tables.test), "test_patients": int(tables.test["patient"].nunique()),
            "patients_in_training_and_test": tables.shared_patients, "left_out": tables.left_out,
        },
        "training_reasons": training_reasons, "notes": tables.notes, "results": rows, "seeds": seeds,
    }  # fmt: skip


def default_output_dir(args: argparse.Namespace) -> Path:
    name = "_".join(filter(None, [args.train_on, args.synthetic and Path(args.synthetic).stem]))
    if args.classifier:
        table = args.test_csv or args.real_csv or DEFAULT_TABLES[0]
        name = f"{Path(args.classifier).resolve().parent.name}_on_{Path(table).stem}"
    return Path("downstream") / name


def run_settings(args, tables: Tables, spec: dict, images: tuple[Images, Images, Images], processes: int) -> dict:
    """What must not change between a run and its continuation, nor between runs that are compared.

    Where the files lie does not matter, what is in them does.
    """
    train, val, test = images
    free = (
        "output_dir", "image_cache_dir", "reference", "bootstrap_samples", "synthetic", "real_csv", "validation_csv", "test_csv", "image_root",
        "classifier", "max_test_images",
    )  # fmt: skip
    settings = {key: value for key, value in vars(args).items() if key not in free} | {
        "labels": tables.labels, "source_resolution": tables.source_resolution, "resize_mode": tables.resize_mode,
        "processes": processes, "num_train_images": len(tables.train), "num_val_images": len(tables.val),
        "test": digest(test.pixels, test.targets, test.patients),
        "training": digest(train.pixels, train.targets, val.pixels, val.targets), "weights_sha256": spec.get("model_sha256"),
    }  # fmt: skip
    if spec:
        settings |= {key: spec[key] for key in ("arch", "resolution", "train_on")} | {"weights": "a saved classifier"}
    elif args.weights not in ("imagenet", "none"):
        settings["weights_sha256"] = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()
    return settings


def run_seeds(args, accelerator: Accelerator, num_labels: int, images: tuple[Images, Images, Images], folders: list[Path]) -> tuple[list, list]:
    """Trains what is not trained yet; predictions and Youden's thresholds by seed."""
    train, val, test = images
    predictions, thresholds = [], []
    for seed, folder in enumerate(folders, args.seed):
        parts = [shuffle_labels(part, seed) if args.shuffle_labels else part for part in (train, val)]
        run_seed(args, accelerator, seed, num_labels, *parts, test, folder)
        predictions.append(read_predictions(folder))
        thresholds.append([youden_threshold(*known) for known in zip(parts[1].targets.T, predictions[-1][0].T)])
    return predictions, thresholds


def title_of(args: argparse.Namespace, tables: Tables) -> str:
    if args.classifier:
        return f"the saved classifier {args.classifier}"
    kind = "synthetic and real" if args.train_on == "both" else args.train_on
    return f"trained on {len(tables.train):,} {kind} images{' with shuffled labels' if args.shuffle_labels else ''}"


@plain_errors("lower --train_batch_size or --resolution")
def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir or default_output_dir(args))
    classifier, spec = load_classifier(args.classifier) if args.classifier else (None, {})
    accelerator = start_accelerator(args)
    tables = load_tables(args, spec, accelerator)
    labels = tables.labels
    if not args.classifier:
        # Said before hours of decoding, if they cannot be had.
        load_initial_weights(accelerator, build_classifier(args.arch, len(labels)), args.arch, args.weights)
    *images, sizes = load_images(args, accelerator, tables, spec.get("resolution", args.resolution), output_dir)
    train, _, test = images
    training_reasons = one_class(train.targets, "training") if len(train.targets) else [None] * len(labels)
    test_reasons = one_class(test.targets, "test")
    if all(test_reasons):
        found = f"{labels[0]} has {test_reasons[0]}, and so on for all {len(labels)} labels"
        fail(f"nothing to score: {found}; pass other --labels or another table")

    settings = run_settings(args, tables, spec, images, accelerator.num_processes)
    bootstrap_seed = stream_seed(args.split_seed, "bootstrap")
    if args.reference:
        reference = load_reference(args.reference, labels, settings, test, args.bootstrap_samples, bootstrap_seed)
    if accelerator.is_main_process:
        open_output(output_dir, settings)
        describe_run(args, tables, train, test, sizes, output_dir)
    accelerator.wait_for_everyone()

    folders = [output_dir / "seeds" / f"seed-{args.seed + k}" for k in range(args.num_seeds)]
    if args.classifier:
        logits = predict(accelerator, classifier.to(accelerator.device), test.pixels, spec["normalisation"])
        predictions = [(None, 1 / (1 + np.exp(-logits.astype(np.float64))), [])]
        thresholds = [[spec["thresholds"][label] for label in labels]]
    else:
        predictions, thresholds = run_seeds(args, accelerator, len(labels), images, folders)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    scores = score(test, predictions, thresholds, training_reasons, args.bootstrap_samples, bootstrap_seed)
    reasons = [a or b for a, b in zip(test_reasons, training_reasons)]
    rows = result_rows(labels, scores, test, reasons, bootstrap_seed)
    if args.reference:
        rows += ratio_rows(labels, scores, reference, Path(args.reference).name, bootstrap_seed)
    title = title_of(args, tables)
    plot_curves(labels, rows, test, predictions, title, output_dir)
    if not args.classifier:
        plot_training(predictions, args.seed, output_dir)
    if not args.classifier and not args.shuffle_labels:
        best = int(np.argmin([min(losses) for _, _, losses in predictions]))
        own = Scores(*({name: figures[:, best : best + 1] for name, figures in part.items()} for part in (scores.values, scores.samples)))
        own_rows = result_rows(labels, own, test, reasons, bootstrap_seed)
        save_classifier(args, tables, own_rows, thresholds[best], folders[best] / "model.safetensors", output_dir)
    lead = headline(labels, rows)
    table = table_markdown(f"Real test images, {title}", labels, rows, lead, footnotes(args, tables))
    write_text(output_dir / "downstream_table.md", table)
    summary = summarise(args, settings, tables, scores, rows, predictions, thresholds, training_reasons)
    write_text(output_dir / "downstream_metrics.json", json.dumps(summary, indent=2) + "\n")
    print(f"{lead}\n{output_dir / 'downstream_table.md'}, with roc.png, reliability.png and downstream_metrics.json")


if __name__ == "__main__":
    main(parse_args())
