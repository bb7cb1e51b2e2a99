# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers", "numpy", "pillow", "scipy", "torch", "tqdm", "transformers"]
# ///
"""Pretrain the demo's tiny stand-in for Stable Diffusion v1.5 on images that this script draws.

    python launch/demo/pretrain.py --output_dir data/base
    python launch/demo/pretrain.py --output_dir data/base --skip_vae launch/demo/base/vae --start launch/demo/base

Writes a StableDiffusionPipeline folder with fp16 weights; configurations and tokenizer are those of launch/demo/base.
The images are colorful scenes, and chests in wrong colors and in shapes that the phantoms of make_phantoms.py do not
have, with captions that are often wrong. So the model roughly knows a chest, and fine-tuning has something to improve.
"""

import argparse
import copy
import functools
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from make_phantoms import LABELS, cloud, draw_findings, random_anatomy, render_frontal
from PIL import Image, ImageColor, ImageDraw
from tqdm.auto import tqdm, trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BASE = Path(__file__).parent / "base"
RESOLUTION = 128
PROMPT_TEMPLATE = "Chest X-ray of a subject with {}"
CHEST_CAPTIONS = (PROMPT_TEMPLATE, PROMPT_TEMPLATE, "a picture of a chest, {}", "a scan, {}", "an x-ray showing {}")
BARE_CAPTIONS = ("Chest X-ray of a subject", "a picture of a chest", "a scan", "an x-ray")
COLORS = "red green blue yellow orange purple pink brown black white gray".split()
RGB = "#cd2d2d #32a046 #2d50c8 #ebd23c #f08c28 #823caa #f08cb4 #78502d #141414 #f0f0f0 #808080".split()
SHAPES = ("circle", "square", "triangle", "ring", "ellipse", "bar")
BACKGROUNDS = ("plain", "gradient", "striped", "checked", "cloudy")


# ---------------------------------------------------------------------------------------------------------------------
# Images and captions
# ---------------------------------------------------------------------------------------------------------------------


def shade(rng, color):
    """Return a random shade of a named color, (3,) from 0 to 255."""
    rgb = ImageColor.getrgb(RGB[COLORS.index(color)])
    return np.clip(np.array(rgb) + rng.uniform(-20, 20, 3), 0, 255)


def draw_background(rng, kind, color, side):
    first, second = shade(rng, color), shade(rng, str(rng.choice(COLORS)))
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
    color, ground = rng.choice(COLORS, 2, replace=False).tolist()
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
# Models and training
# ---------------------------------------------------------------------------------------------------------------------


def save_pipeline(folder, **models):
    """Save fp16 copies of the three models, with the tokenizer and scheduler of BASE, as a StableDiffusionPipeline."""
    models = {name: copy.deepcopy(model).cpu().half() for name, model in models.items()}
    models |= {"tokenizer": CLIPTokenizer.from_pretrained(BASE / "tokenizer")}
    models |= {"scheduler": PNDMScheduler.from_pretrained(BASE / "scheduler")}
    unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**models, **unused)
    pipeline.save_pretrained(folder)
    # Version 4 of transformers needs these names and files.
    weights = {f"text_model.{name}": weight for name, weight in pipeline.text_encoder.state_dict().items()}
    pipeline.text_encoder.save_pretrained(folder / "text_encoder", state_dict=weights)
    pipeline.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    # Unless told otherwise, transformers loads a model in its configuration's dtype, diffusers in float32.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))


