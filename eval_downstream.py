# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "accelerate>=1.10", "safetensors>=0.5", "scikit-learn>=1.5", "matplotlib>=3.9",
#   "datasets>=4.0", "numpy>=2.0", "pandas>=2.2.2", "scipy>=1.13", "pillow>=10.3", "tqdm>=4.67",
# ]
# ///
"""Train a classifier on synthetic chest radiographs, real ones or both, and test it on real ones.

    accelerate launch eval_downstream.py --synthetic samples/bitfit                        # the paper's Table 4
    accelerate launch eval_downstream.py --synthetic samples/bitfit --train_on real        # on as many real images
    accelerate launch eval_downstream.py --synthetic samples/bitfit --reference downstream/real_bitfit  # and the ratio
    python eval_downstream.py --classifier downstream/real/classifier --real_csv other_hospital.csv --split all

Writes downstream_metrics.json, downstream_draws.safetensors (bootstrap draws of each metric), roc.png and the
classifier that eval_generation.py takes to --output_dir. Rerun an interrupted command to train what is missing.
"""

import argparse
import contextlib
import datetime
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections import Counter, deque, namedtuple
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
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve
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
# Copied from train_full.LABEL_VALUES
LABEL_VALUES = (
    dict.fromkeys(["", "unlabeled", "not mentioned"], math.nan)
    | dict.fromkeys(["1", "1.0", "true", "present", "positive"], 1.0)
    | dict.fromkeys(["0", "0.0", "false", "absent", "negative"], 0.0)
    | dict.fromkeys(["-1", "-1.0", "uncertain"], -1.0)
)
# Copied from train_full.BLANKS
BLANKS = ["nan", "NaN", "NAN", "None", "none", "null", "NULL", "NA", "N/A", "n/a", "<NA>", "NaT"]
# Copied from train_full.COLUMNS
COLUMNS = {name: [] for name in ("patient_id", "split", "resolution", "resize_mode", "Sex", "Age", "AP/PA")} | {
    "Path": ["file_name"],
    "Frontal/Lateral": ["ViewPosition", "view"],
    "prompt": ["text", "caption"],
}
# Copied from train_full.SPLIT_FRACTIONS
SPLIT_FRACTIONS = {"train": 0.353, "val": 0.141, "test": 0.506}
# ImageNet's mean and standard deviation, used with all --weights.
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# RATES are also reported for labels that were not trained, since they show a constant classifier.
RATES = ["accuracy", "constant_accuracy", "accuracy_gain", "predicted_positive_rate"]
METRICS = [*RATES, "balanced_accuracy", "auroc", "auprc", "f1"]
# A classifier is CONSTANT if it gives all but this fraction of the images the same answer.
CONSTANT_RATE = 0.005
# Tables of training, validation and test rows, labels, (source resolution, resize mode), image counts, and warnings.
Tables = namedtuple("Tables", "train val test labels geometry counts notes")
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


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    flag = parser.add_argument_group("images").add_argument
    flag("--synthetic", help="folder that sample.py wrote, or an image table of synthetic images")
    flag("--real_csv", help="image table of real images (default: CheXpert's train.csv, if found)")
    flag("--dataset_name", help="hub id or local folder for datasets.load_dataset, instead of --real_csv")
    flag("--image_column", default="image", help="image column of --dataset_name")
    flag("--validation_csv", help="separate real validation table; --real_csv is then for training only")
    flag("--test_csv", help="separate real test table; --real_csv is then for training and validation only")
    flag("--image_root", help="folder that real image paths are relative to (default: the table's or its parent)")
    flag("--train_on", choices=["synthetic", "real", "both"], default="synthetic", help="both: half of each")
    flag("--labels", nargs="+", help="label columns (default: the paper's six, if in all tables)")
    flag("--split", choices=["train", "val", "test", "all"], help="part to test on (default: test; all of --test_csv)")
    flag("--split_seed", type=int, default=0, help="seed of the split by patient; use the same in every script")
    flag("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="meaning of -1; ignore: masked")
    flag("--num_train_images", type=int, help="training images (default: all of the smaller table)")
    flag("--max_test_images", type=int, help="test on a seeded subset of this size (default: all)")
    flag("--source_resolution", type=int, help="pixels per side to decode to (default: --synthetic's, else 512)")
    flag("--resize_mode", choices=["squash", "pad", "crop"], help="how images become square (default: --synthetic's)")
    flag("--mixed_geometry", action="store_true", help="allow images of different sizes or --resize_mode")
    flag("--on_bad_image", choices=["stop", "skip"], default="stop", help="what to do about unreadable images")
    flag("--image_cache_dir", help="decoded images, shared by runs (default: image_cache/ next to --output_dir)")
    flag = parser.add_argument_group("classifier").add_argument
    architectures = ["efficientnet_b0", "resnet18", "resnet50", "densenet121"]
    flag("--arch", choices=architectures, default="efficientnet_b0", help="torchvision network; a sigmoid per label")
    flag("--weights", default="imagenet", help="imagenet, none or FILE.safetensors that has not seen the test images")
    flag("--resolution", type=int, default=224, help="pixels per side of the network's input")
    flag("--classifier", metavar="DIR", help="score this saved classifier on real images instead of training one")
    flag = parser.add_argument_group("training").add_argument
    flag("--num_train_epochs", type=int, default=20, help="maximum number of passes over the training images")
    flag("--patience", type=int, default=5, help="epochs without improvement before stopping; 0 never stops early")
    flag("--train_batch_size", type=int, default=32, help="images per process and step")
    flag("--learning_rate", type=float, default=3e-4, help="peak rate, after warm-up over 5%% of the steps")
    flag("--weight_decay", type=float, default=1e-2, help="AdamW's weight decay; 0 turns it off")
    flag("--rotation", type=float, default=7.0, help="largest random rotation in degrees; 0 turns it off")
    flag("--translation", type=float, default=0.05, help="largest random shift, as a fraction of the side")
    flag("--scale", type=float, default=0.1, help="largest random change of size, as a fraction")
    flag("--brightness", type=float, default=0.1, help="largest random change of brightness, as a fraction")
    flag("--horizontal_flip", action="store_true", help="flip half of the training images")
    flag("--shuffle_labels", action="store_true", help="control: train on permuted labels; AUROC should be at chance")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast type (default: bf16 on a GPU, else no)")
    flag = parser.add_argument_group("runs and output").add_argument
    flag("--seed", type=int, default=0, help="seed of the first classifier's initial weights, order and augmentation")
    flag("--num_seeds", type=int, default=3, help="number of classifiers to train, with consecutive seeds")
    flag("--bootstrap_samples", type=int, default=1000, help="draws of patients for the 95%% intervals")
    flag("--reference", metavar="DIR", help="finished run with --train_on real; adds the ratio of AUROC above chance")
    flag("--output_dir", help="result folder (default: downstream/<train_on>_<name of --synthetic>)")

    args = parser.parse_args(argv)
    args.labels = args.labels and list(dict.fromkeys(args.labels))
    counts = ["num_train_images", "max_test_images", "source_resolution", "resolution", "num_train_epochs"]
    for name in [*counts, "train_batch_size", "num_seeds", "bootstrap_samples"]:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.classifier and (args.synthetic or args.labels or args.reference):
        parser.error("--classifier trains nothing; leave out --synthetic, --labels and --reference")
    if args.validation_csv and not (args.real_csv and args.test_csv):
        parser.error("--validation_csv needs --real_csv and --test_csv")
    if args.real_csv and args.dataset_name:
        parser.error("pass either --real_csv or --dataset_name")
    for name in ("synthetic", "real_csv", "validation_csv", "test_csv", "image_root"):
        if getattr(args, name) and not os.path.exists(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)}: not found")
    args.real_csv = args.real_csv or args.dataset_name or next(filter(os.path.isfile, DEFAULT_TABLES), None)
    if not args.real_csv and (not args.test_csv or args.train_on != "synthetic"):
        parser.error(f"found neither {' nor '.join(DEFAULT_TABLES)} in {Path.cwd()}; pass --real_csv FILE")
    name = f"{args.train_on}_{Path(args.synthetic).stem}" if args.synthetic else args.train_on
    if args.classifier:
        name = f"{Path(args.classifier).resolve().parent.name}_on_{Path(args.test_csv or args.real_csv).stem}"
    elif args.train_on != "real" and not args.synthetic:
        parser.error(f"--train_on {args.train_on} needs --synthetic FOLDER, a folder that sample.py wrote")
    elif args.train_on != "synthetic" and args.split not in (None, "test") and not args.test_csv:
        parser.error(f"--split {args.split}: these patients are trained on; leave it out or pass --test_csv")
    args.output_dir = args.output_dir or f"downstream/{name}"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.keyed_seed
