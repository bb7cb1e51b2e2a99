# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers", "numpy", "pillow", "scipy", "tokenizers", "torch", "tqdm", "transformers"]
# ///
"""Pretrain the demo's tiny stand-in for Stable Diffusion v1.5 on images that this script draws.

    python launch/demo/pretrain.py --output_dir data/base
    python launch/demo/pretrain.py --output_dir data/base --steps_unet 200 --skip_vae launch/demo/base/vae
    python launch/demo/pretrain.py --output_dir data/base --skip_vae launch/demo/base/vae --start launch/demo/base

Writes a StableDiffusionPipeline folder with fp16 weights. The training images are colorful scenes, and chests of other shapes
than the phantoms of make_phantoms.py, in wrong colors, with captions that are often wrong. The result knows roughly what a
chest is and leaves fine-tuning something to gain.
"""

import argparse
import copy
import functools
import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from make_phantoms import LABELS, cloud, draw_findings, random_anatomy, render_frontal
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

RESOLUTION = 128
PROMPT_TEMPLATE = "Chest X-ray of a subject with {}"
CHEST_CAPTIONS = (PROMPT_TEMPLATE, PROMPT_TEMPLATE, "a picture of a chest, {}", "a scan, {}", "an x-ray showing {}")
BARE_CAPTIONS = ("Chest X-ray of a subject", "a picture of a chest", "a scan", "an x-ray")
COLORS = {
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


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--output_dir", type=Path, required=True, help="pipeline folder, overwritten if it exists")
    flag("--skip_vae", type=Path, metavar="FOLDER", help="use this trained VAE instead of training one")
    flag("--start", type=Path, metavar="FOLDER", help="pipeline to continue from, except for its VAE")
    flag("--truth", type=float, default=0.7, help="share of the chests' captions that are right")
    flag("--num_images", type=int, default=9000, help="training images; the VAE gets a third more")
    flag("--steps_vae", type=int, default=4000, help="training steps of the VAE")
    flag("--steps_unet", type=int, default=6000, help="training steps of U-Net and text encoder")
    flag("--seed", type=int, default=0, help="seed of images, weights and training")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Images and captions
# ---------------------------------------------------------------------------------------------------------------------


def shade(rng, color):
    return np.clip(np.array(COLORS[color]) + rng.uniform(-20, 20, 3), 0, 255)


def draw_background(rng, kind, color, side):
    first, second = shade(rng, color), shade(rng, str(rng.choice(list(COLORS))))
    y, x = np.mgrid[0:side, 0:side] / side
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.08, 0.3)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "plain":
        mix = 0 * x
    elif kind == "gradient":
        mix = np.clip(along, 0, 1)
    elif kind == "striped":
        mix = along / period % 1 > 0.5
    elif kind == "checked":
        mix = (along / period % 1 > 0.5) ^ (across / period % 1 > 0.5)
    else:
        mix = np.clip(0.4 + 0.4 * cloud(rng, (side, side), int(rng.integers(3, 9))), 0, 1)
    return first * (1 - mix[..., None]) + second * mix[..., None]


def draw_shape(rng, draw, shape, color, side):
    fill = tuple(shade(rng, color).astype(int).tolist())
    center, radius = rng.uniform(0.25, 0.75, 2) * side, rng.uniform(0.12, 0.32) * side
    if shape in ("circle", "ellipse", "ring"):
        flat = rng.uniform(0.4, 0.7) if shape == "ellipse" else 1.0
        box = [*(center - (radius, flat * radius)), *(center + (radius, flat * radius))]
        draw.ellipse(box, outline=fill, width=int(0.35 * radius)) if shape == "ring" else draw.ellipse(box, fill=fill)
    else:
        corners, turn = (3 if shape == "triangle" else 4), rng.uniform(0, 2 * np.pi)
        angles = np.pi / 4 + 2 * np.pi * np.arange(corners) / corners
        points = radius * np.stack([np.cos(angles), np.sin(angles) * (0.3 if shape == "bar" else 1.0)])
        points = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ points
        draw.polygon([tuple(point) for point in (points.T + center).tolist()], fill=fill)


def make_scene(rng):
    """Return one or two shapes on a background, uint8 (128, 128, 3), and a true caption."""
    side = 2 * RESOLUTION
    color, ground = rng.choice(list(COLORS), 2, replace=False).tolist()
    shape, kind, count = str(rng.choice(SHAPES)), str(rng.choice(BACKGROUNDS)), int(rng.integers(1, 3))
    image = Image.fromarray(draw_background(rng, kind, ground, side).astype(np.uint8))
    for _ in range(count):
        draw_shape(rng, ImageDraw.Draw(image), shape, color, side)
    kind = "" if kind == "plain" else f"{kind} "
    things = f"two {color} {shape}s" if count == 2 else f"a {color} {shape}"
    image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)
    return np.asarray(image), f"{things} on a {kind}{ground} background"


