"""Why train_full.py has --fsdp and refuses DeepSpeed: one training by plain processes, by --fsdp and by DeepSpeed's ZeRO-2.

    pip install deepspeed
    python tests/measure_sharding.py

Trains the demo's U-Net and text encoder for a few steps on two processes of the CPU, with train_full.py's own loss, sharding
and optimizer, on seeded random batches. Prints how far the weights are from the plain processes', the bytes a parameter that
each process keeps in tensors between two steps (DDP's buffers, 4 more for plain processes, are none of Python's), and for
DeepSpeed whether the moments can be had for a checkpoint. Not a test: DeepSpeed is nothing that the scripts need.
"""

import contextlib
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
STEPS, CLIPPING = 4, 0.01
LAUNCHES = {"plain": ["--multi_gpu"], "fsdp": ["--multi_gpu"], "deepspeed": ["--use_deepspeed", "--zero_stage=2", f"--gradient_clipping={CLIPPING}"]}

sys.path.insert(0, str(ROOT))


def kept_bytes() -> int:
    """Bytes of all tensors of this process, each memory counted once."""
    storages = {}
    for tensor in [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]:
        with contextlib.suppress(RuntimeError):
            # Of a shared-out tensor the part that is here; some that libraries hold have no memory at all.
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def random_batch(channels: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two images' worth of what DiffusionLoss takes, with a VAE's moments (2, 2 * channels, 8, 8)."""
    moments = torch.randn(2, 2 * channels, 8, 8, generator=generator)
    # Of a standard deviation as small as a VAE's.
    moments[:, channels:] -= 5
    noise, latent_noise = torch.randn(2, 2, channels, 8, 8, generator=generator)
    words, timesteps = torch.randint(0, 100, (2, 77), generator=generator), torch.randint(0, 1000, (2,), generator=generator)
    return {"moments": moments, "noise": noise, "latent_noise": latent_noise, "timesteps": timesteps, "input_ids": words}


def train(way: str, result: Path) -> None:
    """What each process runs; the first one writes the weights to `result`, and beside them what it found."""
    import train_full

    # Before accelerate's plugin for DeepSpeed, which by itself starts processes on a CPU that know nothing of each other.
    PartialState(cpu=True)
    accelerator = Accelerator()
    args = train_full.parse_args([
        "--train_unet", "--train_text_encoder", f"--pretrained_model_name_or_path={ROOT / 'launch/demo/base'}", f"--data_csv={__file__}",
        "--unet_lr=1e-3", "--text_encoder_lr=1e-3",
    ])  # fmt: skip
    pipeline = train_full.load_base_pipeline(args)
    groups = train_full.select_components(args, pipeline)
    model = train_full.DiffusionLoss(pipeline.unet, None, pipeline.text_encoder, pipeline.scheduler, pipeline.vae.config.scaling_factor)
    if way == "fsdp":
        train_full.shard_components(accelerator, model)
        groups = train_full.select_components(args, pipeline)
    parameters = train_full.trainable_parameters(model)
    optimizer = train_full.make_optimizer(args, groups, accelerator.device)
    if way == "deepspeed":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer = accelerator.prepare_model(model, evaluation_mode=way == "fsdp"), accelerator.prepare_optimizer(optimizer)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    for _ in range(STEPS):
        accelerator.backward(model(random_batch(pipeline.unet.config.in_channels, generator))["loss"].mean())
        accelerator.clip_grad_norm_(list(parameters.values()), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
    gc.collect()
    kept = kept_bytes() - sum(p.nbytes for p in pipeline.vae.parameters())
    found = {"processes": accelerator.num_processes, "bytes": kept / sum(p.numel() for p in parameters.values())}
    weights = train_full.gather(accelerator, parameters)
    if accelerator.is_main_process:
        save_file(weights, result)
        result.with_suffix(".json").write_text(json.dumps(found))
    if way == "deepspeed":
        from deepspeed.utils import safe_get_full_optimizer_state

        for parameter in parameters.values():
            safe_get_full_optimizer_state(parameter, "exp_avg")


def main() -> None:
    if len(sys.argv) == 3:
        return train(sys.argv[1], Path(sys.argv[2]))
    if not importlib.util.find_spec("deepspeed"):
        sys.exit("measure_sharding.py: DeepSpeed is not installed; pip install deepspeed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        for way, flags in LAUNCHES.items():
            result = Path(folder) / f"{way}.safetensors"
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *flags]
            command += ["--num_machines=1", "--num_processes=2", "--mixed_precision=no", "--dynamo_backend=no"]
            done = subprocess.run([*command, __file__, way, str(result)], capture_output=True, text=True, env=environment, timeout=600)
            if not result.exists():
                sys.exit(f"{way} did not train:\n{done.stderr[-3000:]}")
            found, weights = json.loads(result.with_suffix(".json").read_text()), load_file(result)
            plain = load_file(result.with_name("plain.safetensors"))
            distance = max(float((plain[name] - weights[name]).abs().max()) for name in plain)
            print(f"{way:>9}: {found['processes']} processes, {found['bytes']:.1f} bytes a parameter, weights within {distance:.1e} of plain processes'")
        errors = [line for line in done.stderr.splitlines() if line.startswith("[rank") and "Error: " in line and "gloo" not in line]
        print(f"{way}'s moments, by its own safe_get_full_optimizer_state: {('; '.join(errors) or done.stderr[-500:]) if done.returncode else 'all read'}")


if __name__ == "__main__":
    main()
