# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "diffusers>=0.36", "transformers>=4.57.1", "peft>=0.18", "accelerate>=1.10",
#   "datasets>=4.0", "bitsandbytes>=0.48", "huggingface-hub>=0.34", "safetensors>=0.5", "filelock>=3.12",
#   "numpy>=2.0", "pandas>=2.2.2", "pillow>=10.3", "tqdm>=4.67", "tensorboard>=2.17.1",
# ]
# ///
"""Fine-tune any combination of Stable Diffusion v1.5's U-Net, VAE and text encoder on chest radiographs.

    accelerate launch train_full.py --train_unet
    accelerate launch train_full.py --train_unet --train_vae --vae_loss joint
    accelerate launch train_full.py --train_unet --train_text_encoder --resume_from_checkpoint latest

Writes a complete diffusers pipeline to --output_dir, with training_summary.json, a model card, validation images, logs
and checkpoints. "The paper" is TehraniNasab et al. (2025, arXiv 2508.14931), whose strategies these are.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# bitsandbytes, which diffusers imports, reports a missing 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import diffusers
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, gather_object
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from filelock import FileLock, Timeout
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import CLIPTextModel

# CheXpert's 14 labels in column order; prompts list findings in this order.
LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
).split(",")
# What a cell of a label column means; -1 is uncertain, NaN not mentioned.
LABEL_VALUES = (
    dict.fromkeys(["", "unlabeled", "not mentioned"], math.nan)
    | dict.fromkeys(["1", "1.0", "true", "present", "positive"], 1.0)
    | dict.fromkeys(["0", "0.0", "false", "absent", "negative"], 0.0)
    | dict.fromkeys(["-1", "-1.0", "uncertain"], -1.0)
)
# Cells that mean nothing.
BLANKS = ["nan", "NaN", "NAN", "None", "none", "null", "NULL", "NA", "N/A", "n/a", "<NA>", "NaT"]
# Other columns that the scripts use, with their alternative names.
COLUMNS = {name: [] for name in ("patient_id", "split", "resolution", "resize_mode", "Sex", "Age", "AP/PA")} | {
    "Path": ["file_name"],
    "Frontal/Lateral": ["ViewPosition", "view"],
    "prompt": ["text", "caption"],
}
PROMPT_TEMPLATE = "Chest X-ray of a subject with {}"
DEFAULT_TABLES = ["CheXpert-v1.0/train.csv", "CheXpert-v1.0-small/train.csv"]
# Fractions of patients, in the proportions of the paper's Table 2.
SPLIT_FRACTIONS = {"train": 0.353, "val": 0.141, "test": 0.506}
# With more distinct captions than this (1 GB of embeddings), the text encoder runs in the training loop.
MAX_CACHED_CAPTIONS = 4096
# Exit status (EX_TEMPFAIL) of a run that saved a checkpoint and stopped on a signal; it can be resumed.
EXIT_PREEMPTED = 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def fail(message):
    """Print a one-line error to stderr and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def add_shared_arguments(parser):
    """Add the arguments shared by both training scripts."""
    flag = parser.add_argument_group("data").add_argument
    flag("--data_csv", help=f"image table (default: {' or '.join(DEFAULT_TABLES)})")
    flag("--validation_csv", help="separate held-out table, which also changes the default of --split")
    flag("--image_root", help="folder that image paths are relative to (default: the table's folder or its parent)")
    flag("--dataset_name", help="hub id or local folder for datasets.load_dataset, instead of --data_csv")
    flag("--image_column", default="image", help="image column of --dataset_name")
    flag("--caption_column", help="column of --dataset_name (default: prompt, text, caption, else the labels)")
    flag("--labels", nargs="+", default=LABELS, help="label columns, in the order of captions (default: CheXpert's)")
    splits = ["train", "val", "test", "all"]
    flag("--split", choices=splits, help="default: train; all with --validation_csv and no split column")
    flag("--split_seed", type=int, default=0, help="seed of the patient split; use the same in all scripts")
    uncertain = "how -1 enters prompts: ones names the finding; zeros and ignore leave it out"
    flag("--uncertain", choices=["ones", "zeros", "ignore"], default="ignore", help=uncertain)
    flag("--prompt_template", default=PROMPT_TEMPLATE, help="caption; {} stands for the findings")
    flag("--max_train_samples", type=int, help="train on a random subset of this size, drawn with --split_seed")
    flag("--max_validation_samples", type=int, default=256, help="maximum number of held-out images")
    flag("--resolution", type=int, default=512, help="side of the square training images in pixels")
    flag("--resize_mode", choices=["squash", "pad", "crop"], default="squash", help="how images are made square")
    flag("--caption_dropout", type=float, default=0.1, help="fraction of captions left empty, for guidance")
    flag("--on_bad_image", choices=["stop", "skip"], default="stop", help="stop at or leave out unreadable images")
    flag("--latent_cache_dir", help="folder of cached latents (default: latent_cache beside --output_dir)")
    flag("--dataloader_num_workers", type=int, help="data loader workers per process (default: 4 on a GPU, else 0)")

    flag = parser.add_argument_group("model and loss").add_argument
    base_model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    flag("--pretrained_model_name_or_path", default=base_model, help="base model: hub id, folder or .safetensors file")
    flag("--revision", help="branch, tag or commit of the hub model")
    flag("--variant", help="variant of the weight files, such as fp16")
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="autocast type (default: accelerate's config)")
    flag("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    flag("--compile", action="store_true", help="torch.compile the U-Net; the first step takes minutes")
    flag("--snr_gamma", type=float, help="min-SNR loss weighting, arXiv 2303.09556; 5 is common (default: off)")
    flag("--noise_offset", type=float, default=0.0, help="std of noise that is constant over a latent channel; 0: off")

    flag = parser.add_argument_group("optimizer").add_argument
    flag("--train_batch_size", type=int, default=4, help="images per process and forward pass")
    flag("--gradient_accumulation_steps", type=int, default=4, help="forward passes per optimizer step")
    flag("--num_train_epochs", type=int, default=100, help="passes over the images")
    flag("--max_train_steps", type=int, help="optimizer steps; overrides --num_train_epochs")
    schedules = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    flag("--lr_scheduler", choices=schedules, default="constant")
    flag("--lr_warmup_steps", type=int, default=0, help="warm-up steps; not for --lr_scheduler constant")
    flag("--lr_num_cycles", type=int, default=1, help="cycles of cosine_with_restarts")
    flag("--lr_power", type=float, default=1.0, help="power of polynomial")
    flag("--adam_beta1", type=float, default=0.9)
    flag("--adam_beta2", type=float, default=0.999)
    flag("--adam_weight_decay", type=float, default=1e-2, help="of all trained weights, including biases and norms")
    flag("--adam_epsilon", type=float, default=1e-8)
    flag("--max_grad_norm", type=float, default=1.0, help="gradient clipping; 0 turns it off")
    flag("--use_8bit_adam", action="store_true", help="bitsandbytes' 8-bit AdamW")
    flag("--use_ema", action="store_true", help="validate and save an exponential moving average of the weights")
    flag("--ema_decay", type=float, default=0.9999)

    flag = parser.add_argument_group("output").add_argument
    flag("--output_dir", help="run folder (default: runs/<method>)")
    flag("--overwrite_output_dir", action="store_true", help="start over in a folder that already holds a run")
    flag("--seed", type=int, default=0, help="seed of sample order, noise, timesteps and validation images")
    flag("--checkpointing_steps", type=int, default=500, help="steps between checkpoints; 0: only on a stop signal")
    flag("--checkpoints_total_limit", type=int, default=2, help="number of newest checkpoints to keep")
    resume_help = "folder of a checkpoint, or latest; the run's later checkpoints are deleted"
    flag("--resume_from_checkpoint", metavar="PATH|latest", help=resume_help)
    flag("--validation_steps", type=int, default=500, help="steps between validations; 0: first and last only")
    flag("--validation_prompts", nargs="+", help="prompts of validation images (default: the most frequent captions)")
    flag("--num_validation_images", type=int, default=4, help="images of the most frequent captions; 0: no images")
    flag("--logging_steps", type=int, default=10, help="steps between log entries and checks for stop signals")
    flag("--report_to", choices=["tensorboard", "wandb", "none"], default="tensorboard")
    flag("--push_to_hub", action="store_true", help="upload the finished run to a private hub repository")
    flag("--hub_model_id", help="repository of --push_to_hub (default: the output folder's name)")


def check_arguments(parser, args):
    """Check values and combinations of arguments, and find the default table."""
    at_least_one = (
        "resolution train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps logging_steps "
        "checkpoints_total_limit max_train_samples max_validation_samples lr_num_cycles"
    )
    for name in at_least_one.split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in "checkpointing_steps validation_steps num_validation_images lr_warmup_steps max_grad_norm".split():
        if getattr(args, name) < 0:
            parser.error(f"--{name} must not be negative; 0 turns it off")
    if not 0 <= args.caption_dropout <= 1:
        parser.error("--caption_dropout must be between 0 and 1")
    if args.snr_gamma is not None and args.snr_gamma <= 0:
        parser.error("--snr_gamma must be above 0; leave it out to turn the weighting off")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        parser.error("--lr_warmup_steps has no effect on --lr_scheduler constant; use constant_with_warmup")
    for name, default, schedule in (("lr_num_cycles", 1, "cosine_with_restarts"), ("lr_power", 1.0, "polynomial")):
        if getattr(args, name) != default and args.lr_scheduler != schedule:
            parser.error(f"--{name} needs --lr_scheduler {schedule}")
    if args.validation_prompts and not args.num_validation_images:
        parser.error("--validation_prompts has no effect with --num_validation_images 0")
    if args.prompt_template.count("{}") != 1:
        parser.error("--prompt_template needs exactly one {}, where the findings go")
    args.labels = list(dict.fromkeys(args.labels))
    if args.data_csv and args.dataset_name:
        parser.error("pass either --data_csv or --dataset_name")
    if not args.data_csv and not args.dataset_name:
        args.data_csv = next(filter(os.path.isfile, DEFAULT_TABLES), None)
        if not args.data_csv:
            missing = f"found neither {' nor '.join(DEFAULT_TABLES)} in {Path.cwd()}"
            parser.error(f"{missing}; pass --data_csv or --dataset_name, or run the offline demo: bash launch/demo.sh")
    for path in (args.data_csv, args.validation_csv, args.image_root):
        if path and not os.path.exists(path):
            parser.error(f"{path}: no such file or folder")


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    flag = parser.add_argument_group("what to train").add_argument
    flag("--train_unet", action="store_true")
    flag("--train_text_encoder", action="store_true")
    flag("--train_vae", action="store_true")
    flag("--unet_lr", type=float, default=1e-5)
    flag("--text_encoder_lr", type=float, default=1e-6)
    flag("--vae_lr", type=float, default=1e-6)
    flag("--vae_loss", choices=["anchored", "joint"], default="anchored", help="joint is the paper's; it can collapse")
    flag("--vae_recon_weight", type=float, default=1.0, help="weight of the VAE's reconstruction loss")
    flag("--vae_anchor_weight", type=float, default=1.0, help="weight of the anchor to the base model's VAE")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    args.components = [name for name in ("unet", "vae", "text_encoder") if getattr(args, f"train_{name}")]
    if not args.components:
        parser.error("nothing to train; pass one or more of --train_unet, --train_text_encoder and --train_vae")
    args.method = "_".join(args.components)
    args.learning_rates = {name: getattr(args, f"{name}_lr") for name in args.components}
    args.output_dir = args.output_dir or f"runs/{args.method}"
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Data: samples
# ---------------------------------------------------------------------------------------------------------------------


def keyed_seed(*key):
    """Hash the key to a 63-bit seed. Since every draw is seeded this way, checkpoints need no random state."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1


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


def to_pixel_values(image):
    """Convert an image, (H, W, 3) uint8, to a tensor, (3, H, W) in [-1, 1]."""
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)


class SampleStream(torch.utils.data.Dataset):
    """An endless stream of training samples. Sample n is a function of (seed, n) alone.

    Each epoch is a seeded permutation of the images; noise, timestep and caption dropout are seeded by n. So samples
    do not depend on the number of processes, the batch size or interruptions. With `heldout`, sample n is image n,
    with noise and timesteps (evenly spread by the golden ratio) that are the same in all runs.

    `posterior_paths` are files of the VAE's outputs, and `captions` is what `encode_captions` returns. A sample has
        noise (C, h, w), and posterior_noise (C, h, w), which samples the VAE's posterior
        timesteps ()
        encoder_hidden_states (77, D), or input_ids (77,) if the text encoder runs in the training loop
        posterior (2C, h, w), the base VAE's mean and log-variance, if there are `posterior_paths`
        pixel_values (3, H, W), in [-1, 1], if `with_pixels`
    """

    def __init__(self, table, posterior_paths, captions, pipeline, args, with_pixels=False, heldout=False):
        self.images, self.prompts = list(table["image"]), list(table["prompt"])
        self.posterior_paths, self.captions = posterior_paths, captions
        self.has_embeddings = "encoder_hidden_states" in captions[""]
        self.with_pixels = with_pixels
        self.resolution, self.resize_mode = args.resolution, args.resize_mode
        side = args.resolution // pipeline.vae_scale_factor
        self.latent_shape = (pipeline.vae.config.latent_channels, side, side)
        self.num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
        self.heldout = heldout
        self.seed = "held-out" if heldout else args.seed  # held-out samples do not depend on --seed
        self.caption_dropout = 0.0 if heldout else args.caption_dropout
        self.noise_offset = 0.0 if heldout else args.noise_offset
        self.epoch, self.order = None, None

    def __len__(self):
        return len(self.images)

    def image_index(self, n):
        epoch, position = divmod(n, len(self))
        if self.heldout:
            return position
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(keyed_seed(self.seed, "order", epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator)
        return int(self.order[position])

    def __getitem__(self, n):
        i = self.image_index(n)
        generator = torch.Generator().manual_seed(keyed_seed(self.seed, "sample", n))
        timestep = torch.randint(self.num_train_timesteps, (), generator=generator)
        noise = torch.randn(self.latent_shape, generator=generator)
        posterior_noise = torch.randn(self.latent_shape, generator=generator)
        noise = noise + self.noise_offset * torch.randn(self.latent_shape[0], 1, 1, generator=generator)
        drop_caption = torch.rand((), generator=generator) < self.caption_dropout
        if self.heldout:
            timestep = torch.tensor(int((n * 0.6180339887498949 + 0.5) % 1 * self.num_train_timesteps))
        sample = {"noise": noise, "posterior_noise": posterior_noise, "timesteps": timestep}
        sample |= self.captions["" if drop_caption else self.prompts[i]]
        if self.posterior_paths:
            sample["posterior"] = torch.from_numpy(np.load(self.posterior_paths[i]).astype(np.float32))
        if self.with_pixels:
            sample["pixel_values"] = to_pixel_values(load_image(self.images[i], self.resolution, self.resize_mode))
        return sample


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


class DiffusionLoss(torch.nn.Module):
    """The training loss as one module, so that DDP and autocast wrap the whole forward pass.

    `forward` returns per-sample losses by name, each (B,) in float32; "loss" is the one to optimize. Noise and
    timesteps come with the batch; only dropout is random here. `text_encoder` is None if the batch holds embeddings.
    """

    reported = ("diffusion",)  # losses to measure on held-out images

    def __init__(self, pipeline, text_encoder, args):
        super().__init__()
        self.unet, self.text_encoder = pipeline.unet, text_encoder
        self.noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.v_prediction = self.noise_scheduler.config.prediction_type == "v_prediction"
        self.scaling_factor, self.snr_gamma = pipeline.vae.config.scaling_factor, args.snr_gamma

    def forward(self, batch):
        posterior = DiagonalGaussianDistribution(batch["posterior"])
        latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * self.scaling_factor
        diffusion = self.diffusion_loss(latents, batch)
        return {"loss": diffusion * self.snr_weight(batch["timesteps"]), "diffusion": diffusion}

    def diffusion_loss(self, latents, batch):
        """Return the mean squared error of the predicted noise, or velocity for a v-prediction model, (B,)."""
        noise, timesteps = batch["noise"], batch["timesteps"]
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        encoder_hidden_states = batch.get("encoder_hidden_states")
        if encoder_hidden_states is None:
            encoder_hidden_states = self.text_encoder(batch["input_ids"])[0]
        model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states).sample
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps) if self.v_prediction else noise
        return F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))

    def snr_weight(self, timesteps):
        """Return min-SNR weights (arXiv 2303.09556): min(SNR, gamma) / SNR, or / (SNR + 1) for v-prediction."""
        if self.snr_gamma is None:
            return 1.0
        snr = compute_snr(self.noise_scheduler, timesteps)
        if self.v_prediction:
            return snr.clamp(max=self.snr_gamma) / (snr + 1)
        # The same as min(SNR, gamma) / SNR, but finite where the SNR is 0.
        return (self.snr_gamma / snr).clamp(max=1.0)


class VAELoss(DiffusionLoss):
    """DiffusionLoss plus a reconstruction loss, for training the VAE.

    joint: the paper's loss, diffusion + recon_weight * reconstruction. The diffusion loss has a shortcut: shrink the
    latents until they are easy to predict (collapse, REPA-E, arXiv 2504.10483).
    anchored: latents are detached before the diffusion loss, so that its gradient does not reach the VAE. An anchor
    keeps them close to those that the U-Net was trained on: the squared 2-Wasserstein distance between the posteriors
    of the VAE and of the base VAE, per element of the scaled latents.
    """

    reported = ("diffusion", "reconstruction")

    def __init__(self, pipeline, text_encoder, args):
        super().__init__(pipeline, text_encoder, args)
        self.vae, self.anchored = pipeline.vae, args.vae_loss == "anchored"
        self.recon_weight, self.anchor_weight = args.vae_recon_weight, args.vae_anchor_weight
        # With an anchored VAE alone, the diffusion loss has no gradient: it is computed in validation only.
        self.train_diffusion = args.train_unet or args.train_text_encoder or not self.anchored

    def forward(self, batch):
        pixel_values = batch["pixel_values"]
        # Rebuilt in float32: under autocast, the VAE returns mean and log-variance in half precision.
        posterior = DiagonalGaussianDistribution(self.vae.encode(pixel_values).latent_dist.parameters.float())
        latents = posterior.mean + posterior.std * batch["posterior_noise"]
        decoded = self.vae.decode(latents).sample.float()
        reconstruction = F.mse_loss(decoded, pixel_values, reduction="none").mean(dim=(1, 2, 3))
        losses, loss = {"reconstruction": reconstruction}, self.recon_weight * reconstruction
        if self.anchored:
            base = DiagonalGaussianDistribution(batch["posterior"])
            distance = (posterior.mean - base.mean) ** 2 + (posterior.std - base.std) ** 2
            losses["anchor"] = self.scaling_factor**2 * distance.mean(dim=(1, 2, 3))
            loss = loss + self.anchor_weight * losses["anchor"]
            latents = latents.detach()
        if self.train_diffusion or not self.training:
            losses["diffusion"] = self.diffusion_loss(latents * self.scaling_factor, batch)
            loss = loss + losses["diffusion"] * self.snr_weight(batch["timesteps"])
        return losses | {"loss": loss}


# ---------------------------------------------------------------------------------------------------------------------
# Data: the image table
# ---------------------------------------------------------------------------------------------------------------------


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


def positive_labels(table, labels, uncertain):
    """Return whether each label is positive in each row, as a boolean frame (rows, labels)."""
    return table.reindex(columns=labels).isin([1.0, -1.0] if uncertain == "ones" else [1.0])


def add_prompts(table, labels, template, uncertain):
    """Fill empty prompts from the labels, in their order. Rows without a positive label stay empty."""
    positive = positive_labels(table, labels, uncertain).to_numpy()
    findings = [", ".join(label for label, found in zip(labels, row) if found) for row in positive]
    from_labels = pd.Series([template.replace("{}", text) if text else "" for text in findings], table.index, str)
    return table.assign(prompt=table["prompt"].where(table["prompt"] != "", from_labels))


@dataclass
class TrainingData:
    train: pd.DataFrame
    heldout: pd.DataFrame
    source: str
    rows: int
    block: list  # (heading, text) lines to print about the table
    own_prompts: int  # number of training images whose caption is the table's, such as a report
    left_out: dict  # number of rows by reason
    notes: list  # warnings
    val_counts: list  # result rows: images per label in the whole val split, as in the paper's Table 2


def load_training_data(args):
    """Load the table, drop unusable rows, and split it by patient."""
    source, template = args.dataset_name or args.data_csv, args.prompt_template
    if args.dataset_name:
        table = load_dataset_table(source, args.image_column, args.caption_column, args.labels)
    else:
        table = load_image_table(source, args.image_root, labels=args.labels)
    absent = [label for label in args.labels if label not in table]
    if absent and args.labels != LABELS:
        fail(f"{source}: no column {absent[0]!r}, which --labels names")
    rows, block, has_prompt = len(table), table.attrs["block"], table["prompt"] != ""
    left_out, notes = {"not frontal": int((~table["frontal"]).sum())}, []
    table = add_prompts(table[table["frontal"]], args.labels, template, args.uncertain)
    left_out["without a positive label"] = int((table["prompt"] == "").sum())
    table = table[table["prompt"] != ""]

    part = args.split or ("all" if args.validation_csv and "split" not in table else "train")
    splits = split_of(table, args.split_seed)
    train = table if part == "all" else table[splits == part]
    left_out[f"not in split {part}"] = len(table) - len(train)
    heldout = table[splits == "val"] if part in ("train", "test") else table[:0]
    if args.validation_csv:
        heldout = load_image_table(args.validation_csv, args.image_root, labels=args.labels)
        block = block + heldout.attrs["block"]
        heldout = add_prompts(heldout[heldout["frontal"]], args.labels, template, args.uncertain)
        heldout = heldout[heldout["prompt"] != ""]
    shared = len(set(train["patient"]) & set(heldout["patient"]))
    if shared:
        notes.append(f"{shared:,} training patients are also in {args.validation_csv or 'split val'}, held out")
    if train.empty:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        fail(f"{source}: no training images left of {rows:,} rows ({reasons}); check --split, --labels and the views")
    if args.max_train_samples and args.max_train_samples < len(train):
        left_out["over --max_train_samples"] = len(train) - args.max_train_samples
        train = train.sample(n=args.max_train_samples, random_state=args.split_seed % 2**32)
    val_counts = count_rows("val", heldout, args.labels, args.uncertain)
    if args.max_validation_samples < len(heldout):
        heldout = heldout.sample(n=args.max_validation_samples, random_state=args.split_seed % 2**32)
    if heldout.empty:
        notes.append("no held-out images: the held-out loss is not measured")
    if (train["patient"] == train["name"]).any():
        notes.append("some rows have no patient_id, and no patientNNNNN in the path: each counts as one patient")
    own_prompts = int(has_prompt[train.index].sum())
    train, heldout = train.reset_index(drop=True), heldout.reset_index(drop=True)
    return TrainingData(train, heldout, source, rows, block, own_prompts, left_out, notes, val_counts)


# ---------------------------------------------------------------------------------------------------------------------
# Data: latents and captions
# ---------------------------------------------------------------------------------------------------------------------


def fingerprint(module):
    """Return a SHA-256 of a module's weights that does not depend on their names."""
    arrays = (parameter.detach().cpu().numpy() for parameter in module.parameters())
    digests = [hashlib.sha256(str(array.shape).encode() + array.tobytes()).digest() for array in arrays]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def latent_paths(images, vae_hash, args):
    """Return the cache file of each image's latents, named by the VAE's weights, the geometry and the image."""
    folder = Path(args.latent_cache_dir or Path(args.output_dir).parent / "latent_cache")
    folder = folder / f"{vae_hash[:16]}-{args.resolution}-{args.resize_mode}"
    paths = []
    for image in images:
        try:
            if isinstance(image, tuple):
                dataset, column, row = image
                encoded = dataset[row][column]
                key = encoded["bytes"] or Path(encoded["path"]).read_bytes()
            else:
                stat = os.stat(image)
                key = f"{image}/{stat.st_size}/{stat.st_mtime_ns}".encode()
        except (OSError, TypeError):  # no file, or an empty cell: check_and_encode reports it
            key = str(image).encode()
        name = hashlib.sha256(key).hexdigest()
        paths.append(folder / name[:2] / f"{name[2:34]}.npy")
    return paths


@torch.no_grad()
def check_and_encode(accelerator, images, paths, vae, args):
    """Decode images that have no cached latents and, given a VAE, cache their latents.

    The images are divided among the processes; a restarted run continues where it stopped. Return {index: error} of
    unreadable images, the same on all processes.
    """
    rank, world, problems = accelerator.process_index, accelerator.num_processes, {}
    # Divide by index, not by what is missing: other processes may already be filling the cache.
    mine = [i for i in range(rank, len(images), world) if not paths[i].exists()]

    def decode(i):
        try:
            return load_image(images[i], args.resolution, args.resize_mode)
        except ValueError as error:
            problems[i] = str(error)

    # Batches are faster on a GPU only: 4 images at 512 x 512. More may not fit, since the VAE encodes in float32.
    batch_size = max(1, 2**20 // args.resolution**2) if accelerator.device.type == "cuda" else 1
    label = "encoding images" if vae else "checking images"
    bar = tqdm(total=len(mine), desc=label, unit="image", leave=False, disable=not (mine and rank == 0))
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(mine), 64):  # all images at once would not fit in memory
            chunk = mine[start : start + 64]
            decoded = ((i, image) for i, image in zip(chunk, pool.map(decode, chunk)) if image is not None)
            while batch := list(itertools.islice(decoded, batch_size)):
                bar.update(len(batch))
                if vae is None:
                    continue
                pixel_values = torch.stack([to_pixel_values(image) for _, image in batch]).to(vae.device)
                for (i, _), posterior in zip(batch, vae.encode(pixel_values).latent_dist.parameters.cpu()):
                    paths[i].parent.mkdir(parents=True, exist_ok=True)
                    temporary = paths[i].with_name(f".{os.getpid()}-{paths[i].name}")
                    np.save(temporary, posterior.numpy().astype(np.float16))
                    os.replace(temporary, paths[i])
    return dict(sorted(gather_object(list(problems.items()))))


def drop_bad_images(data, problems, on_bad_image):
    """Stop at unreadable images, or drop them from `data`; `problems` indexes training, then held-out images."""
    if not problems:
        return
    listed = "; ".join(list(problems.values())[:20])
    if on_bad_image == "stop":
        fail(f"{len(problems):,} images cannot be used; repair them or pass --on_bad_image skip: {listed}")
    data.notes.append(f"left out {len(problems):,} unreadable images: {listed}")
    count = len(data.train)
    data.left_out["unreadable"] = sum(i < count for i in problems)
    data.train = data.train.drop([i for i in problems if i < count]).reset_index(drop=True)
    data.heldout = data.heldout.drop([i - count for i in problems if i >= count]).reset_index(drop=True)
    if data.train.empty:
        fail(f"{data.source}: all training images are unreadable: {listed}")


@torch.no_grad()
def encode_captions(pipeline, data, device, train_text_encoder):
    """Return {caption: {"encoder_hidden_states": (77, D)} or {"input_ids": (77,)}}, with the empty caption.

    As in the pipeline, no attention mask is used. Add a note if captions are truncated.
    """
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    captions = [*sorted({*data.train["prompt"], *data.heldout["prompt"]}), ""]
    length = tokenizer.model_max_length
    cut = {caption for caption, ids in zip(captions, tokenizer(captions).input_ids) if len(ids) > length}
    if cut:
        count = data.train["prompt"].isin(cut).sum()
        data.notes.append(f"the captions of {count:,} training images are truncated to {length} tokens")
    padding = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    input_ids = tokenizer(captions, **padding).input_ids
    if train_text_encoder or len(captions) > MAX_CACHED_CAPTIONS:
        return {caption: {"input_ids": ids} for caption, ids in zip(captions, input_ids)}
    text_encoder.to(device)
    embeddings = torch.cat([text_encoder(ids.to(device))[0].cpu() for ids in input_ids.split(64)])
    return {caption: {"encoder_hidden_states": states} for caption, states in zip(captions, embeddings)}


def prepare_streams(accelerator, pipeline, data, args, vae_hash):
    """Check and encode images and captions, and return the training and the held-out stream.

    Drop unreadable images from `data`, or fail (--on_bad_image).
    """
    images = [*data.train["image"], *data.heldout["image"]]
    paths = latent_paths(images, vae_hash, args)
    train_vae = "vae" in args.components
    # The base VAE's posteriors are the input if it is frozen, and the anchor if it is anchored. A joint VAE needs
    # neither: images are only checked.
    vae = None if train_vae and args.vae_loss == "joint" else pipeline.vae.to(accelerator.device)
    problems = check_and_encode(accelerator, images, paths, vae, args)
    drop_bad_images(data, problems, args.on_bad_image)
    posterior_paths = [path for i, path in enumerate(paths) if i not in problems] if vae else None
    captions = encode_captions(pipeline, data, accelerator.device, "text_encoder" in args.components)
    pipeline.to("cpu")  # frees the device; accelerator.prepare moves what the loss uses
    n = len(data.train)
    shared = {"captions": captions, "pipeline": pipeline, "args": args, "with_pixels": train_vae}
    stream = SampleStream(data.train, posterior_paths and posterior_paths[:n], **shared)
    heldout = SampleStream(data.heldout, posterior_paths and posterior_paths[n:], **shared, heldout=True)
    return stream, heldout


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


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


def explain_base(name):
    """Return what is wrong with the path of a base model and what to pass instead, or None if it looks right."""
    path = Path(name)
    if not path.exists():
        return "neither a folder nor a readable hub model; pass a hub id, a pipeline's folder or a .safetensors file"
    if path.is_file() and path.suffix != ".safetensors":
        return "not a .safetensors file; pass one, a pipeline's folder or a hub id"
    if any((path / file).is_file() for file in ("pytorch_lora_weights.safetensors", "unet_delta.safetensors")):
        return "an adapter; pass its base model, or its merged/ folder (made with --save_merged)"
    if path.is_dir() and list_checkpoints(path) and not (path / "model_index.json").is_file():
        return "an unfinished run; finish it with --resume_from_checkpoint latest, or pass another model"
    return None


def load_base_pipeline(args):
    """Load the base model, or exit with status 2 if it cannot be trained with these flags."""
    name = args.pretrained_model_name_or_path
    try:
        pipeline = load_pipeline(name, args.revision, args.variant)
    except (OSError, ValueError) as error:
        reason = explain_base(name) if isinstance(error, OSError) or os.path.exists(name) else None
        reason = reason or "cannot be loaded as a Stable Diffusion pipeline in safetensors"
        fail(f"{name}: {reason} ({str(error)[:300]})")
    prediction_type, channels = pipeline.scheduler.config.prediction_type, pipeline.unet.config.in_channels
    if prediction_type not in ("epsilon", "v_prediction"):
        fail(f"{name} predicts {prediction_type}; only epsilon and v_prediction are supported")
    if channels != pipeline.vae.config.latent_channels:
        fail(f"{name}: its U-Net takes {channels} channels; inpainting models are not supported")
    if args.resolution % pipeline.vae_scale_factor:
        fail(f"--resolution {args.resolution} must be a multiple of {pipeline.vae_scale_factor} for this VAE")
    return pipeline


def build_loss(args, pipeline, stream, identity):
    """Freeze and cast what is not trained, and return the loss module."""
    frozen_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(identity["mixed_precision"], torch.float32)
    for name in ("unet", "text_encoder", "vae"):
        component, trained = getattr(pipeline, name), name in args.components
        component.requires_grad_(trained)
        if not trained:
            component.to(frozen_dtype)
        # Channels-last convolutions are faster on GPUs; bitsandbytes' kernels need contiguous weights.
        if name != "text_encoder" and torch.cuda.is_available() and not args.use_8bit_adam:
            component.to(memory_format=torch.channels_last)
    if args.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        if args.train_vae:
            pipeline.vae.enable_gradient_checkpointing()
        if args.train_text_encoder:
            pipeline.text_encoder.gradient_checkpointing_enable()
    if args.compile:
        pipeline.unet.compile(dynamic=False)
    text_encoder = None if stream.has_embeddings else pipeline.text_encoder
    return (VAELoss if args.train_vae else DiffusionLoss)(pipeline, text_encoder, args)


def make_optimizer(args, parameters):
    """Return AdamW with a learning rate for each trained component."""
    groups = [
        {"params": [p for name, p in parameters.items() if name.startswith(f"{component}.")], "lr": learning_rate}
        for component, learning_rate in args.learning_rates.items()
    ]
    betas = (args.adam_beta1, args.adam_beta2)
    options = {"betas": betas, "weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

# Arguments of both training scripts compared on resume: a change in the first is an error, in the second a warning.
REFUSE_IF_CHANGED = (
    "method vae_loss rank lora_alpha lora_dropout lora_target_modules train_text_encoder use_8bit_adam use_ema "
    "global_batch_size"
).split()
WARN_IF_CHANGED = (
    "learning_rate unet_lr text_encoder_lr vae_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power adam_beta1 "
    "adam_beta2 adam_weight_decay adam_epsilon max_grad_norm ema_decay seed caption_dropout noise_offset snr_gamma "
    "vae_recon_weight vae_anchor_weight init_from"
).split()
# What --overwrite_output_dir deletes, besides checkpoints; of both training scripts.
RUN_FILES = (
    "training_summary.json README.md model_index.json unet text_encoder vae tokenizer scheduler merged validation "
    "logs pytorch_lora_weights.safetensors lora_kohya.safetensors unet_delta.safetensors"
).split()


@dataclass
class TrainState:
    """The model, what changes with it during training, and what checkpoints are compared by."""

    model: torch.nn.Module
    parameters: dict  # trainable, by name
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    identity: dict  # settings to compare when the run is resumed
    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0
    train_loss: float | None = None  # mean since the previous logging step


def run_identity(accelerator, args, data, hashes, global_batch_size, max_train_steps):
    """Return the settings to compare when a run is resumed."""
    rows = "\n".join(f"{name}\t{prompt}" for name, prompt in zip(data.train["name"], data.train["prompt"]))
    return {
        "base_fingerprint": hashlib.sha256("".join(hashes.values()).encode()).hexdigest(),
        "data_fingerprint": hashlib.sha256(f"{args.resolution}/{args.resize_mode}\n{rows}".encode()).hexdigest(),
        "global_batch_size": global_batch_size,
        "mixed_precision": accelerator.mixed_precision,
        "length_of_lr_schedule": None if args.lr_scheduler.startswith("constant") else max_train_steps,
        **{name: getattr(args, name) for name in (*REFUSE_IF_CHANGED, *WARN_IF_CHANGED) if hasattr(args, name)},
    }


def checkpoint_step(folder):
    return int(folder.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir):
    """Return the checkpoints of a run, oldest first."""
    found = (path for path in Path(output_dir).glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=checkpoint_step)


def remove_checkpoint(folder):
    """Rename a checkpoint, then delete it, so that an interrupted deletion leaves no broken checkpoint."""
    hidden = folder.with_name(".deleted-checkpoint")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(folder, hidden)
    shutil.rmtree(hidden)


def find_checkpoint(args):
    """Return the checkpoint to resume from, or None. Fail if --output_dir already holds another run or a pipeline."""
    output_dir, base = Path(args.output_dir), Path(args.pretrained_model_name_or_path)
    if base.exists() and output_dir.resolve() in (base.resolve(), *base.resolve().parents):
        fail(f"--output_dir {output_dir} holds the base model; pass another")
    existing, checkpoint = list_checkpoints(output_dir), None
    if args.resume_from_checkpoint == "latest":
        checkpoint = existing[-1] if existing else None
    elif args.resume_from_checkpoint:
        checkpoint = Path(args.resume_from_checkpoint)
        if not (checkpoint / "state.json").is_file():
            fail(f"--resume_from_checkpoint {checkpoint}: no checkpoint there; pass a checkpoint-N folder or latest")
    if checkpoint and checkpoint.resolve().parent == output_dir.resolve():
        return checkpoint
    used = existing or any((output_dir / name).exists() for name in ("training_summary.json", "model_index.json"))
    if used and not args.overwrite_output_dir:
        hint = "--resume_from_checkpoint latest to continue it, " if existing else ""
        hint += "--overwrite_output_dir to delete it, or another --output_dir"
        fail(f"{output_dir} already holds a run or a pipeline; pass {hint}")
    return checkpoint


def check_identity(checkpoint, identity, max_train_steps):
    """Fail if the run cannot continue from the checkpoint; return warnings about other changed settings."""
    saved, notes = json.loads((checkpoint / "state.json").read_text()), []
    if saved["step"] > max_train_steps:
        fail(f"{checkpoint} is beyond step {max_train_steps:,}; raise --max_train_steps or --num_train_epochs")
    for name, value in identity.items():
        saved_value = saved["identity"].get(name, value)
        if saved_value == value:
            continue
        if name == "base_fingerprint":
            fail(f"{checkpoint} was trained from a base model with other weights; pass that model")
        if name in REFUSE_IF_CHANGED:
            fail(f"{checkpoint} was trained with {name}={saved_value}, not {value}; pass that or start a new run")
        if name == "data_fingerprint":
            notes.append(f"the training images, their captions or the resolution differ from those of {checkpoint}")
        else:
            notes.append(f"{name} was {saved_value} in {checkpoint} and is now {value}")
    return notes


def save_tensors(tensors, path):
    # Cloned: safetensors refuses tensors that share memory, such as 8-bit AdamW's quantization maps.
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, path)


def save_checkpoint(accelerator, state, args):
    """Write checkpoint-<step> to a temporary folder, then rename it atomically."""
    temporary = Path(args.output_dir) / ".checkpoint.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    optimizer_state = {}
    for i, values in state.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            # bitsandbytes nests its 8-bit state one level deeper, but loads it flat too.
            inner = value if isinstance(value, dict) else {name: value}
            optimizer_state |= {f"{i}.{key}": entry for key, entry in inner.items()}
    tensors = {name: value for name, value in optimizer_state.items() if torch.is_tensor(value)}
    save_tensors(state.parameters, temporary / "trainable.safetensors")
    save_tensors(tensors, temporary / "optimizer.safetensors")
    if state.ema:
        save_tensors(dict(zip(state.parameters, state.ema.shadow_params)), temporary / "ema.safetensors")
    progress = {name: getattr(state, name) for name in ("identity", "step", "samples_seen", "seconds", "train_loss")}
    progress["optimizer"] = {name: value for name, value in optimizer_state.items() if name not in tensors}
    progress["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
    progress["arguments"] = vars(args)  # for sample.py
    (temporary / "state.json").write_text(json.dumps(progress, indent=2))
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(temporary, temporary.with_name(f"checkpoint-{state.step}"))
    for old in list_checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
        remove_checkpoint(old)


def match_layout(value, parameter):
    """Copy a tensor to the device and memory layout of a parameter."""
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_in_order(path, names):
    """Return a checkpoint's tensors in the order of `names`, with or without transformers 4's `text_model.`."""
    tensors = {name.replace(".text_model.", "."): tensor for name, tensor in load_file(path).items()}
    return [tensors[name.replace(".text_model.", ".")] for name in names]


def load_checkpoint(accelerator, state, checkpoint, args):
    """Restore weights, optimizer, learning rate and counters in place, and delete the run's later checkpoints."""
    saved = json.loads((checkpoint / "state.json").read_text())
    parameters = state.parameters.values()
    weights = load_in_order(checkpoint / "trainable.safetensors", state.parameters)
    for parameter, weight in zip(parameters, weights):
        parameter.data.copy_(weight)
    optimizer_parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    optimizer_state = {i: {} for i in range(len(optimizer_parameters))}
    for key, value in (load_file(checkpoint / "optimizer.safetensors") | saved["optimizer"]).items():
        i, name = key.split(".", 1)
        # Fused AdamW ignores strides: its state must have the memory layout of its (channels-last) weight.
        parameter = optimizer_parameters[int(i)]
        same_shape = torch.is_tensor(value) and value.shape == parameter.shape
        optimizer_state[int(i)][name] = match_layout(value, parameter) if same_shape else value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    # Set the schedule to one step before the saved one, then step it: the learning rate depends on the step alone.
    position = {"last_epoch": saved["step"] - 1, "_step_count": saved["step"] + 1}
    state.lr_scheduler.load_state_dict(state.lr_scheduler.state_dict() | position)
    state.lr_scheduler.step()
    if state.ema:
        shadow = load_in_order(checkpoint / "ema.safetensors", state.parameters)
        state.ema.shadow_params = [match_layout(weight, p) for weight, p in zip(shadow, parameters)]
        state.ema.optimization_step = saved["step"]
    if accelerator.scaler and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])
    for name in ("step", "samples_seen", "seconds", "train_loss"):
        setattr(state, name, saved[name])
    if accelerator.is_main_process:  # the run will write them again
        for later in list_checkpoints(args.output_dir):
            if checkpoint_step(later) > state.step:
                remove_checkpoint(later)