def keyed_seed(*key):
    """Hash the key to a 63-bit seed. Since every draw is seeded this way, checkpoints need no random state."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


# Copied from train_full.read_csv
def read_csv(path):
    """Read a CSV, also .csv.gz, as strings. Return the table and its format in words."""
    data = Path(path).read_bytes()
    try:
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except Exception as error:  # a damaged file: OSError, EOFError or zlib.error
        fail(f"{path}: not a readable .gz file ({error})")
    for encoding in ("UTF-8-sig", "Windows-1252", "Latin-1"):
        with contextlib.suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            break
    header = re.sub('"[^"]*"', "", text.partition("\n")[0])  # quoted names may contain separators
    separator = max(",;\t|", key=header.count)
    options = {"dtype": str, "keep_default_na": False, "skipinitialspace": True, "index_col": False}
    try:
        with warnings.catch_warnings():
            # pandas only warns about a row longer than the header, and shifts or drops its cells.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            raw = pd.read_csv(io.StringIO(text), sep=separator, **options)
    except (ValueError, pd.errors.ParserWarning) as error:
        fail(f"{path}: not a readable CSV ({error})")
    return raw, f"{len(raw):,} rows, separated by {separator!r}, {encoding.removesuffix('-sig')}"


# Copied from train_full.match_columns
def match_columns(raw, labels, source):
    """Rename columns to labels and to COLUMNS, and convert labels to floats: 1, 0, -1, or NaN if not mentioned.

    Case, spaces and underscores in names are ignored. Return the table, and (heading, text) lines on its columns.
    """

    def plain(name):
        return re.sub(r"[\s_]", "", str(name)).lower()

    by_plain_name = {plain(name): name for name in reversed(raw.columns)}
    used = {}  # {column: standard name}
    for name, alternatives in (COLUMNS | dict.fromkeys(labels, ())).items():
        known = (name, *alternatives)
        candidates = [column if column in raw else by_plain_name.get(plain(column)) for column in known]
        if any(candidates):
            used[next(filter(None, candidates))] = name
    if not {*labels, "prompt"} & {*used.values()}:
        hint = f"expected prompt, text or any of {', '.join(labels)}; see --labels and launch/make_table.py"
        fail(f"{source}: no label or prompt column among {', '.join(map(str, raw.columns))}; {hint}")
    raw = raw.rename(columns=used).replace(BLANKS, "")

    def parse(column):
        return {text: LABEL_VALUES.get(text.strip().lower()) for text in raw[column].unique()}

    unused = []  # 0/1 columns that are not among the labels
    for name in raw.columns.drop([*used.values(), "index"], errors="ignore"):  # index: the row number from sample.py
        seen = {*parse(name).values()}
        if 1.0 in seen and len(seen) > 1 and None not in seen:
            unused.append(name)
    for label in [label for label in labels if label in raw]:
        values = parse(label)
        unknown = [text for text, value in values.items() if value is None]
        if unknown:
            row = int((raw[label] == unknown[0]).argmax())
            fail(f"{source}: row {row + 1}, column {label!r}: {unknown[0]!r} is not 1, 0, -1 or blank")
        raw[label] = raw[label].map(values).astype(float)
    texts = [name if name == column else f"{name} (from {column!r})" for column, name in used.items()]
    lines = [("columns", ", ".join(texts))]
    if unused:
        hint = "name them with --labels, or map them with launch/make_table.py"
        lines.append(("not used", f"0/1 columns {', '.join(unused)}; {hint}"))
    return raw, lines


# Copied from train_full.resolve_paths
def resolve_paths(names, csv, image_root):
    """Return absolute image paths, under the first root where one of the first 1,000 images exists.

    CheXpert's paths start with the dataset's folder, which resized copies often rename: try also without that part.
    """
    roots = [Path(image_root)] if image_root else [Path(csv).parent, Path(csv).resolve().parent.parent]
    roots = [str(root.absolute()) for root in roots]
    for root, skip in itertools.product(roots, (0, 1)):
        paths = [os.path.join(root, name.split("/", skip)[-1]) for name in names]
        if any(map(os.path.isfile, paths[:1000])):
            return paths
    fail(f"{csv}: none of its images exist under {' or '.join(roots)}, such as {names[0]}; see --image_root")


# Copied from train_full.make_table
def make_table(raw, names, images, lines):
    """Convert a table of `match_columns` to the image table that all scripts share.

    Its columns are `image` (what `open_image` takes), `name`, `patient`, `frontal`, `prompt` ("" if there is none),
    the labels, `split` if every row has one, and what the evaluations check and group by. `attrs["block"]` holds the
    lines to print about them. An image without a patient counts as a patient of its own.
    """
    table = pd.DataFrame({"image": images, "name": names})
    path = raw.get("Path", table["name"])
    patient = path.str.extract(r"(?:^|/)(patient\d+)(?=/)", expand=False)
    if "patient_id" in raw:
        patient = raw["patient_id"].where(raw["patient_id"] != "", patient)
    table["patient"] = patient.fillna(table["name"])
    if "Frontal/Lateral" in raw:
        view = raw["Frontal/Lateral"].str.strip()
        table["frontal"] = view.str.match(r"(?i)frontal|(?:pa|ap)(?![a-z])")
    else:
        table["frontal"] = ~path.str.contains("(?i)_lateral")
        guess = {True: "frontal, since there is no view column", False: "_lateral in the path, without a view column"}
        view = table["frontal"].map(guess)
    lines.append(("views", ", ".join(f"{count:,} {name!r}" for name, count in view.value_counts()[:5].items())))
    table["prompt"] = raw["prompt"].str.strip() if "prompt" in raw else ""
    if "split" in raw:
        split = raw["split"].str.extract(r"(?i)^\s*(train|val|test)", expand=False).str.lower()
        if split.notna().all():
            table["split"] = split
            lines.append(("split", f"of the table: {split.value_counts().to_dict()}"))
        else:
            lines.append(("split", "the column is not used, since not every row has train, val or test"))
    repeated = path.mask(path == "", table["name"]).duplicated().sum()
    if repeated:
        lines.append(("repeated", f"{repeated:,} rows list the image of another row"))
    others = ("index", "seed", "resolution", "resize_mode", "Sex", "Age", "AP/PA")
    # The only float columns are the labels, converted by match_columns.
    table = table.join(raw[[name for name in raw if raw[name].dtype == float or name in others]])
    table.attrs["block"] = lines
    return table


# Copied from train_full.load_image_table
def load_image_table(csv, image_root=None, with_images=True, labels=LABELS):
    """Read an image table: CheXpert's CSV, or one with a file_name column and label or prompt columns.

    Without `with_images`, paths are not looked up and may not exist.
    """
    raw, description = read_csv(csv)
    raw, lines = match_columns(raw, labels, csv)
    if "Path" not in raw:
        hint = "name it Path (CheXpert) or file_name (imagefolder), or convert the table with launch/make_table.py"
        fail(f"{csv}: no image column; {hint}")
    names = raw["Path"]
    if raw.empty:
        fail(f"{csv}: no rows below the header")
    if (names == "").any():
        fail(f"{csv}: row {int((names == '').argmax()) + 1} has no path")
    images = resolve_paths(names, csv, image_root) if with_images else names
    return make_table(raw, names, images, [("table", f"{csv}, {description}"), *lines])


# Copied from train_full.read_classes
def read_classes(raw, features):
    """Replace class codes by class names, in place, and add a 0/1 column for each class."""
    for column in [*raw]:
        feature = getattr(features[column], "feature", features[column])  # the elements' feature, if it is a list
        classes = getattr(feature, "names", None)
        if classes:
            codes = raw[column].map(lambda value: np.atleast_1d([] if value is None else value))
            rows = [[classes[int(code)] for code in row if code >= 0] for row in codes]
            raw[column] = [", ".join(row) for row in rows]
            for name in sorted({*classes} - {*raw, *LABEL_VALUES}):
                raw[name] = [str(int(name in row)) for row in rows]


# Copied from train_full.load_dataset_table
def load_dataset_table(name, image_column, caption_column, labels):
    """Return the image table of a Hugging Face dataset, whose images are (dataset, column, row), decoded on demand."""
    import datasets

    datasets.disable_progress_bars()
    try:
        parts = datasets.load_dataset(name)
        dataset = datasets.concatenate_datasets(list(parts.values()))
    except Exception as error:  # anything from connection errors to malformed files
        fail(f"--dataset_name {name}: cannot be loaded ({str(error)[:300]})")
    columns = dataset.column_names
    if not isinstance(dataset.features.get(image_column), datasets.Image):
        fail(f"--dataset_name {name}: no images in column {image_column!r}; pass --image_column, one of {columns}")
    if caption_column and caption_column not in columns:
        fail(f"--dataset_name {name}: no column {caption_column!r}; pass --caption_column, one of {columns}")
    raw = dataset.remove_columns(image_column).to_pandas()
    read_classes(raw, dataset.features)
    raw = raw.astype(object).where(raw.notna(), "").astype(str)
    if caption_column:
        raw["prompt"] = raw[caption_column]
    if len(parts) > 1 and "split" not in raw:
        raw["split"] = [split for split, part in parts.items() for _ in range(len(part))]
    dataset = dataset.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    if not {"Path", "file_name"} & {*raw}:
        _, paths = dataset.with_format("arrow")[:][image_column].flatten()  # without reading the images' bytes
        raw["file_name"] = [path or "" for path in paths.to_pylist()]
    images, names = [(dataset, image_column, row) for row in raw.index], [f"{name}[{row}]" for row in raw.index]
    raw, lines = match_columns(raw, labels, f"--dataset_name {name}")
    return make_table(raw, names, images, [("table", f"{name}, {len(raw):,} rows"), *lines])


# Copied from sample.known_labels
def known_labels(labels, default=LABELS):
    """Return the label columns to read or write: `default` if it includes all of `labels`, else `labels`."""
    return default if {*(labels or ())} <= {*default} else labels


def load_folder(folder):
    """Return the image table of a folder without one: a set of images without labels."""
    suffixes = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
    names = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes]
    names = pd.Series(sorted(name for name in names if not re.search(r"(^|/)\.", name)), dtype=str)
    if names.empty or (Path(folder) / "sampling.json").exists():
        fail(f"{folder}: no images, or not finished by sample.py; pass an image table or a folder of images")
    images = [os.path.join(os.path.abspath(folder), name) for name in names]
    return make_table(names.to_frame("Path"), names, images, [("table", f"{folder}, {len(names):,} images, no table")])


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path in the same folder, which is made, and rename it to `path` when the block is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # other processes may write the same file
    yield temporary
    os.replace(temporary, path)


def save_dataset_image(image, folder):
    """Return the path of a data set's image, written to a folder if it is not a file of its own."""
    dataset, column, row = image
    # An empty cell gets a path that does not exist, and is reported like any missing image.
    encoded = dataset[row][column] or {"bytes": None, "path": f"{folder}/no image in row {row}"}
    if not encoded["bytes"]:
        return encoded["path"]
    path = folder / hashlib.sha256(encoded["bytes"]).hexdigest()
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(encoded["bytes"])
    return str(path)


