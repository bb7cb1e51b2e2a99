# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "diffusers>=0.36", "transformers>=4.57", "peft>=0.18", "accelerate>=1.10",
#   "datasets>=4.0", "bitsandbytes>=0.48", "huggingface-hub>=0.34", "safetensors>=0.5", "numpy>=1.26", "pandas>=2.2",
#   "pillow>=10.3", "tqdm>=4.66", "tensorboard>=2.16",
# ]
# ///
"""Fine-tune Stable Diffusion v1.5's U-Net on chest radiographs with LoRA, DoRA, BitFit or DiffFit.

    accelerate launch train_peft.py --method bitfit                          # row 10 of the paper's Table 1
    accelerate launch train_peft.py --method lora --rank 4 --lora_alpha 16 --save_merged
    accelerate launch train_peft.py --method difffit --max_train_steps 20000 --mixed_precision bf16
    accelerate launch train_peft.py --method dora --resume_from_checkpoint latest

Writes what was trained to --output_dir (pytorch_lora_weights.safetensors for pipe.load_lora_weights, or unet_delta.safetensors
under the U-Net's own names), with --save_merged a plain pipeline beside it, and training_summary.json, a model card,
validation pictures, logs and checkpoints.
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
import resource
import shlex
import shutil
import signal
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

# bitsandbytes, which diffusers imports, reports a missing 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import convert_state_dict_to_diffusers, make_image_grid
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
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
# Copied from train_full.BASE_MODEL
BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
# Copied from train_full.DEFAULT_TABLES
DEFAULT_TABLES = ["CheXpert-v1.0/train.csv", "CheXpert-v1.0-small/train.csv"]
# Copied from train_full.SPLIT_FRACTIONS
SPLIT_FRACTIONS = {"train": 0.353, "val": 0.141, "test": 0.506}
# Copied from train_full.LABEL_VALUES
LABEL_VALUES = {"": math.nan, "1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0}
# Copied from train_full.RUN_FILES
RUN_FILES = [
    "training_summary.json", "README.md", "pytorch_lora_weights.safetensors", "unet_delta.safetensors", "merged",
    "model_index.json", "unet", "text_encoder", "vae", "tokenizer", "scheduler",
]  # fmt: skip
# Copied from train_full.TOLD_SETTINGS
TOLD_SETTINGS = [
    "learning_rate", "unet_lr", "text_encoder_lr", "vae_lr", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "ema_decay", "caption_dropout", "noise_offset", "snr_gamma",
    "vae_recon_weight", "vae_anchor_weight", "mixed_precision", "seed",
]  # fmt: skip
# Copied from train_full.STOPPED
STOPPED = 75
# Copied from train_full.COUNTERS
COUNTERS = ["step", "samples_seen", "seconds", "train_loss", "loss_sum", "norm_sum", "counted"]
# Copied from train_full.SMALLEST_SCALE
SMALLEST_SCALE = 1e-4
# Copied from train_full.MAX_CACHED_CAPTIONS
MAX_CACHED_CAPTIONS = 4096
# Copied from train_full.CACHE_FILE_ROWS
CACHE_FILE_ROWS = 256
# The projections of every attention layer, as the paper's authors had them.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# The last linear layer of each residual branch of a transformer block: attn1 and attn2, and the feed-forward network.
BRANCH_ENDS = ("to_out.0", "ff.net.2")


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


# Copied from train_full.below_one
def below_one(text: str) -> float:
    value = fraction(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not below 1")
    return value


# fmt: off
def add_method_arguments(parser):
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=["lora", "dora", "bitfit", "difffit"], required=True, help="what trains in the U-Net: low-rank updates of the attention, the same with magnitudes, all biases, or biases with norms and branch scales")
    group.add_argument("--rank", type=positive_int, default=8, help="rank of lora and dora")
    group.add_argument("--lora_alpha", type=positive_int, default=16, help="lora and dora scale their update by this over the rank")
    group.add_argument("--lora_dropout", type=below_one, default=0.0, help="dropout on the input of lora's and dora's update; 0 turns it off")
    group.add_argument("--learning_rate", type=non_negative, default=1e-4, help="learning rate")
    group.add_argument("--save_merged", action="store_true", help="also write merged/, a plain pipeline with the method folded in")


# Copied from train_full.add_data_arguments
def add_data_arguments(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--data_csv", help=f"image table in CheXpert's form (default: the first of {', '.join(DEFAULT_TABLES)} that exists)")
    group.add_argument("--validation_csv", help="ready-made held-out table; --data_csv is then used whole unless --split says otherwise")
    group.add_argument("--image_root", help="folder that the table's paths start from (default: the table's folder or its parent)")
    group.add_argument("--dataset_name", help="hub id or local folder for datasets.load_dataset, instead of --data_csv")
    group.add_argument("--image_column", default="image", help="image column of --dataset_name")
    group.add_argument("--caption_column", help="caption column of --dataset_name (default: prompt, text or caption, else the label columns)")
    group.add_argument("--split", choices=["train", "val", "test", "all"], help="part of the patients to train on (default: train; all with --validation_csv)")
    group.add_argument("--split_seed", type=whole_number, default=0, help="seed of the split by patient; the same in every script")
    group.add_argument("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help="what -1 means: ones names the finding in the prompt (the paper's data), zeros and ignore do not")
    group.add_argument("--prompt_template", default=PROMPT_TEMPLATE, help="caption; {} stands for the findings")
    group.add_argument("--max_train_samples", type=positive_int, help="train on a seeded random subset of this many images (default: all)")
    group.add_argument("--max_validation_samples", type=positive_int, default=256, help="held-out images that the held-out loss is measured on")
    group.add_argument("--resolution", type=positive_int, default=512, help="side of the square training images in pixels")
    group.add_argument("--resize_mode", choices=["squash", "pad", "crop"], default="squash", help="how an image becomes square: both sides scaled, black borders, or the centre")
    group.add_argument("--caption_dropout", type=fraction, default=0.1, help="share of captions replaced by the empty prompt, which guidance at sampling needs; 0 turns it off")
    group.add_argument("--on_bad_image", choices=["stop", "skip"], default="stop", help="an image that cannot be read: stop ends the run; skip decodes all images first and leaves it out, or takes the next one where it breaks later, told once and counted")
    group.add_argument("--latent_cache_dir", help="folder of the cached VAE moments, shared by runs (default: latent_cache beside --output_dir); none turns the cache off")
    group.add_argument("--dataloader_num_workers", type=whole_number, help="worker processes that load samples, per process (default: 4 on a GPU, 0 on a CPU)")


# Copied from train_full.add_model_arguments
def add_model_arguments(parser):
    group = parser.add_argument_group("model and loss")
    group.add_argument("--pretrained_model_name_or_path", default=BASE_MODEL, help="hub id or folder of the diffusers pipeline to start from")
    group.add_argument("--revision", help="branch, tag or commit of the hub model")
    group.add_argument("--variant", help="variant of the weight files, such as fp16")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast type; what trains stays float32 (default: accelerate's configuration)")
    group.add_argument("--gradient_checkpointing", action="store_true", help="recompute the U-Net's and VAE's activations in the backward pass: less memory, slower")
    group.add_argument("--compile", action="store_true", help="torch.compile the U-Net, for each shape by itself: the first step takes minutes, later ones less")
    group.add_argument("--snr_gamma", type=non_negative, help="min-SNR loss weighting, arXiv 2303.09556; 5 is usual (default: off)")
    group.add_argument("--noise_offset", type=non_negative, default=0.0, help="standard deviation of an extra noise constant over each channel; 0 turns it off")


# Copied from train_full.add_optimizer_arguments
def add_optimizer_arguments(parser):
    group = parser.add_argument_group("optimizer")
    group.add_argument("--train_batch_size", type=positive_int, default=4, help="images per process and forward pass")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=4, help="forward passes per optimizer step")
    group.add_argument("--num_train_epochs", type=positive_int, default=100, help="passes over the images, unless --max_train_steps is given")
    group.add_argument("--max_train_steps", type=positive_int, help="optimizer steps (default: from --num_train_epochs)")
    group.add_argument("--lr_scheduler", choices=[s.value for s in SchedulerType if s.value not in ("piecewise_constant", "polynomial")], default="constant", help="schedule of the learning rate")
    group.add_argument("--lr_warmup_steps", type=whole_number, default=0, help="optimizer steps of linear warm-up, for schedules that have one")
    group.add_argument("--adam_beta1", type=below_one, default=0.9, help="AdamW's beta1")
    group.add_argument("--adam_beta2", type=below_one, default=0.999, help="AdamW's beta2")
    group.add_argument("--adam_weight_decay", type=non_negative, default=1e-2, help="AdamW's weight decay")
    group.add_argument("--adam_epsilon", type=non_negative, default=1e-8, help="AdamW's epsilon")
    group.add_argument("--max_grad_norm", type=non_negative, default=1.0, help="gradients are clipped to this norm; 0 turns clipping off")
    group.add_argument("--use_8bit_adam", action="store_true", help="bitsandbytes' AdamW with 8-bit state")
    group.add_argument("--use_ema", action="store_true", help="keep an exponential moving average of what trains, and save that")
    group.add_argument("--ema_decay", type=fraction, default=0.9999, help="decay of --use_ema, reached by a warm-up")


# Copied from train_full.add_checkpoint_arguments
def add_checkpoint_arguments(parser):
    group = parser.add_argument_group("output, checkpoints and validation")
    group.add_argument("--output_dir", help="run folder (default: runs/ and the run's name)")
    group.add_argument("--overwrite_output_dir", action="store_true", help="start anew in a folder that holds a run or its checkpoints")
    group.add_argument("--seed", type=whole_number, default=0, help="seed of the order, noise, timesteps and validation pictures")
    group.add_argument("--checkpointing_steps", type=whole_number, default=500, help="optimizer steps between checkpoints; 0 writes none but on SIGTERM and SIGUSR1")
    group.add_argument("--checkpoints_total_limit", type=positive_int, default=2, help="newest checkpoints kept")
    group.add_argument("--resume_from_checkpoint", metavar="PATH|latest", help="checkpoint folder to go on from; latest starts anew where there is none")
    group.add_argument("--validation_steps", type=whole_number, default=500, help="optimizer steps between held-out losses and validation pictures; 0 leaves the first and last")
    group.add_argument("--validation_prompts", nargs="+", help="prompts of the validation pictures (default: the most frequent captions)")
    group.add_argument("--num_validation_images", type=whole_number, default=4, help="pictures per validation; 0 draws none")
    group.add_argument("--logging_steps", type=positive_int, default=10, help="optimizer steps between readings of the loss, the only ones that wait for the device")
    group.add_argument("--report_to", choices=["tensorboard", "wandb", "none"], default="tensorboard", help="where the curves go")
    group.add_argument("--push_to_hub", action="store_true", help="upload the finished run to a private repository on the Hugging Face hub (after hf auth login)")
    group.add_argument("--hub_model_id", help="repository of --push_to_hub (default: the name of the output folder)")
# fmt: on


# Copied from train_full.check_arguments
def check_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with one sentence on what argparse cannot see by itself, before anything is loaded."""
    if args.prompt_template.count("{}") != 1:
        parser.error(f"--prompt_template {args.prompt_template!r} needs {{}} exactly once, where the findings go")
    if args.data_csv and args.dataset_name:
        parser.error("--data_csv and --dataset_name exclude each other; pass one")
    for flag in ("data_csv", "validation_csv"):
        value = getattr(args, flag)
        # Unlike Path.is_file, this does not raise where a folder above is closed or a name too long.
        if value and not os.path.isfile(value):
            parser.error(f"--{flag} {value}: no such file; pass the path of a CheXpert-style CSV")
    if not args.data_csv and not args.dataset_name and not any(map(os.path.isfile, DEFAULT_TABLES)):
        parser.error(
            f"no image table: looked for {' and '.join(DEFAULT_TABLES)} in {Path.cwd()}; pass --data_csv FILE or "
            "--dataset_name NAME, or run the offline demo with 'bash launch/demo.sh'"
        )
    if args.image_root and not os.path.isdir(args.image_root):
        parser.error(f"--image_root {args.image_root}: no such folder")
    if args.report_to == "wandb":
        try:
            version("wandb")
        except ImportError:
            parser.error("--report_to wandb needs the package: pip install wandb")
    resume = args.resume_from_checkpoint
    if resume and resume != "latest" and not os.path.isfile(Path(resume) / "state.json"):
        parser.error(f"--resume_from_checkpoint {resume}: no checkpoint there (no state.json); pass its folder or 'latest'")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_method_arguments(parser)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_optimizer_arguments(parser)
    add_checkpoint_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(args, parser)
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Data: the image table
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