# ---------------------------------------------------------------------------------------------------------------------
# Validation and results
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def heldout_losses(accelerator, model, stream, batch_size):
    """Return each loss at fixed timesteps and noise as an array, (n,). The images are divided among the processes."""
    # Each process fills in its own images; the others' entries stay 0, and the sum over processes has all.
    losses = {name: torch.zeros(len(stream), device=accelerator.device) for name in model.reported}
    for start in range(accelerator.process_index * batch_size, len(stream), accelerator.num_processes * batch_size):
        rows = range(start, min(start + batch_size, len(stream)))
        batch = torch.utils.data.default_collate([stream[n] for n in rows])
        found = model({key: value.to(accelerator.device) for key, value in batch.items()})
        for name, values in losses.items():
            values[rows.start : rows.stop] = found[name]
    return {name: accelerator.reduce(values, "sum").cpu().numpy() for name, values in losses.items()}


@torch.no_grad()
def draw_validation(accelerator, pipeline, prompts, args, step):
    """Sample the validation prompts with fixed seeds and save the images side by side."""
    # Components that the loss does not use are on the CPU.
    moved = [part for part in (pipeline.vae, pipeline.text_encoder) if part.device.type != accelerator.device.type]
    for component in moved:
        component.to(accelerator.device)
    images, size = [], {"height": args.resolution, "width": args.resolution}
    for i, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(keyed_seed(args.seed, "validation", i))
        with accelerator.autocast():
            images += pipeline(prompt, **size, num_inference_steps=25, generator=generator).images
    for component in moved:
        component.to("cpu")
    path = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    make_image_grid(images, rows=1, cols=len(images)).save(temporary, format="PNG")
    os.replace(temporary, path)