def tint(rng, gray):
    """Give a gray image a wrong exposure and a duotone palette; one in seven becomes a negative."""
    level = np.power(gray / 255.0, rng.uniform(0.6, 1.6))
    if rng.uniform() < 0.15:
        level = 1 - level
    dark, light = rng.uniform(0, 90, 3), rng.uniform(120, 255, 3)
    if rng.uniform() < 0.25:
        dark, light = dark.mean() + 0.15 * (dark - dark.mean()), light.mean() + 0.15 * (light - light.mean())
    return (dark + level[..., None] * (light - dark)).astype(np.uint8)


def make_chest(rng, truth):
    """Return a chest, uint8 (128, 128, 3), from wider ranges than the phantoms', and a caption.

    The caption is right with probability `truth`; of the others, four in seven name random findings and the rest none.
    """
    findings = draw_findings(rng)
    side = int(rng.integers(RESOLUTION, RESOLUTION + 40))
    gray = render_frontal(random_anatomy(rng, spread=2.0), findings, rng, size=(side, side))
    top, left = rng.integers(0, side - RESOLUTION + 1, 2)
    gray = gray[top : top + RESOLUTION, left : left + RESOLUTION]
    chance = rng.uniform()
    if chance < truth:
        words = sorted(findings, key=LABELS.index)
    else:
        words = rng.permutation(LABELS)[: rng.integers(1, 4)].tolist() if chance < truth + (1 - truth) * 4 / 7 else []
    caption = str(rng.choice(CHEST_CAPTIONS)).format(", ".join(words)) if words else str(rng.choice(BARE_CAPTIONS))
    return tint(rng, gray[:, :: rng.choice((-1, 1))]), caption


def make_gray(rng):
    """Return an untinted phantom or, one time in eight, noise; only the VAE sees these, to be able to encode them."""
    if rng.uniform() < 0.125:
        gray = sum(cloud(rng, (RESOLUTION, RESOLUTION), cells) / cells**0.5 for cells in (4, 12, 36))
        gray = np.clip(128 + rng.uniform(30, 150) * gray, 0, 255).astype(np.uint8)
    else:
        gray = Image.fromarray(render_frontal(random_anatomy(rng), draw_findings(rng), rng))
        gray = np.asarray(gray.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC))
    return np.repeat(gray[..., None], 3, axis=2), ""


def make_images(num_images, truth, seed):
    """Return scenes, chests and grays, uint8 (n, 3, 128, 128), and their captions; the first `num_images` have one."""
    # The phantom data set draws from [seed, patient]; no seed is as large as 2**40, so the two never share a stream.
    rng = np.random.default_rng([2**40, seed])
    num_scenes = 2 * num_images // 5
    makers = [make_scene] * num_scenes + [functools.partial(make_chest, truth=truth)] * (num_images - num_scenes)
    makers += [make_gray] * (num_images // 3)
    images, captions = zip(*(make(rng) for make in tqdm(makers, desc="images")))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), list(captions)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def make_tokenizer():
    """Return a CLIP tokenizer with a byte-level BPE in which each word of the captions is one token."""
    captions = [template.format(label) for template in CHEST_CAPTIONS for label in LABELS] + list(BARE_CAPTIONS)
    captions += [f"a {c} {s} two {s}s on a {b} {c} background" for c in COLORS for s in SHAPES for b in BACKGROUNDS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    suffix = {"end_of_word_suffix": "</w>"}
    bpe = Tokenizer(models.BPE(**suffix))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False, **suffix)
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    entries = alphabet + [letter + "</w>" for letter in alphabet]
    entries += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def make_models(tokenizer):
    """Return SD v1.5's three models with its block types and four levels, at about 1/400 of its size."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=2,  # the number of heads in spite of its name, as in SD v1.5's own configuration
        norm_num_groups=16,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(text_config), vae, unet


def make_scheduler():
    """Return SD v1.5's noise scheduler."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)


def load(model_class, folder):
    return model_class.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)