# Copied from train_full.load_dataset_table
def load_dataset_table(name: str, image_column: str, caption_column: str | None) -> pd.DataFrame:
    """The same frame as `load_image_table` from a Hugging Face dataset, hub or local; its images stay where they are."""
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, split="train")
    except Exception as error:  # whatever the libraries make of somebody's files
        fail(f"--dataset_name {name}: cannot be loaded ({' '.join(str(error).split())[:300]})")
    if image_column not in dataset.column_names:
        fail(f"--dataset_name {name}: no column {image_column!r}; pass --image_column, one of {', '.join(dataset.column_names)}")
    if caption_column and caption_column not in dataset.column_names:
        fail(f"--dataset_name {name}: no column {caption_column!r}; pass --caption_column, one of {', '.join(dataset.column_names)}")
    caption_column = caption_column or next((c for c in ("prompt", "text", "caption") if c in dataset.column_names), None)
    label_columns = [c for c in LABELS if c in dataset.column_names]
    if not caption_column and not label_columns:
        fail(f"--dataset_name {name}: neither a caption column (pass --caption_column) nor a label column of CheXpert's 14")
    if not isinstance(dataset.features[image_column], datasets.Image):
        fail(f"--dataset_name {name}: column {image_column!r} holds no images; pass --image_column")
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))

    def strings(column: str) -> pd.Series:
        values = pd.Series(dataset[column][:], dtype=object)
        return values.where(values.notna(), "").astype(str)

    names = pd.Series([f"{name}[{i}]" for i in range(len(dataset))])
    table = pd.DataFrame({
        "image": [DatasetImage(dataset, image_column, i) for i in range(len(dataset))],
        "name": names,
        "patient": strings("patient_id").where(lambda ids: ids != "", names) if "patient_id" in dataset.column_names else names,
        "frontal": strings("Frontal/Lateral").str.lower().str.startswith("frontal") if "Frontal/Lateral" in dataset.column_names else True,
        "prompt": strings(caption_column).str.strip() if caption_column else "",
    })  # fmt: skip
    return table.join(parse_labels(pd.DataFrame({c: strings(c) for c in label_columns}, index=table.index), name))


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


# Copied from train_full.TrainingData
@dataclass
class TrainingData:
    """What a run trains on and is measured on, and how it came about."""

    train: pd.DataFrame
    heldout: pd.DataFrame
    source: str
    rows: int
    left_out: dict[str, int]
    notes: list[str]
    counts: list[dict]


# Copied from train_full.load_training_data
def load_training_data(args: argparse.Namespace) -> TrainingData:
    """Loads the table, leaves out what cannot be used, and splits by patient; nothing left ends with exit status 2."""
    source = args.dataset_name or args.data_csv or next(p for p in DEFAULT_TABLES if Path(p).is_file())
    if args.dataset_name:
        table = load_dataset_table(args.dataset_name, args.image_column, args.caption_column)
    else:
        table = load_image_table(source, args.image_root)
    rows, left_out, notes = len(table), {}, []
    left_out["not frontal"] = int((~table["frontal"]).sum())
    table = add_prompts(table[table["frontal"]], args.prompt_template, args.uncertain)
    left_out["no positive label"] = int((table["prompt"] == "").sum())
    table = table[table["prompt"] != ""]

    split = args.split or ("all" if args.validation_csv else "train")
    splits = assign_splits(table["patient"], args.split_seed) if len(table) else pd.Series(dtype=str)
    train = table if split == "all" else table[splits == split]
    left_out[f"not in split {split!r}"] = len(table) - len(train)
    if args.validation_csv:
        heldout = load_image_table(args.validation_csv, args.image_root)
        heldout = add_prompts(heldout[heldout["frontal"]], args.prompt_template, args.uncertain)
        heldout = heldout[heldout["prompt"] != ""]
        shared = set(train["patient"]) & set(heldout["patient"])
        if shared:
            notes.append(f"{len(shared):,} patients are in both {source} and {args.validation_csv}: the held-out loss is not of unseen patients")
    else:
        heldout = table[splits == "val"] if split in ("train", "test") else table[:0]
        assert not set(train["patient"]) & set(heldout["patient"])
    if train.empty:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        fail(f"{source}: nothing left to train on of {rows:,} rows ({reasons}); see --split, --uncertain and the label columns")
    if args.max_train_samples and args.max_train_samples < len(train):
        left_out["over --max_train_samples"] = len(train) - args.max_train_samples
        train = train.sample(n=args.max_train_samples, random_state=args.split_seed % 2**32)
    counts = [*count_rows("train", train, args.uncertain), *count_rows("val", heldout, args.uncertain)]
    if args.max_validation_samples < len(heldout):
        heldout = heldout.sample(n=args.max_validation_samples, random_state=args.split_seed % 2**32)
    if heldout.empty:
        notes.append("no held-out images: the held-out loss is not measured")
    if (train["patient"] == train["name"]).any():
        notes.append("rows without a patient (patient_id or patientNNNNN in the path) are split by image")
    return TrainingData(train.reset_index(drop=True), heldout.reset_index(drop=True), source, rows, left_out, notes, counts)


# ----------------------------------------------------------------------------------------------------------------------
# Data: images
# ----------------------------------------------------------------------------------------------------------------------


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


# Copied from train_full.drop_images
def drop_images(data: TrainingData, bad: list[int]) -> None:
    """Leaves out the images at these positions, the training images counted first, then the held-out ones."""
    count = len(data.train)
    if bad:
        data.left_out["unreadable"] = len(bad)
    data.train = data.train.drop([i for i in bad if i < count]).reset_index(drop=True)
    data.heldout = data.heldout.drop([i - count for i in bad if i >= count]).reset_index(drop=True)
    if data.train.empty:
        fail(f"{data.source}: no training image is left of {count:,}, all are unreadable; see --image_root")


