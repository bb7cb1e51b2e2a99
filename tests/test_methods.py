"""What each of the eleven rows trains: parameter counts, losses, what changes, precision, saving and loading."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import common
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import BASE, FULL_ROWS, PEFT_ROWS, ROOT, ROWS, draw, phantoms, pipeline_of, result, same, train, weights_of
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import train_full
import train_peft

COUNTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
COUNTS |= {"lora": 1_594_368, "dora": 1_694_208, "bitfit": 343_684, "difffit": 481_284}
RATES = {"unet": 1e-5, "vae": 1e-6, "text_encoder": 1e-6} | dict.fromkeys(PEFT_ROWS, 1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_parameter_counts_on_the_architecture_of_stable_diffusion(row, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    import benchmark

    args = common.script_of(row).parse_args([*ROWS[row], f"--data_csv={phantoms()}"])
    stream = SimpleNamespace(latents=True, has_embeddings="text_encoder" not in args.components)
    with torch.device("meta"):  # no memory for the weights
        parts = {"unet": UNet2DConditionModel(**benchmark.UNET), "vae": AutoencoderKL(**benchmark.VAE)}
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**benchmark.TEXT_ENCODER))
        model = common.script_of(row).build_loss(
            args, SimpleNamespace(**parts, scheduler=DDPMScheduler()), stream, {"mixed_precision": "no"}
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **options: groups)
    groups = common.script_of(row).make_optimizer(args, parameters)
    parts = [row] if row in PEFT_ROWS else args.components
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [COUNTS[part] for part in parts]
    assert [group["lr"] for group in groups] == [RATES[part] for part in parts]


# ---------------------------------------------------------------------------------------------------------------------
# One recorded run of each row
# ---------------------------------------------------------------------------------------------------------------------

# The checkpoint is in the middle of an epoch.
OPTIONS = [
    "--gradient_accumulation_steps=2",
    "--max_train_samples=7",
    "--checkpointing_steps=2",
    "--lr_scheduler=cosine",
]
OPTIONS += ["--caption_dropout=0", "--adam_weight_decay=0"]
OPTIONS = {row: [*OPTIONS, "--unet_lr=1e-3", "--text_encoder_lr=1e-3", "--vae_lr=1e-3"] for row in FULL_ROWS} | {
    row: [*OPTIONS, "--learning_rate=1e-2", "--rank=4", "--save_merged"] for row in PEFT_ROWS
}
OPTIONS["unet"] += ["--use_ema"]
OPTIONS["lora"] += ["--use_ema", "--lora_dropout=0.3"]


def record(row, folder, *flags, **options):
    """Train a row and return its summary, losses and learning rates by step, both streams and the trained pipeline."""
    script, logs, streams, pipelines = common.script_of(row), [], [], []
    load, prepare = script.load_base_pipeline, script.prepare_streams
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_base_pipeline", lambda args: pipelines.append(load(args)) or pipelines[-1])
        patch.setattr(script, "prepare_streams", lambda *args: streams.extend(prepare(*args)) or streams)
        patch.setattr(Accelerator, "log", lambda self, values, step: logs.append(values))
        summary = train(row, folder, *flags, **options)
    first_rate = next(name for values in logs for name in values if name.startswith("lr_"))
    losses, rates = ([values[name] for values in logs if name in values] for name in ("loss", first_rate))
    found = {"folder": folder, "saved": folder / ("merged" if row in PEFT_ROWS else ""), "pipeline": pipelines[0]}
    return SimpleNamespace(**found, summary=summary, losses=losses, rates=rates, streams=streams)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a function that trains a row for three steps, once."""
    runs, folder = {}, tmp_path_factory.mktemp("whole")
    return lambda row: runs.get(row) or runs.setdefault(row, record(row, folder / row, *OPTIONS[row], steps=3))


@torch.no_grad()
def reference(stream, pipeline, positions, cached=False):
    """Return mean losses written out with diffusers' own parts; the stream gives images and random numbers only."""
    samples = [stream[n] for n in positions]
    names = ("noise", "posterior_noise", "timesteps")
    noise, posterior_noise, timesteps = (torch.stack([sample[name] for sample in samples]) for name in names)
    indices = [stream.image_index(n) for n in positions]
    images = np.stack([train_full.load_image(stream.images[i], 64, "squash") for i in indices])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    input_ids = pipeline.tokenizer([stream.prompts[i] for i in indices], **padding).input_ids
    # One image at a time, as for the cache: in a batch, other last digits would round otherwise in fp16.
    posterior = torch.cat([pipeline.vae.encode(image[None]).latent_dist.parameters for image in pixels])
    mean, logvar = (posterior.half().float() if cached else posterior).chunk(2, dim=1)
    latents = mean + torch.exp(logvar / 2) * posterior_noise
    signal = pipeline.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = signal.sqrt() * latents * pipeline.vae.config.scaling_factor + (1 - signal).sqrt() * noise
    prediction = pipeline.unet(noisy, timesteps, pipeline.text_encoder(input_ids)[0]).sample
    reconstruction = F.mse_loss(pipeline.vae.decode(latents).sample, pixels)
    return {"diffusion": F.mse_loss(prediction, noise).item(), "reconstruction": reconstruction.item()}


