"""What each of the eleven rows trains: counts at full size, the loss, what changes, clipping, saving and resuming."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from common import BASE, FULL_ROWS, PEFT_ROWS, ROWS, arguments, draw, phantoms, pipeline_of, result, script_of, train, trained_weights, weights_of
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

# The architecture of Stable Diffusion v1.5.
SD15_UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
SD15_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
}  # fmt: skip
SD15_TEXT = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77}


@pytest.mark.parametrize(
    "method, rank, count",
    [("lora", 8, 1_594_368), ("lora", 4, 797_184), ("dora", 8, 1_694_208), ("bitfit", 8, 343_684), ("difffit", 8, 481_284)],
)
def test_counts_of_adapters_at_full_size(method, rank, count):
    import train_peft

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
        train_peft.apply_method(unet, method, rank)
    parameters = train_peft.trainable_parameters(unet)
    assert sum(p.numel() for p in parameters.values()) == count
    if method == "bitfit":
        assert len(parameters) == 295


@pytest.mark.parametrize("row", FULL_ROWS)
def test_counts_of_components_at_full_size(row):
    import train_full

    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(**SD15_UNET),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**SD15_TEXT)),
            "vae": AutoencoderKL(**SD15_VAE),
        }
    counts = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}
    args = train_full.parse_args([*FULL_ROWS[row], "--data_csv", str(phantoms())])
    groups = train_full.select_components(args, SimpleNamespace(**parts))
    chosen = [name for name in counts if f"--train_{name}" in FULL_ROWS[row]]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(counts[name] for name in chosen)
    assert [group["lr"] for group in groups] == [{"unet": 1e-5, "text_encoder": 1e-6, "vae": 1e-6}[name] for name in chosen]
    for name, part in parts.items():
        assert all(p.requires_grad == (name in chosen) for p in part.parameters())


def expected_changes(row: str, pipeline) -> set[str]:
    """The names of exactly those weights of a plain pipeline that a row changes."""
    if row in FULL_ROWS:
        chosen = tuple(f"{flag[8:]}." for flag in ROWS[row])
        return {name for name in weights_of(pipeline) if name.startswith(chosen)}
    names = [f"unet.{name}" for name, _ in pipeline.unet.named_parameters()]
    if row in ("lora", "dora"):
        return {n for n in names if n.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))}
    biases = {n for n in names if n.endswith(".bias")}
    if row == "bitfit":
        return biases
    norms = {f"unet.{n}.weight" for n, m in pipeline.unet.named_modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))}
    return biases | norms | {n for n in names if n.endswith(("to_out.0.weight", "ff.net.2.weight"))}


@pytest.mark.parametrize("row", ROWS)
def test_exactly_the_methods_parameters_change(row, tmp_path):
    flags = ["--save_merged", "--learning_rate=1e-2"] if row in PEFT_ROWS else [f"--{c}_lr=1e-3" for c in ("unet", "text_encoder", "vae")]
    train(row, tmp_path / "run", *flags, steps=3)
    base = pipeline_of(BASE)
    before, after = weights_of(base), weights_of(pipeline_of(tmp_path / "run" / ("merged" if row in PEFT_ROWS else "")))
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == expected_changes(row, base)


def reference_loss(row: str, stream, pipeline, positions, vae_loss: str = "anchored", cached: bool = False) -> float:
    """The training loss written out from diffusers' own parts; only the random numbers come from the script's stream."""
    samples = [stream[n] for n in positions]
    noise, eps = (torch.stack([s[k] for s in samples]) for k in ("noise", "latent_noise"))
    timesteps = torch.stack([s["timesteps"] for s in samples])
    pixels = torch.stack([s["pixel_values"] for s in samples])
    base_posterior = pipeline.vae.encode(pixels).latent_dist
    mean, logvar = base_posterior.mean, base_posterior.logvar
    if cached:
        mean, logvar = base_posterior.parameters.half().float().chunk(2, dim=1)
    raw = mean + torch.exp(0.5 * logvar) * eps
    latents = raw * pipeline.vae.config.scaling_factor
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    embeddings = pipeline.text_encoder(torch.stack([s["input_ids"] for s in samples]))[0]
    prediction = pipeline.unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
    loss = F.mse_loss(prediction, noise)
    if "vae" not in row:
        return loss.item()
    reconstruction = F.mse_loss(pipeline.vae.decode(raw).sample, pixels)
    # At the first step the VAE still is the base model's: the anchor is zero. A VAE alone does not train on the diffusion loss.
    return (reconstruction + (0 if row == "vae" and vae_loss == "anchored" else loss)).item()


def make_stream(script, csv, with_embeddings: bool = False):
    """A stream without any cache over the training images that a short run has."""
    args = script.parse_args([*ROWS["bitfit" if script.__name__ == "train_peft" else "unet"], f"--data_csv={csv}"])
    data = script.load_training_data(args)
    tokenizer = pipeline_of(BASE).tokenizer
    captions = [*sorted(set(data.train["prompt"])), ""]
    ids = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    codes = [captions.index(prompt) for prompt in data.train["prompt"]]
    return script.SampleStream(list(data.train["image"]), codes, (4, 8, 8), 1000, 0, 64, "squash", ids)


@torch.no_grad()
@pytest.mark.parametrize("row", ROWS)
def test_loss_of_one_step_equals_the_reference(row, tmp_path):
    options = ["--caption_dropout=0", "--latent_cache_dir=none"]
    with torch.enable_grad():
        summary = train(row, tmp_path / "run", *options, steps=1)
    reference = reference_loss(row, make_stream(script_of(row), phantoms()), pipeline_of(BASE), [0, 1])
    assert result(summary, "train_loss") == pytest.approx(reference, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("row", ["vae", "unet_vae", "vae_text_encoder", "unet_vae_text_encoder"])
def test_joint_vae_loss_equals_the_reference(row, tmp_path):
    with torch.enable_grad():
        summary = train(row, tmp_path / "run", "--caption_dropout=0", "--vae_loss=joint", steps=1)
    reference = reference_loss(row, make_stream(script_of(row), phantoms()), pipeline_of(BASE), [0, 1], "joint")
    assert result(summary, "train_loss") == pytest.approx(reference, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("row", ["unet", *PEFT_ROWS])
def test_loss_later_in_a_run_equals_the_reference_on_the_merged_model(row, tmp_path):
    """A first step cannot tell whether an adapter is applied at all; the fourth can, on the weights that the third left."""
    options = ["--caption_dropout=0", *(["--save_merged", "--learning_rate=1e-2"] if row in PEFT_ROWS else ["--unet_lr=1e-3"])]
    with torch.enable_grad():
        train(row, tmp_path / "three", *options, steps=3)
        summary = train(row, tmp_path / "four", *options, steps=4)
    pipeline = pipeline_of(tmp_path / "three" / ("merged" if row in PEFT_ROWS else ""))
    stream = make_stream(script_of(row), phantoms())
    loss = result(summary, "train_loss")
    # Merging rounds each weight once more.
    assert loss == pytest.approx(reference_loss(row, stream, pipeline, [6, 7], cached=True), abs=1e-5)
    assert abs(loss - reference_loss(row, stream, pipeline_of(BASE), [6, 7], cached=True)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weights_and_velocity_equal_the_papers_formulas(prediction_type):
    import train_full

    pipeline = pipeline_of(BASE)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    factor = pipeline.vae.config.scaling_factor
    model = train_full.DiffusionLoss(pipeline.unet, pipeline.vae, pipeline.text_encoder, scheduler, factor, 5.0)
    stream = make_stream(train_full, phantoms())
    batch = torch.utils.data.default_collate([stream[n] for n in range(4)])
    losses = model(batch)
    signal = scheduler.alphas_cumprod[batch["timesteps"]]
    snr = signal / (1 - signal)
    weight = torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr if prediction_type == "epsilon" else snr + 1)
    posterior = pipeline.vae.encode(batch["pixel_values"]).latent_dist
    latents = (posterior.mean + posterior.std * batch["latent_noise"]) * factor
    noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    prediction = pipeline.unet(noisy, batch["timesteps"], pipeline.text_encoder(batch["input_ids"])[0]).sample
    alpha, sigma = signal.sqrt()[:, None, None, None], (1 - signal).sqrt()[:, None, None, None]
    target = batch["noise"] if prediction_type == "epsilon" else alpha * batch["noise"] - sigma * latents
    squared = (prediction - target).square().mean(dim=(1, 2, 3))
    assert torch.allclose(losses["diffusion"], squared, atol=1e-6, rtol=1e-5)
    assert torch.allclose(losses["loss"], weight * squared, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("anchored", [True, False])
def test_diffusion_loss_reaches_the_vae_only_in_the_joint_loss(anchored):
    import train_full

    pipeline = pipeline_of(BASE)
    stream = make_stream(train_full, phantoms())
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    model = train_full.JointLoss(
        pipeline.unet, pipeline.vae, pipeline.text_encoder, scheduler, pipeline.vae.config.scaling_factor, None,
        base_vae=pipeline_of(BASE).vae, anchored=anchored, recon_weight=0.0, anchor_weight=1.0, needs_unet=True,
    )  # fmt: skip
    losses = model(torch.utils.data.default_collate([stream[0], stream[1]]))
    (gradient,) = torch.autograd.grad(losses["diffusion"].mean(), pipeline.vae.encoder.conv_in.weight, allow_unused=True, retain_graph=True)
    assert (gradient is None) == anchored
    if anchored:
        assert losses["anchor"].max() < 1e-9
        with torch.no_grad():
            pipeline.vae.quant_conv.weight.mul_(0.5)
        assert model(torch.utils.data.default_collate([stream[0]]))["anchor"].item() > 1e-2


@pytest.mark.parametrize("row", ROWS)
def test_gradient_clipping_bites(row, tmp_path):
    """Clipped to next to nothing, gradients vanish beside AdamW's epsilon and the weights stay where they were."""
    change = {}
    for name, norm in (("clipped", "1e-14"), ("free", "0")):
        options = [f"--max_grad_norm={norm}", "--adam_weight_decay=0", "--checkpointing_steps=1", "--checkpoints_total_limit=2"]
        train(row, tmp_path / name, *options, steps=2)
        first, second = (load_file(tmp_path / name / f"checkpoint-{step}" / "trainable.safetensors") for step in (1, 2))
        change[name] = max((second[key] - first[key]).abs().max().item() for key in first)
    assert change["clipped"] < 1e-3 * change["free"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_weights_load_in_a_fresh_process(method, tmp_path, monkeypatch):
    """With alpha different from the rank, a file without its metadata would be applied at the wrong scale."""
    import train_peft

    pipelines = []
    load = train_peft.load_base_pipeline
    monkeypatch.setattr(train_peft, "load_base_pipeline", lambda args: pipelines.append(load(args)) or pipelines[-1])
    train(method, tmp_path / "run", "--rank=4", "--lora_alpha=16", "--learning_rate=1e-2", "--num_validation_images=1", steps=3)
    images = draw(pipelines[0])
    code = f"""
import sys; sys.path.insert(0, {str(BASE.parents[2] / "tests")!r})
import numpy, common
pipeline = common.pipeline_of({str(BASE)!r})
pipeline.load_lora_weights({str(tmp_path / "run")!r})
numpy.save({str(tmp_path / "images.npy")!r}, common.draw(pipeline))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    import numpy

    loaded = numpy.load(tmp_path / "images.npy")
    assert abs(loaded - images).max() < 1e-6
    assert abs(draw(pipeline_of(BASE)) - images).max() > 1e-2


@pytest.mark.parametrize("method", PEFT_ROWS)
def test_merged_pipeline_equals_the_unmerged(method, tmp_path, monkeypatch):
    import train_peft

    pipelines = []
    load = train_peft.load_base_pipeline
    monkeypatch.setattr(train_peft, "load_base_pipeline", lambda args: pipelines.append(load(args)) or pipelines[-1])
    train(method, tmp_path / "run", "--rank=4", "--lora_alpha=16", "--learning_rate=1e-2", "--save_merged", "--num_validation_images=1", steps=3)
    unmerged = draw(pipelines[0])
    assert abs(draw(pipeline_of(tmp_path / "run" / "merged")) - unmerged).max() < 1e-6
    assert abs(draw(pipeline_of(BASE)) - unmerged).max() > 1e-2
    if method == "bitfit":
        plain = pipeline_of(BASE)
        keys = plain.unet.load_state_dict(load_file(tmp_path / "run" / "unet_delta.safetensors"), strict=False)
        assert not keys.unexpected_keys
        assert abs(draw(plain) - unmerged).max() < 1e-6


@pytest.mark.parametrize("row", ROWS)
def test_resumed_run_is_bit_identical(row, tmp_path):
    """From a checkpoint in the middle of an epoch and with accumulation; averaged and 8-bit state in two rows."""
    options = ["--gradient_accumulation_steps=2", "--lr_scheduler=cosine", "--checkpointing_steps=3", "--max_train_samples=7"]
    options += {"unet": ["--use_ema"], "lora": ["--use_8bit_adam", "--lora_dropout=0.3"], "bitfit": ["--use_ema"]}.get(row, [])
    train(row, tmp_path / "whole", *options, steps=5)
    assert (tmp_path / "whole" / "checkpoint-3").is_dir()
    train(row, tmp_path / "resumed", *options, f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-3'}", steps=5)
    whole, resumed = trained_weights(row, tmp_path / "whole"), trained_weights(row, tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    early = load_file(tmp_path / "whole" / "checkpoint-3" / "trainable.safetensors")
    assert set(early) and json.loads((tmp_path / "whole" / "checkpoint-3" / "state.json").read_text())["samples_seen"] == 12


def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path):
    """AdamW hides a wrong scale in the weights; its first moments do not."""
    options = ["--max_grad_norm=0", "--checkpointing_steps=1"]
    train("unet", tmp_path / "one", *options, "--train_batch_size=4", steps=1)
    train("unet", tmp_path / "two", *options, "--gradient_accumulation_steps=2", steps=1)
    one, two = (load_file(tmp_path / name / "checkpoint-1" / "optimizer.safetensors") for name in ("one", "two"))
    moments = [name for name in one if name.endswith("exp_avg")]
    assert moments and all(torch.allclose(one[name], two[name], atol=1e-6, rtol=1e-4) for name in moments)


def test_a_dataset_trains_like_the_table_of_the_same_images(tmp_path):
    """The same images in the same order, once as a CSV and once through datasets.load_dataset."""
    from test_data import picture

    names = [f"{i}.png" for i in range(6)]
    for name in names:
        picture(tmp_path / "data" / name)
    (tmp_path / "data" / "metadata.csv").write_text("file_name,Edema\n" + "".join(f"{name},1\n" for name in names))
    train("bitfit", tmp_path / "csv", "--split=all", csv=tmp_path / "data" / "metadata.csv")
    flags = [a for a in arguments("bitfit", tmp_path / "set", "--split=all") if not a.startswith("--data_csv")]
    script = script_of("bitfit")
    script.main(script.parse_args([*flags, f"--dataset_name={tmp_path / 'data'}"]))
    table, dataset = (load_file(tmp_path / name / "unet_delta.safetensors") for name in ("csv", "set"))
    assert all(torch.equal(table[name], dataset[name]) for name in table)


def test_checkpoints_hold_only_what_trains_and_the_oldest_go(tmp_path):
    train("bitfit", tmp_path / "run", "--checkpointing_steps=1", "--checkpoints_total_limit=2", steps=4)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    names = load_file(tmp_path / "run" / "checkpoint-4" / "trainable.safetensors")
    assert names and all(name.startswith("unet.") and name.endswith(".bias") for name in names)


@pytest.mark.parametrize("row, precision", [("unet_vae_text_encoder", "bf16"), ("difffit", "bf16"), ("lora", "bf16")])
def test_masters_stay_in_float32(row, precision, tmp_path):
    train(row, tmp_path / "run", f"--mixed_precision={precision}", "--gradient_checkpointing", "--checkpointing_steps=2")
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "trainable.safetensors")
    state = load_file(tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors")
    assert {t.dtype for t in saved.values()} == {t.dtype for t in state.values()} == {torch.float32}
    # A weight in bfloat16 has no bits below its eighth; one in float32 that trained has.
    assert any(not torch.equal(t, t.bfloat16().float()) for t in saved.values())