def validate(accelerator, state, pipeline, heldout, prompts, args):
    """Measure held-out losses and sample images with the current weights, or their average with --use_ema."""
    if state.ema:
        state.ema.store(state.parameters.values())
        state.ema.copy_to(state.parameters.values())
    # Unwrapped: DDP would hang, since processes may run different numbers of batches.
    model = accelerator.unwrap_model(state.model).eval()
    losses = heldout_losses(accelerator, model, heldout, args.train_batch_size) if len(heldout) else {}
    if prompts and accelerator.is_main_process:
        draw_validation(accelerator, pipeline, prompts, args, state.step)
    model.train()
    if state.ema:
        state.ema.restore(state.parameters.values())
    accelerator.wait_for_everyone()
    accelerator.log({f"heldout_{name}": float(values.mean()) for name, values in losses.items()}, step=state.step)
    return losses


def result_row(metric, value, label="all", low=None, high=None, n=None, floor=None, note=None):
    """Return one row of the format that all result files share.

    low and high are the 95% interval; floor is the score of real images, or of a trivial predictor.
    """
    return dict(metric=metric, label=label, value=value, low=low, high=high, n=n, floor=floor, note=note)


def count_rows(part, table, labels, uncertain):
    """Count the images of one part of the data, in total and per label (the paper's Table 2)."""
    counts = positive_labels(table, [label for label in labels if label in table], uncertain).sum()
    by_label = [result_row(f"images_{part}", int(count), label, n=len(table)) for label, count in counts.items()]
    return [result_row(f"images_{part}", len(table), n=len(table)), *by_label]


