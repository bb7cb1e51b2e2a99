# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "diffusers>=0.36", "transformers>=4.57", "peft>=0.18", "accelerate>=1.10", "bitsandbytes>=0.48",
#   "safetensors>=0.5", "numpy>=1.26", "pandas>=2.2", "pillow>=10.3", "tqdm>=4.66",
# ]
# ///
"""Sample chest radiographs from any run of the training scripts, or from any Stable Diffusion pipeline.

    accelerate launch sample.py --model runs/bitfit                            # 5,000 images of each of six conditions
    python sample.py --model runs/lora --labels "Edema" "No Finding" --images_per_label 16
    python sample.py --model runs/unet --like_csv CheXpert-v1.0/train.csv --split train --num_images 20000
    python sample.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --images_per_label 100   # the untouched base

Writes PNG images and metadata.csv to --output_dir: an image table for the evaluations and a Hugging Face imagefolder, with a
contact sheet for each prompt. Stopped and started again, it goes on where it was.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

# bitsandbytes, which diffusers imports, reports a missing 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import numpy as np
import pandas as pd
import torch
import transformers
from accelerate import PartialState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors import safe_open
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

# ----------------------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------------------

# Copied from train_full.LABELS
LABELS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
# Copied from train_full.PROMPT_TEMPLATE
PROMPT_TEMPLATE = "Chest X-ray of a subject with {}"
# Copied from train_full.SPLIT_FRACTIONS
SPLIT_FRACTIONS = {"train": 0.353, "val": 0.141, "test": 0.506}
# Copied from train_full.LABEL_VALUES
LABEL_VALUES = {"": math.nan, "1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0}
# The six conditions of the paper's Table 3.
CONDITIONS = ["Cardiomegaly", "Lung Opacity", "Edema", "No Finding", "Pneumothorax", "Pleural Effusion"]
SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
}
CONTACT_SHEET_IMAGES = 32
# Beyond it memory is not asked for and refused, but miscounted.
MAX_RESOLUTION = 2**14
# tqdm's own, but images a second however slow they are.
PROGRESS = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"
# --batch_size auto: at most what a kill may cost on a GPU, and on a CPU as many pixels as make eight images of 256x256.
MAX_BATCH_SIZE = 64
CPU_BATCH_PIXELS = 8 * 256**2
# Images that the VAE decodes at once; each takes more memory there than in the U-Net.
DECODED_TOGETHER = 4


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


def batch_size(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)


# fmt: off
def add_pipeline_arguments(parser):
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="run folder of a training script, or folder or hub id of a Stable Diffusion pipeline")
    group.add_argument("--base_model", help="base model of an adapter (default: the one it was trained on)")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="type of the weights (default: fp16 on a GPU, float32 on a CPU)")
    group.add_argument("--compile", action="store_true", help="torch.compile the U-Net: the first batch takes minutes, later ones less")


def add_prompt_arguments(parser):
    group = parser.add_argument_group("prompts")
    group.add_argument("--labels", nargs="+", metavar="LABEL", help=f"one prompt for each of these findings alone, in quotes where they have spaces (default: {', '.join(CONDITIONS)})")
    group.add_argument("--images_per_label", type=positive_int, default=5000, help="images for each of --labels")
    group.add_argument("--like_csv", help="instead of --labels: one image for each row of this image table, with its label combination")
    group.add_argument("--split", choices=["train", "val", "test", "all"], default="all", help="part of the patients of --like_csv")
    group.add_argument("--split_seed", type=whole_number, default=0, help="seed of the split by patient; the same in every script")
    group.add_argument("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="what -1 means in --like_csv: ones names the finding, zeros and ignore do not")
    group.add_argument("--num_images", type=positive_int, help="a seeded random subset of so many rows of --like_csv (default: all)")
    group.add_argument("--prompt_template", help=f"prompt; {{}} stands for the findings (default: the run's own, else {PROMPT_TEMPLATE!r})".replace("%", "%%"))


def add_sampling_arguments(parser):
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_inference_steps", type=positive_int, default=50, help="denoising steps")
    group.add_argument("--guidance_scale", type=non_negative, default=7.5, help="classifier-free guidance; 1 or less turns it off")
    group.add_argument("--scheduler", choices=SCHEDULERS, help="sampler (default: the pipeline's own)")
    group.add_argument("--resolution", type=positive_int, help="side of the images in pixels (default: the run's own, else the U-Net's)")
    group.add_argument("--batch_size", type=batch_size, default="auto", help=f"images per process and forward pass; auto: on a GPU the most that fit, up to {MAX_BATCH_SIZE}, on a CPU about {CPU_BATCH_PIXELS:,} pixels")
    group.add_argument("--seed", type=whole_number, default=0, help="an image is a function of this, its prompt and its index")
    group.add_argument("--output_dir", help="image folder (default: samples/ and the model's name)")
# fmt: on


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pipeline_arguments(parser)
    add_prompt_arguments(parser)
    add_sampling_arguments(parser)
    args = parser.parse_args(argv)
    unknown = [label for label in args.labels or [] if label not in LABELS]
    if unknown:
        parser.error(f"--labels: {unknown[0]!r} is none of {', '.join(LABELS)}")
    if len(set(args.labels or [])) < len(args.labels or []):
        parser.error("--labels names a finding twice; name each once, and raise --images_per_label for more of it")
    if args.labels and args.like_csv:
        parser.error("--labels and --like_csv exclude each other; pass one")
    # Unlike Path.is_file, this does not raise where a folder above is closed or a name too long.
    if args.like_csv and not os.path.isfile(args.like_csv):
        parser.error(f"--like_csv {args.like_csv}: no such file; pass the path of an image table")
    if args.prompt_template and args.prompt_template.count("{}") != 1:
        parser.error(f"--prompt_template {args.prompt_template!r} needs {{}} exactly once, where the findings go")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Data
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


def plan_samples(args: argparse.Namespace, template: str) -> pd.DataFrame:
    """One row per image: `file_name`, `prompt`, `index` (among the images of its prompt) and the 14 label columns.

    A label is 1 where the prompt names it and 0 where it does not.
    """
    if args.like_csv:
        table = load_image_table(args.like_csv)
        table = add_prompts(table[table["frontal"]].assign(prompt=""), template, args.uncertain)
        table = table[table["prompt"] != ""]
        if args.split != "all" and len(table):
            table = table[assign_splits(table["patient"], args.split_seed) == args.split]
        if table.empty:
            fail(f"--like_csv {args.like_csv}: no frontal row with a positive label in split {args.split!r}")
        if args.num_images and args.num_images < len(table):
            table = table.sample(n=args.num_images, random_state=args.seed % 2**32)
        positive = table.reindex(columns=LABELS).isin([1.0, -1.0] if args.uncertain == "ones" else [1.0])
        combinations = [tuple(label for label in LABELS if row[label]) for _, row in positive.iterrows()]
    else:
        combinations = [(label,) for label in args.labels or CONDITIONS for _ in range(args.images_per_label)]
    rows, seen = [], Counter()
    for labels in combinations:
        folder = "+".join(label.lower().replace(" ", "_") for label in labels)
        rows.append({
            "file_name": f"{folder}/{seen[labels]:06d}.png",
            "prompt": template.replace("{}", ", ".join(labels)),
            "index": seen[labels],
            **{label: float(label in labels) for label in LABELS},
        })  # fmt: skip
        seen[labels] += 1
    return pd.DataFrame(rows)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


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


# Copied from train_full.fingerprint
def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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


# Copied from train_full.load_pipeline
@safetensors_only()
def load_pipeline(name: str, **options) -> StableDiffusionPipeline:
    """A pipeline in float32 on the CPU, from safetensors only, without the safety checker that blacks out radiographs.

    ValueError where weights are missing, which the libraries would fill with random numbers and a warning.
    """
    if os.path.isfile(Path(name) / "text_encoder" / "adapter_config.json"):
        raise ValueError("text_encoder has an adapter, whose file names a further model to load; merge it first")
    parts = {}
    for part, model_class in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel), ("vae", AutoencoderKL)):
        # Or the config.json could name a kernel on the hub, which is code.
        attention = {"attn_implementation": "sdpa"} if part == "text_encoder" else {}
        parts[part], report = model_class.from_pretrained(
            name, subfolder=part, use_safetensors=True, output_loading_info=True, **attention, **options
        )
        if report["missing_keys"]:
            raise ValueError(f"{part} has no weights for {min(report['missing_keys'])}")
        broken = [name for name, tensor in parts[part].named_parameters() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"{part} has weights that are not finite in {len(broken)} tensors, such as {broken[0]}")
    revision = {"revision": options.get("revision")}
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer", **revision)
    # Part by part and not by the pipeline's own loader, which imports the modules that model_index.json names and opens
    # what pickles lie in further folders.
    config = diffusers.DDPMScheduler.load_config(name, subfolder="scheduler", **revision)
    class_name = str(StableDiffusionPipeline.load_config(name, **revision)["scheduler"][1])
    scheduler_class = getattr(diffusers, class_name, None)
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ValueError(f"model_index.json names {class_name!r}, which is no scheduler of diffusers")
    scheduler_class.from_config(config).set_timesteps(10)  # settings of wrong types show here; PNDM with its first steps needs four
    parts["scheduler"] = scheduler_class.from_config(config)
    pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return pipeline.to(torch.float32)


# Copied from train_peft.fold_delta
def fold_delta(unet: torch.nn.Module, path: Path) -> None:
    """Puts bitfit's or difffit's parameters into a plain U-Net; ValueError where they do not fit it."""
    with safe_open(path, framework="pt") as file:
        delta = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = unet.state_dict()
    # Scales come last, since they multiply the trained biases.
    for name, tensor in sorted(delta.items(), key=lambda item: item[0].endswith(".gamma")):
        layer, scale = name.removesuffix(".gamma"), name.endswith(".gamma")
        like = weights.get(f"{layer}.bias" if scale else name)
        if like is None or like.shape != tensor.shape:
            raise ValueError(f"{path}: {name} does not fit the base model's U-Net")
        if scale:
            weights[f"{layer}.weight"].mul_(tensor[:, None])
            like.mul_(tensor)
        else:
            like.copy_(tensor)


# Copied from train_peft.merge_adapter
def merge_adapter(pipeline: StableDiffusionPipeline, run: Path) -> None:
    """Folds a run's adapter into the pipeline's U-Net, which stays a plain one; ValueError where they do not fit together."""
    if (run / "pytorch_lora_weights.safetensors").is_file():
        pipeline.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
        pipeline.fuse_lora(components=["unet"])
        pipeline.unload_lora_weights()
    else:
        fold_delta(pipeline.unet, run / "unet_delta.safetensors")
    if not all(tensor.isfinite().all() for tensor in pipeline.unet.parameters()):
        raise ValueError(f"{run}: weights that are not finite")


def pipeline_fingerprint(pipeline: StableDiffusionPipeline) -> str:
    """The hash of a whole pipeline, as the training scripts note it."""
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.vae)
    return hashlib.sha256("".join(fingerprint(part) for part in parts).encode()).hexdigest()


# Copied from train_full.check_pipeline
@torch.no_grad()
def check_pipeline(pipeline: StableDiffusionPipeline) -> None:
    """A small pass through all parts; ValueError, or whatever they raise, where settings do not fit weights or each other."""
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    length, side = tokenizer.model_max_length, 8 * pipeline.vae_scale_factor
    if not 3 <= length <= text_encoder.config.max_position_embeddings or tokenizer.vocab_size > text_encoder.config.vocab_size:
        raise ValueError("its tokenizer's prompts are too short, or longer or of more words than its text encoder takes")
    input_ids = tokenizer(["X-ray"], padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    pixels = torch.zeros(1, 3, side, side, device=pipeline.device, dtype=pipeline.dtype)
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    if pipeline.unet(latents, 0, text_encoder(input_ids.to(pipeline.device))[0]).sample.shape != latents.shape:
        raise ValueError("its U-Net's predictions have another shape than its VAE's latents")
    if pipeline.vae.decode(latents).sample.shape != (1, 3, side, side):
        raise ValueError("what its VAE decodes is no RGB image of the same size")


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


def read_summary(model: str) -> dict:
    """The training summary of a run folder or of the merged/ in it, or {} for any other model."""
    folder = Path(model).parent if Path(model).name == "merged" else Path(model)
    path = folder / "training_summary.json"
    if not path.is_file():
        return {}
    form = {"base_model": str, "prompt_template": str, "resolution": int, "resize_mode": str, "identity": dict}
    summary = read_json(path, "train the run again or pass a pipeline", **form)
    if summary["prompt_template"].count("{}") != 1 or summary["resolution"] < 1:
        fail(f"{path}: 'prompt_template' or 'resolution' is not as these scripts write it; train the run again or pass a pipeline")
    return summary


def load_model(model: str, base_model: str | None, summary: dict) -> StableDiffusionPipeline:
    """The pipeline of a run or of any diffusers folder or hub id, in float32, with an adapter folded in."""
    folder = Path(model)
    adapter = next((f for f in ("pytorch_lora_weights.safetensors", "unet_delta.safetensors") if (folder / f).is_file()), None)
    source = (base_model or summary.get("base_model")) if adapter else model
    if folder.is_dir() and not adapter and not (folder / "model_index.json").is_file():
        fail(f"--model {model}: neither a finished run nor a pipeline (no model_index.json, pytorch_lora_weights.safetensors or unet_delta.safetensors){pickle_advice(model)}")
    if source is None:
        fail(f"--model {model}: training_summary.json does not name the adapter's base model; pass --base_model")
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        missing = f"its base model {source} is not there; pass --base_model" if adapter else "no such folder, nor a hub id"
        fail(f"--model {model}: {missing}{pickle_advice(source)}")
    try:
        pipeline = load_pipeline(source)
        trained_on = summary.get("identity", {}).get("base_fingerprint")
        if adapter and not base_model and trained_on and trained_on != pipeline_fingerprint(pipeline):
            raise ValueError(f"its base model {source} has other weights than it was trained on; pass --base_model to take them all the same")
        if adapter:
            merge_adapter(pipeline, folder)
    except Exception as error:  # whatever the libraries make of somebody's files
        fail(f"--model {model}: cannot be loaded ({' '.join(str(error).split())[:300]}){pickle_advice(source)}")
    return pipeline


def resolution_of(model: str, pipeline: StableDiffusionPipeline) -> int:
    """Side in pixels of the images that the U-Net is for."""
    side = pipeline.unet.config.sample_size
    if not isinstance(side, int) or side < 1:
        fail(f"--model {model}: its U-Net's sample_size is {side!r}, no number of latents; pass --resolution")
    return side * pipeline.vae_scale_factor


# Copied from train_full.to_channels_last
def to_channels_last(component: torch.nn.Module) -> None:
    """Lays the weights of convolutions out as a GPU's fastest kernels take them; a CPU gains nothing and would hold them twice."""
    if torch.cuda.is_available():
        component.to(memory_format=torch.channels_last)


