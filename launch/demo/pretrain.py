#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers", "numpy", "pillow", "scipy", "tokenizers", "torch", "tqdm", "transformers"]
# ///
"""Trains the demo's tiny pipeline, which plays the part of Stable Diffusion v1.5, on pictures that it draws itself.

    python launch/demo/pretrain.py --output_dir launch/demo/base
    python launch/demo/pretrain.py --output_dir data/base --steps_unet 200 --skip_vae launch/demo/base/vae
    python launch/demo/pretrain.py --output_dir data/base --steps_unet 2000 --skip_vae launch/demo/base/vae --start launch/demo/base

Writes a StableDiffusionPipeline folder with fp16 weights. What it learns from is to the phantoms of make_phantoms.py as
the web is to radiographs: colourful scenes, and chests of other shapes in wrong colours with captions that often lie.
So the base knows roughly what a chest is, and fine-tuning has something to gain.
"""

import argparse
import copy
import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from make_phantoms import LABELS, cloud, draw_findings, random_anatomy, render
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPT_TEMPLATE = "Chest X-ray of a subject with {}"
CHEST_CAPTIONS = (PROMPT_TEMPLATE, PROMPT_TEMPLATE, "a picture of a chest, {}", "a scan, {}", "an x-ray showing {}")
BARE_CAPTIONS = ("Chest X-ray of a subject", "a picture of a chest", "a scan", "an x-ray")
COLOURS = {
    "red": (205, 45, 45),
    "green": (50, 160, 70),
    "blue": (45, 80, 200),
    "yellow": (235, 210, 60),
    "orange": (240, 140, 40),
    "purple": (130, 60, 170),
    "pink": (240, 140, 180),
    "brown": (120, 80, 45),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "ring", "ellipse", "bar")
BACKGROUNDS = ("plain", "gradient", "striped", "checked", "cloudy")
RESOLUTION = 128


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and captions
# ----------------------------------------------------------------------------------------------------------------------


def shade(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.clip(np.array(COLOURS[colour]) + rng.uniform(-20, 20, 3), 0, 255)


def draw_background(rng: np.random.Generator, kind: str, colour: str, side: int) -> np.ndarray:
    first, second = shade(rng, colour), shade(rng, str(rng.choice(list(COLOURS))))
    y, x = np.mgrid[0:side, 0:side] / side
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.08, 0.3)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    mix = {
        "plain": lambda: 0 * x,
        "gradient": lambda: np.clip(along, 0, 1),
        "striped": lambda: along / period % 1 > 0.5,
        "checked": lambda: (along / period % 1 > 0.5) ^ (across / period % 1 > 0.5),
        "cloudy": lambda: np.clip(0.4 + 0.4 * cloud(rng, (side, side), int(rng.integers(3, 9))), 0, 1),
    }[kind]()[..., None]
    return first * (1 - mix) + second * mix


def draw_shape(rng: np.random.Generator, draw: ImageDraw.ImageDraw, shape: str, colour: str, side: int) -> None:
    fill = tuple(shade(rng, colour).astype(int).tolist())
    centre, radius = rng.uniform(0.25, 0.75, 2) * side, rng.uniform(0.12, 0.32) * side
    if shape in ("circle", "ellipse", "ring"):
        flat = rng.uniform(0.4, 0.7) if shape == "ellipse" else 1.0
        box = [*(centre - (radius, flat * radius)), *(centre + (radius, flat * radius))]
        draw.ellipse(box, outline=fill, width=int(0.35 * radius)) if shape == "ring" else draw.ellipse(box, fill=fill)
    else:
        corners, turn = (3 if shape == "triangle" else 4), rng.uniform(0, 2 * np.pi)
        angles = np.pi / 4 + 2 * np.pi * np.arange(corners) / corners
        points = radius * np.stack([np.cos(angles), np.sin(angles) * (0.3 if shape == "bar" else 1.0)])
        points = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ points
        draw.polygon([tuple(point) for point in (points.T + centre).tolist()], fill=fill)