@pytest.mark.parametrize("row", ROWS)
def test_losses_equal_the_reference(row, whole):
    run, base, vae = whole(row), pipeline_of(BASE), "vae" in row
    first = reference(run.streams[0], base, range(4), not vae)
    # In the first step the VAE is still the base model's, so the anchor is zero; trained alone, it does without the
    # U-Net.
    assert run.losses[0] == pytest.approx(
        first["reconstruction"] * vae + first["diffusion"] * (row != "vae"), abs=1e-6
    )
    for suffix, pipeline in (("_start", base), ("", pipeline_of(run.saved))):
        losses = reference(run.streams[1], pipeline, range(4), not vae)
        for name in ("diffusion", "reconstruction") if vae else ("diffusion",):
            assert result(run.summary, f"heldout_{name}{suffix}") == pytest.approx(losses[name], rel=1e-5)


@pytest.mark.parametrize("row", ["vae", "unet_vae_text_encoder"])
def test_the_joint_vae_loss_equals_the_reference(row, tmp_path):
    run = record(row, tmp_path / "run", "--vae_loss=joint", "--vae_recon_weight=0.5", "--caption_dropout=0", steps=1)
    losses = reference(run.streams[0], pipeline_of(BASE), range(2))
    assert run.losses[0] == pytest.approx(0.5 * losses["reconstruction"] + losses["diffusion"], abs=1e-6)


def changed_parameters(row, pipeline):
    """Return the names of the weights of a plain pipeline that a row changes."""
    names = weights_of(pipeline).keys()
    if row in FULL_ROWS:
        return {name for name in names if f"--train_{name.split('.')[0]}" in ROWS[row]}
    unet, norms = [name for name in names if name.startswith("unet.")], pipeline.unet.named_modules()
    norms = tuple(f"unet.{name}.weight" for name, module in norms if "Norm" in type(module).__name__)
    projections = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    ends = {"lora": projections, "dora": projections, "bitfit": (".bias",)}
    ends["difffit"] = (".bias", "to_out.0.weight", "ff.net.2.weight", *norms)
    return {name for name in unet if name.endswith(ends[row])}


@pytest.mark.parametrize("row", ROWS)
def test_exactly_the_methods_parameters_change(row, whole):
    run, base = whole(row), pipeline_of(BASE)
    before, after, expected = weights_of(base), weights_of(pipeline_of(run.saved)), changed_parameters(row, base)
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected
    # A checkpoint holds what trains and nothing else.
    checkpoint = load_file(run.folder / "checkpoint-2" / "trainable.safetensors")
    assert sum(weight.numel() for weight in checkpoint.values()) == sum(run.summary["trainable_parameters"].values())
    assert row in ("lora", "dora", "difffit") or checkpoint.keys() == expected


def assert_resumes_bit_identically(row, whole, tmp_path, *options, steps):
    resume = f"--resume_from_checkpoint={whole / 'checkpoint-2'}"
    summary = train(row, tmp_path / "resumed", *options, resume, steps=steps)
    assert same(common.trained_weights(row, whole), common.trained_weights(row, tmp_path / "resumed"))
    return summary


@pytest.mark.parametrize("row", ROWS)
def test_a_resumed_run_is_bit_identical(row, whole, tmp_path):
    summary = assert_resumes_bit_identically(row, whole(row).folder, tmp_path, *OPTIONS[row], steps=3)
    for metric in ("train_loss", "heldout_diffusion"):
        assert result(summary, metric) == result(whole(row).summary, metric)


