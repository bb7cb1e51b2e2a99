# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "numpy>=1.26", "pandas>=2.2", "pillow>=10.3", "tqdm>=4.66", "datasets>=4.0", "pydicom>=3", "python-gdcm>=3.0.24",
# ]
# ///
"""Turn a chest X-ray data set into the image table that the scripts read, with 8-bit images where needed.

    python launch/make_table.py --source nih --data_dir NIH
    python launch/make_table.py --source mimic --data_dir mimic-cxr-jpg mimic-tables
    python launch/make_table.py --source chexpert-plus --data_dir chexpert-plus --prompt_column section_impression
    python launch/make_table.py --source dicom --data_dir hospital --labels_csv hospital/findings.csv --size 1024

Writes table.csv to --output_dir. Images that the scripts can read stay where they are, and the table points to them.
DICOM, deeper images and those of Hugging Face datasets are written to converted/ beside the table, as 8-bit PNG; an
interrupted run continues there. DICOM pixels go through the file's modality LUT and VOI window; without a window, the
0.5th to the 99.5th percentile of the image become black to white. MONOCHROME1 is inverted.

Labels that mean the same as one of CheXpert's 14 take its name. Patient ids are copied as they are; DICOM files that
are not de-identified have the hospital's own.
"""

import argparse
import ast
import gzip
import io
import itertools
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatch
from hashlib import sha256
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
# Other names for one of the 14, and for VinDr's label that has two; all simplified.
SYNONYMS = {"normal": "No Finding", "healthy": "No Finding", "nofindings": "No Finding"}
SYNONYMS |= {"effusion": "Pleural Effusion", "pulmonaryedema": "Edema", "otherdisease": "Other diseases"}
# What cells of label columns, and the class names of such columns in Hugging Face datasets, stand for.
STATES = {"1": "1", "1.0": "1", "true": "1", "yes": "1", "present": "1", "positive": "1"}
STATES |= {"0": "0", "0.0": "0", "false": "0", "no": "0", "absent": "0", "negative": "0"}
STATES |= {"-1": "-1", "-1.0": "-1", "uncertain": "-1", "": "", "nan": "", "none": "", "unlabeled": "", "blank": ""}
# Simplified names of the columns that become a column of the table, in order of preference.
COLUMNS = {
    "patient_id": ["patientid", "subjectid", "deidpatientid"],
    "view": ["projection", "viewposition", "view"],
    "Frontal/Lateral": ["frontallateral"],
    "AP/PA": ["appa"],
    "Sex": ["sex", "gender", "patientsex", "patientgender", "patientsexdicom"],
    "Age": ["age", "patientage"],
    "split": ["split"],
    "prompt": ["prompt", "text", "caption"],
}
# Simplified view positions: DICOM's, MIMIC's and PadChest's. Others, such as obliques, are neither.
FRONTAL = {"ap": "AP", "pa": "PA", "aphorizontal": "AP", "frontal": ""}
LATERAL = {"l", "ll", "rl", "lateral", "xtablelateral"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val"}
SPLITS |= {"validation": "val", "dev": "val", "test": "test", "testing": "test"}
DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
# The formats that the scripts read, and others that Pillow can convert.
READABLE = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", *DICOM_SUFFIXES)
# Modalities that archives hold beside radiographs.
NOT_RADIOGRAPHS = {"CT", "MR", "MG", "NM", "PT", "US", "XA", "SR", "PR", "KO", "SEG"}


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fail
def fail(message):
    """Print a one-line error to stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def parse_window(text):
    """Convert "low,high" to two numbers."""
    low, high = (float(number) for number in text.split(","))
    if low >= high:
        raise ValueError
    return low, high


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    flag = parser.add_argument_group("data").add_argument
    flag("--source", required=True, choices=list(SOURCES), help="data set, or kind of data")
    flag("--data_dir", required=True, nargs="+", help="folders with its images and tables; for hf, hub id or folder")
    flag("--labels_csv", help="for dicom and folder: table of labels (default: the names of the class folders)")
    flag("--prompt_column", help="column to use as prompt, such as section_impression or Report")
    flag("--patient_regex", help="takes the patient from each image's path: its first group, or all that matches")
    flag(
        "--val_fraction", type=float, default=0.1, help="training patients moved to val if a source has none; 0: none"
    )

    flag = parser.add_argument_group("images").add_argument
    flag("--size", type=int, default=512, help="shorter side of converted images in pixels; 0: as they are")
    flag(
        "--window", type=parse_window, metavar="LOW,HIGH", help="grey values for black and white, for all deep images"
    )
    flag("--on_bad_image", choices=["stop", "skip"], default="stop", help="what to do about unreadable images")
    flag("--num_workers", type=int, default=os.cpu_count(), help="processes")

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", help="folder of table.csv and converted images (default: data/<source>)")
    args = parser.parse_args(argv)
    if args.source == "hf" and len(args.data_dir) > 1:
        parser.error("--source hf takes one --data_dir")
    for folder in args.data_dir:
        if args.source != "hf" and not os.path.isdir(folder):
            parser.error(f"{folder}: no such folder")
    if args.labels_csv and args.source not in ("dicom", "folder"):
        parser.error(f"--labels_csv is for dicom and folder; {args.source} has tables of its own")
    if args.labels_csv and not os.path.isfile(args.labels_csv):
        parser.error(f"{args.labels_csv}: no such file")
    if args.size < 0 or args.num_workers < 1 or not 0 <= args.val_fraction < 1:
        parser.error("--size must not be negative, --num_workers at least 1, --val_fraction from 0 to below 1")
    args.output_dir = args.output_dir or f"data/{args.source}"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Files and tables
# ---------------------------------------------------------------------------------------------------------------------


def simplify(name):
    """Return a name in lower case, without anything but letters and digits."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def label_name(name):
    """Return CheXpert's name for a label that is one of the 14, else its own."""
    return ({simplify(label): label for label in LABELS} | SYNONYMS).get(simplify(name), str(name).strip())


def without_suffix(name):
    """Return a path without an image suffix. Other dots stay, as in DICOM's UIDs."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def list_files(args):
    """Return {path: path relative to its --data_dir} of all files, except hidden ones and this script's own."""
    files, seen, own = {}, set(), os.path.realpath(Path(args.output_dir) / "converted")
    for root in args.data_dir:
        prefix = os.path.basename(os.path.abspath(root)) if len(args.data_dir) > 1 else ""
        for folder, subfolders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real == own or real in seen:  # a link can lead back to where it is
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
            for name in sorted(name for name in names if not name.startswith(".")):
                path = os.path.join(folder, name)
                files[path] = os.path.join(prefix, os.path.relpath(path, root))
    return files


def find_table(files, *patterns):
    """Return the first file whose name matches one of the patterns, tried in order; None if there is none."""
    for pattern in patterns:
        found = [path for path in files if fnmatch(os.path.basename(path).lower(), pattern.lower())]
        if found:
            return min(found, key=lambda path: (path.count(os.sep), path))
    return None


def read_table(path, **options):
    """Read a CSV, which may be gzipped, as strings. Spreadsheets of European hospitals are often in cp1252."""
    options = {"dtype": str, "keep_default_na": False, "index_col": False, "skipinitialspace": True} | options
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        content = file.read()
    try:
        content.decode("utf-8")
        encoding = "utf-8-sig"
    except UnicodeDecodeError:
        encoding = "cp1252"
    try:
        return pd.read_csv(io.BytesIO(content), encoding=encoding, **options).rename(columns=str.strip)
    except ValueError as error:
        fail(f"{path}: not a readable CSV ({error})")


def need_table(files, args, *patterns):
    """Read the table that a source cannot do without."""
    path = find_table(files, *patterns)
    if path is None:
        where = " or ".join(args.data_dir)
        fail(f"no {' or '.join(patterns)} under {where}; pass its folder too: --data_dir IMAGES TABLES")
    return read_table(path)


def find_images(files, names, depth=1):
    """Return the file of each image name, "" if there is none, by the last `depth` parts of the path.

    Suffixes may differ, as for tables that name the JPEG of what was downloaded as DICOM. If a data set is there in
    both, DICOM comes second.
    """

    def key(path):
        return "/".join(Path(without_suffix(path)).parts[-depth:])

    found, repeated = {}, set()
    images = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    for path in sorted(images, key=lambda path: path.lower().endswith(DICOM_SUFFIXES)):
        if found.setdefault(key(path), path) != path:
            repeated.add(key(path))
    paths = names.map(key).map(found).fillna("")
    count = len(repeated & set(names.map(key)))
    if count:
        print(f"note: {count:,} images are found more than once; taking {found[min(repeated)]}, not its namesakes")
    return paths


def map_labels(column, name, must=False):
    """Return a column's cells as "1", "0", "-1" or "", or None if some are none of these (exit if it `must` not)."""
    states = column.str.strip().str.lower().map(STATES)
    if states.isna().any() and must:
        row = int(states.isna().argmax())
        fail(f"column {name!r}, row {row + 1}: {column.iloc[row]!r} is not 1, 0, -1 or blank")
    return None if states.isna().any() else states


def describe(raw, args, keys=()):
    """Return a table's columns under the names of the image table: patient, view, sex, age, split, prompt, labels.

    Label columns are those that hold nothing but 1, 0, -1 and blanks. `keys` are columns that are used otherwise.
    """
    simplified = {simplify(name): name for name in reversed(raw.columns)}
    frame, taken = pd.DataFrame(index=raw.index), set(keys)
    for name, aliases in COLUMNS.items():
        column = next((simplified[alias] for alias in aliases if alias in simplified), None)
        if name == "prompt" and args.prompt_column:
            column = args.prompt_column
            if column not in raw:
                fail(f"--prompt_column {column}: no such column; there are {', '.join(raw.columns)}")
        if column is not None:
            frame[name] = raw[column].str.split().str.join(" ")
        taken |= {simplified[alias] for alias in aliases if alias in simplified}
    for column in raw.columns.drop(list(taken & set(raw.columns))):
        name = label_name(column)
        labels = map_labels(raw[column], column, must=name in LABELS)
        if labels is not None and (labels != "").any():
            frame[name if name not in frame else column] = labels
    return frame


def one_hot(lists):
    """Return a 1/0 table of a column of lists of label names."""
    names = lists.explode().dropna().map(label_name)
    return pd.get_dummies(names).groupby(level=0).max().reindex(lists.index, fill_value=False).astype(int).astype(str)


def is_dicom(path):
    """Return whether a path has a DICOM suffix or the file has DICOM's magic number."""
    if path.lower().endswith(IMAGE_SUFFIXES):
        return path.lower().endswith(DICOM_SUFFIXES)
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


# ---------------------------------------------------------------------------------------------------------------------
# Sources. Each returns a table with a column `image`: a path, "" if there is none, or (dataset, column, row). The other
# columns are those of the image table (`view` becomes Frontal/Lateral and AP/PA), `left_out` (why a row is not used)
# and `problem` (why an image cannot be read).
# ---------------------------------------------------------------------------------------------------------------------


def chexpert(files, args):
    """CheXpert as unpacked: one folder, or "CheXpert-v1.0 batch N (…)" folders with the patients' folders in them."""
    tables = {"train": ["train.csv"], "val": ["valid.csv"], "test": ["test.csv", "test_labels.csv"]}
    found = {split: find_table(files, *patterns) for split, patterns in tables.items()}
    if not any(found.values()):
        need_table(files, args, "train.csv", "valid.csv")
    parts = [read_table(path).assign(split=split) for split, path in found.items() if path]
    raw = pd.concat(parts, ignore_index=True).fillna("")
    frame = describe(raw, args, keys=["Path"])
    if "Frontal/Lateral" not in raw:
        frame["Frontal/Lateral"] = ""
    frame["view"] = raw["Path"].str.extract(r"_(frontal|lateral)\.\w+$", expand=False).fillna("")
    frame["patient_id"] = raw["Path"].str.extract(r"(patient\d+)/", expand=False)
    return frame.assign(image=find_images(files, raw["Path"], depth=3))


def chexpert_plus(files, args):
    """CheXpert Plus: reports as prompts, and CheXbert's labels of their impressions where unpacked."""
    raw = need_table(files, args, "df_chexpert_plus*.csv", "df_chexpert_plus*.csv.gz")
    labels = find_table(files, "impression_fixed.json", "report_fixed.json")
    if labels:
        with open(labels, encoding="utf-8") as file:
            rows = pd.DataFrame([json.loads(line) for line in file if line.strip()])
        rows = rows.astype(object).where(rows.notna(), "").astype(str)
        raw = raw.merge(rows.drop_duplicates("path_to_image"), on="path_to_image", how="left").fillna("")
    elif not args.prompt_column:
        fail("no impression_fixed.json (chexbert_labels) found; add its folder or pass --prompt_column")
    return describe(raw, args).assign(image=find_images(files, raw["path_to_image"], depth=3))


def mimic(files, args):
    """MIMIC-CXR-JPG, or the DICOM files of MIMIC-CXR with its tables; sex and age if MIMIC-IV's patients.csv is there."""
    raw = need_table(files, args, "mimic-cxr-*-metadata.csv*")
    labels = need_table(files, args, "mimic-cxr-*-chexpert.csv*", "mimic-cxr-*-negbio.csv*")
    splits, patients = find_table(files, "mimic-cxr-*-split.csv*"), find_table(files, "patients.csv*")
    raw = raw.merge(labels, on=["subject_id", "study_id"], how="left")
    if splits:
        raw = raw.merge(read_table(splits)[["dicom_id", "split"]], on="dicom_id", how="left")
    if patients:
        # Dates are shifted by patient; anchor_age is the age in anchor_year.
        raw = raw.merge(read_table(patients), on="subject_id", how="left")
        years = pd.to_numeric(raw["StudyDate"].str[:4]) - pd.to_numeric(raw["anchor_year"])
        raw["age"] = (pd.to_numeric(raw["anchor_age"]) + years).map("{:.0f}".format, na_action="ignore")
    raw = raw.fillna("")
    unrelated = ["dicom_id", "study_id", *raw.columns.intersection(["anchor_year_group", "dod"])]
    return describe(raw, args, unrelated).assign(image=find_images(files, raw["dicom_id"]))


def nih(files, args):
    """NIH ChestX-ray14: labels between pipes, images in images_0*/images or elsewhere, the official lists."""
    raw = need_table(files, args, "Data_Entry_2017*.csv*")
    frame = describe(raw[[name for name in raw if name.startswith(("Patient", "View"))]], args)
    for split, name in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        if find_table(files, name):
            listed = set(Path(find_table(files, name)).read_text().split())
            column = frame["split"] if "split" in frame else pd.Series("", frame.index)
            frame["split"] = column.mask(raw["Image Index"].isin(listed), split)
    labels = one_hot(raw["Finding Labels"].str.split("|"))
    return frame.join(labels).assign(image=find_images(files, raw["Image Index"]))


def padchest(files, args):
    """PadChest: lists of labels, 16-bit PNG. Not used are images that its authors marked as not to be used."""
    raw = need_table(files, args, "PADCHEST*.csv*")
    lists = raw["Labels"].map(lambda text: ast.literal_eval(text) if text.startswith("[") else [])
    lists = lists.map(lambda names: [str(name).strip().lower() for name in names if str(name).strip()])
    columns = [name for name in raw if name.startswith(("Patient", "Projection", args.prompt_column or "Projection"))]
    frame, labels = describe(raw[columns], args), one_hot(lists)
    # "Unchanged" refers to an earlier report, so what is not named is not known to be absent.
    if "unchanged" in labels:
        labels = labels.mask((labels["unchanged"] == "1").to_numpy()[:, None] & (labels == "0"), "")
    born, date = pd.to_numeric(raw["PatientBirth"], "coerce"), pd.to_numeric(raw["StudyDate_DICOM"].str[:4], "coerce")
    frame["Age"] = (date - born).map("{:.0f}".format, na_action="ignore").fillna("")
    reasons = pd.Series("", raw.index).mask(lists.map(len) == 0, "without labels")
    reasons = reasons.mask(lists.map(lambda names: "exclude" in names), "labelled exclude")
    reasons = reasons.mask(raw["Projection"].str.upper() == "EXCLUDE", "of projection EXCLUDE")
    # The PNG files do not say whether these were inverted.
    reasons = reasons.mask(raw["PhotometricInterpretation_DICOM"] == "MONOCHROME1", "MONOCHROME1 as PNG")
    labels = labels.drop(columns="exclude", errors="ignore")
    return frame.join(labels).assign(left_out=reasons, image=find_images(files, raw["ImageID"]))


def vindr(files, args):
    """VinDr-CXR: three readers in training, their consensus in the test set. Kaggle's train.csv lists boxes by reader.

    The majority of an image's readers decides; ties are uncertain.
    """
    tables = {"train": find_table(files, "image_labels_train.csv"), "test": find_table(files, "image_labels_test.csv")}
    parts = [read_table(path).assign(split=split) for split, path in tables.items() if path]
    if not parts:
        boxes = need_table(files, args, "image_labels_train.csv", "train.csv")
        if not {"image_id", "rad_id", "class_name"} <= set(boxes):
            fail("--source vindr: train.csv has no columns image_id, rad_id and class_name")
        parts = [pd.crosstab([boxes["image_id"], boxes["rad_id"]], boxes["class_name"]).clip(upper=1).reset_index()]
    votes = pd.concat([part.rename(columns=label_name) for part in parts])
    readers = [name for name in votes if simplify(name) == "radid"]
    splits = votes.groupby("image_id")["split"].first() if "split" in votes else None
    votes = votes.drop(columns=[*readers, "split"], errors="ignore").set_index("image_id")
    # A cell that is 1 is a vote for, one that is 0 against; a column that a table lacks counts for neither.
    balance = votes.apply(pd.to_numeric).replace(0, -1).groupby(level=0).sum(min_count=1)
    labels = np.sign(balance).replace({-1: "0", 1: "1", 0: "-1"}).where(balance.notna(), "").reset_index()
    frame = labels.assign(view="PA", image=find_images(files, labels["image_id"]))
    if splits is not None:
        frame["split"] = frame["image_id"].map(splits)
    return frame.drop(columns="image_id")


def rsna(files, args):
    """RSNA Pneumonia Detection, stage 2: one class per image, and boxes, whose Target is the class Lung Opacity."""
    boxes = need_table(files, args, "stage_2_train_labels.csv").set_index("patientId")["Target"]
    labels = boxes.groupby(level=0).max().to_frame("Lung Opacity")
    classes = find_table(files, "stage_2_detailed_class_info.csv")
    if classes:
        named = read_table(classes).drop_duplicates("patientId").set_index("patientId")["class"]
        labels = labels.combine_first(one_hot(named.map(lambda name: [name]))).fillna("")
    labels = labels.reset_index(names="patient_id")
    return labels.assign(image=find_images(files, labels["patient_id"]))


def folder(files, args):
    """Images in class folders, below folders train, val and test if there are any; or images and --labels_csv."""
    paths = pd.Series([path for path in files if path.lower().endswith(IMAGE_SUFFIXES)], dtype=str)
    return add_labels(pd.DataFrame({"image": paths}), files, args)


def dicom(files, args):
    """DICOM files under any name, with --labels_csv or in class folders."""
    table = args.labels_csv and os.path.realpath(args.labels_csv)
    paths = [path for path in files if os.path.realpath(path) != table and is_dicom(path)]
    frame = pd.DataFrame({"image": pd.Series(paths, dtype=str)})
    return add_labels(add_headers(frame, args), files, args)


def add_labels(frame, files, args):
    """Add labels from --labels_csv, or else from the names of the class folders."""
    if frame.empty:
        fail(f"no {'DICOM file' if args.source == 'dicom' else 'image'} under {' or '.join(args.data_dir)}")
    names = frame["image"].map(files).map(without_suffix)
    if args.labels_csv:
        return join_labels(frame, names, args)
    folders = names.map(lambda name: list(Path(name).parts[:-1]))
    frame = frame.assign(left_out="")
    masks = folders.map(lambda parts: any(part.lower() in ("mask", "masks") for part in parts))
    splits = folders.map(lambda parts: next((SPLITS[part.lower()] for part in parts if part.lower() in SPLITS), ""))
    classes = folders.map(lambda parts: [part for part in parts if part.lower() not in {*SPLITS, "images"}][:1])
    frame.loc[classes.map(len) == 0, "left_out"] = "in no class folder"
    frame.loc[masks, "left_out"] = "segmentation masks"
    if classes[frame["left_out"] == ""].map(tuple).nunique() < 2:
        found = sorted({*classes.explode().dropna()})
        where = f"{' or '.join(args.data_dir)} has not two class folders with images (found: {found or 'none'})"
        fail(f"{where}; pass the folder that holds them, or the labels with --labels_csv")
    labels = one_hot(classes)
    return frame.assign(split=splits).join(labels) if (splits != "").any() else frame.join(labels)


def join_labels(frame, names, args):
    """Add the rows of --labels_csv, matched by file name, by path, or by a DICOM identifier."""
    raw = read_table(args.labels_csv, sep=None, engine="python")
    simplified = {simplify(name): name for name in reversed(raw.columns)}
    found = {}
    for key in ("filename", "path", "image", "imageid", "file"):
        if key in simplified:
            listed = raw[simplified[key]].map(without_suffix)
            by_path = listed.isin(set(names)).any()
            found[simplified[key]] = (
                (names, listed) if by_path else (names.map(os.path.basename), listed.map(os.path.basename))
            )
    for key in ("SOPInstanceUID", "StudyInstanceUID", "AccessionNumber", "PatientID"):
        if simplify(key) in simplified and key in frame:
            found[simplified[simplify(key)]] = (frame[key], raw[simplified[simplify(key)]])
    column = next((name for name, (ours, listed) in found.items() if ours.isin(set(listed)).any()), None)
    if column is None:
        expected = "file_name, or for DICOM SOPInstanceUID, StudyInstanceUID, AccessionNumber or PatientID"
        fail(f"{args.labels_csv}: no column names any of the {len(frame):,} images; expected {expected}")
    ours, listed = found[column]
    repeated = listed[listed.duplicated()]
    if len(repeated):
        fail(
            f"{args.labels_csv}: {repeated.iloc[0]!r} is in several rows of column {column!r}; leave one row for each"
        )
    described = describe(raw, args, keys=[*found])
    rows = described.set_index(listed).reindex(ours).set_index(frame.index)
    reasons = pd.Series("", frame.index).mask(~ours.isin(set(listed)), f"without a row in {args.labels_csv}")
    if "left_out" in frame:
        reasons = frame["left_out"].where(frame["left_out"] != "", reasons)
    kept = frame.drop(columns=[name for name in rows if name in frame])
    unused = [name for name in raw if label_name(name) not in described and name not in found]
    unused = [name for name in unused if not any(simplify(name) in aliases for aliases in COLUMNS.values())]
    if unused:
        print(f"note: not used of {args.labels_csv}: {', '.join(unused)}")
    return kept.join(rows.fillna("")).assign(left_out=reasons)


def hf(files, args):
    """A Hugging Face dataset from the hub or a folder; classes are resolved to their names."""
    try:
        import datasets
    except ImportError:
        fail("--source hf needs datasets: pip install 'datasets>=4.0'")
    (name,) = args.data_dir
    try:
        parts = datasets.load_dataset(name)
    except Exception as error:  # anything from connection errors to malformed files
        fail(f"--data_dir {name}: cannot be loaded as a Hugging Face dataset ({str(error)[:300]})")
    frames = []
    for split, dataset in parts.items():
        features = dataset.features
        image = next((column for column, kind in features.items() if isinstance(kind, datasets.Image)), None)
        if image is None:
            fail(f"--data_dir {name}: no column of images among {', '.join(features)}")
        raw = dataset.remove_columns(image).to_pandas()
        columns, labels = {}, []
        for column, cells in raw.items():
            kind = getattr(features[column], "feature", features[column])
            values = cells.map(lambda cell, kind=kind: class_names(cell, kind))
            is_class = isinstance(kind, datasets.ClassLabel) and not {*map(str.lower, kind.names)} <= STATES.keys()
            if is_class or kind is not features[column] or simplify(column) in ("label", "labels", "findinglabels"):
                labels.append(one_hot(values.str.join("|").str.split("|").map(lambda names: [*filter(None, names)])))
            else:
                columns[column] = values.str.join("|")
        frame = describe(pd.DataFrame(columns, index=raw.index, dtype=str), args).join(labels)
        encoded = dataset.select_columns(image).cast_column(image, datasets.Image(decode=False))
        frame["image"] = [(encoded, image, row) for row in raw.index]
        frames.append(frame.assign(split=split) if len(parts) > 1 else frame)
    return pd.concat(frames, ignore_index=True).fillna("")


def class_names(cell, kind):
    """Return a dataset's cell, or list of cells, as a list of strings; classes by their names."""
    cells = list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else [cell]
    cells = [value for value in cells if not pd.isna(value)]
    # -1 is what datasets use for an unknown class.
    if hasattr(kind, "int2str"):
        return [kind.int2str(int(value)) for value in cells if value >= 0]
    return [str(value) for value in cells]


SOURCES = {"chexpert": chexpert, "chexpert-plus": chexpert_plus, "mimic": mimic, "nih": nih, "padchest": padchest}
SOURCES |= {"vindr": vindr, "rsna": rsna, "folder": folder, "dicom": dicom, "hf": hf}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def run_parallel(function, items, total, label, args):
    """Yield function(item) in order, from --num_workers processes, with a progress bar."""
    with tqdm(total=total, desc=label, unit="image", disable=not total) as bar:
        if args.num_workers == 1:
            for item in items:
                yield function(item)
                bar.update()
            return
        try:
            with ProcessPoolExecutor(args.num_workers, mp_context=get_context("spawn")) as pool:
                while chunk := list(itertools.islice(items, 16 * args.num_workers)):  # all would not fit in memory
                    for result in pool.map(function, chunk):
                        yield result
                        bar.update()
        except BrokenProcessPool:
            fail("a process was killed, probably because it ran out of memory; pass a smaller --num_workers")


def add_headers(frame, args):
    """Fill patient, view, sex and age from the headers of DICOM images, where the source's tables lack them."""
    paths = frame["image"][[isinstance(image, str) and image != "" and is_dicom(image) for image in frame["image"]]]
    if paths.empty:
        return frame
    try:
        import pydicom.pixels  # noqa: F401
    except ImportError:
        fail(f"{paths.iloc[0]} is DICOM, which needs two packages: pip install 'pydicom>=3' 'python-gdcm>=3.0.24'")
    headers = run_parallel(read_header, iter(paths), len(paths), "reading headers", args)
    headers = pd.DataFrame(list(headers), index=paths.index, dtype=str).reindex(frame.index).fillna("")
    for name in headers:
        ours = frame[name] if name in frame else pd.Series("", frame.index)
        frame = frame.assign(**{name: ours.where(ours != "", headers[name])})
    return frame


def read_header(path):
    """Return what the table takes from a DICOM file's header."""
    import pydicom

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except Exception as error:  # pydicom can raise anything on a malformed file
        return {"problem": f"{path}: {error}"}
    if "Rows" not in header or header.get("Modality") in NOT_RADIOGRAPHS:
        return {"left_out": f"not radiographs ({header.get('Modality') or 'no pixels'})"}
    names = {"PatientID": "patient_id", "ViewPosition": "view", "PatientSex": "Sex", "PatientAge": "Age"}
    names |= {name: name for name in ("SOPInstanceUID", "StudyInstanceUID", "AccessionNumber")}
    return {ours: str(header.get(name) or "").strip() for name, ours in names.items()}


def to_grey(pixels, low=None, high=None):
    """Scale pixels so that `low` is 0 and `high` 255; by default the 0.5th and the 99.5th percentile."""
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("has pixels that are not finite")
    if low is None:
        low, high = np.percentile(pixels, (0.5, 99.5))
    if low == high:
        raise ValueError("has a single grey value")
    return ((pixels - low) * (255 / (high - low))).clip(0, 255)


def read_dicom(path, window):
    """Return a DICOM image as it is meant to be shown: float32 grey values from 0 to 255, (H, W)."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    file = pydicom.dcmread(path)
    stored = file.pixel_array
    if int(file.get("NumberOfFrames") or 1) > 1:
        raise ValueError("has more than one frame")
    if file.SamplesPerPixel == 3 and stored.dtype == np.uint8:  # a screenshot; pydicom converts YBR to RGB
        return np.asarray(Image.fromarray(stored).convert("L"), np.float32)
    if file.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"has photometric interpretation {file.PhotometricInterpretation}")
    pixels = apply_modality_lut(stored, file)
    shown = pixels if window else apply_voi_lut(pixels, file)
    if window:
        grey = to_grey(pixels, *window)
    elif shown is not pixels and shown.dtype.kind == "f":  # a VOI window
        with np.errstate(over="ignore"):  # in a sigmoid
            black_and_white = apply_voi_lut(np.array([-1e9, 1e9]), file)
        grey = to_grey(shown, *black_and_white)
    elif shown is not pixels:  # a VOI LUT
        entries, first, bits = file.VOILUTSequence[0].LUTDescriptor
        if bits == 8 and not 0 < entries <= 256:  # pydicom 3.0 looks values up modulo 256 in these
            raise ValueError("has a VOI LUT of 8 bits with more than 256 entries; pass --window")
        outputs = apply_voi_lut(np.arange(first, first + (entries or 65536)), file)
        grey = to_grey(shown, float(outputs.min()), float(outputs.max()))
    elif file.BitsStored <= 8 and pixels is stored and stored.dtype == np.uint8:
        grey = stored.astype(np.float32)
    else:
        grey = to_grey(pixels)
    return 255 - grey if file.PhotometricInterpretation == "MONOCHROME1" else grey


def read_image(file, window):
    """Return an image's pixels: float32 grey values, (H, W), or uint8, (H, W, 3). None: the scripts can read it."""
    with Image.open(file) as opened:
        tags = getattr(opened, "tag_v2", {})
        # The test of the scripts' load_image.
        deep = opened.mode[0] in "IF" or max(tags.get(258, [8])) > 8 or ";16" in str(opened.tile)
        if getattr(opened, "n_frames", 1) > 1:
            raise ValueError("has more than one frame")
        if not deep and opened.format in READABLE and isinstance(file, str):
            return None
        pixels = np.asarray(ImageOps.exif_transpose(opened))
        if deep and opened.mode[0] not in "IF":
            raise ValueError("has more than 8 bits per channel in color")
        if deep:
            grey = to_grey(pixels, *(window or ()))
            return 255 - grey if tags.get(262) == 0 else grey  # TIFF's WhiteIsZero, which Pillow leaves as it is
        opened.load()
        return np.asarray(ImageOps.exif_transpose(opened).convert("L" if opened.mode in ("1", "L", "LA") else "RGB"))


def convert_image(job):
    """Write an image as PNG unless the scripts can read it. Return whether it was written, and what is wrong with it."""
    image, target, size, window = job
    try:
        if isinstance(image, str) and is_dicom(image):
            pixels = read_dicom(image, window)
        else:
            pixels = read_image(image if isinstance(image, str) else io.BytesIO(image), window)
        if pixels is None:
            return False, ""
        channels = np.split(pixels, 3, axis=2) if pixels.ndim == 3 else [pixels]
        channels = [resize_channel(channel.reshape(pixels.shape[:2]), size) for channel in channels]
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Image.merge("L" if len(channels) == 1 else "RGB", channels).save(f"{target}.tmp", format="PNG")
        os.replace(f"{target}.tmp", target)
        return True, ""
    except Exception as error:  # Pillow and pydicom can raise anything on a malformed file
        return False, f"{image if isinstance(image, str) else target}: {error}"


def resize_channel(pixels, size):
    """Return an 8-bit image of one channel, its shorter side reduced to `size`. Rounds once, after resizing."""
    image = Image.fromarray(pixels.astype(np.float32))
    scale = size / min(image.size) if size else 1.0
    if scale < 1:
        sides = [max(size, round(scale * side)) for side in image.size]
        image = image.resize(sides, Image.Resampling.LANCZOS)
    return Image.fromarray(np.rint(np.asarray(image)).clip(0, 255).astype(np.uint8))


def convert_images(frame, files, args):
    """Return the table with the final path of each image, the reasons for rows left out, and the number written."""
    folder = Path(args.output_dir) / "converted"
    settings = json.dumps({"source": args.source, "size": args.size, "window": args.window})
    if (folder / "settings.json").exists() and (folder / "settings.json").read_text() != settings:
        before = (folder / "settings.json").read_text()
        fail(f"{folder} was begun with {before}, not {settings}; pass these, another --output_dir, or delete it")
    if args.source == "hf":
        splits = frame["split"] if "split" in frame else pd.Series("", frame.index)
        names = splits + pd.Series([f"/{row:07}" for _, _, row in frame["image"]], frame.index)
    else:
        names = frame["image"].map(files)
        bare = names.map(without_suffix)
        names = bare.where(~bare.duplicated(keep=False), names)
    targets = [f"{folder}/{name.lstrip('/')}.png" for name in names]
    waiting = [i for i, target in enumerate(targets) if not os.path.exists(target)]

    def jobs():
        for i in waiting:
            image = frame["image"].iloc[i]
            if not isinstance(image, str):
                dataset, column, row = image
                encoded = dataset[row][column] or {"bytes": b""}
                image = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"]).read_bytes()
            yield image, targets[i], args.size, args.window

    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "settings.json").exists():
        (folder / "settings.json").write_text(settings)
    paths, problems, written = [*targets], [""] * len(targets), len(targets) - len(waiting)
    done = run_parallel(convert_image, jobs(), len(waiting), "checking and converting", args)
    for i, (was_written, problem) in zip(waiting, done):
        written += was_written
        problems[i] = problem
        paths[i] = targets[i] if was_written else frame["image"].iloc[i]
    if not any(folder.rglob("*.png")):
        (folder / "settings.json").unlink()
        folder.rmdir()
    return frame.assign(path=paths, problem=problems), written


