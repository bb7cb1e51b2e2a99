# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "diffusers>=0.36", "accelerate>=1.10", "torchxrayvision>=1.5",
#   "transformers>=4.57.1", "torchmetrics>=1.8", "torch-fidelity>=0.4", "vendi-score>=0.0.3", "scikit-learn>=1.5",
#   "scikit-image>=0.24", "datasets>=4.0", "safetensors>=0.5", "numpy>=2.0", "pandas>=2.2.2", "scipy>=1.13",
#   "matplotlib>=3.9", "pillow>=10.3", "tqdm>=4.67",
# ]
# ///
"""Compare generated chest radiographs with real ones: the paper's Table 3, with 95% intervals and floors.

    accelerate launch eval_generation.py --synthetic samples/bitfit --classifier downstream/real/classifier
    python eval_generation.py --synthetic samples/unet --baseline samples/stable-diffusion-v1-5 --vae runs/unet
    python eval_generation.py --synthetic samples/lora --real_csv hospital/table.csv --train_csv hospital/table.csv

Writes generation_metrics.json, pictures, and generation_draws.safetensors (for launch/report.py) to --output_dir. A
metric's floor is the value of real images, or for memorisation the value expected without it.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# bitsandbytes, which diffusers imports, reports a missing 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from scipy import stats
from skimage import transform
from sklearn.metrics import ConfusionMatrixDisplay, euclidean_distances, pairwise_distances_argmin_min
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from torch.nn.utils import fuse_conv_bn_eval
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image.fid import NoTrainInceptionV3
from torchmetrics.image.kid import poly_mmd
from torchvision.models import get_model
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel
from vendi_score.vendi import score_dual

with warnings.catch_warnings():
    # torchxrayvision silences all warnings when it is imported.
    import torchxrayvision as xrv

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
# The sets of images that are scored, and the suffix of their metrics; real first, since its values are the floors.
SUFFIXES = {"real": "_real", "synthetic": "", "base model": "_baseline", "through the VAE": "_vae"}
# torchxrayvision's names of labels, where they differ from CheXpert's.
XRV_NAMES = {"Pleural Effusion": "Effusion"}
NEIGHBOURS = 5
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
# Metrics that cost n² (KID, precision, ...): the fewest images, so that KID's subsets of n / 3 hold two, and the most
# per draw.
MIN_PAIRWISE_IMAGES, MAX_DRAW_IMAGES = 6, 2500
BOOTSTRAP_DRAWS = 200
# Enough images for the VAE's floor; encoding and decoding take much longer than features.
MAX_VAE_IMAGES = 5000
# MS-SSIM: fewest and most pairs of images, and their side in pixels (its five scales need more than 160).
MIN_PAIRS, MAX_PAIRS, PAIR_SIDE = 6, 100, 176
# Ranges of metrics other than the defaults of `Results.add`: (0, 1) with `units`, (0, inf) without.
BOUNDS = {"kid": (-math.inf, math.inf), "class_consistency_margin": (-1.0, 1.0)}
BOUNDS |= dict.fromkeys(["ms_ssim", "memorisation_nearer_train", "memorisation_nearer_train_pixels"], (0.0, 1.0))
# Mean absolute difference between channels, in grey levels of 255, at which a tint becomes visible: on mid-grey, a
# CIE76 Delta E of 2.1 (red against blue) to 4.5 (green); 2.3 is just noticeable.
VISIBLE_COLOUR = 4.0
THUMBNAIL = 32
# Rows of a distance matrix held in memory at a time.
CHUNK = 512
# Part of the cache key of scores; computed at import, since the file may be edited during a long run.
SCRIPT_SHA256 = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


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
    flag = parser.add_argument_group("images").add_argument
    flag("--synthetic", required=True, help="folder of sample.py, or any image table")
    flag("--real_csv", help=f"table of radiographs (default: {' or '.join(DEFAULT_TABLES)})")
    flag("--dataset_name", help="hub id or local folder for datasets.load_dataset, instead of --real_csv")
    flag("--image_column", default="image", help="image column of --dataset_name")
    flag("--image_root", help="folder that paths in --real_csv and --train_csv are relative to")
    splits = ["train", "val", "test", "all"]
    flag("--real_split", choices=splits, default="test", help="part of --real_csv to use; all if it is a test set")
    flag("--train_csv", help="table of training images, to measure memorisation (default: not measured)")
    flag("--train_split", choices=splits, default="train", help="part of --train_csv that was trained on")
    flag("--max_train_samples", type=int, help="as passed to the training script, to select the same images")
    flag("--split_seed", type=int, default=0, help="seed of the split by patient; use the same in every script")
    flag("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="meaning of -1 in real tables")
    flag("--baseline", help="samples of the base model before training, scored as well (default: none)")
    flag("--vae", help="pipeline whose VAE encodes and decodes real images, scored as well (default: none)")
    flag("--revision", help="branch, tag or commit of --vae on the hub")
    flag("--variant", help="variant of --vae's weight files, such as fp16")
    flag("--labels", nargs="+", help="label columns to score (default: CheXpert's 14, where --synthetic has them)")
    flag("--max_per_label", type=int, default=5000, help="maximum images per label, chosen by --seed")
    pools = "in metrics of all images, count each once (unique) or once per label (paper)"
    flag("--pool", choices=["unique", "paper"], default="unique", help=pools)
    flag("--resolution", type=int, help="pixels per side (default: as recorded in --synthetic, else 512)")
    flag("--resize_mode", choices=["squash", "pad", "crop"], help="how images become square (default: --synthetic's)")
    flag("--mixed_geometry", action="store_true", help="allow tables of different --resolution or --resize_mode")
    flag = parser.add_argument_group("networks").add_argument
    networks = "xrv, rad-dino, inception, a file or folder, or a hub id; several allowed (default: xrv)"
    flag("--features", nargs="+", default=["xrv"], help=networks)
    flag("--classifier", help="classifier folder of eval_downstream.py (default: the heads of --features)")
    flag("--batch_size", type=int, help="images per forward pass (default: GPU 32, CPU 4 on each core)")
    flag("--feature_cache_dir", help="cache of features and scores, shared by runs (default: beside --output_dir)")
    flag = parser.add_argument_group("results").add_argument
    flag("--num_subsamples", type=int, default=10, help="half-size subsets for intervals of FID etc.; 1: no intervals")
    flag("--seed", type=int, default=0, help="seed of every random choice")
    flag("--output_dir", help="result folder (default: evaluations/<name of --synthetic>)")
    args = parser.parse_args(argv)
    for name in ("max_train_samples", "max_per_label", "resolution", "batch_size", "num_subsamples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if len(set(map(network_name, args.features))) < len(args.features):
        parser.error(f"--features {' '.join(args.features)}: two end in the same name, so their metrics would clash")
    args.labels = args.labels and list(dict.fromkeys(args.labels))
    if args.labels and len(args.labels) > 62:
        parser.error("--labels takes at most 62 labels")
    if args.real_csv and args.dataset_name:
        parser.error("pass either --real_csv or --dataset_name")
    args.real_csv = args.real_csv or args.dataset_name or next(filter(os.path.isfile, DEFAULT_TABLES), None)
    if not args.real_csv:
        found = f"found neither {' nor '.join(DEFAULT_TABLES)} in {Path.cwd()}"
        parser.error(f"{found}; pass --real_csv, or run the offline demo: bash launch/demo.sh")
    for name in ("real_csv", "train_csv", "synthetic", "baseline"):
        path = getattr(args, name)
        if path and path != args.dataset_name and not os.path.exists(path):
            parser.error(f"--{name} {path}: no such file or folder")
    args.output_dir = args.output_dir or str(Path("evaluations") / run_name(args.synthetic))
    return args


def table_path(name):
    """Return the table in a folder written by sample.py, or the path itself."""
    path = Path(name) / "metadata.csv"
    return str(path if path.is_file() else name)


def network_name(source):
    """Return a network's name in its metrics, such as rad-dino in fid@rad-dino."""
    return Path(os.path.abspath(source)).name.removesuffix(".safetensors")


def cache_folder(args):
    """Return the folder of the features and scores that runs share."""
    return Path(args.feature_cache_dir or Path(args.output_dir).parent / "feature_cache")


def run_name(synthetic):
    """Return the name of the samples' folder, or of the table's file without its suffix."""
    path = Path(synthetic).resolve()
    path = path.parent if path.name == "metadata.csv" else path
    return path.name if path.is_dir() else path.stem


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


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


# Copied from eval_downstream.load_folder
def load_folder(folder):
    """Return the image table of a folder without one: a set of images without labels."""
    suffixes = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
    names = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.suffix.lower() in suffixes]
    names = pd.Series(sorted(name for name in names if not re.search(r"(^|/)\.", name)), dtype=str)
    if names.empty or (Path(folder) / "sampling.json").exists():
        fail(f"{folder}: no images, or not finished by sample.py; pass an image table or a folder of images")
    images = [os.path.join(os.path.abspath(folder), name) for name in names]
    return make_table(names.to_frame("Path"), names, images, [("table", f"{folder}, {len(names):,} images, no table")])


