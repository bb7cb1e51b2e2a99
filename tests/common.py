"""What the tests share: the eleven rows of Table 1, phantom data, and short runs in this process or a real launch."""

import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "launch" / "demo" / "base"
REAL_CSV = ROOT.parent / "shared" / "cxr" / "CXR-pediatric" / "train.csv"

PARTS = ("unet", "vae", "text_encoder")
COMBINATIONS = itertools.chain(*(itertools.combinations(PARTS, count) for count in (1, 2, 3)))
FULL_ROWS = {"_".join(parts): [f"--train_{part}" for part in parts] for parts in COMBINATIONS}
PEFT_ROWS = {method: ["--method", method] for method in ("lora", "dora", "bitfit", "difffit")}
ROWS = FULL_ROWS | PEFT_ROWS


def script_of(row):
    """Return the script that trains a row, imported only when a test runs."""
    return __import__("train_full" if row in FULL_ROWS else "train_peft")


@functools.cache
def phantoms(num_patients=40):
    """Return the table of a small phantom data set, made once for a test session."""
    folder = tempfile.mkdtemp(prefix="phantoms-")
    command = [sys.executable, ROOT / "launch/demo/make_phantoms.py", "--output_dir", folder]
    subprocess.run([*map(str, command), "--num_patients", str(num_patients)], check=True, capture_output=True)
    return Path(folder) / "CheXpert-phantom" / "train.csv"


def picture(path, size=(30, 20), mode="L"):
    """Write a noise image in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert(mode).save(path)
    return str(path)


def write_table(path, rows):
    """Write a CheXpert table of rows given as dicts."""
    pd.DataFrame([{"Frontal/Lateral": "Frontal", **row} for row in rows]).to_csv(path, index=False)
    return path


def small_table(folder, rows=12):
    """Write a table of as many patients, and its images."""
    paths = [f"images/patient{i:05d}/1.jpg" for i in range(rows)]
    for path in paths:
        picture(folder / path, (100, 100))
    return write_table(folder / "t.csv", [{"Path": path, "Edema": "1"} for path in paths])


def change_weights(folder, change):
    """Apply a function to the tensors of the safetensors file in a folder."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def arguments(row, output_dir, *more, csv=None, steps=2, resolution=64):
    """Return the command line of a short run of a row; what comes later in `more` wins."""
    common = {"data_csv": csv or phantoms(), "pretrained_model_name_or_path": BASE, "resolution": resolution}
    common |= {"train_batch_size": 2, "gradient_accumulation_steps": 1, "max_train_steps": steps, "logging_steps": 1}
    common |= {"max_validation_samples": 4, "num_validation_images": 0, "checkpointing_steps": 0, "report_to": "none"}
    common |= {"output_dir": output_dir, "latent_cache_dir": output_dir.parent / "latent_cache"}
    return [*ROWS[row], *(f"--{name}={value}" for name, value in common.items()), *map(str, more)]


def run_main(script, argv):
    """Run a training script in this process."""
    # Each run may ask for another precision, which accelerate fixes once per process.
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main(script.parse_args(argv))


def train(row, output_dir, *more, **options):
    """Train a row in this process and return its summary."""
    run_main(script_of(row), arguments(row, output_dir, *more, **options))
    return json.loads((output_dir / "training_summary.json").read_text())


def launch(*command, processes=1, **options):
    """Run `accelerate launch` as users do, on the CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines=1"]
    # With --cpu, accelerate starts several processes only through mpirun. --multi_gpu does without, and the script
    # takes the CPU where there is no GPU.
    launcher += ["--multi_gpu" if processes > 1 else "--cpu", f"--num_processes={processes}"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no"]
    defaults = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, "timeout": 600}
    return subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, **defaults | options)


def result(summary, metric):
    return next(row["value"] for row in summary["results"] if row["metric"] == metric)


def pipeline_of(path):
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_of(pipeline):
    """Return copies of all weights of a pipeline, named by component and name."""
    parts = {part: getattr(pipeline, part) for part in PARTS}
    return {f"{part}.{name}": p.detach().clone() for part, m in parts.items() for name, p in m.named_parameters()}


def trained_weights(row, run):
    """Return what a finished run trained, by name: the adapter's tensors, or the pipeline's."""
    for name in ("pytorch_lora_weights.safetensors", "unet_delta.safetensors"):
        if (run / name).exists():
            return load_file(run / name)
    components = tuple(f"{flag.removeprefix('--train_')}." for flag in ROWS[row])
    return {name: weight for name, weight in weights_of(pipeline_of(run)).items() if name.startswith(components)}


def same(one, two):
    """Return whether two dicts of tensors are bit-identical."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def draw(pipeline, **options):
    """Return two images from fixed noise as an array in [0, 1].

    In float64: in float32, kernels that add up in another order can make more of a difference (1.3e-5 has been seen)
    than a wrong merge of a small adapter. Not the text encoder, which version 4 of transformers cannot run in float64.
    """
    prompts = ["Chest X-ray of a subject with Edema", "Chest X-ray of a subject with No Finding"]
    fixed = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "np"}
    embeddings = pipeline.to(torch.float32).encode_prompt(prompts, pipeline.device, 1, True)
    fixed |= {name: e.double() for name, e in zip(("prompt_embeds", "negative_prompt_embeds"), embeddings)}
    generator = torch.Generator().manual_seed(7)
    return pipeline.to(torch.float64)(generator=generator, **fixed, **options).images