# ----------------------------------------------------------------------------------------------------------------------
# Data: the stream of samples
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.stream_seed
def stream_seed(*key) -> int:
    """A 63-bit seed that is a function of the key alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


# Copied from train_full.SampleStream
class SampleStream(torch.utils.data.Dataset):
    """Sample n of an endless stream of training samples, as a pure function of (seed, n).

    The stream is one seeded permutation of the images after another, so any run of len(table) samples that starts an epoch
    has each image once. Everything random about a sample is drawn from a generator keyed by n: which process draws it, in
    which batch, before or after an interruption, makes no difference.

    A sample has `noise`, `latent_noise` (latent_shape), `timesteps`; `moments` (2C, h, w) if they are cached and
    `pixel_values` (3, H, W) in [-1, 1] if asked for; `encoder_hidden_states` (77, D) if cached, else `input_ids` (77).

    With `heldout`, sample n is image n, captions are never dropped, and the timesteps are spread evenly (golden-ratio
    sequence) and independent of the seed: the same measurement for every run.
    """

    def __init__(self, images, captions, latent_shape, num_train_timesteps, seed, resolution, resize_mode, input_ids,
                 text_embeddings=None, moments=None, with_pixels=True, caption_dropout=0.0, noise_offset=0.0, heldout=False):  # fmt: skip
        self.images, self.captions, self.latent_shape = images, captions, latent_shape
        self.num_train_timesteps, self.seed = num_train_timesteps, "held-out" if heldout else seed
        self.resolution, self.resize_mode, self.with_pixels = resolution, resize_mode, with_pixels
        self.input_ids, self.text_embeddings, self.moments = input_ids, text_embeddings, moments
        self.caption_dropout, self.noise_offset, self.heldout = caption_dropout, noise_offset, heldout
        self._epoch, self._order = -1, None
        # Unreadable images that others stand in for, and those of them that all processes know of.
        self.skip_bad, self.bad, self.told = False, set(), set()

    def __len__(self) -> int:
        return len(self.images)

    def index(self, n: int) -> int:
        """The image of sample n."""
        epoch, position = divmod(n, len(self.images))
        if self.heldout:
            return position
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.images), generator=generator)
        return int(self._order[position])

    def read(self, i: int) -> tuple[int, np.ndarray]:
        """Image i and its pixels; with `skip_bad` the first after it that can be read, on whichever process."""
        wanted = i
        while True:
            try:
                return i, load_image(self.images[i], self.resolution, self.resize_mode)
            except BadImage:
                self.bad.add(i)
                i = (i + 1) % len(self.images)
                if not self.skip_bad or i == wanted:
                    raise

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        i = wanted = self.index(n)
        if self.moments is None or self.with_pixels:
            i, pixels = self.read(wanted)
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "sample", n))
        timestep = torch.randint(self.num_train_timesteps, (), generator=generator)
        noise = torch.randn(self.latent_shape, generator=generator)
        latent_noise = torch.randn(self.latent_shape, generator=generator)
        offset = torch.randn(self.latent_shape[0], 1, 1, generator=generator)
        # The empty prompt is the last caption.
        caption = -1 if torch.rand((), generator=generator) < self.caption_dropout else self.captions[i]
        if self.heldout:
            timestep = torch.tensor(int((n * 0.6180339887498949 + 0.5) % 1 * self.num_train_timesteps))
        sample = {"noise": noise + self.noise_offset * offset, "latent_noise": latent_noise, "timesteps": timestep}
        if self.moments is not None:
            sample["moments"] = torch.from_numpy(self.moments[i].astype(np.float32))
        if self.moments is None or self.with_pixels:
            # From a loader's worker this is the only word of it.
            sample["skipped"] = -1 if i == wanted else wanted
            sample["pixel_values"] = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)
        if self.text_embeddings is not None:
            sample["encoder_hidden_states"] = torch.from_numpy(np.array(self.text_embeddings[caption]))
        else:
            sample["input_ids"] = self.input_ids[caption]
        return sample


# Copied from train_full.rank_batches
def rank_batches(first_sample: int, num_batches: int, batch_size: int, rank: int, num_processes: int):
    """Yields this process's part of each successive micro-batch, as positions in the stream."""
    for batch in range(num_batches):
        start = first_sample + (batch * num_processes + rank) * batch_size
        yield list(range(start, start + batch_size))


# ----------------------------------------------------------------------------------------------------------------------
# Data: what is computed once
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.image_key
def image_key(image: "str | DatasetImage") -> str:
    """What is known of an image without decoding it: the hash of its path, size and time, or of its bytes."""
    if isinstance(image, str):
        try:
            stat = os.stat(image)
        except OSError as error:
            raise BadImage(f"{image}: cannot be read any more ({error.strerror})") from None
        return hashlib.sha256(f"{image}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:32]
    return hashlib.sha256(image.open().getvalue()).hexdigest()[:32]


# Copied from train_full.allow_tf32
def allow_tf32(accelerator: Accelerator, allowed: bool) -> None:
    """On GPUs, lets products and convolutions of float32 round their factors to 10 bits, which is some times faster."""
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        torch.backends.cudnn.allow_tf32 = allowed


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


# Copied from train_full.read_cache
def read_cache(accelerator: Accelerator, folder: Path) -> dict[str, np.ndarray]:
    """The memory-mapped rows of a cache by key; files that are cut short or changed since they were written are deleted."""
    names = broadcast_object_list([sorted(path.name for path in folder.glob("*.npy"))])[0]
    # Checking reads all bytes, so the processes share it.
    mine = names[accelerator.process_index :: accelerator.num_processes]
    damaged = set(gather_object([name for name in mine if not is_whole(folder / name)]))
    rows = {}
    for name in names:
        path = folder / name
        if name not in damaged:
            rows |= zip(json.loads(path.with_suffix(".json").read_text())["keys"], np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)))
        elif accelerator.is_main_process:
            print(f"{path}: damaged, computed again", file=sys.stderr)
            path.unlink(missing_ok=True)
    return rows


# Copied from train_full.write_cache_file
def write_cache_file(folder: Path, keys: list[str], rows: np.ndarray) -> None:
    """Adds a file to a cache: a name that no other has, the seal first, since a file without one counts as damaged."""
    name = uuid.uuid4().hex
    part = folder / f"{name}.part"
    # Not straight into the file, since NumPy does not say then that the disk is full.
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    try:
        part.write_bytes(buffer.getbuffer())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    write_text(folder / f"{name}.json", json.dumps({"seal": seal_of(part, keys), "keys": keys}))
    os.replace(part, folder / f"{name}.npy")


# Copied from train_full.cache_rows
def cache_rows(accelerator: Accelerator, folder: Path, keys: list[str], encode, dtype: type, unit: str) -> list[np.ndarray]:
    """The row of each key from the cache in `folder`, memory-mapped; all processes together encode what is not there yet.

    `encode(positions)` yields the rows at these positions of `keys`, in float32. Runs that need some of the same rows share
    them, whatever tables they come from; runs that start at once may compute a row twice.
    """
    rows = read_cache(accelerator, folder)
    missing = [i for key, i in {key: i for i, key in enumerate(keys)}.items() if key not in rows]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*.part"):
            # Another run may have put it in its place meanwhile.
            with contextlib.suppress(FileNotFoundError):
                if accelerator.is_main_process and time.time() - stale.stat().st_mtime > 3600:
                    stale.unlink()
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        progress = tqdm(total=len(mine), desc=f"encoding {unit}s", unit=unit, leave=False, disable=not accelerator.is_main_process)
        allow_tf32(accelerator, False)
        with progress:
            encoded = encode(mine)
            for start in range(0, len(mine), CACHE_FILE_ROWS):
                part = []
                for row in itertools.islice(encoded, CACHE_FILE_ROWS):
                    part.append(row.astype(dtype))
                    progress.update()
                write_cache_file(folder, [keys[i] for i in mine[start : start + CACHE_FILE_ROWS]], np.stack(part))
        allow_tf32(accelerator, True)
        accelerator.wait_for_everyone()
        rows = read_cache(accelerator, folder)
    return [rows[key] for key in keys]


# Copied from train_full.encode_images
@torch.no_grad()
def encode_images(vae, images: list, device: torch.device, resolution: int, resize_mode: str, positions: list[int]):
    """Yields the VAE's moments of the images at some positions, (2C, h, w), in float32."""
    vae.to(device, torch.float32)
    # One image at a time, since at 512x512 the encoder fills a device by itself; few decoded ahead, since all would not fit.
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(positions), 64):
            for image in pool.map(lambda i: load_image(images[i], resolution, resize_mode), positions[start : start + 64]):
                pixel_values = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)
                yield encode_moments(vae, pixel_values[None].to(device))[0].cpu().numpy()


# Copied from train_full.encode_captions
@torch.no_grad()
def encode_captions(text_encoder, input_ids: torch.Tensor, device: torch.device, positions: list[int]):
    """Yields the embeddings of the captions at some positions, (77, D), in float32; like the pipeline, without a mask."""
    text_encoder.to(device, torch.float32)
    for ids in input_ids[positions].split(64):
        yield from text_encoder(ids.to(device))[0].cpu().numpy()