def stop_at_problems(problems, args):
    """Exit with the unreadable images, unless --on_bad_image skip."""
    problems = [problem for problem in problems if problem]
    if problems and args.on_bad_image == "stop":
        listed = "; ".join(problems[:5]) + ("; …" if len(problems) > 5 else "")
        fail(f"{len(problems):,} images cannot be read; repair them or pass --on_bad_image skip: {listed}")


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def years(age):
    """Return an age such as 57, 057Y or 003M in whole years, "" if there is none below 121."""
    found = re.fullmatch(r"(\d+)(?:\.\d+)?\s*([YMWD]?)", age.strip().upper())
    if not found:
        return ""
    whole = int(found[1]) // {"M": 12, "W": 52, "D": 365}.get(found[2], 1)
    return str(whole) if whole <= 120 else ""  # NIH has patients of 411 years


def standardize(frame, args):
    """Convert patients, views, sex, age and splits to the image table's form. Return the table and notes on splits."""
    text = {name: frame[name].fillna("").astype(str) for name in COLUMNS if name in frame}
    view = text.pop("view", pd.Series("", frame.index)).map(simplify)
    frontal = text.get("Frontal/Lateral", pd.Series("", frame.index)).str.strip().str.title()
    from_view = view.map(lambda name: "Frontal" if name in FRONTAL else "Lateral" if name in LATERAL else "")
    text["Frontal/Lateral"] = frontal.where(frontal.isin(["Frontal", "Lateral"]), from_view)
    from_view = view.map(FRONTAL).fillna("")
    text["AP/PA"] = text["AP/PA"].where(text["AP/PA"] != "", from_view) if "AP/PA" in text else from_view
    if "Sex" in text:
        text["Sex"] = text["Sex"].str.upper().str[:1].map({"M": "Male", "F": "Female"}).fillna("")
    if "Age" in text:
        text["Age"] = text["Age"].map(years)
    notes = []
    if "split" in text:
        text["split"] = text["split"].str.lower().str.strip().map(SPLITS).fillna("")
        splits = set(text["split"])
        if "test" not in splits or "train" not in splits:
            notes.append(f"none (only {', '.join(sorted(splits - {''})) or 'others'}): the scripts split by patient")
            text.pop("split")
        elif "val" not in splits and args.val_fraction:
            patients = text.get("patient_id", frame["path"])
            position = patients.map(lambda name: int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64)
            text["split"] = text["split"].mask((text["split"] == "train") & (position < args.val_fraction), "val")
            notes.append(f"val is made here of {args.val_fraction:g} of the training patients")
    table = pd.DataFrame({"file_name": frame["path"], **{name: text[name] for name in COLUMNS if name in text}})
    labels = frame.columns.drop([*COLUMNS, "image", "path", "left_out", "problem"], errors="ignore")
    labels = labels.drop(["SOPInstanceUID", "StudyInstanceUID", "AccessionNumber"], errors="ignore")
    ordered = [*(name for name in LABELS if name in labels), *sorted(set(labels) - set(LABELS))]
    table = table.join(frame[ordered].fillna(""))
    return table.loc[:, (table != "").any()], notes


