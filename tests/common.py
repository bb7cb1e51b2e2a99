"""What the tests share: the eleven rows of Table 1, small phantom data, and short runs in this process."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "launch" / "demo" / "base"
REAL_CSV = ROOT.parent / "shared" / "cxr" / "CXR-pediatric" / "train.csv"

FULL_ROWS = {
    "unet": ["--train_unet"],
    "text_encoder": ["--train_text_encoder"],
    "vae": ["--train_vae"],
    "unet_text_encoder": ["--train_unet", "--train_text_encoder"],
    "unet_vae": ["--train_unet", "--train_vae"],
    "vae_text_encoder": ["--train_vae", "--train_text_encoder"],
    "unet_vae_text_encoder": ["--train_unet", "--train_vae", "--train_text_encoder"],
}
PEFT_ROWS = {method: ["--method", method] for method in ("lora", "dora", "bitfit", "difffit")}
ROWS = FULL_ROWS | PEFT_ROWS


def script_of(row: str):
    """The script that trains a row, imported only when a test runs."""
    return __import__("train_full" if row in FULL_ROWS else "train_peft")


@functools.cache
def phantoms(num_patients: int = 40) -> Path:
    """CSV of a small phantom data set, made once for a test session."""
    folder = Path(tempfile.mkdtemp(prefix="phantoms-"))
    command = [sys.executable, ROOT / "launch/demo/make_phantoms.py", "--output_dir", folder, "--num_patients", str(num_patients)]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return folder / "CheXpert-phantom" / "train.csv"


def arguments(row: str, output_dir: Path, *more: str, csv: Path | None = None, steps: int = 2, resolution: int = 64) -> list[str]:
    """Command line of a short run of a row; what comes later in `more` wins."""
    common = {
        "data_csv": csv or phantoms(), "pretrained_model_name_or_path": BASE, "resolution": resolution, "train_batch_size": 2,
        "gradient_accumulation_steps": 1, "max_train_steps": steps, "max_validation_samples": 4, "num_validation_images": 0,
        "checkpointing_steps": 0, "logging_steps": 1, "report_to": "none", "output_dir": output_dir,
        "latent_cache_dir": output_dir.parent / "latent_cache",
    }  # fmt: skip
    return [*ROWS[row], *(f"--{name}={value}" for name, value in common.items()), *map(str, more)]


def train(row: str, output_dir: Path, *more: str, **options) -> dict:
    """Runs a row in this process and returns its summary."""
    # Each run may ask for another precision, which accelerate fixes once per process.
    AcceleratorState._reset_state(reset_partial_state=True)
    script = script_of(row)
    script.main(script.parse_args(arguments(row, output_dir, *more, **options)))
    return json.loads((output_dir / "training_summary.json").read_text())


def result(summary: dict, metric: str) -> float:
    return next(row["value"] for row in summary["results"] if row["metric"] == metric)


def pipeline_of(path: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(path, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights_of(pipeline: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    """All weights of a pipeline by component and name, as copies."""
    parts = ("unet", "text_encoder", "vae")
    return {f"{part}.{name}": p.detach().clone() for part in parts for name, p in getattr(pipeline, part).named_parameters()}


def trained_weights(row: str, run: Path) -> dict[str, torch.Tensor]:
    """What a finished run trained, by name: the adapter's tensors, or the pipeline's."""
    from safetensors.torch import load_file

    for name in ("pytorch_lora_weights.safetensors", "unet_delta.safetensors"):
        if (run / name).exists():
            return load_file(run / name)
    return {n: w for n, w in weights_of(pipeline_of(run)).items() if any(n.startswith(f"{c[8:]}.") for c in ROWS[row])}


def draw(pipeline: StableDiffusionPipeline, **options):
    """Two images from fixed noise as an array in [0, 1].

    In double precision, which leaves what differs in the weights: the kernels of a CPU that add up in another order make
    more of a difference in float32 (1.3e-5 has been seen) than a wrong merge of a small adapter might.
    """
    pipeline.to(torch.float64)
    generator = torch.Generator().manual_seed(7)
    images = pipeline(
        ["Chest X-ray of a subject with Edema", "Chest X-ray of a subject with No Finding"], height=64, width=64,
        num_inference_steps=4, generator=generator, output_type="np", **options,
    )  # fmt: skip
    return images.images


def launch(*command: str, processes: int = 1, **options) -> subprocess.CompletedProcess:
    """`accelerate launch` as users run it, on the CPU.

    With --cpu, accelerate starts several processes only through mpirun; with --multi_gpu it does so itself, and the script
    takes the CPU where there is no GPU.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu" if processes > 1 else "--cpu"]
    launcher += ["--num_machines", "1", "--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, **{"cwd": ROOT} | options,
    )  # fmt: skip
