# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "diffusers>=0.36", "accelerate>=1.10", "torchxrayvision>=1.5", "vendi-score>=0.0.3",
#   "safetensors>=0.5", "numpy>=1.26", "pandas>=2.2", "scipy>=1.11", "matplotlib>=3.8", "pillow>=10.3", "tqdm>=4.66",
# ]
# ///
"""Judge generated chest radiographs against real ones: every column of the paper's Table 3, with n, intervals and floors.

    accelerate launch eval_generation.py --synthetic samples/bitfit --classifier downstream/real/classifier   # CheXpert in this folder
    python eval_generation.py --synthetic samples/unet --baseline samples/stable-diffusion-v1-5 --vae runs/unet
    python eval_generation.py --synthetic samples/lora --real_csv hospital/table.csv --train_csv hospital/table.csv
    python eval_generation.py --synthetic samples/lora --features xrv.safetensors --pool paper      # XRV's weights, no network

Writes generation_metrics.json, generation_metrics.md (Table 3's form) and pictures to --output_dir. What the networks say of
an image is kept in --feature_cache_dir by the image's content, so that nothing is computed twice in a sweep.
"""

import argparse
import contextlib
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
import shlex
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, NoReturn

# bitsandbytes, which diffusers imports, reports a missing 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from diffusers import AutoencoderKL
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save
from safetensors.torch import load_file
from scipy import linalg, stats
from scipy.linalg import blas, lapack
from torchvision.models import get_model
from tqdm.auto import tqdm
from vendi_score.vendi import entropy_q

with warnings.catch_warnings():
    # On import it silences every warning of the process.
    import torchxrayvision as xrv

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
# Table 3's names of its conditions.
ABBREVIATIONS = {
    "Cardiomegaly": "Ca", "Lung Opacity": "Lo", "Edema": "Ed", "No Finding": "Nf", "Pneumothorax": "Pn", "Pleural Effusion": "Pe",
}  # fmt: skip
XRV_WEIGHTS = "densenet121-res224-all"
# CheXpert's names where torchxrayvision has others.
XRV_NAMES = {"Pleural Effusion": "Effusion"}
# Below it the covariance of 1,024 features is singular.
FEW_IMAGES = 1024
# Sizes for the line in 1/n, as shares of half the images.
SERIES = (1.0, 0.85, 0.7, 0.6, 0.5)
NEIGHBOURS = 5
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
# Mean absolute difference between channels, of 255 levels, from which a tint is seen: on mid-grey it is a CIE76 Delta E of
# 2.1 (red against blue) to 4.5 (green), where 2.3 is just noticeable.
VISIBLE_COLOUR = 4.0
THUMBNAIL = 32
# Images in one file of the feature cache; what an interrupted run loses at most, per process.
SHARD_IMAGES = 1024
# Rows of a matrix of distances that are held at a time, so that memory does not grow with the number of pairs.
CHUNK = 512


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


