# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "diffusers>=0.36", "transformers>=4.57.1", "peft>=0.18", "accelerate>=1.10", "bitsandbytes>=0.48",
#   "safetensors>=0.5", "numpy>=2.0", "pandas>=2.2.2", "pillow>=10.3", "tqdm>=4.67",
# ]
# ///
"""Sample chest radiographs from any run of the training scripts, or from any Stable Diffusion pipeline.

    accelerate launch sample.py --model runs/bitfit                          # 5,000 images of each of six conditions
    python sample.py --model runs/lora --labels "Edema" "No Finding" --images_per_label 16
    python sample.py --model runs/unet --like_csv CheXpert-v1.0/train.csv --split train --num_images 20000
    python sample.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --images_per_label 100        # the base model

Writes PNG images, contact sheets and metadata.csv to --output_dir. The folder is a Hugging Face imagefolder and the
input of the evaluation scripts. Rerun an interrupted command to make the missing images.
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
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# bitsandbytes, which diffusers imports, reports a missing 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import find_executable_batch_size, parse_flag_from_env
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import CLIPTextModel

# Copied from train_full.LABELS
LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
).split(",")
# Copied from train_full.PROMPT_TEMPLATE
PROMPT_TEMPLATE = "Chest X-ray of a subject with {}"
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
# The six conditions of the paper's Table 3.
CONDITIONS = ["Cardiomegaly", "Lung Opacity", "Edema", "No Finding", "Pneumothorax", "Pleural Effusion"]
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "dpmsolver++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
}
ADAPTER_FILES = ("pytorch_lora_weights.safetensors", "unet_delta.safetensors")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What --batch_size auto starts from: images per batch and, on a CPU, pixels per batch (eight images of 256x256).
MAX_BATCH_SIZE = 64
CPU_BATCH_PIXELS = 8 * 256**2


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fail
def fail(message):
    """Print a one-line error to stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def batch_size(text):
    return text if text == "auto" else int(text)


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    flag = parser.add_argument_group("model").add_argument
    flag("--model", required=True, help="run, checkpoint-N of a run, or pipeline (folder or hub id)")
    flag("--base_model", help="base model of an adapter or checkpoint (default: the one it was trained on)")
    flag("--revision", help="branch, tag or commit of the pipeline on the hub (default: the run's)")
    flag("--variant", help="variant of the pipeline's weight files, such as fp16 (default: the run's)")
    flag("--lora_scale", type=float, default=1.0, help="strength of a LoRA or DoRA adapter; 0 turns it off")
    flag("--mixed_precision", choices=DTYPES, help="dtype of the weights (default: fp16 on a GPU, no on a CPU)")
    flag("--compile", action="store_true", help="torch.compile the U-Net; the first batch takes minutes")

    flag = parser.add_argument_group("prompts").add_argument
    flag("--labels", nargs="+", help="labels, a prompt each (default: the run's or the paper's six), or of --like_csv")
    flag("--prompts", nargs="+", help="complete prompts, instead of --labels")
    flag("--images_per_label", type=int, help="images per label or prompt (default: 5000)")
    flag("--like_csv", help="table; sample an image per frontal row, from its prompt or positive labels")
    flag("--split", choices=["train", "val", "test", "all"], default="all", help="rows of --like_csv to use")
    flag("--split_seed", type=int, default=0, help="seed of the random split by patient; must agree across scripts")
    flag("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="ones: -1 counts as positive")
    flag("--num_images", type=int, help="use this many rows of --like_csv, chosen by --seed (default: all)")
    flag("--prompt_template", help="prompt with {} where the findings go (default: the run's)")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--num_inference_steps", type=int, default=50, help="denoising steps")
    flag("--guidance_scale", type=float, default=7.5, help="classifier-free guidance; 1 or less turns it off")
    flag("--negative_prompt", default="", help="prompt that guidance steers away from (default: none)")
    flag("--scheduler", choices=SCHEDULERS, help="sampler (default: the pipeline's own)")
    flag("--resolution", type=int, help="side of the images in pixels (default: the run's, else the U-Net's)")
    flag("--batch_size", type=batch_size, default="auto", help="images per process and forward pass, or auto")
    flag("--seed", type=int, default=0, help="random seed; it fixes each image, given the image's prompt and index")
    flag("--output_dir", help="image folder (default: samples/<model name>)")
    args = parser.parse_args(argv)

    for name in ("images_per_label", "num_images", "num_inference_steps", "resolution", "batch_size"):
        if getattr(args, name) not in (None, "auto") and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.like_csv and args.images_per_label:
        parser.error("--images_per_label does not apply to --like_csv; use --num_images")
    if args.prompts and (args.labels or args.like_csv):
        parser.error("--prompts replaces --labels and --like_csv; pass one of them")
    if args.num_images and not args.like_csv:
        parser.error("--num_images needs --like_csv; with --labels, use --images_per_label")
    if args.like_csv and not os.path.isfile(args.like_csv):
        parser.error(f"--like_csv {args.like_csv}: no such file")
    if args.prompt_template and args.prompt_template.count("{}") != 1:
        parser.error("--prompt_template needs exactly one {}, where the findings go")
    model = Path(args.model).absolute()
    # The names "merged" and "checkpoint-500" mean nothing without the run's.
    is_part = model.name == "merged" or (model / "state.json").is_file()
    name = f"{model.parent.name}-{model.name}" if is_part else model.name
    args.output_dir = Path(args.output_dir or Path("samples") / name)
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


# Copied from train_full.add_prompts
def add_prompts(table, labels, template, uncertain):
    """Fill empty prompts from the labels, in their order. Rows without a positive label stay empty."""
    positive = positive_labels(table, labels, uncertain).to_numpy()
    findings = [", ".join(label for label, found in zip(labels, row) if found) for row in positive]
    from_labels = pd.Series([template.replace("{}", text) if text else "" for text in findings], table.index, str)
    return table.assign(prompt=table["prompt"].where(table["prompt"] != "", from_labels))


def known_labels(labels, default=LABELS):
    """Return the label columns to read or write: `default` if it includes all of `labels`, else `labels`."""
    return default if {*(labels or ())} <= {*default} else labels


def folder_name(prompt, labels):
    """Return the folder of a prompt's images: its labels, or for a free prompt its beginning and a hash."""
    name = re.sub(r"[^\w+-]", "_", "+".join(labels) or prompt).lower()
    if labels and len(name) <= 200:
        return name
    return f"{name[:50]}-{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"


def plan_samples(args, template, trained_labels=LABELS, seen=(), quiet=True):
    """Return a row per image: file_name, prompt, index among the images of its prompt, and labels as 1 or 0.

    `seen` are the labels that training images had, if known.
    """
    labels, images_per_label, lines = known_labels(args.labels, trained_labels), args.images_per_label or 5000, []
    if args.like_csv:
        labels = args.labels or trained_labels
        table = load_image_table(args.like_csv, with_images=False, labels=labels)
        lines += table.attrs["block"]
        has_prompt, table = table["prompt"] != "", add_prompts(table, labels, template, args.uncertain)
        selected = table["frontal"] & (table["prompt"] != "")
        if args.split != "all":
            selected &= split_of(table, args.split_seed) == args.split
        if not selected.any():
            fail(f"--like_csv {args.like_csv}: no frontal row with a prompt or positive label in split {args.split}")
        table = table[selected]
        if args.num_images and args.num_images < len(table):
            table = table.sample(n=args.num_images, random_state=args.seed % 2**32)
        labels = labels if {*labels} & {*table} else []  # a table of prompts alone has no labels to record
        positive = positive_labels(table, labels, args.uncertain)
        findings = [tuple(positive.columns[row]) for row in positive.to_numpy(bool)]
        wanted = zip(table["prompt"], findings, has_prompt[table.index])
    elif args.prompts:
        labels, wanted = [], [(prompt, (), True) for prompt in args.prompts for _ in range(images_per_label)]
    else:
        chosen = args.labels or (CONDITIONS if trained_labels == LABELS else trained_labels)
        unseen = [label for label in chosen if (seen and label not in seen) or label not in trained_labels]
        if unseen:
            lines.append(("warning" if args.labels else "left out", f"no training image has {', '.join(unseen)}"))
            chosen = args.labels or [label for label in chosen if label not in unseen]
        prompts = [(template.replace("{}", label), (label,), False) for label in chosen]
        wanted = [prompt for prompt in prompts for _ in range(images_per_label)]
    rows, counts = [], Counter()
    for prompt, found, is_free in wanted:
        folder, index = folder_name(prompt, () if is_free else found), counts[prompt]
        row = {"file_name": f"{folder}/{index:06d}.png", "prompt": prompt, "index": index}
        rows.append(row | {label: float(label in found) for label in labels})
        counts[prompt] += 1
    samples = pd.DataFrame(rows)
    if samples["file_name"].duplicated().any():
        fail("two labels would share a folder, since folder names ignore case and punctuation; rename one")
    lines.append(("prompts", ", ".join(map(repr, samples["prompt"].unique()[:2]))))
    if not quiet:
        print("\n".join(f"{name:>9}  {text}" for name, text in lines), flush=True)
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


# Copied from train_full.fingerprint
def fingerprint(module):
    """Return a SHA-256 of a module's weights that does not depend on their names."""
    arrays = (parameter.detach().cpu().numpy() for parameter in module.parameters())
    digests = [hashlib.sha256(str(array.shape).encode() + array.tobytes()).digest() for array in arrays]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


# Copied from train_full.load_single_file
def load_single_file(path):
    """Load a pipeline from one .safetensors file, such as v1-5-pruned-emaonly.safetensors.

    Configurations and tokenizer come from its folder if that has a model_index.json, else from the hub (2 MB, cached).
    """
    config = str(path.parent) if (path.parent / "model_index.json").is_file() else None
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
        if not {"model", "first_stage_model", "cond_stage_model"} <= {name.split(".")[0] for name in names}:
            raise ValueError("it does not hold the U-Net, VAE and text encoder of Stable Diffusion 1 or 2")
        return StableDiffusionPipeline.from_single_file(str(path), config=config, **options)
    # NotImplementedError: diffusers leaves missing weights on the meta device, which cannot be copied.
    except (SafetensorError, KeyError, NotImplementedError) as error:
        raise ValueError(f"it is damaged or lacks weights: {error}") from error
    except OSError as error:
        raise ValueError(f"its configuration is neither in {path.parent} nor available from the hub") from error


# Copied from train_full.load_pipeline
def load_pipeline(name, revision=None, variant=None):
    """Load a Stable Diffusion pipeline in float32 from a hub id, a folder or a .safetensors file.

    Raise ValueError if weights are missing (the libraries would only warn and initialize them randomly) or not finite.
    """
    path, parts, missing = Path(name), {}, {}
    folder = path.parent if path.is_file() else path
    if (folder / "model_index.json").is_file() and not (folder / "tokenizer").is_dir():
        raise ValueError("no tokenizer folder")  # transformers would use an empty tokenizer
    if path.is_file():
        pipeline = load_single_file(path)
    else:
        kind = StableDiffusionPipeline.load_config(name, revision=revision).get("_class_name")
        if kind != "StableDiffusionPipeline":
            raise ValueError(f"it is a {kind}; pass a StableDiffusionPipeline (Stable Diffusion 1 or 2)")
        options = {"revision": revision, "variant": variant, "use_safetensors": True, "output_loading_info": True}
        models = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "vae": AutoencoderKL}
        for part, model_class in models.items():
            parts[part], report = model_class.from_pretrained(name, subfolder=part, **options)
            missing[part] = report["missing_keys"]
        # The safety checker would black out radiographs.
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline.from_pretrained(name, revision=revision, **parts)
    for part in ("unet", "text_encoder", "vae"):
        parameters = dict(getattr(pipeline, part).named_parameters())
        absent = missing.get(part) or [key for key, parameter in parameters.items() if parameter.is_meta]
        if absent:
            raise ValueError(f"{part} has no weights for {min(absent)}")
        if not all(parameter.isfinite().all() for parameter in parameters.values()):
            raise ValueError(f"{part} has weights that are not finite")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


