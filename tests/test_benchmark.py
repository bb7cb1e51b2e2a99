"""launch/benchmark.py: the model is Stable Diffusion v1.5, and the figures of a tiny run agree with each other."""

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from common import BASE, ROOT, pipeline_of
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig

import sample
import train_full
import train_peft

sys.path.insert(0, str(ROOT / "launch"))
import benchmark

TINY = ["--device=cpu", f"--base={BASE}", "--resolution=64", "--batch_size=2", "--steps=3"]


def test_the_model_has_the_published_configuration():
    folder = ROOT.parent / "shared" / "sd15"
    if not folder.is_dir():
        pytest.skip("no published configurations here")
    with torch.device("meta"):
        built = {"unet": UNet2DConditionModel(**benchmark.UNET).config, "vae": AutoencoderKL(**benchmark.VAE).config}
    built["text_encoder"] = CLIPTextConfig(**benchmark.TEXT_ENCODER).to_dict()
    built["scheduler"] = PNDMScheduler(**benchmark.SCHEDULER).config
    for name, config in built.items():
        published = json.loads((folder / f"{name}_config.json").read_text())
        published = {key: value for key, value in published.items() if key not in ("_class_name", "architectures")}
        assert json.loads(json.dumps({key: config[key] for key in published})) == published


def test_the_random_model_loads_and_its_tokenizer_tells_prompts_apart(tmp_path, monkeypatch):
    small = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    monkeypatch.setattr(benchmark, "UNET", benchmark.UNET | small | {"cross_attention_dim": 32})
    monkeypatch.setattr(benchmark, "VAE", benchmark.VAE | small)
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(benchmark, "TEXT_ENCODER", tiny)
    benchmark.make_base(tmp_path / "base")
    texts = ["", "Edema", "Chest X-ray of a subject with Edema, Pleural Effusion" * 9]
    padding = {"padding": "max_length", "max_length": 77, "truncation": True}
    ids = pipeline_of(tmp_path / "base").tokenizer(texts, **padding).input_ids
    assert {len(row) for row in ids} == {77} and len(set(map(tuple, ids))) == 3


def test_the_clock_leaves_out_the_warm_up_and_counts_no_time_twice():
    clock = benchmark.Clock("cpu", warmup_steps=1, steps=2)
    encode = clock.timed("VAE", lambda: time.sleep(0.01))
    loss = clock.timed("U-Net forward", lambda: (encode(), time.sleep(0.02)))
    for step in clock.steps(iter(range(9))):
        loss()
        time.sleep(0.03 if step else 0.5)
    parts, seconds = clock.figures(images=4)["parts"], clock.figures(images=4)["seconds_per_step"]
    assert step == 2 and seconds < 0.4 and sum(parts.values()) == pytest.approx(seconds)
    assert parts["VAE"] >= 0.01 and parts["U-Net forward"] >= 0.02 and parts["rest"] >= 0.03


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_the_plain_loss_is_the_scripts(component, monkeypatch):
    args = train_full.parse_args([f"--train_{component}", "--vae_loss=joint", f"--data_csv={__file__}"])
    pipeline, uncached = pipeline_of(BASE), SimpleNamespace(latents=None, has_embeddings=False)
    batch = {"pixel_values": torch.rand(2, 3, 64, 64) * 2 - 1, "input_ids": torch.randint(99, (2, 77))}
    draws = dict(zip(("noise", "posterior_noise"), torch.randn(2, 2, 4, 8, 8))) | {"timesteps": torch.tensor([9, 700])}
    batch["posterior"] = pipeline.vae.encode(batch["pixel_values"]).latent_dist.parameters.detach()
    expected = train_full.build_loss(args, pipeline, uncached, "no")(batch | draws)["loss"].mean()
    for function, name in {"randn": "posterior_noise", "randn_like": "noise", "randint": "timesteps"}.items():
        monkeypatch.setattr(torch, function, lambda *_, name=name, **__: draws[name])
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    plain = benchmark.plain_loss(pipeline, scheduler, batch, component == "vae")
    assert plain.item() == pytest.approx(expected.item(), rel=1e-5)


def test_figures_of_a_tiny_run(tmp_path, monkeypatch):
    # All in this process, to import the libraries once; what the benchmark replaces in the scripts is restored.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for script in (train_full, train_peft, sample):
        for name in {"train", "iterate_batches", "draw", "sample"} & set(vars(script)):
            monkeypatch.setattr(script, name, getattr(script, name))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert benchmark.in_new_process(os.getpid) != os.getpid()
    monkeypatch.setattr(benchmark, "in_new_process", lambda function, *inputs: function(*inputs))
    flags = [*TINY, f"--output_dir={tmp_path}", "--methods", "lora", "unet_vae", "sample"]
    benchmark.main(benchmark.parse_args(flags))
    summary, table = json.loads((tmp_path / "benchmark.json").read_text()), (tmp_path / "benchmark.md").read_text()
    assert list(summary["methods"]) == ["lora", "unet_vae", "sample"]
    for method, both in summary["methods"].items():
        for loop in benchmark.LOOPS:
            figures, parts, step = both[loop], both[loop]["parts"], both[loop]["seconds_per_step"]
            assert figures["images_per_second"] * step == pytest.approx(4 if method == "sample" else 2)
            assert sum(parts.values()) == pytest.approx(step) and min(parts.values()) > -1e-3
            assert parts["U-Net forward"] > 0 and 1e8 < figures["peak_bytes"] < 1e10
            assert (parts["backward"] > 0 and parts["optimizer"] > 0) == (method != "sample")
            # The plain loop encodes at every step what the project encodes once, where it does not train.
            assert (parts["VAE"] > 0) == (loop == "plain" or method != "lora")
            assert (parts["text encoder"] > 0) == (loop == "plain" or method == "sample")
            assert f"| {method} | {loop} | {figures['images_per_second']:.3g} |" in table
        assert both["ratio"] == both["project"]["images_per_second"] / both["plain"]["images_per_second"]
    with Image.open(tmp_path / "benchmark.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").resize((100, 50)).getcolors(5000)) > 10


@pytest.mark.slow
def test_time_to_the_first_step(tmp_path):
    args = benchmark.parse_args([*TINY, f"--output_dir={tmp_path}", "--methods", "lora"])
    start = benchmark.measure_start(args, benchmark.make_images(tmp_path, 8))
    assert start["ratio"] == start["first_step_seconds"][0] / start["import_seconds"][0] > 0.5


def test_wrong_flags(capsys):
    for flag, message in {"--steps=0": "at least 1", "--base=x": "no pipeline", "--methods=x": "invalid"}.items():
        with pytest.raises(SystemExit, match="2"):
            benchmark.parse_args([flag])
        assert message in capsys.readouterr().err
