# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "accelerate>=1.10", "safetensors>=0.5", "scikit-learn>=1.5", "matplotlib>=3.8",
#   "numpy>=1.26", "pandas>=2.2", "pillow>=10.3", "tqdm>=4.66",
# ]
# ///
"""Train a classifier on synthetic chest radiographs, real ones or both, and test it on real ones.

    accelerate launch eval_downstream.py --synthetic samples/bitfit                        # the paper's Table 4
    accelerate launch eval_downstream.py --synthetic samples/bitfit --train_on real        # on as many real images
    accelerate launch eval_downstream.py --synthetic samples/bitfit --reference downstream/real_bitfit  # and the ratio
    accelerate launch eval_downstream.py --train_on real                  # the classifier that eval_generation.py needs
    python eval_downstream.py --classifier downstream/real/classifier --real_csv other_hospital.csv --split all

Writes downstream_metrics.json, downstream_draws.safetensors (each figure in each bootstrap draw), downstream_table.md,
plots and the classifier to --output_dir. Started again, it continues after the last finished epoch.
"""

import argparse
import datetime
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import warnings
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list, gather_object
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve
from torchvision.models import get_model
from tqdm.auto import tqdm

# Copied from train_full.LABELS
LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
).split(",")
# Copied from sample.CONDITIONS
CONDITIONS = ["Cardiomegaly", "Lung Opacity", "Edema", "No Finding", "Pneumothorax", "Pleural Effusion"]
# Copied from train_full.DEFAULT_TABLES
DEFAULT_TABLES = ["CheXpert-v1.0/train.csv", "CheXpert-v1.0-small/train.csv"]
# Copied from train_full.SPLIT_FRACTIONS
SPLIT_FRACTIONS = {"train": 0.353, "val": 0.141, "test": 0.506}
# ImageNet's, whatever the initial weights.
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
METRICS = ["accuracy", "constant_accuracy", "accuracy_gain", "predicted_positive_rate", "balanced_accuracy"]
# Not given for a label with one class only among the training images.
NEEDS_BOTH_CLASSES = ["auroc", "auprc", "f1", "ece"]
METRICS += NEEDS_BOTH_CLASSES
# Given as ratios to --reference, above these values: 0.5 is an AUROC at chance.
RATIOS = {"accuracy": 0.0, "balanced_accuracy": 0.0, "auroc": 0.5, "auprc": 0.0, "f1": 0.0}
# A classifier is CONSTANT if it gives all but this fraction of the images the same answer.
CONSTANT_RATE = 0.005
ECE_BINS = 15
Tables = namedtuple("Tables", "train val test labels geometry left_out shared_patients notes")
# Decoded images, (n, H, W) uint8, and their labels, (n, labels) float32 with NaN for masked ones.
Images = namedtuple("Images", "pixels targets")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fail
def fail(message):
    """Print a one-line error to stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def add_arguments(parser):
    flag = parser.add_argument_group("images").add_argument
    flag("--synthetic", help="folder of sample.py, or any image table of synthetic images")
    flag("--real_csv", help="image table of real images (default: CheXpert's train.csv, if found)")
    flag("--validation_csv", help="separate real validation table; --real_csv is then for training only")
    flag("--test_csv", help="separate real test table; --real_csv is then for training and validation only")
    flag("--image_root", help="folder that real image paths are relative to (default: the table's or its parent)")
    flag("--train_on", choices=["synthetic", "real", "both"], default="synthetic", help="both: half of each")
    flag("--labels", nargs="+", choices=LABELS, metavar="LABEL", help="default: the paper's six that all tables have")
    flag("--split", choices=["train", "val", "test", "all"], help="real patients to test on (default: test)")
    flag("--split_seed", type=int, default=0, help="seed of the split by patient; use the same in every script")
    flag("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="meaning of -1; ignore masks it")
    flag("--num_train_images", type=int, help="seeded subset (default: as many as both tables have)")
    flag("--max_test_images", type=int, help="test on a seeded subset of this size (default: all)")
    flag("--source_resolution", type=int, help="side that images are first resized to (default: as the synthetic)")
    flag("--resize_mode", choices=["squash", "pad", "crop"], help="default: that of the synthetic images, else squash")
    flag("--mixed_geometry", action="store_true", help="allow tables made with different --resize_mode")
    flag("--on_bad_image", choices=["stop", "skip"], default="stop", help="stop, or leave unreadable images out")
    flag("--image_cache_dir", help="decoded images, shared by runs (default: image_cache beside --output_dir)")
    flag = parser.add_argument_group("classifier").add_argument
    architectures = ["efficientnet_b0", "resnet18", "resnet50", "densenet121"]
    flag("--arch", choices=architectures, default="efficientnet_b0", help="torchvision network; a sigmoid per label")
    flag("--weights", default="imagenet", help="imagenet, none or FILE.safetensors; never trained on the test data")
    flag("--resolution", type=int, default=224, help="side of the network's input in pixels")
    flag("--classifier", metavar="DIR", help="score this saved classifier on real images instead of training one")
    flag = parser.add_argument_group("training").add_argument
    flag("--num_train_epochs", type=int, default=20, help="maximal number of passes over the training images")
    flag("--patience", type=int, default=5, help="epochs without improvement before stopping; 0 never stops early")
    flag("--train_batch_size", type=int, default=32, help="images per process and step")
    flag("--learning_rate", type=float, default=3e-4, help="peak rate, after warm-up over 5%% of the steps")
    flag("--weight_decay", type=float, default=1e-2, help="AdamW's weight decay; 0 turns it off")
    flag("--rotation", type=float, default=7.0, help="largest random rotation in degrees; 0 turns it off")
    flag("--translation", type=float, default=0.05, help="largest random shift, as a fraction of the side")
    flag("--scale", type=float, default=0.1, help="largest random change of size, as a fraction")
    flag("--brightness", type=float, default=0.1, help="largest random change of brightness, as a fraction")
    flag("--horizontal_flip", action="store_true", help="flip half of the training images")
    flag("--shuffle_labels", action="store_true", help="control: permute the labels, so that AUROC is at chance")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast type (default: accelerate's config)")
    flag = parser.add_argument_group("runs and output").add_argument
    flag("--seed", type=int, default=0, help="first seed of initial weights, order and augmentation")
    flag("--num_seeds", type=int, default=3, help="number of classifiers to train, with consecutive seeds")
    flag("--bootstrap_samples", type=int, default=1000, help="draws of patients for the 95%% intervals")
    flag("--reference", metavar="DIR", help="finished run with --train_on real, to give the figures as ratios to")
    flag("--output_dir", help="result folder (default: downstream/, --train_on and the name of --synthetic)")


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.labels = args.labels and list(dict.fromkeys(args.labels))
    if args.classifier and (args.synthetic or args.labels or args.reference):
        parser.error("--classifier trains nothing; leave out --synthetic, --labels and --reference")
    if args.validation_csv and not (args.real_csv and args.test_csv):
        parser.error("--validation_csv needs --real_csv and --test_csv")
    for name in ("real_csv", "validation_csv", "test_csv", "image_root"):
        if getattr(args, name) and not os.path.exists(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)}: not found")
    args.real_csv = args.real_csv or next(filter(os.path.isfile, DEFAULT_TABLES), None)
    if not args.real_csv and (not args.test_csv or args.train_on != "synthetic"):
        parser.error(f"found neither {' nor '.join(DEFAULT_TABLES)} in {Path.cwd()}; pass --real_csv FILE")
    if not args.classifier and args.train_on != "real" and not args.synthetic:
        parser.error(f"--train_on {args.train_on} needs --synthetic FOLDER, a folder of sample.py")
    if not args.classifier and args.train_on != "synthetic" and args.split not in (None, "test") and not args.test_csv:
        parser.error(f"--split {args.split}: these patients are trained on; leave it out or pass --test_csv")
    name = "_".join(filter(None, [args.train_on, args.synthetic and Path(args.synthetic).stem]))
    if args.classifier:
        name = f"{Path(args.classifier).resolve().parent.name}_on_{Path(args.test_csv or args.real_csv).stem}"
    args.output_dir = args.output_dir or f"downstream/{name}"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.keyed_seed
def keyed_seed(*key):
    """Return a 63-bit seed that depends on the key alone, so that random draws need no saved state."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