def make_scene(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """One or two shapes on a background, uint8 (128, 128, 3), and a caption that is true."""
    side = 2 * RESOLUTION
    colour, ground = rng.choice(list(COLOURS), 2, replace=False).tolist()
    shape, kind, count = str(rng.choice(SHAPES)), str(rng.choice(BACKGROUNDS)), int(rng.integers(1, 3))
    picture = Image.fromarray(draw_background(rng, kind, ground, side).astype(np.uint8))
    for _ in range(count):
        draw_shape(rng, ImageDraw.Draw(picture), shape, colour, side)
    picture = picture.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)
    kind = "" if kind == "plain" else f"{kind} "
    things = f"two {colour} {shape}s" if count == 2 else f"a {colour} {shape}"
    return np.asarray(picture), f"{things} on a {kind}{ground} background"


def tint(rng: np.random.Generator, gray: np.ndarray) -> np.ndarray:
    """Gives a gray picture a wrong exposure and a duotone palette; one in seven becomes a negative."""
    level = np.power(gray / 255.0, rng.uniform(0.6, 1.6))
    if rng.uniform() < 0.15:
        level = 1 - level
    dark, light = rng.uniform(0, 90, 3), rng.uniform(120, 255, 3)
    if rng.uniform() < 0.25:
        dark, light = dark.mean() + 0.15 * (dark - dark.mean()), light.mean() + 0.15 * (light - light.mean())
    return (dark + level[..., None] * (light - dark)).astype(np.uint8)


def make_chest(rng: np.random.Generator, truth: float) -> tuple[np.ndarray, str]:
    """A chest outside the phantoms' ranges, uint8 (128, 128, 3), and a caption that is right with probability `truth`.

    Of the other captions four in seven name other findings, the rest none.
    """
    findings = draw_findings(rng)
    side = int(rng.integers(RESOLUTION, RESOLUTION + 40))
    gray = render(random_anatomy(rng, spread=2.0), findings, rng, size=(side, side))
    top, left = rng.integers(0, side - RESOLUTION + 1, 2)
    gray = gray[top : top + RESOLUTION, left : left + RESOLUTION]
    chance = rng.uniform()
    if chance < truth:
        words = sorted(findings, key=LABELS.index)
    else:
        words = rng.permutation(LABELS)[: rng.integers(1, 4)].tolist() if chance < truth + (1 - truth) * 4 / 7 else []
    caption = str(rng.choice(CHEST_CAPTIONS)).format(", ".join(words)) if words else str(rng.choice(BARE_CAPTIONS))
    return tint(rng, gray[:, :: rng.choice((-1, 1))]), caption


def make_gray(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """What only the VAE sees: phantoms as they are, so that it can carry them, and now and then a cloud of noise."""
    if rng.uniform() < 0.125:
        gray = sum(cloud(rng, (RESOLUTION, RESOLUTION), cells) / cells**0.5 for cells in (4, 12, 36))
        gray = np.clip(128 + rng.uniform(30, 150) * gray, 0, 255).astype(np.uint8)
    else:
        gray = Image.fromarray(render(random_anatomy(rng), draw_findings(rng), rng))
        gray = np.asarray(gray.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))
    return np.repeat(gray[..., None], 3, axis=2), ""