# Copied from eval_generation.table_path
def table_path(name):
    """Return the table in a folder written by sample.py, or the path itself."""
    path = Path(name) / "metadata.csv"
    return str(path if path.is_file() else name)


def load_table(source, image_root, labels, args=None):
    """Return the image table of a CSV, of a folder with or without metadata.csv, or of --dataset_name."""
    if args and source == args.dataset_name:
        table = load_dataset_table(source, args.image_column, None, labels)
        folder = Path(args.output_dir).parent / "dataset_images"
        return table.assign(image=[save_dataset_image(image, folder) for image in table["image"]])
    source = table_path(source)
    return load_folder(source) if os.path.isdir(source) else load_image_table(source, image_root, labels=labels)


def print_block(accelerator, table):
    """Print what a table's columns are used for, two captions if it has any, and the most frequent image sizes."""
    if accelerator.is_main_process:
        sizes = image_sizes(list(table["image"])).most_common(5)
        captions, lines = table["prompt"][table["prompt"] != ""].unique(), [*table.attrs["block"]]
        if len(captions):
            lines.append(("captions", f"{len(captions):,}, such as {', '.join(map(repr, captions[:2]))}"))
        lines.append(("sizes", ", ".join(f"{w}x{h} ({count:,})" for (w, h), count in sizes)))
        print("\n".join(f"{name:>9}  {text}" for name, text in lines), flush=True)


# Copied from train_full.split_of
def split_of(table, seed):
    """Return train, val or test per row: the table's own split, else one by a hash of (seed, patient).

    So a patient's split is the same in all scripts, whatever the other rows are.
    """
    if "split" in table:
        return table["split"]
    splits, bounds = {}, np.cumsum(list(SPLIT_FRACTIONS.values()))[:-1]
    for patient in table["patient"].unique():
        position = int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:8], "big") / 2**64
        splits[patient] = list(SPLIT_FRACTIONS)[np.searchsorted(bounds, position, "right")]
    return table["patient"].map(splits)


def patient_hash(patient):
    """Return 16 hexadecimal digits that stand for a patient in files that may be shared."""
    return hashlib.sha256(f"patient:{patient}".encode()).hexdigest()[:16]


def read_geometry(table, csv):
    """Return the distinct `resize_mode` (str) and `resolution` (int) that sample.py records, [] if unknown.

    Where no resolution is recorded, look at the images: it is their longer side.
    """
    recorded = table.get("resolution", pd.Series("", table.index)) != ""
    modes, sides = ([value for value in table.get(name, []) if value] for name in ("resize_mode", "resolution"))
    if set(modes) - {"squash", "pad", "crop"} or not all(side.isdecimal() and int(side) for side in sides):
        fail(f"{csv}: the column resize_mode or resolution has values that sample.py does not write")
    sides += sorted(map(max, image_sizes(list(table["image"][~recorded]))), reverse=True)
    return {"resize_mode": list(dict.fromkeys(modes)), "resolution": list(dict.fromkeys(map(int, sides)))}


def subset(table, count, seed):
    return table.sample(n=count, random_state=seed % 2**32) if count < len(table) else table


def split_pool(table, seed, has_test):
    """Split by patient into (training, validation) rows; without `has_test`, also train on the split's test part."""
    # Without test images, a table may already be one part of the split by `seed`, so use another seed.
    parts = split_of(table, seed if has_test else seed + 1)
    return table[parts == "train" if has_test else parts != "val"], table[parts == "val"]