# Copied from train_full.prepare_streams
def prepare_streams(args, accelerator, pipeline, data, hashes, output_dir, use_pixels, use_moments, use_embeddings):
    """The training and held-out streams with all that can be cached, and a line on each cache for the plan.

    A model whose outputs are cached leaves the device, and the memory as well where no pictures will be drawn with it.
    """
    captions = sorted({*data.train["prompt"], *data.heldout["prompt"]}) + [""]
    codes = {caption: code for code, caption in enumerate(captions)}
    tokenizer = pipeline.tokenizer
    length = tokenizer.model_max_length
    cut = sum(len(ids) > length for ids in tokenizer(captions).input_ids)
    if cut:
        data.notes.append(f"{cut:,} of {len(captions) - 1:,} captions are cut at {length} tokens")
    input_ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    text_embeddings, moments, cached = None, None, []
    cache_dir = Path(args.latent_cache_dir or output_dir.parent / "latent_cache")
    on_disk = args.latent_cache_dir != "none"
    idle = "cpu" if args.num_validation_images else "meta"
    if use_embeddings and len(captions) <= MAX_CACHED_CAPTIONS:
        encode = functools.partial(encode_captions, pipeline.text_encoder, input_ids, accelerator.device)
        keys = [hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:32] for ids in input_ids]
        folder = cache_dir / f"captions-{hashes['text_encoder'][:16]}"
        text_embeddings = cache_rows(accelerator, folder, keys, encode, np.float32, "caption") if on_disk else list(encode(range(len(keys))))
        pipeline.text_encoder.to(idle)
        cached.append(f"embeddings of {len(captions):,} captions")
    images = [*data.train["image"], *data.heldout["image"]]
    if use_moments and on_disk:
        encode = functools.partial(encode_images, pipeline.vae, images, accelerator.device, args.resolution, args.resize_mode)
        folder = cache_dir / f"latents-{hashes['vae'][:16]}-{args.resolution}-{args.resize_mode}"
        moments = cache_rows(accelerator, folder, [image_key(image) for image in images], encode, np.float16, "image")
        pipeline.vae.to("cpu" if use_pixels else idle)
        cached.append(f"{'the anchor of the VAE' if use_pixels else 'latents'} in {cache_dir}")
    side, count = args.resolution // pipeline.vae_scale_factor, len(data.train)
    streams = []
    for table, part, heldout in ((data.train, slice(count), False), (data.heldout, slice(count, None), True)):
        streams.append(SampleStream(
            images[part], [codes[prompt] for prompt in table["prompt"]], (pipeline.vae.config.latent_channels, side, side),
            pipeline.scheduler.config.num_train_timesteps, args.seed, args.resolution, args.resize_mode, input_ids,
            text_embeddings, moments and moments[part], use_pixels, 0.0 if heldout else args.caption_dropout,
            0.0 if heldout else args.noise_offset, heldout,
        ))  # fmt: skip
    return *streams, cached


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


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


# Copied from train_full.load_base_pipeline
def load_base_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The base model; ends with exit status 2 where it is incomplete or does not suit the flags."""
    name = args.pretrained_model_name_or_path
    flag = f"--pretrained_model_name_or_path {name}"
    if Path(name).is_dir():
        parts = [p for p in ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler") if not (Path(name) / p).exists()]
        if parts:
            fail(f"{flag}: the model folder has no {', '.join(parts)}; a complete diffusers pipeline is needed")
    try:
        pipeline = load_pipeline(name, revision=args.revision, variant=args.variant)
        check_pipeline(pipeline)
    except Exception as error:  # whatever the libraries make of somebody's files
        fail(f"{flag}: cannot be loaded, pass a hub id or the folder of a complete diffusers pipeline ({' '.join(str(error).split())[:300]}){pickle_advice(name)}")
    if pipeline.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"{flag}: predicts {pipeline.scheduler.config.prediction_type!r}; only epsilon and v_prediction are trained")
    pipeline.set_progress_bar_config(disable=True)
    if args.resolution % pipeline.vae_scale_factor:
        fail(f"--resolution {args.resolution}: this VAE takes multiples of {pipeline.vae_scale_factor}")
    return pipeline


# Copied from train_full.fingerprint
def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Copied from train_full.to_channels_last
def to_channels_last(component: torch.nn.Module) -> None:
    """Lays the weights of convolutions out as a GPU's fastest kernels take them; a CPU gains nothing and would hold them twice."""
    if torch.cuda.is_available():
        component.to(memory_format=torch.channels_last)


# Copied from train_full.fingerprint_components
def fingerprint_components(accelerator: Accelerator, pipeline: StableDiffusionPipeline) -> dict[str, str]:
    """The hashes of the base model's weights, computed once for all processes."""
    hashes = None
    if accelerator.is_main_process:
        hashes = {name: fingerprint(getattr(pipeline, name)) for name in ("unet", "text_encoder", "vae")}
    return broadcast_object_list([hashes])[0]


# Copied from train_full.encode_moments
def encode_moments(vae, pixel_values: torch.Tensor) -> torch.Tensor:
    """Mean and log-variance of the VAE's posterior, stacked: (B, 3, H, W) in [-1, 1] to (B, 2C, h, w)."""
    return vae.encode(pixel_values).latent_dist.parameters


# Copied from train_full.split_moments
def split_moments(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior, with the clamp that diffusers' own distribution has."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))


# Copied from train_full.DiffusionLoss
class DiffusionLoss(torch.nn.Module):
    """The training objective in one forward, so that DDP, autocast and torch.compile see a single call.

    A pure function of the batch (all random numbers are in it) and the weights. Returns a dict of per-sample losses, each of
    shape (B,) in float32; `loss` is what is trained on. `vae` and `text_encoder` are None where their outputs are cached.
    """

    def __init__(self, unet, vae, text_encoder, noise_scheduler, scaling_factor: float, snr_gamma: float | None = None):
        super().__init__()
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.noise_scheduler, self.scaling_factor, self.snr_gamma = noise_scheduler, scaling_factor, snr_gamma

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moments = batch["moments"] if "moments" in batch else encode_moments(self.vae, batch["pixel_values"])
        mean, std = split_moments(moments)
        diffusion = self.diffusion((mean + std * batch["latent_noise"]) * self.scaling_factor, batch)
        return {"loss": diffusion * self.snr_weight(batch["timesteps"]), "diffusion": diffusion}

    def diffusion(self, latents: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Squared error of the U-Net's prediction (noise, or velocity for a v-prediction model), (B,)."""
        noise, timesteps = batch["noise"], batch["timesteps"]
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        if "encoder_hidden_states" in batch:
            encoder_hidden_states = batch["encoder_hidden_states"]
        else:
            encoder_hidden_states = self.text_encoder(batch["input_ids"])[0]
        model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states).sample
        velocity = self.noise_scheduler.config.prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))

    def snr_weight(self, timesteps: torch.Tensor) -> torch.Tensor | float:
        """Min-SNR weights, arXiv 2303.09556 eq. 5 for noise prediction, with SNR + 1 below for velocity."""
        if self.snr_gamma is None:
            return 1.0
        snr = compute_snr(self.noise_scheduler, timesteps)
        velocity = self.noise_scheduler.config.prediction_type == "v_prediction"
        return snr.clamp(max=self.snr_gamma) / (snr + 1 if velocity else snr)


def scale_output(module: torch.nn.Module, inputs, output: torch.Tensor) -> torch.Tensor:
    """Forward hook: the learnable scale of DiffFit on a branch's output."""
    return output * module.gamma.to(output.dtype)


def apply_method(unet: torch.nn.Module, method: str, rank: int = 8, lora_alpha: int = 16, lora_dropout: float = 0.0) -> None:
    """Leaves exactly the method's parameters trainable, in float32, and adds those that the U-Net does not have.

    lora, dora: PEFT's update of the attention projections (arXiv 2106.09685, 2402.09353).
    bitfit: every bias that exists (arXiv 2106.10199).
    difffit: the biases, the weights of all norms, and a scale of one per channel on the output of each residual branch of
    each transformer block (arXiv 2304.06648).
    """
    unet.requires_grad_(False)
    if method in ("lora", "dora"):
        config = LoraConfig(
            r=rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=LORA_TARGETS, use_dora=method == "dora"
        )
        unet.add_adapter(config)
    else:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name.endswith(".bias"))
    if method == "difffit":
        for name, module in unet.named_modules():
            if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.requires_grad_(True)
            if name.endswith(BRANCH_ENDS):
                gamma = torch.ones(module.out_features, device=module.weight.device)
                module.register_parameter("gamma", torch.nn.Parameter(gamma))
                module.register_forward_hook(scale_output)
    for module in unet.modules():
        own = list(module.parameters(recurse=False))
        trains = any(parameter.requires_grad for parameter in own)
        for parameter in own:
            # On a CPU a norm takes weight and bias of one type only.
            if parameter.requires_grad or (trains and isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm))):
                parameter.data = parameter.data.float()


def build_loss(args: argparse.Namespace, pipeline: StableDiffusionPipeline, stream: SampleStream, mixed_precision: str) -> DiffusionLoss:
    """Applies the method and puts the components that the loop needs into the loss: all that is frozen in half precision."""
    frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)
    for component in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        component.requires_grad_(False).to(dtype=frozen_dtype)
    for component in (pipeline.unet, pipeline.vae):
        to_channels_last(component)
    # The low-rank matrices start from random numbers.
    torch.manual_seed(stream_seed(args.seed, "method"))
    apply_method(pipeline.unet, args.method, args.rank, args.lora_alpha, args.lora_dropout)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    if args.compile:
        pipeline.unet.compile(dynamic=False)
    vae = pipeline.vae if stream.moments is None else None
    text_encoder = pipeline.text_encoder if stream.text_embeddings is None else None
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return DiffusionLoss(pipeline.unet, vae, text_encoder, noise_scheduler, pipeline.vae.config.scaling_factor, args.snr_gamma)


# Copied from train_full.count_parameters
def count_parameters(parameters: dict[str, torch.nn.Parameter]) -> dict[str, int]:
    """Trainable parameters by component, from names such as unet.conv_in.bias."""
    counts = Counter()
    for name, parameter in parameters.items():
        counts[name.split(".")[0]] += parameter.numel()
    return dict(counts)


# Copied from train_full.trainable_parameters
def trainable_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What trains, by name; a dict, since an iterator would be empty the second time it is used."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