def table_path(path, folder):
    """Return a path relative to the table's folder, or absolute if the two share nothing but the root."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path if os.path.commonpath([path, folder]) == os.sep else os.path.relpath(path, folder)


def print_summary(table, written, left_out, notes, args):
    """Print rows, patients, splits, views, label counts, images, and what was left out."""

    def counts(names):
        named = []
        for name in sorted(names, key=lambda name: -(table[name] == "1").sum())[:20]:
            uncertain = (table[name] == "-1").sum()
            named.append(
                f"{name} {(table[name] == '1').sum():,}" + (f" (+{uncertain:,} uncertain)" if uncertain else "")
            )
        return ", ".join(named) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")

    def values(name, missing, blank="unknown"):
        if name not in table:
            return missing
        return ", ".join(f"{value or blank} {count:,}" for value, count in table[name].value_counts().items())

    known = [name for name in table if name in LABELS]
    others = [name for name in table if name not in [*LABELS, *COLUMNS, "file_name"]]
    patients = f"{table['patient_id'].nunique():,} patients" if "patient_id" in table else "patients not known"
    lines = {"rows": f"{len(table):,}, {patients}", "splits": values("split", "none: the scripts split by patient")}
    if notes:
        lines["splits"] = notes[0] if "split" not in table else f"{lines['splits']} ({notes[0]})"
    lines["views"] = values("Frontal/Lateral", "not known: all are taken as frontal")
    lines["labels"] = counts(known) or "none of CheXpert's 14"
    lines["others"] = others and f"{counts(others)}; for these pass --labels"
    lines["prompts"] = "prompt" in table and f"{(table['prompt'] != '').sum():,}"
    lines["images"] = f"{written:,} written, {len(table) - written:,} used where they are"
    lines["left out"] = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()) or "nothing"
    lines["wrote"] = Path(args.output_dir) / "table.csv"
    for name, text in lines.items():
        if text:
            print(f"{name:>9}  {text}")


def main(args):
    output = Path(args.output_dir) / "table.csv"
    if output.exists():
        fail(f"{output} exists already; delete it or pass another --output_dir")
    files = {} if args.source == "hf" else list_files(args)
    frame = SOURCES[args.source](files, args).reset_index(drop=True)
    if not frame["image"].map(bool).any():
        fail(f"none of the {len(frame):,} images in the tables are under {' or '.join(args.data_dir)}")
    if args.source not in ("hf", "dicom"):
        frame = add_headers(frame, args)
    reasons = (frame["left_out"] if "left_out" in frame else pd.Series("", frame.index)).fillna("")
    reasons = reasons.mask((reasons == "") & ~frame["image"].map(bool), "without an image file")
    if "split" in frame and frame["split"].fillna("").ne("").any():
        reasons = reasons.mask((reasons == "") & frame["split"].fillna("").eq(""), "in no split")
    if "problem" in frame:
        stop_at_problems(frame["problem"].fillna(""), args)
        reasons = reasons.mask(frame["problem"].fillna("") != "", "unreadable")
    left_out, frame = reasons[reasons != ""].value_counts().to_dict(), frame[reasons == ""].reset_index(drop=True)
    if frame.empty:
        fail(f"nothing to write: {', '.join(f'{count:,} {reason}' for reason, count in left_out.items())}")
    if args.patient_regex:
        found = frame["image"].str.extract(f"({args.patient_regex})")
        frame["patient_id"] = found.iloc[:, min(1, found.shape[1] - 1)].fillna("")
        if (frame["patient_id"] == "").any():
            without = frame["image"][frame["patient_id"] == ""].iloc[0]
            fail(f"--patient_regex {args.patient_regex} finds nothing in {without}")
    frame, written = convert_images(frame, files, args)
    stop_at_problems(frame["problem"], args)
    unreadable = int((frame["problem"] != "").sum())
    if unreadable:
        left_out["unreadable"] = left_out.get("unreadable", 0) + unreadable
    table, notes = standardize(frame[frame["problem"] == ""], args)
    if not {*table} - {"file_name", "patient_id", "Frontal/Lateral", "AP/PA", "Sex", "Age", "split"}:
        fail(f"no labels and no prompts found in {' or '.join([*args.data_dir, *filter(None, [args.labels_csv])])}")
    table["file_name"] = table["file_name"].map(lambda path: table_path(path, args.output_dir))
    output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(output.with_suffix(".tmp"), index=False)
    os.replace(output.with_suffix(".tmp"), output)
    print_summary(table, written, left_out, notes, args)


if __name__ == "__main__":
    main(parse_args())