def draw_rows(args, tables, synthetic_csv, left_out):
    """Draw training and validation rows: as many as the smaller table has, whatever --train_on is."""
    pools = {}
    if synthetic_csv:
        pools["synthetic"] = split_pool(tables[synthetic_csv], args.split_seed, has_test=False)
    if args.validation_csv:
        pools["real"] = tables[args.real_csv], tables[args.validation_csv]
    elif args.real_csv and (args.test_csv or args.split in (None, "test")):
        pools["real"] = split_pool(tables[args.real_csv], args.split_seed, has_test=not args.test_csv)
    result = []
    for i, part in enumerate(("training", "validation")):
        rows = {kind: pool[i] for kind, pool in pools.items()}
        total = min(map(len, rows.values()))
        if part == "training" and args.num_train_images:
            total = args.num_train_images
        shares, drawn = {args.train_on: total}, []
        if args.train_on == "both":
            shares = {"synthetic": total - total // 2, "real": total // 2}
        for kind, share in shares.items():
            if not 1 <= share <= len(rows[kind]):
                sizes = ", ".join(f"{len(table):,} {name}" for name, table in rows.items())
                hint = "pass a larger table or a smaller --num_train_images; a split column needs train and val"
                fail(f"too few images for {part}: {sizes}; {hint}")
            left_out[f"{kind} images beyond the {share:,} used for {part}"] = len(rows[kind]) - share
            drawn.append(subset(rows[kind], share, args.split_seed).assign(real=kind == "real"))
        result.append(pd.concat(drawn, ignore_index=True))
    return result


# Copied from eval_generation.merge_duplicates
def merge_duplicates(table, column):
    """Keep the first row of each value of a column. Its labels are positive, or else uncertain, if any row's are."""
    ranks = table.select_dtypes(float).replace(-1.0, 0.5)
    merged = table.assign(**ranks.groupby(table[column], sort=False).transform("max").replace(0.5, -1.0))
    return merged[~table[column].duplicated()].reset_index(drop=True)


def common_geometry(args, spec, synthetic_csv, tables):
    """Return pixels per side and resize mode; fail if they differ, unless --mixed_geometry."""
    recorded = {"resize_mode": [], "resolution": []}
    if synthetic_csv:
        recorded = read_geometry(tables[synthetic_csv], synthetic_csv)
    if spec:
        recorded = {"resize_mode": [spec["resize_mode"]], "resolution": [spec["source_resolution"]]}
    modes = list(dict.fromkeys(filter(None, [args.resize_mode, *recorded["resize_mode"]])))
    if len(modes) > 1 and not args.mixed_geometry:
        fail(f"images made with --resize_mode {' and '.join(modes)}; pass --mixed_geometry to compare them")
    sides = {*recorded["resolution"], args.source_resolution} - {None}
    if len(sides) > 1 and not args.mixed_geometry:
        sizes = ", ".join(map(str, sorted(sides)[:5]))
        fail(f"images of different sizes ({sizes} px), which a classifier may learn; allow it with --mixed_geometry")
    return args.source_resolution or max(recorded["resolution"], default=512), modes[0] if modes else "squash"


def load_tables(args, spec, accelerator):
    """Load the tables, split real images by patient and draw training rows; `spec` is --classifier's JSON, or {}."""
    synthetic_csv, test_csv = args.synthetic and table_path(args.synthetic), args.test_csv or args.real_csv
    known = known_labels(spec.get("labels") or args.labels)
    left_out, notes, tables = Counter(), [], {}
    for csv in dict.fromkeys(filter(None, (synthetic_csv, args.real_csv, args.validation_csv, test_csv))):
        table = load_table(csv, None if csv == synthetic_csv else args.image_root, known, args)
        print_block(accelerator, table)
        left_out["not frontal"] += int((~table["frontal"]).sum())
        frontal = table[table["frontal"]]
        table = merge_duplicates(frontal, "image")
        left_out["repeated"] += len(frontal) - len(table)
        if csv != synthetic_csv or args.on_bad_image == "skip":
            table = table.assign(hash=table["image"].map(scan_images(accelerator, list(table["image"]), args)))
            left_out["unreadable"] += int(table["hash"].isna().sum())
            table = table[table["hash"].notna()]
        # Equal synthetic images stay: they are what the model offers a classifier.
        if csv != synthetic_csv:
            same = int(table["hash"].duplicated().sum())
            left_out["identical to another image"] += same
            notes += [f"{csv}: {same:,} images are identical to another one; each counts once"] if same else []
            table = merge_duplicates(table, "hash")
        tables[csv] = table
    columns = [label for label in known if all(label in table for table in tables.values())]
    labels = args.labels or [label for label in spec.get("labels", CONDITIONS) if label in columns]
    if not labels or set(labels) - set(columns):
        hint = "pass --labels" if columns else "a folder of images without a table has none, and cannot be used here"
        fail(f"labels that {' and '.join(tables)} have in common: {', '.join(columns) or 'none'}; {hint}")
    if set(spec.get("labels", labels)) - set(labels):
        notes.append(f"{test_csv} has no {', '.join(set(spec['labels']) - set(labels))}: not scored")
    geometry = common_geometry(args, spec, synthetic_csv, tables)

    test, split = tables[test_csv], args.split or ("all" if args.test_csv else "test")
    test = test if split == "all" else test[split_of(test, args.split_seed) == split]
    if test.empty:
        fail(f"{test_csv}: no images to test on in split {split}; see --split and --split_seed")
    train, val = (test[:0], test[:0]) if spec else draw_rows(args, tables, synthetic_csv, left_out)
    if (test["patient"] == test["name"]).any():
        notes.append("some real images have no patient (patient_id or patientNNNNN in the path): split by image")
    seen = spec["split"]["patients"] if spec else map(patient_hash, [*train["patient"], *val["patient"]])
    shared = len({*seen} & {*map(patient_hash, test["patient"])})
    if shared:
        notes.append(f"{shared:,} patients are in both training and test, so the scores are optimistic")
    if args.num_seeds == 1 and not spec:
        notes.append("one classifier (--num_seeds 1), so the intervals leave out how trainings vary")
    test = subset(test, args.max_test_images or len(test), args.split_seed)
    counts = {"train": len(train), "validation": len(val), "test": len(test)}
    counts |= {"test_patients": test["patient"].nunique(), "patients_in_training_and_test": shared}
    accelerator.print(f"{'images':>9}  {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    named = [f"{count:,} {reason}" for reason, count in left_out.items() if count]
    accelerator.print(f"{'left out':>9}  {', '.join(named) or 'nothing'}")
    for note in notes:
        accelerator.print(f"{'warning':>9}  {note}", flush=True)
    return Tables(train, val, test, labels, geometry, counts | {"left_out": left_out}, notes)


def read_groups(test):
    """Return {"Sex: Female": which rows of `test`, (n,) bool} from CheXpert's columns Sex, Age and AP/PA, if any."""
    columns = ["Sex", "Age", "AP/PA"]
    table = test.reindex(columns=columns).replace(["", "Unknown"], np.nan)
    years, ages = pd.to_numeric(table["Age"], errors="coerce"), ["0-17", "18-39", "40-59", "60-79", "80+"]
    table["Age"] = pd.cut(years, [0, 18, 40, 60, 80, math.inf], right=False, labels=ages).astype(object)
    groups = pd.get_dummies(table, prefix_sep=": ", columns=columns, dtype=bool)
    return {name: inside.to_numpy() for name, inside in groups.items()}


# Copied from train_full.open_image
def open_image(image):
    """Open an image, without decoding it: a path, or (dataset, column, row) for a row of a Hugging Face dataset."""
    file = image
    if isinstance(image, tuple):
        dataset, column, row = image
        encoded = dataset[row][column]
        if encoded is None:
            raise ValueError("the cell is empty")
        file = io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]
    try:
        return Image.open(file, formats=["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
    except UnidentifiedImageError as error:
        if isinstance(file, str) and (file.endswith(".dcm") or Path(file).read_bytes()[128:132] == b"DICM"):
            raise ValueError("a DICOM file; convert it with launch/make_table.py --source dicom") from error
        raise


# Copied from train_full.image_sizes
def image_sizes(images):
    """Count the sizes of up to 1,000 evenly spaced images, as {(width, height): count}."""

    def size(image):
        with contextlib.suppress(Exception), open_image(image) as opened:  # unreadable images are reported later
            return opened.size

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return Counter(filter(None, pool.map(size, images[:: len(images) // 1000 + 1])))


# Copied from train_full.load_image
def load_image(image, resolution, resize_mode):
    """Decode an image (see `open_image`) to (resolution, resolution, 3) uint8. Raise ValueError if it is unusable."""
    try:
        with open_image(image) as opened:
            bits = max(getattr(opened, "tag_v2", {}).get(258, [8]))  # TIFF's BitsPerSample
            # Pillow silently clips deeper images or drops their low bits. Gray ones have mode I or F; deep colors show
            # only in TIFF's BitsPerSample or in the raw mode of the tiles, such as RGB;16B.
            if opened.mode[0] in "IF" or bits > 8 or ";16" in str(opened.tile):
                raise ValueError("more than 8 bits per channel; convert it to 8 bits with launch/make_table.py")
            if getattr(opened, "n_frames", 1) > 1:
                raise ValueError("more than one frame")
            picture = ImageOps.exif_transpose(opened)
            # A gray picture stays one channel until it is resized: the same pixels, in a third of the time.
            picture = picture if picture.mode == "L" else picture.convert("RGB")
    except Exception as error:  # Pillow can raise anything on a malformed file
        name = image if isinstance(image, str) else f"row {image[2]}"
        raise ValueError(f"{name}: {'no such file' if isinstance(error, FileNotFoundError) else error}") from error
    resize = {"squash": Image.Image.resize, "pad": ImageOps.pad, "crop": ImageOps.fit}[resize_mode]
    return np.asarray(resize(picture, (resolution, resolution), Image.Resampling.LANCZOS).convert("RGB"))


def to_gray(rgb):
    """Return the mean over channels, to the nearest integer, as a picture: a tint is then no cue."""
    red, green, blue = np.moveaxis(rgb, 2, 0).astype(np.uint16, order="C")
    return Image.fromarray(((red + green + blue + 1) // 3).astype(np.uint8))


def decode_images(images, decode, problems, description="decoding images"):
    """Yield (i, decode(images[i])) in order, using all cores and working up to 64 images ahead of the caller.

    If `decode` raises ValueError, skip the image and set problems[i] to the message.
    """

    def attempt(i):
        try:
            return decode(images[i])
        except ValueError as error:
            problems[i] = str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = deque(pool.submit(attempt, i) for i in range(min(64, len(images))))
        for i in tqdm(range(len(images)), description, unit="image", leave=False):
            decoded = ahead.popleft().result()
            if i + 64 < len(images):
                ahead.append(pool.submit(attempt, i + 64))
            if i not in problems:
                yield i, decoded


def cache_path(args, images, *geometry):
    """Return a cache file's path, without suffix, from the geometry and each image's path, size and time."""
    digest = hashlib.sha256("/".join(map(str, geometry)).encode())
    for image in images:
        stat = os.stat(image) if os.path.isfile(image) else None
        digest.update(f"{image}/{stat and stat.st_size}/{stat and stat.st_mtime_ns}".encode())
    folder = Path(args.image_cache_dir or Path(args.output_dir).parent / "image_cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / digest.hexdigest()[:32]


def scan_images(accelerator, images, args):
    """Return {image: SHA-256 of its file}; with --on_bad_image skip, without the images that cannot be decoded.

    All images are scanned, before rows are drawn, so that runs on synthetic and on real images train on equally many.
    """

    def scan(image):
        if args.on_bad_image == "skip":
            load_image(image, 8, "squash")
        # A missing file is reported later.
        return hashlib.sha256(Path(image).read_bytes() if os.path.isfile(image) else image.encode()).hexdigest()

    path, problems = cache_path(args, images, "scan", args.on_bad_image).with_suffix(".json"), {}
    if accelerator.is_main_process and not path.exists():
        hashes = {images[i]: value for i, value in decode_images(images, scan, problems, "checking images")}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"hashes": hashes, "problems": [*problems.values()]}))
    accelerator.wait_for_everyone()
    found = json.loads(path.read_text(encoding="utf-8"))
    for problem in found["problems"][:20]:
        accelerator.print(f"{'left out':>9}  {problem}")
    return found["hashes"]


def label_targets(table, labels, uncertain):
    """Return (n, len(labels)) float32: 1 positive, 0 negative or not mentioned, NaN masked."""
    minus_one = {"ones": 1.0, "zeros": 0.0, "ignore": math.nan}[uncertain]
    return table.reindex(columns=labels).fillna(0.0).replace(-1.0, minus_one).to_numpy(np.float32, copy=True)


def load_images(accelerator, tables, resolution, args):
    """Return training, validation and test images, decoded once by the main process and memory-mapped."""

    def decode(image):
        gray = to_gray(load_image(image, *tables.geometry))
        return np.asarray(gray.resize((resolution, resolution), Image.Resampling.LANCZOS))

    parts, bad = [], {}  # report the bad images of all parts together
    for table in (tables.train, tables.val, tables.test):
        images, problems = list(table["image"]), {}
        path = cache_path(args, images, *tables.geometry, resolution).with_suffix(".npy")
        if accelerator.is_main_process and not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(images), resolution, resolution))
            for i, gray in decode_images(images, decode, problems):
                pixels[i] = gray
            pixels.flush()
            if problems:
                temporary.unlink()
                bad |= {images[i]: problem for i, problem in problems.items()}
            else:
                os.replace(temporary, path)
        parts.append((path, label_targets(table, tables.labels, args.uncertain)))
    if bad:
        listed = "; ".join(list(bad.values())[:20])
        fail(f"{len(bad):,} images cannot be used: {listed}; repair them or pass --on_bad_image skip")
    accelerator.wait_for_everyone()
    return [Images(np.load(path, mmap_mode="r"), targets) for path, targets in parts]


def augment(images, draws, args):
    """Rotate, shift, scale, brighten and flip (b, 1, h, w) in [0, 1] by `draws`, (b, 6) uniform in [-1, 1]."""
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
    """Load --weights into all layers but the last, which stays random."""
    if args.weights == "none":
        return
    head = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    try:
        with accelerator.local_main_process_first():  # which downloads them
            imagenet = args.weights == "imagenet"
            saved = get_model(args.arch, weights="DEFAULT").state_dict() if imagenet else load_file(args.weights)
        # A plain dict has no version, so PyTorch accepts old files without BatchNorm's num_batches_tracked.
        saved = dict(saved) | {k: v for k, v in model.state_dict().items() if k.startswith(f"{head}.")}
        model.load_state_dict(saved)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        fail(f"--weights {args.weights}: cannot be loaded into {args.arch} ({str(error)[:300]}); pass a file, or none")


def load_classifier(folder):
    """Return a classifier that eval_downstream.py saved, on the CPU in evaluation mode, and its classifier.json."""
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
def predict(accelerator, model, pixels, normalisation):
    """Return float32 logits, (n, labels); each process computes a part of them."""
    model.eval()
    mine, parts = np.arange(accelerator.process_index, len(pixels), accelerator.num_processes), []
    for start in range(0, len(mine), 64):
        rows = mine[start : start + 64]
        gray = torch.from_numpy(pixels[rows]).to(accelerator.device)[:, None].float() / 255
        parts.append((rows, model(classifier_inputs(gray, normalisation)).cpu().numpy()))
    rows, logits = map(np.concatenate, zip(*gather_object(parts)))
    return logits[np.argsort(rows)]


def learning_rate(peak, step, total_steps):
    """Return the rate at a step: linear warm-up over 5% of the steps, then cosine to 0 (arXiv 1608.03983, eq. 5)."""
    warmup = max(1, total_steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def train_epoch(args, accelerator, model, optimizer, data, seed, epoch):
    """Train for one epoch in an order that depends only on (seed, epoch); drop the last partial batch."""
    model.train()
    batch = args.train_batch_size * accelerator.num_processes
    steps = max(1, len(data.pixels) // batch)
    generator = torch.Generator().manual_seed(keyed_seed(seed, "epoch", epoch))
    order = torch.randperm(len(data.pixels), generator=generator)
    order = order.repeat(math.ceil(batch / len(order)))  # repeats only if there are too few images for a batch
    first = accelerator.process_index * args.train_batch_size
    mine = slice(first, first + args.train_batch_size)
    description = f"seed {seed}, epoch {epoch + 1} of {args.num_train_epochs}"
    for step in tqdm(range(steps), description, leave=False, disable=not accelerator.is_main_process):
        # Draw for all processes and take this one's part, so that the draws do not depend on the number of processes.
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


def train_seed(args, accelerator, seed, images):
    """Train one classifier, unless it is finished, and save the weights of the epoch with the lowest validation loss.

    Return the logits on the test images, (n, labels), and the validation loss of each epoch.
    """
    train, val, test = images
    folder = Path(args.output_dir) / "seeds" / f"seed-{seed}"
    done = folder / "predictions.safetensors"
    if broadcast_object_list([done.exists()])[0]:
        tensors = load_file(done)
        return tensors["test"].numpy(), tensors["losses"].tolist()
    if args.shuffle_labels:
        key = keyed_seed(seed, "shuffled labels")
        train, val = (
            part._replace(targets=np.random.default_rng(key).permutation(part.targets)) for part in (train, val)
        )
    torch.manual_seed(keyed_seed(seed, "initial weights"))
    model = build_classifier(args.arch, train.targets.shape[1])
    load_initial_weights(accelerator, model, args)
    fused = accelerator.device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay, fused=fused)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    # Validate and test in float32 with another model, since accelerate runs a prepared one in --mixed_precision.
    scorer = build_classifier(args.arch, train.targets.shape[1]).to(accelerator.device)
    if accelerator.scaler:
        # Reset the loss scale, which the previous seed has changed.
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    best, losses = {}, []
    for epoch in range(args.num_train_epochs):
        # Dropout and stochastic depth draw from the global generator.
        torch.manual_seed(keyed_seed(seed, "dropout", epoch, accelerator.process_index))
        train_epoch(args, accelerator, wrapped, optimizer, train, seed, epoch)
        for buffer in model.buffers():
            # Each process has the batch statistics of its own images; use the main process's.
            buffer.copy_(broadcast(buffer))
        scorer.load_state_dict(model.state_dict())
        logits = torch.from_numpy(predict(accelerator, scorer, val.pixels, NORMALISATION))
        losses.append(float(masked_bce(logits, torch.from_numpy(val.targets))))
        if not math.isfinite(losses[-1]):
            fail(f"seed {seed} diverged in epoch {epoch + 1}; lower --learning_rate or pass --mixed_precision no")
        accelerator.print(f"seed {seed}, epoch {epoch + 1}: validation loss {losses[-1]:.4f}")
        if losses[-1] == min(losses):
            best = {k: v.cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
        if args.patience and epoch - int(np.argmin(losses)) >= args.patience:
            break
    scorer.load_state_dict(best)
    logits = predict(accelerator, scorer, test.pixels, NORMALISATION)
    if accelerator.is_main_process:
        tensors = {"test": torch.from_numpy(logits), "losses": torch.tensor(losses, dtype=torch.float64)}
        with replacing(done) as temporary:  # renamed last, since it marks the classifier as trained
            save_file(best, folder / "model.safetensors")
            save_file(tensors, temporary)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return logits, losses


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and results
# ---------------------------------------------------------------------------------------------------------------------


def weighted_metrics(target, probability, weights):
    """Return METRICS of one label, (draws,) each; `weights`, (draws, n), say how often each image counts.

    Equal to scikit-learn's with sample_weight, for all draws at once; NaN if undefined.
    """
    # In descending order, summed over images of equal probability, so that ties count half in AUROC.
    order = np.argsort(-probability, kind="stable")
    positive, predicted, weights = target[order] == 1, probability[order] >= 0.5, weights.take(order, axis=1)
    starts = np.flatnonzero(np.diff(-probability[order], prepend=-2.0))
    positive_by_score = np.add.reduceat(weights * positive, starts, axis=1)
    negative_by_score = np.add.reduceat(weights * ~positive, starts, axis=1)
    indicators = np.stack([np.ones_like(positive), positive, predicted, predicted & positive], axis=1)
    total, positives, predictions, hits = (weights @ indicators).T
    negatives, correct_negatives = total - positives, total - positives - predictions + hits
    true_positives, false_positives = positive_by_score.cumsum(axis=1), negative_by_score.cumsum(axis=1)
    negatives_below = negatives[:, None] - false_positives + negative_by_score / 2  # ties count half
    with np.errstate(invalid="ignore", divide="ignore"):
        nan_if_one_class = np.where(positives * negatives > 0, 1.0, np.nan)
        accuracy, constant = (hits + correct_negatives) / total, np.maximum(positives, negatives) / total
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        return {
            "accuracy": accuracy,
            "constant_accuracy": constant,
            "accuracy_gain": accuracy - constant,
            "predicted_positive_rate": predictions / total,
            "balanced_accuracy": (hits / positives + correct_negatives / negatives) / 2,
            "auroc": (positive_by_score * negatives_below).sum(axis=1) / (positives * negatives),
            "auprc": nan_if_one_class * (positive_by_score * precision).sum(axis=1) / positives,
            "f1": nan_if_one_class * 2 * hits / (predictions + positives),
        }


def patient_weights(patients, draws):
    """Return how often each image counts in each draw, (len(draws), n); draw 0 is the test set itself.

    Draw k > 0 takes as many patients with replacement (cluster bootstrap, Field and Welsh 2007). It is seeded by k
    alone, so that all runs on the same test images draw the same patients.
    """
    names, index = np.unique(patients, return_inverse=True)
    weights = np.ones((len(draws), len(names)))
    for row, k in zip(weights, draws):
        if k > 0:
            chosen = np.random.default_rng(keyed_seed("bootstrap", k)).integers(len(names), size=len(names))
            row[:] = np.bincount(chosen, minlength=len(names))
    return weights[:, index]


def score(targets, patients, probabilities, num_draws):
    """Return METRICS by name, (labels, seeds, 1 + draws): first the value, then the draws.

    `targets` are (n, labels), `probabilities` one (n, labels) array per seed. Labels with one class are NaN.
    """
    size = 1 + num_draws
    figures = {name: np.full((targets.shape[1], len(probabilities), size), np.nan) for name in METRICS}
    for start in range(0, size, 50):  # all draws at once would not fit in memory
        draws = range(start, min(start + 50, size))
        weights = patient_weights(patients, draws)
        for label, column in enumerate(targets.T):
            known = ~np.isnan(column)  # not masked
            target, known_weights = column[known].astype(np.float64), weights[:, known]
            if len(np.unique(target)) < 2:
                continue
            for seed, probability in enumerate(probabilities):
                for name, values in weighted_metrics(target, probability[known, label], known_weights).items():
                    figures[name][label, seed, draws.start : draws.stop] = values
    return figures


def clear_untrained(figures, targets):
    """Set all figures but RATES to NaN for labels with only one class in the training images."""
    untrained = [len(column) > 0 and len(np.unique(column[~np.isnan(column)])) < 2 for column in targets.T]
    for name in figures.keys() - RATES:
        figures[name][untrained] = np.nan


def training_noise(num_seeds, num_draws, seed):
    """Return `noise`, (seeds, draws): (values - mean over seeds) @ noise are random errors of the mean over seeds.

    They follow Student's t with num_seeds - 1 degrees of freedom, since resampling so few seeds would give too narrow
    an interval. Small values of its chi-square variable are raised to the 10% quantile, because the report takes the
    standard deviation of the draws, and t's is infinite for three seeds. Intervals of one run and of a difference then
    cover 96 to 98%. All metrics of a run share the noise, which keeps the correlation between labels.
    """
    generator, degrees = np.random.default_rng(seed), max(num_seeds - 1, 1)
    normal = generator.standard_normal((num_seeds, num_draws))
    chisquare = np.maximum(generator.chisquare(degrees, num_draws), stats.chi2.ppf(0.1, degrees))
    return normal / np.sqrt(num_seeds * chisquare)


# Copied from train_full.result_row
def result_row(metric, value, label="all", low=None, high=None, n=None, floor=None, note=None):
    """Return one row of the format that all result files share.

    low and high are the 95% interval; floor is the score of real images, or of a trivial predictor.
    """
    return dict(metric=metric, label=label, value=value, low=low, high=high, n=n, floor=floor, note=note)


def interval(draws, minimum=0.0, maximum=1.0):
    """Return the 95% percentile interval of the draws that are defined, clipped to bounds, or [None, None]."""
    defined = draws[~np.isnan(draws)]
    return np.percentile(defined, [2.5, 97.5]).clip(minimum, maximum).tolist() if len(defined) else [None, None]


def verdict(metric, low, rates):
    """Return the warning for a metric, or None; `rates` are predicted-positive rates, (labels, seeds)."""
    if low is None:
        return "no interval: undefined in all draws"
    if metric.startswith("auroc") and low <= 0.5:
        return "not shown to beat chance"
    if metric == "accuracy_gain" and low <= 0:
        return "not shown to beat the constant predictor"
    constant = (rates < CONSTANT_RATE) | (rates > 1 - CONSTANT_RATE)
    if metric in ("accuracy", "predicted_positive_rate") and constant.any():
        if len(rates) == 1:
            return "CONSTANT" if constant.all() else f"constant in {constant.sum()} of {constant.size} seeds"
        count = constant.all(axis=1).sum()
        return f"CONSTANT in {count} of {len(rates)} labels" if count else None
    return None


def result_rows(labels, groups, figures, noise, targets):
    """Return rows by label, "all" (the mean over labels) and group, and {"metric/label": the value, then the draws}.

    A draw is the mean over seeds on the drawn patients, plus a random error of that mean from `noise`.
    """
    rows, draws = [], {}
    rates, constant = (figures[name][..., 0] for name in ("predicted_positive_rate", "constant_accuracy"))
    known = (~np.isnan(targets)).sum(axis=0)
    counts = dict(zip(labels, known.tolist())) | {"all": len(targets)}
    prevalence, half = np.nansum(targets, axis=0, dtype=np.float64) / known.clip(1), np.full(len(labels), 0.5)
    # The scores of trivial predictors: always the majority class, chance, always positive.
    floors = {"accuracy": constant.mean(axis=1), "accuracy_gain": 0 * half, "balanced_accuracy": half, "auroc": half}
    floors |= {"auroc_by_group": half, "auprc": prevalence, "f1": 2 * prevalence / (1 + prevalence)}
    parts = [(metric, label, figures[metric], counts[label]) for metric, label in itertools.product(METRICS, counts)]
    parts += [("auroc_by_group", group, figures[group], int(inside.sum())) for group, inside in groups.items()]
    for metric, label, figure, n in parts:
        values, over_seeds = figure[..., 0], figure.mean(axis=1)
        over_seeds[:, 1:] += (values - over_seeds[:, :1]) @ noise
        defined = np.flatnonzero(~np.isnan(values).any(axis=1))
        chosen = [i for i in defined if label not in labels or labels[i] == label]
        if not chosen:
            note = "n/a: one class only among the training or test images"
            rows.append(result_row(metric, None, label, n=n, note=note))
            continue
        found = draws[f"{metric}/{label}"] = over_seeds[chosen].mean(axis=0)
        low, high = interval(found[1:], -1 if metric == "accuracy_gain" else 0)
        notes = [verdict(metric, low, rates[chosen])]
        if label in groups or (label == "all" and len(chosen) < len(labels)):
            notes.append(f"mean of {len(chosen)} of {len(labels)} labels")
        floor = float(floors[metric][chosen].mean()) if metric in floors else None
        note = "; ".join(filter(None, notes)) or None
        rows.append(result_row(metric, float(found[0]), label, low, high, n, floor, note))
    return rows, draws


def load_reference(args, settings):
    """Return the values and draws of --reference like result_rows; fail if more than its training images differs."""
    path = Path(args.reference) / "downstream_metrics.json"
    if not path.is_file():
        fail(f"--reference {args.reference}: no finished run; pass the folder of one with --train_on real")
    found = json.loads(path.read_text(encoding="utf-8"))
    draws = load_file(path.with_name("downstream_draws.safetensors"))
    # The digest `test` compares the images themselves.
    may_differ = ("training", "seed", "mixed_geometry", "on_bad_image", "split")
    theirs = found["settings"] | {"bootstrap_samples": found["arguments"]["bootstrap_samples"]}
    ours = settings | {"train_on": "real", "bootstrap_samples": args.bootstrap_samples}
    differing = [key for key in ours if key not in may_differ and theirs.get(key) != ours[key]]
    if differing:
        fail(f"--reference {args.reference}: not a run with --train_on real and the same {', '.join(differing)}")
    values = {f"{row['metric']}/{row['label']}": row["value"] for row in found["results"]}
    return {name: np.append(values[name], tensor.numpy()) for name, tensor in draws.items()}


def add_ratio(rows, draws, labels, reference, name):
    """Add the ratio of AUROC above chance to that of `reference`; in each draw, both are on the same patients."""
    both = [label for label in labels if f"auroc/{label}" in draws.keys() & reference.keys()]
    for label in [*labels, "all"]:
        chosen = [other for other in both if label in (other, "all")]
        value, low, high, note = None, None, None, f"n/a: this run or {name} lacks the figure"
        if chosen:
            one, two = (np.mean([run[f"auroc/{c}"] for c in chosen], axis=0) - 0.5 for run in (draws, reference))
            note = f"n/a: the AUROC of {name} is not shown to be above 0.5"
            # If the denominator may be 0, the ratio has no finite interval.
            if (interval(two[1:])[0] or 0) > 0:
                ratio = draws[f"auroc_of_reference/{label}"] = one / np.maximum(two, 1e-12)
                value, (low, high) = float(ratio[0]), interval(ratio[1:], -np.inf, np.inf)
                note = f"ratio to {name}, after subtracting 0.5 from both"
        rows.append(result_row("auroc_of_reference", value, label, low, high, note=note))


def plot_roc(labels, targets, probabilities, path):
    """Plot ROC curves, with a panel per label and a line per seed, whose AUROC is in the legend."""
    rows, columns = math.ceil(len(labels) / 3), min(3, len(labels))
    figure = Figure(figsize=(3.6 * columns, 3.7 * rows), layout="constrained")
    for i, label in enumerate(labels):
        axis = figure.add_subplot(rows, columns, i + 1, title=label, aspect="equal")
        axis.set(xlabel="false positive rate", ylabel="true positive rate")
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
        known = ~np.isnan(targets[:, i])
        if len(np.unique(targets[known, i])) == 2:
            for probability in probabilities:
                target, predicted = targets[known, i], probability[known, i]
                axis.plot(*roc_curve(target, predicted)[:2], label=f"AUROC {roc_auc_score(target, predicted):.3f}")
            axis.legend(loc="lower right", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def save_classifier(settings, tables, rows, weights, output_dir):
    """Write weights and classifier.json to classifier/, which both evaluation scripts take as --classifier."""
    # Only real images have patients.
    seen = pd.concat([table[table["real"]] for table in (tables.train, tables.val)])["patient"]
    patients = sorted({patient_hash(patient) for patient in seen})
    fingerprint = hashlib.sha256("\n".join(patients).encode()).hexdigest()
    keys = ("labels", "arch", "resolution", "source_resolution", "resize_mode", "train_on", "uncertain")
    spec = {"script": "eval_downstream.py"} | {key: settings[key] for key in keys}
    spec |= {"channels": "mean, repeated three times", "normalisation": NORMALISATION}
    spec["thresholds"] = dict.fromkeys(tables.labels, 0.5)
    spec["split"] = {"seed": settings["split_seed"], "fingerprint": fingerprint, "patients": patients}
    aurocs = {row["label"]: row for row in rows if row["metric"] == "auroc"}
    spec["real_test_auroc"] = {label: aurocs[label] for label in tables.labels}
    spec["model_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    folder = output_dir / "classifier"
    with replacing(folder / "model.safetensors") as temporary:
        shutil.copy(weights, temporary)
    with replacing(folder / "classifier.json") as temporary:  # last, because load_classifier needs it
        temporary.write_text(json.dumps(spec, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def digest(*arrays):
    """Return a SHA-256 over the content of arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update("\n".join(map(str, array)).encode() if array.dtype == object else np.ascontiguousarray(array).data)
    return sha.hexdigest()


def run_settings(args, tables, spec, images, num_processes):
    """Return what must match to continue a run and, apart from the training images, to compare two runs."""
    train, val, test = images
    # These may differ; the digests below compare the images themselves.
    not_compared = (
        "synthetic real_csv validation_csv test_csv image_root dataset_name image_column image_cache_dir classifier "
        "reference bootstrap_samples max_test_images output_dir"
    )
    settings = {key: value for key, value in vars(args).items() if key not in not_compared.split()}
    settings["source_resolution"], settings["resize_mode"] = tables.geometry
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
    """Create the result folder and its settings.json; fail if it holds results of other settings or other files."""
    path = output_dir / "settings.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings.keys() | saved.keys() if settings.get(key) != saved.get(key)]
        if differing:
            fail(f"{output_dir} holds results of different {', '.join(sorted(differing))}; pass another --output_dir")
    elif output_dir.exists() and any(output_dir.iterdir()):
        fail(f"--output_dir {output_dir}: not empty and not a result folder of this script; pass another")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def save_results(args, tables, spec, images, results, settings, reference):
    """Score `results`, (logits, validation losses) of each classifier, and write all files, the metrics last."""
    output_dir, labels, (train, _, test) = Path(args.output_dir), tables.labels, images
    names, patients = (tables.test[key].to_numpy(object) for key in ("name", "patient"))
    probabilities = [torch.from_numpy(logits).double().sigmoid().numpy() for logits, _ in results]
    figures = score(test.targets, patients, probabilities, args.bootstrap_samples)
    groups = read_groups(tables.test)
    for name, inside in groups.items():
        # Mask the other images, so that each draw is of the same patients as above.
        masked = np.where(inside[:, None], test.targets, np.nan)
        figures[name] = score(masked, patients, probabilities, args.bootstrap_samples)["auroc"]
    clear_untrained(figures, train.targets)
    # Seeded by the settings, so that the noise of two runs is independent.
    noise = training_noise(len(results), args.bootstrap_samples, keyed_seed(json.dumps(settings, sort_keys=True)))
    rows, draws = result_rows(labels, groups, figures, noise, test.targets)
    if not spec and not args.shuffle_labels:
        best = int(np.argmin([min(losses) for _, losses in results]))
        best_figures = {name: values[:, best : best + 1] for name, values in figures.items()}
        best_rows, _ = result_rows(labels, {}, best_figures, noise[:1], test.targets)
        weights = output_dir / "seeds" / f"seed-{args.seed + best}" / "model.safetensors"
        save_classifier(settings, tables, best_rows, weights, output_dir)
    if reference:
        add_ratio(rows, draws, labels, reference, Path(args.reference).name)

    plot_roc(labels, test.targets, probabilities, output_dir / "roc.png")
    draws = {name: torch.from_numpy(values[1:]) for name, values in draws.items()}
    with replacing(output_dir / "downstream_draws.safetensors") as temporary:
        save_file(draws, temporary, {"draws_id": digest(names, patients, np.array(args.bootstrap_samples))})
    table = pd.DataFrame(rows).drop(columns="n").set_index(["metric", "label"])
    print(table.to_string(na_rep="", float_format="{:.3f}".format))
    summary = {"script": "eval_downstream.py", "train_on": "nothing" if spec else args.train_on, "settings": settings}
    left_out = [*settings, "output_dir", "image_cache_dir"]
    summary["arguments"] = {key: value for key, value in vars(args).items() if key not in left_out}
    summary["versions"] = {k: version(k) for k in ("torch", "torchvision", "accelerate", "scikit-learn", "numpy")}
    summary |= {"images": tables.counts, "notes": tables.notes, "results": rows, "seeds": []}
    for k, (_, losses) in enumerate(results):
        values = pd.DataFrame({name: figures[name][:, k, 0] for name in METRICS}, labels, dtype=object)
        metrics = values.where(values.notna(), None).to_dict()
        seed = None if spec else args.seed + k
        summary["seeds"].append({"seed": seed, "validation_losses": losses, "metrics": metrics})
    with replacing(output_dir / "downstream_metrics.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def main(args):
    classifier, spec = load_classifier(args.classifier) if args.classifier else (None, {})
    # The other processes wait, possibly for hours, while the main process decodes images.
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))
    # Without `cpu`, processes that torchrun starts on a machine without a GPU would each train for themselves.
    cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    if args.mixed_precision is None:
        gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "no").lower() in ("no", "false", "0")
        args.mixed_precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "no"
    accelerator = Accelerator(cpu=cpu, mixed_precision=args.mixed_precision, kwargs_handlers=[timeout])
    # Make runs repeatable, and keep TF32 out of float32 scores.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False

    tables = load_tables(args, spec, accelerator)
    if not spec:
        # If the weights cannot be loaded, fail before hours of decoding.
        load_initial_weights(accelerator, build_classifier(args.arch, len(tables.labels)), args)
    images = load_images(accelerator, tables, spec.get("resolution", args.resolution), args)
    settings = run_settings(args, tables, spec, images, accelerator.num_processes)
    reference = load_reference(args, settings) if args.reference else None
    if accelerator.is_main_process:
        open_output(Path(args.output_dir), settings)
    accelerator.wait_for_everyone()

    if spec:
        classifier.to(accelerator.device)
        logits = predict(accelerator, classifier, images[-1].pixels, spec["normalisation"])
        results = [(logits[:, [spec["labels"].index(label) for label in tables.labels]], [])]
    else:
        try:
            results = [train_seed(args, accelerator, args.seed + k, images) for k in range(args.num_seeds)]
        except torch.OutOfMemoryError as error:
            fail(f"{error}; lower --train_batch_size or --resolution")
    accelerator.end_training()
    if accelerator.is_main_process:
        save_results(args, tables, spec, images, results, settings, reference)


if __name__ == "__main__":
    main(parse_args())