# Copied from eval_downstream.replacing
@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path in the same folder, which is made, and rename it to `path` when the block is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # other processes may write the same file
    yield temporary
    os.replace(temporary, path)


# Copied from eval_downstream.save_dataset_image
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


# Copied from eval_downstream.load_table
def load_table(source, image_root, labels, args=None):
    """Return the image table of a CSV, of a folder with or without metadata.csv, or of --dataset_name."""
    if args and source == args.dataset_name:
        table = load_dataset_table(source, args.image_column, None, labels)
        folder = Path(args.output_dir).parent / "dataset_images"
        return table.assign(image=[save_dataset_image(image, folder) for image in table["image"]])
    source = table_path(source)
    return load_folder(source) if os.path.isdir(source) else load_image_table(source, image_root, labels=labels)


# Copied from eval_downstream.print_block
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


# Copied from train_full.positive_labels
def positive_labels(table, labels, uncertain):
    """Return whether each label is positive in each row, as a boolean frame (rows, labels)."""
    return table.reindex(columns=labels).isin([1.0, -1.0] if uncertain == "ones" else [1.0])


# Copied from train_full.keyed_seed
def keyed_seed(*key):
    """Hash the key to a 63-bit seed. Since every draw is seeded this way, checkpoints need no random state."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


# Copied from eval_downstream.read_geometry
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


# Copied from eval_downstream.patient_hash
def patient_hash(patient):
    """Return 16 hexadecimal digits that stand for a patient in files that may be shared."""
    return hashlib.sha256(f"patient:{patient}".encode()).hexdigest()[:16]


def choose_rows(table, rows, count, seed):
    """Return at most `count` rows, chosen by a hash of (seed, name) so that adding rows hardly changes the choice."""
    if len(rows) <= count:
        return rows
    keys = [keyed_seed(seed, name) for name in table["name"].iloc[rows]]
    return np.sort(rows[np.argsort(keys, kind="stable")[:count]])


def label_codes(table, labels, uncertain):
    """Return each row's positive labels as a bit mask, 0 for none."""
    return positive_labels(table, labels, uncertain).to_numpy() @ (1 << np.arange(len(labels)))


def prompts_or_codes(table, codes):
    """Return each row's prompt or, if it has none, its code of `label_codes` as a string."""
    return table["prompt"].where(table["prompt"] != "", codes.astype(str))


def label_rows(table, labels, args):
    """Return the positions of each label's rows, at most --max_per_label each."""
    positive = positive_labels(table, labels, args.uncertain).items()
    return {label: choose_rows(table, np.flatnonzero(own), args.max_per_label, args.seed) for label, own in positive}


def merge_duplicates(table, column):
    """Keep the first row of each value of a column. Its labels are positive, or else uncertain, if any row's are."""
    ranks = table.select_dtypes(float).replace(-1.0, 0.5)
    merged = table.assign(**ranks.groupby(table[column], sort=False).transform("max").replace(0.5, -1.0))
    return merged[~table[column].duplicated()].reset_index(drop=True)


def load_split(csv, image_root=None, split="all", seed=0, args=None):
    """Return the frontal rows of the patients in a split."""
    table = load_table(csv, image_root, known_labels(args and args.labels), args)
    table = table[table["frontal"]]
    if split != "all" and len(table):
        table = table[split_of(table, seed) == split]
    if table.empty:
        fail(f"{csv}: no frontal image in split {split!r}; if it is one split, use --real_split or --train_split all")
    return table.reset_index(drop=True)


def load_training_images(args):
    """Return the rows that the training scripts select by the same flags: those with a prompt or a positive label."""
    table = load_split(args.train_csv, args.image_root, args.train_split, args.split_seed, args)
    positive = positive_labels(table, known_labels(args.labels), args.uncertain).any(axis=1)
    table = table[(table["prompt"] != "") | positive]
    if args.max_train_samples and args.max_train_samples < len(table):
        table = table.sample(n=args.max_train_samples, random_state=args.split_seed % 2**32)
    return table.reset_index(drop=True)


def choose_geometry(args, tables, notes):
    """Return the resolution and resize mode; fail if they differ between tables and flags, unless --mixed_geometry."""
    geometries, chosen = {csv: read_geometry(table, csv) for csv, table in tables.items()}, {}
    for column, default in (("resolution", 512), ("resize_mode", "squash")):
        requested = getattr(args, column)
        found = {f"--{column}": [requested]} if requested else {}
        found |= {csv: geometry[column] for csv, geometry in geometries.items()}
        values = list(itertools.chain(*found.values()))
        if len(set(values)) > 1:
            if not args.mixed_geometry:
                fail(f"images of different {column}: {found}; sample again, or pass --mixed_geometry")
            notes.append(f"comparing images of different {column}: {found}")
        if not values:
            notes.append(f"{next(iter(tables))} does not record its {column}; assuming {default}")
        chosen[column] = values[0] if values else default
    return chosen


def plan_evaluation(args, accelerator):
    """Return the tables by name, with each image once, the labels, the geometry, and warnings for the reader."""
    folders, notes = {"synthetic": args.synthetic, "base model": args.baseline}, []
    csvs = {name: table_path(folder) for name, folder in folders.items() if folder}
    tables, known = {name: load_split(csv, args=args) for name, csv in csvs.items()}, known_labels(args.labels)
    geometry = choose_geometry(args, {csv: tables[name] for name, csv in csvs.items()}, notes)
    tables["real"] = load_split(args.real_csv, args.image_root, args.real_split, args.split_seed, args)
    if args.train_csv:
        tables["train"] = load_training_images(args)
        shared = set(tables["train"]["patient"]) & set(tables["real"]["patient"])
        if shared:
            notes.append(f"{len(shared):,} real patients were trained on; memorisation does not count them as unseen")
    for table in tables.values():
        print_block(accelerator, table)
    found = positive_labels(tables["synthetic"], known, "zeros").any()
    labels = args.labels or sorted(found[found].index, key=[*CONDITIONS, *known].index)

    # Each image counts once, whatever its name. Merge before the number is capped: copies would take places.
    for name, listed in tables.items():
        hashes = hash_files(accelerator, list(listed["image"].unique()), args)
        table = merge_duplicates(listed.assign(hash=listed["image"].map(hashes)), "image")
        content, same = table["hash"], table["hash"].duplicated().sum()
        if name in csvs and same:  # generated
            notes.append(f"{name}: {same:,} images are identical to another one: copies, or the model has collapsed")
            # Equal samples of another prompt or noise stay: without them, a collapsed model would look varied.
            noise = table["index"] + "/" + table["seed"] if {"index", "seed"} <= {*table} else ""
            content = content + prompts_or_codes(table, label_codes(table, labels, args.uncertain)) + noise
        table = merge_duplicates(table.assign(content=content), "content")
        if len(table) < len(listed):
            repeated = f"{len(listed) - len(table):,} rows repeat the image of another row"
            notes.append(f"{name}: {repeated}; each image counts once")
        tables[name] = table
    counts = count_rows("test", tables["real"], known, args.uncertain)
    if labels:
        real, synthetic = (label_codes(tables[name], labels, args.uncertain) for name in ("real", "synthetic"))
        labelled = real > 0
        unmatched = labelled & ~np.isin(real, synthetic)
        count = f"real: {unmatched.sum():,} of {labelled.sum():,}"
        text = f"{count} images have labels in a combination that no generated image has"
        if synthetic.any() and labelled.any() and (unmatched == labelled).all():
            fail(f"{text}; sample the real combinations with sample.py --like_csv")
        if unmatched.any():
            notes.append(f"{text}, and are left out")
        tables["real"] = tables["real"][~unmatched]
    for name, table in tables.items():
        if labels and name != "train":
            rows = np.unique(np.concatenate(list(label_rows(table, labels, args).values())))
            tables[name] = table.iloc[rows].reset_index(drop=True)
        if tables[name].empty:
            fail(f"{name} images: none has any of {', '.join(labels)}; check the label columns and --uncertain")
    # Splits, caps and unmatched labels may leave out much of a table.
    counted = ", ".join(f"{len(table):,} {name}" for name, table in tables.items())
    accelerator.print(f"{'images':>9}  {counted}", flush=True)
    return SimpleNamespace(tables=tables, labels=labels, counts=counts, warnings=notes, **geometry)


def hash_files(accelerator, paths, args):
    """Return the SHA-256 of each file, or of its path if it is missing, which `compute_features` reports."""

    def digest(path):
        return hashlib.sha256(Path(path).read_bytes() if os.path.isfile(path) else path.encode()).hexdigest()

    def compute():
        return np.array([value for _, value in decode_images(mine, digest, {}, "hashing images")])

    mine = paths[accelerator.process_index :: accelerator.num_processes]
    stats = [os.stat(path) if os.path.isfile(path) else None for path in mine]
    identity = [[path, stat and stat.st_size, stat and stat.st_mtime_ns] for path, stat in zip(mine, stats)]
    return dict(gather_object(list(zip(mine, remember(["hashes", identity], compute, args).tolist()))))