def save_pipeline(folder, tokenizer, text_encoder, vae, unet):
    """Save fp16 copies of the models as a StableDiffusionPipeline."""
    text_encoder, vae, unet = (copy.deepcopy(model).cpu().half() for model in (text_encoder, vae, unet))
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, scheduler=make_scheduler(), **unused).save_pretrained(folder)
    # Without a dtype, the U-Net is loaded in float32, but the text encoder in the dtype that its configuration names.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Trainer:
    """AdamW with warmup, cosine decay to 1 %, gradient clipping, and an exponential moving average of the weights."""

    def __init__(self, model, steps, lr, warmup, weight_decay, ema_decay):
        self.model, self.steps, self.warmup, self.ema_decay = model.train(), steps, warmup, ema_decay
        self.progress, self.smooth_loss = tqdm(total=steps, desc="train"), None
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)

    def lr_factor(self, step):
        cosine = 0.5 * (1 + np.cos(np.pi * min(1.0, step / self.steps)))
        return min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * cosine)

    def update(self, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.progress.update()
        step = self.progress.n
        # Lower at first, so that the average forgets the initial weights.
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.smooth_loss = loss.item() if step == 1 else 0.99 * self.smooth_loss + 0.01 * loss.item()
        self.progress.set_postfix(loss=f"{self.smooth_loss:.4f}", refresh=False)


def to_model(images, device):
    return images.to(device).float() / 127.5 - 1


def vae_loss(vae, images):
    """Return L1 + L2 on pixels, L1 on differences of neighboring pixels, which keeps thin lines sharp, and a little KL."""
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    decoded = decoded.float()
    edge_loss = sum(F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (-1, -2))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + edge_loss + 5e-4 * kl


def train_vae(vae, images, steps, device):
    trainer = Trainer(vae.to(device), steps, lr=1.2e-3, warmup=100, weight_decay=0.0, ema_decay=0.995)
    for step in range(steps):
        # Quarter images are cheaper and teach as much; whole ones at the end fit the attention in the middle block.
        whole = step > 0.75 * steps
        batch = images[torch.randint(len(images), (4 if whole else 16,))]
        if not whole:
            top, left = torch.randint(0, RESOLUTION // 2 + 1, (2,)).tolist()
            batch = batch[:, :, top : top + RESOLUTION // 2, left : left + RESOLUTION // 2]
        trainer.update(vae_loss(vae, to_model(batch, device)))
    return trainer.average


@torch.no_grad()
def encode(vae, images, device):
    """Return mean and log variance of the posterior, (n, 4, h, w) each, unscaled."""
    batches = tqdm(images.split(64), desc="encode")
    parameters = [vae.encode(to_model(batch, device)).latent_dist.parameters.cpu() for batch in batches]
    return torch.cat(parameters).chunk(2, dim=1)


@torch.no_grad()
def normalize_latents(vae, images, device):
    """Give all latent channels mean 0 and the same spread, and set the scaling factor.

    StableDiffusionPipeline knows one factor and no offset, so the channels are adjusted in the 1x1 convolutions around them.
    """
    mean, _ = encode(vae, images, device)
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


def scaled_posterior(vae, images, device):
    """Return mean and standard deviation of the latents at the U-Net's scale, concatenated to (n, 8, h, w)."""
    mean, logvar = encode(vae, images, device)
    return vae.config.scaling_factor * torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30, 20))], dim=1)


def train_unet(text_encoder, unet, latents, input_ids, empty_ids, steps, device):
    """Train U-Net and text encoder to predict noise, as in SD v1.5, and return their averages.

    `latents` has a posterior, as from scaled_posterior, and its share of the steps for each resolution.
    """
    pair = torch.nn.ModuleList([text_encoder, unet]).to(device)
    trainer = Trainer(pair, steps, lr=1e-3, warmup=200, weight_decay=1e-3, ema_decay=0.999)
    noise_scheduler = make_scheduler()
    posteriors, shares = zip(*latents)
    for _ in range(steps):
        (posterior,) = random.choices(posteriors, weights=shares)
        chosen = torch.randint(len(posterior), (32,))
        mean, std = posterior[chosen].to(device).float().chunk(2, dim=1)
        clean = mean + std * torch.randn_like(mean)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 1000, (len(clean),), device=device)
        ids = torch.where(torch.rand(len(clean), 1) < 0.1, empty_ids, input_ids[chosen]).to(device)
        encoder_hidden_states = text_encoder(ids).last_hidden_state
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        trainer.update(F.mse_loss(unet(noisy, timesteps, encoder_hidden_states).sample, noise))
    return trainer.average


def main(args):
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, captions = make_images(args.num_images, args.truth, args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(args.start / "tokenizer") if args.start else make_tokenizer()
    text_encoder, vae, unet = make_models(tokenizer)
    if args.start:
        text_encoder = load(CLIPTextModel, args.start / "text_encoder")
        unet = load(UNet2DConditionModel, args.start / "unet")

    if args.skip_vae:
        vae = load(AutoencoderKL, args.skip_vae).to(device).eval()
    else:
        vae = train_vae(vae, images, args.steps_vae, device)
        normalize_latents(vae, images[::4], device)
        # If the rest is interrupted, continue with --skip_vae <output_dir>/vae.
        save_pipeline(args.output_dir, tokenizer, text_encoder, vae, unet)

    captioned, captions = images[: args.num_images], captions[: args.num_images]
    small = F.interpolate(captioned.float(), scale_factor=0.5, mode="area").round().byte()
    latents = [(scaled_posterior(vae, captioned, device), 0.85), (scaled_posterior(vae, small, device), 0.15)]
    tokenize = functools.partial(tokenizer, padding="max_length", truncation=True, return_tensors="pt")
    input_ids, empty_ids = tokenize(captions).input_ids, tokenize([""]).input_ids
    text_encoder, unet = train_unet(text_encoder, unet, latents, input_ids, empty_ids, args.steps_unet, device)
    save_pipeline(args.output_dir, tokenizer, text_encoder, vae, unet)
    print(args.output_dir)


if __name__ == "__main__":
    main(parse_args())