# Copied from train_full.parse_labels
def parse_labels(raw, source):
    """Return the label columns of a table of strings as floats: 1, 0, -1, or NaN where a finding is not mentioned."""
    values = {"": math.nan, "1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0}
    labels = raw[[label for label in LABELS if label in raw]].apply(lambda column: column.str.strip())
    for name, column in labels.items():
        unknown = ~column.isin(values)
        if unknown.any():
            row = int(unknown.argmax())
            fail(f"{source}: row {row + 1}, column {name!r}: {column.iloc[row]!r} is not 1, 0, -1 or blank")
    return labels.apply(lambda column: column.map(values))


# Copied from train_full.resolve_paths
def resolve_paths(names, csv, image_root):
    """Return absolute image paths, from the first folder under which one of the first 1,000 images exists.

    CheXpert's paths start with the dataset's own folder, which a resized copy often renames, so that part is optional.
    """
    roots = [Path(image_root)] if image_root else [Path(csv).parent, Path(csv).resolve().parent.parent]
    for root in roots:
        for skip in (0, 1):
            paths = (root / Path(*Path(name).parts[skip:]) for name in names)
            if any(path.is_file() for path in itertools.islice(paths, 1000)):
                return [str((root / Path(*Path(name).parts[skip:])).absolute()) for name in names]
    searched = " or ".join(str(root.absolute()) for root in roots)
    fail(f"{csv}: none of its images exist under {searched}, such as {names[0]}; pass --image_root")


# Copied from train_full.make_table
def make_table(raw, names, images, prompt_column, source):
    """Build the image table that all scripts use from a table of strings.

    Its columns are `image` (what `load_image` takes), `name`, `patient`, `frontal`, `prompt` ("" if there is none) and
    the labels found. An image without a patient counts as a patient of its own.
    """
    table = pd.DataFrame({"image": images, "name": names})
    patient = table["name"].str.extract(r"(?:^|/)(patient\d+)(?=/)", expand=False)
    if "patient_id" in raw:
        patient = raw["patient_id"].where(raw["patient_id"] != "", patient)
    table["patient"] = patient.fillna(table["name"])
    view = raw["Frontal/Lateral"] if "Frontal/Lateral" in raw else pd.Series("frontal", raw.index)
    table["frontal"] = view.str.strip().str.lower().str.startswith("frontal")
    table["prompt"] = raw[prompt_column].str.strip() if prompt_column in raw else ""
    return table.join(parse_labels(raw, source))


# Copied from train_full.load_image_table
def load_image_table(csv, image_root=None, with_images=True):
    """Read an image table: CheXpert's CSV, or any with an image column and label or prompt columns.

    Without `with_images`, paths are not looked up and may not exist.
    """
    form = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "skipinitialspace": True}
    try:
        with warnings.catch_warnings():
            # pandas only warns about a row longer than the header, and shifts or drops its cells.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            raw = pd.read_csv(csv, index_col=False, **form)
    except (ValueError, pd.errors.ParserWarning) as error:
        fail(f"{csv}: not a readable CSV in UTF-8 ({error})")
    column = next((name for name in ("Path", "file_name") if name in raw), None)
    if column is None:
        fail(f"{csv}: no image column; name it Path (CheXpert) or file_name (imagefolder)")
    if raw.empty:
        fail(f"{csv}: no rows below the header")
    if (raw[column] == "").any():
        fail(f"{csv}: row {int((raw[column] == '').argmax()) + 1} has no path in column {column!r}")
    if not {*LABELS, "prompt"} & set(raw.columns):
        fail(f"{csv}: no label or prompt column; expected prompt or any of {', '.join(LABELS)}")
    images = resolve_paths(raw[column], csv, image_root) if with_images else raw[column]
    return make_table(raw, raw[column], images, "prompt", csv)


# Copied from train_full.assign_splits
def assign_splits(patients, seed):
    """Return train, val or test per row, from a hash of (seed, patient): stable across scripts and added rows."""
    splits, bounds = {}, np.cumsum(list(SPLIT_FRACTIONS.values()))
    for patient in patients.unique():
        position = int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:8], "big") / 2**64
        splits[patient] = list(SPLIT_FRACTIONS)[min(np.searchsorted(bounds, position, "right"), 2)]
    return patients.map(splits)


def patient_hash(patient):
    """Return 16 hexadecimal digits that stand for a patient in files that may be shared."""
    return hashlib.sha256(f"patient:{patient}".encode()).hexdigest()[:16]


def find_synthetic_table(path):
    """Return the image table of a folder of sample.py, or the path itself if it is a table."""
    csv = Path(path) / "metadata.csv" if os.path.isdir(path) else Path(path)
    if not csv.is_file():
        fail(f"--synthetic {path}: {csv.name} not found; pass a finished folder of sample.py, or an image table")
    return str(csv)


