"""What a step costs: this project's training and sampling beside plain loops, on Stable Diffusion v1.5 at full size.

    python launch/benchmark.py                                                      # the eleven rows and sampling
    python launch/benchmark.py --device cpu --resolution 256 --steps 3 --methods lora unet sample
    python launch/benchmark.py --device cpu --methods lora --repeats 3 --steps 3
    python launch/benchmark.py --device cpu --base launch/demo/base --resolution 64 --batch_size 4 --steps 200 --repeats 3 --methods lora unet --start
    python launch/benchmark.py --methods lora --growth                  # with resolution, batch, processes and rows of the table

The weights are random and the images noise, so nothing is downloaded. Each measurement runs in a process of its own: the plain
loop encodes every image and caption at every step, runs eagerly and reads the loss at every step; the other is the real script.
Writes benchmark.json, benchmark.md and benchmark.png to --output_dir.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

# torch and what builds on it are imported where a measurement runs: a process inherits the peak memory of its parent.

# ----------------------------------------------------------------------------------------------------------------------
# Constants
# ----------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent
# The rows of Table 1: script, and what it is called with. Where the VAE trains, both loops have the paper's loss.
METHODS = {
    "unet": ("train_full", ["--train_unet"]),
    "text_encoder": ("train_full", ["--train_text_encoder"]),
    "vae": ("train_full", ["--train_vae", "--vae_loss", "joint"]),
    "unet_text_encoder": ("train_full", ["--train_unet", "--train_text_encoder"]),
    "unet_vae": ("train_full", ["--train_unet", "--train_vae", "--vae_loss", "joint"]),
    "vae_text_encoder": ("train_full", ["--train_vae", "--train_text_encoder", "--vae_loss", "joint"]),
    "unet_vae_text_encoder": ("train_full", ["--train_unet", "--train_vae", "--train_text_encoder", "--vae_loss", "joint"]),
    "lora": ("train_peft", ["--method", "lora"]),
    "dora": ("train_peft", ["--method", "dora"]),
    "bitfit": ("train_peft", ["--method", "bitfit"]),
    "difffit": ("train_peft", ["--method", "difffit"]),
}
GROWTH = {"resolutions": [256, 512, 768], "batch_sizes": [1, 2, 4], "processes": [1, 2], "rows": [1_000, 10_000, 100_000]}
PARTS = ["data", "VAE", "text encoder", "U-Net forward", "backward", "optimizer", "rest"]
COLOURS = ["#8c8c8c", "#c44e52", "#dd8452", "#4c72b0", "#55a868", "#8172b3", "#d0d0d0"]
# Stable Diffusion v1.5: 859,520,964, 123,060,480 and 83,653,863 parameters.
UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
TEXT_ENCODER = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip
SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
FINDINGS = ["Edema", "Cardiomegaly", "Pneumothorax", "No Finding"]


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


# fmt: off
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what is measured")
    group.add_argument("--methods", nargs="+", choices=[*METHODS, "sample"], default=[*METHODS, "sample"], metavar="METHOD", help=f"any of {', '.join(METHODS)}, sample (default: all)")
    group.add_argument("--base", type=Path, help="pipeline folder (default: Stable Diffusion v1.5 at full size with random weights, made in --output_dir)")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto is a GPU where there is one")
    group.add_argument("--resolution", type=positive_int, default=512, help="side of the images in pixels")
    group.add_argument("--batch_size", type=positive_int, help="images per step, and per call of the plain sampling loop (default: 8 on a GPU, 1 on a CPU)")
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="of both loops (default: bf16 on a GPU, no on a CPU)")
    group.add_argument("--compile", action="store_true", help="pass --compile to the project's scripts")
    group.add_argument("--num_inference_steps", type=positive_int, help="denoising steps of a sampled image (default: 50 on a GPU, 2 on a CPU)")
    group.add_argument("--start", action="store_true", help="also the time from accelerate launch to the first step, beside that of importing the libraries")
    group = parser.add_argument_group("how cost grows, by the first of --methods that trains")
    group.add_argument("--growth", action="store_true", help="all four below, with the values that stand there as examples where none are given")
    group.add_argument("--resolutions", nargs="+", type=positive_int, default=[], help=f"sides of the images, such as {' '.join(map(str, GROWTH['resolutions']))}")
    group.add_argument("--batch_sizes", nargs="+", type=positive_int, default=[], help=f"images per step, such as {' '.join(map(str, GROWTH['batch_sizes']))}")
    group.add_argument("--processes", nargs="+", type=positive_int, default=[], help=f"numbers of processes, such as {' '.join(map(str, GROWTH['processes']))}")
    group.add_argument("--rows", nargs="+", type=positive_int, default=[], help=f"rows of the table, such as {' '.join(map(str, GROWTH['rows']))}, on the demo's tiny base at 64x64")
    group = parser.add_argument_group("how it is measured")
    group.add_argument("--steps", type=positive_int, help="steps measured (default: 30 on a GPU, 3 on a CPU)")
    group.add_argument("--warmup_steps", type=positive_int, help="steps before them (default: 10 on a GPU, 1 on a CPU)")
    group.add_argument("--repeats", type=positive_int, default=1, help="times that everything is measured, plain and project in turn; medians are reported")
    group.add_argument("--output_dir", type=Path, default=Path("benchmark"), help="folder of the results, the made base and the latent cache")
    group.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.base and not (args.base / "model_index.json").is_file():
        parser.error(f"--base {args.base}: no pipeline there (no model_index.json)")
    if args.growth:
        for name, values in GROWTH.items():
            setattr(args, name, getattr(args, name) or values)
    return args
# fmt: on


# ----------------------------------------------------------------------------------------------------------------------
# What is measured on
# ----------------------------------------------------------------------------------------------------------------------


def make_base(folder: Path) -> None:
    """Stable Diffusion v1.5's architecture with random weights, and a tokenizer of single letters that yields 77 ids."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=77)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE), text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)), tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET), scheduler=PNDMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part)
    part.rename(folder)