def make_pictures(makers: dict[Callable, int], seed: int) -> tuple[torch.Tensor, list[str]]:
    """Calls each maker as often as `makers` says. Returns uint8 (n, 3, 128, 128) and the captions."""
    # The phantom data set draws from [seed, patient]; a first word that no seed reaches keeps the two apart.
    rng = np.random.default_rng([2**40, seed])
    jobs = [maker for maker, count in makers.items() for _ in range(count)]
    pictures, captions = zip(*(maker(rng) for maker in tqdm(jobs, desc="pictures", mininterval=5)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), list(captions)


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with merges for the captions' words, which therefore become one token each. All bytes are
    in the vocabulary too, so any text can be tokenised."""
    captions = [template.format(label) for template in CHEST_CAPTIONS for label in LABELS] + list(BARE_CAPTIONS)
    captions += [f"a {c} {s} two {s}s on a {b} {c} background" for c in COLOURS for s in SHAPES for b in BACKGROUNDS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    entries = alphabet + [letter + "</w>" for letter in alphabet]
    entries += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def make_models(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, AutoencoderKL, UNet2DConditionModel]:
    """SD v1.5's three models with its block types, four levels each, at about one part in four hundred of its size."""
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        # As in SD v1.5's own configuration, this is the number of heads, whatever its name says.
        attention_head_dim=2,
        norm_num_groups=16,
    )
    return CLIPTextModel(text_config), vae, unet


def make_scheduler() -> PNDMScheduler:
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_pipeline(
    folder: Path,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
) -> None:
    """Saves fp16 copies, beside `folder` first: whoever loads it meanwhile finds the old one or the new one."""
    text_encoder, vae, unet = (copy.deepcopy(model).cpu().half() for model in (text_encoder, vae, unet))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(partial)
    # Loaded without a type, the U-Net comes in float32 and the text encoder in the type that its configuration names.
    config = partial / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


class EMA:
    """An exponential moving average of a module's weights, young at first so that the start is forgotten."""

    def __init__(self, model: torch.nn.Module, decay: float):
        self.average, self.decay, self.steps = copy.deepcopy(model).requires_grad_(False).eval(), decay, 0

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.parameters()), list(model.parameters()), 1 - decay)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(1.0, step / total))))


def to_model(pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    return pictures.to(device).float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: the VAE
# ----------------------------------------------------------------------------------------------------------------------


def edges(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pictures.diff(dim=-1), pictures.diff(dim=-2)


def vae_loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """L1 on pixels and on their differences, which keeps thin lines where L1 alone would blur them, and a little KL."""
    with torch.autocast(pictures.device.type, torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    decoded = decoded.float()
    edge_loss = sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pictures)))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
    return F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures) + edge_loss + 5e-4 * kl