# Copied from train_peft.merge_delta
def merge_delta(unet, path):
    """Merge the parameters of BitFit or DiffFit into a plain U-Net."""
    weights = unet.state_dict()
    delta = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}
    # Scales come last: they multiply the trained biases.
    for name, tensor in sorted(delta.items(), key=lambda item: item[0].endswith(".gamma")):
        if name.endswith(".gamma"):
            layer = name.removesuffix(".gamma")
            weights[f"{layer}.weight"].mul_(tensor[:, None])
            weights[f"{layer}.bias"].mul_(tensor)
        else:
            if weights[name].shape != tensor.shape:  # copy_ would broadcast
                raise ValueError(f"{path}: {name} does not fit the base model's U-Net")
            weights[name].copy_(tensor)


# Copied from train_peft.merge_adapter
def merge_adapter(pipeline, run, lora_scale=1.0):
    """Merge a run's adapter into the pipeline's U-Net and text encoder, leaving no PEFT layers."""
    if (run / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
        pipeline.fuse_lora(components=["unet", "text_encoder"], lora_scale=lora_scale)
        pipeline.unload_lora_weights()
    else:
        merge_delta(pipeline.unet, run / "unet_delta.safetensors")
    for part in (pipeline.unet, pipeline.text_encoder):
        if not all(parameter.isfinite().all() for parameter in part.parameters()):
            raise ValueError(f"{run}: the merged weights are not finite")


def pipeline_fingerprint(pipeline):
    """Return a SHA-256 of all weights, which the training scripts record as base_fingerprint."""
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    return hashlib.sha256("".join(fingerprint(part) for part in parts).encode()).hexdigest()


def read_summary(model):
    """Return a run's training arguments and, over them, its summary or a checkpoint's state; {} for any other model.

    `model` is the run's folder, its merged/ or a checkpoint.
    """
    folder = Path(model).parent if Path(model).name == "merged" else Path(model)
    for path in (folder / "training_summary.json", folder / "state.json"):
        if path.is_file():
            summary = json.loads(path.read_text(encoding="utf-8"))
            arguments = summary["arguments"]
            return arguments | {"base_model": arguments["pretrained_model_name_or_path"]} | summary
    return {}


# Copied from train_peft.adapter_key
def adapter_key(name):
    """Return a trained parameter's name in the adapter file, whatever the versions of PEFT and transformers."""
    if ".lora_" not in name:
        return name.removeprefix("unet.")
    return name.replace(".default.", ".").replace("text_encoder.encoder.", "text_encoder.text_model.encoder.")


@torch.no_grad()
def merge_checkpoint(pipeline, checkpoint, summary, lora_scale):
    """Put a checkpoint's weights, or their moving average if it has one, into its base model."""
    averaged = checkpoint / "ema.safetensors"
    path = averaged if averaged.is_file() else checkpoint / "trainable.safetensors"
    if summary["method"] in ("bitfit", "difffit"):
        merge_delta(pipeline.unet, path)
        return
    weights = load_file(path)
    if summary["method"] in ("lora", "dora"):
        scale = summary["lora_alpha"] / summary["rank"]  # a part of B in the file of a finished run
        weights = {name: weight * scale if ".lora_B." in name else weight for name, weight in weights.items()}
        pipeline.load_lora_weights({adapter_key(name): weight for name, weight in weights.items()})
        pipeline.fuse_lora(components=["unet", "text_encoder"], lora_scale=lora_scale)
        pipeline.unload_lora_weights()
        return
    # Version 5 of transformers has dropped `text_model.` from the names of parameters.
    weights = {name.replace(".text_model.", "."): weight for name, weight in weights.items()}
    for part in summary["components"]:
        for name, parameter in getattr(pipeline, part).named_parameters():
            parameter.copy_(weights[f"{part}.{name.removeprefix('text_model.')}"])


def explain_model(name):
    """Return why a local model cannot be loaded and what to pass instead, if its files show that, else None."""
    path = Path(name)
    if path.name in ADAPTER_FILES:
        return f"an adapter's file; pass its folder, {path.parent}"
    if any((path / file).is_file() for file in ADAPTER_FILES):
        return "an adapter itself; pass the pipeline that it was trained on"
    if path.is_dir() and not (path / "model_index.json").is_file():
        checkpoints = ", ".join(str(file.parent) for file in path.glob("checkpoint-*/state.json"))
        return f"not finished; pass a checkpoint: {checkpoints}" if checkpoints else "neither a run nor a pipeline"
    return None


def load_model(args, summary):
    """Load --model in float32, with an adapter or a checkpoint merged into its base model. Return also a fingerprint.

    The fingerprint is of the weights before merging: merged ones differ in their last bits between machines.
    """
    run, is_checkpoint = Path(args.model), (Path(args.model) / "state.json").is_file()
    needs_base = is_checkpoint or any((run / name).is_file() for name in ADAPTER_FILES)
    if args.base_model and not needs_base:
        fail(f"--base_model is for adapters and checkpoints, and --model {run} is neither; leave it out")
    if args.lora_scale != 1 and not (needs_base and summary.get("method", "lora") in ("lora", "dora")):
        fail(f"--lora_scale is for adapters of LoRA and DoRA, and --model {run} is none; leave it out")
    base, recorded = args.base_model or args.model, {}
    if needs_base and not args.base_model:
        if not summary:
            fail(f"--model {run}: no training_summary.json to read the adapter's base model from; pass --base_model")
        base, recorded = summary["base_model"], summary["arguments"]
    options = {name: getattr(args, name) or recorded.get(name) for name in ("revision", "variant")}
    try:
        pipeline = load_pipeline(base, **options)
        unet, vae, text_encoder = pipeline.unet.config, pipeline.vae.config, pipeline.text_encoder.config
        if unet.in_channels != vae.latent_channels or unet.cross_attention_dim != text_encoder.hidden_size:
            kind = "an inpainting model" if unet.in_channels == 9 else "another kind of model"
            raise ValueError(f"{kind}; pass a text-to-image model of Stable Diffusion 1 or 2")
        if not hasattr(pipeline.scheduler, "init_noise_sigma"):
            raise ValueError(f"flow matching ({type(pipeline.scheduler).__name__}) is not supported")
        weights = pipeline_fingerprint(pipeline)
        if recorded and weights != summary["identity"]["base_fingerprint"]:
            raise ValueError("trained on a base model with other weights; pass --base_model to use these anyway")
        if is_checkpoint:
            merge_checkpoint(pipeline, run, summary, args.lora_scale)
        elif needs_base:
            merge_adapter(pipeline, run, args.lora_scale)
        if needs_base:
            files = [run / name for name in (*ADAPTER_FILES, "trainable.safetensors", "ema.safetensors")]
            digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
            weights = hashlib.sha256("".join([weights, *digests]).encode()).hexdigest()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        kind = f"an adapter or checkpoint of {base} (see --base_model)" if needs_base else "a finished run or pipeline"
        reason = explain_model(base) or str(error)[:300]
        if isinstance(error, OSError) and not Path(base).exists():
            reason = f"no such folder or file, and the Hugging Face hub says: {reason}"
        fail(f"--model {run}: cannot be loaded as {kind}: {reason}")
    return pipeline, weights


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------


def generate(pipeline, embeddings, rows, resolution, args):
    """Return the images of a batch of rows, uint8 (B, H, W, 3). Each image's noise depends on its prompt and index."""
    seeds = [keyed_seed(args.seed, prompt, index) for prompt, index in zip(rows["prompt"], rows["index"])]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    channels, side = pipeline.unet.config.in_channels, resolution // pipeline.vae_scale_factor
    # Draw in float32, so that the noise is the same in every precision.
    noise = torch.stack([torch.randn(channels, side, side, generator=generator) for generator in generators])
    images = pipeline(
        prompt_embeds=torch.stack([embeddings[prompt] for prompt in rows["prompt"]]),
        negative_prompt_embeds=torch.stack([embeddings[args.negative_prompt]] * len(rows)),
        latents=noise.to(pipeline.dtype),
        generator=generators,  # ancestral samplers draw more noise
        height=resolution,
        width=resolution,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        output_type="pt",
    ).images
    if images.isnan().any():
        raise FloatingPointError("an image has NaN pixels, which would be black; pass --mixed_precision no or bf16")
    return images.float().mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_image(image, path):
    """Write to a temporary file, then rename it, so that every image in the folder is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of a killed launcher may still be writing the same image, hence the process id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


@torch.no_grad()
def sample(args, pipeline, samples, num_done, resolution, state):
    """Generate this process's share of the missing images, and save each batch during the next."""
    mine = samples.iloc[state.process_index :: state.num_processes]
    embeddings = {}
    for prompt in [args.negative_prompt, *mine["prompt"].unique()]:
        batch, _ = pipeline.encode_prompt(prompt, pipeline.device, 1, do_classifier_free_guidance=False)
        embeddings[prompt] = batch[0]
    size = args.batch_size
    if size == "auto":
        limit = MAX_BATCH_SIZE if state.device.type == "cuda" else CPU_BATCH_PIXELS // resolution**2
        size = max(1, min(limit, MAX_BATCH_SIZE, len(mine)))
    if args.compile:
        pipeline.unet.compile(dynamic=False)

    def reduce_batch_size():
        nonlocal size
        if size == 1 or args.batch_size != "auto":
            raise MemoryError(f"out of memory at {resolution}x{resolution}; lower --batch_size or --resolution")
        size //= 2
        return size

    @find_executable_batch_size(starting_batch_size=size, reduce_batch_size_fn=reduce_batch_size)
    def generate_missing(batch_size, bar):
        saving = []
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(mine), batch_size):
                rows = mine.iloc[start : start + batch_size]
                paths = [args.output_dir / name for name in rows["file_name"]]
                missing = [i for i, path in enumerate(paths) if not path.is_file()]
                if not missing:
                    continue
                # A smaller last batch would compile the U-Net again, so repeat its first row.
                filler = [0] * (batch_size - len(rows)) if args.compile else []
                # Draw whole batches, even if some images exist: in another batch, the rest would round differently.
                images = generate(pipeline, embeddings, rows.iloc[[*range(len(rows)), *filler]], resolution, args)
                list(saving)  # wait for the previous batch
                new_images, new_paths = [Image.fromarray(images[i]) for i in missing], [paths[i] for i in missing]
                saving = pool.map(save_image, new_images, new_paths)
                # Only the main process shows a bar; assume that the others keep pace.
                bar.update(min(len(missing) * state.num_processes, bar.total - bar.n))
                bar.set_postfix_str(f"batches of {batch_size}")
            list(saving)

    try:
        options = {"total": len(samples), "initial": num_done, "unit": "image", "disable": not state.is_main_process}
        with tqdm(desc="sampling", **options) as bar:
            generate_missing(bar)
    except (FloatingPointError, MemoryError) as error:
        fail(error)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def write_text(path, text):
    """Write to a temporary file, then rename it atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_output_dir(output_dir, identity, samples):
    """Create the folder and its sampling.json; fail if it holds other files, or images made with other settings."""
    path = output_dir / "sampling.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in saved | identity if identity.get(name) != saved.get(name)]
        if changed:
            fail(f"{output_dir} holds images made with different {', '.join(changed)}; pass another --output_dir")
        found = {f"{image.parent.name}/{image.name}" for image in output_dir.glob("[!.]*/[!.]*.png")}
        others = sorted(found - set(samples["file_name"]))
        if others:
            fail(f"{output_dir} holds {len(others):,} other images, such as {others[0]}; pass another --output_dir")
        return
    if any(output_dir.glob("[!.]*")):
        fail(f"--output_dir {output_dir}: neither empty nor a folder of samples; pass another")
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(identity, indent=2) + "\n")


def write_contact_sheets(samples, output_dir):
    """Write grids of the first 32 images of the 20 commonest prompts to a hidden folder, which imagefolder ignores."""
    for prompt in samples["prompt"].value_counts().index[:20]:
        names = samples["file_name"][samples["prompt"] == prompt][:32]
        pictures = [Image.open(output_dir / name).convert("RGB").resize((128, 128)) for name in names]
        columns = min(8, len(pictures))
        pictures += [Image.new("RGB", (128, 128))] * (-len(pictures) % columns)  # fill the last row
        sheet = make_image_grid(pictures, rows=len(pictures) // columns, cols=columns)
        save_image(sheet, output_dir / ".contact_sheets" / f"{Path(names.iloc[0]).parent.name}.png")


def main(args):
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    # Unlike Accelerator, PartialState ignores `accelerate launch --cpu`. And without `cpu`, processes that torchrun
    # starts on a machine without a GPU would not find each other.
    torchrun_on_cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or torchrun_on_cpu)
    if args.mixed_precision == "fp16" and state.device.type == "cpu":
        fail("--mixed_precision fp16 needs a GPU; pass bf16 or no")
    summary = read_summary(args.model)
    template = args.prompt_template or summary.get("prompt_template", PROMPT_TEMPLATE)
    counts = [row for row in summary.get("results", []) if row["metric"] == "images_train" and row["value"]]
    seen = {row["label"] for row in counts} - {"all"}
    samples = plan_samples(args, template, summary.get("labels", LABELS), seen, not state.is_main_process)
    pipeline, weights = load_model(args, summary)
    prompts = samples["prompt"].unique().tolist()
    length, ids = pipeline.tokenizer.model_max_length, pipeline.tokenizer(prompts).input_ids
    cut = sum(len(tokens) > length for tokens in ids)
    if cut and state.is_main_process:
        print(f"{'warning':>9}  {cut:,} of {len(prompts):,} prompts are truncated to {length} tokens", flush=True)
    scale, sample_size = pipeline.vae_scale_factor, pipeline.unet.config.sample_size
    resolution = args.resolution or summary.get("resolution") or sample_size * scale
    if resolution % scale:
        fail(f"--resolution {resolution}: this VAE takes multiples of {scale}")
    if args.negative_prompt and (args.guidance_scale <= 1 or pipeline.unet.config.time_cond_proj_dim):
        fail("--negative_prompt has no effect with a --guidance_scale of 1 or less, nor on LCM-type models")
    if args.scheduler:
        scheduler_class, options = SCHEDULERS[args.scheduler]
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **options)
    pipeline.to(state.device, DTYPES[args.mixed_precision or ("fp16" if state.device.type == "cuda" else "no")])
    if state.device.type == "cuda":
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    # Decode one image at a time: the VAE needs more memory per image than the U-Net.
    pipeline.vae.enable_slicing()

    # The settings become columns of metadata.csv; sampling.json also has what else the images depend on.
    settings = {"model": str(Path(args.model)), "seed": args.seed, "guidance_scale": args.guidance_scale}
    settings |= {"num_inference_steps": args.num_inference_steps, "scheduler": type(pipeline.scheduler).__name__}
    settings |= {"resolution": resolution, "resize_mode": summary.get("resize_mode", "")}
    optional = {"step": summary.get("step"), "negative_prompt": args.negative_prompt or None}
    optional["lora_scale"] = None if args.lora_scale == 1 else args.lora_scale
    settings |= {name: value for name, value in optional.items() if value is not None}
    identity = settings | {"prompt_template": template, "dtype": str(pipeline.dtype), "weights": weights}
    with state.main_process_first():
        check_output_dir(args.output_dir, identity, samples)
    num_done = sum((args.output_dir / name).is_file() for name in samples["file_name"])
    if state.is_main_process:
        plan = f"{len(samples):,} images of {samples['prompt'].nunique():,} prompts at {resolution}x{resolution}"
        if "step" in summary:
            kind = "averaged weights" if summary["use_ema"] else "weights"
            plan += f" with the {kind} after step {summary['step']:,}"
        print(f"{plan} to {args.output_dir}, {num_done:,} of them already there", flush=True)
    if num_done < len(samples):
        sample(args, pipeline, samples, num_done, resolution, state)
    state.wait_for_everyone()
    if state.is_main_process:
        for leftover in args.output_dir.rglob(".*.tmp"):
            leftover.unlink()
        write_contact_sheets(samples, args.output_dir)
        # Last, because it marks the folder as complete.
        write_text(args.output_dir / "metadata.csv", samples.assign(**settings).to_csv(index=False))
        print(f"{len(samples):,} images in {args.output_dir}; contact sheets in {args.output_dir / '.contact_sheets'}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(parse_args())