def heldout_rows(before, after):
    """Return held-out losses before and after training and their mean change, with approximate 95% intervals."""
    if not before:
        return [result_row("heldout_diffusion", None, note="no held-out images")]
    rows = []
    for name in before:
        vae_trained = name == "diffusion" and "reconstruction" in before
        note = "fixed timesteps and noise" + ("; the VAE, and so the latents, changed too" if vae_trained else "")
        figures = {"_start": before[name], "": after[name], "_change": after[name] - before[name]}
        for suffix, values in figures.items():
            mean, n = float(values.mean()), len(values)
            half_width = 1.96 * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else None
            interval = {"low": mean - half_width, "high": mean + half_width} if n > 1 else {}
            rows.append(result_row(f"heldout_{name}{suffix}", mean, n=n, **interval, note=note))
    return rows


def summarize(accelerator, args, state, data, losses):
    """Return the contents of training_summary.json."""
    trainable, cuda = Counter(), accelerator.device.type == "cuda"
    for name, parameter in state.parameters.items():
        trainable[name.split(".")[0]] += parameter.numel()
    # ru_maxrss is in bytes on macOS, in KiB elsewhere.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated() if cuda else resident
    period = "after encoding, GPU" if cuda else "whole run, cpu"
    seconds_per_epoch = state.seconds * len(data.train) / state.samples_seen
    settings = ("method", "labels", "resolution", "resize_mode", "uncertain", "prompt_template")
    return {
        "script": Path(__file__).name,
        "base_model": args.pretrained_model_name_or_path,
        **{name: getattr(args, name) for name in settings},
        **{name: getattr(data, name) for name in ("source", "rows", "own_prompts", "left_out", "notes")},
        "example_prompt": data.train["prompt"].iloc[0],
        "images": len(data.train),
        "patients": data.train["patient"].nunique(),
        "heldout_images": len(data.heldout),
        "steps": state.step,
        "epochs": state.samples_seen / len(data.train),
        "global_batch_size": state.identity["global_batch_size"],
        "num_processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "mixed_precision": accelerator.mixed_precision,
        "trainable_parameters": trainable,
        "identity": state.identity,
        "arguments": vars(args),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")},
        "results": [
            *(result_row("trainable_parameters", count, label=name) for name, count in trainable.items()),
            result_row("seconds_per_epoch", seconds_per_epoch, n=len(data.train), note="training steps only"),
            result_row("seconds", state.seconds, note="training steps only, summed over resumed runs"),
            result_row("peak_memory_gib", memory / 2**30, note=f"main process, {period}"),
            result_row("train_loss", state.train_loss, note="mean since the last log entry"),
            *heldout_rows(*losses),
            *count_rows("train", data.train, args.labels, args.uncertain),
            *data.val_counts,
        ],
    }