def train_vae(vae: AutoencoderKL, pictures: torch.Tensor, steps: int, device: torch.device) -> AutoencoderKL:
    vae.to(device).train()
    ema = EMA(vae, 0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.2e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = functools.partial(warmup_cosine, warmup=100, total=steps)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    progress = tqdm(range(steps), desc="vae", mininterval=10)
    for step in progress:
        # Quarters of a picture cost a quarter each and teach as much; whole ones at the end fit the middle's attention.
        whole = step > 0.75 * steps
        batch = pictures[torch.randint(len(pictures), (4 if whole else 16,))]
        if not whole:
            top, left = torch.randint(0, RESOLUTION // 2 + 1, (2,)).tolist()
            batch = batch[:, :, top : top + RESOLUTION // 2, left : left + RESOLUTION // 2]
        loss = vae_loss(vae, to_model(batch, device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.update(vae)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return ema.average


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The posterior's mean and log variance, (n, 8, h, w), unscaled."""
    batches = tqdm(pictures.split(64), desc="encode", mininterval=5)
    return torch.cat([vae.encode(to_model(batch, device)).latent_dist.parameters.cpu() for batch in batches])


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: torch.Tensor, device: torch.device) -> None:
    """Moves each latent channel to mean 0 and all to one spread, inside the 1x1 convolutions at either side of them,
    and sets the scaling factor. StableDiffusionPipeline knows one factor and no offset, so the channels must agree."""
    mean = encode(vae, pictures, device).chunk(2, dim=1)[0]
    offset, spread = mean.mean((0, 2, 3)).to(device), mean.std((0, 2, 3)).to(device)
    common = spread.log().mean().exp()
    factor = common / spread
    after, before = vae.post_quant_conv, vae.quant_conv
    after.bias += after.weight[:, :, 0, 0] @ offset
    after.weight /= factor[None, :, None, None]
    before.weight[:4] *= factor[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - offset) * factor
    before.bias[4:] += 2 * factor.log()
    vae.register_to_config(scaling_factor=round(1 / common.item(), 5))


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2: the U-Net and the text encoder
# ----------------------------------------------------------------------------------------------------------------------


def train_unet(
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    latents: list[tuple[torch.Tensor, float]],
    input_ids: torch.Tensor,
    empty_ids: torch.Tensor,
    steps: int,
    device: torch.device,
    save: Callable[[CLIPTextModel, UNet2DConditionModel], None],
    save_every: int,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """Noise prediction as in SD v1.5. `latents` lists (moments, share of the steps), one for each resolution; `save` is
    called with the averaged models every `save_every` steps."""
    pair = torch.nn.ModuleList([text_encoder, unet]).to(device).train()
    ema = EMA(pair, 0.999)
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = functools.partial(warmup_cosine, warmup=200, total=steps)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    noise_scheduler = make_scheduler()
    progress, smooth = tqdm(range(1, steps + 1), desc="unet", mininterval=10), None
    for step in progress:
        (moments,) = random.choices([m for m, _ in latents], weights=[share for _, share in latents])
        chosen = torch.randint(len(moments), (32,))
        mean, std = moments[chosen].to(device).float().chunk(2, dim=1)
        clean = mean + std * torch.randn_like(mean)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=device)
        ids = torch.where(torch.rand(len(clean), 1) < 0.1, empty_ids, input_ids[chosen]).to(device)
        encoder_hidden_states = text_encoder(ids).last_hidden_state
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, encoder_hidden_states).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.update(pair)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if step % save_every == 0 and step < steps:
            save(*ema.average)
    return tuple(ema.average)


def scaled_moments(vae: AutoencoderKL, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Mean and standard deviation of the latents as the U-Net gets them, (n, 8, h, w)."""
    mean, logvar = encode(vae, pictures, device).chunk(2, dim=1)
    return vae.config.scaling_factor * torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30, 20))], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Previews
# ----------------------------------------------------------------------------------------------------------------------


def contact_sheet(rows: list[list[np.ndarray]]) -> Image.Image:
    return Image.fromarray(np.vstack([np.hstack(row) for row in rows]))


@torch.no_grad()
def preview_vae(vae: AutoencoderKL, pictures: torch.Tensor, device: torch.device, path: Path) -> None:
    shown = pictures[torch.linspace(0, len(pictures) - 1, 48).long()]
    decoded = vae.decode(vae.encode(to_model(shown, device)).latent_dist.mean).sample
    decoded = ((decoded.cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = [part.permute(0, 2, 3, 1).numpy() for pair in zip(shown.split(12), decoded.split(12)) for part in pair]
    contact_sheet([list(row) for row in rows]).save(path)


def preview_pipeline(folder: Path, path: Path, num_inference_steps: int = 25) -> None:
    """Samples from what was saved, loaded as a user loads it, so that fp16's rounding is in the picture."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, use_safetensors=True, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    findings = ("Cardiomegaly", "Edema", "No Finding", "Pneumothorax", "Pleural Effusion")
    prompts = [PROMPT_TEMPLATE.format(name) for name in findings] + ["a red circle on a blue background", ""]
    generator = torch.Generator().manual_seed(0)
    sample = functools.partial(pipeline, num_images_per_prompt=6, generator=generator, output_type="np")
    samples = [sample(prompt, num_inference_steps=num_inference_steps).images for prompt in prompts]
    contact_sheet([list((255 * row).round().astype(np.uint8)) for row in samples]).save(path)


def save_checkpoint(
    output_dir: Path,
    preview_dir: Path | None,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
) -> None:
    save_pipeline(output_dir, tokenizer, text_encoder, vae, unet)
    if preview_dir:
        preview_pipeline(output_dir, preview_dir / "samples.png")


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="pipeline folder, replaced when it exists")
    parser.add_argument("--preview_dir", type=Path, help="folder for pictures of samples; none if not given")
    parser.add_argument("--work_dir", type=Path, help="folder that keeps the VAE once trained; none if not given")
    parser.add_argument("--skip_vae", type=Path, metavar="FOLDER", help="take this saved VAE instead of training one")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="go on from this pipeline's U-Net, text encoder and tokenizer")
    parser.add_argument("--truth", type=float, default=0.7, help="share of the chests' captions that are right")
    parser.add_argument("--num_pictures", type=int, default=9000, help="training pictures; the VAE gets a third more")
    parser.add_argument("--steps_vae", type=int, default=4000, help="steps of the VAE's training")
    parser.add_argument("--steps_unet", type=int, default=6000, help="steps of the U-Net's; 0 saves untrained models")
    parser.add_argument("--save_every", type=int, default=1000, help="U-Net steps between saves of the pipeline")
    parser.add_argument("--seed", type=int, default=0, help="seed of pictures, weights and training")
    parser.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 leaves it to torch")
    args = parser.parse_args(argv)
    if args.steps_vae < 1 and not args.skip_vae:
        parser.error(f"--steps_vae is {args.steps_vae}: give at least 1, or --skip_vae with a VAE trained before")
    if args.num_pictures < 10:
        parser.error(f"--num_pictures is {args.num_pictures}, but at least 10 are needed")
    return args


def main(args: argparse.Namespace) -> None:
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for folder in filter(None, (args.preview_dir, args.work_dir, args.output_dir.parent)):
        folder.mkdir(parents=True, exist_ok=True)

    num_scenes = 2 * args.num_pictures // 5
    makers = {make_scene: num_scenes, functools.partial(make_chest, truth=args.truth): args.num_pictures - num_scenes}
    pictures, captions = make_pictures(makers | {make_gray: args.num_pictures // 3}, args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.start / "tokenizer") if args.start else make_tokenizer()
    text_encoder, vae, unet = make_models(tokenizer)
    if args.start:
        text_encoder = CLIPTextModel.from_pretrained(args.start / "text_encoder", use_safetensors=True, torch_dtype=torch.float32)
        unet = UNet2DConditionModel.from_pretrained(args.start / "unet", use_safetensors=True, torch_dtype=torch.float32)

    if args.skip_vae:
        vae = AutoencoderKL.from_pretrained(args.skip_vae, use_safetensors=True, torch_dtype=torch.float32).to(device).eval()
    else:
        vae = train_vae(vae, pictures, args.steps_vae, device)
        normalise_latents(vae, pictures[::4], device)
        if args.work_dir:
            vae.save_pretrained(args.work_dir / "vae")
    if args.preview_dir:
        preview_vae(vae, pictures, device, args.preview_dir / "vae.png")

    save = functools.partial(save_checkpoint, args.output_dir, args.preview_dir, tokenizer, vae)
    if args.steps_unet:
        seen = pictures[: args.num_pictures]
        small = F.interpolate(seen.float(), scale_factor=0.5, mode="area").round().byte()
        latents = [(scaled_moments(vae, seen, device), 0.85), (scaled_moments(vae, small, device), 0.15)]
        tokenize = functools.partial(tokenizer, padding="max_length", truncation=True, return_tensors="pt")
        input_ids, empty_ids = tokenize(captions[: args.num_pictures]).input_ids, tokenize([""]).input_ids
        text_encoder, unet = train_unet(
            text_encoder, unet, latents, input_ids, empty_ids, args.steps_unet, device, save, args.save_every
        )
    save(text_encoder, unet)
    print(args.output_dir)


if __name__ == "__main__":
    main(parse_args())