# Copied from train_full.make_optimizer
def make_optimizer(args: argparse.Namespace, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """AdamW with the recipe's constants, fused into one pass over the memory, or in 8 bits if asked for."""
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"), **options)


# Copied from train_full.run_identity
def run_identity(args: argparse.Namespace, data: TrainingData, hashes: dict[str, str], global_batch: int) -> dict:
    """What a checkpoint must agree on with the run that goes on from it, and what is told where it differs."""
    rows = "\n".join(f"{name}\t{prompt}" for name, prompt in zip(data.train["name"], data.train["prompt"]))
    return {
        "base_model": args.pretrained_model_name_or_path,
        "base_fingerprint": hashlib.sha256("".join(hashes.values()).encode()).hexdigest(),
        "data_fingerprint": hashlib.sha256(f"{args.resolution}/{args.resize_mode}\n{rows}".encode()).hexdigest(),
        "global_batch_size": global_batch,
        **{name: value for name, value in vars(args).items() if name in TOLD_SETTINGS},
    }


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


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


# Copied from train_full.TrainState
@dataclass
class TrainState:
    """Everything that changes as a run goes on."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    identity: dict
    # Holds the weights whole on every process, where they are shared out.
    whole: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    # The mean loss of the last logging window; the sums of losses and gradient norms since, over so many batches.
    train_loss: float | None = None
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    counted: int = 0


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


# Copied from train_full.gather
def gather(accelerator: Accelerator, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole copies in the CPU's memory, on the main process; all processes call this, since each may hold a part."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if accelerator.is_main_process:
            found[name] = tensor.cpu().contiguous()
    return found


# Copied from train_full.laid_out
def laid_out(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A whole tensor as its parameter lies in memory: in the same order, and where that is shared out, this process's part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


# Copied from train_full.save_checkpoint
def save_checkpoint(accelerator: Accelerator, state: TrainState, output_dir: Path, limit: int) -> None:
    """Writes checkpoint-<step> beside and renames it into place, then drops the oldest ones over the limit.

    Ends with exit status 2, and the earlier checkpoints as they were, where there is no room for it.
    """
    folder = output_dir / f"checkpoint-{state.step}"
    part = output_dir / f".checkpoint-{state.step}.part"
    try:
        write_checkpoint(accelerator, state, part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        kept = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        fail(f"{folder}: cannot be written ({error}); make room and go on with --resume_from_checkpoint latest (checkpoints there: {kept})")
    if not accelerator.is_main_process:
        return
    if folder.exists():
        remove_checkpoint(folder)
    os.replace(part, folder)
    # So that the new name is on the disk too before older ones go.
    descriptor = os.open(output_dir, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    # Later ones are of a branch that was left behind. The new one is whole and on the disk, so the last good one stays.
    earlier = [path for path in list_checkpoints(output_dir) if int(path.name[11:]) <= state.step]
    for old in earlier[:-limit]:
        remove_checkpoint(old)


# Copied from train_full.write_checkpoint
def write_checkpoint(accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    """Fills a new folder with what trains, the optimizer, the counters and, last, the manifest of these files."""
    parameters = trainable_parameters(accelerator.unwrap_model(state.model))
    optimizer = flatten(state.optimizer.state_dict()["state"])
    files = {"trainable": parameters, "optimizer": {name: value for name, value in optimizer.items() if torch.is_tensor(value)}}
    if state.ema:
        files["ema"] = dict(zip(parameters, state.ema.shadow_params))
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for name, tensors in files.items():
        whole = gather(accelerator, tensors)
        if accelerator.is_main_process:
            save_file(whole, folder / f"{name}.safetensors")
    if not accelerator.is_main_process:
        return
    scalars = {
        "identity": state.identity, **{name: getattr(state, name) for name in COUNTERS},
        "optimizer": {name: value for name, value in optimizer.items() if not torch.is_tensor(value)},
        "ema_steps": state.ema.optimization_step if state.ema else None,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(scalars, indent=2))
    files = {path.name: describe_file(path) for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"files": files}, indent=2))
    for path in folder.iterdir():
        # So that it is on the disk afterwards, not only on its way there.
        with path.open("rb") as file:
            os.fsync(file.fileno())


# Copied from train_full.describe_file
def describe_file(path: Path) -> dict:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


# Copied from train_full.checkpoint_problem
def checkpoint_problem(folder: Path) -> str | None:
    """What is missing or damaged in a checkpoint, by its manifest; None for a whole one."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        for name in sorted({"state.json", "trainable.safetensors", "optimizer.safetensors", *files}):
            if Path(name).name != name or files.get(name) != describe_file(folder / name):
                return f"{name} is not as it was written"
    except OSError as error:
        # A disk that fails while it is read names no file.
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json is damaged"
    return None


# Copied from train_full.list_checkpoints
def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whether they are whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[11:]))


# Copied from train_full.remove_checkpoint
def remove_checkpoint(folder: Path) -> None:
    """Takes a checkpoint away at once: a kill on the way leaves what the next start clears, not a part under its name."""
    part = folder.with_name(f".{folder.name}.old.part")
    shutil.rmtree(part, ignore_errors=True)
    os.replace(folder, part)
    # A checkpoint that lies on another disk is a link.
    part.unlink() if part.is_symlink() else shutil.rmtree(part)


# Copied from train_full.clear_run
def clear_run(output_dir: Path) -> None:
    """Takes away what an earlier run left, so that nothing of it is taken for the new one's; other files stay."""
    # The summary first: without it the rest is no finished run.
    for path in [output_dir / name for name in (*RUN_FILES, "validation", "logs")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for folder in list_checkpoints(output_dir):
        remove_checkpoint(folder)


# Copied from train_full.find_checkpoint
def find_checkpoint(args: argparse.Namespace, output_dir: Path, notes: list[str]) -> Path | None:
    """The checkpoint to go on from, or None; a folder with a run in it is not overwritten unless that is asked for.

    A damaged one is refused, or passed over with a note if it is the latest.
    """
    base = Path(args.pretrained_model_name_or_path)
    if base.is_dir() and base.resolve() == output_dir.resolve():
        fail(f"--output_dir {output_dir} is the base model's own folder; pass another")
    existing, finished = list_checkpoints(output_dir), (output_dir / "training_summary.json").exists()
    named = None if args.resume_from_checkpoint in (None, "latest") else Path(args.resume_from_checkpoint)
    if named:
        problem = checkpoint_problem(named)
        if problem:
            fail(f"{named}: a file is missing or damaged ({problem}); resume from another checkpoint or from the latest")
        if named.resolve().parent == output_dir.resolve():
            return named
    elif existing and args.resume_from_checkpoint:
        for checkpoint in reversed(existing):
            problem = checkpoint_problem(checkpoint)
            if not problem:
                return checkpoint
            notes.append(f"{checkpoint} is passed over: a file is missing or damaged ({problem})")
        if not finished:
            notes.append(f"no checkpoint in {output_dir} is whole, so the run starts anew")
            return None
    if (existing or finished) and not args.overwrite_output_dir:
        fail(f"{output_dir} already holds a run; go on from its checkpoints with --resume_from_checkpoint latest, start anew with --overwrite_output_dir, or pass another --output_dir")
    foreign = [name for name in RUN_FILES if (output_dir / name).exists()]
    if foreign and not (existing or finished):
        fail(f"{output_dir} is no run's folder, and {', '.join(foreign)} would be overwritten; pass another --output_dir")
    return named


# Copied from train_full.read_state
def read_state(checkpoint: Path) -> dict:
    """The counters of a checkpoint."""
    form = {"identity": dict, "step": int, "samples_seen": int, "seconds": (int, float), "optimizer": dict}
    form |= {"train_loss": (int, float, type(None)), "loss_sum": (int, float), "norm_sum": (int, float), "counted": int}
    found = read_json(checkpoint / "state.json", "resume from another checkpoint", **form)
    if found["step"] < 0 or found["samples_seen"] < 0 or not isinstance(found.get("ema_steps"), int if found["identity"].get("use_ema") else type(None)):
        fail(f"{checkpoint / 'state.json'}: not as these scripts write it; resume from another checkpoint")
    return found


# Copied from train_full.check_identity
def check_identity(checkpoint: Path, identity: dict, total_steps: int) -> list[str]:
    """Ends with exit status 2 where a checkpoint is of another model or method; returns what else differs, as notes."""
    scalars = read_state(checkpoint)
    if scalars["step"] > total_steps:
        fail(f"{checkpoint} is past the {total_steps:,} steps asked for; raise --max_train_steps or --num_train_epochs")
    saved, notes = scalars["identity"], []
    for key, value in identity.items():
        # The same model may stand elsewhere; its weights decide.
        if saved.get(key) == value or key == "base_model":
            continue
        difference = f"{checkpoint}: {key.replace('_', ' ')} was {saved.get(key)!r} and is now {value!r}"
        if key == "base_fingerprint":
            fail(f"{checkpoint}: the base model was {saved.get('base_model')} with other weights than {identity['base_model']} has; pass that one")
        if key in ("method", "rank", "lora_alpha", "lora_dropout", "vae_loss", "use_8bit_adam", "use_ema"):
            fail(f"{difference}; pass what the checkpoint was made with, or another --output_dir")
        notes.append(f"{difference}; the run goes on, but not as it would have without the interruption")
    return notes


# Copied from train_full.load_checkpoint
def load_checkpoint(accelerator: Accelerator, state: TrainState, checkpoint: Path, output_dir: Path) -> None:
    """Puts a checkpoint's tensors and counters back; every name must match on both sides."""
    scalars = read_state(checkpoint)
    parameters = trainable_parameters(accelerator.unwrap_model(state.model))
    try:
        saved, moments = load_file(checkpoint / "trainable.safetensors"), load_file(checkpoint / "optimizer.safetensors")
        shadow = load_file(checkpoint / "ema.safetensors") if state.ema else {}
    except (OSError, SafetensorError) as error:
        fail(f"{checkpoint}: a file is missing or damaged ({error}); resume from another checkpoint")
    for tensors in (saved, *([shadow] if state.ema else [])):
        difference = sorted(tensors.keys() ^ parameters.keys())
        if difference:
            fail(f"{checkpoint}: {len(difference)} parameters do not match what trains, such as {difference[0]}")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape or not tensors[name].isfinite().all():
                fail(f"{checkpoint}: {name} has another shape than what trains, or is not finite; resume from another checkpoint")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(laid_out(saved[name], parameter))
    # accelerate wraps the optimizer; its own state_dict is torch's.
    groups = state.optimizer.state_dict()["param_groups"]
    in_order = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    try:
        optimizer = unflatten(moments | scalars["optimizer"])
        for i, values in optimizer.items():
            # Fused kernels go through memory as it lies: a moment, contiguous in the file, has to lie there as its weight does.
            # Before the optimizer has them, since it takes what it is given to the device, whole.
            shaped = {name: value for name, value in values.items() if torch.is_tensor(value) and value.shape == in_order[i].shape}
            values.update({name: laid_out(value, in_order[i]) for name, value in shaped.items()})
        state.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        for parameter, values in state.optimizer.state.items():
            pair = [values[name] for name in (("exp_avg", "exp_avg_sq") if "exp_avg" in values else ("state1", "state2"))]
            if "step" not in values or any(moment.shape != parameter.shape or not moment.isfinite().all() for moment in pair):
                raise ValueError("moments of another shape, or not finite")
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if plain_sentence(error, ""):
            # Of too little memory, or a lost process: the checkpoint is sound.
            raise
        fail(f"{checkpoint}: its optimizer does not fit what trains ({error}); resume from another checkpoint")
    # The rate is a function of the step: one step of the schedule from the step before sets it.
    position = {"last_epoch": scalars["step"] - 1, "_step_count": scalars["step"] + 1}
    state.lr_scheduler.load_state_dict(state.lr_scheduler.state_dict() | position)
    state.lr_scheduler.step()
    if state.ema:
        state.ema.shadow_params = [laid_out(shadow[name], p) for name, p in parameters.items()]
        state.ema.optimization_step = scalars["ema_steps"]
    if accelerator.scaler and scalars.get("scaler"):
        accelerator.scaler.load_state_dict(scalars["scaler"])
    for name in COUNTERS:
        setattr(state, name, scalars[name])
    if accelerator.is_main_process:
        # The branch that is left behind would be the latest again.
        for later in list_checkpoints(checkpoint.parent):
            if int(later.name[11:]) > state.step and checkpoint.parent.resolve() == output_dir.resolve():
                remove_checkpoint(later)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.StopVote
class StopVote:
    """Lets all processes stop after the same step once SIGTERM or SIGUSR1 has reached one of them.

    Each step starts a reduction of the signals' numbers between the hosts and reads that of the step before, so no device
    waits for it. It also notices a process that has died, which devices alone may wait for.
    """

    def __init__(self):
        self.number, self.votes, self.group = 0, [], None
        if torch.distributed.is_initialized():
            self.group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))

    def __enter__(self) -> "StopVote":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        while self.votes and kind is None:
            self.read()

    def note(self, number: int, frame) -> None:
        self.number = number

    def read(self) -> int:
        work, number = self.votes.pop(0)
        work.wait()
        return int(number)

    def passed(self) -> int:
        """The number of the signal, 0 for none, the same on every process, each of which asks once a step."""
        if self.group is None:
            return self.number
        number = torch.tensor(self.number)
        self.votes.append((torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group, async_op=True), number))
        return self.read() if len(self.votes) > 1 else 0