def test_resuming_is_bit_identical_in_the_memory_layout_of_gpus(tmp_path, monkeypatch):
    """Fused AdamW goes through weights and state as they lie in memory, which a checkpoint's file does not keep."""
    build_loss = train_full.build_loss

    def build_channels_last(args, pipeline, *rest):
        for module in (pipeline.unet, pipeline.vae):
            module.to(memory_format=torch.channels_last)
        return build_loss(args, pipeline, *rest)

    monkeypatch.setattr(train_full, "build_loss", build_channels_last)
    options = ["--checkpointing_steps=2", "--unet_lr=1e-3", "--vae_lr=1e-3", "--use_ema"]
    train("unet_vae", tmp_path / "whole", *options, steps=4)
    assert_resumes_bit_identically("unet_vae", tmp_path / "whole", tmp_path, *options, steps=4)


def test_8bit_adam_resumes_bit_identically(tmp_path):
    weight = torch.nn.Parameter(torch.ones(8192))
    weight.grad = torch.ones(8192)
    try:
        __import__("bitsandbytes").optim.AdamW8bit([weight]).step()
    except Exception as error:  # depends on bitsandbytes' build
        pytest.skip(f"8-bit AdamW does not run on this CPU: {error}")
    options = ["--use_8bit_adam", "--unet_lr=1e-3", "--checkpointing_steps=2"]
    train("unet", tmp_path / "whole", *options, steps=4)
    state = load_file(tmp_path / "whole" / "checkpoint-2" / "optimizer.safetensors")
    assert any(value.dtype == torch.uint8 for value in state.values())
    assert_resumes_bit_identically("unet", tmp_path / "whole", tmp_path, *options, steps=4)


# Run in a fresh process: the card's own code for LoRA and DoRA, README's for BitFit, and DiffFit's merge.
LOAD = """
import json, re, sys
sys.path[:0] = sys.argv[1:3]
import numpy, common, train_peft
from safetensors.torch import load_file, save_file
for method, run in json.loads(sys.argv[3]).items():
    pipe, delta = common.pipeline_of(common.BASE), f"{run}/unet_delta.safetensors"
    if method == "bitfit":
        pipe.unet.load_state_dict(load_file(delta), strict=False)
    elif method == "difffit":
        train_peft.merge_delta(pipe.unet, delta)
    else:
        exec(re.search("```python(.*?)```", open(f"{run}/README.md").read(), re.DOTALL)[1])
    pipe.set_progress_bar_config(disable=True)
    numpy.save(f"{run}/images.npy", common.draw(pipe))
"""


def test_adapters_load_in_a_fresh_process_and_equal_the_merged_pipelines(whole):
    """alpha is 16 and the rank 4: without its metadata, an adapter would be applied at another scale."""
    folders = json.dumps({method: str(whole(method).folder) for method in PEFT_ROWS})
    command = [sys.executable, "-c", LOAD, str(ROOT), str(ROOT / "tests"), folders]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    base = draw(pipeline_of(BASE))
    for method in PEFT_ROWS:
        whole(method).pipeline.unet.eval()  # LoRA dropout
        trained = draw(whole(method).pipeline)
        assert abs(trained - base).max() > 1e-2
        assert abs(draw(pipeline_of(whole(method).saved)) - trained).max() < 1e-6, method
        assert abs(np.load(whole(method).folder / "images.npy") - trained).max() < 1e-6, method


