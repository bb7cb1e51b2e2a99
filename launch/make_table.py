# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "numpy>=2.0", "pandas>=2.2.2", "pillow>=10.3", "tqdm>=4.67", "datasets>=4.0", "pydicom>=3", "python-gdcm>=3.0.24",
# ]
# ///
"""Turn a chest X-ray data set into the image table that the scripts read, with 8-bit images where needed.

    python launch/make_table.py --source nih --data_dir NIH
    python launch/make_table.py --source mimic --data_dir mimic-cxr-jpg mimic-tables
    python launch/make_table.py --source chexpert-plus --data_dir chexpert-plus --prompt_column section_impression
    python launch/make_table.py --source dicom --data_dir hospital --labels_csv hospital/findings.csv --size 1024

Writes table.csv to --output_dir. Images that the scripts can read stay where they are; DICOM, images of more than
8 bits and Hugging Face datasets are written beside the table as 8-bit PNG. Rerun an interrupted command to continue.
DICOM pixels go through the modality LUT and the VOI window, and MONOCHROME1 is inverted. Without a window, 8 bits
stay as they are, and of deeper pixels the 0.5th and 99.5th percentiles become black and white.

Synonyms of CheXpert's 14 labels are renamed to them. Patient ids are copied, so DICOM files that are not de-identified
put the hospital's own ids into the table.
"""

import argparse
import ast
import functools
import hashlib
import io
import itertools
import os
import re
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from tqdm.auto import tqdm

# Copied from train_full.LABELS
LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
).split(",")
# Synonyms of labels, simplified; VinDr spells its last label in two ways.
SYNONYMS = {"normal": "No Finding", "healthy": "No Finding", "nofindings": "No Finding"}
SYNONYMS |= {"effusion": "Pleural Effusion", "pulmonaryedema": "Edema", "otherdisease": "Other diseases"}
# What label columns hold, as text or as class names of a Hugging Face dataset.
STATES = dict.fromkeys(["1", "1.0", "true", "yes", "present", "positive"], "1")
STATES |= dict.fromkeys(["0", "0.0", "false", "no", "absent", "negative"], "0")
STATES |= dict.fromkeys(["-1", "-1.0", "uncertain"], "-1") | dict.fromkeys(["", "nan", "none", "unlabeled"], "")
# The table's columns besides labels, and simplified names of the columns they come from, in order of preference.
SOURCE_COLUMNS = {
    "patient_id": ["patientid", "subjectid", "deidpatientid"],
    "Frontal/Lateral": ["frontallateral"],
    "view": ["projection", "viewposition", "view"],  # becomes Frontal/Lateral and AP/PA
    "AP/PA": ["appa"],
    "Sex": ["sex", "gender", "patientsex", "patientgender", "patientsexdicom"],
    "Age": ["age", "patientage"],
    "split": ["split"],
    "prompt": ["prompt", "text", "caption"],
}
ALIASES = {alias for aliases in SOURCE_COLUMNS.values() for alias in aliases}
# View positions, simplified. Others, such as obliques, are neither frontal nor lateral.
FRONTAL = {"ap": "AP", "pa": "PA", "aphorizontal": "AP", "frontal": ""}
LATERAL = dict.fromkeys(["l", "ll", "rl", "lateral", "xtablelateral"], "Lateral")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(["val", "valid", "validate", "validation", "dev"], "val")
DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
READABLE = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]  # by the scripts
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", *DICOM_SUFFIXES)
NOT_RADIOGRAPHS = ["CT", "MR", "MG", "NM", "PT", "US", "XA", "SR", "PR", "KO", "SEG"]  # DICOM modalities
CONVERTED_PREFIX = "images-8bit-"  # of folders of converted images
DICOM_IDS = ["SOPInstanceUID", "StudyInstanceUID", "AccessionNumber"]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fail
def fail(message):
    """Print a one-line error to stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def window(text):
    """Convert "low,high" to two numbers."""
    low, high = map(float, text.split(","))
    if low >= high:
        raise ValueError
    return low, high


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    flag = parser.add_argument_group("data").add_argument
    flag("--source", required=True, choices=list(SOURCES), help="data set, or kind of data")
    flag("--data_dir", required=True, nargs="+", help="folders of images and tables; for hf a hub id or one folder")
    flag("--labels_csv", help="dicom, folder: table of labels (default: names of the class folders)")
    flag("--prompt_column", help="column to use as prompt, such as section_impression or Report")
    flag("--patient_regex", help="regular expression that finds the patient in a path, such as 'person[0-9]+'")
    flag("--val_fraction", type=float, default=0.1, help="share of train to make val if there is no val; 0: none")

    flag = parser.add_argument_group("images").add_argument
    flag("--size", type=int, default=512, help="maximum shorter side of written images in pixels; 0: no limit")
    flag("--window", type=window, metavar="LOW,HIGH", help="grey values to make black and white (default: see above)")
    flag("--on_bad_image", choices=["stop", "skip"], default="stop", help="what to do about unreadable images")
    flag("--num_workers", type=int, default=os.cpu_count(), help="processes")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", help="folder of table.csv and written images (default: data/<source>)")
    args = parser.parse_args(argv)
    if args.source == "hf" and len(args.data_dir) > 1:
        parser.error("--source hf takes one --data_dir")
    if args.labels_csv and args.source not in ("dicom", "folder"):
        parser.error(f"--labels_csv is for dicom and folder; {args.source} has tables of its own")
    for path in [*([] if args.source == "hf" else args.data_dir), *filter(None, [args.labels_csv])]:
        if not os.path.exists(path):
            parser.error(f"{path}: no such file or folder")
    if args.size < 0 or args.num_workers < 1 or not 0 <= args.val_fraction < 1:
        parser.error("--size must be at least 0, --num_workers at least 1, --val_fraction at least 0 and below 1")
    args.output_dir = args.output_dir or f"data/{args.source}"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Files and tables
# ---------------------------------------------------------------------------------------------------------------------


def simplify(name):
    """Return the letters and digits of a name, in lower case."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