# Copied from train_full.ignore_signals
def ignore_signals(worker: int) -> None:
    """For a loader's workers: a signal to all processes of a job is answered by the one that trains."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# Copied from train_full.stop_run
def stop_run(accelerator: Accelerator, state: TrainState, number: int) -> NoReturn:
    """Ends a run that a signal has stopped, after its checkpoint, with the status that asks for another start."""
    accelerator.end_training()
    if accelerator.is_main_process:
        told = f"stopped by {signal.Signals(number).name} after step {state.step:,}, which is saved; go on with --resume_from_checkpoint latest"
        print(f"{Path(sys.argv[0]).name}: {told}", file=sys.stderr, flush=True)
    raise SystemExit(STOPPED)


# Copied from train_full.stop_diverged
def stop_diverged(loss: float, norm: float, state: TrainState, output_dir: Path) -> NoReturn:
    """Ends a run whose loss or gradient is not finite any more, before a checkpoint of it is written."""
    rates = state.lr_scheduler.get_last_lr()
    found = f"loss {loss:.3g}, norm of the gradient {norm:.3g}, learning rate {', '.join(f'{rate:.1e}' for rate in rates)}"
    kept = [path.name for path in list_checkpoints(output_dir) if int(path.name[11:]) <= state.step]
    way_out = f"go on from {kept[-1]} with --resume_from_checkpoint latest" if kept else "start again"
    fail(f"diverged by step {state.step:,}: {found}; {way_out} at a lower rate or with --lr_warmup_steps, --max_grad_norm, --snr_gamma or --mixed_precision no")


# Copied from train_full.tell_bad_images
def tell_bad_images(accelerator: Accelerator, stream: SampleStream) -> None:
    """Says once, and for all processes, which images could not be read any more and had others in their place."""
    if stream.skip_bad:
        found = sorted(set(gather_object(sorted(stream.bad - stream.told))))
        if accelerator.is_main_process:
            for i in found:
                print(f"  skipped  {stream.images[i]}: cannot be read any more", flush=True)
        stream.told.update(found)


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


# Copied from train_full.make_accelerator
def make_accelerator(args: argparse.Namespace, output_dir: Path) -> Accelerator:
    """An Accelerator that logs to the run folder; ends with exit status 2 where nothing can be written there."""
    sharded = [name for name in ("FSDP", "DEEPSPEED") if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]
    if sharded:
        fail(f"accelerate's {sharded[0]} is not supported: use plain data parallelism (launch/accelerate/), or train_full.py's --fsdp")
    if os.environ.get("RANK", "0") == "0":
        existed = output_dir.is_dir()
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            (output_dir / ".probe").touch()
            (output_dir / ".probe").unlink()
        except OSError as error:
            fail(f"--output_dir {output_dir}: cannot be written ({error.strerror})")
        if not existed:
            # A run that ends on bad data leaves nothing behind.
            output_dir.rmdir()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    silence_known_noise()
    accelerator = Accelerator(
        # Without this, processes that torchrun starts on a machine without a GPU would each train for themselves.
        cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # The others wait while the first process checks the images or draws pictures.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))],
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        fail("--mixed_precision fp16 needs a GPU; pass bf16 or no")
    allow_tf32(accelerator, True)
    return accelerator


# Copied from train_full.heldout_losses
@torch.no_grad()
def heldout_losses(accelerator: Accelerator, model: torch.nn.Module, stream: SampleStream, batch_size: int, static: bool) -> dict[str, np.ndarray]:
    """Per-image losses on the held-out images at fixed timesteps and noise, the same on every process.

    With `static`, the last batch is filled up with its last image, since a compiled U-Net is compiled anew for each size.
    """
    # Without the wrapper of DDP, whose processes would have to call it equally often.
    model = accelerator.unwrap_model(model)
    model.eval()
    losses = {}
    for start in range(accelerator.process_index * batch_size, len(stream), accelerator.num_processes * batch_size):
        count = min(batch_size, len(stream) - start)
        samples = [stream[start + n] for n in range(count)]
        batch = torch.utils.data.default_collate(samples + samples[-1:] * (batch_size - count if static else 0))
        for name, values in model({k: v.to(accelerator.device) for k, v in batch.items()}).items():
            total = losses.setdefault(name, torch.zeros(len(stream), device=accelerator.device))
            total[start : start + count] = values[:count]
    model.train()
    names = [name for name in ("diffusion", "reconstruction") if any(name in found for found in gather_object([list(losses)]))]
    zeros = torch.zeros(len(stream), device=accelerator.device)
    return {name: accelerator.reduce(losses.get(name, zeros), "sum").cpu().numpy() for name in names}


# Copied from train_full.draw_validation
@torch.no_grad()
def draw_validation(accelerator: Accelerator, pipeline: StableDiffusionPipeline, prompts: list[str], args: argparse.Namespace, path: Path) -> None:
    """Samples each prompt from fixed seeds and writes the pictures as one row; what was off the device goes off again."""
    # The others stay untouched: FSDP takes apart again what is moved.
    away = [part for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) if part.device.type != accelerator.device.type]
    for component in away:
        component.to(accelerator.device)
    pipeline.unet.eval()
    pictures = []
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(stream_seed(args.seed, "validation", i))
        with accelerator.autocast():
            pictures += pipeline(prompt, height=args.resolution, width=args.resolution, num_inference_steps=25, generator=generator).images
    pipeline.unet.train()
    for component in away:
        component.to("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    make_image_grid(pictures, rows=1, cols=len(pictures)).save(part, format="PNG")
    os.replace(part, path)


# Copied from train_full.validation_prompts
def validation_prompts(args: argparse.Namespace, data: TrainingData) -> list[str]:
    """The prompts of the validation pictures: those asked for, or the most frequent captions; each in turn until all are drawn."""
    prompts = args.validation_prompts or [prompt for prompt, _ in Counter(sorted(data.train["prompt"])).most_common(args.num_validation_images)]
    return [prompts[i % len(prompts)] for i in range(args.num_validation_images)]


# Copied from train_full.start_reporting
def start_reporting(args: argparse.Namespace, accelerator: Accelerator, output_dir: Path) -> None:
    """Opens the loggers, with the arguments as the run's settings, and the hub's repository while there is time to mend it."""
    if args.push_to_hub and accelerator.is_main_process:
        from huggingface_hub import create_repo

        try:
            create_repo(args.hub_model_id or output_dir.name, private=True, exist_ok=True)
        except Exception as error:  # of the hub, or of whichever HTTP library it uses
            fail(f"--push_to_hub: no repository could be made, see hf auth login ({' '.join(str(error).split())[:200]})")
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        for part in output_dir.glob(".*.part"):
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()
    # TensorBoard takes no lists.
    settings = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in vars(args).items()}
    accelerator.init_trackers(Path(sys.argv[0]).stem or "train", config=settings)


# Copied from train_full.validate
def validate(accelerator, state, pipeline, heldout, prompts, args, output_dir) -> dict[str, np.ndarray]:
    """Held-out losses, and pictures, of the current weights (the averaged ones with --use_ema)."""
    parameters = list(trainable_parameters(accelerator.unwrap_model(state.model)).values())
    if state.ema:
        state.ema.store(parameters)
        state.ema.copy_to(parameters)
    with state.whole():
        losses = heldout_losses(accelerator, state.model, heldout, args.train_batch_size, args.compile) if len(heldout) else {}
        tell_bad_images(accelerator, heldout)
        if prompts and accelerator.is_main_process:
            draw_validation(accelerator, pipeline, prompts, args, output_dir / "validation" / f"step-{state.step:06d}.png")
    if state.ema:
        state.ema.restore(parameters)
    accelerator.wait_for_everyone()
    accelerator.log({f"heldout_{name}": float(values.mean()) for name, values in losses.items()}, step=state.step)
    return losses


# Copied from train_full.train
def train(args, accelerator, state, stream, total_steps, parameters, validate_now, output_dir) -> None:
    """Runs the optimizer steps that are left."""
    batches = rank_batches(
        state.samples_seen, (total_steps - state.step) * args.gradient_accumulation_steps, args.train_batch_size,
        accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    cuda = accelerator.device.type == "cuda"
    workers = args.dataloader_num_workers if args.dataloader_num_workers is not None else (4 if cuda else 0)
    loader = iter(torch.utils.data.DataLoader(stream, batch_sampler=batches, num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_signals))
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    state.model.train()
    # Sums of the losses and of the gradients' norms, which also say whether all of them were finite.
    running, counted, stop = torch.tensor([state.loss_sum, state.norm_sum], device=accelerator.device), state.counted, 0
    began = window_began = time.perf_counter()
    bar = tqdm(total=total_steps, initial=state.step, desc="training", unit="step", disable=not accelerator.is_main_process, smoothing=0.05)
    with bar as progress, StopVote() as vote:
        while state.step < total_steps:
            for micro in range(args.gradient_accumulation_steps):
                # Dropout, where a method has any, draws from here: resuming needs no saved random state.
                torch.manual_seed(stream_seed(args.seed, "dropout", state.step, micro, accelerator.process_index))
                batch = next(loader)
                stream.bad.update(i for i in batch.pop("skipped", torch.empty(0)).tolist() if i >= 0)
                batch = {name: values.to(accelerator.device, non_blocking=True) for name, values in batch.items()}
                with accelerator.accumulate(state.model):
                    batch_loss = state.model(batch)["loss"].mean()
                    accelerator.backward(batch_loss)
                    if accelerator.sync_gradients:
                        # Without a limit the norm is only looked at; a scaler leaves out steps whose norm is infinite.
                        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
                        running[1] += 0.0 if accelerator.scaler else norm * args.gradient_accumulation_steps
                    state.optimizer.step()
                    state.optimizer.zero_grad()
                running[0] += batch_loss.detach()
                counted += 1
            state.lr_scheduler.step()
            if state.ema:
                state.ema.step(parameters)
            state.step += 1
            state.samples_seen += global_batch
            progress.update()

            stop = vote.passed()
            last = state.step == total_steps
            # The last one too: what is killed while it saves its results goes on from there.
            checkpoint = stop or (args.checkpointing_steps and (state.step % args.checkpointing_steps == 0 or last))
            validation = args.validation_steps and state.step % args.validation_steps == 0 and not last
            logging_step = state.step % args.logging_steps == 0 or last
            if logging_step or checkpoint:
                state.loss_sum, state.norm_sum, state.counted = *accelerator.reduce(running, "mean").tolist(), counted
                window_loss, norm = state.loss_sum / counted, state.norm_sum / counted
                if accelerator.scaler and accelerator.scaler.get_scale() < SMALLEST_SCALE:
                    norm = math.inf
                if not math.isfinite(window_loss + norm):
                    progress.clear()
                    stop_diverged(window_loss, norm, state, output_dir)
                tell_bad_images(accelerator, stream)
            if logging_step:
                state.train_loss, now = window_loss, time.perf_counter()
                rate = counted * args.train_batch_size * accelerator.num_processes / (now - window_began)
                learning_rate = state.lr_scheduler.get_last_lr()[0]
                progress.set_postfix_str(f"loss {window_loss:.4f}, lr {learning_rate:.1e}, {rate:.3g} images/s")
                accelerator.log({"loss": window_loss, "gradient_norm": norm, "lr": learning_rate, "images_per_second": rate}, step=state.step)
                running, counted, window_began = torch.zeros_like(running), 0, now
                state.loss_sum, state.norm_sum, state.counted = 0.0, 0.0, 0
            if checkpoint or validation or last:
                state.seconds += time.perf_counter() - began
                if checkpoint:
                    # Or a sentence on a full disk would stand behind the bar.
                    progress.clear()
                    save_checkpoint(accelerator, state, output_dir, args.checkpoints_total_limit)
                    accelerator.wait_for_everyone()
                if stop:
                    break
                if validation:
                    validate_now()
                    state.model.train()
                began = window_began = time.perf_counter()
    if stop and state.step < total_steps:
        stop_run(accelerator, state, stop)


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


# Copied from train_full.print_plan
def print_plan(args, accelerator, data: TrainingData, trainable, totals, total_steps, cached, output_dir, checkpoint) -> None:
    """What the run is about to do, before it does it. Main process only."""
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    left_out = [f"{count:,} {reason}" for reason, count in data.left_out.items() if count]
    lines = {
        "data": f"{data.source}, {data.rows:,} rows; left out: {', '.join(left_out) or 'none'}",
        "train": f"{len(data.train):,} images of {data.train['patient'].nunique():,} patients, {data.train['prompt'].nunique():,} captions, {args.resize_mode} to {args.resolution}x{args.resolution}",
        "held out": f"{len(data.heldout):,} images of {data.heldout['patient'].nunique():,} patients",
        "base": args.pretrained_model_name_or_path,
        "trains": "; ".join(f"{name} {count:,} of {totals[name]:,} parameters" for name, count in trainable.items()),
        "steps": f"{total_steps:,} of {global_batch} images ({args.train_batch_size} x {accelerator.num_processes} processes x {args.gradient_accumulation_steps} accumulated), {total_steps * global_batch / len(data.train):.1f} epochs",
        "cached": "; ".join(cached) or "nothing",
        "device": f"{accelerator.device.type}, mixed precision {accelerator.mixed_precision}",
        "output": str(output_dir) + (f", going on from {checkpoint}" if checkpoint else ""),
    }
    notes = list(data.notes)
    if accelerator.num_processes == 1 and "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        notes.append("one process only: accelerate launch --cpu starts no more, while --multi_gpu does, on the CPU too")
    print("\n".join([*(f"{name:>9}  {text}" for name, text in lines.items()), *(f"{'warning':>9}  {note}" for note in notes)]), flush=True)


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


# Copied from train_full.mean_row
def mean_row(metric: str, values: np.ndarray | None, note: str) -> dict:
    """A mean with its 95% normal interval."""
    if values is None or not len(values):
        return result_row(metric, None, note="no held-out images")
    mean = float(values.mean())
    if len(values) == 1:
        return result_row(metric, mean, n=1, note=note)
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return result_row(metric, mean, low=mean - half, high=mean + half, n=len(values), note=note)


# Copied from train_full.heldout_rows
def heldout_rows(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> list[dict]:
    """Held-out losses at the start and the end, and the change image by image."""
    fixed, rows = "fixed timesteps and noise", []
    for name in before or ["diffusion"]:
        rows.append(mean_row(f"heldout_{name}_start", before.get(name), f"{fixed}; the base model"))
        rows.append(mean_row(f"heldout_{name}", after.get(name), fixed))
        rows.append(mean_row(f"heldout_{name}_change", after[name] - before[name] if before else None, f"{fixed}; paired by image"))
    return rows


# Copied from train_full.peak_memory
def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # In kilobytes, but on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Copied from train_full.write_text
def write_text(path: Path, text: str) -> None:
    """Writes beside and renames into place."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# Copied from train_full.move_into