def model_card(args, summary, usage):
    """Return the run's model card, with the front matter that the hub reads."""
    base = args.pretrained_model_name_or_path
    tags = ["text-to-image", "stable-diffusion", "chest-x-ray", "medical-imaging"]
    data = ModelCardData(base_model=None if os.path.exists(base) else base, library_name="diffusers", tags=tags)
    trained = ", ".join(f"{name} {count:,}" for name, count in summary["trainable_parameters"].items())
    hidden = ("images_", "trainable_")
    prompts = f'Prompts such as "{summary["example_prompt"]}".'
    if summary["own_prompts"]:
        own_texts = f"{summary['own_prompts']:,} images were trained on texts of their own, such as reports"
        prompts += f" {own_texts}, truncated to 77 tokens."
    shown = [row for row in summary["results"] if row["value"] is not None and not row["metric"].startswith(hidden)]
    table = "\n".join(f"| {row['metric']} | {row['value']:.6g} | {row['n'] or ''} |" for row in shown)
    return ModelCard(f"""---
{data.to_yaml()}
---
# {summary["method"]}: Stable Diffusion fine-tuned on chest radiographs

Base model `{base}`; trained parameters: {trained}; {summary["images"]:,} images of
{args.resolution}x{args.resolution} pixels; {summary["steps"]:,} steps of {summary["global_batch_size"]} images.

```python
{usage}
```

{prompts}

| metric | value | n |
|---|---|---|
{table}

For research only. The images are synthetic: they show no patient and must not be used for diagnosis. The terms of the
training data and of the base model apply.
""")