class Sample(NamedTuple):
    features: np.ndarray  # (n, d)
    patients: np.ndarray  # (n,)
    key: bytes  # identifies the features in the cache of scores

    def take(self, rows):
        key = hashlib.sha256(self.key + rows.tobytes()).digest()
        return Sample(self.features[rows], self.patients[rows], key)

    def subset(self, size, *key):
        """Return `size` images of randomly chosen patients, or all if there are no more."""
        return self if len(self.features) <= size else self.take(shuffle_patients(self.patients, *key)[:size])


@dataclass
class Source:
    """A set of images, and the networks' outputs for each.

    `rows_of` has the rows of each label; `pool`, by label and for "all", those that FID and other set metrics compare.
    """

    name: str
    table: pd.DataFrame
    rows_of: dict
    codes: np.ndarray  # (n,), of label_codes
    pool: dict = field(default_factory=dict)  # stays empty for training images
    features: np.ndarray = None  # (n, d) float32
    probabilities: np.ndarray = None  # (n, heads) float32
    colour: np.ndarray = None  # (n, 1), grey levels
    thumbnails: np.ndarray = None  # (n, THUMBNAIL²), centred

    @property
    def patients(self):
        return self.table["patient"].to_numpy()

    @cached_property
    def key(self):
        return hashlib.sha256(np.ascontiguousarray(self.features)).digest()

    def sample(self, label):
        return Sample(self.features, self.patients, self.key).take(self.pool[label])

    def choose_combinations(self, rows, counts, seed):
        """Return at most `counts[code]` of the rows with each combination of labels."""
        groups = [choose_rows(self.table, rows[self.codes[rows] == code], counts[code], seed) for code in counts]
        return np.sort(np.concatenate([rows[:0], *groups]))


def make_sources(plan, args):
    """Return the Sources by name, without features.

    Real images with several findings differ from images of each finding alone. So take equally many images of each
    combination of labels from the real and the synthetic set; without labels, equally many images.
    """
    sources, counts = {}, {}
    for name, table in plan.tables.items():
        rows_of = label_rows(table, plan.labels, args) if plan.labels else {"all": np.arange(len(table))}
        sources[name] = Source(name, table, rows_of, label_codes(table, plan.labels, args.uncertain))
    for label in sources["real"].rows_of:
        real, synthetic = (sources[name].codes[sources[name].rows_of[label]] for name in ("real", "synthetic"))
        counts[label] = Counter(real) & Counter(synthetic)
    for name, source in sources.items():
        if name == "train":
            continue
        for label, rows in source.rows_of.items():
            source.pool[label] = source.choose_combinations(rows, counts[label], args.seed)
        rows = np.concatenate(list(source.pool.values()))
        source.pool["all"] = rows if args.pool == "paper" else np.unique(rows)
        unmatched = (~np.isin(source.codes, sources["real"].codes)).sum()
        if unmatched:
            text = "have labels in a combination that no real image has; FID and other set metrics leave them out"
            plan.warnings.append(f"{name}: {unmatched:,} of {len(source.table):,} images {text}")
    return sources


# ---------------------------------------------------------------------------------------------------------------------
# Images, networks and the cache of features
# ---------------------------------------------------------------------------------------------------------------------


# Copied from eval_downstream.to_gray
def to_gray(rgb):
    """Return the mean over channels, to the nearest integer, as a picture: a tint is then no cue."""
    red, green, blue = np.moveaxis(rgb, 2, 0).astype(np.uint16, order="C")
    return Image.fromarray(((red + green + blue + 1) // 3).astype(np.uint8))


# Copied from eval_downstream.build_classifier
def build_classifier(arch, num_labels):
    """Return torchvision's network with one logit per label and random weights."""
    return get_model(arch, weights=None, num_classes=num_labels).to(memory_format=torch.channels_last)


# Copied from eval_downstream.classifier_inputs
def classifier_inputs(gray, normalisation):
    """Convert gray images, (b, 1, h, w) in [0, 1], to the classifier's normalised inputs, (b, 3, h, w)."""
    mean, std = (torch.tensor(normalisation[key], device=gray.device).view(1, 3, 1, 1) for key in ("mean", "std"))
    return ((gray.expand(-1, 3, -1, -1) - mean) / std).contiguous(memory_format=torch.channels_last)


# Copied from eval_downstream.load_classifier
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


def hash_weights(model):
    """Return a SHA-256 over the names and values of a network's weights and buffers."""
    # Cloned: safetensors refuses tied weights.
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    return hashlib.sha256(to_bytes(tensors)).hexdigest()


class Appearance:
    """Colour, and a thumbnail to find copies by their pixels, (n, 1 + THUMBNAIL²); computed and cached like features.

    Like a network, it has `prepare`, for one image, `compute`, for a batch, and a cache `key`. Several threads call
    both at once, so keep no state in them. `prepare` takes the image's channels, (3, R, R) uint8, and `to_gray` of
    them. `main` sets `folder`, the cache.
    """

    key = f"appearance-{THUMBNAIL}"

    def prepare(self, channels, gray):
        # The mean absolute difference over the three pairs of channels is 2/3 of their range, in grey levels of 255.
        colour = 2 * np.ptp(channels, axis=0).mean() / 3
        thumbnail = np.asarray(gray.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))
        return np.concatenate([[colour], thumbnail.reshape(-1)])

    def compute(self, prepared):
        return np.stack(prepared).astype(np.float32)


@cache
def xray_resizer(side):
    """Return the matrix, (224, side), by which torchxrayvision's XRayResizer(224) resizes rows, and columns alike."""
    return torch.from_numpy(transform.resize(np.eye(side), (224, side), mode="constant")).float()


class XRVNetwork:
    """torchxrayvision's DenseNet-121: pooled features, then its heads as probabilities, (n, 1024 + heads)."""

    def __init__(self, source, device):
        try:
            model = xrv.models.DenseNet(weights="densenet121-res224-all" if source == "xrv" else None)
            if source != "xrv":
                weights = load_file(source)
                weights.pop("op_threshs", None)
                model.load_state_dict(weights)
        except Exception as error:  # download, unpickling and malformed files can raise anything
            fail(f"--features {source}: cannot load torchxrayvision's DenseNet ({str(error)[:200]}); see README.md")
        model.op_threshs = None  # unused here; so the download and its converted file share a cache
        self.model, self.device, self.key = model.eval().to(device), device, f"xrv-{hash_weights(model)}"
        if device.type == "cpu":  # which does the same arithmetic faster like this
            for layer in model.modules():
                if hasattr(layer, "norm2"):
                    layer.conv1, layer.norm2 = fuse_conv_bn_eval(layer.conv1, layer.norm2), torch.nn.Identity()
            model.to(memory_format=torch.channels_last)
        heads = list(model.targets)
        self.labels = [label for label in LABELS if XRV_NAMES.get(label, label) in heads]
        self.columns = [heads.index(XRV_NAMES.get(label, label)) for label in self.labels]

    def prepare(self, channels, gray):
        return channels.mean(axis=0, dtype=np.float32)

    def inputs(self, prepared):
        """Resize as torchxrayvision's XRayResizer does, and scale to the network's range, [-1024, 1024]."""
        gray = torch.from_numpy(np.stack(prepared)).to(self.device)
        matrix = xray_resizer(gray.shape[-1]).to(self.device)
        # The resizer takes pixels beyond the edges as 0 (black here; mid-gray if images are scaled first, so that the
        # outermost pixels differ slightly), and clips to the image's own range.
        resized = (matrix @ gray @ matrix.T).clamp(gray.amin((1, 2), keepdim=True), gray.amax((1, 2), keepdim=True))
        return (2 * (resized / 255) - 1)[:, None] * 1024

    @torch.no_grad()
    def compute(self, prepared):
        features = self.model.features2(self.inputs(prepared))
        # The model's `forward` would rescale the probabilities by operating thresholds.
        probabilities = torch.sigmoid(self.model.classifier(features))[:, self.columns]
        return torch.cat([features, probabilities], dim=1).cpu().numpy()


class ClassifierNetwork:
    """A classifier of eval_downstream.py: the input of its last layer, then its probabilities, (n, d + heads)."""

    def __init__(self, folder, device):
        model, self.spec = load_classifier(folder)
        self.model, self.device, self.labels = model.to(device), device, self.spec["labels"]
        # With the same weights, features still depend on the size and scale of the input.
        identity = [hash_weights(model), self.spec["resolution"], self.spec["normalisation"]]
        self.key = f"classifier-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}"
        last = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]
        self.head = model.get_submodule(last)
        model.set_submodule(last, torch.nn.Identity())

    def prepare(self, channels, gray):
        return np.asarray(gray.resize((self.spec["resolution"],) * 2, Image.Resampling.LANCZOS))

    @torch.no_grad()
    def compute(self, prepared):
        gray = torch.from_numpy(np.stack(prepared)).to(self.device)[:, None].float() / 255
        features = self.model(classifier_inputs(gray, self.spec["normalisation"]))
        return torch.cat([features, torch.sigmoid(self.head(features))], dim=1).cpu().numpy()