def read_geometry(csv):
    """Return the distinct values of `resize_mode` (str) and `resolution` (int) in a table of sample.py, [] for others."""
    columns = pd.read_csv(csv, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    modes, sides = ([v for v in columns.get(name, []) if v] for name in ("resize_mode", "resolution"))
    if set(modes) - {"squash", "pad", "crop"} or not all(side.isdecimal() and int(side) for side in sides):
        fail(f"{csv}: the column resize_mode or resolution has values that sample.py does not write")
    return {"resize_mode": list(dict.fromkeys(modes)), "resolution": list(dict.fromkeys(map(int, sides)))}


def subset(table, count, seed):
    return table.sample(n=count, random_state=seed % 2**32) if count < len(table) else table


def training_pools(args, tables, synthetic_csv):
    """Return (training rows, validation rows) by kind of image."""

    def split(csv, seed):
        parts = assign_splits(tables[csv]["patient"], seed)
        # Tables without test images have a split of their own, since they may be one part of the usual one.
        is_train = parts == "train" if seed == args.split_seed else parts != "val"
        return tables[csv][is_train], tables[csv][parts == "val"]

    pools = {"synthetic": split(synthetic_csv, args.split_seed + 1)} if synthetic_csv else {}
    if args.validation_csv:
        pools["real"] = tables[args.real_csv], tables[args.validation_csv]
    elif args.real_csv and (args.test_csv or args.split in (None, "test")):
        pools["real"] = split(args.real_csv, args.split_seed + bool(args.test_csv))
    return pools


def draw_rows(args, pools, left_out):
    """Draw training and validation rows: as many as the smallest pool has, whatever --train_on is."""
    kinds, parts = (["synthetic", "real"] if args.train_on == "both" else [args.train_on]), []
    for i, part in enumerate(("training", "validation")):
        count, drawn = min(len(pool[i]) for pool in pools.values()), []
        if part == "training" and args.num_train_images:
            count = args.num_train_images
        for k, kind in enumerate(kinds):
            pool, share = pools[kind][i], (count + len(kinds) - 1 - k) // len(kinds)
            if len(pool) < max(share, 1):
                fail(f"{len(pool):,} {kind} images for {part}, {max(share, 1):,} needed; pass a larger table")
            left_out[f"{kind} images beyond the {share:,} used for {part}"] = len(pool) - share
            drawn.append(subset(pool, share, args.split_seed).assign(real=kind == "real"))
        parts.append(pd.concat(drawn, ignore_index=True))
    return parts


def load_tables(args, spec, accelerator):
    """Load the tables, split real images by patient and draw training rows; `spec` is --classifier's JSON, or {}."""
    left_out, notes, tables = Counter(), [], {}
    synthetic_csv = find_synthetic_table(args.synthetic) if args.synthetic else None
    test_csv = args.test_csv or args.real_csv
    for csv in dict.fromkeys(filter(None, (synthetic_csv, args.real_csv, args.validation_csv, test_csv))):
        table = load_image_table(csv, None if csv == synthetic_csv else args.image_root)
        left_out["not frontal"] += int((~table["frontal"]).sum())
        tables[csv] = table[table["frontal"]]
    columns = [label for label in LABELS if all(label in table for table in tables.values())]
    labels = spec.get("labels") or args.labels or [label for label in CONDITIONS if label in columns]
    if not labels or set(labels) - set(columns):
        fail(f"labels that {' and '.join(tables)} have in common: {', '.join(columns) or 'none'}; pass --labels")
    made = read_geometry(synthetic_csv) if synthetic_csv else {"resize_mode": [], "resolution": []}
    if spec:
        made = {"resize_mode": [spec["resize_mode"]], "resolution": [spec["source_resolution"]]}
    modes = [*dict.fromkeys(filter(None, [args.resize_mode, *made["resize_mode"]])), "squash"]
    if len(modes) > 2 and not args.mixed_geometry:
        fail(f"images made with --resize_mode {' and '.join(modes[:-1])}; pass --mixed_geometry to compare them")
    geometry = args.source_resolution or max(made["resolution"], default=512), modes[0]

    test, split = tables[test_csv], args.split or ("all" if args.test_csv else "test")
    test = test if split == "all" else test[assign_splits(test["patient"], args.split_seed) == split]
    pools = {} if spec else training_pools(args, tables, synthetic_csv)
    if args.on_bad_image == "skip":
        # Before rows are drawn, so that runs on synthetic and on real images still train on as many.
        images = [image for part in [test, *sum(pools.values(), ())] for image in part["image"]]
        bad = find_bad_images(accelerator, list(dict.fromkeys(images)), args)
        left_out["unreadable"] = len(bad)
        test = test[~test["image"].isin(bad)]
        pools = {kind: [part[~part["image"].isin(bad)] for part in pool] for kind, pool in pools.items()}
    if test.empty:
        fail(f"{test_csv}: no images to test on in split {split}; see --split and --split_seed")
    train, val = draw_rows(args, pools, left_out) if pools else (test[:0], test[:0])
    if "real" in pools and not args.test_csv:
        assert not set(test["patient"]) & {patient for part in pools["real"] for patient in part["patient"]}
    if (test["patient"] == test["name"]).any():
        notes.append("some real rows have no patient (patient_id, or patientNNNNN in the path) and are split by image")
    seen = {*spec["split"]["patients"]} if spec else {*map(patient_hash, [*train["patient"], *val["patient"]])}
    shared = len(seen & {*map(patient_hash, test["patient"])})
    if shared:
        notes.append(f"{shared:,} patients are in both training and test: the scores are not of unseen patients")
    test = subset(test, args.max_test_images or len(test), args.split_seed)
    return Tables(train, val, test, labels, geometry, left_out, shared, notes)


# Copied from train_full.load_image
def load_image(image, resolution, resize_mode):
    """Decode an image to (resolution, resolution, 3) uint8. Raise ValueError if it cannot be used.

    `image` is a path, or (dataset, column, row) for a row of a Hugging Face dataset.
    """
    try:
        file = image
        if isinstance(image, tuple):
            dataset, column, row = image
            encoded = dataset[row][column]
            file = io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]
        with Image.open(file, formats=["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]) as opened:
            bits = max(getattr(opened, "tag_v2", {}).get(258, [8]))  # TIFF's BitsPerSample
            # Pillow clips or drops the lower bits of deeper images without a warning.
            if opened.mode[0] in "IF" or bits > 8 or ";16" in str(opened.tile):
                raise ValueError("more than 8 bits per channel; convert it to 8 bits with a suitable window")
            if getattr(opened, "n_frames", 1) > 1:
                raise ValueError("more than one frame")
            rgb = ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # Pillow can raise anything on a malformed file
        name = image if isinstance(image, str) else f"row {image[2]}"
        raise ValueError(f"{name}: {'no such file' if isinstance(error, FileNotFoundError) else error}") from error
    size = (resolution, resolution)
    if resize_mode == "squash":
        return np.asarray(rgb.resize(size, Image.Resampling.LANCZOS))
    resize = ImageOps.pad if resize_mode == "pad" else ImageOps.fit
    return np.asarray(resize(rgb, size, Image.Resampling.LANCZOS))


def to_gray(rgb, resolution):
    """Convert (H, W, 3) to (resolution, resolution), uint8: the mean over channels, so that a tint is no cue."""
    gray = Image.fromarray(np.rint(rgb.mean(axis=2)).astype(np.uint8))
    return np.asarray(gray.resize((resolution, resolution), Image.Resampling.LANCZOS))


def decode_images(images, decode, problems, description="decoding images"):
    """Yield (i, decode(images[i])) in order, decoded on all cores with at most 64 results in memory.

    An image for which `decode` raises ValueError is not yielded; its message is stored in the dict `problems` under i.
    """

    def attempt(i):
        try:
            return decode(images[i])
        except ValueError as error:
            problems[i] = str(error)

    progress = tqdm(total=len(images), desc=description, unit="image", leave=False)
    with progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), 64):
            chunk = range(start, min(start + 64, len(images)))
            for i, decoded in zip(chunk, pool.map(attempt, chunk)):
                progress.update()
                if i not in problems:
                    yield i, decoded