def move_into(folder: Path, output_dir: Path) -> None:
    """Moves a folder's entries into the run folder, the index last: a reader who finds it finds everything it names."""
    for entry in sorted(folder.iterdir(), key=lambda p: p.name == "model_index.json"):
        target = output_dir / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)
    folder.rmdir()


# Copied from train_full.model_card
def model_card(args, summary: dict, usage: str) -> str:
    """The run's README.md, with the front matter that the hub reads."""
    base = args.pretrained_model_name_or_path
    shown = [row for row in summary["results"] if row["value"] is not None and not row["metric"].startswith("images_")]
    rows = [f"| {row['metric']} | {row['value']:.6g} | {row['n'] or ''} |" for row in shown]
    return "\n".join([
        "---", *([f"base_model: {base}"] if not Path(base).exists() else []), "library_name: diffusers",
        "tags: [text-to-image, stable-diffusion, chest-x-ray, medical-imaging]", "inference: false", "---", "",
        f"# {summary['method']}: Stable Diffusion fine-tuned on chest radiographs", "",
        f"Base model `{Path(base).name if Path(base).exists() else base}`; trained parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in summary["trainable_parameters"].items())
        + f"; {summary['images']:,} images, {summary['steps']:,} steps of {summary['global_batch_size']}, {args.resolution}x{args.resolution} pixels.",
        "", "```python", usage, "```", "", f'Prompts: "{args.prompt_template.replace("{}", "Cardiomegaly, Pleural Effusion")}".', "",
        "| metric | value | n |", "|---|---|---|", *rows, "",
        "For research only. The images are synthetic: they show no patient and must not be used for diagnosis. The terms of the",
        "training data and of the base model apply.", "",
    ])  # fmt: skip