# fmt: off
def add_image_arguments(parser):
    group = parser.add_argument_group("images")
    group.add_argument("--synthetic", required=True, help="folder of sample.py, or the CSV of any image table")
    group.add_argument("--real_csv", help=f"image table of real radiographs (default: the first of {', '.join(DEFAULT_TABLES)} that exists)")
    group.add_argument("--image_root", help="folder that the paths of --real_csv and --train_csv start from (default: the table's folder or its parent)")
    group.add_argument("--real_split", choices=["train", "val", "test", "all"], default="test", help="part of the patients of --real_csv; all for a ready-made test table")
    group.add_argument("--train_csv", help="image table of the training images, for memorisation (default: not measured)")
    group.add_argument("--train_split", choices=["train", "val", "test", "all"], default="train", help="part of the patients of --train_csv; all for a ready-made training table")
    group.add_argument("--max_train_samples", type=positive_int, help="as it was given to the training script, so that the same images are looked at (default: the whole part)")
    group.add_argument("--split_seed", type=whole_number, default=0, help="seed of the split by patient; the same in every script")
    group.add_argument("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="what -1 means in real tables: ones counts it as positive, zeros as negative, ignore as neither")
    group.add_argument("--baseline", help="samples of the untouched base model, scored beside --synthetic (default: none)")
    group.add_argument("--vae", help="run folder or pipeline, on disk or on the hub, whose VAE the real images are put through as a floor (default: none)")
    group.add_argument("--labels", nargs="+", metavar="LABEL", help="findings to score one by one, in quotes where they have spaces (default: those that --synthetic has)")
    group.add_argument("--max_per_label", type=positive_int, default=5000, help="images of each label, real and synthetic; a seeded choice where there are more")
    group.add_argument("--pool", choices=["unique", "paper"], default="unique", help="an image with two labels counts once overall, or as in the paper once for each")
    group.add_argument("--resolution", type=positive_int, help="side in pixels that every image is brought to first (default: the synthetic images' own, else 512)")
    group.add_argument("--resize_mode", choices=["squash", "pad", "crop"], help="how a real image becomes square (default: as --synthetic notes it, else squash)")
    group.add_argument("--on_bad_image", choices=["stop", "skip"], default="stop", help="an image that cannot be read: stop ends the script; skip decodes all images first, leaves it out, tells it once and counts it")
    group.add_argument("--mixed_geometry", action="store_true", help="compare tables that were made with another resolution or resize mode all the same")


def add_network_arguments(parser):
    group = parser.add_argument_group("networks")
    group.add_argument("--features", default="xrv", help="xrv (torchxrayvision's DenseNet-121, which it downloads), a safetensors file of that network, or a classifier folder of eval_downstream.py")
    group.add_argument("--classifier", help="classifier folder of eval_downstream.py for class consistency (default: the heads of --features)")
    group.add_argument("--batch_size", type=positive_int, default=32, help="images per process and forward pass")
    group.add_argument("--feature_cache_dir", help="folder of the cached features, shared by runs (default: feature_cache beside --output_dir)")


def add_result_arguments(parser):
    group = parser.add_argument_group("results")
    group.add_argument("--num_subsamples", type=positive_int, default=10, help="seeded halves without replacement behind each interval; 1 turns these intervals off")
    group.add_argument("--seed", type=whole_number, default=0, help="seed of every random choice")
    group.add_argument("--output_dir", help="folder of the results (default: evaluations/ and the name of --synthetic)")
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_image_arguments(parser)
    add_network_arguments(parser)
    add_result_arguments(parser)
    args = parser.parse_args(argv)
    unknown = [label for label in args.labels or [] if label not in LABELS]
    if unknown:
        parser.error(f"--labels: {unknown[0]!r} is none of {', '.join(LABELS)}")
    if len(set(args.labels or [])) < len(args.labels or []):
        parser.error("--labels names a finding twice; name each once")
    # Unlike Path.is_file, this does not raise where a folder above is closed or a name too long.
    if not args.real_csv and not any(map(os.path.isfile, DEFAULT_TABLES)):
        parser.error(f"no real images: none of {', '.join(DEFAULT_TABLES)} is in this folder; pass --real_csv, or try bash launch/demo.sh")
    for flag in ("real_csv", "train_csv"):
        path = getattr(args, flag)
        if path and not os.path.isfile(path):
            parser.error(f"--{flag} {path}: no such file; pass the path of an image table")
    if args.image_root and not os.path.isdir(args.image_root):
        parser.error(f"--image_root {args.image_root}: no such folder")
    if args.features != "xrv" and not os.path.exists(args.features):
        parser.error(f"--features {args.features}: neither xrv, nor a safetensors file, nor a classifier folder")
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


# Copied from train_full.add_prompts
def add_prompts(table: pd.DataFrame, template: str, uncertain: str) -> pd.DataFrame:
    """Fills empty prompts from the labels, in LABELS' order; without a positive label the prompt stays empty."""
    names = [name for name in LABELS if name in table]
    named = table[names].isin([1.0, -1.0] if uncertain == "ones" else [1.0]).to_numpy()
    captions = {}
    for row in {bytes(row) for row in named}:
        findings = [name for name, positive in zip(names, row) if positive]
        captions[row] = template.replace("{}", ", ".join(findings)) if findings else ""
    from_labels = pd.Series([captions[bytes(row)] for row in named], index=table.index)
    return table.assign(prompt=table["prompt"].where(table["prompt"] != "", from_labels))


# Copied from train_full.stream_seed
def stream_seed(*key) -> int:
    """A 63-bit seed that is a function of the key alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


# Copied from eval_downstream.find_synthetic_table
def find_synthetic_table(path: str) -> str:
    """The image table of a folder of sample.py, or the table itself; ends with exit status 2 where there is none."""
    csv = Path(path) / "metadata.csv" if os.path.isdir(path) else Path(path)
    if not os.path.isfile(csv):
        missing = "no metadata.csv in it; let sample.py finish" if os.path.isdir(path) else "no such folder or CSV"
        fail(f"--synthetic {path}: {missing}")
    return str(csv)


# Copied from eval_downstream.read_geometry
def read_geometry(csv: str) -> dict[str, list]:
    """The values of `resize_mode` and `resolution` that a table of sample.py has in its rows, [] for other tables."""
    names = ("resize_mode", "resolution")
    # Read as load_image_table does, which has found the table sound.
    form = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "skipinitialspace": True, "index_col": False, "compression": None}
    columns = pd.read_csv(csv, usecols=lambda name: name in names, **form)
    return {name: [v for v in columns.get(name, pd.Series(dtype=str)).unique() if v] for name in names}


# Copied from eval_downstream.patient_hash
def patient_hash(patient: str) -> str:
    """16 hexadecimal digits that stand for a patient in files that are passed on."""
    return hashlib.sha256(f"patient:{patient}".encode()).hexdigest()[:16]


@dataclass
class Source:
    """One set of images: its rows, which of them stand for which label, and what the networks say of each row."""

    name: str
    table: pd.DataFrame
    rows_of: dict[str, np.ndarray]
    pool: np.ndarray
    features: np.ndarray | None = None  # (n, d) float32
    probabilities: np.ndarray | None = None  # (n, heads) float32
    colour: np.ndarray | None = None  # (n,) of 255 grey levels
    thumbnails: np.ndarray | None = None  # (n, THUMBNAIL²) uint8
    hashes: list[str] = field(default_factory=list)

    def sample(self, label: str) -> "Sample":
        rows = self.pool if label == "all" else self.rows_of.get(label, np.array([], int))
        return Sample(self.features[rows], self.table["patient"].to_numpy()[rows])


class Sample(NamedTuple):
    """Features, (n, d), and the patient of each row."""

    features: np.ndarray
    patients: np.ndarray


def positives(table: pd.DataFrame, label: str, uncertain: str) -> np.ndarray:
    """Rows of a table with a label, by position."""
    if label not in table:
        return np.array([], int)
    return np.flatnonzero(table[label].isin([1.0, -1.0] if uncertain == "ones" else [1.0]))


def choose_rows(table: pd.DataFrame, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` of the rows, chosen by a hash of (seed, name), so that added rows hardly change the choice."""
    if len(rows) <= count:
        return rows
    names = table["name"].to_numpy()[rows]
    return np.sort(rows[np.argsort([stream_seed(seed, name) for name in names], kind="stable")[:count]])


def select_source(name: str, table: pd.DataFrame, labels: list[str], matched: dict[str, int], args: argparse.Namespace) -> Source:
    """The images of each label, at most --max_per_label each; overall as many of a label as both sides have, so that a difference
    is not one of the mixture. Of a table without labels, all images."""
    rows_of = {label: choose_rows(table, positives(table, label, args.uncertain), args.max_per_label, args.seed) for label in labels}
    kept = np.unique(np.concatenate(list(rows_of.values()))) if labels else np.arange(len(table))
    shares = [choose_rows(table, rows, matched[label], args.seed) for label, rows in rows_of.items()]
    pool = np.concatenate(shares) if labels else kept
    rows_of = {label: np.searchsorted(kept, rows) for label, rows in rows_of.items()}
    pool = np.searchsorted(kept, pool if args.pool == "paper" else np.unique(pool))
    return Source(name, table.iloc[kept].reset_index(drop=True), rows_of, pool)


def load_split(csv: str, image_root: str | None, split: str, seed: int) -> pd.DataFrame:
    """The frontal rows of the patients in a split; none left ends with exit status 2."""
    table = load_image_table(csv, image_root)
    table = table[table["frontal"]]
    if split != "all" and len(table):
        table = table[assign_splits(table["patient"], seed) == split]
    if table.empty:
        fail(f"{csv}: no frontal row of a patient in split {split!r}; pass --real_split all (or --train_split all) for a ready-made table")
    return table.reset_index(drop=True)


def load_training_images(args: argparse.Namespace) -> pd.DataFrame:
    """The rows that a training script with the same flags takes."""
    table = add_prompts(load_split(args.train_csv, args.image_root, args.train_split, args.split_seed), "{}", args.uncertain)
    table = table[table["prompt"] != ""]
    if table.empty:
        fail(f"{args.train_csv}: no row that would be trained on, since none has a positive label; see --uncertain and the label columns")
    if args.max_train_samples and args.max_train_samples < len(table):
        table = table.sample(n=args.max_train_samples, random_state=args.split_seed % 2**32)
    return table.reset_index(drop=True)


@dataclass
class Plan:
    """The images to score, how they become squares, and what a reader must know of them."""

    sources: dict[str, Source]
    labels: list[str]
    resolution: int
    resize_mode: str
    warnings: list[str]
    counts: list[dict]
    left_out: dict[str, int]


def choose_geometry(args: argparse.Namespace, tables: dict[str, str], notes: list[str]) -> tuple[int, str]:
    """Side and resize mode for every image; ends with exit status 2 where the tables were made in different ways."""
    settled = {}
    # Not str.isdigit, to which "²" is a digit.
    for column, fallback, form in (("resolution", "512", "[1-9][0-9]{0,4}"), ("resize_mode", "squash", "squash|pad|crop")):
        found = {csv: read_geometry(csv)[column] for csv in tables.values()}
        values = list(dict.fromkeys(value for own in found.values() for value in own))
        asked = getattr(args, column)
        if len({*values, str(asked)} if asked else set(values)) > 1:
            told = "; ".join(f"{csv} has {', '.join(own)}" for csv, own in found.items() if own) + (
                f"; --{column} is {asked}" if asked else ""
            )
            if not args.mixed_geometry:
                fail(
                    f"images made with different {column} are not compared ({told}); sample again, or pass --mixed_geometry to compare them all the same"
                )
            notes.append(f"compared in spite of different {column}: {told}")
        if not values and not asked:
            notes.append(f"{next(iter(tables.values()))} does not say its {column}; taken as {fallback}")
        settled[column] = str(asked or next(iter(values), fallback))
        if not asked and not re.fullmatch(form, settled[column]):
            csv = next(csv for csv, own in found.items() if settled[column] in own)
            fail(f"{csv}: the {column} {settled[column]!r} in its rows is none of sample.py's; mend the column or take it out")
    return int(settled["resolution"]), settled["resize_mode"]


def drop_unreadable_rows(accelerator: Accelerator, frames: dict[str, pd.DataFrame]) -> dict[str, int]:
    """Leaves out the images that cannot be read, and counts them by table."""
    left_out = {}
    for name, frame in frames.items():
        bad = check_images(accelerator, list(frame["image"]), skip=True)
        if bad:
            left_out[name], frames[name] = len(bad), frame.drop(frame.index[bad]).reset_index(drop=True)
    return left_out


def plan_evaluation(args: argparse.Namespace, accelerator: Accelerator) -> Plan:
    """Reads the tables and chooses the images; ends with exit status 2 where there is nothing to compare."""
    notes = []
    tables = {"synthetic": find_synthetic_table(args.synthetic)}
    if args.baseline:
        tables["base model"] = str(Path(args.baseline) / "metadata.csv" if Path(args.baseline).is_dir() else args.baseline)
        if not Path(tables["base model"]).is_file():
            fail(f"--baseline {args.baseline}: no metadata.csv in it and no CSV; pass a finished folder of sample.py")
    frames = {name: load_image_table(csv).query("frontal").reset_index(drop=True) for name, csv in tables.items()}
    resolution, resize_mode = choose_geometry(args, tables, notes)
    if frames["synthetic"].empty:
        fail(f"{tables['synthetic']}: no frontal row")
    frames["real"] = load_split(
        args.real_csv or next(p for p in DEFAULT_TABLES if Path(p).is_file()), args.image_root, args.real_split, args.split_seed
    )
    if args.train_csv:
        frames["train"] = load_training_images(args)
    left_out = drop_unreadable_rows(accelerator, frames) if args.on_bad_image == "skip" else {}
    labels = args.labels or [
        label
        for label in [*CONDITIONS, *(name for name in LABELS if name not in CONDITIONS)]
        if len(positives(frames["synthetic"], label, "zeros"))
    ]
    scored = {name: frame for name, frame in frames.items() if name != "train"}
    counts = {name: {label: len(positives(frame, label, args.uncertain)) for label in labels} for name, frame in scored.items()}
    for name in scored:
        if labels and not any(counts[name].values()):
            fail(f"{name} images: none of them has any of {', '.join(labels)}; see the label columns, --labels and --uncertain")
    matched = {label: min(args.max_per_label, counts["real"][label], counts["synthetic"][label]) for label in labels}
    if labels and not any(matched.values()):
        fail(f"no label of {', '.join(labels)} is in the real and in the synthetic images; see the label columns, --labels and --uncertain")
    sources = {name: select_source(name, frame, labels, matched, args) for name, frame in scored.items()}
    for name, source in sources.items():
        fewer = [f"{label} {len(rows):,}" for label, rows in source.rows_of.items() if len(rows) < args.max_per_label]
        if fewer:
            notes.append(
                f"fewer {name} images than the {args.max_per_label:,} asked for (--max_per_label), so scored at the smaller n on both sides: {', '.join(fewer)}"
            )
    if args.train_csv:
        train = frames["train"]
        named = [positives(train, label, args.uncertain) for label in labels]
        # Overall those with one of the labels, as the real ones have.
        sources["train"] = Source("train", train, {}, np.unique(np.concatenate(named)) if labels else np.arange(len(train)))
        shared = len(set(train["patient"]) & set(sources["real"].table["patient"]))
        if shared:
            notes.append(
                f"{shared:,} patients are in the training images and in the real images; memorisation leaves them out of the real ones"
            )
    return Plan(sources, labels, resolution, resize_mode, notes, count_rows("test", frames["real"], args.uncertain), left_out)


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


# Copied from eval_downstream.to_gray
def to_gray(rgb: np.ndarray, resolution: int) -> np.ndarray:
    """(H, W, 3) to (resolution, resolution), uint8: the mean over the channels, so that a tint is no cue, then Lanczos."""
    gray = np.rint(rgb.mean(axis=2)).astype(np.uint8)
    return np.asarray(Image.fromarray(gray).resize((resolution, resolution), Image.Resampling.LANCZOS))


# Copied from eval_downstream.classifier_inputs
def classifier_inputs(gray: torch.Tensor, normalisation: dict[str, list[float]]) -> torch.Tensor:
    """(b, 1, h, w) in [0, 1] to the network's (b, 3, h, w), in the memory format that convolutions are faster in."""
    mean, std = (torch.tensor(normalisation[key], device=gray.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return ((gray.expand(-1, 3, -1, -1) - mean) / std).contiguous(memory_format=torch.channels_last)


def xrv_pixels(rgb: np.ndarray) -> np.ndarray:
    """(R, R, 3) uint8 to torchxrayvision's input, (1, 224, 224) float32 in [-1024, 1024].

    Mean over the channels, then its own XRayResizer, then its own scaling. Other resizers move the features.
    """
    gray = rgb.mean(axis=2, dtype=np.float32)[None]
    return xrv.utils.normalize(xrv.datasets.XRayResizer(224)(gray), 255)


def channel_difference(rgb: np.ndarray) -> float:
    """Mean absolute difference between the three pairs of channels, in grey levels of 255."""
    red, green, blue = rgb.astype(np.int16).transpose(2, 0, 1)
    return float(np.mean([np.abs(red - green).mean(), np.abs(green - blue).mean(), np.abs(blue - red).mean()]))


# ----------------------------------------------------------------------------------------------------------------------
# Model: networks
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fingerprint
def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Copied from eval_downstream.build_classifier
def build_classifier(arch: str, num_labels: int) -> torch.nn.Module:
    """torchvision's network with one output (logit) per label, and random weights."""
    return get_model(arch, weights=None, num_classes=num_labels).to(memory_format=torch.channels_last)


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


# Copied from eval_downstream.spec_digest
def spec_digest(spec: dict) -> str:
    """SHA-256 of what a classifier.json says of its weights: a head scored under another label's name would go unnoticed."""
    keys = ("arch", "labels", "resolution", "source_resolution", "resize_mode", "normalisation", "thresholds", "train_on", "model_sha256")
    return hashlib.sha256(json.dumps([spec.get(key) for key in keys], sort_keys=True).encode()).hexdigest()


# Copied from eval_downstream.load_classifier
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


class Appearance:
    """What needs no network: colour, and a thumbnail for the pixel check of memorisation."""

    key = f"appearance-{THUMBNAIL}"

    def prepare(self, rgb: np.ndarray) -> tuple[float, np.ndarray]:
        return channel_difference(rgb), to_gray(rgb, THUMBNAIL).reshape(-1)

    def compute(self, prepared: list) -> dict[str, np.ndarray]:
        return {
            "colour": np.array([colour for colour, _ in prepared], np.float32),
            "thumbnails": np.stack([pixels for _, pixels in prepared]),
        }


class XRVNetwork:
    """torchxrayvision's DenseNet-121: pooled features, (n, 1024), and its heads as probabilities.

    Its `forward` would put each head's operating threshold at 0.5, which is no probability, so the sigmoid is taken of
    the logits and the operating thresholds are kept beside it.
    """

    def __init__(self, model, device: torch.device):
        self.model, self.device = model.eval().to(device), device
        self.key = f"xrv-{fingerprint(model)}"
        heads = list(model.targets)
        self.labels = [label for label in LABELS if XRV_NAMES.get(label, label) in heads]
        self.columns = [heads.index(XRV_NAMES.get(label, label)) for label in self.labels]
        operating = model.op_threshs
        self.thresholds = {
            label: float(operating[column]) if operating is not None and operating[column].isfinite() else None
            for label, column in zip(self.labels, self.columns)
        }

    def prepare(self, rgb: np.ndarray) -> np.ndarray:
        return xrv_pixels(rgb)

    @torch.no_grad()
    def compute(self, prepared: list) -> dict[str, np.ndarray]:
        features = self.model.features2(torch.from_numpy(np.stack(prepared)).to(self.device))
        probabilities = torch.sigmoid(self.model.classifier(features))[:, self.columns]
        return {"features": features.cpu().numpy(), "probabilities": probabilities.cpu().numpy()}


class ClassifierNetwork:
    """A classifier of eval_downstream.py: what its last layer sees, (n, d), and its heads as probabilities."""

    def __init__(self, folder: str, device: torch.device):
        self.model, self.spec = load_classifier(folder)
        self.model, self.device = self.model.to(device), device
        # Two folders may share weights, but not what the pixels go through on their way to them.
        self.key = f"classifier-{hashlib.sha256(json.dumps([fingerprint(self.model), self.spec['resolution'], self.spec['normalisation']]).encode()).hexdigest()}"
        self.labels, self.thresholds = self.spec["labels"], self.spec["thresholds"]
        self.last = [module for module in self.model.modules() if isinstance(module, torch.nn.Linear)][-1]
        self.last.register_forward_pre_hook(self.keep)

    def keep(self, module: torch.nn.Module, inputs: tuple) -> None:
        self.pooled = inputs[0]

    def prepare(self, rgb: np.ndarray) -> np.ndarray:
        return to_gray(rgb, self.spec["resolution"])

    @torch.no_grad()
    def compute(self, prepared: list) -> dict[str, np.ndarray]:
        gray = torch.from_numpy(np.stack(prepared)).to(self.device)[:, None].float() / 255
        probabilities = torch.sigmoid(self.model(classifier_inputs(gray, self.spec["normalisation"])))
        return {"features": self.pooled.cpu().numpy(), "probabilities": probabilities.cpu().numpy()}


def load_xrv(source: str):
    """torchxrayvision's DenseNet-121 with its own weights (`xrv`) or those of a safetensors file."""
    if source == "xrv":
        try:
            return xrv.models.DenseNet(weights=XRV_WEIGHTS)
        except Exception as error:  # of whichever library it downloads and unpickles with
            fail(
                f"--features xrv: torchxrayvision cannot load its weights ({' '.join(str(error).split())[:200]}); where there is no network, convert them once elsewhere and pass the safetensors file (see README.md)"
            )
    try:
        weights = load_file(source)
        operating = weights.pop("op_threshs", None)
        model = xrv.models.DenseNet(weights=None, num_classes=len(weights["classifier.bias"]))
        model.load_state_dict(weights)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("weights that are not finite")
        if operating is not None and operating.shape != (len(model.targets),):
            raise ValueError("op_threshs of another length than the heads")
    except Exception as error:  # whatever the libraries make of somebody's file
        convert = "import torch, safetensors.torch as s; s.save_file(torch.load('IN.pt', weights_only=True), 'OUT.safetensors')"
        fail(
            f"--features {source}: not a safetensors file of torchxrayvision's DenseNet-121 ({' '.join(str(error).split())[:200]}); "
            f'pickles are not read, one that you trust is converted by: python -c "{convert}"'
        )
    if len(weights["classifier.bias"]) != len(model.targets):
        fail(f"--features {source}: {len(weights['classifier.bias'])} heads, where torchxrayvision's DenseNet-121 has {len(model.targets)}")
    model.op_threshs = operating
    return model


def load_networks(args: argparse.Namespace, accelerator: Accelerator) -> tuple:
    """The network of the features and that of class consistency, which may be one."""
    # Rounding of TF32 moves FID in its third digit.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if Path(args.features).is_dir():
        features = ClassifierNetwork(args.features, accelerator.device)
    else:
        with accelerator.main_process_first():
            features = XRVNetwork(load_xrv(args.features), accelerator.device)
    if args.classifier is None or Path(args.classifier).resolve() == Path(args.features).resolve():
        return features, features
    return features, ClassifierNetwork(args.classifier, accelerator.device)


# Copied from train_full.silence_known_noise
def silence_known_noise() -> None:
    """Drops warnings that say nothing of a run (an empty list of modules, a LoRA of the U-Net alone), or what is told in a
    sentence of its own (missing weights, captions that are cut)."""
    known = [
        ("diffusers.models.modeling_utils", "should be kept in float32: []"),
        ("diffusers.models.modeling_utils", "newly initialized"),
        ("transformers.modeling_utils", "MISSING"),
        ("transformers.tokenization_utils_base", "Token indices sequence length"),
        ("diffusers.loaders.lora_base", "No LoRA keys associated to CLIPTextModel"),
    ]
    for name, words in known:
        logging.getLogger(name).addFilter(lambda record, words=words: words not in record.getMessage())


# Copied from train_full.safetensors_only
@contextlib.contextmanager
def safetensors_only():
    """Within it nothing is unpickled: a model's index.json may name any file for its weights, and the libraries open it."""

    def refuse(*_, **__):
        raise ValueError("its weights are pickles")

    load, torch.load = torch.load, refuse
    try:
        yield
    finally:
        torch.load = load


# Copied from train_full.pickle_advice
def pickle_advice(name: str) -> str:
    """How to convert a model whose weights are pickles, which are not read; empty for any other."""
    path = Path(name)
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    pickles = [p for p in found if p.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl")]
    if not pickles:
        return ""
    # Names are somebody's: quoted for Python as JSON is, and the whole for the shell.
    if path.is_file() or (path / "model_index.json").is_file():
        load = "from_single_file" if path.is_file() else "from_pretrained"
        code = f'from diffusers import StableDiffusionPipeline as P; P.{load}({json.dumps(name, ensure_ascii=False)}).save_pretrained("converted")'
    else:
        old, new = (json.dumps(str(p), ensure_ascii=False) for p in (pickles[0], pickles[0].with_suffix(".safetensors")))
        code = f"import torch, safetensors.torch as s; s.save_file(torch.load({old}, weights_only=True), {new})"
    return f"; pickles are not read, convert those that you trust: python -c {shlex.quote(code)}"


class ThroughVAE:
    """Encodes and decodes an image, as every sample of a latent diffusion model has been decoded."""

    def __init__(self, name: str, device: torch.device):
        source = name
        summary = Path(name) / "training_summary.json"
        if Path(name).is_dir() and not (Path(name) / "vae").is_dir() and summary.is_file():
            # An adapter leaves its base model's VAE as it is.
            source = read_json(summary, "pass a pipeline, or a finished run", base_model=str)["base_model"]
        try:
            with safetensors_only():
                self.vae, report = AutoencoderKL.from_pretrained(source, subfolder="vae", use_safetensors=True, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"no weights for {min(report['missing_keys'])}")
            if not all(tensor.isfinite().all() for tensor in self.vae.parameters()):
                raise ValueError("weights that are not finite")
            self.vae, self.device, self.one_at_a_time = self.vae.eval().to(device, torch.float32), device, threading.Lock()
            # Settings that do not fit the weights show here, before any work.
            if self(np.zeros((64, 64, 3), np.uint8)).shape != (64, 64, 3):
                raise ValueError("what it decodes is no RGB image of the same size")
        except Exception as error:  # whatever the libraries make of somebody's files
            fail(
                f"--vae {name}: no VAE can be loaded from it ({' '.join(str(error).split())[:200]}); pass a run of a training script or a pipeline{pickle_advice(source)}"
            )
        self.key = fingerprint(self.vae)

    @torch.no_grad()
    def __call__(self, rgb: np.ndarray) -> np.ndarray:
        """(R, R, 3) uint8 to the same; the latent is the distribution's mean."""
        pixels = torch.from_numpy(rgb.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)[None].to(self.device)
        # The threads that prepare images share the device's memory, which one full-size image may fill.
        with self.one_at_a_time:
            decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample[0]
        return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# The pass over the images
# ----------------------------------------------------------------------------------------------------------------------


class FeatureStore:
    """Arrays by image content in safetensors files of up to SHARD_IMAGES images, one folder per network and geometry.

    A file is named by the hash of its bytes, so one that is not as it was written is passed over, and its images are computed
    again.
    """

    def __init__(self, directory: Path, key: str):
        self.folder = directory / hashlib.sha256(key.encode()).hexdigest()[:32]
        self.where, self.sound, self.damaged = {}, set(), []
        self.read()

    def read(self) -> None:
        """Takes in the files that have come since the last time."""
        self.damaged = []
        for path in sorted(set(self.folder.glob("*.safetensors")) - self.sound):
            try:
                content = path.read_bytes()
                if hashlib.sha256(content).hexdigest()[:32] != path.stem:
                    raise ValueError("not as it was written")
                self.where.update({bytes(row).hex(): (path, i) for i, row in enumerate(load(content)["hashes"])})
                self.sound.add(path)
            except Exception:  # whatever is made of a file that these scripts did not write
                self.damaged.append(path)

    def add(self, hashes: list[str], arrays: dict[str, np.ndarray]) -> None:
        """Writes beside and renames into place; two processes cannot collide, since the name is of the content."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.part"):
            # An hour is longer than any file takes that another run may be writing; another may also have taken it away.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - stale.stat().st_mtime > 3600:
                    stale.unlink()
        rows = np.array([list(bytes.fromhex(key)) for key in hashes], np.uint8)
        # Not save_file, which writes to a name of its own that a kill would leave behind.
        content = save({"hashes": rows, **arrays})
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_bytes(content)
            os.replace(part, path)
        except OSError:
            # On a full disk, half a file would take the room of another.
            part.unlink(missing_ok=True)
            raise

    def get(self, hashes: list[str], name: str) -> np.ndarray:
        """An array's rows for these images, (n, ...); one file of the store is open at a time."""
        wanted, result = {}, None
        if not self.where.keys() >= set(hashes):
            fail(f"{self.folder}: a file of features was damaged or taken away while this ran; start again")
        for row, key in enumerate(hashes):
            path, i = self.where[key]
            wanted.setdefault(path, []).append((row, i))
        for path, pairs in wanted.items():
            rows, indices = np.array(pairs).T
            try:
                with safe_open(path, "numpy") as file:
                    stored = file.get_tensor(name)
            except SafetensorError as error:
                fail(f"{path}: not a readable file of features ({error}); delete it")
            result = np.empty((len(hashes), *stored.shape[1:]), stored.dtype) if result is None else result
            result[rows] = stored[indices]
        return result


def hash_images(paths: list[str]) -> dict[str, str]:
    """SHA-256 of each file's bytes; a file that cannot be read has none, which `check_images` then says."""

    def digest(path: str) -> str:
        try:
            # Not of a pipe, which would be waited for.
            return hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else ""
        except (OSError, ValueError):  # a ValueError where a NUL is in the path
            return ""

    with ThreadPoolExecutor(8) as pool:
        found = tqdm(pool.map(digest, paths), "reading images", len(paths), unit="image", leave=False)
        return dict(zip(paths, found))


def compute_share(jobs: list[tuple], stores: list[tuple], geometry: tuple[int, str], vae: ThroughVAE | None, args, progress: tqdm) -> None:
    """One pass over this process's images: each is decoded once and goes to every network that does not know it yet."""
    pending = {network.key: ([], []) for network, _ in stores}

    def prepare(job: tuple) -> tuple:
        key, path, through_vae = job
        rgb = load_image(path, *geometry)
        rgb = vae(rgb) if through_vae else rgb
        return key, {network.key: network.prepare(rgb) for network, store in stores if key not in store.where}

    def flush(network, store: FeatureStore, least: int) -> None:
        hashes, arrays = pending[network.key]
        if len(hashes) >= least:
            store.add(hashes, {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]})
            pending[network.key] = ([], [])

    # Few decoded ahead, since all would not fit; in threads, since decoding and resizing take as long as a GPU does.
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(jobs), args.batch_size):
            batch = list(pool.map(prepare, jobs[start : start + args.batch_size]))
            for network, store in stores:
                known = [(key, prepared[network.key]) for key, prepared in batch if network.key in prepared]
                if known:
                    pending[network.key][0].extend(key for key, _ in known)
                    pending[network.key][1].append(network.compute([prepared for _, prepared in known]))
                flush(network, store, SHARD_IMAGES)
            progress.update(len(batch))
    for network, store in stores:
        flush(network, store, 1)


def find_jobs(accelerator: Accelerator, plan: Plan, networks: list, vae: ThroughVAE | None, directory: Path) -> tuple[list[tuple], list[tuple]]:
    """What the cache lacks of the plan's images, (key, path, whether through the VAE), and each network with its store.

    Sets each source's `hashes`; images that cannot be read end with exit status 2.
    """
    geometry = (plan.resolution, plan.resize_mode)
    paths = list(dict.fromkeys(path for source in plan.sources.values() for path in source.table["image"]))
    hashes = broadcast_object_list([hash_images(paths) if accelerator.is_main_process else None])[0]
    stores = [(network, FeatureStore(directory, f"{network.key}/{geometry}")) for network in networks]
    jobs = {}
    for source in plan.sources.values():
        through_vae = source.name == "through the VAE"
        suffix = f"/{vae.key}/{geometry}" if through_vae else ""
        for path in source.table["image"]:
            key = hashlib.sha256(f"{hashes[path]}{suffix}".encode()).hexdigest() if through_vae else hashes[path]
            source.hashes.append(key)
            if any(key not in store.where for _, store in stores):
                # Those without a hash are told one by one.
                jobs[key or path] = (key, path, through_vae)
    # What is in the cache has been read before; a file without a hash is not there.
    check_images(accelerator, list(dict.fromkeys(path for _, path, _ in jobs.values())))
    unread = [path for path in paths if not hashes[path]]
    if unread:
        fail(f"{unread[0]}: could not be read at first, and now can; start again")
    if accelerator.is_main_process:
        damaged = [path for _, store in stores for path in store.damaged]
        if damaged:
            print(f"  passed over  {len(damaged)} files of the cache that are not as they were written, to be deleted: {', '.join(map(str, damaged[:5]))}")
        print(f"{len(paths):,} image files, {len(jobs):,} not in the cache {directory}")
    return list(jobs.values()), stores


def compute_features(args, accelerator: Accelerator, plan: Plan, jobs: list[tuple], stores: list[tuple], vae: ThroughVAE | None) -> None:
    """Fills the cache with what it lacks, by all processes."""
    mine = jobs[accelerator.process_index :: accelerator.num_processes]
    # The main process counts for itself; the others are at about the same place.
    with tqdm(total=len(mine), desc="computing features", unit="image", disable=not (mine and accelerator.is_main_process)) as progress:
        compute_share(mine, stores, (plan.resolution, plan.resize_mode), vae, args, progress)
    accelerator.wait_for_everyone()
    for _, store in stores:
        store.read()


def fill_sources(plan: Plan, stores: dict[str, FeatureStore], features, classifier) -> None:
    """Gives every source its arrays; features that no network with sound weights gives end with exit status 2."""
    for source in plan.sources.values():
        source.features = stores[features.key].get(source.hashes, "features")
        source.probabilities = stores[classifier.key].get(source.hashes, "probabilities")
        for name in ("colour", "thumbnails"):
            setattr(source, name, stores[Appearance.key].get(source.hashes, name))
        sound = np.isfinite(source.features).all(axis=1) & (source.features != 0).any(axis=1)
        sound &= np.isfinite(source.probabilities).all(axis=1)
        if not sound.all():
            row = int((~sound).argmax())
            fail(
                f"{source.table['image'][row]}: its features are all zero or not finite ({(~sound).sum():,} of {len(sound):,} {source.name} images); the weights of --features or --classifier are broken"
            )


# ----------------------------------------------------------------------------------------------------------------------
# The work: statistics
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.result_row
def result_row(metric, value, label="all", low=None, high=None, n=None, floor=None, note=None) -> dict:
    """One row of the form that all results share; a value that could not be computed is null with a note."""
    return {"metric": metric, "label": label, "value": value, "low": low, "high": high, "n": n, "floor": floor, "note": note}


# Copied from train_full.count_rows
def count_rows(part: str, table: pd.DataFrame, uncertain: str) -> list[dict]:
    """The paper's Table 2 for one part of the data: its images, and those with each finding."""
    positive = table.reindex(columns=[name for name in LABELS if name in table]).isin([1.0, -1.0] if uncertain == "ones" else [1.0]).sum()
    by_label = [result_row(f"images_{part}", int(count), label, n=len(table)) for label, count in positive.items()]
    return [result_row(f"images_{part}", len(table), n=len(table)), *by_label]


def wilson(count: float, n: int) -> tuple[float, float]:
    """95% interval of a share (Wilson, 1927)."""
    z, p = 1.959964, count / n
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def share_row(metric: str, hits: np.ndarray, label: str = "all", **more) -> dict:
    """The share of true values with its Wilson interval."""
    low, high = wilson(float(hits.sum()), len(hits))
    return result_row(metric, float(hits.mean()), label, low, high, len(hits), **more)


def percentile_row(metric: str, values: np.ndarray, share: float, label: str = "all", **more) -> dict:
    """A percentile with the 95% interval of its rank, which is binomial."""
    ordered, n = np.sort(values), len(values)
    low, high = stats.binom.ppf([0.025, 0.975], n, share).astype(int).clip(0, n - 1)
    return result_row(metric, float(np.quantile(ordered, share)), label, float(ordered[low]), float(ordered[high]), n, **more)


def mean_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """95% interval of a mean of independent values."""
    if len(values) < 2:
        return None, None
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half


def spread(values: np.ndarray, scale: float = 1.0) -> float | None:
    """Half width of a 95% interval from one value per seed, by Student's t, times `scale`; None for a single seed."""
    return float(scale * stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1)) if len(values) > 1 else None


def around(value: float, half: float | None, least: float = -math.inf) -> dict:
    return {"low": None, "high": None} if half is None else {"low": max(least, value - half), "high": value + half}


def draw(patients: np.ndarray, *key) -> np.ndarray:
    """Rows in a seeded order, patient by patient, so that beginning and end share at most one patient."""
    _, codes = np.unique(patients, return_inverse=True)
    order = np.random.default_rng(stream_seed(*key)).permutation(codes.max() + 1)
    return np.argsort(order[codes], kind="stable")


def split_halves(patients: np.ndarray, *key) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of rows, about as large as each other, without a patient in common."""
    order = draw(patients, *key)
    middle = len(order) // 2
    while middle < len(order) and patients[order[middle]] == patients[order[middle - 1]]:
        middle += 1
    return order[:middle], order[middle:]


# ----------------------------------------------------------------------------------------------------------------------
# The work: distances between sets of features
# ----------------------------------------------------------------------------------------------------------------------


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean, (d,), and covariance, (d, d), in float64; two passes, divided by n - 1. Of the covariance the upper half is filled."""
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    features -= mean
    return mean, blas.dsyrk(1 / (len(features) - 1), features.T)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """||m1 - m2||² + tr(S1 + S2) - 2 tr((S1^½ S2 S1^½)^½), at least 0 (Heusel et al., 2017, arXiv 1706.08500).

    With S1 = U^T U the eigenvalues of S1 S2 are those of U S2 U^T, which is symmetric: they are real and come faster. Of
    the covariances the upper half is read, with which LAPACK's reduction takes less time than with the lower.
    """
    # SciPy throughout: it brings a BLAS of its own, and its threads and NumPy's would wait for each other. LAPACK's routines by
    # name, since `linalg.eigvalsh` copies and checks for a fifth of the whole time.
    factor, singular = lapack.dpotrf(cov1, clean=0)
    if singular:
        values, vectors = linalg.eigh(cov1, lower=False)
        root = vectors * np.sqrt(values.clip(min=0))
        product = root.T @ blas.dsymm(1.0, cov2, root)
    else:
        product = lapack.dsygst(cov2, factor, itype=2)[0]
    workspace = int(lapack.dsytrd_lwork(len(product))[0])
    _, diagonal, off_diagonal, _, _ = lapack.dsytrd(product, lwork=workspace, overwrite_a=1)
    eigenvalues, unconverged = lapack.dsterf(diagonal, off_diagonal, overwrite_d=1, overwrite_e=1)
    if unconverged:
        raise ArithmeticError(f"FID: {unconverged} eigenvalues did not converge")
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(eigenvalues.clip(min=0)).sum()
    return max(0.0, float(distance))


def fid(one: np.ndarray, two: np.ndarray) -> float:
    """FID of two sets of features, (n, d) and (m, d).

    For fewer images than features the trace is the sum of the singular values of the (n, m) matrix of products of centred
    rows, over √((n-1)(m-1)), which is smaller than the covariances and the same number.
    """
    if max(len(one), len(two)) > one.shape[1]:
        return frechet_distance(*moments(one), *moments(two))
    means = [features.mean(axis=0, dtype=np.float64) for features in (one, two)]
    centred = [(features - mean) / math.sqrt(len(features) - 1) for features, mean in zip((one, two), means)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + sum(np.square(own).sum() for own in centred) - 2 * cross
    return max(0.0, float(distance))


def fid_series(real: Sample, other: Sample, sizes: list[int], seed: int, seeds: int) -> np.ndarray:
    """FID of subsets without replacement, (seeds, sizes); the subsets of a seed lie in each other."""
    series = np.empty((seeds, len(sizes)))
    for i in range(seeds):
        orders = [draw(sample.patients, seed, "fid", i) for sample in (real, other)]
        for j, size in enumerate(sizes):
            series[i, j] = fid(real.features[orders[0][:size]], other.features[orders[1][:size]])
    return series


def line_at_infinity(sizes: list[int], values: np.ndarray) -> float:
    """Where a line in 1/n through the FIDs meets 1/n = 0 (Chong and Forsyth, 2020, arXiv 1911.07023)."""
    return float(np.polyfit(1 / np.array(sizes, float), values, 1)[1])


def kid(one: np.ndarray, two: np.ndarray, subset: int, seed: int) -> np.ndarray:
    """Unbiased MMD² under (x·y/d + 1)³ for each of KID_SUBSETS pairs of subsets (Binkowski et al., 2018, arXiv 1801.01401)."""
    generator = np.random.default_rng(stream_seed(seed, "kid"))
    one, two, values = one.astype(np.float64), two.astype(np.float64), np.empty(KID_SUBSETS)
    dim = one.shape[1]
    for i in range(KID_SUBSETS):
        x = one[generator.choice(len(one), subset, replace=False)]
        y = two[generator.choice(len(two), subset, replace=False)]
        xx, yy, xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        values[i] = within / (subset * (subset - 1)) - 2 * xy.mean()
    return values


def squared_distances(rows: np.ndarray, columns: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """(r, c) squared distances; `norms` are the columns' squared lengths."""
    product = rows @ columns.T
    product *= -2
    product += np.square(rows).sum(axis=1)[:, None]
    product += norms
    return product


def neighbour_radii(features: np.ndarray) -> np.ndarray:
    """Squared distance of each row to its NEIGHBOURS-th neighbour in the same set."""
    norms, radii = np.square(features).sum(axis=1), np.empty(len(features))
    for start in range(0, len(features), CHUNK):
        distances = squared_distances(features[start : start + CHUNK], features, norms)
        # A row is no neighbour of itself.
        distances[np.arange(len(distances)), np.arange(start, start + len(distances))] = np.inf
        radii[start : start + CHUNK] = np.partition(distances, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1]
    return radii


def prdc(real: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall (Kynkäänniemi et al., 2019, arXiv 1904.06991), density and coverage (Naeem et al., 2020, arXiv 2002.09797).

    Each as its values per image, (n,), of which it is the mean.
    """
    centre = real.mean(axis=0, dtype=np.float64)
    # Distances are differences of products, which are more exact around the centre.
    real, other = real - centre, other - centre
    radii_real, radii_other = neighbour_radii(real), neighbour_radii(other)
    norms = np.square(real).sum(axis=1)
    precision, density = np.empty(len(other), bool), np.empty(len(other))
    recall, nearest = np.zeros(len(real), bool), np.full(len(real), np.inf)
    for start in range(0, len(other), CHUNK):
        rows = slice(start, start + CHUNK)
        distances = squared_distances(other[rows], real, norms)
        inside = distances < radii_real
        precision[rows], density[rows] = inside.any(axis=1), inside.sum(axis=1) / NEIGHBOURS
        recall |= (distances < radii_other[rows, None]).any(axis=0)
        nearest = np.minimum(nearest, distances.min(axis=0))
    return {"precision": precision, "recall": recall, "density": density, "coverage": nearest < radii_real}


def vendi_scores(features: np.ndarray) -> tuple[float, float]:
    """Vendi scores of order 1 and 2 (Friedman and Dieng, 2022, arXiv 2210.02410), from the cosine kernel's eigenvalues.

    They are those of X^T X / n for rows of length 1, as in vendi_score.vendi.score_dual; ValueError for a row of zeros.
    """
    features = features.astype(np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError("a row of zeros has no direction")
    features /= lengths
    # X X^T has the same positive eigenvalues, and is the smaller one where images are few.
    kernel = features.T @ features if len(features) > features.shape[1] else features @ features.T
    eigenvalues = np.linalg.eigvalsh(kernel / len(features))
    return float(np.exp(entropy_q(eigenvalues, q=1))), float(np.exp(entropy_q(eigenvalues, q=2)))


# ----------------------------------------------------------------------------------------------------------------------
# The work: rows of results
# ----------------------------------------------------------------------------------------------------------------------


def first(sample: Sample, count: int, *key) -> Sample:
    """A seeded part of so many rows, patient by patient; all of them as they are where there are no more."""
    if len(sample.features) <= count:
        return sample
    rows = draw(sample.patients, *key)[:count]
    return Sample(sample.features[rows], sample.patients[rows])


def half_size(real: Sample, n: int, args: argparse.Namespace) -> int:
    """Images on each side where two halves of the real ones without a common patient are compared, in every seed."""
    sizes = [min(map(len, split_halves(real.patients, args.seed, "halves", i))) for i in range(args.num_subsamples)]
    return min([n // 2, *sizes])


def real_floors(real: Sample, half: int, common: int, args: argparse.Namespace) -> dict:
    """What real images score against other patients' real images, at the sizes at which the synthetic ones are scored.

    FID by seed at both sizes, (seeds,) each; of the first seed's halves the mean KID, precision, recall, density, coverage.
    """
    found = {"half": [], "common": []}
    for i in range(args.num_subsamples):
        rows = split_halves(real.patients, args.seed, "halves", i)
        one, two = (real.features[own[:half]] for own in rows)
        found["half"].append(fid(one, two))
        found["common"].append(found["half"][-1] if common == half else fid(one[:common], two[:common]))
        if i == 0:
            found["kid"] = float(kid(one, two, min(KID_SUBSET_SIZE, half // 3), args.seed).mean()) if half >= 6 else None
            found |= {name: float(values.mean()) for name, values in prdc(one, two).items()} if half > NEIGHBOURS else {}
    return found | {name: np.array(found[name]) for name in ("half", "common")}


def few(n: int) -> str | None:
    return f"n below {FEW_IMAGES:,}: the covariance is singular and the bias large" if n < FEW_IMAGES else None


def joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def fid_rows(real: Sample, other: Sample, label: str, half: int, common: int, floors: dict | None, args) -> tuple[list[dict], dict]:
    """FID at equal n, at all n, at half of n beside its floor, at one n for all labels, and its limit; and what the plot shows.

    The interval of a FID of n images is its spread over subsets of `half` of them, times the square root of
    half / (n - half): the delete-d jackknife (Shao and Wu, 1989), since a bootstrap with replacement would be biased.
    """
    n, all_images = min(len(real.features), len(other.features)), fid(real.features, other.features)
    counts = f"{len(real.features):,} real images, {len(other.features):,} others"
    real, other = first(real, n, args.seed, "equal"), first(other, n, args.seed, "equal")
    value = fid(real.features, other.features)
    sizes = list(dict.fromkeys(max(2, int(half * share)) for share in SERIES))
    series = fid_series(real, other, [*sizes, common], args.seed, args.num_subsamples)
    at_half, at_common = series[:, 0], series[:, -1]
    scale = math.sqrt(half / (n - half))
    width = spread(at_half, scale)
    halves = f"mean of {args.num_subsamples} seeded subsets without replacement"
    floor = {name: float(floors[name].mean()) if floors else None for name in ("half", "common")}
    rows = [
        result_row("fid", value, label, n=n, **around(value, width, 0.0), note=joined("equal n; its floor stands beside fid_half_n", few(n))),
        result_row("fid_all_images", all_images, label, n=n, **around(all_images, width, 0.0), note=joined(counts, few(n))),
        result_row("fid_half_n", float(at_half.mean()), label, n=half, floor=floor["half"], **around(float(at_half.mean()), spread(at_half), 0.0), note=joined(halves, few(half))),
        result_row("fid_common_n", float(at_common.mean()), label, n=common, floor=floor["common"], **around(float(at_common.mean()), spread(at_common), 0.0), note=joined("one n for all labels", halves, few(common))),
    ]  # fmt: skip
    if len(sizes) < len(SERIES):
        rows.append(result_row("fid_infinity", None, label, n=n, note=f"needs {len(SERIES)} different sizes; {n} images are too few"))
        return rows, {}
    means = np.array([value, *series[:, : len(sizes)].mean(axis=0)])
    limit = line_at_infinity([n, *sizes], means)
    intercepts = np.array([line_at_infinity(sizes, one) for one in series[:, : len(sizes)]])
    # No floor: with few images a feature, sets of the same distribution end above 0 too, since the bias is not yet a line.
    note = joined(f"line in 1/n through {len(sizes) + 1} sizes from {min(sizes):,}", few(min(sizes)))
    rows.append(result_row("fid_infinity", limit, label, n=n, **around(limit, spread(intercepts, scale)), note=note))
    return rows, {"sizes": [n, *sizes], "fid": means, "half": half, "floor": floor["half"]}


def gain_row(real: Sample, other: Sample, baseline: Sample, args: argparse.Namespace) -> dict:
    """How much lower the FID is than the base model's, at equal n, with the interval of the difference.

    Both FIDs are of the same real images and, where the files are named alike and hence began from the same noise, of the same
    samples. What these have in common cancels, so the interval is narrower than those of the two FIDs; `fid_rows` has its form.
    """
    n = min(len(sample.features) for sample in (real, other, baseline))
    half = half_size(real, n, args) if n > 3 else 0
    if half < 2:
        return result_row("fid_gain", None, n=n, note="too few images")
    real, other, baseline = (first(sample, n, args.seed, "equal") for sample in (real, other, baseline))
    gain = fid(real.features, baseline.features) - fid(real.features, other.features)
    at_half = [fid_series(real, sample, [half], args.seed, args.num_subsamples)[:, 0] for sample in (baseline, other)]
    width = spread(at_half[0] - at_half[1], math.sqrt(half / (n - half)))
    return result_row("fid_gain", gain, n=n, **around(gain, width), note=joined("FID of the base model minus this one, over the same images", few(n)))


def kid_row(real: Sample, other: Sample, label: str, floor: float | None, args) -> dict:
    n = min(len(real.features), len(other.features))
    subset = min(KID_SUBSET_SIZE, n // 3)
    if subset < 2:
        return result_row("kid", None, label, n=n, note="needs 6 images on each side")
    values = kid(first(real, n, args.seed, "equal").features, first(other, n, args.seed, "equal").features, subset, args.seed)
    half = 1.96 * float(values.std(ddof=1)) * math.sqrt(subset / (n - subset))
    return result_row(
        "kid",
        float(values.mean()),
        label,
        n=n,
        floor=floor,
        **around(float(values.mean()), half),
        note=f"{KID_SUBSETS} subsets of {subset:,}, standard deviation {values.std(ddof=1):.3g}",
    )


def prdc_rows(real: Sample, other: Sample, label: str, half: int, floors: dict | None, args) -> list[dict]:
    """At half of n, since neighbourhoods shrink with n and the floor of two real halves has no more."""
    names = ("precision", "recall", "density", "coverage")
    if half <= NEIGHBOURS:
        return [result_row(name, None, label, n=half, note=f"needs more than {NEIGHBOURS} images in each half") for name in names]
    reference = real.features[split_halves(real.patients, args.seed, "halves", 0)[0][:half]]
    values, rows = prdc(reference, first(other, half, args.seed, "half").features), []
    note = f"k={NEIGHBOURS}, half of n; interval for given neighbourhoods"
    for name in names:
        hits, more = values[name], {"floor": (floors or {}).get(name), "note": note}
        if name == "density":
            low, high = mean_interval(hits)
            rows.append(result_row(name, float(hits.mean()), label, low, high, half, **more))
        else:
            rows.append(share_row(name, hits, label, **more))
    return rows


def vendi_rows(real: Sample, other: Sample, label: str, args) -> list[dict]:
    """Vendi scores of order 1 and 2 beside those of as many real images, and their ratios."""
    n = min(len(real.features), len(other.features))
    real, other = first(real, n, args.seed, "equal"), first(other, n, args.seed, "equal")
    # (2, order): the real images' and the others'.
    whole = np.array([vendi_scores(sample.features) for sample in (real, other)])
    parts = np.array([
        [vendi_scores(first(sample, n // 2, args.seed, "vendi", i).features) for sample in (real, other)] for i in range(args.num_subsamples)
    ]) if n > 3 else np.empty((1, 2, 2))  # fmt: skip
    rows = []
    for order, name in enumerate(("vendi", "vendi_q2")):
        (own, floor), more = whole[::-1, order], {"n": n, "note": "floor: as many real images"}
        rows.append(result_row(name, float(own), label, floor=float(floor), **around(float(own), spread(parts[:, 1, order]), 1.0), **more))
        ratios = parts[:, 1, order] / parts[:, 0, order] if n > 3 else np.empty(1)
        rows.append(
            result_row(
                f"{name}_ratio",
                float(own / floor),
                label,
                floor=1.0,
                **around(float(own / floor), spread(ratios), 0.0),
                n=n,
                note="to as many real images",
            )
        )
    return rows


def set_rows(real: Sample, other: Sample, label: str, common: int, args, with_floors: bool) -> tuple[list[dict], dict, int]:
    """All rows that compare two sets of features, what the plot of FID shows, and the number of images of each half."""
    n = min(len(real.features), len(other.features))
    half = half_size(real, n, args) if n > 3 else 0
    if half < 2:
        names = (
            "fid",
            "fid_all_images",
            "fid_half_n",
            "fid_common_n",
            "fid_infinity",
            "kid",
            "precision",
            "recall",
            "density",
            "coverage",
            "vendi",
            "vendi_ratio",
            "vendi_q2",
            "vendi_q2_ratio",
        )
        return (
            [
                result_row(
                    name,
                    None,
                    label,
                    n=n,
                    note=f"{len(real.features)} real images and {len(other.features)} others are too few, or of one patient",
                )
                for name in names
            ],
            {},
            half,
        )
    common = min(common, half)
    floors = real_floors(real, half, common, args) if with_floors else None
    rows, curve = fid_rows(real, other, label, half, common, floors, args)
    rows.append(kid_row(real, other, label, (floors or {}).get("kid"), args))
    rows += prdc_rows(real, other, label, half, floors, args)
    rows += vendi_rows(real, other, label, args)
    if floors:
        for name, size in (("half", half), ("common", common)):
            value, note = (
                float(floors[name].mean()),
                f"real images against other patients' real images, {args.num_subsamples} splits; interval: of one split",
            )
            rows.append(
                result_row(
                    f"fid_real_halves_{name}_n",
                    value,
                    label,
                    n=size,
                    **around(value, spread(floors[name]), 0.0),
                    note=joined(note, few(size)),
                )
            )
    return rows, curve, half


def auroc_row(metric: str, positive: np.ndarray, negative: np.ndarray, label: str, **more) -> dict:
    """Area under the ROC curve with the interval of Hanley and McNeil (1982)."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return result_row(metric, None, label, n=n, **more | {"note": "needs images with the label and others without"})
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    area = float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    half = 1.96 * math.sqrt(max(0.0, area * (1 - area) + (n - 1) * (q1 - area**2) + (m - 1) * (q2 - area**2)) / (n * m))
    return result_row(metric, area, label, max(0.0, area - half), min(1.0, area + half), n, **more)


def margin_row(metric: str, own: np.ndarray, others: np.ndarray, label: str, **more) -> dict:
    """Recall minus false-fire rate, with Newcombe's (1998) interval of a difference of shares."""
    if not len(own) or not len(others):
        return result_row(metric, None, label, n=len(own), **more | {"note": "needs images with the label and others without"})
    p1, p2 = float(own.mean()), float(others.mean())
    (l1, u1), (l2, u2) = wilson(own.sum(), len(own)), wilson(others.sum(), len(others))
    low, high = p1 - p2 - math.hypot(p1 - l1, u2 - p2), p1 - p2 + math.hypot(u1 - p1, p2 - l2)
    return result_row(metric, p1 - p2, label, low, high, len(own), **more)


def prompt_rows(source: Source) -> dict[str, np.ndarray]:
    """Per label the images that stand for it alone: of generated ones those whose prompt names nothing else, of real ones all."""
    if source.name in ("real", "through the VAE"):
        return source.rows_of
    named = source.table.reindex(columns=LABELS).isin([1.0]).to_numpy().sum(axis=1)
    return {label: rows[named[rows] == 1] for label, rows in source.rows_of.items()}


def other_rows(source: Source, prompts: dict[str, np.ndarray], label: str, uncertain: str) -> np.ndarray:
    """The images of the other labels, without those that have this label too, or perhaps have."""
    rows = np.unique(np.concatenate([own for name, own in prompts.items() if name != label] or [np.array([], int)]))
    values = source.table[label].to_numpy()[rows] if label in source.table else np.full(len(rows), np.nan)
    return rows[~np.isin(values, [1.0] if uncertain == "zeros" else [1.0, -1.0])]


def mean_rows(rows: list[dict], labels: list[str]) -> list[dict]:
    """For each metric its mean over the labels that have it; their errors count as independent."""
    means = []
    for metric in dict.fromkeys(row["metric"] for row in rows if row["label"] in labels and "_alone" not in row["metric"]):
        found = [row for row in rows if row["metric"] == metric and row["label"] in labels and row["value"] is not None]
        if not found:
            means.append(result_row(metric, None, note="no label has it"))
            continue
        value = float(np.mean([row["value"] for row in found]))
        below, above = (math.hypot(*(row["value"] - row[end] for row in found)) / len(found) for end in ("low", "high"))
        means.append(result_row(metric, value, "all", value - below, value + above, sum(row["n"] for row in found), note=f"mean of {len(found)} labels"))
    return means


def consistency_rows(source: Source, labels: list[str], network, uncertain: str, floors: dict) -> list[dict]:
    """Which heads fire for which prompt: the whole matrix at two thresholds, and what it says of each label.

    Sigmoid heads are independent, since findings occur together. `floors` has the same figures of real images.
    """
    heads = list(network.labels)
    prompts = prompt_rows(source)
    named = "youden" if isinstance(network, ClassifierNetwork) else "operating"
    thresholds = {"": dict.fromkeys(heads, 0.5), f"_{named}": network.thresholds}
    diseases = [head for head in heads if head not in ("No Finding", "Support Devices")]
    rows = []
    for suffix, threshold in thresholds.items():
        fires = {head: source.probabilities[:, i] > threshold[head] for i, head in enumerate(heads) if threshold.get(head) is not None}
        for label in labels:
            own, others = prompts[label], other_rows(source, prompts, label, uncertain)
            metrics = [f"class_consistency{suffix}", f"class_consistency_margin{suffix}"] + (
                [f"class_consistency_alone{suffix}"] if label == "No Finding" else []
            )
            if label not in fires or not len(own):
                reason = "no image of a prompt for this label alone" if not len(own) else "no threshold for this head"
                reason = reason if label in heads else "the network has no such head"
                rows += [result_row(metric, None, label, n=len(own), note=reason) for metric in metrics]
            else:
                rows.append(share_row(metrics[0], fires[label][own], label))
                rows.append(margin_row(metrics[1], fires[label][own], fires[label][others], label, note="recall minus false-fire rate"))
                if label == "No Finding":
                    loud = [fires[head] for head in diseases if head in fires]
                    quiet = ~np.any(loud, axis=0) if loud else np.ones(len(source.table), bool)
                    rows.append(share_row(metrics[2], (fires[label] & quiet)[own], label, note="and no disease head fires"))
            for head in labels:
                if head in fires and len(own):
                    rows.append(share_row(f"fires{suffix}", fires[head][own], f"{label} -> {head}"))
                else:
                    rows.append(
                        result_row(f"fires{suffix}", None, f"{label} -> {head}", n=len(own), note="no such head, threshold or image")
                    )
    for label in labels:
        if label in heads:
            scores = source.probabilities[:, heads.index(label)]
            rows.append(
                auroc_row(
                    "class_consistency_auroc",
                    scores[prompts[label]],
                    scores[other_rows(source, prompts, label, uncertain)],
                    label,
                    note="against the other labels' images; 0.5 is chance",
                )
            )
        else:
            rows.append(result_row("class_consistency_auroc", None, label, n=len(prompts[label]), note="the network has no such head"))
    rows += mean_rows(rows, labels)
    return [row | {"floor": floors.get((row["metric"], row["label"]))} for row in rows]


def colour_rows(source: Source, floors: dict) -> list[dict]:
    colour = source.colour.astype(np.float64)
    low, high = mean_interval(colour)
    rows = [
        result_row("colour_mean", float(colour.mean()), low=low, high=high, n=len(colour), note="grey levels of 255 between channels"),
        percentile_row("colour_p99", colour, 0.99, note="grey levels of 255 between channels"),
        share_row("colour_visible", colour > VISIBLE_COLOUR, note=f"share of images above {VISIBLE_COLOUR:g} grey levels"),
    ]
    return [row | {"floor": floors.get((row["metric"], row["label"]))} for row in rows]


def directions(values: np.ndarray, centred: bool) -> np.ndarray:
    """Rows of length 1 in float32, each around its own mean if `centred`; a constant row stays 0."""
    values = values.astype(np.float32)
    if centred:
        values -= values.mean(axis=1, keepdims=True)
    return values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)


def nearest(queries: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the reference row of greatest cosine, and that cosine; rows have length 1."""
    index, cosine = np.empty(len(queries), int), np.empty(len(queries), np.float32)
    for start in range(0, len(queries), CHUNK):
        products = queries[start : start + CHUNK] @ reference.T
        index[start : start + CHUNK] = products.argmax(axis=1)
        cosine[start : start + CHUNK] = products.max(axis=1)
    return index, cosine


def memorisation_rows(synthetic: Source, real: Source, train: Source | None, args) -> tuple[list[dict], dict]:
    """Whether generated images are nearer to the training images than to as many images of other patients; and the pairs.

    By cosine of the features, and of thumbnails' pixels, since features can miss a copy.
    """
    metrics = ("memorisation_nearer_train", "memorisation_p99", "memorisation_suspects")
    kinds = {"": ("features", False), "_pixels": ("thumbnails", True)}
    reason = "pass --train_csv" if train is None else None
    if train is not None:
        # Each image once, and no patient on both sides.
        unseen = np.flatnonzero(~real.table["patient"].isin(set(train.table["patient"])))
        n = min(len(unseen), len(train.pool))
        reason = None if n else "no training image has one of the labels" if len(unseen) else "every real image is of a patient in --train_csv"
    if reason:
        return [result_row(f"{metric}{kind}", None, note=reason) for kind in kinds for metric in metrics], {}
    unseen = unseen[draw(real.table["patient"].to_numpy()[unseen], args.seed, "unseen")[:n]]
    seen = train.pool[draw(train.table["patient"].to_numpy()[train.pool], args.seed, "seen")[:n]]
    rows, pairs = [], {}
    for kind, (name, centred) in kinds.items():
        generated, trained, other = (directions(getattr(source, name), centred) for source in (synthetic, train, real))
        to_seen, to_unseen = nearest(generated, trained[seen])[1], nearest(generated, other[unseen])[1]
        # Rounding differs between the two products, and an image may be in both.
        tie = np.abs(to_seen - to_unseen) < 1e-6
        nearer = np.where(tie, 0.5, to_seen > to_unseen)
        low, high = wilson(float(nearer.sum()), len(nearer))
        rows.append(
            result_row(
                f"memorisation_nearer_train{kind}",
                float(nearer.mean()),
                low=low,
                high=high,
                n=len(nearer),
                floor=0.5,
                note=f"{n:,} training images against {n:,} of other patients",
            )
        )
        index, cosine = nearest(generated, trained)
        expected = nearest(other[unseen], trained)[1]
        rows.append(
            percentile_row(
                f"memorisation_p99{kind}",
                cosine,
                0.99,
                floor=float(np.quantile(expected, 0.99)),
                note=f"cosine to the nearest of {len(trained):,} training images; floor: {n:,} real images of other patients",
            )
        )
        rows.append(
            share_row(
                f"memorisation_suspects{kind}",
                cosine > expected.max(),
                floor=1 / (n + 1),
                note="nearer to a training image than any real image of another patient is",
            )
        )
        pairs[name] = (index, cosine)
    return rows, pairs


def renamed(rows: list[dict], suffix: str) -> list[dict]:
    return [row | {"metric": row["metric"] + suffix} for row in rows]


def score_sources(args: argparse.Namespace, plan: Plan, network) -> tuple[list[dict], dict, dict]:
    """All rows of results, the curves of FID by label, and the nearest neighbours for the picture."""
    real, synthetic = plan.sources["real"], plan.sources["synthetic"]
    labels = ["all", *plan.labels]
    suffixes = {"synthetic": "", "base model": "_baseline", "through the VAE": "_vae"}
    rows, curves = [], {}
    sizes = [
        half_size(real.sample(label), min(len(real.sample(label).features), len(synthetic.sample(label).features)), args)
        for label in labels
        if len(real.sample(label).features) > 3
    ]
    common = min([size for size in sizes if size > 1], default=0)
    tasks = [(name, label) for name in suffixes if name in plan.sources for label in labels]
    for name, label in tqdm(tasks, "scoring", unit="set", leave=False):
        found, curve, _ = set_rows(real.sample(label), plan.sources[name].sample(label), label, common, args, name == "synthetic")
        rows += renamed(found, suffixes[name])
        if name == "synthetic" and curve:
            curves[label] = curve
    if "base model" in plan.sources:
        rows.append(gain_row(*(plan.sources[name].sample("all") for name in ("real", "synthetic", "base model")), args))
    for figures in (functools.partial(consistency_rows, labels=plan.labels, network=network, uncertain=args.uncertain), colour_rows):
        of_real = figures(real, floors={})
        floors = {(row["metric"], row["label"]): row["value"] for row in of_real}
        for name, suffix in suffixes.items():
            if name in plan.sources:
                rows += renamed(figures(plan.sources[name], floors=floors), suffix)
        rows += renamed(of_real, "_real")
    memorised, pairs = memorisation_rows(synthetic, real, plan.sources.get("train"), args)
    return rows + memorised + plan.counts, curves, pairs


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.write_text
def write_text(path: Path, text: str) -> None:
    """Writes beside and renames into place."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# Copied from eval_downstream.save_figure
def save_figure(figure: Figure, path: Path) -> None:
    """Writes beside and renames into place."""
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=130, bbox_inches="tight")
    os.replace(part, path)


def name_of(synthetic: str) -> str:
    """What --synthetic is called in the results: its folder, or its table."""
    path = Path(synthetic)
    return path.resolve().parent.name if path.name == "metadata.csv" else path.stem if path.suffix == ".csv" else path.resolve().name


def one_line(text: str) -> str:
    """Text of somebody's file on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escape(text: str) -> str:
    """Text of somebody's file as Markdown that ends no cell of a table and is no link, picture or HTML."""
    return re.sub(r"([\\`\[\]<>&|])", r"\\\1", one_line(text))


def short(label: str) -> str:
    return ABBREVIATIONS.get(label, label)


class Results:
    """Rows by metric and label, as text."""

    def __init__(self, rows: list[dict]):
        self.rows = {(row["metric"], row["label"]): row for row in rows}

    def text(self, metric: str, label: str = "all", digits: int = 2, scale: float = 1.0, interval: bool = True, key: str = "value") -> str:
        row = self.rows.get((metric, label), {})
        if row.get(key) is None:
            return "n/a"
        text = f"{scale * row[key]:.{digits}f}"
        if interval and key == "value" and row["low"] is not None:
            text += f" ({scale * row['low']:.{digits}f} to {scale * row['high']:.{digits}f})"
        return text

    def fid(self, metric: str, label: str, key: str = "value") -> str:
        """With its warning: a FID of few images must not be read without it."""
        n = self.rows.get((metric, label), {}).get("n") or 0
        return self.text(metric, label, key=key) + (f" [n = {n} < {FEW_IMAGES:,}]" if n < FEW_IMAGES else "")

    def number(self, metric: str, label: str = "all") -> str:
        n = self.rows.get((metric, label), {}).get("n")
        return "n/a" if n is None else f"{n:,}"


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *(["---:"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *lines]) + "\n"


def table_three(results: Results, plan: Plan, name: str) -> str:
    """The paper's Table 3, with the floors below the row that they belong to."""
    header = ["images", "n", "FID", "Vendi", *(short(label) for label in plan.labels)]

    def consistency(suffix: str) -> list[str]:
        cells = [results.text(f"class_consistency{suffix}", label, 1, 100) for label in plan.labels]
        alone = results.text(f"class_consistency_alone{suffix}", "No Finding", 1, 100, interval=False)
        return [f"{cell}; alone {alone}" if label == "No Finding" and alone != "n/a" else cell for label, cell in zip(plan.labels, cells)]

    lines = [
        [name, results.number("fid"), results.fid("fid", "all"), results.text("vendi"), *consistency("")],
        [f"{name}, half of n", results.number("fid_half_n"), results.fid("fid_half_n", "all"), "", *[""] * len(plan.labels)],
        [
            "floor: real against real, half of n",
            results.number("fid_half_n"),
            results.fid("fid_real_halves_half_n", "all"),
            results.text("vendi", key="floor"),
            *consistency("_real"),
        ],
    ]
    for source, suffix, title in (("through the VAE", "_vae", "floor: real through the VAE"), ("base model", "_baseline", "base model")):
        if source in plan.sources:
            lines.append(
                [
                    title,
                    results.number(f"fid{suffix}"),
                    results.fid(f"fid{suffix}", "all"),
                    results.text(f"vendi{suffix}"),
                    *consistency(suffix),
                ]
            )
        else:
            lines.append([title, *["not given"] * (len(header) - 1)])
    if "base model" in plan.sources:
        lines.append(["base model minus the samples", results.number("fid_gain"), results.fid("fid_gain", "all"), *[""] * (len(header) - 3)])
    return markdown_table(header, lines)


def label_tables(results: Results, plan: Plan) -> str:
    """What compares sets of features, by label; and what the classifier says of each label."""
    header = ["label", "n", "FID", "FID, half of n", "floor", "FID at a common n", "floor", "FID at infinite n", "KID x 1000", "floor"]
    sets = [
        [label, results.number("fid", label), results.fid("fid", label), results.fid("fid_half_n", label), results.text("fid_half_n", label, key="floor"),
         results.fid("fid_common_n", label), results.text("fid_common_n", label, key="floor"), results.text("fid_infinity", label), results.text("kid", label, 2, 1000), results.text("kid", label, 2, 1000, key="floor")]
        for label in ["all", *plan.labels]
    ]  # fmt: skip
    variety = [
        [label, *(f"{results.text(metric, label, 3, interval=False)} / {results.text(metric, label, 3, key='floor')}" for metric in ("precision", "recall", "density", "coverage")),
         f"{results.text('vendi', label, interval=False)} / {results.text('vendi', label, key='floor')}", results.text("vendi_ratio", label),
         f"{results.text('vendi_q2', label, interval=False)} / {results.text('vendi_q2', label, key='floor')}"]
        for label in ["all", *plan.labels]
    ]  # fmt: skip
    threshold = "youden" if any(metric == "class_consistency_youden" for metric, _ in results.rows) else "operating"
    said = [
        [label, *(results.text(f"class_consistency{suffix}", label, 1, 100) for suffix in ("", f"_{threshold}", "_real")),
         results.text("class_consistency_margin", label, 1, 100), results.text(f"class_consistency_margin_{threshold}", label, 1, 100),
         results.text("class_consistency_auroc", label, 3), results.text("class_consistency_auroc", label, 3, key="floor")]
        for label in plan.labels
    ]  # fmt: skip
    return "\n".join([
        markdown_table(header, sets),
        "Beside each floor (real against real, or as many real images):\n",
        markdown_table(["label", "precision", "recall", "density", "coverage", "Vendi", "ratio", "Vendi, q=2"], variety),
        "## Class consistency, %\n",
        markdown_table(["label", "fires at 0.5", f"at {threshold} threshold", "real images at 0.5", "recall - false fire, 0.5", f"the same, {threshold}", "AUROC", "AUROC of real images"], said),
    ])  # fmt: skip


def matrix_tables(results: Results, plan: Plan) -> str:
    parts = []
    for title, suffix in (("generated images", ""), ("real images", "_real")):
        lines = [[label, *(results.text(f"fires{suffix}", f"{label} -> {head}", 1, 100) for head in plan.labels)] for label in plan.labels]
        parts.append(f"Heads that fire at 0.5, %, by prompt (rows), {title}:\n\n" + markdown_table(["prompt", *plan.labels], lines))
    return "\n".join(parts)


def report(results: Results, plan: Plan, name: str) -> str:
    """generation_metrics.md."""
    colour = [
        [
            title,
            results.text(f"colour_mean{suffix}"),
            results.text(f"colour_p99{suffix}"),
            results.text(f"colour_visible{suffix}", "all", 1, 100),
        ]
        for title, suffix in ((name, ""), ("real", "_real"), *([("base model", "_baseline")] if "base model" in plan.sources else []))
    ]
    copies = [
        [
            by,
            *(
                f"{results.text(f'memorisation_{metric}{kind}', 'all', 3)} / {results.text(f'memorisation_{metric}{kind}', 'all', 3, key='floor')}"
                for metric in ("nearer_train", "p99", "suspects")
            ),
        ]
        for by, kind in (("features", ""), ("pixels", "_pixels"))
    ]
    return "\n".join([
        f"# {name}\n",
        "Intervals in brackets are at 95 %. FID and Vendi change with n, so compare them at equal n only.\n",
        table_three(results, plan, name),
        *(f"- **Warning:** {escape(note)}" for note in plan.warnings),
        "\n## By label\n",
        label_tables(results, plan),
        matrix_tables(results, plan),
        "## Colour leakage\n",
        markdown_table(["images", "mean difference of channels", "99th percentile", f"above {VISIBLE_COLOUR:g} of 255, %"], colour),
        "## Memorisation, each beside what is expected without it\n",
        markdown_table(["by", "nearer to training images", "99th percentile of the cosine", "nearer than any unseen real image"], copies),
    ])  # fmt: skip


def plot_consistency(results: Results, plan: Plan, path: Path) -> None:
    """The matrix of prompts and heads, generated and real side by side."""
    side = 1.2 + 0.75 * len(plan.labels)
    figure = Figure(figsize=(2 * side + 1, side + 0.6))
    for axes, (title, suffix) in zip(figure.subplots(1, 2), (("generated images", ""), ("real images", "_real"))):
        values = np.array(
            [[results.rows[f"fires{suffix}", f"{label} -> {head}"]["value"] for head in plan.labels] for label in plan.labels], float
        )
        # What is not known is grey, not white like 0.
        axes.set_facecolor("lightgrey")
        axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
        for (row, column), value in np.ndenumerate(values):
            axes.text(
                column,
                row,
                "n/a" if np.isnan(value) else f"{100 * value:.0f}",
                ha="center",
                va="center",
                color="white" if value > 0.6 else "black",
                fontsize=9,
            )
        names = [short(label) for label in plan.labels]
        axes.set(
            title=title,
            xlabel="head that fires at 0.5",
            ylabel="prompt" if not suffix else "label",
            xticks=range(len(names)),
            yticks=range(len(names)),
        )
        axes.set_xticklabels(names, rotation=45 if max(map(len, names)) > 2 else 0, ha="right" if max(map(len, names)) > 2 else "center")
        axes.set_yticklabels(names)
    figure.suptitle("Images for which a head fires, %", y=1.02)
    figure.tight_layout()
    save_figure(figure, path)


def plot_fid(curves: dict, path: Path) -> None:
    """FID against 1/n with the line to infinite n, and the floor of real against real."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    for i, (label, curve) in enumerate(curves.items()):
        inverse, colour = 1 / np.array(curve["sizes"], float), f"C{i}"
        line = np.polyfit(inverse, curve["fid"], 1)
        span = np.array([0, inverse.max()])
        axes.plot(inverse, curve["fid"], "o", color=colour, label=label)
        axes.plot(span, np.polyval(line, span), "-", color=colour, linewidth=1)
        axes.plot([1 / curve["half"]], [curve["floor"]], "x", color=colour)
    axes.plot([], [], "kx", label="real against real")
    axes.set(
        xlabel="1 / n",
        ylabel="FID",
        title="FID against 1/n; where a line meets the left edge is FID at infinite n",
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.legend()
    save_figure(figure, path)


def plot_pairs(pairs: dict, plan: Plan, path: Path, count: int = 6) -> None:
    """The generated images that are nearest to a training image, each above it."""
    figure = Figure(figsize=(2 * count, 9.6))
    grid = figure.subplots(4, count)
    for i, (name, (index, cosine)) in enumerate(pairs.items()):
        top = np.argsort(-cosine, kind="stable")[:count]
        for column in range(count):
            for axes in grid[2 * i : 2 * i + 2, column]:
                axes.axis("off")
            if column < len(top):
                row = top[column]
                for axes, source, at in ((grid[2 * i, column], "synthetic", row), (grid[2 * i + 1, column], "train", index[row])):
                    axes.imshow(load_image(plan.sources[source].table["image"][at], plan.resolution, plan.resize_mode))
                grid[2 * i, column].set_title(f"generated, {cosine[row]:.3f}", fontsize=9)
                grid[2 * i + 1, column].set_title("nearest training image", fontsize=9)
    figure.suptitle("Nearest pairs by cosine of the features (upper rows) and of the pixels (lower rows)")
    figure.tight_layout()
    save_figure(figure, path)


def identify(args: argparse.Namespace, plan: Plan, networks: tuple, vae: ThroughVAE | None) -> dict:
    """What was compared, and how; no times, so that the same command gives the same file."""
    features, classifier = networks
    return {
        "script": "eval_generation.py",
        "name": name_of(args.synthetic),
        "arguments": vars(args),
        "features": {"source": args.features, "fingerprint": features.key, "resizer": "torchxrayvision XRayResizer(224), skimage" if isinstance(features, XRVNetwork) else "Pillow Lanczos"},
        "classifier": {"source": args.classifier or args.features, "fingerprint": classifier.key, "labels": list(classifier.labels), "thresholds": classifier.thresholds, "real_test_auroc": getattr(classifier, "spec", {}).get("real_test_auroc")},
        "vae_fingerprint": vae.key if vae else None,
        "resolution": plan.resolution, "resize_mode": plan.resize_mode, "pool": args.pool, "unreadable": plan.left_out,
        "images": {name: {"fingerprint": hashlib.sha256("".join(source.hashes).encode()).hexdigest(), "all": len(source.pool), **{label: len(rows) for label, rows in source.rows_of.items()}} for name, source in plan.sources.items()},
        "versions": {name: version(name) for name in ("torch", "torchvision", "torchxrayvision", "scikit-image", "vendi-score", "numpy", "scipy")},
        "warnings": plan.warnings,
    }  # fmt: skip


def write_results(args, plan: Plan, networks: tuple, vae: ThroughVAE | None, scored: tuple, output_dir: Path) -> None:
    rows, curves, pairs = scored
    broken = [
        row for row in rows if any(isinstance(row[key], float) and not math.isfinite(row[key]) for key in ("value", "low", "high", "floor"))
    ]
    assert not broken, broken[0]
    results, name = Results(rows), escape(name_of(args.synthetic))
    for picture in ("consistency.png", "fid.png", "nearest_neighbours.png"):
        # One of an earlier evaluation does not belong to these figures.
        (output_dir / picture).unlink(missing_ok=True)
    if plan.labels:
        plot_consistency(results, plan, output_dir / "consistency.png")
    if curves:
        plot_fid(curves, output_dir / "fid.png")
    if pairs:
        plot_pairs(pairs, plan, output_dir / "nearest_neighbours.png")
    write_text(output_dir / "generation_metrics.md", report(results, plan, name))
    write_text(
        output_dir / "generation_metrics.json",
        json.dumps(identify(args, plan, networks, vae) | {"results": rows}, indent=2, allow_nan=False) + "\n",
    )
    print(table_three(results, plan, name))
    print(f"{output_dir / 'generation_metrics.json'}: {len(rows):,} rows; generation_metrics.md has them as tables")


def network_warnings(args, plan: Plan, networks: tuple) -> list[str]:
    """What a reader must know of the networks; a classifier of another geometry ends with exit status 2."""
    features, classifier = networks
    notes = []
    if isinstance(features, XRVNetwork):
        notes.append("torchxrayvision's DenseNet-121 was itself trained on CheXpert, among others")
    if features is classifier:
        notes.append("class consistency is judged by heads on the features of FID, not by a network of its own")
    for flag, network in (("--features", features), ("--classifier", classifier)):
        if not isinstance(network, ClassifierNetwork) or (flag == "--classifier" and network is features):
            continue
        if network.spec["resize_mode"] != plan.resize_mode:
            told = f"{flag}: the classifier saw images made with --resize_mode {network.spec['resize_mode']}, these are made with {plan.resize_mode}"
            if not args.mixed_geometry:
                fail(f"{told}; train another classifier, or pass --mixed_geometry to go on all the same")
            notes.append(told)
        if network.spec["source_resolution"] != plan.resolution:
            notes.append(
                f"{flag}: the classifier saw images by way of {network.spec['source_resolution']} pixels, these come by way of {plan.resolution}"
            )
        if network.spec.get("train_on") != "real":
            notes.append(f"{flag}: the classifier was trained on {network.spec.get('train_on')} images, not on real ones alone, so it may judge by what generators do")
        known, patients = set(network.spec["split"]["patients"]), plan.sources["real"].table["patient"].unique()
        shared = sum(patient_hash(patient) in known for patient in patients)
        if shared:
            notes.append(
                f"{flag}: {shared:,} of the {len(patients):,} patients of the real images were the classifier's to train on, so its figures on real images are too good"
            )
    return notes


@plain_errors("lower --batch_size or --max_per_label")
def main(args: argparse.Namespace) -> None:
    diffusers.utils.logging.disable_progress_bar()
    silence_known_noise()
    # Without the argument, processes that torchrun starts on a machine without a GPU would each compute everything.
    accelerator = Accelerator(
        cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
        # The others wait while the first process reads the files and scores.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))],
    )
    plan = plan_evaluation(args, accelerator)
    networks = load_networks(args, accelerator)
    plan.warnings += network_warnings(args, plan, networks)
    vae = ThroughVAE(args.vae, accelerator.device) if args.vae else None
    if vae:
        real = plan.sources["real"]
        plan.sources["through the VAE"] = Source("through the VAE", real.table, real.rows_of, real.pool)
    output_dir = Path(args.output_dir or Path("evaluations") / name_of(args.synthetic))
    cache_dir = Path(args.feature_cache_dir or output_dir.parent / "feature_cache")
    unique = list({network.key: network for network in (Appearance(), *networks)}.values())
    jobs, stores = find_jobs(accelerator, plan, unique, vae, cache_dir)
    # Not before all that may be refused has been looked at.
    try:
        for directory in (output_dir, cache_dir):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{error.filename}: cannot be written ({error.strerror}); pass another --output_dir or --feature_cache_dir")
    compute_features(args, accelerator, plan, jobs, stores, vae)
    if accelerator.is_main_process:
        fill_sources(plan, {network.key: store for network, store in stores}, *networks)
        for note in plan.warnings:
            print(f"  warning  {one_line(note)}", flush=True)
        write_results(args, plan, networks, vae, score_sources(args, plan, networks[1]), output_dir)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(parse_args())