def make_images(folder: Path, rows: int, size: tuple[int, int] = (390, 320)) -> Path:
    """An image table of noise in the size of CheXpert-small; beyond 500 rows files stand under several names."""
    import numpy as np
    from PIL import Image

    csv = folder / f"images-{rows}-{size[0]}.csv"
    if csv.is_file():
        return csv
    images = folder / csv.stem
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    lines = ["Path,Frontal/Lateral,patient_id," + ",".join(FINDINGS)]
    for i in range(rows):
        path = images / f"{i:06d}.jpg"
        if i < 500:
            noise = np.random.default_rng(i).integers(0, 256, (size[1] // 8, size[0] // 8), np.uint8)
            Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            os.link(images / f"{i % 500:06d}.jpg", path)
        lines.append(f"{path.relative_to(folder)},Frontal,p{i}," + ",".join("1" if i % len(FINDINGS) == j else "0" for j in range(len(FINDINGS))))
    csv.write_text("\n".join(lines) + "\n")
    return csv


def load_script(name: str):
    """One of the project's scripts as a module, from its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------------------
# Measuring, in a process of its own
# ----------------------------------------------------------------------------------------------------------------------


class Measured(BaseException):
    """Ends a script once its last measured step is over."""


class Clock:
    """Times the parts of the steps after a warm-up: on a GPU by events on its own timeline, so that nothing waits.

    `seconds` is the wall clock over all measured steps; what the parts leave of it is the rest of the loop. `cpu_seconds` is what
    this process computed meanwhile, which other programs on the machine hardly change.
    """

    def __init__(self, device: str, warmup_steps: int, steps: int):
        self.cuda, self.warmup_steps, self.steps = device == "cuda", warmup_steps, steps
        self.count, self.spans, self.began, self.cpu_began, self.seconds, self.cpu_seconds, self.first = 0, [], 0.0, 0.0, 0.0, 0.0, None

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, part: str, function, host: bool = False):
        """A function whose every call is added to a part; with `host`, by the host's clock."""

        def wrapped(*args, **kwargs):
            now = time.perf_counter if host else self.now
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append((part, start, now()))

        return wrapped

    def patch(self, owner, name: str, part: str) -> None:
        setattr(owner, name, self.timed(part, getattr(owner, name)))

    def wall(self) -> float:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self) -> None:
        """Called after each step; Measured after the last."""
        self.count += 1
        self.first = self.first or time.time()
        if self.count == self.warmup_steps:
            self.began, self.cpu_began = self.wall(), time.process_time()
            self.spans.clear()
        elif self.count == self.warmup_steps + self.steps:
            self.seconds, self.cpu_seconds = self.wall() - self.began, time.process_time() - self.cpu_began
            raise Measured

    def parts(self) -> dict[str, float]:
        """Seconds per step of each part."""
        found = Counter()
        for part, start, end in self.spans:
            found[part] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        # The loss is one call; what is not the VAE and the text encoder in it is the U-Net.
        if "loss" in found:
            found["U-Net forward"] += found.pop("loss") - found["VAE"] - found["text encoder"]
        found["rest"] = self.seconds - sum(found.values())
        return {part: found[part] / self.steps for part in PARTS}


def peak_bytes(device: str) -> int:
    """Peak bytes: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def time_project(job: dict) -> Clock:
    """The real training script with its real loop, its parts timed from outside."""
    script = load_script(job["script"])
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    clock = Clock(job["device"], job["warmup_steps"], job["steps"])
    iterate = torch.utils.data.DataLoader.__iter__

    def timed_batches(loader):
        batches = iterate(loader)
        return iter(clock.timed("data", lambda: next(batches, None), host=True), None)

    torch.utils.data.DataLoader.__iter__ = timed_batches
    for owner, name, part in (
        (script.AutoencoderKL, "encode", "VAE"), (script.AutoencoderKL, "decode", "VAE"), (script.CLIPTextModel, "forward", "text encoder"),
        (Accelerator, "backward", "backward"), (Accelerator, "clip_grad_norm_", "optimizer"), (AcceleratedOptimizer, "step", "optimizer"),
        (AcceleratedOptimizer, "zero_grad", "optimizer"),
    ):  # fmt: skip
        clock.patch(owner, name, part)
    for loss in {script.DiffusionLoss, getattr(script, "JointLoss", script.DiffusionLoss)}:
        clock.patch(loss, "forward", "loss")
    original = script.tqdm

    def watched(*args, **kwargs):
        bar = original(*args, **kwargs)
        if kwargs.get("desc") == "training":
            update = bar.update
            bar.update = lambda: (update(), clock.step())
        return bar

    script.tqdm = watched
    with contextlib.suppress(Measured):
        script.main(script.parse_args(job["argv"]))
    return clock


def plain_data(table, tokenizer, resolution: int):
    """A data set as examples have it: each image decoded and each caption tokenised whenever it is drawn."""
    import numpy as np
    import torch
    from PIL import Image

    class Plain(torch.utils.data.Dataset):
        def __len__(self):
            return len(table)

        def __getitem__(self, i):
            image = Image.open(table["image"][i]).convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)
            ids = tokenizer(table["prompt"][i], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids[0]
            return {"pixel_values": pixels, "input_ids": ids}

    return Plain()


def plain_loss(pipeline, noise_scheduler, batch: dict, train_vae: bool, dtype):
    """Noise prediction on freshly encoded latents and captions, with the reconstruction error where the VAE trains."""
    import torch
    import torch.nn.functional as F

    pixels = batch["pixel_values"] if train_vae else batch["pixel_values"].to(dtype)
    raw = pipeline.vae.encode(pixels).latent_dist.sample()
    latents = raw * pipeline.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    encoder_hidden_states = pipeline.text_encoder(batch["input_ids"])[0]
    model_pred = pipeline.unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, encoder_hidden_states).sample
    loss = F.mse_loss(model_pred.float(), noise.float())
    return loss + F.mse_loss(pipeline.vae.decode(raw).sample.float(), batch["pixel_values"]) if train_vae else loss


def time_plain(job: dict) -> Clock:
    """The loop of the usual example script: everything encoded at every step, eager, and the loss read at every step."""
    script = load_script(job["script"])
    import torch
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from tqdm.auto import tqdm

    args = script.parse_args(job["argv"])
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=job["device"] == "cpu")
    pipeline = script.load_base_pipeline(args)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(args.mixed_precision, torch.float32)
    if job["script"] == "train_full":
        script.select_components(args, pipeline)
    else:
        script.apply_method(pipeline.unet, args.method, args.rank, args.lora_alpha)
    trained = [name for name in ("unet", "text_encoder", "vae") if getattr(args, f"train_{name}", name == "unet")]
    for name in ("unet", "text_encoder", "vae"):
        component = getattr(pipeline, name)
        if name not in trained:
            component.requires_grad_(False).to(dtype)
        component.to(accelerator.device)
    parameters = [p for name in trained for p in getattr(pipeline, name).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=1e-2)
    data = plain_data(script.load_training_data(args).train, pipeline.tokenizer, args.resolution)
    loader = torch.utils.data.DataLoader(data, shuffle=True, batch_size=args.train_batch_size)
    lr_scheduler = get_scheduler("constant", optimizer)
    models = [accelerator.prepare(getattr(pipeline, name)) for name in trained]
    for name, model in zip(trained, models):
        setattr(pipeline, name, model)
    optimizer, loader, lr_scheduler = accelerator.prepare(optimizer, loader, lr_scheduler)
    noise_scheduler = script.DDPMScheduler.from_config(pipeline.scheduler.config)

    clock = Clock(job["device"], job["warmup_steps"], job["steps"])
    for owner, name, part in (
        (pipeline.vae, "encode", "VAE"), (pipeline.vae, "decode", "VAE"), (pipeline.text_encoder, "forward", "text encoder"),
        (accelerator, "backward", "backward"), (accelerator, "clip_grad_norm_", "optimizer"), (optimizer, "step", "optimizer"),
        (optimizer, "zero_grad", "optimizer"),
    ):  # fmt: skip
        clock.patch(owner, name, part)
    compute_loss = clock.timed("loss", plain_loss)
    progress = tqdm(total=job["warmup_steps"] + job["steps"], desc="training", unit="step")
    with contextlib.suppress(Measured), progress:
        batches = iter(())
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            clock.spans.append(("data", began, time.perf_counter()))
            with accelerator.accumulate(*models):
                with accelerator.autocast():
                    loss = compute_loss(pipeline, noise_scheduler, batch, "vae" in trained, dtype)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            progress.set_postfix(loss=accelerator.gather(loss.detach().repeat(args.train_batch_size)).mean().item())
            progress.update()
            clock.step()
    return clock


def time_sampling(job: dict) -> Clock:
    """Two rounds of all images, of which the second counts: the real script, or the pipeline called batch by batch."""
    import torch

    script = load_script("sample")
    args = script.parse_args(job["argv"])
    clock = Clock(job["device"], 1, 1)
    if job["variant"] == "project":
        original, embed = script.sample, clock.timed("text encoder", script.embed_prompts)
        # The size of a batch is found in the first round only.
        find, sizes = script.find_batch_size, []
        script.find_batch_size = lambda *inputs: sizes[0] if sizes else sizes.append(find(*inputs)) or sizes[0]
        for name, part in (("denoise", "U-Net forward"), ("decode", "VAE")):
            clock.patch(script, name, part)

        def rounds(args, pipeline, embeddings, todo, *rest):
            for half in (todo.iloc[::2], todo.iloc[1::2]):
                original(args, pipeline, embed(pipeline, list(embeddings)), half, *rest)
                clock.step()

        script.sample = rounds
        with contextlib.suppress(Measured):
            script.main(args)
        return clock
    pipeline = script.load_model(args.model, None, {})
    script.set_up_pipeline(args, pipeline, torch.device(job["device"]))
    # A pipeline as it is loaded.
    for component in (pipeline.unet, pipeline.vae):
        component.to(memory_format=torch.contiguous_format)
    for owner, name, part in ((pipeline, "encode_prompt", "text encoder"), (pipeline.unet, "forward", "U-Net forward"), (pipeline.vae, "decode", "VAE")):
        clock.patch(owner, name, part)
    rows = script.plan_samples(args, script.PROMPT_TEMPLATE)
    with contextlib.suppress(Measured):
        for half in (rows.iloc[::2], rows.iloc[1::2]):
            for start in range(0, len(half), job["batch_size"]):
                batch = half.iloc[start : start + job["batch_size"]]
                images = pipeline(
                    list(batch["prompt"]), height=args.resolution, width=args.resolution,
                    num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
                ).images  # fmt: skip
                for image, name in zip(images, batch["file_name"]):
                    path = Path(args.output_dir) / "plain" / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
            clock.step()
    return clock


def count_sampling_flops(job: dict) -> float:
    """Operations of one sampled image on the meta device: the U-Net twice at every timestep, for the guidance, and the VAE's decoder."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    script = load_script("sample")
    args = script.parse_args(job["argv"])
    pipeline = script.load_model(args.model, None, {}).to("meta")
    side = args.resolution // pipeline.vae_scale_factor
    latents = torch.empty(2, 4, side, side, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as unet:
        pipeline.unet(latents, torch.tensor(0, device="meta"), torch.empty(2, 77, pipeline.unet.config.cross_attention_dim, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as vae:
        pipeline.vae.decode(latents[:1])
    # PNDM has one more than there are steps.
    pipeline.scheduler.set_timesteps(args.num_inference_steps)
    return len(pipeline.scheduler.timesteps) * unet.get_total_flops() + vae.get_total_flops()


def count_training_flops(job: dict) -> float:
    """Operations of one image's step on the meta device: forward and backward of what the project's loop runs, by the real loss.

    What is cached is not in it, so it is what training cannot do without, for both loops the same.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    script = load_script(job["script"])
    args = script.parse_args(job["argv"])
    pipeline = script.load_base_pipeline(args)
    for component in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        component.to("meta")
    trains = {name: getattr(args, f"train_{name}", False) for name in ("text_encoder", "vae")}
    if job["script"] == "train_full":
        script.select_components(args, pipeline)
    stream = SimpleNamespace(moments=None if trains["vae"] else (), text_embeddings=None if trains["text_encoder"] else ())
    side = args.resolution // pipeline.vae_scale_factor
    batch = {name: torch.empty(1, 4, side, side, device="meta") for name in ("noise", "latent_noise")}
    batch["timesteps"] = torch.zeros(1, dtype=torch.long, device="meta")
    if trains["text_encoder"]:
        batch["input_ids"] = torch.zeros(1, 77, dtype=torch.long, device="meta")
    else:
        batch["encoder_hidden_states"] = torch.empty(1, 77, pipeline.unet.config.cross_attention_dim, device="meta")
    if trains["vae"]:
        batch["pixel_values"] = torch.empty(1, 3, args.resolution, args.resolution, device="meta")
    else:
        batch["moments"] = torch.empty(1, 8, side, side, device="meta")
    with torch.device("meta"):
        model = script.build_loss(args, pipeline, stream, "no")
    with FlopCounterMode(display=False) as counter:
        model(batch)["loss"].mean().backward()
    return counter.get_total_flops()


def describe_machine(job: dict) -> dict:
    """The device, and its best rate of a product of two square matrices in the type that the loops compute in."""
    import torch

    device = job["device"] if job["device"] != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return {"error": "--device cuda: no GPU is found; pass --device cpu"}
    precision = job["mixed_precision"] or ("bf16" if device == "cuda" else "no")
    torch.set_float32_matmul_precision("high")
    side, best = 8192 if device == "cuda" else 2048, 0.0
    one = torch.randn(side, side, device=device, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32))
    clock = Clock(device, 1, 1)
    for _ in range(10):
        start = clock.wall()
        for _ in range(10 if device == "cuda" else 1):
            one @ one
        best = max(best, (10 if device == "cuda" else 1) * 2 * side**3 / (clock.wall() - start))
    return {
        "device": device, "mixed_precision": precision, "matmul_flops": best, "threads": torch.get_num_threads(),
        "processes": torch.cuda.device_count() if device == "cuda" else os.cpu_count(),
        "name": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
    }  # fmt: skip


def processor_name() -> str:
    """What /proc says of the processor, where there is such a file."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def run_job(path: Path) -> None:
    """Does what a file describes, in this process, and writes the outcome beside it."""
    job = json.loads(path.read_text())
    began = time.time()
    outcome = {}
    if job["kind"] == "base":
        make_base(Path(job["folder"]))
    elif job["kind"] == "machine":
        outcome = describe_machine(job)
    elif job["kind"] == "images":
        outcome = {"csv": str(make_images(Path(job["folder"]), job["rows"], tuple(job["size"])))}
    elif job["kind"] == "flops":
        outcome = {"flops": count_sampling_flops(job) if job["script"] == "sample" else count_training_flops(job)}
    else:
        import torch

        measure = time_sampling if job["kind"] == "sample" else time_project if job["variant"] == "project" else time_plain
        try:
            clock = measure(job)
            images = job["images"] if job["kind"] == "sample" else job["batch_size"] * int(os.environ.get("WORLD_SIZE", 1))
            step = clock.seconds / clock.steps
            outcome = {
                "seconds_per_step": step, "images_per_second": images / step, "parts": clock.parts(), "images_per_step": images,
                "cpu_seconds_per_step": clock.cpu_seconds / clock.steps,
                "peak_bytes": peak_bytes(job["device"]), "seconds_to_first_step": clock.first - job.get("launched", began),
            }  # fmt: skip
        except torch.OutOfMemoryError:
            outcome = {"note": "out of memory"}
    if os.environ.get("RANK", "0") == "0":
        part = path.with_suffix(".part")
        part.write_text(json.dumps(outcome))
        os.replace(part, path.with_suffix(".out"))


# ----------------------------------------------------------------------------------------------------------------------
# Planning and starting the measurements
# ----------------------------------------------------------------------------------------------------------------------


class Bench:
    """Starts measurements one after the other, each in a process of its own."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder, self.count = args, args.output_dir.resolve(), 0
        (self.folder / "jobs").mkdir(parents=True, exist_ok=True)
        self.machine = self.start({"kind": "machine", "device": args.device, "mixed_precision": args.mixed_precision})
        if "error" in self.machine:
            fail(self.machine["error"])
        cuda = self.machine["device"] == "cuda"
        self.batch_size = args.batch_size or (8 if cuda else 1)
        self.steps, self.warmup_steps = args.steps or (30 if cuda else 3), args.warmup_steps or (10 if cuda else 1)
        self.num_inference_steps = args.num_inference_steps or (50 if cuda else 2)
        self.base = (args.base or self.folder / "base").resolve()
        if not self.base.is_dir():
            print("making Stable Diffusion v1.5 with random weights ...", flush=True)
            self.start({"kind": "base", "folder": str(self.base)})

    def start(self, job: dict, processes: int = 1) -> dict:
        """The outcome of a job; exit status 2 with the job's own last words where it fails."""
        self.count += 1
        path = self.folder / "jobs" / f"{self.count:03d}.json"
        path.with_suffix(".out").unlink(missing_ok=True)
        command = [sys.executable]
        if processes > 1 or job.get("launcher"):
            command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", "1", "--num_processes", str(processes)]
            command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *(["--multi_gpu"] if processes > 1 else [])]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if job.get("device") == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
            if processes > 1:
                environment |= {"OMP_NUM_THREADS": str(max(1, self.machine["threads"] // processes))}
        path.write_text(json.dumps(job | {"launched": time.time()}))
        with path.with_suffix(".log").open("w") as log:
            done = subprocess.run([*command, __file__, "--job", str(path)], check=False, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if done.returncode or not path.with_suffix(".out").is_file():
            said = [line for line in path.with_suffix(".log").read_text(errors="replace").splitlines() if line.strip()]
            if done.returncode == -9 or "CUDA out of memory" in "".join(said[-5:]):
                return {"note": "out of memory"}
            fail(f"a measurement ended with status {done.returncode}: {said[-1].strip() if said else 'nothing was said'} (all of it in {path.with_suffix('.log')})")
        return json.loads(path.with_suffix(".out").read_text())

    def images(self, rows: int, size: tuple[int, int] = (390, 320)) -> str:
        return self.start({"kind": "images", "folder": str(self.folder / "images"), "rows": rows, "size": size})["csv"]

    def training(self, method: str, variant: str = "project", processes: int = 1, **changes) -> dict:
        """Times one training; `changes` replace resolution, batch_size, base, csv or cache."""
        settings = {
            "resolution": self.args.resolution, "batch_size": self.batch_size, "base": self.base, "cache": self.folder / "latent_cache",
        } | changes  # fmt: skip
        script, flags = METHODS[method]
        steps, output_dir = self.warmup_steps + self.steps, self.folder / "runs" / method
        shutil.rmtree(output_dir, ignore_errors=True)
        argv = [
            *flags, "--data_csv", settings.get("csv") or self.images(settings["batch_size"] * processes * steps), "--split", "all",
            "--pretrained_model_name_or_path", settings["base"], "--resolution", settings["resolution"], "--train_batch_size", settings["batch_size"],
            "--gradient_accumulation_steps", 1, "--max_train_steps", steps, "--num_validation_images", 0, "--validation_steps", 0,
            "--checkpointing_steps", 0, "--mixed_precision", self.machine["mixed_precision"], "--output_dir", output_dir,
            "--latent_cache_dir", settings["cache"], *(["--compile"] if self.args.compile and variant == "project" else []),
        ]  # fmt: skip
        job = {
            "kind": "flops" if variant == "flops" else "train", "script": script, "variant": variant, "device": self.machine["device"],
            "warmup_steps": self.warmup_steps, "steps": self.steps, "batch_size": settings["batch_size"], "argv": [str(word) for word in argv],
            "launcher": settings.get("launcher", False),
        }  # fmt: skip
        outcome = self.start(job, processes)
        shutil.rmtree(output_dir, ignore_errors=True)
        return outcome

    def sampling(self, variant: str) -> dict:
        """Times some batches of the plain loop, or as many images in the batches that sample.py finds."""
        images = max(2 * self.batch_size, 256 if self.machine["device"] == "cuda" else 1)
        output_dir = self.folder / "samples"
        shutil.rmtree(output_dir, ignore_errors=True)
        argv = [
            "--model", self.base, "--labels", "Edema", "--images_per_label", 2 * images, "--resolution", self.args.resolution,
            "--num_inference_steps", self.num_inference_steps, "--output_dir", output_dir,
            *(["--compile"] if self.args.compile and variant == "project" else []),
            "--mixed_precision", self.machine["mixed_precision"],
        ]  # fmt: skip
        job = {
            "kind": "flops" if variant == "flops" else "sample", "script": "sample", "variant": variant, "device": self.machine["device"],
            "images": images, "batch_size": self.batch_size, "argv": [str(word) for word in argv],
        }  # fmt: skip
        outcome = self.start(job)
        shutil.rmtree(output_dir, ignore_errors=True)
        return outcome


def middle(outcomes: list[dict]) -> dict:
    """The outcome with the median rate, with the rates of all; one that did not fit stands for itself."""
    whole = sorted((o for o in outcomes if "note" not in o), key=lambda o: o["images_per_second"])
    if len(whole) < len(outcomes):
        return {"note": "out of memory"}
    return whole[(len(whole) - 1) // 2] | {
        "images_per_second_of_each": [o["images_per_second"] for o in outcomes], "peak_bytes": max(o["peak_bytes"] for o in outcomes),
    }  # fmt: skip


def compare_loops(bench: Bench, method: str) -> dict:
    """Plain and project in turn, `--repeats` times; the ratio is the median of those of neighbours in time."""
    found = {"plain": [], "project": []}
    for _ in range(bench.args.repeats):
        for variant, outcomes in found.items():
            print(f"{method}, {variant} ...", flush=True)
            outcomes.append(bench.sampling(variant) if method == "sample" else bench.training(method, variant))
    both = {variant: middle(outcomes) for variant, outcomes in found.items()}
    if not any("note" in outcome for outcome in both.values()):
        rates = [[outcome["images_per_second"] for outcome in found[variant]] for variant in ("plain", "project")]
        both["ratio"] = statistics.median(project / plain for plain, project in zip(*rates))
        both["cpu_ratio"] = statistics.median(o["cpu_seconds_per_step"] for o in found["plain"]) / statistics.median(o["cpu_seconds_per_step"] for o in found["project"])
    both["flops_per_image"] = (bench.sampling("flops") if method == "sample" else bench.training(method, "flops"))["flops"]
    for outcome in (both["plain"], both["project"]):
        if "note" not in outcome:
            outcome["matmul_share"] = both["flops_per_image"] * outcome["images_per_second"] / bench.machine["matmul_flops"]
    return both


def measure_growth(bench: Bench, growth: dict[str, list[dict]], save) -> None:
    """How the project's cost grows with one setting, the others as they are; `save` is called after each measurement."""
    args = bench.args
    method = next((name for name in args.methods if name != "sample"), "lora")
    for name, setting, values in (("resolution", "resolution", args.resolutions), ("batch size", "batch_size", args.batch_sizes), ("processes", "processes", args.processes)):
        for value in values:
            print(f"{method}, {name} {value} ...", flush=True)
            fits = setting != "processes" or value <= bench.machine["processes"]
            outcome = bench.training(method, **{setting: value}) if fits else {"note": "more than this machine has"}
            growth.setdefault(name, []).append({"value": value, "method": method, **outcome})
            save()
    for rows in args.rows:
        print(f"{method}, {rows:,} rows ...", flush=True)
        cache = bench.folder / "rows_cache"
        shutil.rmtree(cache, ignore_errors=True)
        changes = {"csv": bench.images(rows, (64, 64)), "cache": cache, "base": ROOT / "launch/demo/base", "resolution": 64}
        first, second = (bench.training(method, **changes) for _ in range(2))
        found = {"value": rows, "method": method, **second, "seconds_to_first_step_uncached": first["seconds_to_first_step"]}
        growth.setdefault("rows", []).append(found | {"cache_bytes": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())})
        shutil.rmtree(cache)
        save()


def measure_start(bench: Bench) -> dict:
    """Seconds from accelerate launch to the end of the first step, and of importing the libraries alone, on the demo's base."""
    importing = "import torch, diffusers, transformers, peft, accelerate; from diffusers import StableDiffusionPipeline; from transformers import CLIPTextModel"
    method, imports, steps = next((name for name in bench.args.methods if name != "sample"), "lora"), [], []
    for _ in range(bench.args.repeats):
        print(f"{method}, start ...", flush=True)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", importing], check=True, capture_output=True)
        imports.append(time.perf_counter() - began)
        outcome = bench.training(method, base=ROOT / "launch/demo/base", resolution=64, launcher=True)
        steps.append(outcome["seconds_to_first_step"])
    return {"method": method, "import_seconds": imports, "first_step_seconds": steps, "ratio": statistics.median(steps) / statistics.median(imports)}


# ----------------------------------------------------------------------------------------------------------------------
# Results
# ----------------------------------------------------------------------------------------------------------------------


def comparison_rows(methods: dict[str, dict]) -> list[dict]:
    """The comparison in the form of all results; the floor of a figure is the plain loop's."""
    rows = []
    for method, both in methods.items():
        plain, project = both["plain"], both["project"]
        for metric in ("images_per_second", "seconds_per_step", "peak_bytes", "matmul_share"):
            each = project.get("images_per_second_of_each", []) if metric == "images_per_second" else []
            rows.append({
                "metric": metric, "label": method, "value": project.get(metric), "low": min(each, default=None), "high": max(each, default=None),
                "n": len(each) or None, "floor": plain.get(metric), "note": project.get("note") or plain.get("note"),
            })  # fmt: skip
        for metric, note in (("ratio", "of images per second"), ("cpu_ratio", "of processor seconds, which other programs hardly change")):
            rows.append({"metric": metric, "label": method, "value": both.get(metric), "low": None, "high": None, "n": None, "floor": 1.0, "note": note})
    return rows


def format_tables(summary: dict) -> str:
    """Plain and project below each other, and how cost grows."""
    machine = summary["machine"]
    settings = f"{machine['name']}, {machine['threads']} threads; {summary['resolution']}x{summary['resolution']}, batch {summary['batch_size']}, mixed precision {machine['mixed_precision']}"
    lines = [
        f"{settings}, compile {'on' if summary['compile'] else 'off'}, {summary['steps']} steps x {summary['repeats']}; matrix product {machine['matmul_flops'] / 1e12:.3g} TFLOP/s", "",
        f"| method | loop | images/s | ratio | s/step | {' | '.join(PARTS)} | CPU s | peak GiB | of matrix product |",
        f"|---|---|---:|---:|---:|{'---:|' * len(PARTS)}---:|---:|---:|",
    ]  # fmt: skip
    for method, both in summary["methods"].items():
        for variant in ("plain", "project"):
            outcome = both[variant]
            if "note" in outcome:
                lines.append(f"| {method} | {variant} | {outcome['note']} |" + " |" * (len(PARTS) + 5))
                continue
            cells = [f"{outcome['images_per_second']:.3g}", f"{both['ratio']:.2f}" if variant == "project" and "ratio" in both else "", f"{outcome['seconds_per_step']:.3g}"]
            cells += [f"{outcome['parts'][part]:.3g}" for part in PARTS]
            cells += [f"{outcome['cpu_seconds_per_step']:.3g}", f"{outcome['peak_bytes'] / 2**30:.2f}", f"{100 * outcome['matmul_share']:.0f} %"]
            lines.append(f"| {method} | {variant} | " + " | ".join(cells) + " |")
    for name, outcomes in summary["growth"].items():
        lines += ["", f"| {name} | images/s | s/step | s to the first step | of that uncached | peak GiB |", "|---:|---:|---:|---:|---:|---:|"]
        for outcome in outcomes:
            if "note" in outcome:
                lines.append(f"| {outcome['value']:,} | {outcome['note']} | | | | |")
                continue
            uncached = outcome.get("seconds_to_first_step_uncached")
            cells = [f"{outcome['value']:,}", f"{outcome['images_per_second']:.3g}", f"{outcome['seconds_per_step']:.3g}", f"{outcome['seconds_to_first_step']:.3g}"]
            lines.append(f"| {' | '.join(cells)} | {'' if uncached is None else f'{uncached:.3g}'} | {outcome['peak_bytes'] / 2**30:.2f} |")
    start = summary["start"]
    if start:
        imports, steps = statistics.median(start["import_seconds"]), statistics.median(start["first_step_seconds"])
        lines += ["", f"From accelerate launch to the end of the first step {steps:.1f} s, importing the libraries alone {imports:.1f} s: {start['ratio']:.2f} times."]
    return "\n".join(lines) + "\n"


def draw_plot(summary: dict, path: Path) -> None:
    """Seconds per image by part, plain above project, and a panel for each way in which cost grows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = {name: both for name, both in summary["methods"].items() if not any("note" in both[v] for v in ("plain", "project"))}
    panels = 1 + len(summary["growth"])
    height = max(3.2, 1.6 + 0.55 * len(methods))
    figure, axes = plt.subplots(1, panels, figsize=(7 + 3.2 * (panels - 1), height), squeeze=False, gridspec_kw={"width_ratios": [2, *[1] * (panels - 1)]}, layout="constrained")
    axis, names = axes[0][0], []
    for i, (method, both) in enumerate(methods.items()):
        for j, variant in enumerate(("plain", "project")):
            left, position = 0.0, 2.4 * i + j
            for part, colour in zip(PARTS, COLOURS):
                width = max(both[variant]["parts"][part], 0) / both[variant]["images_per_step"]
                axis.barh(position, width, left=left, color=colour, height=0.9, label=part if i == j == 0 else None)
                left += width
            axis.text(left, position, f"  {both['ratio']:.2f}x" if j else "", va="center", fontsize=9)
            names.append((position, f"{method}, {variant}"))
    axis.set_yticks([position for position, _ in names], [name for _, name in names], fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("seconds per image")
    if methods:
        axis.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False)
    for axis, (name, outcomes) in zip(axes[0][1:], summary["growth"].items()):
        whole = [outcome for outcome in outcomes if "note" not in outcome]
        what, label = ("seconds_to_first_step", "s to the first step") if name == "rows" else ("seconds_per_step", "s per step")
        axis.plot([o["value"] for o in whole], [o[what] for o in whole], "o-", color=COLOURS[3], label=f"{label}{', cached' if name == 'rows' else ''}")
        if name == "rows":
            axis.plot([o["value"] for o in whole], [o["seconds_to_first_step_uncached"] for o in whole], "o--", color=COLOURS[1], label=f"{label}, first run")
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.legend(fontsize=8, frameon=False)
        else:
            axis.set_ylim(bottom=0)
        axis.set_xlabel(name)
        axis.set_ylabel(label)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, dpi=130, format="png")
    os.replace(part, path)
    plt.close(figure)


# Copied from train_full.write_text
def write_text(path: Path, text: str) -> None:
    """Writes beside and renames into place."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_benchmark(summary: dict, folder: Path) -> None:
    """Writes what has been measured so far, so that stopping loses one measurement only."""
    summary["results"] = comparison_rows(summary["methods"])
    write_text(folder / "benchmark.json", json.dumps(summary, indent=2, default=str) + "\n")
    write_text(folder / "benchmark.md", format_tables(summary))
    draw_plot(summary, folder / "benchmark.png")


def main(args: argparse.Namespace) -> None:
    if args.job:
        run_job(args.job)
        return
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--output_dir {args.output_dir}: cannot be written ({error.strerror})")
    bench = Bench(args)
    summary = {
        "script": "benchmark.py", "arguments": vars(args), "machine": bench.machine, "resolution": args.resolution, "batch_size": bench.batch_size,
        "steps": bench.steps, "warmup_steps": bench.warmup_steps, "repeats": args.repeats, "compile": args.compile,
        "num_inference_steps": bench.num_inference_steps, "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate")},
        "methods": {}, "growth": {}, "start": None,
    }  # fmt: skip
    save = functools.partial(write_benchmark, summary, args.output_dir)
    for method in args.methods:
        summary["methods"][method] = compare_loops(bench, method)
        print(format_tables(summary).splitlines()[-1], flush=True)
        save()
    measure_growth(bench, summary["growth"], save)
    if args.start:
        summary["start"] = measure_start(bench)
    save()
    shutil.rmtree(bench.folder / "jobs")
    print(f"\n{format_tables(summary)}\n{args.output_dir / 'benchmark.json'}")


if __name__ == "__main__":
    main(parse_args())