class InceptionNetwork:
    """InceptionV3 with FID's published weights: pooled features as in torchmetrics, (n, 2048)."""

    labels = ()

    def __init__(self, device):
        try:
            model = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        except Exception as error:  # download and unpickling can raise anything
            fail(f"--features inception: cannot download torch-fidelity's InceptionV3 ({str(error)[:200]})")
        self.model, self.device, self.key = model.to(device), device, f"inception-{hash_weights(model)}"

    def prepare(self, channels, gray):
        return np.asarray(gray)

    @torch.no_grad()
    def compute(self, prepared):
        gray = torch.from_numpy(np.stack(prepared)).to(self.device)[:, None]
        return self.model(gray.repeat(1, 3, 1, 1)).cpu().numpy()


class VisionNetwork:
    """A vision model of transformers with its own image processor: its pooled output, or its class token, (n, d)."""

    labels = ()

    def __init__(self, source, device):
        try:
            self.processor = AutoImageProcessor.from_pretrained(source)
            options = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
            model, report = AutoModel.from_pretrained(source, **options)
            # Weights that the file lacks would be random. A mask token is only for training.
            missing = [name for name in report["missing_keys"] if "mask_token" not in name]
            if missing:
                raise ValueError(f"it has no {min(missing)}")
            if getattr(model.config, "mask_ratio", 0):
                raise ValueError("it masks random patches")
        except Exception as error:  # downloads and malformed files can raise anything
            fail(f"--features {source}: neither a classifier nor a vision model in safetensors ({str(error)[:200]})")
        model = getattr(model, "vision_model", model)  # of CLIP and the like
        self.model, self.device = model.eval().to(device), device
        identity = [hash_weights(model), self.processor.to_json_string()]
        self.key = f"vision-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}"

    def prepare(self, channels, gray):
        return self.processor(gray.convert("RGB"), return_tensors="np")["pixel_values"][0]

    @torch.no_grad()
    def compute(self, prepared):
        output = self.model(pixel_values=torch.from_numpy(np.stack(prepared)).to(self.device))
        pooled = output.get("pooler_output")
        return (output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)).cpu().numpy()


def load_network(source, device):
    """Return the network that a value of --features stands for."""
    if source == "inception":
        return InceptionNetwork(device)
    if source == "xrv" or source.endswith(".safetensors"):
        return XRVNetwork(source, device)
    if (Path(source) / "classifier.json").is_file():
        return ClassifierNetwork(source, device)
    return VisionNetwork("microsoft/rad-dino" if source == "rad-dino" else source, device)


def load_networks(args, accelerator):
    """Return the networks for features by name, and the one for class consistency, which may be one of them."""
    # TF32 changes the third digit of FID.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with accelerator.main_process_first():
        features = {network_name(source): load_network(source, accelerator.device) for source in args.features}
    for source, network in zip(args.features, features.values()):
        if args.classifier is None or Path(source).resolve() == Path(args.classifier).resolve():
            return features, network
    return features, ClassifierNetwork(args.classifier, accelerator.device)


class ThroughVAE:
    """Encode and decode images, (b, R, R, 3) uint8, to measure how much of a sample's error is the VAE's."""

    def __init__(self, args, device):
        import diffusers  # here, since it takes seconds to import

        diffusers.utils.logging.disable_progress_bar()
        options = {"subfolder": "vae", "revision": args.revision, "variant": args.variant, "use_safetensors": True}
        try:
            vae, report = diffusers.AutoencoderKL.from_pretrained(args.vae, output_loading_info=True, **options)
            if report["missing_keys"] or not all(tensor.isfinite().all() for tensor in vae.parameters()):
                raise ValueError("weights are missing or not finite")
        except (OSError, ValueError) as error:
            fail(f"--vae {args.vae}: cannot load a VAE in safetensors ({str(error)[:300]})")
        self.vae, self.device = vae.eval().to(device, torch.float32), device
        self.key = hash_weights(self.vae)

    @torch.no_grad()
    def __call__(self, rgb):
        pixels = torch.from_numpy(rgb).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample
        return ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def network_warnings(features, classifier, plan, args):
    """Return warnings about the networks; fail if a classifier was trained with another resize mode."""
    notes, patients = [], plan.tables["real"]["patient"].unique()
    if any(isinstance(network, XRVNetwork) for network in features.values()):
        notes.append("torchxrayvision's DenseNet-121 was trained on CheXpert, among other data sets")
    if any("rad-dino" in name for name in features):
        notes.append("RAD-DINO's model card lists CheXpert among its training data")
    if classifier in features.values() and classifier.labels:
        notes.append("class consistency is judged by the same network as FID, not by an independent one")
    for network in dict.fromkeys([classifier, *features.values()]):
        if not isinstance(network, ClassifierNetwork):
            continue
        flag = "--features" if network in features.values() else "--classifier"
        spec, mode = network.spec, network.spec["resize_mode"]
        if mode != plan.resize_mode and not args.mixed_geometry:
            fail(f"{flag}: trained with --resize_mode {mode}, not {plan.resize_mode}; allow it with --mixed_geometry")
        trained, own = f"{mode}, {spec['source_resolution']} px", f"{plan.resize_mode}, {plan.resolution} px"
        if trained != own:
            notes.append(f"{flag}: trained on images of a different geometry ({trained}, not {own})")
        if spec["train_on"] != "real":
            notes.append(f"{flag}: trained with --train_on {spec['train_on']}, not on real images alone")
        shared = len({patient_hash(patient) for patient in patients} & set(spec["split"]["patients"]))
        if shared:
            notes.append(f"{flag}: trained on {shared:,} of {len(patients):,} real patients: optimistic about them")
        lows = {label: auroc["low"] or 0 for label, auroc in spec["real_test_auroc"].items()}
        chance = [label for label in plan.labels if lows.get(label, 1) <= 0.5]
        if chance:
            notes.append(f"{flag}: not shown to beat chance on real test images (AUROC): {', '.join(chance)}")
    return notes


def feature_warnings(name, features, n, label_n=None):
    """Return warnings about the set metrics of n images: features that hardly vary, or too few images.

    `label_n` is the smallest number of images of any label.
    """
    features, dim, notes = features.astype(np.float64), features.shape[1], []
    spread = math.sqrt(features.var(axis=0).sum() / np.square(features.mean(axis=0)).sum())
    if spread < 0.01:
        notes.append(f"{name}: the features hardly vary among real images ({spread:.1g} of the mean): FID says little")
    what, count = ("n", n) if n < 10 * dim else ("the smallest n per label", label_n or n)
    if count < 10 * dim:
        effect = "FID's bias is large (singular covariances)" if count <= dim else "small FID differences may be bias"
        notes.append(f"{name}: {what} = {count:,} is below 10 times the {dim:,} features: {effect}")
    return notes


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


# Copied from eval_downstream.decode_images
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


def feature_path(network, key):
    return network.folder / key[:2] / f"{key[2:34]}.npy"


def save_array(path, array):
    with replacing(path) as temporary:
        np.save(temporary, array)