def test_pipelines_are_saved_with_the_names_and_files_that_transformers_4_reads(tmp_path):
    """Also if the base model has those of version 5 alone."""
    base, tokens = shutil.copytree(BASE, tmp_path / "base"), ("vocab.json", "merges.txt")
    for name in tokens:
        (base / "tokenizer" / name).unlink()
    path = base / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): w for name, w in load_file(path).items()}, path, {"format": "pt"})
    train_full.save_folder(pipeline_of(base), tmp_path)
    weights = [load_file(folder / "text_encoder" / "model.safetensors") for folder in (tmp_path, BASE)]
    assert same(*({name: weight.float() for name, weight in tensors.items()} for tensors in weights))
    for name in tokens:
        assert (tmp_path / "tokenizer" / name).read_text() == (BASE / "tokenizer" / name).read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Loss functions and optimizer
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def random_batch(pipeline):
    random = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.rand(4, 3, 64, 64, generator=random) * 2 - 1, "timesteps": torch.arange(4) * 333}
    batch |= {name: torch.randn(4, 4, 8, 8, generator=random) for name in ("noise", "posterior_noise")}
    batch["input_ids"] = torch.randint(pipeline.tokenizer.vocab_size, (4, 77), generator=random)
    batch["posterior"] = pipeline.vae.encode(batch["pixel_values"]).latent_dist.parameters
    return batch


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_and_velocity_equal_the_formulas(prediction_type):
    pipeline = pipeline_of(BASE)
    config = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    pipeline.scheduler = scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, **config)
    batch = random_batch(pipeline)
    losses = train_full.DiffusionLoss(pipeline, pipeline.text_encoder, SimpleNamespace(snr_gamma=5.0))(batch)
    posterior = pipeline.vae.encode(batch["pixel_values"]).latent_dist
    latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * pipeline.vae.config.scaling_factor
    signal = scheduler.alphas_cumprod[batch["timesteps"]]
    alpha, sigma = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    noisy, states = alpha * latents + sigma * batch["noise"], pipeline.text_encoder(batch["input_ids"])[0]
    target = batch["noise"] if prediction_type == "epsilon" else alpha * batch["noise"] - sigma * latents
    squared = (pipeline.unet(noisy, batch["timesteps"], states).sample - target).square().mean(dim=(1, 2, 3))
    snr = signal / (1 - signal)
    weight = snr.clamp(max=5) / (snr if prediction_type == "epsilon" else snr + 1)
    # At the last timestep the SNR is 0, or nearly; the weight's limit is 1 or 0.
    assert snr[-1] < 1e-9
    weight[-1] = prediction_type == "epsilon"
    assert torch.allclose(losses["diffusion"], squared, rtol=1e-5)
    assert torch.allclose(losses["loss"], weight * squared, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("vae_loss", ["anchored", "joint"])
def test_the_diffusion_loss_reaches_the_vae_only_in_the_joint_loss(vae_loss):
    pipeline = pipeline_of(BASE)
    batch = random_batch(pipeline)
    flags = ["--train_unet", "--train_vae", f"--vae_loss={vae_loss}", f"--data_csv={phantoms()}"]
    model = train_full.VAELoss(pipeline, pipeline.text_encoder, train_full.parse_args(flags))
    weight = pipeline.vae.encoder.conv_in.weight
    (gradient,) = torch.autograd.grad(model(batch)["diffusion"].mean(), weight, allow_unused=True)
    assert (gradient is None) == (vae_loss == "anchored")
    if vae_loss == "anchored":
        assert model(batch)["anchor"].max() < 1e-9
        pipeline.vae.quant_conv.weight.data.mul_(0.5)
        assert model(batch)["anchor"].min() > 1e-2


@pytest.mark.parametrize("row", ROWS)
def test_gradients_are_clipped_to_their_global_norm(row, tmp_path):
    """After one step, AdamW's first moment is a tenth of the gradient."""
    flags = ["--max_grad_norm=1e-4", "--checkpointing_steps=1", "--gradient_accumulation_steps=2"]
    train(row, tmp_path / "run", *flags, steps=1, resolution=32)
    state = load_file(tmp_path / "run" / "checkpoint-1" / "optimizer.safetensors")
    norm = sum(value.square().sum() for name, value in state.items() if name.endswith("exp_avg")).sqrt()
    assert norm == pytest.approx(1e-5, rel=1e-2)


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path):
    options = ["--max_grad_norm=0", "--checkpointing_steps=1"]
    train("unet", tmp_path / "one", *options, "--train_batch_size=4", steps=1)
    train("unet", tmp_path / "two", *options, "--gradient_accumulation_steps=2", steps=1)
    one, two = (load_file(tmp_path / name / "checkpoint-1" / "optimizer.safetensors") for name in ("one", "two"))
    gradients = [name for name in one if name.endswith("exp_avg")]
    assert gradients and all(torch.allclose(one[name], two[name], atol=1e-6, rtol=1e-4) for name in gradients)