def save_adapter(args: argparse.Namespace, unet: torch.nn.Module, output_dir: Path) -> None:
    """Saves what was trained, as the library that loads it names it, with the method and base model in the file's header."""
    if args.method in ("lora", "dora"):
        metadata = unet.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(
            output_dir / ".adapter.part",
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
            # Without it a loader takes alpha to be the rank, and with it the wrong scale.
            unet_lora_adapter_metadata=metadata | {"target_modules": sorted(metadata["target_modules"])},
        )
        move_into(output_dir / ".adapter.part", output_dir)
        return
    weights = {name: p.detach().cpu().contiguous() for name, p in trainable_parameters(unet).items()}
    header = {"format": "pt", "method": args.method, "base_model": args.pretrained_model_name_or_path}
    save_file(weights, output_dir / ".unet_delta.part", metadata=header)
    os.replace(output_dir / ".unet_delta.part", output_dir / "unet_delta.safetensors")


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


# Copied from train_full.reload_base
def reload_base(args: argparse.Namespace, hashes: dict[str, str]) -> StableDiffusionPipeline:
    """The base model once more, in float32; ends with exit status 2 if it has changed since the run began."""
    pipeline = load_base_pipeline(args)
    if any(fingerprint(getattr(pipeline, part)) != value for part, value in hashes.items()):
        fail(f"{args.pretrained_model_name_or_path} has changed since this run began; put it back and go on with --resume_from_checkpoint latest")
    return pipeline


def save_merged(args: argparse.Namespace, hashes: dict[str, str], output_dir: Path) -> None:
    """Writes merged/: the base model in float32 with the saved adapter folded in, a plain pipeline for any diffusers code."""
    pipeline = reload_base(args, hashes)
    merge_adapter(pipeline, output_dir)
    pipeline.save_pretrained(output_dir / ".merged.part")
    shutil.rmtree(output_dir / "merged", ignore_errors=True)
    os.replace(output_dir / ".merged.part", output_dir / "merged")


def usage_example(args: argparse.Namespace, output_dir: Path) -> str:
    """The lines of Python that load the run, for its model card."""
    lines = ["from diffusers import StableDiffusionPipeline", ""]
    lines += [f'pipe = StableDiffusionPipeline.from_pretrained("{args.pretrained_model_name_or_path}", safety_checker=None)']
    if args.method in ("lora", "dora"):
        return "\n".join([*lines, f'pipe.load_lora_weights("{output_dir}")'])
    if args.method == "bitfit":
        load = f'pipe.unet.load_state_dict(load_file("{output_dir}/unet_delta.safetensors"), strict=False)'
        return "\n".join(["from safetensors.torch import load_file", *lines, load])
    return f"# sample.py folds the scales into the U-Net; with --save_merged, merged/ is a plain pipeline\npython sample.py --model {output_dir}"


# Copied from train_full.finish_run
def finish_run(args, accelerator, state, data, summary, usage, output_dir) -> None:
    """Writes the model card and the summary, last of all, and uploads the run if asked to. Main process only."""
    summary = {
        **summary,
        "base_model": args.pretrained_model_name_or_path,
        "identity": state.identity,
        "images": len(data.train),
        "patients": data.train["patient"].nunique(),
        "heldout_images": len(data.heldout),
        "rows": data.rows,
        "left_out": data.left_out,
        "notes": data.notes,
        "steps": state.step,
        "epochs": state.samples_seen / len(data.train),
        "global_batch_size": state.identity["global_batch_size"],
        "num_processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
        "mixed_precision": accelerator.mixed_precision,
        "resolution": args.resolution,
        "resize_mode": args.resize_mode,
        "uncertain": args.uncertain,
        "prompt_template": args.prompt_template,
        "arguments": vars(args),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")},
    }  # fmt: skip
    seconds = state.seconds * len(data.train) / state.samples_seen
    summary["results"] = [
        *(result_row("trainable_parameters", n, label=name) for name, n in summary["trainable_parameters"].items()),
        result_row("seconds_per_epoch", seconds, n=len(data.train), note="training steps only"),
        result_row("seconds", state.seconds, note="training steps only, interruptions included"),
        result_row("peak_memory_gib", peak_memory(accelerator.device) / 2**30, note=f"main process, {accelerator.device.type}"),
        *summary["results"],
        *data.counts,
    ]
    write_text(output_dir / "README.md", model_card(args, summary, usage))
    write_text(output_dir / "training_summary.json", json.dumps(summary, indent=2) + "\n")
    if args.push_to_hub:
        from huggingface_hub import create_repo, upload_folder

        try:
            repo = create_repo(args.hub_model_id or output_dir.name, private=True, exist_ok=True)
            upload_folder(repo_id=repo.repo_id, folder_path=output_dir, ignore_patterns=["checkpoint-*", "logs/*", ".*"])
        except Exception as error:  # of the hub, or of whichever HTTP library it uses
            fail(f"the run is complete in {output_dir}, but was not uploaded; use hf upload ({' '.join(str(error).split())[:200]})")


# Copied from train_full.check_replicas
def check_replicas(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Stops the run if the processes' weights have drifted apart, which no process could see by itself."""
    digest = hashlib.sha256()
    for parameter in parameters.values():
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digests = gather_object([digest.hexdigest()])
    if len(set(digests)) > 1:
        raise RuntimeError(f"the {len(digests)} processes ended with different weights: {digests}")


@plain_errors("lower --train_batch_size and raise --gradient_accumulation_steps by as much, or pass --gradient_checkpointing, --mixed_precision bf16 or a smaller --resolution")
def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir or Path("runs") / args.method)
    data = load_training_data(args)
    checkpoint = find_checkpoint(args, output_dir, data.notes)
    accelerator = make_accelerator(args, output_dir)
    skip = args.on_bad_image == "skip"
    drop_images(data, check_images(accelerator, [*data.train["image"], *data.heldout["image"]], skip))

    pipeline = load_base_pipeline(args)
    hashes = fingerprint_components(accelerator, pipeline)
    global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    total_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(data.train) / global_batch)
    identity = {"method": args.method, "use_8bit_adam": args.use_8bit_adam, "use_ema": args.use_ema}
    if args.method in ("lora", "dora"):
        identity |= {"rank": args.rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    identity |= run_identity(args, data, hashes, global_batch)
    if checkpoint:
        data.notes += check_identity(checkpoint, identity, total_steps)

    totals = {"unet": sum(p.numel() for p in pipeline.unet.parameters())}
    stream, heldout, cached = prepare_streams(
        args, accelerator, pipeline, data, hashes, output_dir, use_pixels=False, use_moments=True, use_embeddings=True
    )

    for part in (stream, heldout):
        part.skip_bad = skip and (part.moments is None or part.with_pixels)

    model = build_loss(args, pipeline, stream, accelerator.mixed_precision)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(args, [{"params": list(parameters.values()), "lr": args.learning_rate}], accelerator.device)
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters.values(), decay=args.ema_decay) if args.use_ema else None
    state = TrainState(model, optimizer, lr_scheduler, ema, identity)

    trainable = count_parameters(parameters)
    if accelerator.is_main_process:
        print_plan(args, accelerator, data, trainable, totals, total_steps, cached, output_dir, checkpoint)
        if args.overwrite_output_dir and not checkpoint:
            clear_run(output_dir)
    start_reporting(args, accelerator, output_dir)
    prompts = validation_prompts(args, data)
    validate_now = functools.partial(validate, accelerator, state, pipeline, heldout, prompts, args, output_dir)
    # Before a checkpoint is loaded: this is the base model.
    before = validate_now()
    if checkpoint:
        load_checkpoint(accelerator, state, checkpoint, output_dir)
    train(args, accelerator, state, stream, total_steps, list(parameters.values()), validate_now, output_dir)

    if ema:
        ema.copy_to(parameters.values())
    check_replicas(parameters)
    after = validate_now()
    data.left_out["unreadable later, replaced by the next"] = len(stream.told) + len(heldout.told)
    if accelerator.is_main_process:
        save_adapter(args, pipeline.unet, output_dir)
        if args.save_merged:
            save_merged(args, hashes, output_dir)
        rows = [result_row("train_loss", state.train_loss, note="mean of the last logging window"), *heldout_rows(before, after)]
        summary = {"script": "train_peft.py", "method": args.method, "trainable_parameters": trainable, "results": rows}
        finish_run(args, accelerator, state, data, summary, usage_example(args, output_dir), output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