def train(model, compute_loss, steps, lr, warmup, weight_decay, ema_decay):
    """Minimize compute_loss(step) with AdamW and a cosine schedule; return the model's exponential moving average."""
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)

    def lr_factor(step):
        cosine = 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)

    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    progress = trange(steps, desc="train")
    for step in progress:
        loss = compute_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        # The decay is lower at first, so that the average forgets the initial weights.
        decay = min(ema_decay, (2 + step) / (11 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return average


def vae_loss(vae, images):
    """Return L1 + L2 on pixels, L1 on differences of neighboring pixels (keeps thin lines sharp), and a little KL."""
    pixel_values = images.to(vae.device).float() / 127.5 - 1
    with torch.autocast(vae.device.type, torch.bfloat16):
        posterior = vae.encode(pixel_values).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    decoded = decoded.float()
    edge_loss = sum(F.l1_loss(decoded.diff(dim=dim), pixel_values.diff(dim=dim)) for dim in (-1, -2))
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
    return F.l1_loss(decoded, pixel_values) + F.mse_loss(decoded, pixel_values) + edge_loss + 5e-4 * kl


def train_vae(vae, images, steps):
    def compute_loss(step):
        # Quarter images are cheaper and teach as much; whole ones at the end fit the attention in the middle block.
        whole = step > 0.75 * steps
        batch = images[torch.randint(len(images), (4 if whole else 16,))]
        if not whole:
            top, left = torch.randint(0, RESOLUTION // 2 + 1, (2,)).tolist()
            batch = batch[:, :, top : top + RESOLUTION // 2, left : left + RESOLUTION // 2]
        return vae_loss(vae, batch)

    return train(vae, compute_loss, steps, lr=1.2e-3, warmup=100, weight_decay=0.0, ema_decay=0.995)


@torch.no_grad()
def encode(vae, images):
    """Return mean and log variance of the posterior, (n, 4, h, w) each, unscaled."""
    parameters = []
    for batch in tqdm(images.split(64), desc="encode"):
        pixel_values = batch.to(vae.device).float() / 127.5 - 1
        parameters.append(vae.encode(pixel_values).latent_dist.parameters.cpu())
    return torch.cat(parameters).chunk(2, dim=1)


@torch.no_grad()
def normalize_latents(vae, images):
    """Give all latent channels mean 0 and the same spread, and set the scaling factor.

    StableDiffusionPipeline has one factor for all channels and no offset, so the rest goes into the weights of the 1x1
    convolutions around the latents.
    """
    mean, _ = encode(vae, images)
    offset, spread = mean.mean((0, 2, 3)).to(vae.device), mean.std((0, 2, 3)).to(vae.device)
    common = spread.log().mean().exp()
    factor = common / spread
    after, before = vae.post_quant_conv, vae.quant_conv
    after.bias += after.weight[:, :, 0, 0] @ offset
    after.weight /= factor[None, :, None, None]
    # quant_conv returns the four means, then the four log variances.
    before.weight[:4] *= factor[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - offset) * factor
    before.bias[4:] += 2 * factor.log()
    vae.register_to_config(scaling_factor=round(1 / common.item(), 5))


def scaled_posterior(vae, images):
    """Return mean and standard deviation of the latents at the U-Net's scale, concatenated to (n, 8, h, w)."""
    mean, logvar = encode(vae, images)
    return vae.config.scaling_factor * torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30, 20))], dim=1)


def train_unet(unet, text_encoder, posteriors, input_ids, empty_ids, steps):
    """Train U-Net and text encoder to predict noise, as SD v1.5 was, and return their moving averages."""
    noise_scheduler = PNDMScheduler.from_pretrained(BASE / "scheduler")

    def compute_loss(step):
        (posterior,) = random.choices(posteriors, weights=(0.85, 0.15))  # of whole and half-size images
        chosen = torch.randint(len(posterior), (32,))
        mean, std = posterior[chosen].to(unet.device).float().chunk(2, dim=1)
        latents = mean + std * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=unet.device)
        # One caption in ten is dropped, for classifier-free guidance.
        ids = torch.where(torch.rand(len(latents), 1) < 0.1, empty_ids, input_ids[chosen]).to(unet.device)
        encoder_hidden_states = text_encoder(ids).last_hidden_state
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        return F.mse_loss(unet(noisy_latents, timesteps, encoder_hidden_states).sample, noise)

    pair = torch.nn.ModuleList([text_encoder, unet])
    text_encoder, unet = train(pair, compute_loss, steps, lr=1e-3, warmup=200, weight_decay=1e-3, ema_decay=0.999)
    return unet, text_encoder


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
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


def main(args):
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, captions = make_images(args.num_images, args.truth, args.seed)
    # Random weights, in SD v1.5's layout at about 1/400 of its size.
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(BASE / "vae"))
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(BASE / "unet"))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(BASE / "text_encoder"))
    if args.start:
        unet = UNet2DConditionModel.from_pretrained(args.start / "unet")
        text_encoder = CLIPTextModel.from_pretrained(args.start / "text_encoder")
    unet, text_encoder = unet.to(device), text_encoder.to(device)

    if args.skip_vae:
        vae = AutoencoderKL.from_pretrained(args.skip_vae).to(device).eval()
    else:
        vae = train_vae(vae.to(device), images, args.steps_vae)
        normalize_latents(vae, images[::4])
        # If the rest is interrupted, continue with --skip_vae <output_dir>/vae.
        save_pipeline(args.output_dir, vae=vae, unet=unet, text_encoder=text_encoder)

    captioned, captions = images[: args.num_images], captions[: args.num_images]
    small = F.interpolate(captioned.float(), scale_factor=0.5, mode="area").round().byte()
    posteriors = [scaled_posterior(vae, size) for size in (captioned, small)]
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    tokenize = functools.partial(tokenizer, padding="max_length", truncation=True, return_tensors="pt")
    input_ids, empty_ids = tokenize(captions).input_ids, tokenize([""]).input_ids
    unet, text_encoder = train_unet(unet, text_encoder, posteriors, input_ids, empty_ids, args.steps_unet)
    save_pipeline(args.output_dir, vae=vae, unet=unet, text_encoder=text_encoder)
    print(args.output_dir)


if __name__ == "__main__":
    main(parse_args())