def compute_features(accelerator, plan, networks, vae, args):
    """Compute features missing in the cache, decoding each image once; return messages about unusable images.

    The cache's folders are named by weights and geometry alone, so delete it after changing how features are computed.
    """
    on_cpu, threads, messages = accelerator.device.type == "cpu", torch.get_num_threads(), []
    batch_size = args.batch_size or (4 if on_cpu else 32)

    def compute_batch(keys):
        decoded, prepared = {}, {network: {} for network in networks}
        for key in keys:
            try:
                decoded[key] = load_image(images[key], plan.resolution, plan.resize_mode)
            except ValueError as error:
                messages.append(str(error))
        if through_vae and decoded:
            with lock:
                decoded = dict(zip(decoded, vae(np.stack(list(decoded.values())))))
        for key, rgb in decoded.items():
            channels, gray = np.moveaxis(rgb, 2, 0).copy(), to_gray(rgb)
            for network in networks:
                if not feature_path(network, key).exists():
                    prepared[network][key] = network.prepare(channels, gray)
        for network, inputs in prepared.items():
            if inputs:
                with lock:
                    outputs = network.compute(list(inputs.values()))
                for key, output in zip(inputs, outputs):
                    save_array(feature_path(network, key), output)
        return len(keys)

    for through_vae in (False, True):
        tables = [table for name, table in plan.tables.items() if (name == "through the VAE") == through_vae]
        images = {key: path for table in tables for key, path in zip(table["hash"], table["image"])}
        mine = list(images)[accelerator.process_index :: accelerator.num_processes]
        mine = [key for key in mine if not all(feature_path(network, key).exists() for network in networks)]
        # The VAE needs several times the memory of the networks.
        size = max(1, batch_size // 8) if through_vae else batch_size
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        # On a CPU, a batch per core, each on one thread, is faster than all threads on one batch. A GPU computes one
        # batch at a time, while other threads decode; so does the VAE on any device, to save memory.
        parallel = on_cpu and not through_vae
        lock = contextlib.nullcontext() if parallel else threading.Lock()
        workers = max(1, os.cpu_count() // accelerator.num_processes) if parallel else min(8, os.cpu_count())
        initargs = (threads if through_vae else 1,)
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=initargs)
        with pool, tqdm(total=len(mine), desc="computing features", unit="image", leave=False) as bar:
            for count in pool.map(compute_batch, batches):
                bar.update(count)
    torch.set_num_threads(threads)  # also the default of threads started later
    # With --vae, bad images are found twice.
    return sorted(set(gather_object(messages)))


def read_outputs(source, network):
    return np.stack([np.load(feature_path(network, key)) for key in source.table["hash"]])


def read_features(source, network):
    """Return each image's features and probabilities; fail if broken weights made them zero or not finite."""
    outputs = read_outputs(source, network)
    features, probabilities = np.split(outputs, [outputs.shape[1] - len(network.labels)], axis=1)
    sound = np.isfinite(outputs).all(axis=1) & (features != 0).any(axis=1)
    if not sound.all():
        name = source.table["image"][int((~sound).argmax())]
        fail(f"{name}: its features are all zero or not finite; the weights of --features or --classifier are broken")
    return features, probabilities


def load_features(source, appearance, network, classifier):
    """Read a source's arrays from the cache."""
    source.colour, thumbnails = np.split(read_outputs(source, appearance), [1], axis=1)
    source.thumbnails = thumbnails - thumbnails.mean(axis=1, keepdims=True)
    source.features, source.probabilities = read_features(source, network)
    if classifier is not network:
        source.probabilities = read_features(source, classifier)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Set metrics: functions of two sets of features, real (n, d) and other (m, d)
# ---------------------------------------------------------------------------------------------------------------------


def fid(real, other):
    """Return ||m1 - m2||² + tr(S1 + S2) - 2 tr((S1^½ S2 S1^½)^½) (Heusel et al., 2017, arXiv 1706.08500), in float64.

    With S = RᵀR, R being the centred and scaled rows or, if there are more rows than features, the triangle of their
    QR decomposition, the last trace is the sum of the singular values of R1 R2ᵀ. Unlike a matrix square root, this is
    accurate for singular covariances (fewer images than features).
    """
    means, roots = [], []
    for features in (real.astype(np.float64), other.astype(np.float64)):
        means.append(features.mean(axis=0))
        centred = (features - means[-1]) / math.sqrt(len(features) - 1)
        roots.append(np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred)
    distance = np.square(means[0] - means[1]).sum() + sum(np.square(root).sum() for root in roots)
    return max(0.0, float(distance - 2 * np.linalg.norm(roots[0] @ roots[1].T, "nuc")))


def mmd(real, other):
    """Return the unbiased MMD² of two sets of equal size under (x·y/d + 1)³ (Bińkowski et al., 2018, 1801.01401)."""
    return float(poly_mmd(torch.from_numpy(real).double(), torch.from_numpy(other).double()))


def kid(real, other, seed):
    """Return the mean MMD² of KID_SUBSETS pairs of subsets of n / 3 images, at most KID_SUBSET_SIZE."""
    generator, values = np.random.default_rng(keyed_seed(seed, "kid")), []
    size = min(KID_SUBSET_SIZE, len(real) // 3)
    for _ in range(KID_SUBSETS):
        subsets = [rows[generator.choice(len(rows), size, replace=False)] for rows in (real, other)]
        values.append(mmd(*subsets))
    return float(np.mean(values))


def prdc(real, other):
    """Return precision, recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797), k = NEIGHBOURS."""
    centre = real.mean(axis=0, dtype=np.float64)
    # Euclidean distances are computed from dot products, which are more accurate for centred features.
    real, other = real - centre, other - centre
    searches = [NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(rows) for rows in (real, other)]
    # Without an argument, kneighbors() excludes each row itself.
    radii_real, radii_other = (search.kneighbors()[0][:, -1] for search in searches)
    inside, recall, nearest = np.empty(len(other)), np.zeros(len(real), bool), np.full(len(real), np.inf)
    for start in range(0, len(other), CHUNK):
        rows = slice(start, start + CHUNK)
        distances = euclidean_distances(other[rows], real)
        inside[rows] = (distances < radii_real).sum(axis=1)
        recall |= (distances < radii_other[rows, None]).any(axis=0)
        nearest = np.minimum(nearest, distances.min(axis=0))
    return (inside > 0).mean(), recall.mean(), inside.mean() / NEIGHBOURS, (nearest < radii_real).mean()


def vendi(real, other):
    """Return the Vendi score of `other` (Friedman and Dieng, 2022, arXiv 2210.02410) and its ratio to `real`'s."""
    scores = []
    for features in (real, other):
        rows = normalize(features.astype(np.float64))
        n, dim = rows.shape
        if n < dim:  # XXᵀ / n has the eigenvalues of XᵀX / n, and is smaller
            rows = rows.T * math.sqrt(dim / n)
        scores.append(float(score_dual(rows, normalize=False)))
    return scores[1], scores[1] / scores[0]


class SetMetric(NamedTuple):
    """One or several metrics from one function of two sets of images."""

    names: list
    function: Callable  # (real, other) to the metrics
    size: str = "n"  # images per set: all n, half of them, or the smallest half of any label ("common")
    floor: str | None = None  # "halves": two halves of the real images that share no patient; "itself": real twice
    note: str | None = None
    mean_of_draws: bool = False  # report the mean of the draws instead of the value at `size`
    mean_of_disjoint: bool = False  # report the mean of two subsets that share no image
    draw: Callable | None = None  # a cheaper function for the draws
    pairwise: bool = False  # costs n²


def set_metrics(seed):
    """Return all set metrics; add new ones here."""
    expected = "interval of the expected FID at this n; for the floor see fid_half_n"
    mean, prdc_names = "mean of the draws", ["precision", "recall", "density", "coverage"]
    halves_note = f"k={NEIGHBOURS}, mean of two halves of n"
    return [
        SetMetric(["fid"], fid, note=expected),
        SetMetric(["fid_half_n"], fid, "half", "halves", mean, mean_of_draws=True),
        SetMetric(["fid_common_n"], fid, "common", "halves", f"{mean}; one n for all labels", mean_of_draws=True),
        SetMetric(["kid"], partial(kid, seed=seed), "n", "halves", f"{KID_SUBSETS} subsets", draw=mmd, pairwise=True),
        SetMetric(prdc_names, prdc, "half", "halves", halves_note, mean_of_disjoint=True, pairwise=True),
        SetMetric(["vendi", "vendi_ratio"], vendi, "n", "itself", "floor: the same number of real images"),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Rows and draws
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.result_row
def result_row(metric, value, label="all", low=None, high=None, n=None, floor=None, note=None):
    """Return one row of the format that all result files share.

    low and high are the 95% interval; floor is the score of real images, or of a trivial predictor.
    """
    return dict(metric=metric, label=label, value=value, low=low, high=high, n=n, floor=floor, note=note)


# Copied from train_full.count_rows
def count_rows(part, table, labels, uncertain):
    """Count the images of one part of the data, in total and per label (the paper's Table 2)."""
    counts = positive_labels(table, [label for label in labels if label in table], uncertain).sum()
    by_label = [result_row(f"images_{part}", int(count), label, n=len(table)) for label, count in counts.items()]
    return [result_row(f"images_{part}", len(table), n=len(table)), *by_label]


def confidence_interval(value, draws, bounds, units=None):
    """Return a metric's 95% interval from draws, (draws,), whose standard deviation is its standard error.

    By default it is Student's t. For shares, pass their number of independent `units` (images or patients): it is then
    Wilson's interval (1927) at the effective sample size p(1 - p) / variance, or at `units` if draws do not vary.
    """
    low, high = bounds
    z = stats.t.ppf(0.975, len(draws) - 1)
    if units is None:
        half = z * np.std(draws, ddof=1)
        return max(low, value - half), min(high, value + half)
    p, variance = (value - low) / (high - low), np.var(draws, ddof=1) / (high - low) ** 2
    n = p * (1 - p) / variance if variance > 1e-20 and 0 < p < 1 else units
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return [low + (high - low) * min(1.0, max(0.0, end)) for end in ends]


class Results:
    """Result rows and their draws, shared by all sources, and the suffix and weights of one source.

    `weights`, (1 + draws, n), are how often each image counts in each bootstrap draw; the first row is all ones.
    `network` follows the metric's name, such as "@rad-dino" for a further network of --features.
    """

    def __init__(self, rows, draws, suffix, weights, network=""):
        self.rows, self.draws, self.suffix, self.weights, self.network = rows, draws, suffix, weights, network

    def add(self, metric, value, label="all", draws=None, units=None, **row):
        """Add a row with its interval. The default floor is the real images' value, which must have been added."""
        low, high, name = None, None, metric + self.network + self.suffix
        if draws is not None and len(draws) > 1:
            # safetensors writes wrong values for a view of a column.
            self.draws[f"{name}/{label}"] = np.ascontiguousarray(draws, np.float64)
            bounds = BOUNDS.get(metric, (0.0, math.inf if units is None else 1.0))
            low, high = map(float, confidence_interval(value, draws, bounds, units))
        row = {"floor": self.find(f"{metric}{self.network}_real", label)} | row
        self.rows.append(result_row(name, None if value is None else float(value), label, low, high, **row))

    def add_image_metric(self, metric, statistic, label="all", units=None, **row):
        """Add a row whose value and draws are a function of the weights."""
        with np.errstate(invalid="ignore"):
            value, *draws = statistic(self.weights)
        # 0 / 0, if a draw misses all patients of a small group.
        draws = np.where(np.isfinite(draws), draws, value)
        self.add(metric, value, label, draws, units, **row)

    def find(self, metric, label="all", key="value"):
        """Return an entry of a row, or None if there is no such row."""
        return next((row[key] for row in self.rows if (row["metric"], row["label"]) == (metric, label)), None)


def shuffle_patients(patients, *key):
    """Return all rows in a random order of patients, so that any cut splits at most one patient."""
    _, codes = np.unique(patients, return_inverse=True)
    order = np.random.default_rng(keyed_seed(*key)).permutation(codes.max() + 1)
    return np.argsort(order[codes], kind="stable")


def split_halves(patients, *key):
    """Split the rows into two random halves that share no patient."""
    order = shuffle_patients(patients, *key)
    middle = len(order) // 2
    while middle < len(order) and patients[order[middle]] == patients[order[middle - 1]]:
        middle += 1
    return order[:middle], order[middle:]


def half_splits(real, n, args):
    """Return --num_subsamples splits of the real images into halves that share no patient, and how many rows to use.

    That is n / 2, or fewer if a patient with many images makes the halves unequal.
    """
    if n < 4:
        return [], 0
    splits = [split_halves(real.patients, args.seed, "halves", k) for k in range(args.num_subsamples)]
    return splits, min([n // 2, *(len(half) for split in splits for half in split)])


@cache
def code_fingerprint():
    """Return a string that changes with this script and with the libraries that compute scores."""
    packages = ("numpy", "scipy", "scikit-learn", "torch", "torchmetrics", "vendi-score", "pillow")
    return f"{SCRIPT_SHA256} {[version(name) for name in packages]}"


def remember(identity, compute, args):
    """Return compute(), an array, cached under `identity`, a list of JSON values, and this script's code.

    In a sweep, all runs read and score the same images of the base model and of the VAE, and the same real images.
    """
    digest = hashlib.sha256(json.dumps([code_fingerprint(), *identity]).encode()).hexdigest()
    path = cache_folder(args) / "scores" / f"{digest[:32]}.npy"
    if path.exists():
        return np.load(path)
    values = compute()
    if args.feature_cache_dir != os.devnull:  # which simulations and launch/benchmark.py pass, to cache nothing
        save_array(path, values)
    return values


def evaluate(function, pairs, args):
    """Return the metrics of each pair of samples, (pairs, metrics)."""

    def compute():
        return np.array([np.atleast_1d(function(one.features, two.features)) for one, two in pairs])

    called = getattr(function, "func", function)  # `function` may be a partial
    keys = [sample.key.hex() for pair in pairs for sample in pair]
    return remember([called.__name__, getattr(function, "keywords", None), keys], compute, args)


def disjoint_pairs(samples, size, *key):
    """Return two pairs of samples, of `size` <= n / 2 images each, with at most one patient of a sample in both."""
    orders = [shuffle_patients(sample.patients, *key) for sample in samples]
    halves = [(sample.take(order[:size]), sample.take(order[-size:])) for sample, order in zip(samples, orders)]
    return list(zip(*halves))


def evaluate_metric(metric, samples, size, half, draws_of, args):
    """Return a metric's values, (metrics,), and draws, (draws, metrics), whose spread is the standard error at `size`.

    `samples` are two sets of n images. `draws_of` keeps draws by function and size, since FID's serve two rows.
    """
    n, num_draws = len(samples[0].features), args.num_subsamples
    function, draw_size = metric.draw or metric.function, min(half, size)
    if metric.pairwise:
        draw_size = min(draw_size, MAX_DRAW_IMAGES)
    if metric.mean_of_disjoint:
        # Leaving an image out changes the neighbours of others, so the spread of subsets would overstate the error.
        # Two subsets without common images are independent: their mean varies like half their difference.
        values = evaluate(function, disjoint_pairs(samples, size, args.seed, "half"), args).mean(axis=0)
        pairs = [pair for k in range(num_draws) for pair in disjoint_pairs(samples, draw_size, args.seed, "fid", k)]
        pair_values = evaluate(function, pairs, args)  # two rows per draw
        draws, variance_scale = (pair_values[::2] - pair_values[1::2]) / 2, draw_size / size
    else:
        if (function, draw_size) not in draws_of:
            subsets = [[s.subset(draw_size, args.seed, "fid", k) for s in samples] for k in range(num_draws)]
            draws_of[function, draw_size] = evaluate(function, subsets, args)
        # Delete-d jackknife (Shao and Wu, 1989): the variance over subsets of s of n images, times s / (n - s), is the
        # variance at n. A bootstrap with replacement would bias these metrics.
        draws, variance_scale = draws_of[function, draw_size], draw_size / (n - draw_size)
        if metric.mean_of_draws:
            # The mean of a few draws also varies with their choice.
            values, variance_scale = draws.mean(axis=0), variance_scale + 1 / num_draws
        else:
            values = evaluate(metric.function, [samples], args)[0]
    return values, values + (draws - draws.mean(axis=0)) * math.sqrt(variance_scale)


def add_set_metrics(results, real, other, label, common, args):
    """Add the rows of all set metrics. Floors from halves of the real images are added to --synthetic's rows only."""
    n = min(len(real.features), len(other.features))
    splits, half = half_splits(real, n, args)
    sizes = {"n": n, "half": half, "common": min(common, half)}
    equal = [sample.subset(n, args.seed, "equal") for sample in (real, other)]
    draws_of, patients = {}, min(len(np.unique(sample.patients)) for sample in equal)
    for metric in set_metrics(args.seed):
        if metric.size == "common" and results.network:
            continue  # n is that of all labels
        size, min_size = sizes[metric.size], MIN_PAIRWISE_IMAGES if metric.pairwise else 2
        if half < 2 or size < min_size:
            for name in metric.names:
                results.add(name, None, label, n=size, note="too few images, or of too few patients")
            continue
        values, draws = evaluate_metric(metric, equal, size, half, draws_of, args)
        floors = None
        if metric.floor == "itself":
            floors = evaluate(metric.function, [[equal[0], equal[0]]], args)
        elif metric.floor == "halves" and not results.suffix and half >= min_size:
            used = splits if metric.mean_of_draws else splits[:1]
            pairs = [[real.take(rows[: min(size, half)]) for rows in split] for split in used]
            floors = evaluate(metric.function, pairs, args)
        for i, name in enumerate(metric.names):
            row = {"n": size, "note": metric.note, "floor": None if floors is None else floors[:, i].mean()}
            units = patients if name in ("precision", "recall", "coverage") else None
            results.add(name, values[i], label, draws[:, i], units, **row)
        if metric.mean_of_draws and floors is not None:
            name = metric.names[0].replace("fid", "fid_real_halves")
            note = "two halves of the real images that share no patient; interval of a single split"
            results.add(name, floors.mean(), label, floors[:, 0], n=size, note=note)


# ---------------------------------------------------------------------------------------------------------------------
# Image metrics: means over images and AUROC, as functions of the images' weights, (draws, n), that return (draws,)
# ---------------------------------------------------------------------------------------------------------------------


# Copied from eval_downstream.patient_weights
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


def weighted_mean(values, rows):
    values = values[rows].astype(np.float64)
    return lambda weights: weights[:, rows] @ values / weights[:, rows].sum(axis=1)


def weighted_difference(values, rows, other_rows):
    one, two = weighted_mean(values, rows), weighted_mean(values, other_rows)
    return lambda weights: one(weights) - two(weights)


def weighted_auroc(scores, rows, other_rows):
    """Return the AUROC of `rows` (positives) against `other_rows`: Mann-Whitney's U, with ties counted half."""
    both = np.concatenate([rows, other_rows])
    order = np.argsort(scores[both], kind="stable")
    positive, both = (np.arange(len(both)) < len(rows))[order], both[order]
    starts = np.flatnonzero(np.diff(scores[both], prepend=-1))  # of runs of equal scores

    def statistic(weights):
        # Weights at each distinct score.
        ours, others = (np.add.reduceat(weights[:, both] * own, starts, axis=1) for own in (positive, ~positive))
        others_below = others.cumsum(axis=1) - others / 2
        return (ours * others_below).sum(axis=1) / (ours.sum(axis=1) * others.sum(axis=1))

    return statistic


def add_consistency(results, source, heads, uncertain):
    """Add how often each head fires (probability above 0.5) for each label, and how well it separates the labels."""
    # Generated: all images of each prompt. Real: those in the pool, which have the prompts' combinations of labels.
    rows_of = source.rows_of if source.name in ("synthetic", "base model") else source.pool
    rows_of = {label: rows for label, rows in rows_of.items() if label != "all"}
    labels = list(rows_of)
    may_have = positive_labels(source.table, labels, "zeros" if uncertain == "zeros" else "ones")
    scores = {head: source.probabilities[:, i] for i, head in enumerate(heads)}
    fires = {head: scores[head] > 0.5 for head in heads}
    no_head = "the classifier has no such head" if heads else "these --features have no heads; pass --classifier"
    margin_note, auroc_note = "recall minus false-fire rate", "against the other labels' images; 0.5 is chance"
    for label in labels:
        own, others = rows_of[label], np.unique(np.concatenate(list(rows_of.values())))
        others = others[~may_have[label].to_numpy()[others]]  # this also drops `own`
        metrics = [
            ("class_consistency", label, weighted_mean, fires.get(label), [own], None),
            ("class_consistency_margin", label, weighted_difference, fires.get(label), [own, others], margin_note),
            ("class_consistency_auroc", label, weighted_auroc, scores.get(label), [own, others], auroc_note),
            *(("fires", f"{label} -> {head}", weighted_mean, fires.get(head), [own], None) for head in labels),
        ]
        if label == "No Finding" and label in fires:
            alone = fires[label] & ~np.any([fires[head] for head in fires if head in labels and head != label], axis=0)
            metrics.append(("class_consistency_alone", label, weighted_mean, alone, [own], "no other head fires"))
        for metric, name, statistic, values, groups, note in metrics:
            if values is None:
                results.add(metric, None, name, n=len(own), note=no_head)
            elif not all(map(len, groups)):
                lacking = "of other labels to compare with" if len(own) else "with the label"
                results.add(metric, None, name, n=len(own), note=f"no image {lacking}")
            else:
                units = min(len(np.unique(source.patients[rows])) for rows in groups)
                results.add_image_metric(metric, statistic(values, *groups), name, units, n=len(own), note=note)
    for metric in ("class_consistency", "class_consistency_margin", "class_consistency_auroc") if labels else ():
        add_label_mean(results, metric, labels)


def add_label_mean(results, metric, labels):
    """Add the mean of a metric over the labels that have it, with the mean of their draws."""
    name = metric + results.suffix
    labels = [label for label in labels if results.find(name, label) is not None]
    if not labels:
        return results.add(metric, None, note="no label has a value")
    value = np.mean([results.find(name, label) for label in labels])
    draws = np.mean([results.draws[f"{name}/{label}"] for label in labels], axis=0)
    n = sum(results.find(name, label, "n") for label in labels)
    floors = [results.find(name, label, "floor") for label in labels]
    floor = None if None in floors else np.mean(floors)
    results.add(metric, value, draws=draws, units=n, n=n, floor=floor, note=f"mean of {len(labels)} labels")


def add_colour(results, source):
    colour, rows, units = source.colour[:, 0], np.arange(len(source.colour)), len(np.unique(source.patients))
    row = {"n": len(rows), "note": "mean difference between channels, 0 to 255"}
    results.add_image_metric("colour_mean", weighted_mean(colour, rows), **row)
    row["note"] = f"share of images whose difference is above {VISIBLE_COLOUR:g}"
    results.add_image_metric("colour_visible", weighted_mean(colour > VISIBLE_COLOUR, rows), units=units, **row)


def add_ms_ssim(results, source, plan, device, args):
    """Add the mean MS-SSIM of random pairs with the same prompt (Odena et al., 2017, arXiv 1610.09585).

    Real images, and generated ones without prompts, are paired by their labels instead.
    """
    what, groups = "labels", source.codes
    if source.name != "real" and (source.table["prompt"] != "").any():
        what, groups = "prompt", prompts_or_codes(source.table, source.codes).to_numpy()
    generator = np.random.default_rng(keyed_seed(args.seed, "pairs"))
    rows = generator.permutation(source.pool["all"])
    # One image of each patient makes pairs independent, so that draws may resample pairs.
    rows = generator.permutation(rows[np.unique(source.patients[rows], return_index=True)[1]])  # unique sorts
    rows = rows[np.argsort(groups[rows], kind="stable")]
    one, two = rows[: len(rows) // 2 * 2].reshape(-1, 2).T
    chosen = generator.permutation(np.flatnonzero(groups[one] == groups[two]))[:MAX_PAIRS]
    count = len(chosen)
    if count < MIN_PAIRS:
        note = f"too few images with the same {what}, or of too few patients"
        return results.add("ms_ssim", None, n=count, note=note)
    rows = np.concatenate([one[chosen], two[chosen]])
    hashes = source.table["hash"].iloc[rows].tolist()

    def compute():
        paths = source.table["image"].iloc[rows].tolist()
        decode = partial(load_image, resolution=PAIR_SIDE, resize_mode=plan.resize_mode)
        images = np.stack([image for _, image in decode_images(paths, decode, {}, "MS-SSIM")])
        gray = torch.from_numpy(images).to(device).float().mean(dim=3)[:, None] / 255
        options = {"reduction": "none", "data_range": 1.0}
        return multiscale_structural_similarity_index_measure(*gray.split(count), **options).cpu().numpy()

    values = remember(["ms_ssim", plan.resize_mode, PAIR_SIDE, hashes], compute, args)
    value, *draws = patient_weights(np.arange(count), range(1 + BOOTSTRAP_DRAWS)) @ values / count
    results.add("ms_ssim", value, draws=draws, n=count, note=f"pairs with the same {what}; lower is more varied")


def nearest(queries, reference, args):
    """Return each query's most similar reference row, and their cosine similarity."""

    def compute():
        index, distance = pairwise_distances_argmin_min(queries, reference, metric="cosine")
        return np.stack([index, 1 - distance])

    keys = [hashlib.sha256(np.ascontiguousarray(rows)).hexdigest() for rows in (queries, reference)]
    index, cosine = remember(["nearest", keys], compute, args)
    return index.astype(int), cosine


def nearer_to_training(generated, seen, unseen, patients, args):
    """Return the share of generated images that are nearer to a seen than to an unseen image, and its draws.

    Generated images are not independent, since a few real images are nearest to many of them. So draw under the null
    hypothesis of no memorisation: a coin decides for each patient (`patients`: of seen and of unseen images) which of
    the two it is. The draws' standard deviation is sqrt(sum of c²) / 2M for M generated images, of which c are nearest
    to a patient.
    """
    (seen_row, to_seen), (unseen_row, to_unseen) = (nearest(generated, rows, args) for rows in (seen, unseen))
    # An image may be in both sets, with cosines that differ by rounding.
    tie = np.abs(to_seen - to_unseen) < 1e-6
    share = np.where(tie, 0.5, to_seen > to_unseen).mean()
    names = np.unique(np.concatenate(patients))
    owner = np.where(to_seen > to_unseen, patients[0][seen_row], patients[1][unseen_row])
    times = np.bincount(np.searchsorted(names, owner[~tie]), minlength=len(names))
    generators = [np.random.default_rng(keyed_seed("bootstrap", k)) for k in range(BOOTSTRAP_DRAWS)]
    coins = np.array([generator.integers(2, size=len(names)) for generator in generators])
    return share, share + (coins - 0.5) @ times / len(generated)


def add_memorisation(results, generated, real, train, args):
    """Add whether generated images are nearer to training images than to unseen patients' images with the same labels.

    Compare by cosine similarity of features, and of centred thumbnails, since features can miss a copy. Return the
    nearest training rows and similarities, by kind, for plot_pairs.
    """
    note = "pass --train_csv"
    counts, n = Counter(), len(generated.table)
    if train:
        unseen = np.flatnonzero(~real.table["patient"].isin(train.patients))
        counts = Counter(train.codes) & Counter(real.codes[unseen])
        note = "no training image has the labels of a real image of another patient"
    if not counts:
        for metric in ("nearer_train", "suspects", "nearer_train_pixels", "suspects_pixels"):
            results.add(f"memorisation_{metric}", None, note=note)
        return {}
    seen = train.choose_combinations(np.arange(len(train.table)), counts, args.seed)
    unseen = real.choose_combinations(unseen, counts, args.seed)
    patients, pairs = (train.patients[seen], real.patients[unseen]), {}
    for kind, suffix in (("features", ""), ("thumbnails", "_pixels")):
        ours, trained, others = (getattr(source, kind) for source in (generated, train, real))
        share, draws = nearer_to_training(ours, trained[seen], others[unseen], patients, args)
        row = {"floor": 0.5, "note": f"{len(seen):,} training images against as many of other patients"}
        results.add(f"memorisation_nearer_train{suffix}", share, draws=draws, n=n, **row)
        row_of, cosine = pairs[kind] = nearest(ours, trained, args)
        _, unseen_cosine = nearest(others[unseen], trained, args)
        by_patient = np.sort(pd.Series(unseen_cosine).groupby(patients[1]).max())
        # Compare with a quantile over unseen patients: with their maximum, a single duplicate among them would hide
        # all copies. It is 99.9 % for thousands of patients; of fewer, leave out 1 %, at least one and at most three.
        count = len(by_patient)
        rank = max(0, count - 1 - max(1, min(3, count // 100), count // 1000))
        # Images of a collapsed generator are not independent: bootstrap groups with the same nearest training patient.
        groups = train.patients[row_of]
        suspect_share = weighted_mean(cosine > by_patient[rank], np.arange(n))
        share, *draws = suspect_share(patient_weights(groups, range(1 + BOOTSTRAP_DRAWS)))
        row = {"floor": (count - rank) / (count + 1)}
        row["note"] = f"nearer to a training image than {rank + 1:,} of {count:,} unseen patients are"
        results.add(f"memorisation_suspects{suffix}", share, draws=draws, units=len(set(groups)), n=n, **row)
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Scoring and results
# ---------------------------------------------------------------------------------------------------------------------


def score_sources(sources, networks, plan, classifier, args):
    """Score all sources. Return the Results of --synthetic, with the rows of all, and its nearest training images."""
    real, train, rows, draws, results = sources["real"], sources.get("train"), [], {}, {}
    for name, suffix in SUFFIXES.items():
        if name in sources:
            weights = patient_weights(sources[name].patients, range(1 + BOOTSTRAP_DRAWS))
            results[name] = Results(rows, draws, suffix, weights)
            add_consistency(results[name], sources[name], list(classifier.labels), args.uncertain)
            add_colour(results[name], sources[name])
            if name != "through the VAE":
                add_ms_ssim(results[name], sources[name], plan, classifier.device, args)
    n = {label: len(real.pool[label]) for label in ["all", *plan.labels]}  # as in the synthetic pool
    halves = [half_splits(real.sample(label), n[label], args)[1] for label in n]
    common = min([half for half in halves if half > 1], default=0)
    compared = [name for name in results if name != "real"]
    for name, label in tqdm(list(itertools.product(compared, n)), "scoring", unit="set", leave=False):
        add_set_metrics(results[name], real.sample(label), sources[name].sample(label), label, common, args)
    (first, _), *further = networks.items()
    plan.warnings += feature_warnings(first, real.features, n["all"], min(filter(None, n.values()), default=0))
    for tag, network in further:
        samples = {}
        for name in results:
            samples[name] = replace(sources[name], features=read_features(sources[name], network)[0]).sample("all")
        plan.warnings += feature_warnings(tag, samples["real"].features, n["all"])
        for name in compared:
            tagged = Results(rows, draws, SUFFIXES[name], None, f"@{tag}")
            add_set_metrics(tagged, samples["real"], samples[name], "all", common, args)
    if train and "base model" in sources:
        add_memorisation(results["base model"], sources["base model"], real, train, args)
    pairs = add_memorisation(results["synthetic"], sources["synthetic"], real, train, args)
    return results["synthetic"], pairs


def plot_consistency(results, labels, path):
    """Plot the share of each label's images for which each head fires, for generated and real images."""
    figure = Figure(figsize=(4 + 1.5 * len(labels), 3 + 0.75 * len(labels)))
    for axes, (title, suffix) in zip(figure.subplots(1, 2), (("generated", ""), ("real", "_real"))):
        shares = [[results.find(f"fires{suffix}", f"{label} -> {head}") for head in labels] for label in labels]
        matrix = ConfusionMatrixDisplay(100 * np.array(shares, float), display_labels=labels)
        form = {"cmap": "Blues", "values_format": ".0f", "colorbar": False, "im_kw": {"vmin": 0, "vmax": 100}}
        matrix.plot(ax=axes, xticks_rotation=60, **form)
        axes.set(title=f"{title} images for which a head fires, %", xlabel="head", ylabel="label")
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")


def plot_pairs(pairs, sources, plan, path):
    """Save the generated images nearest to training images, each above its match: by features, then by pixels."""
    lines, count = [], min(6, len(sources["synthetic"].table))
    for index, cosine in pairs.values():
        rows = np.argsort(-cosine, kind="stable")[:count]
        for name, positions in (("synthetic", rows), ("train", index[rows])):
            paths = sources[name].table["image"].iloc[positions]
            lines.append(np.hstack([load_image(path, plan.resolution, plan.resize_mode) for path in paths]))
    with replacing(path) as temporary:
        Image.fromarray(np.vstack(lines)).save(temporary)


def identify(args, plan, sources, features, classifier, vae):
    """Return what was compared, and how. Leave out times, so that the same command writes the same file."""
    images = {}
    for name, source in sources.items():
        images[name] = {label: len(rows) for label, rows in (source.pool or source.rows_of).items()}
        images[name]["fingerprint"] = hashlib.sha256("".join(source.table["hash"]).encode()).hexdigest()
    networks = [{"source": source, "fingerprint": f.key} for source, f in zip(args.features, features.values())]
    judge = {"source": args.classifier or args.features[0], "fingerprint": classifier.key, "labels": classifier.labels}
    if isinstance(classifier, ClassifierNetwork):
        judge["real_test_auroc"] = classifier.spec["real_test_auroc"]
    packages = "torch torchxrayvision transformers torchmetrics scikit-image scikit-learn vendi-score numpy scipy"
    return {
        "script": "eval_generation.py",
        "name": run_name(args.synthetic),
        "arguments": vars(args),
        "features": networks[0],
        "further_features": networks[1:],
        "classifier": judge,
        "vae_fingerprint": vae.key if vae else None,
        "pool": args.pool,
        "images": images,
        "resolution": plan.resolution,
        "resize_mode": plan.resize_mode,
        "warnings": plan.warnings,
        "versions": {name: version(name) for name in packages.split()},
    }


def write_results(args, plan, sources, identity, results, pairs):
    """Write all files; generation_metrics.json comes last, since it marks a finished run."""
    output_dir, real = Path(args.output_dir), sources["real"]
    # Remove the files of an earlier run, so that its values never stand beside the new draws.
    for name in ("generation_metrics.json", "consistency.png", "nearest_neighbours.png"):
        (output_dir / name).unlink(missing_ok=True)
    n = {label: results.find("fid", label, "n") for label in ["all", *plan.labels]}
    # Runs with the same draws_id can be compared draw by draw.
    pool = [real.table["name"].iloc[rows].tolist() for rows in real.pool.values()]
    shared = [args.seed, args.num_subsamples, BOOTSTRAP_DRAWS, n, pool, [*real.table["name"]], [*real.patients]]
    draws_id = hashlib.sha256(json.dumps(shared).encode()).hexdigest()
    with replacing(output_dir / "generation_draws.safetensors") as temporary:
        save_file(results.draws, temporary, {"draws_id": draws_id})
    if set(plan.labels) & set(identity["classifier"]["labels"]):
        plot_consistency(results, plan.labels, output_dir / "consistency.png")
    if pairs:
        plot_pairs(pairs, sources, plan, output_dir / "nearest_neighbours.png")
    summary = identity | {"results": results.rows + plan.counts}
    with replacing(output_dir / "generation_metrics.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    for note in plan.warnings:
        print(f"{'warning':>9}  {note}")
    table = pd.DataFrame(results.rows).pivot(index="label", columns="metric", values="value").loc[list(n)]
    print(table[["fid", "kid", "vendi", "class_consistency"] if plan.labels else ["fid", "kid", "vendi"]].to_string())
    print(f"{output_dir / 'generation_metrics.json'}: {len(summary['results']):,} rows", flush=True)


def main(args):
    transformers.utils.logging.disable_progress_bar()
    # Without `cpu`, processes that torchrun starts on a machine without a GPU would each compute everything.
    cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    # Processes that finish their images early wait for the others.
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))])
    features, classifier = load_networks(args, accelerator)
    plan = plan_evaluation(args, accelerator)
    plan.warnings += network_warnings(features, classifier, plan, args)
    vae = ThroughVAE(args, accelerator.device) if args.vae else None
    if vae:
        real = plan.tables["real"]
        rows = choose_rows(real, np.arange(len(real)), MAX_VAE_IMAGES, args.seed)
        if len(rows) < len(real):
            share = f"{len(rows):,} of {len(real):,} real images"
            plan.warnings.append(f"through the VAE: {share}; its FID is at a smaller n, so compare KID")
        hashes = [hashlib.sha256(f"{key}/{vae.key}".encode()).hexdigest() for key in real["hash"].iloc[rows]]
        plan.tables["through the VAE"] = real.iloc[rows].assign(hash=hashes).reset_index(drop=True)

    appearance, first = Appearance(), next(iter(features.values()))
    networks = list(dict.fromkeys([appearance, *features.values(), classifier]))
    for network in networks:
        network.folder = cache_folder(args) / f"{network.key[:32]}-{plan.resolution}-{plan.resize_mode}"
    try:
        problems = compute_features(accelerator, plan, networks, vae, args)
    except torch.OutOfMemoryError as error:
        fail(f"out of memory ({str(error)[:150]}); lower --batch_size")

    if accelerator.is_main_process:
        if problems:
            listed = "; ".join(problems[:20])
            fail(f"{len(problems):,} images cannot be used: {listed}; repair them or remove their rows")
        sources = make_sources(plan, args)
        for source in sources.values():
            load_features(source, appearance, first, classifier)
        results, pairs = score_sources(sources, features, plan, classifier, args)
        identity = identify(args, plan, sources, features, classifier, vae)
        write_results(args, plan, sources, identity, results, pairs)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
