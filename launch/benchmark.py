# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.6", "torchvision>=0.21", "diffusers>=0.36", "transformers>=4.57.1", "peft>=0.18", "accelerate>=1.10",
#   "datasets>=4.0", "bitsandbytes>=0.48", "huggingface-hub>=0.34", "safetensors>=0.5", "numpy>=2.0", "pandas>=2.2.2",
#   "pillow>=10.3", "tqdm>=4.67", "tensorboard>=2.17.1", "matplotlib>=3.9",
# ]
# ///
"""Measure what training and sampling cost with this project's scripts and with plain loops, on Stable Diffusion v1.5.

    python launch/benchmark.py                                                # all methods and sampling; for a GPU
    python launch/benchmark.py --device cpu --methods lora --repeats 3 --steps 2
    python launch/benchmark.py --device cpu --base launch/demo/base --resolution 64 --batch_size 4 --steps 200
    python launch/benchmark.py --peer train_text_to_image_lora.py             # diffusers' example, in turn with ours
    METHODS="lora unet" python launch/benchmark.py --study                    # forecast the hours of launch/sweep.sh

The model has its true size and random weights, and the images are noise, so nothing is downloaded. The plain training
loop encodes images and captions and reads the loss at every step, without torch.compile. The plain sampling loop calls
the pipeline batch by batch. Each measurement runs in a new process, the project's in turn with the plain loop's.
Writes benchmark.json, benchmark.md and benchmark.png to --output_dir; --peer writes peer.json, --study study.json.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

# bitsandbytes, which diffusers imports, reports a missing 4-bit CPU kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the scripts are
# Script and flags of each row of the paper's Table 1 (with the paper's VAE loss), and of sampling.
METHODS = {
    "unet": ("train_full", "--train_unet"),
    "text_encoder": ("train_full", "--train_text_encoder"),
    "vae": ("train_full", "--train_vae --vae_loss=joint"),
    "unet_text_encoder": ("train_full", "--train_unet --train_text_encoder"),
    "unet_vae": ("train_full", "--train_unet --train_vae --vae_loss=joint"),
    "vae_text_encoder": ("train_full", "--train_vae --train_text_encoder --vae_loss=joint"),
    "unet_vae_text_encoder": ("train_full", "--train_unet --train_vae --train_text_encoder --vae_loss=joint"),
    "lora": ("train_peft", "--method=lora"),
    "dora": ("train_peft", "--method=dora"),
    "bitfit": ("train_peft", "--method=bitfit"),
    "difffit": ("train_peft", "--method=difffit"),
    "sample": ("sample", ""),
}
# Where Stable Diffusion v1.5 differs from the libraries' defaults.
UNET = {"sample_size": 64, "cross_attention_dim": 768}
VAE = {"sample_size": 512, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TEXT_ENCODER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"skip_prk_steps": True, "steps_offset": 1}
# Copied from sample.DTYPES
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOOPS = ("plain", "project")
# Flags that shorten each kind of step of a study, to measure it.
FEW = {
    "samples": "",
    "runs": "--max_train_samples=48 --max_validation_samples=8 --validation_steps=0",
    "downstream": "--num_train_epochs=4 --num_seeds=1 --max_test_images=48 --bootstrap_samples=20 --patience=0",
    "evaluations": "--max_per_label=16 --max_train_samples=48 --num_subsamples=2",
}
# The scripts' folders of cached images, latents and features, each study's own.
CACHES = {"runs": "latent_cache_dir", "downstream": "image_cache_dir", "evaluations": "feature_cache_dir"}
# Flags without effect on these modes.
IGNORED = {
    "study": "methods resolution batch_size mixed_precision compile num_inference_steps repeats",
    "peer": "methods compile num_inference_steps",
}
PARTS = ["data", "VAE", "text encoder", "U-Net forward", "backward", "optimizer", "rest"]  # of a step's time


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    flag = parser.add_argument_group("what to measure").add_argument
    flag("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD", help="to run (default: all)")
    flag("--peer", type=Path, help="compare with this train_text_to_image_lora.py of diffusers instead")
    flag("--study", nargs=argparse.REMAINDER, help="forecast launch/sweep.sh, with the flags after this one, instead")
    flag("--base", type=Path, help="pipeline folder (default: Stable Diffusion v1.5 with random weights)")
    flag("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU if there is one")
    flag("--resolution", type=int, default=512, help="side of the square images in pixels")
    flag("--batch_size", type=int, help="images per training step and plain sampling batch (default: GPU 8, CPU 1)")
    flag("--mixed_precision", choices=DTYPES, help="of both loops (default: bf16 on a GPU, no on a CPU)")
    flag("--compile", action="store_true", help="pass --compile to the project's scripts")
    flag("--num_inference_steps", type=int, help="denoising steps of sampling (default: 50 on a GPU, 2 on a CPU)")

    flag = parser.add_argument_group("how to measure").add_argument
    flag("--steps", type=int, help="measured training steps (default: 30 on a GPU, 3 on a CPU)")
    flag("--warmup_steps", type=int, help="training steps before them (default: 10 on a GPU, 1 on a CPU)")
    flag("--repeats", type=int, default=1, help="number of measurements, of which the median is reported")
    flag("--output_dir", type=Path, default=Path("benchmark"), help="folder of results, model, images and latents")
    args = parser.parse_args(argv)
    for name in "resolution batch_size num_inference_steps steps warmup_steps repeats".split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.peer and not os.path.isfile(args.peer):
        parser.error(f"--peer {args.peer}: no such file")
    if args.base and not (args.base / "model_index.json").is_file():
        parser.error(f"--base {args.base}: no pipeline there (no model_index.json)")
    for mode, names in IGNORED.items():
        for name in names.split() if getattr(args, mode) is not None else ():
            if getattr(args, name) != parser.get_default(name):
                hint = "; set the variables of launch/sweep.sh" if mode == "study" else ""
                parser.error(f"--{name} has no effect on --{mode}{hint}")
    if args.device == "auto":
        cpu = "ACCELERATE_USE_CPU" in os.environ or not torch.cuda.is_available()
        args.device = "cpu" if cpu else "cuda"
    gpu = {"batch_size": 8, "mixed_precision": "bf16", "num_inference_steps": 50, "steps": 30, "warmup_steps": 10}
    cpu = {"batch_size": 1, "mixed_precision": "no", "num_inference_steps": 2, "steps": 3, "warmup_steps": 1}
    for name, value in (cpu if args.device == "cpu" else gpu).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Model and data
# ---------------------------------------------------------------------------------------------------------------------


def make_base(folder):
    """Save Stable Diffusion v1.5 with random weights and a tokenizer that splits text into letters."""
    torch.manual_seed(0)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET),
        vae=AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        tokenizer=CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77),
        scheduler=PNDMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def make_images(folder, count):
    """Write the missing noise images, of CheXpert-small's size (390 x 320), and return their imagefolder's table."""
    folder /= str(count)
    folder.mkdir(parents=True, exist_ok=True)
    lines, findings = ["file_name,prompt"], ["Edema", "Cardiomegaly", "Pneumothorax", "No Finding"]
    for i in range(count):
        path = folder / f"{i:03d}.jpg"
        if not path.is_file():
            noise = np.random.default_rng(i).integers(0, 256, (40, 49), np.uint8)
            Image.fromarray(noise).resize((390, 320), Image.Resampling.BICUBIC).save(path, quality=90)
        lines.append(f"{path.name},Chest X-ray of a subject with {findings[i % 4]}")
    table = folder / "metadata.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Clock and loops
# ---------------------------------------------------------------------------------------------------------------------


class Clock:
    """Time the steps after a warm-up and the parts of a step, on a GPU by CUDA events, which do not block."""

    def __init__(self, device, warmup_steps, steps):
        self.cuda, self.warmup_steps, self.num_steps = device == "cuda", warmup_steps, steps
        self.marks = [("rest", self.now())]  # (part, start time); a part lasts until the next mark

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end):
        """Return the seconds per step between two times."""
        return (start.elapsed_time(end) / 1000 if self.cuda else end - start) / self.num_steps

    def timed(self, part, function):
        """Wrap a function to count its time as `part` rather than as the part that calls it."""

        def wrapped(*args, **kwargs):
            caller = self.marks[-1][0]
            self.marks.append((part, self.now()))
            try:
                return function(*args, **kwargs)
            finally:
                self.marks.append((caller, self.now()))

        return wrapped

    def patch(self, part, owner, *names):
        """Time some methods of an object, which may be None."""
        for name in names if owner else ():
            setattr(owner, name, self.timed(part, getattr(owner, name)))

    def patch_training(self, accelerator, optimizer, vae, text_encoder):
        self.patch("VAE", vae, "encode", "decode")
        self.patch("text encoder", text_encoder, "forward")
        self.patch("backward", accelerator, "backward")
        self.patch("optimizer", accelerator, "clip_grad_norm_")
        self.patch("optimizer", optimizer, "step", "zero_grad")

    def steps(self, batches):
        """Yield a batch per step. A step ends when the next batch is requested."""
        fetch = self.timed("data", lambda: next(batches))
        for step in range(self.warmup_steps + self.num_steps):
            if step == self.warmup_steps:
                self.marks = [("rest", self.now())]
            yield fetch()
        self.marks.append(("rest", self.now()))

    def parts(self):
        """Return the seconds per step of each part, without those of the parts that it calls."""
        parts = Counter()
        for (part, start), (_, end) in itertools.pairwise(self.marks):
            parts[part] += self.seconds(start, end)
        return parts

    def figures(self, images):
        """Return the results of a loop with this many images per step; times are in seconds per step."""
        if self.cuda:
            torch.cuda.synchronize()
        total, parts = self.seconds(self.marks[0][1], self.marks[-1][1]), self.parts()
        return {
            "images_per_second": images / total,
            "seconds_per_step": total,
            "images_per_step": images,
            "parts": {part: parts[part] for part in PARTS},
            "peak_bytes": peak_bytes(self.cuda),
        }


def peak_bytes(cuda):
    # ru_maxrss is in KiB, on macOS in bytes.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return torch.cuda.max_memory_allocated() if cuda else resident


def train_project(script, args, clock):
    """Measure a training script by wrapping its `train` and `iterate_batches`."""
    iterate_batches, train = script.iterate_batches, script.train

    def timed_train(accelerator, state, *rest):
        model = accelerator.unwrap_model(state.model)
        # Wrap the whole loss, since the U-Net's own forward may be compiled.
        clock.patch("U-Net forward", state.model, "forward")
        clock.patch_training(accelerator, state.optimizer, getattr(model, "vae", None), model.text_encoder)
        return train(accelerator, state, *rest)

    script.train = timed_train
    script.iterate_batches = lambda *inputs: clock.steps(iterate_batches(*inputs))
    with contextlib.suppress(StopIteration):  # the batches end before the last step of training
        script.main(args)
    return clock.figures(args.train_batch_size)


def plain_batch(script, pipeline, args, rows):
    """Decode the images and tokenize the captions of some rows, (image, caption)."""
    images = [script.load_image(image, args.resolution, args.resize_mode) for image, _ in rows]
    padding = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    input_ids = pipeline.tokenizer([caption for _, caption in rows], **padding).input_ids
    return {"pixel_values": torch.stack([script.to_pixel_values(image) for image in images]), "input_ids": input_ids}


def plain_loss(pipeline, noise_scheduler, batch, train_vae):
    """Encode a batch; return the noise prediction error, plus the reconstruction error if the VAE is trained."""
    raw = pipeline.vae.encode(batch["pixel_values"].to(pipeline.vae.dtype)).latent_dist.sample()
    latents = raw * pipeline.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    encoder_hidden_states = pipeline.text_encoder(batch["input_ids"])[0]
    model_pred = pipeline.unet(noisy_latents, timesteps, encoder_hidden_states).sample
    loss = F.mse_loss(model_pred.float(), noise.float())
    if train_vae:
        loss = loss + F.mse_loss(pipeline.vae.decode(raw).sample.float(), batch["pixel_values"])
    return loss


def train_plain(script, args, clock):
    """Measure a common training loop, which encodes everything and reads the loss at every step."""
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    pipeline, dtype = script.load_base_pipeline(args), DTYPES[args.mixed_precision]
    if script.__name__ == "train_peft":
        script.apply_method(pipeline.unet, args)
        script.cast_frozen(pipeline.unet, dtype)
    for name in ("unet", "text_encoder", "vae"):
        component = getattr(pipeline, name).to(accelerator.device)
        if name not in args.components:
            component.requires_grad_(False).to(dtype)
    trained = [getattr(pipeline, name) for name in args.components]
    parameters = [p for component in trained for p in component.parameters() if p.requires_grad]
    table = script.load_training_data(args).train
    rows = list(zip(table["image"], table["prompt"]))
    collate = functools.partial(plain_batch, script, pipeline, args)
    loader = torch.utils.data.DataLoader(rows, args.train_batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    *trained, optimizer, loader = accelerator.prepare(*trained, optimizer, loader)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clock.patch_training(accelerator, optimizer, pipeline.vae, pipeline.text_encoder)
    compute_loss = clock.timed("U-Net forward", plain_loss)
    bar = tqdm(total=args.max_train_steps, desc="training", unit="step")
    for batch in clock.steps(itertools.chain.from_iterable(itertools.repeat(loader))):
        with accelerator.accumulate(*trained):
            with accelerator.autocast():
                loss = compute_loss(pipeline, noise_scheduler, batch, "vae" in args.components)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=loss.item())
        bar.update()
    return clock.figures(args.train_batch_size)


def sample_project(script, args, clock):
    """Measure sample.py. Half of the images are a warm-up, which also finds the batch size."""
    sample, generate, sizes = script.sample, clock.timed("U-Net forward", script.generate), []

    def timed_generate(pipeline, embeddings, rows, *rest):
        images = generate(pipeline, embeddings, rows, *rest)
        sizes.append(len(rows))  # not of a batch that ran out of memory
        return images

    def timed_sample(args, pipeline, todo, *rest):
        clock.patch("text encoder", pipeline, "encode_prompt")
        clock.patch("VAE", pipeline.vae, "decode")
        for rows in clock.steps(iter([todo.iloc[::2], todo.iloc[1::2]])):
            gc.freeze()  # accelerate collects garbage once per call, which would count too much with few images
            sample(args, pipeline, rows, *rest)
            args.batch_size, args.compile = max(sizes), False  # the U-Net stays compiled

    script.generate, script.sample = timed_generate, timed_sample
    script.main(args)
    return clock.figures(args.images_per_label // 2)


def sample_plain(script, args, clock):
    """Measure plain calls of the pipeline, batch by batch. Half of the images are a warm-up."""
    pipeline = script.load_model(args, {})[0].to("cuda" if clock.cuda else "cpu", DTYPES[args.mixed_precision])
    clock.patch("text encoder", pipeline, "encode_prompt")
    clock.patch("VAE", pipeline.vae, "decode")
    draw, size = clock.timed("U-Net forward", pipeline), {"height": args.resolution, "width": args.resolution}
    samples = script.plan_samples(args, script.PROMPT_TEMPLATE)
    for rows in clock.steps(iter([samples.iloc[::2], samples.iloc[1::2]])):
        for start in range(0, len(rows), args.batch_size):
            batch = rows.iloc[start : start + args.batch_size]
            images = draw(list(batch["prompt"]), **size, num_inference_steps=args.num_inference_steps).images
            for image, name in zip(images, batch["file_name"]):
                script.save_image(image, args.output_dir / name)
    return clock.figures(args.images_per_label // 2)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def script_flags(method, args, csv):
    """Return the command line of a method's script, without --output_dir."""
    flags = {"resolution": args.resolution, "mixed_precision": args.mixed_precision}
    if method == "sample":
        images = max(2 * args.batch_size, 256 if args.device == "cuda" else 1)
        flags |= {"model": args.base, "labels": "Edema", "images_per_label": 2 * images}
        flags |= {"num_inference_steps": args.num_inference_steps}
    else:
        flags |= {"pretrained_model_name_or_path": args.base, "data_csv": csv, "split": "all"}
        flags |= {"train_batch_size": args.batch_size, "gradient_accumulation_steps": 1, "validation_steps": 0}
        # One step more than is measured, since the script reads the loss in the last one.
        flags |= {"max_train_steps": args.warmup_steps + args.steps + 1, "checkpointing_steps": 0}
        flags |= {"num_validation_images": 0, "latent_cache_dir": args.output_dir / "latent_cache"}
    return [*METHODS[method][1].split(), *(f"--{name}={value}" for name, value in flags.items())]