def report_bad_images(problems, on_bad_image):
    """Stop at images that cannot be used, or print that they are left out; `problems` holds the messages."""
    message = f"{len(problems):,} images cannot be used: {'; '.join(list(problems.values())[:20])}"
    if problems and on_bad_image == "stop":
        fail(f"{message}; repair them or pass --on_bad_image skip")
    if problems:
        print(f"{'left out':>9}  {message}", flush=True)


def cache_path(args, images, *geometry):
    """Return a path without suffix, named by the geometry and each image's path, size and time."""
    digest = hashlib.sha256("/".join(map(str, geometry)).encode())
    for image in images:
        stat = os.stat(image) if os.path.isfile(image) else None
        digest.update(f"{image}/{stat and stat.st_size}/{stat and stat.st_mtime_ns}".encode())
    return Path(args.image_cache_dir or Path(args.output_dir).parent / "image_cache") / digest.hexdigest()[:32]


def find_bad_images(accelerator, images, args):
    """Return the images that cannot be decoded; a file in the cache folder keeps them for other runs."""
    path, problems = cache_path(args, images, "bad images").with_suffix(".json"), {}
    if accelerator.is_main_process and not path.exists():
        for _ in decode_images(images, lambda image: load_image(image, 8, "squash"), problems, "checking images"):
            pass
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({images[i]: problem for i, problem in problems.items()}))
    accelerator.wait_for_everyone()
    problems = json.loads(path.read_text(encoding="utf-8"))
    if accelerator.is_main_process:
        report_bad_images(problems, "skip")
    return set(problems)


def label_targets(table, labels, uncertain):
    """Return (n, len(labels)) float32: 1 positive, 0 negative or not mentioned, NaN masked."""
    minus_one = {"ones": 1.0, "zeros": 0.0, "ignore": math.nan}[uncertain]
    return table.reindex(columns=labels).fillna(0.0).replace(-1.0, minus_one).to_numpy(np.float32, copy=True)


def load_images(accelerator, tables, resolution, args):
    """Return training, validation and test images, decoded once by the first process and memory-mapped."""

    def decode(image):
        return to_gray(load_image(image, *tables.geometry), resolution)

    arrays, bad = [], {}
    for images in ([*tables.train["image"], *tables.val["image"]], list(tables.test["image"])):
        path, problems = cache_path(args, images, *tables.geometry, resolution).with_suffix(".npy"), {}
        if accelerator.is_main_process and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(images), resolution, resolution))
            for i, gray in decode_images(images, decode, problems):
                pixels[i] = gray
            pixels.flush()
            bad |= {images[i]: problem for i, problem in problems.items()}
            temporary.unlink() if problems else os.replace(temporary, path)
        arrays.append(path)
    report_bad_images(bad, "stop")
    accelerator.wait_for_everyone()
    training, test = (np.load(path, mmap_mode="r") for path in arrays)
    pixels = training[: len(tables.train)], training[len(tables.train) :], test
    frames = (tables.train, tables.val, tables.test)
    return [Images(*pair) for pair in zip(pixels, (label_targets(f, tables.labels, args.uncertain) for f in frames))]