def set_up_pipeline(args: argparse.Namespace, pipeline: StableDiffusionPipeline, device: torch.device) -> None:
    """Sampler, type and device, as the flags ask."""
    if args.scheduler:
        scheduler, options = SCHEDULERS[args.scheduler]
        try:
            pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **options)
        except Exception as error:  # whatever it makes of another sampler's settings
            fail(f"--scheduler {args.scheduler}: cannot take over the model's scheduler_config.json ({' '.join(str(error).split())[:300]}); pass another")
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    pipeline.to(device, {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision])
    for component in (pipeline.unet, pipeline.vae):
        to_channels_last(component)


@torch.no_grad()
def embed_prompts(pipeline: StableDiffusionPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Each prompt's embedding, (77, D), encoded once."""
    return {prompt: pipeline.encode_prompt(prompt, pipeline.device, 1, False)[0][0] for prompt in prompts}


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def denoise(args: argparse.Namespace, pipeline: StableDiffusionPipeline, embeddings: dict, batch: pd.DataFrame, resolution: int, only: int | None = None) -> torch.Tensor:
    """Latents of a batch of rows, (B, C, h, w); the noise of each is drawn for itself, so they do not depend on the batch.

    With `only`, a trial that ends after so many of the steps. The loop of StableDiffusionPipeline, but the schedulers look at timesteps on the CPU and so most of them do not wait for a GPU.
    """
    scheduler, side = pipeline.scheduler, resolution // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, side, side)
    generators = [torch.Generator().manual_seed(stream_seed(args.seed, *key)) for key in zip(batch["prompt"], batch["index"])]
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    # Ancestral samplers go on drawing from them.
    noise = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    # Of some schedulers the first noise's size is a matter of the steps, so these are set before.
    scheduler.set_timesteps(args.num_inference_steps)
    latents = latents.to(pipeline.device, pipeline.dtype) * scheduler.init_noise_sigma
    encoder_hidden_states = torch.stack([embeddings[prompt] for prompt in batch["prompt"]])
    guided = args.guidance_scale > 1
    if guided:
        encoder_hidden_states = torch.cat([torch.stack([embeddings[""]] * len(batch)), encoder_hidden_states])
    for timestep, on_device in zip(scheduler.timesteps[:only], scheduler.timesteps.to(pipeline.device)):
        model_input = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
        model_pred = pipeline.unet(model_input, on_device, encoder_hidden_states).sample
        if guided:
            unconditional, conditional = model_pred.chunk(2)
            model_pred = unconditional + args.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(model_pred, timestep, latents, **noise).prev_sample
    return latents


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of latents, uint8 (B, H, W, 3), and of each whether all of it is a number, (B,)."""
    latents = latents / pipeline.vae.config.scaling_factor
    images = torch.cat([pipeline.vae.decode(part).sample for part in latents.split(DECODED_TOGETHER)])
    pixels = (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return pixels, images.isfinite().flatten(1).all(1)


def try_pipeline(args: argparse.Namespace, pipeline: StableDiffusionPipeline) -> None:
    """Begins a small image; ends with exit status 2 where the model's settings do not fit its weights, each other or the flags."""
    try:
        check_pipeline(pipeline)
        embeddings, row = embed_prompts(pipeline, ["", "X-ray"]), pd.DataFrame({"prompt": ["X-ray"], "index": [0]})
        decode(pipeline, denoise(args, pipeline, embeddings, row, 8 * pipeline.vae_scale_factor, only=2))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the libraries make of somebody's settings
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        fail(f"--model {args.model}: cannot draw an image ({told}); see its JSON files, --num_inference_steps and --scheduler")


def find_batch_size(args, pipeline, embeddings, rows: pd.DataFrame, resolution: int) -> int:
    """The largest batch that fits a GPU, from the peak memory of one image and of two; on a CPU one of a fixed size in pixels."""
    if pipeline.device.type != "cuda":
        return max(1, min(CPU_BATCH_PIXELS // resolution**2, MAX_BATCH_SIZE, len(rows)))

    def peak(function, *inputs, **options) -> int:
        torch.cuda.reset_peak_memory_stats()
        function(*inputs, **options)
        return torch.cuda.max_memory_allocated()

    side = resolution // pipeline.vae_scale_factor
    try:
        one, two = (peak(denoise, args, pipeline, embeddings, rows.iloc[[0] * size], resolution, only=2) for size in (1, 2))
        latents = torch.zeros(DECODED_TOGETHER, pipeline.unet.config.in_channels, side, side, device=pipeline.device, dtype=pipeline.dtype)
        # The VAE decodes a batch while the U-Net draws the next, so both need their memory at once.
        decoding = peak(decode, pipeline, latents) - torch.cuda.memory_allocated()
    except torch.OutOfMemoryError:
        return 1
    # What is held back is for fragments; where it is not enough, `sample` halves the batch.
    usable = 0.85 * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) - decoding
    return max(1, min(1 + int((usable - one) / max(two - one, 1)), MAX_BATCH_SIZE, len(rows)))


def save_image(image: Image.Image, path: Path) -> None:
    """Writes beside and renames into place: a file with its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes that outlived a killed launcher may still be writing the same image.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(part, format="PNG")
    os.replace(part, path)


def save_images(images: torch.Tensor, finite: torch.Tensor, ready: "torch.cuda.Event | None", paths: list[Path]) -> int:
    """Writes a batch of images, uint8 (B, H, W, 3), as soon as the GPU has delivered it; returns how many."""
    if ready:
        ready.synchronize()
    if not finite.all():
        # Such an image would be black, and looked at by nobody.
        raise BadImage(f"{paths[int((~finite).to(torch.int).argmax())]}: not a number in the image; pass --mixed_precision no or bf16, and look at the run's losses")
    for image, path in zip(images.numpy(), paths):
        save_image(Image.fromarray(image), path)
    return len(paths)


def sample(args, pipeline, embeddings, todo: pd.DataFrame, resolution: int, output_dir: Path, state: PartialState) -> None:
    """Samples this process's share of what is left to do; a batch is decoded and written while the U-Net draws the next one."""
    mine = todo.iloc[state.process_index :: state.num_processes]
    size = args.batch_size if args.batch_size != "auto" else find_batch_size(args, pipeline, embeddings, mine, resolution) if len(mine) else 1
    if args.compile:
        pipeline.unet.compile(dynamic=False)
    # The VAE's own stream on a GPU; a CPU has no cores to spare for both.
    stream = torch.cuda.Stream() if pipeline.device.type == "cuda" else None
    done, writing = 0, deque()
    with ThreadPoolExecutor(2) as pool, tqdm(total=len(todo), desc="sampling", unit="image", bar_format=PROGRESS, disable=not state.is_main_process) as progress:
        while done < len(mine) or writing:
            # Two batches at most wait to be written, and what went wrong with one is raised here.
            if len(writing) > 2 or done == len(mine):
                # The main process counts for all, which are at about the same place.
                progress.update(min(writing.popleft().result() * state.num_processes, len(todo) - progress.n))
                progress.set_postfix_str(f"{size} at once")
                continue
            batch = mine.iloc[done : done + size]
            # A compiled U-Net is compiled anew for each size, so the last batch is filled up.
            filled = batch.iloc[list(range(len(batch))) + [0] * (size - len(batch) if args.compile else 0)]
            try:
                latents = denoise(args, pipeline, embeddings, filled, resolution)[: len(batch)]
                if stream:
                    stream.wait_stream(torch.cuda.current_stream())
                    latents.record_stream(stream)
                # Into pinned memory, without waiting: the GPU goes on with the next batch.
                with torch.cuda.stream(stream):
                    images, finite = (found.to("cpu", non_blocking=True) for found in decode(pipeline, latents))
                ready = stream.record_event() if stream else None
            except torch.OutOfMemoryError:
                images = None
            if images is None:
                if args.batch_size != "auto" or size == 1:
                    fail(f"{size} images of {resolution}x{resolution} do not fit into the GPU's memory; pass a smaller --batch_size or --resolution")
                size //= 2
                torch.cuda.empty_cache()
                continue
            writing.append(pool.submit(save_images, images, finite, ready, [output_dir / name for name in batch["file_name"]]))
            done += len(batch)


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.write_text
def write_text(path: Path, text: str) -> None:
    """Writes beside and renames into place."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def check_settings(output_dir: Path, settings: dict, planned: set[str]) -> None:
    """Ends with exit status 2 where the folder holds images made in another way, or others; else notes how these are made."""
    path = output_dir / "sampling.json"
    if path.is_file():
        saved = read_json(path, f"delete {output_dir} and sample again")
        differing = [key for key, value in saved.items() if settings.get(key) != value]
        if differing:
            fail(f"{output_dir} holds images made with another {', '.join(differing)}; pass another --output_dir or delete it")
        others = [p for p in output_dir.glob("*/[!.]*.png") if p.parent.name[0] != "." and f"{p.parent.name}/{p.name}" not in planned]
        if others:
            fail(f"{output_dir} holds {len(others):,} images that this command does not make, such as {others[0].name} of {others[0].parent.name}; pass another --output_dir")
    # A start that found no room for sampling.json, or was killed over it, has left no more than its beginning.
    elif output_dir.is_dir() and any(found.name != f".{path.name}.part" for found in output_dir.iterdir()):
        fail(f"--output_dir {output_dir}: not empty and not a folder of samples; pass another")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        fail(f"--output_dir {output_dir}: cannot be written ({error.strerror})")


def open_small(path: Path) -> Image.Image:
    """A sample as it stands on a contact sheet."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB").resize((128, 128))
    except Exception as error:  # Pillow's readers raise whatever a broken file makes of them
        raise BadImage(f"{path}: cannot be read ({' '.join(str(error).split())}); delete it and start again") from None


def write_contact_sheets(samples: pd.DataFrame, output_dir: Path) -> list[Path]:
    """A picture of the first images of each prompt, in a hidden folder that imagefolder passes over."""
    sheets = []
    for _, rows in samples.groupby("prompt", sort=False):
        pictures = [open_small(output_dir / name) for name in rows["file_name"][:CONTACT_SHEET_IMAGES]]
        columns = min(8, len(pictures))
        pictures += [Image.new("RGB", (128, 128))] * (-len(pictures) % columns)
        sheets.append(output_dir / ".contact_sheets" / f"{Path(rows['file_name'].iloc[0]).parent.name}.png")
        save_image(make_image_grid(pictures, rows=len(pictures) // columns, cols=columns), sheets[-1])
    return sheets


@plain_errors("lower --batch_size or --resolution, or pass --mixed_precision bf16")
def main(args: argparse.Namespace) -> None:
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    silence_known_noise()
    # Without the argument, processes that torchrun starts on a machine without a GPU would each sample everything.
    state = PartialState(cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available())
    if args.mixed_precision == "fp16" and state.device.type == "cpu":
        fail("--mixed_precision fp16 needs a GPU; pass bf16 or no")
    summary = read_summary(args.model)
    template = args.prompt_template or summary.get("prompt_template", PROMPT_TEMPLATE)
    samples = plan_samples(args, template)
    pipeline = load_model(args.model, args.base_model, summary)
    resolution = args.resolution or summary.get("resolution") or resolution_of(args.model, pipeline)
    if resolution % pipeline.vae_scale_factor or resolution > MAX_RESOLUTION:
        fail(f"--resolution {resolution}: this VAE takes multiples of {pipeline.vae_scale_factor}, here up to {MAX_RESOLUTION:,}")
    weights = pipeline_fingerprint(pipeline)
    set_up_pipeline(args, pipeline, state.device)
    try_pipeline(args, pipeline)

    settings = {
        "model": str(Path(args.model)), "seed": args.seed, "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.num_inference_steps, "scheduler": type(pipeline.scheduler).__name__,
        "resolution": resolution, "resize_mode": summary.get("resize_mode", ""),
    }  # fmt: skip
    output_dir = Path(args.output_dir or Path("samples") / Path(args.model).name)
    identity = {**settings, "prompt_template": template, "dtype": str(pipeline.dtype), "weights": weights}
    with state.main_process_first():
        check_settings(output_dir, identity, set(samples["file_name"]))
    todo = samples[[not (output_dir / name).is_file() for name in samples["file_name"]]]
    # All processes have looked before any of them writes.
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{len(samples):,} images of {samples['prompt'].nunique():,} prompts, {len(samples) - len(todo):,} already there, {resolution}x{resolution}, to {output_dir}")
    if len(todo):
        sample(args, pipeline, embed_prompts(pipeline, ["", *todo["prompt"].unique()]), todo, resolution, output_dir, state)
    state.wait_for_everyone()
    if state.is_main_process:
        for part in output_dir.rglob(".*.part"):
            part.unlink(missing_ok=True)
        sheets = write_contact_sheets(samples, output_dir)
        # The last, since it says that the folder is complete.
        write_text(output_dir / "metadata.csv", samples.assign(**settings).to_csv(index=False))
        print(f"{output_dir / 'metadata.csv'}: {len(samples):,} images; contact sheets in {sheets[0].parent}")
    state.wait_for_everyone()


if __name__ == "__main__":
    main(parse_args())