def measure(method, loop, args, csv):
    """Measure one loop in this process. Return its results, or a note if it runs out of memory."""
    script, sampling = importlib.import_module(METHODS[method][0]), method == "sample"
    clock = Clock(args.device, 1, 1) if sampling else Clock(args.device, args.warmup_steps, args.steps)
    loops = {"plain": (train_plain, sample_plain), "project": (train_project, sample_project)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = [*script_flags(method, args, csv), f"--output_dir={folder}/run"]
        argv += ["--compile"] if args.compile and loop == "project" else []
        argv += [f"--batch_size={args.batch_size}"] if sampling and loop == "plain" else []
        try:
            return loops[loop][sampling](script, script.parse_args(argv), clock)
        except torch.OutOfMemoryError:
            return {"note": "out of memory"}


def in_new_process(function, *inputs):
    """Call a function in a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *inputs).result()
        except (BrokenProcessPool, torch.OutOfMemoryError):
            return {"note": "out of memory, or killed"}


def compare_loops(method, args, csv):
    """Measure both loops in turn. Return each loop's median round, and the ratio of images per second."""
    rounds, both = {loop: [] for loop in LOOPS}, {}
    for _ in range(args.repeats):
        for loop in LOOPS:
            print(f"{method}, {loop} ...", flush=True)
            rounds[loop].append(in_new_process(measure, method, loop, args, csv))
    for loop, found in rounds.items():
        notes = [figures for figures in found if "note" in figures]
        by_rate = notes or sorted(found, key=lambda figures: figures["images_per_second"])
        median = by_rate[(len(by_rate) - 1) // 2]
        both[loop] = median | {"peak_bytes": max(figures.get("peak_bytes", 0) for figures in found)}
    if not any("note" in both[loop] for loop in LOOPS):
        pairs = zip(rounds["project"], rounds["plain"])
        both["ratios"] = [ours["images_per_second"] / plain["images_per_second"] for ours, plain in pairs]
        both["ratio"] = statistics.median(both["ratios"])
    return both


def run_training(command, folder, warmup_steps):
    """Run a training. Return its wall time and, from its TensorBoard log, the seconds per step after the warm-up."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    began, flags = time.perf_counter(), ["--report_to=tensorboard", f"--output_dir={folder}"]
    done = subprocess.run([sys.executable, *map(str, command), *flags], capture_output=True, text=True)
    whole = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    for log in map(str, Path(folder).rglob("events.out.*")):
        scalars = EventAccumulator(log).Reload()
        for tag in {"loss", "train_loss"} & {*scalars.Tags()["scalars"]}:  # ours and diffusers'
            times = [event.wall_time for event in scalars.Scalars(tag)][warmup_steps:]
            return {"command": whole, "step": (times[-1] - times[0]) / (len(times) - 1)}
    sys.exit(f"{command[0]} logged no loss to TensorBoard")


def compare_peer(args, csv):
    """Run diffusers' script and train_peft.py in turn on the same base, images and steps; return the ratios."""
    flags = {"pretrained_model_name_or_path": args.base, "resolution": args.resolution, "rank": 8, "seed": 0}
    flags |= {"train_batch_size": args.batch_size, "mixed_precision": args.mixed_precision}
    flags |= {"max_train_steps": args.warmup_steps + args.steps + 1, "learning_rate": 1e-4}
    flags |= {"gradient_accumulation_steps": 1, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    of_peer = {"train_data_dir": csv.parent, "caption_column": "prompt", "checkpointing_steps": 10**9}
    ours = {"method": "lora", "data_csv": csv, "split": "all"}
    ours |= {"logging_steps": 1, "checkpointing_steps": 0, "num_validation_images": 0}
    commands = {"peer": [args.peer, flags | of_peer], "project": [ROOT / "train_peft.py", flags | ours]}
    rounds = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, (script, options) in commands.items():
            print(f"{name} ...", flush=True)
            command = [script, *(f"--{key}={value}" for key, value in options.items())]
            with tempfile.TemporaryDirectory() as folder:
                rounds[name].append(run_training(command, f"{folder}/run", args.warmup_steps))
    result = {"rounds": rounds}
    for part in ("step", "command"):
        result[part] = statistics.median(peer[part] / project[part] for peer, project in zip(*rounds.values()))
        seconds = " and ".join(f"{statistics.median(run[part] for run in rounds[name]):.3g} s" for name in rounds)
        print(f"{part}: {result[part]:.2f} times as fast as the peer ({seconds})")
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Forecast of a study
# ---------------------------------------------------------------------------------------------------------------------


def plan_study(flags):
    """Return the steps of launch/sweep.sh as {file that marks the step as finished: (script, flags)}."""
    with tempfile.TemporaryDirectory() as empty:  # in an empty study, sweep.sh skips no step; it prints the commands
        variables = {"STUDY": empty, "LAUNCH": r"printf %s\n", "REPORT": "no"}
        command = ["bash", ROOT / "launch" / "sweep.sh", *flags]
        done = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # sweep.sh has printed the reason
        sys.exit(2)
    blocks = [block.splitlines() for block in re.split("^== ", done.stdout, flags=re.MULTILINE)[1:]]
    return {name: (script.removesuffix(".py"), argv) for name, script, *argv in blocks}


def count_real_images(script, args):
    """Return how many real images eval_downstream.py has for training, validation and testing."""
    csvs = filter(None, (args.real_csv, args.validation_csv, args.test_csv))
    tables = [script.load_image_table(csv, args.image_root, labels=script.known_labels(args.labels)) for csv in csvs]
    first, *others = (table[table["frontal"]] for table in tables)
    if others:
        return len(first), *map(len, others)
    splits = script.split_of(first, args.split_seed)
    return tuple(int((splits == name).sum()) for name in script.SPLIT_FRACTIONS)


def count_units(script, args, samples, first, processes=1):
    """Return how many steps or images each function of a script processes. `first`: its caches are empty."""
    if script.__name__ == "sample":
        return {"generate": len(script.plan_samples(args, args.prompt_template or script.PROMPT_TEMPLATE)) / processes}
    if script.__name__.startswith("train"):
        data = script.load_training_data(args)
        size = args.train_batch_size * args.gradient_accumulation_steps * processes
        steps = args.max_train_steps or math.ceil(args.num_train_epochs * len(data.train) / size)
        validations = 2 + ((steps - 1) // args.validation_steps if args.validation_steps else 0)
        uncached = "vae" in args.components and args.vae_loss == "joint"
        images = (len(data.train) + len(data.heldout)) * (first or uncached)
        counts = {"train": steps, "check_and_encode": images / processes, "draw_validation": validations}
        counts["save_checkpoint"] = math.ceil(steps / args.checkpointing_steps) if args.checkpointing_steps else 0
        return counts | {"heldout_losses": validations * len(data.heldout) / processes}
    if script.__name__ == "eval_downstream":
        real_train, real_val, real_test = count_real_images(script, args)
        test = min(real_test, args.max_test_images or real_test)
        val = round(script.SPLIT_FRACTIONS["val"] * samples)
        train, val = args.num_train_images or min(samples - val, real_train), min(val, real_val)
        epochs = args.num_seeds * args.num_train_epochs / processes  # --patience may stop earlier
        predicted = epochs * val + args.num_seeds * test / processes
        counts = {"load_images": train + val + test * first, "train_epoch": epochs * train, "predict": predicted}
        counts["scan_images"] = first * (real_train + real_val + real_test)
        return counts | {"score": args.num_seeds * (args.bootstrap_samples + 1)}
    real = script.load_split(args.real_csv, args.image_root, args.real_split, args.split_seed, args)
    rows = script.label_rows(real, args.labels, args).values()
    images = first * len(np.unique(np.concatenate([*rows])))
    through_vae = min(script.MAX_VAE_IMAGES, images)
    trained = first * (len(script.load_training_images(args)) if args.train_csv else 0)
    judged = samples + images + through_vae + trained
    # The first evaluation also scores the VAE (as much as a model) and the floors (half as much).
    counts = {"compute_features": judged / processes, "ThroughVAE.__call__": through_vae / processes}
    counts["hash_files"] = (samples + first * len(real) + trained) / processes
    return counts | {"add_set_metrics": 2.5 if first else 1}


def measure_step(name, few, planned, samples, args):
    """Run a script with the flags `few`. Return the seconds of its functions, and a forecast for the flags `planned`.

    `samples` are the numbers of samples in the short run and in the study.
    """
    script, clock, times = importlib.import_module(name), Clock(args.device, 0, 1), []
    few, planned = script.parse_args(few), script.parse_args(planned)
    if name == "eval_downstream":
        few.num_train_images = min(2 * few.train_batch_size, count_real_images(script, few)[0])
    elif name.startswith("train"):
        accumulation, iterate_batches = few.gradient_accumulation_steps, script.iterate_batches
        few.max_train_steps = max(2, math.ceil((args.warmup_steps + 3 * args.steps) / accumulation))

        def timed_batches(*inputs):
            for batch in iterate_batches(*inputs):
                times.append(clock.now())
                yield batch

        script.iterate_batches = timed_batches
    units, found = count_units(script, few, samples[0], True), {}
    for path in units:
        owner, _, function = path.rpartition(".")
        clock.patch(path, getattr(script, owner) if owner else script, function)
    script.main(few)
    if clock.cuda:
        torch.cuda.synchronize()
    ended, seconds = time.perf_counter(), {path: clock.parts()[path] for path in units}
    if times:
        # The first steps may compile; what they take beyond others counts once, among the rest.
        skipped = min(args.warmup_steps, len(times) - 2)
        batch = clock.seconds(times[skipped], times[-1]) / (len(times) - 1 - skipped)
        seconds["train"] = batch * accumulation * units["train"]
    found["seconds_per_unit"] = {path: seconds[path] / max(units[path], 1) for path in units}
    per_unit = dict(found["seconds_per_unit"])
    if name == "eval_generation":  # scores are timed at the study's size instead
        per_unit["add_set_metrics"] = seconds_of_scores(script, planned, samples[1])
    elif name == "eval_downstream":
        per_unit["score"] = seconds_of_draw(script, planned)
    for caches, first in (("empty", True), ("filled", False)):
        counts = count_units(script, planned, samples[1], first, args.processes)
        found[caches] = {path: per_unit[path] * counts[path] for path in units}
        found[f"units, caches {caches}"] = counts
    found |= {"few": seconds, "few_units": units, "peak_bytes": peak_bytes(args.device == "cuda")}
    return found | {"after": time.perf_counter() - ended}  # not part of the step


def seconds_of_scores(script, args, samples):
    """Return the seconds of all set metrics of one model, on random features."""
    real = script.load_split(args.real_csv, args.image_root, args.real_split, args.split_seed, args)
    rows = script.label_rows(real, args.labels, args).values()
    images = len(np.unique(np.concatenate([*rows])))
    computed = [path for path in script.cache_folder(args).glob("*/*/*.npy") if "appearance" not in str(path)]
    dim, seconds = np.load(computed[0]).size, [0.0, 0.0]
    # The time is linear in the number of subsamples: measure one and four of all images and of each label's.
    for size in (min(samples, images), *(min(len(own), samples * len(own) // images) for own in rows)):
        sets = np.random.default_rng(0).standard_normal((2, size, dim), np.float32)
        pair = [script.Sample(features, np.arange(size).astype(str), b"") for features in sets]
        for i, subsamples in enumerate((1, 4)):
            # devnull: no score is cached.
            changed = {"num_subsamples": subsamples, "feature_cache_dir": os.devnull}
            began, settings = time.perf_counter(), argparse.Namespace(**vars(args) | changed)
            script.add_set_metrics(script.Results([], {}, "_model", None), *pair, str(size), size // 2, settings)
            seconds[i] += time.perf_counter() - began
    one, four = seconds
    return one + (args.num_subsamples - 1) * (four - one) / 3


def seconds_of_draw(script, args):
    """Return the seconds per bootstrap draw of a classifier's scores, on random predictions for all test images."""
    test = count_real_images(script, args)[2]
    probabilities = np.random.default_rng(0).random((min(test, args.max_test_images or test), len(args.labels)))
    table = script.load_image_table(args.test_csv or args.real_csv, with_images=False, labels=args.labels)
    began = time.perf_counter()
    script.score((probabilities > 0.5).astype(np.float32), np.arange(len(probabilities)), [probabilities], 49)
    # Images of each sex, age group and view are scored once more.
    return (1 + len({"Sex", "Age", "AP/PA"} & {*table})) * (time.perf_counter() - began) / 50


def measure_study(steps, args):
    """Run `measure_step` for each kind of step and row, and add the rest of each process's seconds."""
    folder, costs, samples = args.output_dir / "forecast", {}, (0, 0)  # few and planned
    shutil.rmtree(folder, ignore_errors=True)
    classifier, drawn = folder / "downstream" / "classifier", folder / "samples"
    shared = {"downstream": [f"--synthetic={drawn}"], "evaluations": [f"--synthetic={drawn}", f"--baseline={drawn}"]}
    for name, (script, argv) in steps.items():
        kind, key = name.split("/")[0], cost_key(name)
        if key in costs:
            continue
        print(f"{key} ...", flush=True)
        planned = [str(classifier) if word.endswith("downstream/real/classifier") else word for word in argv]
        planned = [*planned, *shared.get(kind, []), f"--output_dir={folder / key}"]
        if kind in CACHES:
            planned += [f"--{CACHES[kind]}={folder / 'caches' / kind}"]
        few = [*planned, *FEW[kind].split()]
        if kind == "samples":
            few += ["--num_images=48" if "--like_csv" in argv else "--images_per_label=16"]
        began = time.perf_counter()
        found = costs[key] = in_new_process(measure_step, script, few, planned, samples, args)
        if "note" in found:
            sys.exit(f"{key}: {found['note']}; change the variables of launch/sweep.sh")
        print("  " + ", ".join(f"{path} {seconds:.3g} s" for path, seconds in found["seconds_per_unit"].items()))
        found["rest"] = time.perf_counter() - began - found.pop("after") - sum(found["few"].values())
        if kind == "runs":
            shutil.rmtree(folder / key)  # gigabytes each
        elif kind == "samples":
            units = found["few_units"]["generate"], found["units, caches empty"]["generate"] * args.processes
            samples = tuple(map(round, units))
    return costs


def cost_key(name):
    """Return the kind of a step or, for a training, runs/row, since seeds cost the same."""
    return re.sub("_seed.*", "", os.path.dirname(name)) if name.startswith("runs/") else name.split("/")[0]


def forecast_study(steps, args):
    """Print hours and peak memory of each step, and the hours that finished steps took; write study.json."""
    costs, study, forecast, filled = measure_study(steps, args), Path(os.environ.get("STUDY", "study")), {}, set()
    for name in steps:
        cost, kind = costs[cost_key(name)], name.split("/")[0]
        forecast[name] = cost["rest"] + sum(cost["filled" if kind in filled else "empty"].values())
        if not cost["filled"].get("check_and_encode"):  # with a joint VAE loss, no latents are cached
            filled.add(kind)
    # launch/sweep.sh runs one step after another, so a step took the time since the previous result.
    times = sorted(((study / name).stat().st_mtime, name) for name in steps if (study / name).is_file())
    taken = {name: end - start for (start, _), (end, name) in itertools.pairwise(times)}
    groups = {name: [name] for name in steps}
    groups |= {kind: [name for name in steps if name.startswith(kind)] for kind in FEW} | {"all": [*steps]}
    print(f"{'hours':>9} {'measured':>9} {'peak GiB':>9}")
    for group, names in (groups | {"all that were measured": [*taken]} if taken else groups).items():
        hours = sum(forecast[name] for name in names) / 3600
        measured = f"{sum(taken[name] for name in names) / 3600:.3f}" if {*names} <= {*taken} else ""
        peak = max((costs[cost_key(name)]["peak_bytes"] for name in names), default=0) / 2**30
        print(f"{hours:9.3f} {measured:>9} {peak:9.1f}  {group}")
    summary = {"arguments": vars(args), "forecast_seconds": forecast, "measured_seconds": taken, "costs": costs}
    (args.output_dir / "study.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def format_table(summary):
    """Return the comparison as Markdown."""
    args, machine = summary["arguments"], summary["machine"]
    size, compiling = f"{args['resolution']}x{args['resolution']}", "on" if args["compile"] else "off"
    lines = [
        f"{machine['name']}, {machine['threads']} threads; {size}, batch {args['batch_size']}, mixed precision "
        f"{args['mixed_precision']}, compile {compiling}; {args['repeats']} x {args['steps']} steps; "
        "parts in seconds per step",
        "",
        f"| method | loop | images/s | ratio | s/step | {' | '.join(PARTS)} | peak GiB |",
        f"|---|---|---:|---:|---:|{'---:|' * len(PARTS)}---:|",
    ]
    for method, both in summary["methods"].items():
        for loop in LOOPS:
            figures = both[loop]
            if "note" in figures:
                lines.append(f"| {method} | {loop} | {figures['note']} |" + " |" * (len(PARTS) + 3))
                continue
            ratio = f"{both['ratio']:.2f}" if loop == "project" and "ratio" in both else ""
            parts = " | ".join(f"{seconds:.3g}" for seconds in figures["parts"].values())
            rates = f"{figures['images_per_second']:.3g} | {ratio} | {figures['seconds_per_step']:.3g}"
            lines.append(f"| {method} | {loop} | {rates} | {parts} | {figures['peak_bytes'] / 2**30:.2f} |")
    return "\n".join(lines) + "\n"


def draw_plot(methods, path):
    """Plot the seconds per image by part, plain above project, without loops that ran out of memory."""
    from matplotlib.figure import Figure  # here, since at the top it would count as memory of the loops

    bars = [(-2.4 * i - j, name, loop) for i, name in enumerate(methods) for j, loop in enumerate(LOOPS)]
    bars = [(y, name, loop) for y, name, loop in bars if "parts" in methods[name][loop]]
    positions, left = [y for y, *_ in bars], np.zeros(len(bars))
    figure = Figure(figsize=(9, 1.6 + 0.6 * len(methods)), layout="constrained")
    axis = figure.subplots()
    for part in PARTS:
        figures = [methods[name][loop] for _, name, loop in bars]
        widths = [f["parts"][part] / f["images_per_step"] for f in figures]
        axis.barh(positions, widths, left=left, height=0.9, label=part)
        left += widths
    for end, (y, name, loop) in zip(left, bars):
        if loop == "project" and "ratio" in methods[name]:
            axis.text(end, y, f" {methods[name]['ratio']:.2f}x", va="center")
    axis.set_yticks(positions, [f"{name}, {loop}" for _, name, loop in bars])
    axis.set_xlim(0, 1.12 * max(left, default=1.0))
    axis.set_xlabel("seconds per image, and the ratio of images per second")
    figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize="small", frameon=False)
    figure.savefig(path, dpi=130)


def processor_name():
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; it has no model name on ARM
    found = re.search(r"^model name\s*: (.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def main(args):
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    if args.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    args.output_dir = args.output_dir.absolute()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.study is not None:
        if args.base:
            os.environ["MODEL"] = str(args.base.absolute())
        os.chdir(ROOT)  # where launch/sweep.sh runs
        args.processes = int(os.environ.get("PROCESSES", "1"))
        forecast_study(plan_study(args.study), args)
        return
    if not args.base:
        args.base = args.output_dir / "base"
        if not (args.base / "model_index.json").is_file():
            print("making Stable Diffusion v1.5 with random weights ...", flush=True)
            failed = in_new_process(make_base, args.base)
            if failed:
                sys.exit(f"{args.base}: {failed['note']}")
    csv = make_images(args.output_dir / "images", min(500, args.batch_size * (args.warmup_steps + args.steps)))
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else processor_name()
    summary = {
        "script": Path(__file__).name,
        "arguments": vars(args),
        "machine": {"name": device_name, "device": args.device, "threads": torch.get_num_threads()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")},
        "methods": {},
    }
    if args.peer:
        summary["peer"] = compare_peer(args, csv)
        (args.output_dir / "peer.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
        return
    for method in args.methods:  # results are written after each, since all may take hours
        summary["methods"][method] = compare_loops(method, args, csv)
        (args.output_dir / "benchmark.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
        (args.output_dir / "benchmark.md").write_text(format_table(summary))
        draw_plot(summary["methods"], args.output_dir / "benchmark.png")
        print("\n".join(format_table(summary).splitlines()[-2:]), flush=True)
    print(f"\n{format_table(summary)}\n{args.output_dir / 'benchmark.json'}")


if __name__ == "__main__":
    main(parse_args())