def augment(images, draws, args):
    """Rotate, shift, scale and brighten (b, 1, h, w) in [0, 1] by `draws`, (b, 6) uniform in [-1, 1]."""
    angle = draws[:, 0] * math.radians(args.rotation)
    shift, scale = 2 * args.translation * draws[:, 1:3], 1 + args.scale * draws[:, 3]
    flip = torch.where(draws[:, 5] < 0, -1.0, 1.0) if args.horizontal_flip else torch.ones_like(angle)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    matrix = torch.stack([cos * flip, -sin, shift[:, 0], sin * flip, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    return (moved * (1 + args.brightness * draws[:, 4])[:, None, None, None]).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Classifier and training
# ---------------------------------------------------------------------------------------------------------------------


def build_classifier(arch, num_labels):
    """Return torchvision's network with one logit per label and random weights."""
    return get_model(arch, weights=None, num_classes=num_labels).to(memory_format=torch.channels_last)


def classifier_inputs(gray, normalisation):
    """Convert gray images, (b, 1, h, w) in [0, 1], to the classifier's normalised inputs, (b, 3, h, w)."""
    mean, std = (torch.tensor(normalisation[key], device=gray.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return ((gray.expand(-1, 3, -1, -1) - mean) / std).contiguous(memory_format=torch.channels_last)


def load_initial_weights(accelerator, model, args):
    """Load pre-trained weights into all layers but the last, which stays random."""
    if args.weights == "none":
        return
    head = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    try:
        if args.weights == "imagenet":
            with accelerator.local_main_process_first():
                saved = get_model(args.arch, weights="DEFAULT").state_dict()
        else:
            saved = load_file(args.weights)
        saved = {name: tensor for name, tensor in saved.items() if not name.startswith(f"{head}.")}
        missing, unexpected = model.load_state_dict(saved, strict=False)
        # Older files lack batch normalisation's counters, which nothing reads.
        missing = [name for name in missing if not name.startswith(f"{head}.") and "num_batches" not in name]
        if missing or unexpected or not all(tensor.isfinite().all() for tensor in saved.values()):
            raise ValueError(f"weights of another network or not finite {[*missing, *unexpected][:3]}")
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        fail(f"--weights {args.weights}: cannot be loaded into {args.arch} ({str(error)[:300]}); pass a file, or none")


def load_classifier(folder):
    """Return the saved classifier in evaluation mode on the CPU, and its classifier.json (see save_classifier)."""
    path = Path(folder) / "classifier.json"
    if not path.is_file():
        fail(f"{path}: no such file; pass the classifier folder of a finished eval_downstream.py run")
    spec = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in ("labels", "thresholds", "split", "real_test_auroc") if not spec.get(key)]
    if missing or not spec["split"].get("fingerprint"):
        fail(f"{path}: has no {missing[0] if missing else 'split fingerprint'}; save it again with eval_downstream.py")
    model = build_classifier(spec["arch"], len(spec["labels"]))
    model.load_state_dict(load_file(path.with_name("model.safetensors")))
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        fail(f"{folder}: the classifier has weights that are not finite")
    return model.eval(), spec


def masked_bce(logits, targets):
    """Return the mean binary cross-entropy over known labels; targets are 1, 0 or NaN, both (b, labels)."""
    known = ~targets.isnan()
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.nan_to_num(0.0), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def predict(accelerator, model, pixels, normalisation, batch_size=64):
    """Return float32 logits, (n, labels); each process computes a part of them."""
    model.eval()
    mine, logits = np.arange(accelerator.process_index, len(pixels), accelerator.num_processes), []
    for start in range(0, len(mine), batch_size):
        gray = torch.from_numpy(pixels[mine[start : start + batch_size]]).to(accelerator.device)[:, None].float() / 255
        logits.append(model(classifier_inputs(gray, normalisation)).cpu().numpy())
    parts = gather_object([(mine, np.concatenate(logits))] if logits else [])
    result = np.empty((len(pixels), parts[0][1].shape[1]), np.float32)
    for indices, part in parts:
        result[indices] = part
    return result


def write_tensors(tensors, path, metadata=None):
    """Write a safetensors file to a temporary file, then rename it atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def read_tensors(path):
    """Return the tensors and the metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def save_progress(path, accelerator, model, optimizer, best, losses):
    """Write all that training needs to continue after this epoch."""
    state = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"best/{name}": tensor for name, tensor in best.items()}
    for i, parameter in enumerate(model.parameters()):
        state |= {f"optimizer/{i}/{name}": tensor for name, tensor in optimizer.state[parameter].items()}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
    write_tensors(state, path, {"losses": json.dumps(losses), "scaler": json.dumps(scaler)})


def load_progress(path, accelerator, model, optimizer):
    """Restore a seed's state. Return the best weights so far and the validation losses."""
    tensors, metadata = read_tensors(path)
    model.load_state_dict({name: tensors[f"model/{name}"] for name in model.state_dict()})
    for i, parameter in enumerate(model.parameters()):
        # Fused AdamW assumes that its state has the weight's memory layout, but the file's tensors are contiguous.
        moments = {name: tensors[f"optimizer/{i}/{name}"] for name in ("exp_avg", "exp_avg_sq")}
        moments = {name: torch.empty_like(parameter).copy_(tensor) for name, tensor in moments.items()}
        optimizer.state[parameter] = {"step": tensors[f"optimizer/{i}/step"].to(parameter.device)} | moments
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(json.loads(metadata["scaler"]))
    return {name: tensors[f"best/{name}"] for name in model.state_dict()}, json.loads(metadata["losses"])


def learning_rate(peak, step, total_steps):
    """Return the rate of a linear warm-up over 5% of the steps, then a cosine to 0 (arXiv 1608.03983, eq. 5)."""
    warmup = max(1, total_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def train_epoch(args, accelerator, model, optimizer, data, seed, epoch):
    """Train on the images in an order that depends on (seed, epoch) alone; the last partial batch is dropped."""
    model.train()
    batch = args.train_batch_size * accelerator.num_processes
    steps = max(1, len(data.pixels) // batch)
    generator = torch.Generator().manual_seed(keyed_seed(seed, "epoch", epoch))
    order = torch.randperm(len(data.pixels), generator=generator)
    # Fewer images than one batch are repeated.
    order = order.repeat(-(-batch // len(order)))
    first = accelerator.process_index * args.train_batch_size
    mine = slice(first, first + args.train_batch_size)
    description = f"seed {seed}, epoch {epoch + 1} of {args.num_train_epochs}"
    for step in tqdm(range(steps), description, leave=False, disable=not accelerator.is_main_process):
        # Drawn for all processes together, of which each takes its part.
        draws = torch.rand(batch, 6, generator=generator) * 2 - 1
        chosen = order[step * batch : (step + 1) * batch][mine].numpy()
        gray = torch.from_numpy(data.pixels[chosen]).to(accelerator.device)[:, None].float() / 255
        inputs = classifier_inputs(augment(gray, draws[mine].to(accelerator.device), args), NORMALISATION)
        loss = masked_bce(model(inputs), torch.from_numpy(data.targets[chosen]).to(accelerator.device))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.learning_rate, epoch * steps + step, args.num_train_epochs * steps)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def train_seed(args, accelerator, seed, train, val, path):
    """Train one classifier, resuming from `path`. Return it at its lowest validation loss, and each epoch's loss."""
    num_labels = train.targets.shape[1]
    torch.manual_seed(keyed_seed(seed, "initial weights"))
    model = build_classifier(args.arch, num_labels)
    load_initial_weights(accelerator, model, args)
    fused = accelerator.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=fused)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    # Scores in float32; accelerate runs the wrapped model in --mixed_precision.
    scorer = build_classifier(args.arch, num_labels).to(accelerator.device)
    if accelerator.scaler:
        # Not the state that the previous seed left.
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    best, losses = {}, []
    if broadcast_object_list([path.exists()])[0]:
        best, losses = load_progress(path, accelerator, model, optimizer)
    for epoch in range(len(losses), args.num_train_epochs):
        if args.patience and losses and len(losses) - 1 - int(np.argmin(losses)) >= args.patience:
            break
        # Dropout and stochastic depth draw from the global generator.
        torch.manual_seed(keyed_seed(seed, "dropout", epoch, accelerator.process_index))
        train_epoch(args, accelerator, wrapped, optimizer, train, seed, epoch)
        for buffer in model.buffers():
            # Each process has batch statistics of its own images; keep those of the first.
            buffer.copy_(broadcast(buffer))
        scorer.load_state_dict(model.state_dict())
        logits = torch.from_numpy(predict(accelerator, scorer, val.pixels, NORMALISATION)).double()
        losses.append(float(masked_bce(logits, torch.from_numpy(val.targets))))
        if not math.isfinite(losses[-1]):
            fail(f"seed {seed} diverged in epoch {epoch + 1}; lower --learning_rate or pass --mixed_precision no")
        if losses[-1] == min(losses):
            best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        if accelerator.is_main_process:
            save_progress(path, accelerator, model, optimizer, best, losses)
    scorer.load_state_dict(best)
    return scorer, losses


def shuffle_labels(images, seed):
    order = np.random.default_rng(keyed_seed(seed, "shuffled labels")).permutation(len(images.targets))
    return Images(images.pixels, images.targets[order])


def run_seed(args, accelerator, seed, images, folder):
    """Train a seed's classifier unless it is finished. Return its logits on the test images and validation losses."""
    done, (train, val, test) = folder / "predictions.safetensors", images
    if not broadcast_object_list([done.exists()])[0]:
        folder.mkdir(parents=True, exist_ok=True)
        if args.shuffle_labels:
            train, val = shuffle_labels(train, seed), shuffle_labels(val, seed)
        model, losses = train_seed(args, accelerator, seed, train, val, folder / "progress.safetensors")
        logits = torch.from_numpy(predict(accelerator, model, test.pixels, NORMALISATION))
        if accelerator.is_main_process:
            write_tensors(model.state_dict(), folder / "model.safetensors")
            write_tensors({"test": logits}, done, {"losses": json.dumps(losses)})
            (folder / "progress.safetensors").unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    tensors, metadata = read_tensors(done)
    return tensors["test"].numpy(), json.loads(metadata["losses"])


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and results
# ---------------------------------------------------------------------------------------------------------------------


def weighted_metrics(target, probability, weights):
    """Return METRICS of one label, (draws,) each, for each row of `weights`, (draws, n): how often an image counts.

    Like scikit-learn's with sample_weight, but for all draws at once; NaN where undefined. ECE: arXiv 1706.04599, eq. 3.
    """
    positive, called = target == 1, probability >= 0.5
    indicators = np.stack([np.ones_like(positive), positive, called, called & positive], axis=1)
    total, positives, calls, hits = (weights @ indicators).T
    negatives, correct_negatives = total - positives, total - positives - calls + hits
    # Sums over images of equal probability, in descending order, so that ties count half in the ROC curve.
    order = np.argsort(-probability, kind="stable")
    starts = np.flatnonzero(np.diff(-probability[order], prepend=-2.0))
    positive_by_score = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    negative_by_score = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    true_positives, false_positives = positive_by_score.cumsum(axis=1), negative_by_score.cumsum(axis=1)
    below = negatives[:, None] - false_positives + negative_by_score / 2
    bins = np.eye(ECE_BINS)[np.minimum((probability * ECE_BINS).astype(int), ECE_BINS - 1)]
    with np.errstate(invalid="ignore", divide="ignore"):
        both = np.where(positives * negatives > 0, 1.0, np.nan)
        accuracy, constant = (hits + correct_negatives) / total, np.maximum(positives, negatives) / total
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        return {
            "accuracy": accuracy,
            "constant_accuracy": constant,
            "accuracy_gain": accuracy - constant,
            "predicted_positive_rate": calls / total,
            "balanced_accuracy": (hits / positives + correct_negatives / negatives) / 2,
            "auroc": (positive_by_score * below).sum(axis=1) / (positives * negatives),
            "auprc": both * (positive_by_score * precision).sum(axis=1) / positives,
            "f1": both * 2 * hits / (calls + positives),
            "ece": np.abs((weights * (target - probability)) @ bins).sum(axis=1) / total,
        }


def patient_weights(patients, draws):
    """Return how often each image counts in each draw, (len(draws), n); draw 0 is the test set as it is.

    Draw k > 0 takes as many patients with replacement (cluster bootstrap, Field and Welsh 2007), seeded by k alone: the
    same patients in every run on the same test images.
    """
    names, index = np.unique(patients, return_inverse=True)
    weights = np.ones((len(draws), len(names)))
    for row, k in zip(weights, draws):
        if k > 0:
            chosen = np.random.default_rng(keyed_seed("bootstrap", k)).integers(len(names), size=len(names))
            row[:] = np.bincount(chosen, minlength=len(names))
    return weights[:, index]


def score(targets, patients, probabilities, num_draws):
    """Return METRICS by name, (labels, seeds, 1 + draws): first the value, then the draws. Masked images do not count.

    `targets` are (n, labels), `probabilities` one (n, labels) array for each seed.
    """
    size, num_labels = 1 + num_draws, targets.shape[1]
    figures = {name: np.full((num_labels, len(probabilities), size), np.nan) for name in METRICS}
    for start in range(0, size, 50):  # all draws at once would not fit in memory
        draws = range(start, min(start + 50, size))
        weights = patient_weights(patients, draws)
        for label in range(num_labels):
            known = ~np.isnan(targets[:, label])
            target, known_weights = targets[known, label].astype(np.float64), weights[:, known]
            for seed, probability in enumerate(probabilities if len(np.unique(target)) == 2 else []):
                for name, values in weighted_metrics(target, probability[known, label], known_weights).items():
                    figures[name][label, seed, draws.start : draws.stop] = values
    return figures


def training_noise(num_seeds, num_draws, seed):
    """Return (seeds, draws) that turn a figure's deviations from its mean over seeds into draws of that mean's error.

    They follow Student's t with the mean's standard error: resampling so few seeds would give too narrow an interval.
    All figures of a run share the matrix, which keeps the correlation between labels.
    """
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal((num_seeds, num_draws))
    return normal / np.sqrt(num_seeds * generator.chisquare(max(num_seeds - 1, 1), num_draws))


# Copied from train_full.result_row
def result_row(metric, value, label="all", low=None, high=None, n=None, floor=None, note=None):
    """Return one row of the form that all result files share; low and high are the 95% interval."""
    row = {"metric": metric, "label": label, "value": value, "low": low, "high": high}
    return row | {"n": n, "floor": floor, "note": note}


# Copied from train_full.write_text
def write_text(path, text):
    """Write to a temporary file, then rename it atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def interval(draws, minimum=0.0, maximum=1.0):
    """Return the 95% percentile interval within bounds, or None twice if no draw is defined."""
    defined = draws[~np.isnan(draws)]
    return np.percentile(defined, [2.5, 97.5]).clip(minimum, maximum).tolist() if len(defined) else (None, None)


def verdict(metric, low, rates):
    """Return the warning that belongs to a figure; `rates` are predicted-positive rates, (labels, seeds)."""
    constant = (rates < CONSTANT_RATE) | (rates > 1 - CONSTANT_RATE)
    if metric in ("accuracy", "predicted_positive_rate") and len(rates) > 1:
        count = constant.all(axis=1).sum()
        return f"CONSTANT in {count} of {len(rates)} labels" if count else None
    if metric in ("accuracy", "predicted_positive_rate") and constant.any():
        return "CONSTANT" if constant.all() else f"constant in {constant.sum()} of {constant.size} seeds"
    if metric == "auroc" and low is not None and low <= 0.5:
        return "no better than chance"
    if metric == "accuracy_gain" and low is not None and low <= 0:
        return "does not beat the constant predictor"
    return None


def result_rows(labels, figures, noise, targets, reasons):
    """Return rows for each label and "all", their mean, and draws by "metric/label"; `reasons` say why a label has none."""
    rows, draws, known = [], {}, ~np.isnan(targets)
    rates, constants = (figures[name][..., 0] for name in ("predicted_positive_rate", "constant_accuracy"))
    counts = known.sum(axis=0)
    positives = np.nansum(targets, axis=0, dtype=np.float64) / counts.clip(1)
    # What trivial answers score: always the same class, chance, always positive.
    floors = {"accuracy": constants.mean(axis=1), "auprc": positives, "f1": 2 * positives / (1 + positives)}
    floors |= {"accuracy_gain": counts * 0.0, "auroc": counts * 0 + 0.5, "balanced_accuracy": counts * 0 + 0.5}
    for metric in METRICS:
        values = figures[metric][..., 0]
        drawn = figures[metric][..., 1:].mean(axis=1) + (values - values.mean(axis=1, keepdims=True)) @ noise
        defined = np.flatnonzero(~np.isnan(values).any(axis=1))
        for i, label in enumerate([*labels, "all"]):
            chosen = defined if label == "all" else defined[defined == i]
            n = len(targets) if label == "all" else int(counts[i])
            if not len(chosen):
                note = f"n/a: {'no label has it' if label == 'all' else reasons[i]}"
                rows.append(result_row(metric, None, label, n=n, note=note))
                continue
            low, high = None, None
            if metric != "ece":  # resampling biases it upwards
                draws[f"{metric}/{label}"] = drawn[chosen].mean(axis=0)
                low, high = interval(draws[f"{metric}/{label}"], -1 if metric == "accuracy_gain" else 0)
            notes = [verdict(metric, low, rates[chosen])]
            if label == "all" and len(chosen) < len(labels):
                notes.append(f"mean of {len(chosen)} of {len(labels)} labels")
            floor = float(floors[metric][chosen].mean()) if metric in floors else None
            note = "; ".join(filter(None, notes)) or None
            rows.append(result_row(metric, float(values[chosen].mean()), label, low, high, n, floor, note))
    return rows, draws


def load_reference(args, settings, draws_id):
    """Return the rows and draws of --reference, which may differ in what it was trained on alone."""
    path = Path(args.reference) / "downstream_metrics.json"
    if not path.is_file():
        fail(f"--reference {args.reference}: no finished run; pass the folder of one with --train_on real")
    found = json.loads(path.read_text(encoding="utf-8"))
    draws, metadata = read_tensors(path.with_name("downstream_draws.safetensors"))
    free = ("train_on", "training", "seed", "mixed_geometry")
    differing = [key for key in settings if found["settings"].get(key) != settings[key] and key not in free]
    differing += ["bootstrap_samples or test table"] if metadata["draws_id"] != draws_id and not differing else []
    if differing or found["train_on"] != "real":
        fail(f"--reference {args.reference}: not trained on real images, or with another {', '.join(differing)}")
    rows = {(row["metric"], row["label"]): row for row in found["results"]}
    return rows, {name: tensor.numpy() for name, tensor in draws.items()}


def ratio_rows(labels, rows, draws, reference, name):
    """Return rows and draws of the ratios to the reference: in each draw, the same patients for both.

    The ratio of AUROC is (TSTR - 0.5) / (TRTR - 0.5), so that chance counts 0.
    """
    runs, ratios, result = [({(row["metric"], row["label"]): row for row in rows}, draws), reference], {}, []
    for metric, chance in RATIOS.items():
        both = [label for label in labels if all(f"{metric}/{label}" in run_draws for _, run_draws in runs)]
        for label in [*labels, "all"]:
            chosen = both if label == "all" else [label] if label in both else []
            key, note = f"{metric}_of_reference", f"n/a: this run or {name} lacks the figure"
            if chosen:
                values = [np.mean([found[metric, c]["value"] for c in chosen]) - chance for found, _ in runs]
                drawn = [np.mean([found[f"{metric}/{c}"] for c in chosen], axis=0) - chance for _, found in runs]
                note = f"n/a: the figure of {name} is not above {chance:g}, beyond its interval"
            # With a denominator that may be 0, the ratio would have no finite interval.
            if not chosen or not (interval(drawn[1])[0] or 0) > 0:
                result.append(result_row(key, None, label, note=note))
                continue
            ratios[f"{key}/{label}"] = drawn[0] / np.maximum(drawn[1], 1e-12)
            low, high = interval(ratios[f"{key}/{label}"], -np.inf, np.inf)
            note = f"ratio to {name}{', both above chance' if chance else ''}"
            result.append(result_row(key, float(values[0] / values[1]), label, low, high, note=note))
    return result, ratios


def save_figure(figure, path):
    """Write a PNG to a temporary file, then rename it atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight")
    os.replace(temporary, path)


def plot_curves(labels, targets, probabilities, title, output_dir):
    """Write roc.png and reliability.png: a panel for each label, a line for each seed."""
    rows, columns = math.ceil(len(labels) / 3), min(3, len(labels))
    axes = {"roc": ("false positive rate", "true positive rate"), "reliability": ("probability", "positives")}
    for name, (x, y) in axes.items():
        figure = Figure(figsize=(3.6 * columns, 3.7 * rows + 0.4), layout="constrained")
        figure.suptitle(title)
        for i, label in enumerate(labels):
            axis = figure.add_subplot(rows, columns, i + 1, title=label, xlabel=x, ylabel=y, aspect="equal")
            axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
            known = ~np.isnan(targets[:, i])
            target = targets[known, i]
            for probability in [p[known, i] for p in probabilities] if len(np.unique(target)) == 2 else []:
                if name == "roc":
                    axis.plot(*roc_curve(target, probability)[:2])
                else:
                    axis.plot(*calibration_curve(target, probability, n_bins=ECE_BINS)[::-1], marker="o")
        save_figure(figure, output_dir / f"{name}.png")


def plot_training(losses, first_seed, path):
    """Write training.png: the validation loss by epoch; a dot marks the epoch that was kept."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.add_subplot(xlabel="epoch", ylabel="validation loss (masked BCE)")
    for seed, of_seed in enumerate(losses, first_seed):
        epochs, best = range(1, len(of_seed) + 1), int(np.argmin(of_seed))
        axis.plot(epochs, of_seed, label=f"seed {seed}", marker="o", markevery=[best])
    axis.legend()
    save_figure(figure, path)


def save_classifier(settings, tables, auroc_rows, weights, output_dir):
    """Write classifier/: the weights, and what their user must know, renamed together."""
    # Synthetic images have no patients.
    seen = pd.concat([table[table["real"]] for table in (tables.train, tables.val)])["patient"]
    patients = sorted({patient_hash(patient) for patient in seen})
    fingerprint = hashlib.sha256("\n".join(patients).encode()).hexdigest()
    keys = ("labels", "arch", "resolution", "source_resolution", "resize_mode", "train_on", "uncertain")
    spec = {"script": "eval_downstream.py"} | {key: settings[key] for key in keys}
    spec |= {"channels": "mean, repeated three times", "normalisation": NORMALISATION}
    spec["thresholds"] = dict.fromkeys(tables.labels, 0.5)
    spec["split"] = {"seed": settings["split_seed"], "fingerprint": fingerprint, "patients": patients}
    keys = ("value", "low", "high", "n", "note")
    spec["real_test_auroc"] = {row["label"]: {key: row[key] for key in keys} for row in auroc_rows}
    spec["model_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    temporary = output_dir / ".classifier.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shutil.copy(weights, temporary / "model.safetensors")
    write_text(temporary / "classifier.json", json.dumps(spec, indent=2) + "\n")
    shutil.rmtree(output_dir / "classifier", ignore_errors=True)
    os.replace(temporary, output_dir / "classifier")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def one_class(targets):
    """Return which labels have one class only."""
    return [len(np.unique(column[~np.isnan(column)])) < 2 for column in targets.T]


def digest(*arrays):
    """Return a SHA-256 over the content of arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update("\n".join(map(str, array)).encode() if array.dtype == object else np.ascontiguousarray(array).data)
    return sha.hexdigest()


def run_settings(args, tables, spec, images, num_processes):
    """Return what must be the same for a run to be continued and, but for the training images, to be compared."""
    train, val, test = images
    free = ["output_dir", "image_cache_dir", "reference", "bootstrap_samples", "synthetic", "real_csv", "test_csv"]
    free += ["validation_csv", "image_root", "classifier", "max_test_images"]
    settings = {key: value for key, value in vars(args).items() if key not in free}
    settings |= dict(zip(("source_resolution", "resize_mode"), tables.geometry))
    settings |= {"labels": tables.labels, "processes": num_processes, "weights_sha256": spec.get("model_sha256")}
    settings |= {"num_train_images": len(tables.train), "num_val_images": len(tables.val)}
    settings["test"] = digest(test.pixels, test.targets, tables.test["patient"].to_numpy(object))
    settings["training"] = digest(train.pixels, train.targets, val.pixels, val.targets)
    if spec:
        settings |= {key: spec[key] for key in ("arch", "resolution", "train_on")} | {"weights": "a saved classifier"}
    elif args.weights not in ("imagenet", "none"):
        settings["weights_sha256"] = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()
    return settings


def open_output(output_dir, settings):
    """Create the result folder, or stop if it holds other files or results of other settings."""
    path = output_dir / "settings.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings.keys() | saved.keys() if settings.get(key) != saved.get(key)]
        if differing:
            fail(f"{output_dir} holds results of another {', '.join(sorted(differing))}; pass another --output_dir")
    elif output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        fail(f"--output_dir {output_dir}: not empty and not a result folder of this script; pass another")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(settings, indent=2) + "\n")


def main(args):
    output_dir = Path(args.output_dir)
    classifier, spec = load_classifier(args.classifier) if args.classifier else (None, {})
    # The others wait for hours while the first process decodes images.
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))
    # Without `cpu`, processes that torchrun starts on a machine without a GPU would each train for themselves.
    cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[timeout])
    # The same seed must give the same figures, and scores are not rounded to TF32.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False
    tables = load_tables(args, spec, accelerator)
    labels = tables.labels
    if not spec:
        # Before hours of decoding, in case they cannot be loaded.
        load_initial_weights(accelerator, build_classifier(args.arch, len(labels)), args)
    images = load_images(accelerator, tables, spec.get("resolution", args.resolution), args)
    train, _, test = images
    settings = run_settings(args, tables, spec, images, accelerator.num_processes)
    names, patients = (tables.test[key].to_numpy(object) for key in ("name", "patient"))
    draws_id = digest(names, patients, np.array(args.bootstrap_samples))
    reference = load_reference(args, settings, draws_id) if args.reference else None
    counts = {"train": len(tables.train), "validation": len(tables.val), "test": len(tables.test)}
    counts |= {"test_patients": len(set(patients)), "patients_in_training_and_test": tables.shared_patients}
    if accelerator.is_main_process:
        open_output(output_dir, settings)
        left_out = [f"{count:,} {reason}" for reason, count in tables.left_out.items() if count]
        print(f"{'images':>9}  {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
        print(f"{'left out':>9}  {', '.join(left_out) or 'nothing'}")
        print("".join(f"{'warning':>9}  {note}\n" for note in tables.notes), end="", flush=True)
    accelerator.wait_for_everyone()

    folders = [output_dir / "seeds" / f"seed-{args.seed + k}" for k in range(args.num_seeds)]
    if spec:
        classifier.to(accelerator.device)
        results = [(predict(accelerator, classifier, test.pixels, spec["normalisation"]), [])]
    else:
        try:
            results = [run_seed(args, accelerator, args.seed + k, images, folder) for k, folder in enumerate(folders)]
        except torch.OutOfMemoryError as error:
            fail(f"{error}; lower --train_batch_size or --resolution")
    accelerator.end_training()
    if not accelerator.is_main_process:
        return

    probabilities = [torch.from_numpy(logits).double().sigmoid().numpy() for logits, _ in results]
    losses = [of_seed for _, of_seed in results]
    figures = score(test.targets, patients, probabilities, args.bootstrap_samples)
    reasons = ["one class only among the test images" if missing else None for missing in one_class(test.targets)]
    for i, missing in enumerate([] if spec else one_class(train.targets)):
        if missing:
            reasons[i] = reasons[i] or "one class only among the training images"
            for name in NEEDS_BOTH_CLASSES:
                figures[name][i] = np.nan
    # Another seed for each run, so that the difference of two varies by the training of both.
    noise = training_noise(len(results), args.bootstrap_samples, keyed_seed(json.dumps(settings, sort_keys=True)))
    rows, draws = result_rows(labels, figures, noise, test.targets, reasons)
    if not spec and not args.shuffle_labels:
        best = int(np.argmin([min(of_seed) for of_seed in losses]))
        best_figures = {name: values[:, best : best + 1] for name, values in figures.items()}
        best_rows = result_rows(labels, best_figures, noise[:1], test.targets, reasons)[0]
        aurocs = [row for row in best_rows if row["metric"] == "auroc" and row["label"] != "all"]
        save_classifier(settings, tables, aurocs, folders[best] / "model.safetensors", output_dir)
    if reference:
        ratios, ratio_draws = ratio_rows(labels, rows, draws, reference, Path(args.reference).name)
        rows, draws = rows + ratios, draws | ratio_draws

    kind = "synthetic and real" if args.train_on == "both" else args.train_on
    kind += " images with shuffled labels" if args.shuffle_labels else " images"
    title = f"classifier {args.classifier}" if spec else f"trained on {len(tables.train):,} {kind}"
    plot_curves(labels, test.targets, probabilities, f"Real test images, {title}", output_dir)
    if not spec:
        plot_training(losses, args.seed, output_dir / "training.png")
    draws = {name: torch.from_numpy(values) for name, values in draws.items()}
    write_tensors(draws, output_dir / "downstream_draws.safetensors", {"draws_id": draws_id})
    table = pd.DataFrame(rows).pivot(index="metric", columns="label", values="value").astype(float).round(3)
    table = table.loc[list(dict.fromkeys(row["metric"] for row in rows)), [*labels, "all"]].to_string()
    notes = [f"{row['metric']}, {row['label']}: {row['note']}" for row in rows if row["note"]] + tables.notes
    text = [f"# Real test images, {title}", "", "```", table, "```", "", *(f"- {note}" for note in notes), ""]
    write_text(output_dir / "downstream_table.md", "\n".join(text))
    seeds = []
    for k, of_seed in enumerate(losses):
        values = pd.DataFrame({name: array[:, k, 0] for name, array in figures.items()}, labels, dtype=object)
        metrics = values.where(values.notna(), None).to_dict()
        seeds.append({"seed": args.seed + k, "validation_losses": of_seed, "metrics": metrics})
    summary = {"script": "eval_downstream.py", "train_on": "nothing" if spec else args.train_on, "settings": settings}
    summary["arguments"] = {k: v for k, v in vars(args).items() if k not in ("output_dir", "image_cache_dir")}
    packages = ("torch", "torchvision", "accelerate", "scikit-learn", "numpy")
    summary["versions"] = {name: version(name) for name in packages}
    summary |= {"images": counts | {"left_out": tables.left_out}, "notes": tables.notes}
    summary |= {"results": rows, "seeds": seeds}
    write_text(output_dir / "downstream_metrics.json", json.dumps(summary, indent=2) + "\n")
    print(table)


if __name__ == "__main__":
    main(parse_args())