@functools.cache
def label_name(name):
    """Return CheXpert's name for a label if it has one, else the label's own."""
    return ({simplify(label): label for label in LABELS} | SYNONYMS).get(simplify(name), str(name).strip())


def without_suffix(name):
    """Return a path without its image suffix, if it has one; DICOM UIDs contain dots too."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def is_dicom(path):
    """Return whether a path has a DICOM suffix or, without any image suffix, the file has DICOM's magic number."""
    if path.lower().endswith(IMAGE_SUFFIXES):
        return path.lower().endswith(DICOM_SUFFIXES)
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def list_files(args):
    """Return {path: path relative to the common parent of --data_dir}, without hidden files and converted images."""
    roots = [os.path.abspath(root) for root in args.data_dir]
    shared, files = os.path.commonpath(roots), {}
    for folder, subfolders, names in itertools.chain(*(os.walk(root, followlinks=True) for root in roots)):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX", CONVERTED_PREFIX)))
        paths = [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
        files |= {path: os.path.relpath(path, shared) for path in paths}
    return files


def read_table(path, **options):
    """Read a CSV, also .csv.gz, as strings, in UTF-8 or in cp1252, which spreadsheets on Windows write."""
    options |= {"dtype": str, "keep_default_na": False, "index_col": False, "skipinitialspace": True}
    if str(path).endswith("_list.txt"):  # NIH's, without a header
        options["names"] = ["Image Index"]
    if str(path).endswith(".json"):  # CheXpert Plus', one object a line
        table = pd.read_json(path, lines=True)
        return table.astype(object).where(table.notna(), "").astype(str)
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return pd.read_csv(path, encoding=encoding, **options).rename(columns=str.strip)
        except UnicodeDecodeError:
            continue
        except (ValueError, OSError, EOFError) as error:
            fail(f"{path}: not a readable CSV ({error})")
    fail(f"{path}: encoded neither in UTF-8 nor in cp1252")


def find_table(files, args, *patterns, needed=True):
    """Read a file that matches the first pattern with any match: the one nearest to the root."""
    for pattern in patterns:
        found = [path for path in files if fnmatch(os.path.basename(path).lower(), pattern.lower())]
        if found:
            return read_table(min(found, key=lambda path: (path.count(os.sep), path)))
    if needed:
        missing = f"no {' or '.join(patterns)} under {' or '.join(args.data_dir)}, which --source {args.source} needs"
        fail(f"{missing}; if it is elsewhere, pass both folders: --data_dir IMAGES TABLES")
    return None


def find_splits(files, args, tables):
    """Concatenate the tables {split: patterns}, of which only train must exist, and add a column `split`."""
    found = {split: find_table(files, args, *names, needed=split == "train") for split, names in tables.items()}
    parts = [part.rename(columns=label_name).assign(split=split) for split, part in found.items() if part is not None]
    return pd.concat(parts, ignore_index=True)


def find_images(files, names, depth=1):
    """Return the file of each name, or "". The last `depth` parts of the paths must agree, but not the suffixes.

    Tables may name the JPEG of what is here as PNG or DICOM. Of several files, DICOM is the last choice.
    """

    def key(path):
        return "/".join(without_suffix(path).split("/")[-depth:])

    found, repeated = {}, {}
    images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    for path in sorted(images, key=lambda path: path.lower().endswith(DICOM_SUFFIXES)):
        first = found.setdefault(key(path), path)
        if first != path:
            repeated[first] = path
    if repeated:
        taken, other = next(iter(repeated.items()))
        print(f"note: {len(repeated):,} images exist more than once; for example, using {taken}, not {other}")
    return names.map(key).map(found).fillna("")


def describe(raw, args, labels=None):
    """Rename a table's columns to those of the image table, and drop others.

    `labels` are its label columns; by default, all columns that hold nothing but 1, 0, -1 and blanks.
    """
    simplified = {simplify(name): name for name in reversed(raw.columns)}
    frame, taken = pd.DataFrame(index=raw.index), set()
    for name, aliases in SOURCE_COLUMNS.items():
        found = [simplified[alias] for alias in aliases if alias in simplified]
        taken.update(found)
        if name == "prompt" and args.prompt_column:
            found = [args.prompt_column]
            if args.prompt_column not in raw:
                fail(f"--prompt_column {args.prompt_column}: no such column; there are {', '.join(raw.columns)}")
        if found:
            frame[name] = raw[found[0]].str.split().str.join(" ")
    for column in raw.columns.difference(taken, sort=False) if labels is None else labels:
        name, cells = label_name(column), raw[column].str.strip().str.lower()
        unknown = ~cells.isin(STATES)
        if unknown.any() and (name in LABELS or labels is not None):
            row = int(unknown.argmax())
            fail(f"column {column!r}, row {row + 1}: {raw[column].iloc[row]!r} is not 1, 0, -1 or blank")
        if not unknown.any():
            frame[name if name not in frame else column] = cells.map(STATES)
    return frame


def one_hot(lists):
    """Turn a column of lists of label names into a table with 1 or 0 for each label."""
    names = lists.explode().dropna().map(label_name)
    return pd.get_dummies(names).groupby(level=0).max().reindex(lists.index, fill_value=False).astype(int).astype(str)


# ---------------------------------------------------------------------------------------------------------------------
# Sources. Each returns a table of SOURCE_COLUMNS, labels and `image`, which is a path, "" if the image is missing, or
# (dataset, column, row); and, if some rows cannot be used, `left_out`, which is the reason or "".
# ---------------------------------------------------------------------------------------------------------------------


def chexpert(files, args):
    """CheXpert, in one folder or as unpacked: "CheXpert-v1.0 batch 2 (train 1)/patient00001/…"."""
    tables = {"train": ["train.csv"], "val": ["valid.csv"], "test": ["test.csv", "test_labels.csv"]}
    raw = find_splits(files, args, tables).fillna("")
    frame = describe(raw, args)
    frame["view"] = raw["Path"].str.extract(r"_(frontal|lateral)\.\w+$", expand=False)
    frame["patient_id"] = raw["Path"].str.extract(r"(patient\d+)/", expand=False)
    return frame.assign(image=find_images(files, raw["Path"], depth=3))


def chexpert_plus(files, args):
    """CheXpert Plus, with CheXbert's labels, reports as --prompt_column, or both."""
    raw = find_table(files, args, "df_chexpert_plus*.csv*")
    labels = find_table(files, args, "impression_fixed.json", "report_fixed.json", needed=False)
    if labels is not None:
        raw = raw.merge(labels.drop_duplicates("path_to_image"), on="path_to_image", how="left").fillna("")
    frame = describe(raw, args, [] if labels is None else labels.columns.drop("path_to_image"))
    return frame.assign(image=find_images(files, raw["path_to_image"], depth=3))


def mimic(files, args):
    """MIMIC-CXR-JPG, or MIMIC-CXR with its tables. Sex and age need MIMIC-IV's patients.csv."""
    raw = find_table(files, args, "mimic-cxr-*-metadata.csv*")
    labels = find_table(files, args, "mimic-cxr-*-chexpert.csv*", "mimic-cxr-*-negbio.csv*")
    splits = find_table(files, args, "mimic-cxr-*-split.csv*", needed=False)
    patients = find_table(files, args, "patients.csv*", needed=False)
    raw = raw.merge(labels, on=["subject_id", "study_id"], how="left")
    if splits is not None:
        raw = raw.merge(splits[["dicom_id", "split"]], on="dicom_id", how="left")
    if patients is not None:
        raw = raw.merge(patients, on="subject_id", how="left")
        # anchor_age is the age in anchor_year; all of a patient's dates are shifted alike.
        years = pd.to_numeric(raw["StudyDate"].str[:4]) - pd.to_numeric(raw["anchor_year"])
        raw["age"] = (pd.to_numeric(raw["anchor_age"]) + years).astype(str)
    frame = describe(raw.fillna(""), args, labels.columns.drop(["subject_id", "study_id"]))
    return frame.assign(image=find_images(files, raw["dicom_id"]))


def nih(files, args):
    """NIH ChestX-ray14: labels between pipes; images in images_0*/images, or anywhere; the official test list."""
    raw = find_table(files, args, "Data_Entry_2017*.csv*")
    frame = describe(raw, args, []).join(one_hot(raw["Finding Labels"].str.split("|"))).assign(split="")
    for split, name in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        listed = find_table(files, args, name, needed=False)
        if listed is not None:
            frame["split"] = frame["split"].mask(raw["Image Index"].isin(listed["Image Index"]), split)
    return frame.assign(image=find_images(files, raw["Image Index"]))


def padchest(files, args):
    """PadChest: lists of labels, 16-bit PNG. Images that its table marks as unusable are left out."""
    raw = find_table(files, args, "PADCHEST*.csv*")
    lists = raw["Labels"].map(lambda text: ast.literal_eval(text) if text.startswith("[") else [])
    lists = lists.map(lambda names: [str(name).strip().lower() for name in names if str(name).strip()])
    labels = one_hot(lists)
    # "Unchanged" refers to an earlier report, so labels that are not listed may still be present.
    unchanged = labels.get("unchanged", pd.Series("0", raw.index)) == "1"
    labels = labels.mask(labels.eq("0") & unchanged.to_numpy()[:, None], "").drop(columns="exclude", errors="ignore")
    frame = describe(raw, args, []).join(labels)
    years = pd.to_numeric(raw["StudyDate_DICOM"].str[:4], "coerce") - pd.to_numeric(raw["PatientBirth"], "coerce")
    reasons = pd.Series("", raw.index).mask(lists.map(len) == 0, "without labels")
    unusable = lists.map(lambda names: "exclude" in names) | raw["Projection"].str.upper().eq("EXCLUDE")
    reasons = reasons.mask(unusable, "marked exclude")
    # It is unknown whether the PNG files of these have been inverted.
    reasons = reasons.mask(raw["PhotometricInterpretation_DICOM"] == "MONOCHROME1", "MONOCHROME1 as PNG")
    return frame.assign(Age=years.astype(str), left_out=reasons, image=find_images(files, raw["ImageID"]))


def vindr(files, args):
    """VinDr-CXR: the majority of three readers decides, ties are uncertain; the test set has consensus labels."""
    tables = {"train": ["image_labels_train.csv"], "test": ["image_labels_test.csv"]}
    votes = find_splits(files, args, tables).set_index("image_id")
    splits = votes.groupby(level=0)["split"].first()
    votes = votes[[name for name in votes if name not in ("split", "rad_id", "rad_ID")]].apply(pd.to_numeric)
    # 1 is a vote for a label and 0 is a vote against it. A label that a table lacks gets no votes and stays blank.
    balance = votes.replace(0, -1).groupby(level=0).sum(min_count=1)
    labels = np.sign(balance).replace({-1: 0, 0: -1}).map("{:.0f}".format, na_action="ignore").fillna("")
    frame = labels.assign(split=splits, view="PA").reset_index(names="image_id")
    return frame.assign(image=find_images(files, frame["image_id"])).drop(columns="image_id")


def rsna(files, args):
    """RSNA Pneumonia Detection, stage 2: boxes, whose Target means Lung Opacity, and a class per image."""
    labels = find_table(files, args, "stage_2_train_labels.csv").groupby("patientId")[["Target"]].max()
    labels.columns = ["Lung Opacity"]
    classes = find_table(files, args, "stage_2_detailed_class_info.csv", needed=False)
    if classes is not None:
        classes = classes.drop_duplicates("patientId").set_index("patientId")["class"]
        labels = labels.combine_first(one_hot(classes.map(lambda name: [name]))).fillna("")
    frame = labels.reset_index(names="patient_id")
    return frame.assign(image=find_images(files, frame["patient_id"]))


def folder(files, args):
    """Images, or DICOM files of any name, with --labels_csv or in class folders, also below train, val and test."""
    where, kind = " or ".join(args.data_dir), "DICOM files" if args.source == "dicom" else "images"
    wanted = is_dicom if args.source == "dicom" else lambda path: path.lower().endswith(IMAGE_SUFFIXES)
    frame = add_headers(pd.DataFrame({"image": list(filter(wanted, files)), "left_out": ""}, dtype=str), args)
    if frame.empty:
        fail(f"no {kind} under {where}")
    if args.labels_csv:
        return join_labels(frame, frame["image"].map(files).map(without_suffix), args)
    folders = frame["image"].map(lambda image: Path(files[image]).parts[:-1])
    splits = folders.map(lambda parts: next((part for part in parts if part.lower() in SPLITS), ""))
    classes = folders.map(lambda parts: [part for part in parts if part.lower() not in {*SPLITS, "images"}][:1])
    masks = folders.map(lambda parts: not {"mask", "masks"}.isdisjoint(map(str.lower, parts)))
    reasons = frame["left_out"].mask(classes.map(len) == 0, "in no class folder")
    names = classes[~masks].explode().dropna().unique()
    if len(names) < 2:
        found = f"only the class folder {names[0]}" if len(names) else "no class folders"
        fail(f"{found} under {where}; pass the folder that holds the class folders, or the labels as --labels_csv")
    return frame.assign(split=splits, left_out=reasons.mask(masks, "segmentation masks")).join(
        one_hot(classes.mask(masks))
    )


def join_labels(frame, names, args):
    """Join --labels_csv on paths or file names (`names` are ours, without suffix) or on a DICOM identifier."""
    raw = read_table(args.labels_csv, sep=None, engine="python")
    ours = dict.fromkeys(["filename", "path", "image", "imageid", "file"], names)
    ours |= {simplify(name): frame[name] for name in [*DICOM_IDS, "patient_id"] if name in frame}
    keys = [column for column in raw if simplify(column) in ours]
    for column, shorten in itertools.product(keys, (str, os.path.basename)):
        listed = raw[column].map(without_suffix).map(shorten)
        images = ours[simplify(column)].map(shorten)
        if images.isin(listed).any():
            break
    else:
        expected = "file_name, or for DICOM SOPInstanceUID, StudyInstanceUID, AccessionNumber or patient_id"
        fail(f"{args.labels_csv}: no column names any of the {len(frame):,} images; expected {expected}")
    if listed.duplicated().any():
        name = listed[listed.duplicated()].iloc[0]
        fail(f"{args.labels_csv}: column {column!r} lists {name} more than once; keep one row")
    # Images of a patient or study may share a row.
    if ours[simplify(column)] is names and images.duplicated().any():
        name = images[images.duplicated()].iloc[0]
        fail(
            f"{args.labels_csv}: {name} in column {column!r} matches several images; use paths relative to --data_dir"
        )
    labels = describe(raw.drop(columns=[key for key in keys if simplify(key) != "patientid"]), args)
    known = {*keys, *ALIASES, args.prompt_column}
    unused = [name for name in raw if label_name(name) not in labels and not {name, simplify(name)} & known]
    print(f"note: {(~listed.isin(images)).sum():,} rows of {args.labels_csv} have no image")
    print(f"note: columns of {args.labels_csv} that are not used: {', '.join(unused) or 'none'}")
    labels = labels.set_index(listed).reindex(images).set_index(frame.index).fillna("")
    reasons = frame["left_out"]
    reasons = reasons.mask((reasons == "") & ~images.isin(listed), f"without a row in {args.labels_csv}")
    return frame.drop(columns=labels.columns.intersection(frame.columns)).join(labels).assign(left_out=reasons)


def hf(files, args):
    """A Hugging Face dataset: label columns, and classes or lists of classes by their names."""
    import datasets

    (name,), parts, images, classes = args.data_dir, [], [], []
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # connection errors and malformed files can raise anything
        fail(f"--data_dir {name}: cannot be loaded as a Hugging Face dataset ({str(error)[:300]})")
    features = next(iter(splits.values())).features
    kinds = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    image = next((column for column, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        fail(f"--data_dir {name}: none of its columns ({', '.join(kinds)}) holds images")
    for split, dataset in splits.items():
        part = dataset.remove_columns(image).to_pandas()
        part = part.apply(lambda cells: cells.map(functools.partial(class_names, kind=kinds[cells.name])))
        parts.append(part.assign(split=split))
        encoded = dataset.select_columns(image).cast_column(image, datasets.Image(decode=False))
        images += [(encoded, image, row) for row in range(len(dataset))]
    raw = pd.concat(parts, ignore_index=True)
    for column, kind in kinds.items():
        is_list, simple = kind is not features[column], simplify(column)
        has_classes = not {name.lower() for name in getattr(kind, "names", [])} <= {*STATES}
        is_classes = is_list or has_classes or simple in ("label", "labels", "findinglabels")
        if is_classes and column != image and simple not in ALIASES:
            classes.append(column)
    frame = describe(raw.drop(columns=classes), args).assign(image=images)
    names = [f"{split}/{row:07}" for split, (_, _, row) in zip(raw["split"], images)]
    lists = raw[classes].agg("|".join, axis=1).str.split("|") if classes else pd.Series([[]] * len(raw))
    labels = one_hot(lists.map(lambda names: [name for name in names if name]))
    return frame.join(labels.drop(columns=frame.columns, errors="ignore")).assign(name=names)


def class_names(cell, kind):
    """Return a dataset's cell as text: classes by their names, several with pipes between them."""
    cells = list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else [cell]
    cells = [value for value in cells if not pd.isna(value)]
    if hasattr(kind, "int2str"):
        cells = [kind.int2str(int(value)) for value in cells if value >= 0]  # -1 means unknown
    return "|".join(map(str, cells))


SOURCES = {"chexpert": chexpert, "chexpert-plus": chexpert_plus, "mimic": mimic, "nih": nih, "padchest": padchest}
SOURCES |= {"vindr": vindr, "rsna": rsna, "folder": folder, "dicom": folder, "hf": hf}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def run_parallel(function, items, total, label, args):
    """Yield function(item) in order, from --num_workers processes, with a progress bar."""
    executor = ProcessPoolExecutor(args.num_workers, mp_context=get_context("spawn"))
    with executor as pool, tqdm(total=total, desc=label, unit="image", disable=not total) as bar:
        apply = map if args.num_workers == 1 else pool.map
        try:
            # In chunks, since the items may be whole images.
            while chunk := list(itertools.islice(items, 16 * args.num_workers)):
                for result in apply(function, chunk):
                    yield result
                    bar.update()
        except BrokenProcessPool:
            fail("a process was killed, probably because it ran out of memory; pass a smaller --num_workers")


def add_headers(frame, args):
    """Fill in patient, view, sex and age from DICOM headers where the source's tables lack them."""
    paths = frame["image"][[isinstance(image, str) and image != "" and is_dicom(image) for image in frame["image"]]]
    if paths.empty:
        return frame
    try:
        import pydicom.pixels  # noqa: F401
    except ImportError:
        fail(f"{paths.iloc[0]} is DICOM, which needs two packages: pip install 'pydicom>=3' 'python-gdcm>=3.0.24'")
    headers = run_parallel(read_header, iter(paths), len(paths), "reading headers", args)
    headers = pd.DataFrame(list(headers), index=paths.index).fillna("")
    if len(headers) > 1 and "patient_id" in headers and headers["patient_id"].nunique() == 1:
        print("note: all DICOM files have the same PatientID, which is therefore not used")
        headers["patient_id"] = ""
    headers = headers.reindex(frame.index).fillna("")
    for name in headers:
        ours = frame.get(name, pd.Series("", frame.index)).fillna("")
        frame = frame.assign(**{name: ours.where(ours != "", headers[name])})
    return frame


def read_header(path):
    """Return what the table takes from a DICOM file's header, or why the file is left out."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:  # pydicom can raise anything on a malformed file
        return {"left_out": f"unreadable: {path}: {error}"}
    if "Rows" not in header or header.get("Modality") in NOT_RADIOGRAPHS:
        return {"left_out": f"not radiographs ({header.get('Modality') or 'no pixels'})"}
    names = {"PatientID": "patient_id", "ViewPosition": "view", "PatientSex": "Sex", "PatientAge": "Age"}
    names |= {name: name for name in DICOM_IDS}
    return {ours: str(header.get(name) or "").strip() for name, ours in names.items()}


def to_grey(pixels, limits=None):
    """Scale pixels from the limits, by default the 0.5th and 99.5th percentiles, to 0 and 255."""
    pixels = pixels.astype(np.float32)
    low, high = limits or np.percentile(pixels, (0.5, 99.5))
    if not low < high:  # also with NaN pixels
        raise ValueError("has a single grey value")
    return ((pixels - low) * (255 / (high - low))).clip(0, 255)


def read_dicom(path, limits):
    """Return a DICOM image as it is to be displayed: grey values from 0 to 255, (H, W)."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    file = pydicom.dcmread(path)
    stored = file.pixel_array
    if int(file.get("NumberOfFrames") or 1) > 1:
        raise ValueError("has more than one frame")
    if stored.ndim == 3 and stored.dtype == np.uint8:  # a color screenshot
        return np.asarray(Image.fromarray(stored).convert("L"))
    if file.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"has photometric interpretation {file.PhotometricInterpretation}")
    pixels = apply_modality_lut(stored, file)
    shown = pixels if limits else apply_voi_lut(pixels, file)
    if shown is not pixels and shown.dtype.kind == "f":  # a window; find the ends of its output far outside of it
        with np.errstate(over="ignore"):
            limits = tuple(apply_voi_lut(np.array([-1e9, 1e9]), file))
        shown, limits = (shown - limits[0]) / (limits[1] - limits[0]), (0.0, 1.0)  # a negative slope swaps them
    elif shown is not pixels:  # a lookup table
        entries, first, bits = file.VOILUTSequence[0].LUTDescriptor
        if bits == 8 and not 0 < entries <= 256:  # pydicom 3.0 takes the values modulo 256
            raise ValueError("has a VOI LUT of 8 bits with more than 256 entries; pass --window")
        outputs = apply_voi_lut(np.arange(first, first + (entries or 2**16)), file)
        limits = float(outputs.min()), float(outputs.max())
    elif not limits and stored.dtype == np.uint8 and np.array_equal(pixels, stored):  # 8 bits, not rescaled
        limits = 0, 255
    grey = to_grey(shown, limits)
    return 255 - grey if file.PhotometricInterpretation == "MONOCHROME1" else grey


def read_image(file, limits):
    """Return grey values from 0 to 255, (H, W), or None if the scripts can read the file at this path themselves."""
    with Image.open(file) as opened:
        tags = getattr(opened, "tag_v2", {})
        # As in the scripts' load_image.
        deep = opened.mode[0] in "IF" or max(tags.get(258, [8])) > 8 or ";16" in str(opened.tile)
        if getattr(opened, "n_frames", 1) > 1:
            raise ValueError("has more than one frame")
        if not deep and opened.format in READABLE and isinstance(file, str):
            return None
        upright = ImageOps.exif_transpose(opened)
        if not deep:
            return np.asarray(upright.convert("L"))
        if opened.mode[0] not in "IF":
            raise ValueError("has more than 8 bits per channel in color")
        grey = to_grey(np.asarray(upright), limits)
        return 255 - grey if tags.get(262) == 0 else grey  # WhiteIsZero in a TIFF, which Pillow does not invert


def convert_image(job):
    """Write an image as PNG unless the scripts can read it. Return whether it was written, and the problem or ""."""
    image, target, size, limits = job
    try:
        if isinstance(image, str) and is_dicom(image):
            pixels = read_dicom(image, limits)
        else:
            pixels = read_image(image if isinstance(image, str) else io.BytesIO(image), limits)
        if pixels is None:
            return False, ""
        grey = Image.fromarray(pixels.astype(np.float32))
        scale = min(1.0, size / min(grey.size)) if size else 1.0
        grey = grey.resize([round(scale * side) for side in grey.size], Image.Resampling.LANCZOS)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).save(f"{target}.tmp", format="PNG")
        os.replace(f"{target}.tmp", target)
    except Exception as error:  # Pillow and pydicom can raise anything on a malformed file
        return False, f"unreadable: {image if isinstance(image, str) else target}: {error}"
    return True, ""


def encoded_image(image):
    """Return what can be sent to a process: a path, or for a row of a Hugging Face dataset the file's bytes."""
    if isinstance(image, str):
        return image
    dataset, column, row = image
    encoded = dataset[row][column] or {"bytes": b""}
    return Path(encoded["path"]).read_bytes() if encoded["bytes"] is None else encoded["bytes"]


def convert_images(frame, args):
    """Return the final path of each image, and the problem with it or ""."""
    limits = "".join(f"-{limit:g}" for limit in args.window or ())
    folder = Path(args.output_dir) / f"{CONVERTED_PREFIX}{args.size}{limits}"  # one for each --size and --window
    names = frame["name"].map(without_suffix)
    names = names.where(~names.duplicated(keep=False), frame["name"])
    targets = [f"{folder / name}.png" for name in names]
    waiting = [i for i, target in enumerate(targets) if not os.path.exists(target)]
    jobs = ((encoded_image(frame["image"].iloc[i]), targets[i], args.size, args.window) for i in waiting)
    paths, problems = [*targets], [""] * len(targets)
    results = run_parallel(convert_image, jobs, len(waiting), "checking and converting", args)
    for i, (written, problem) in zip(waiting, results):
        paths[i] = targets[i] if written else frame["image"].iloc[i]
        problems[i] = problem
    return pd.Series(paths, frame.index), pd.Series(problems, frame.index)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def age_in_years(text):
    """Return an age such as 57, 057Y or 003M in whole years, or "" if invalid or above 120, as some of NIH's are."""
    found = re.fullmatch(r"(\d+)(?:\.\d+)?\s*([YMWD]?)", text.strip().upper())
    if not found:
        return ""
    age = int(found[1]) // {"M": 12, "W": 52, "D": 365}.get(found[2], 1)
    return str(age) if age <= 120 else ""


def drop_rows(frame, left_out, args):
    """Drop and count rows with a reason in left_out. Fail on unreadable images unless --on_bad_image skip."""
    reasons = frame["left_out"]
    unreadable = reasons[reasons.str.startswith("unreadable: ")].str.removeprefix("unreadable: ")
    if len(unreadable) and args.on_bad_image == "stop":
        listed = "; ".join(unreadable[:5]) + ("; …" if len(unreadable) > 5 else "")
        fail(f"{len(unreadable):,} images cannot be read; repair them or pass --on_bad_image skip: {listed}")
    left_out.update(reasons[reasons != ""].mask(reasons.str.startswith("unreadable: "), "unreadable"))
    if (reasons != "").all():
        fail(f"no images left: {', '.join(f'{count:,} {reason}' for reason, count in left_out.items())}")
    return frame[reasons == ""].reset_index(drop=True)


def label_columns(frame):
    return frame.columns.difference([*SOURCE_COLUMNS, *DICOM_IDS, "image", "name", "left_out", "file_name"])


def standardize(frame, args):
    """Return the image table, with values in the form that the scripts expect and without blank columns."""
    text = frame.reindex(columns=list(SOURCE_COLUMNS), fill_value="").fillna("").astype(str)
    view = text.pop("view").map(simplify)
    from_view = view.map(dict.fromkeys(FRONTAL, "Frontal") | LATERAL).fillna("")
    text["Frontal/Lateral"] = text["Frontal/Lateral"].str.title().where(text["Frontal/Lateral"] != "", from_view)
    text["AP/PA"] = text["AP/PA"].where(text["AP/PA"] != "", view.map(FRONTAL).fillna(""))
    text["Sex"] = text["Sex"].str.upper().str[:1].map({"M": "Male", "F": "Female"}).fillna("")
    text["Age"] = text["Age"].map(age_in_years)
    if not {"train", "test"} <= set(text["split"]):
        text["split"] = ""
    elif "val" not in set(text["split"]):
        patients = text["patient_id"].where(text["patient_id"] != "", frame["name"])
        place = patients.map(lambda name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32)
        text["split"] = text["split"].mask((text["split"] == "train") & (place < args.val_fraction), "val")
    labels = label_columns(frame)
    labels = [*(name for name in LABELS if name in labels), *(name for name in labels if name not in LABELS)]
    table = frame[["file_name"]].join(text).join(frame[labels].fillna(""))
    return table.loc[:, (table != "").any()]


def print_summary(table, frame, left_out, args):
    """Print rows, patients, splits, views, label counts, images, and what was left out."""

    def values(column, missing):
        counts = table[column].value_counts().items() if column in table else []
        return ", ".join(f"{value or 'unknown'} {count:,}" for value, count in counts) or missing

    def label_counts(names):
        counts = [((table[name] == "1").sum(), (table[name] == "-1").sum(), name) for name in names]
        counts = sorted(counts, key=lambda entry: -entry[0])
        named = [f"{name} {yes:,}" + (f" (+{maybe:,} uncertain)" if maybe else "") for yes, maybe, name in counts]
        return ", ".join(named[:20]) + (f" and {len(named) - 20:,} more" if len(named) > 20 else "")

    others = [name for name in table if name not in [*LABELS, *SOURCE_COLUMNS, "file_name"]]
    written = (frame["file_name"] != frame["image"]).sum()
    splits = values("split", "no test images marked; the scripts split by patient")
    if "split" in table and "val" not in set(frame["split"]) and args.val_fraction:
        splits += f" (val is {args.val_fraction:g} of the training patients, chosen here)"
    views = values("Frontal/Lateral", "not known; the scripts take all as frontal")
    views += "; the scripts use the frontal ones" if ", " in views else ""
    patients = table["patient_id"].nunique() if "patient_id" in table else "not known"
    lines = {"rows": f"{len(table):,}, patients: {patients}", "splits": splits, "views": views}
    lines["labels"] = label_counts([name for name in table if name in LABELS]) or "none of CheXpert's 14"
    if others:
        lines["others"] = f"{label_counts(others)}; to use them, pass --labels"
    if "prompt" in table:
        lines["prompts"] = f"{(table['prompt'] != '').sum():,}"
    lines["images"] = f"{written:,} written, {len(table) - written:,} used where they are"
    lines["left out"] = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "nothing"
    lines["wrote"] = Path(args.output_dir) / "table.csv"
    print("\n".join(f"{name:>9}  {text}" for name, text in lines.items()))


def main(args):
    output, left_out = Path(args.output_dir) / "table.csv", Counter()
    if output.exists():
        fail(f"{output} exists already; delete it or pass another --output_dir")
    files = {} if args.source == "hf" else list_files(args)
    frame = SOURCES[args.source](files, args)
    present = frame["image"].map(bool)
    if not present.any():
        fail(f"none of the {len(frame):,} images in the tables are under {' or '.join(args.data_dir)}")
    if args.source not in ("folder", "dicom", "hf"):
        frame = add_headers(frame, args)
    reasons = frame.get("left_out", pd.Series("", frame.index)).fillna("")
    reasons = reasons.mask((reasons == "") & ~present, "without an image file")
    frame["split"] = frame.get("split", pd.Series("", frame.index)).fillna("").str.lower().map(SPLITS).fillna("")
    if {"train", "test"} <= set(frame["split"]):
        reasons = reasons.mask((reasons == "") & (frame["split"] == ""), "in no split")
    frame = drop_rows(frame.assign(left_out=reasons), left_out, args)
    if not (frame.reindex(columns=[*label_columns(frame), "prompt"], fill_value="").fillna("") != "").any(axis=None):
        fail(f"no labels and no prompts in what --source {args.source} reads; pass --prompt_column or other labels")
    if "name" not in frame:
        frame["name"] = frame["image"].map(files)
    if args.patient_regex:
        frame["patient_id"] = frame["name"].str.extract(f"({args.patient_regex})")[0].fillna("")
        if (frame["patient_id"] == "").any():
            without = frame["name"][frame["patient_id"] == ""].iloc[0]
            fail(f"--patient_regex {args.patient_regex} finds no patient in {without}")
    frame["file_name"], frame["left_out"] = convert_images(frame, args)
    frame = drop_rows(frame, left_out, args)
    table = standardize(frame, args)
    here = os.path.realpath(args.output_dir)
    table["file_name"] = [os.path.relpath(os.path.realpath(path), here) for path in table["file_name"]]
    output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(output.with_suffix(".tmp"), index=False)
    os.replace(output.with_suffix(".tmp"), output)
    print_summary(table, frame, left_out, args)


if __name__ == "__main__":
    main(parse_args())