def save_folder(pipeline, folder):
    """Save a pipeline to a temporary folder and move its parts into place, its index last."""
    temporary = folder / ".pipeline.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    # Version 4 of transformers needs vocab.json, merges.txt and `text_model.` in names; version 5 may write neither.
    if hasattr(pipeline.tokenizer, "backend_tokenizer"):
        pipeline.tokenizer.backend_tokenizer.model.save(str(temporary / "tokenizer"))
    weights = pipeline.text_encoder.state_dict()
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    pipeline.text_encoder.save_pretrained(temporary / "text_encoder", state_dict=weights)
    for entry in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
        shutil.rmtree(folder / entry.name, ignore_errors=True)
        os.replace(entry, folder / entry.name)
    temporary.rmdir()


def save_model(args, state):
    """Save the base pipeline, loaded again since frozen weights may be in half precision, with the trained weights."""
    trained = load_base_pipeline(args)
    for name, parameter in state.parameters.items():
        component, name = name.split(".", 1)
        getattr(trained, component).get_parameter(name).data.copy_(parameter)
    save_folder(trained, Path(args.output_dir))


def usage_example(args, model):
    """Return the Python that loads the run from `model`, a folder or a hub repository."""
    return f"""from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{model}", safety_checker=None)"""


def finish_run(args, summary, repo_id):
    """Write the model card, then the summary, which marks the run as finished; upload all with --push_to_hub."""
    output_dir = Path(args.output_dir)
    model_card(args, summary, usage_example(args, repo_id or args.output_dir)).save(output_dir / "README.md")
    temporary = output_dir / ".training_summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, output_dir / "training_summary.json")
    if repo_id:
        upload_folder(repo_id=repo_id, folder_path=output_dir, ignore_patterns=["checkpoint-*", "logs/*", ".*"])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def make_accelerator(args):
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    # A plugin, since accelerate's config or environment would override gradient_accumulation_steps.
    accumulation = GradientAccumulationPlugin(args.gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(
        # Without this, CPU processes that torchrun started would not join one process group.
        cpu="LOCAL_RANK" in os.environ and not torch.accelerator.is_available(),
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=accumulation,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=f"{args.output_dir}/logs"),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        fail("only data parallelism is supported; launch/accelerate/ has configurations")
    return accelerator


def image_sizes(images):
    """Count the sizes of up to 1,000 evenly spaced images, as {(width, height): count}."""

    def size(image):
        with contextlib.suppress(Exception), open_image(image) as opened:  # unreadable images are reported later
            return opened.size

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return Counter(filter(None, pool.map(size, images[:: len(images) // 1000 + 1])))


def print_lines(lines):
    print("\n".join(f"{name:>9}  {text}" for name, text in lines), flush=True)


def print_table(data):
    """Print what the table's columns are used for, two captions, and the most frequent sizes of the images."""
    captions, sizes = data.train["prompt"].unique(), image_sizes(list(data.train["image"]))
    captions = f"{len(captions):,}, such as {', '.join(map(repr, captions[:2]))}"
    sizes = ", ".join(f"{w}x{h} ({count:,})" for (w, h), count in sizes.most_common(5))
    print_lines([*data.block, ("captions", captions), ("sizes", sizes)])


def print_plan(accelerator, args, state, data, max_train_steps, checkpoint):
    """Print what the run is about to do, with all warnings."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in data.left_out.items() if count)
    train, size = data.train, state.identity["global_batch_size"]
    factors = f"batch {args.train_batch_size} x accumulation {args.gradient_accumulation_steps}"
    factors += f" x processes {accelerator.num_processes}"
    lines = [
        ("left out", left_out or "none"),
        ("train", f"{len(train):,} images, {train['patient'].nunique():,} patients"),
        ("held out", f"{len(data.heldout):,} images, {data.heldout['patient'].nunique():,} patients"),
        ("method", f"{args.method}, {sum(p.numel() for p in state.parameters.values()):,} trainable parameters"),
        ("steps", f"{max_train_steps:,}, {max_train_steps * size / len(train):.1f} epochs"),
        ("batch", f"{size} images per step: {factors}"),
        ("device", f"{accelerator.device}, mixed precision {accelerator.mixed_precision}"),
        ("output", f"{args.output_dir}{f', resuming from {checkpoint}' if checkpoint else ''}"),
        *(("warning", note) for note in data.notes),
    ]
    print_lines(lines)


@contextlib.contextmanager
def lock_output_dir(accelerator, args, checkpoint):
    """Keep other runs out of the output folder. The kernel drops the lock of a run that is killed."""
    lock = FileLock(Path(args.output_dir) / ".lock")
    try:
        if accelerator.is_main_process:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
            if find_checkpoint(args) != checkpoint:
                fail(f"another run wrote to {args.output_dir} in the meantime; start this one again")
        yield
    except Timeout:
        fail(f"another run is writing to {args.output_dir}; wait until it ends or pass another --output_dir")
    finally:
        if lock.is_locked:
            os.unlink(lock.lock_file)
            lock.release()


def start_run(accelerator, args, checkpoint):
    """Delete an overwritten run, create the hub repository, start the trackers; return the repository's id or None."""
    repo_id, output_dir = None, Path(args.output_dir)
    if accelerator.is_main_process:
        resumes_here = checkpoint and checkpoint.resolve().parent == output_dir.resolve()
        if args.overwrite_output_dir and not resumes_here:
            for path in (output_dir / name for name in RUN_FILES):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            for folder in list_checkpoints(output_dir):
                remove_checkpoint(folder)
        (output_dir / "training_summary.json").unlink(missing_ok=True)  # it marks a finished run
        if args.push_to_hub:  # before training, so that a missing login fails early
            repo_id = create_repo(args.hub_model_id or output_dir.name, private=True, exist_ok=True).repo_id
    settings = {name: v if isinstance(v, (bool, int, float, str)) else str(v) for name, v in vars(args).items()}
    accelerator.init_trackers(Path(__file__).stem, config=settings)
    return repo_id


@contextlib.contextmanager
def stop_on_signals(accelerator):
    """Let SIGTERM, SIGUSR1 and Ctrl-C stop training after a checkpoint; a second Ctrl-C stops at once."""

    def request_stop(number, frame):
        accelerator.set_trigger()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    handlers = {number: signal.signal(number, request_stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    """Leave stop signals, which may reach every process of a job, to the training process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def iterate_batches(accelerator, stream, args, first_sample, num_batches):
    """Yield this process's part of each micro-batch of the stream, on the device."""
    batch_size, stride = args.train_batch_size, args.train_batch_size * accelerator.num_processes
    first = first_sample + accelerator.process_index * batch_size
    cuda, workers = accelerator.device.type == "cuda", args.dataloader_num_workers
    loader = torch.utils.data.DataLoader(
        stream,
        # A generator, since a list of millions of batches would take hundreds of MB.
        batch_sampler=(range(n, n + batch_size) for n in range(first, first + num_batches * stride, stride)),
        num_workers=(4 if cuda else 0) if workers is None else workers,
        pin_memory=cuda,
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        yield {name: values.to(accelerator.device, non_blocking=True) for name, values in batch.items()}


def train(accelerator, state, stream, max_train_steps, run_validation, args):
    """Run the remaining optimizer steps. Return whether a signal stopped the run (after writing a checkpoint)."""
    accumulation, parameters = args.gradient_accumulation_steps, list(state.parameters.values())
    global_batch_size = state.identity["global_batch_size"]
    num_batches = (max_train_steps - state.step) * accumulation
    batches = iterate_batches(accelerator, stream, args, state.samples_seen, num_batches)
    quiet = not accelerator.is_main_process
    bar = tqdm(desc="training", total=max_train_steps, initial=state.step, unit="step", disable=quiet)
    # Loss and gradient norm are summed on the device and read at logging steps only: reading forces a synchronization.
    sums, count = torch.zeros(2, device=accelerator.device), 0
    began = window_began = time.perf_counter()
    state.model.train()
    while state.step < max_train_steps:
        for micro in range(accumulation):
            batch = next(batches)
            # Dropout is seeded per micro-batch, so that checkpoints need no random state. It comes after `next`,
            # since starting the loader draws from the same generator.
            torch.manual_seed(keyed_seed(args.seed, "dropout", state.step, micro, accelerator.process_index))
            with accelerator.accumulate(state.model):
                loss = state.model(batch)["loss"].mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
                    # A gradient scaler skips steps with infinite gradients; they count as 0 in the logged norm.
                    sums[1] += norm.nan_to_num(0.0, posinf=0.0, neginf=0.0) if accelerator.scaler else norm
                state.optimizer.step()
                state.optimizer.zero_grad()
            sums[0] += loss.detach() / accumulation
        state.lr_scheduler.step()
        if state.ema:
            state.ema.step(parameters)
        state.step += 1
        state.samples_seen += global_batch_size
        count += 1
        bar.update()

        last, stopped = state.step == max_train_steps, False
        checkpointing = args.checkpointing_steps and (state.step % args.checkpointing_steps == 0 or last)
        validating = args.validation_steps and state.step % args.validation_steps == 0 and not last
        if state.step % args.logging_steps == 0 or checkpointing or validating or last:
            stopped = accelerator.check_trigger()
            state.train_loss, mean_norm = (accelerator.reduce(sums, "mean") / count).tolist()
            # The scale starts at 65,536 and is halved by each overflow: below 1e-4, about 30 were not made up for.
            overflowing = accelerator.scaler and accelerator.scaler.get_scale() < 1e-4
            if overflowing or not math.isfinite(state.train_loss + mean_norm):
                bar.close()
                accelerator.end_training()
                figures = f"loss {state.train_loss:.3g}, gradient norm {mean_norm:.3g}"
                hint = "--lr_scheduler constant_with_warmup, --max_grad_norm, --snr_gamma or --mixed_precision no"
                fail(f"diverged by step {state.step:,}: {figures}; try a lower learning rate, {hint}")
            rate = count * global_batch_size / (time.perf_counter() - window_began)
            rates = dict(zip(args.learning_rates, state.lr_scheduler.get_last_lr()))
            shown = ", ".join(f"{lr:.1e}" for lr in rates.values())
            bar.set_postfix_str(f"loss {state.train_loss:.4f}, lr {shown}, {rate:.3g} images/s")
            logs = {"loss": state.train_loss, "gradient_norm": mean_norm, "images_per_second": rate}
            accelerator.log(logs | {f"lr_{name}": lr for name, lr in rates.items()}, step=state.step)
            sums, count, window_began = torch.zeros_like(sums), 0, time.perf_counter()
        if checkpointing or validating or stopped or last:
            state.seconds += time.perf_counter() - began
            if (checkpointing or stopped) and accelerator.is_main_process:
                save_checkpoint(accelerator, state, args)
            accelerator.wait_for_everyone()
            if stopped and not last:
                break
            if validating:
                run_validation()
            began = window_began = time.perf_counter()
    bar.close()
    return state.step < max_train_steps


def main(args):
    accelerator = make_accelerator(args)
    data = load_training_data(args)
    if accelerator.is_main_process:
        print_table(data)  # before images are encoded, which may take hours
    checkpoint = find_checkpoint(args)
    pipeline = load_base_pipeline(args)
    hashes = {name: fingerprint(getattr(pipeline, name)) for name in ("unet", "text_encoder", "vae")}
    stream, heldout = prepare_streams(accelerator, pipeline, data, args, hashes["vae"])
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    max_train_steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(data.train) / global_batch_size)
    identity = run_identity(accelerator, args, data, hashes, global_batch_size, max_train_steps)
    if checkpoint:
        data.notes += check_identity(checkpoint, identity, max_train_steps)

    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; only now, since cached latents use PyTorch's default
        torch.cuda.reset_peak_memory_stats()  # not of encoding, which later runs do without
    model = build_loss(args, pipeline, stream, identity)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(args, parameters)
    schedule = {"num_cycles": args.lr_num_cycles, "power": args.lr_power, "num_training_steps": max_train_steps}
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, **schedule)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(parameters.values(), decay=args.ema_decay) if args.use_ema else None
    state = TrainState(model, parameters, optimizer, lr_scheduler, ema, identity)

    if accelerator.is_main_process:
        print_plan(accelerator, args, state, data, max_train_steps, checkpoint)
    with lock_output_dir(accelerator, args, checkpoint):
        repo_id = start_run(accelerator, args, checkpoint)
        frequent = Counter(sorted(data.train["prompt"])).most_common(args.num_validation_images)
        prompts = args.validation_prompts or [prompt for prompt, _ in frequent]
        run_validation = functools.partial(validate, accelerator, state, pipeline, heldout, prompts, args)
        before = run_validation()  # at step 0, also if the run is resumed
        if checkpoint:
            load_checkpoint(accelerator, state, checkpoint, args)
        with stop_on_signals(accelerator):
            stopped = train(accelerator, state, stream, max_train_steps, run_validation, args)
        if stopped:
            accelerator.end_training()
            accelerator.print(f"stopped after step {state.step:,}; continue with --resume_from_checkpoint latest")
            sys.exit(EXIT_PREEMPTED)

        if ema:
            ema.copy_to(parameters.values())
        after = run_validation()
        if accelerator.is_main_process:
            # Before saving, which can raise the peak memory.
            summary = summarize(accelerator, args, state, data, (before, after))
            save_model(args, state)
            finish_run(args, summary, repo_id)
        accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_args())
    except torch.OutOfMemoryError as error:
        hint = "lower --train_batch_size and raise --gradient_accumulation_steps, or pass --gradient_checkpointing"
        fail(f"{error}; {hint}, --mixed_precision bf16, --use_8bit_adam or a smaller --resolution")