SCHEDULES = {  # of the share of the steps after warm-up
    "constant_with_warmup": lambda share: 1,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "cosine_with_restarts": lambda share: (share < 1) * (1 + math.cos(math.pi * (2 * share % 1))) / 2,
    "polynomial": lambda share: (1 - share) ** 2,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_equal_the_formulas(name, tmp_path):
    """Logged is the learning rate of the step to come."""
    own = {"cosine_with_restarts": ["--lr_num_cycles=2"], "polynomial": ["--lr_power=2"]}.get(name, [])
    flags = [f"--lr_scheduler={name}", "--lr_warmup_steps=2", "--learning_rate=1", *own]
    run = record(
        "bitfit", tmp_path / "run", *flags, "--adam_epsilon=1e9", "--adam_weight_decay=0", steps=6, resolution=32
    )
    expected = [0.5, *(SCHEDULES[name](step / 4) for step in range(5))]
    assert run.rates == pytest.approx(expected, abs=2e-4)  # polynomial ends at 1e-4 of the rate


@pytest.mark.parametrize("row", ["unet_vae_text_encoder", *PEFT_ROWS])
def test_masters_are_taken_in_float32_before_the_base_is_cast(row, tmp_path):
    """At a learning rate of 0 under bf16, nothing moves at all."""
    peft = row in PEFT_ROWS
    flags = ["--learning_rate=0", "--save_merged"] if peft else ["--unet_lr=0", "--text_encoder_lr=0", "--vae_lr=0"]
    flags += ["--mixed_precision=bf16", "--gradient_checkpointing", "--checkpointing_steps=1"]
    train(row, tmp_path / "run", *flags, steps=1, resolution=32)
    for name in ("trainable", "optimizer"):
        tensors = load_file(tmp_path / "run" / "checkpoint-1" / f"{name}.safetensors").values()
        assert {value.dtype for value in tensors} == {torch.float32}
    assert same(weights_of(pipeline_of(tmp_path / "run" / ("merged" if peft else ""))), weights_of(pipeline_of(BASE)))


def test_a_dataset_trains_like_the_table_of_the_same_images(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    for name in names:
        common.picture(tmp_path / "data" / name)
    table = tmp_path / "data" / "metadata.csv"
    table.write_text("file_name,Edema\n" + "".join(f"{name},1\n" for name in names))
    train("bitfit", tmp_path / "csv", "--split=all", csv=table)
    argv = [word for word in common.arguments("bitfit", tmp_path / "set", "--split=all") if "--data_csv" not in word]
    common.run_main(train_peft, [*argv, f"--dataset_name={tmp_path / 'data'}"])
    assert same(common.trained_weights("bitfit", tmp_path / "csv"), common.trained_weights("bitfit", tmp_path / "set"))


def test_old_checkpoints_go_and_later_ones_of_another_branch(tmp_path):
    flags = ["--checkpointing_steps=1", "--checkpoints_total_limit=3"]
    train("bitfit", tmp_path / "run", *flags, steps=4)
    assert [path.name[-1] for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["2", "3", "4"]
    back = f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}"
    train("bitfit", tmp_path / "run", *flags, back, "--learning_rate=1e-2", steps=3)
    assert [path.name[-1] for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["2", "3"]


def test_a_run_resumes_under_another_launch_and_with_the_other_names_of_transformers(tmp_path, monkeypatch, capsys):
    """Accelerate's environment neither changes the accumulation nor, by torch.compile, the names of parameters."""
    options = ["--checkpointing_steps=1", "--gradient_accumulation_steps=2", "--text_encoder_lr=1e-3"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    summary = train("text_encoder", tmp_path / "run", *options, steps=2)
    assert summary["steps"] == 2 and summary["global_batch_size"] == 4
    monkeypatch.undo()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    tensors = load_file(checkpoint / "trainable.safetensors")
    renamed = {name.replace("text_encoder.", "text_encoder.text_model."): tensor for name, tensor in tensors.items()}
    common.save_file(renamed, checkpoint / "trainable.safetensors")
    resume = [*options, f"--resume_from_checkpoint={checkpoint}"]
    capsys.readouterr()
    train("text_encoder", tmp_path / "two", *resume, steps=2)
    assert "length_of_lr_schedule" not in capsys.readouterr().out
    runs = (common.trained_weights("text_encoder", tmp_path / name) for name in ("run", "two"))
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(*(run.values() for run in runs)))


def test_more_steps_change_a_cosine_schedule_with_a_warning(tmp_path, capsys):
    cosine = ["--lr_scheduler=cosine", "--checkpointing_steps=1"]
    train("bitfit", tmp_path / "run", *cosine, steps=1)
    train("bitfit", tmp_path / "run", *cosine, "--resume_from_checkpoint=latest", steps=2)
    assert "length_of_lr_schedule was 1 in" in capsys.readouterr().out
    train("bitfit", tmp_path / "constant", "--checkpointing_steps=1", steps=1)
    train("bitfit", tmp_path / "constant", "--resume_from_checkpoint=latest", steps=2)
    assert " was " not in capsys.readouterr().out


def test_all_validation_prompts_are_drawn_and_the_card_names_the_repository(tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(train_peft, "create_repo", lambda name, **options: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(train_peft, "upload_folder", lambda **options: uploads.append(options["repo_id"]))
    flags = ["--validation_prompts", *"abcdef", "--num_validation_images=4", "--push_to_hub"]
    train("lora", tmp_path / "run", *flags, steps=1, resolution=32)
    assert Image.open(tmp_path / "run" / "validation" / "step-000001.png").size == (6 * 32, 32)
    assert uploads == ["me/run"] and 'load_lora_weights("me/run"' in (tmp_path / "run" / "README.md").read_text()
