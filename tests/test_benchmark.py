"""launch/benchmark.py: the full-size model is the right one, and a tiny run's figures agree with each other."""

import json
import subprocess
import sys
import time

import pytest
import torch
from common import BASE, ROOT, pipeline_of
from PIL import Image
from test_launch import load

benchmark = load("launch/benchmark.py")


def test_the_full_size_model_is_stable_diffusion_1_5():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        parts = [
            UNet2DConditionModel(**benchmark.UNET), CLIPTextModel(CLIPTextConfig(**benchmark.TEXT_ENCODER)), AutoencoderKL(**benchmark.VAE)
        ]  # fmt: skip
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert counts == [859_520_964, 123_060_480, 83_653_863]


def test_the_full_size_model_has_the_published_configuration():
    folder = ROOT.parent / "shared" / "sd15"
    if not folder.is_dir():
        pytest.skip("the published configurations are not here")
    for name, config in (("unet", benchmark.UNET), ("vae", benchmark.VAE), ("text_encoder", benchmark.TEXT_ENCODER), ("scheduler", benchmark.SCHEDULER)):
        published = json.loads((folder / f"{name}_config.json").read_text())
        assert {key: value for key, value in published.items() if key in config} == config


def test_the_made_base_loads_and_its_tokenizer_yields_77_ids(tmp_path, monkeypatch):
    import train_full

    small = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    monkeypatch.setattr(benchmark, "UNET", benchmark.UNET | small | {"cross_attention_dim": 32})
    monkeypatch.setattr(benchmark, "VAE", benchmark.VAE | small)
    monkeypatch.setattr(benchmark, "TEXT_ENCODER", benchmark.TEXT_ENCODER | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2})
    benchmark.make_base(tmp_path / "base")
    pipeline = train_full.load_pipeline(str(tmp_path / "base"))
    for text in ("", "Chest X-ray of a subject with Edema, Pleural Effusion" * 9):
        ids = pipeline.tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert len(ids) == 77 and max(ids) < benchmark.TEXT_ENCODER["vocab_size"]
    assert len(set(pipeline.tokenizer("Edema").input_ids)) > 4


def test_the_clock_leaves_out_the_warm_up_and_adds_up():
    clock = benchmark.Clock("cpu", warmup_steps=1, steps=2)
    encode = clock.timed("VAE", lambda: time.sleep(0.01))
    loss = clock.timed("loss", lambda: (encode(), time.sleep(0.02)))
    with pytest.raises(benchmark.Measured):
        for _ in range(9):
            loss()
            time.sleep(0.03)
            clock.step()
    parts = clock.parts()
    assert clock.count == 3 and sum(parts.values()) == pytest.approx(clock.seconds / 2)
    assert parts["VAE"] >= 0.01 and parts["U-Net forward"] >= 0.02 and parts["rest"] >= 0.03
    assert parts["data"] == parts["backward"] == 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The output folder and the summary of a run on the tiny pipeline."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = ["--device", "cpu", "--base", BASE, "--resolution", 64, "--batch_size", 2, "--steps", 3, "--repeats", 1, "--output_dir", folder]
    command += ["--methods", "lora", "unet_vae", "sample", "--batch_sizes", 1, "--rows", 20, "--processes", 2, "--start"]
    done = subprocess.run([sys.executable, ROOT / "launch/benchmark.py", *map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, json.loads((folder / "benchmark.json").read_text())


def test_parts_rates_and_ratios_are_consistent(bench):
    _, summary = bench
    assert list(summary["methods"]) == ["lora", "unet_vae", "sample"]
    for method, both in summary["methods"].items():
        plain, project = both["plain"], both["project"]
        for outcome in (plain, project):
            assert outcome["images_per_second"] * outcome["seconds_per_step"] == pytest.approx(outcome["images_per_step"])
            assert list(outcome["parts"]) == benchmark.PARTS
            assert sum(outcome["parts"].values()) == pytest.approx(outcome["seconds_per_step"])
            assert min(outcome["parts"].values()) > -1e-3
            assert outcome["parts"]["U-Net forward"] > 0 and outcome["peak_bytes"] > 1e8
            assert (outcome["parts"]["backward"] > 0 and outcome["parts"]["optimizer"] > 0) == (method != "sample")
        assert both["ratio"] == pytest.approx(project["images_per_second"] / plain["images_per_second"])
        # What the plain loop encodes at every step, the project's encodes beforehand where the row allows it.
        assert plain["parts"]["VAE"] > 0 and plain["parts"]["text encoder"] > 0
        assert (project["parts"]["VAE"] > 0) == (method != "lora")
        assert (project["parts"]["text encoder"] > 0) == (method == "sample")
    rows = {(row["metric"], row["label"]): row for row in summary["results"]}
    row = rows["images_per_second", "lora"]
    assert row["value"] == summary["methods"]["lora"]["project"]["images_per_second"]
    assert row["floor"] == summary["methods"]["lora"]["plain"]["images_per_second"]


@torch.no_grad()
def test_operations_are_those_of_the_model(bench):
    from torch.utils.flop_counter import FlopCounterMode

    _, summary = bench
    # On the meta device, since attention's kernel for CPUs is not counted.
    pipeline = pipeline_of(BASE).to("meta")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        pipeline.unet(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 77, 64))
    forward, both = counter.get_total_flops(), summary["methods"]["lora"]
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        pipeline.vae.decode(torch.zeros(1, 4, 8, 8))
    # A sampled image is denoised with and without its prompt, at the three timesteps that PNDM makes of two steps, and decoded.
    assert summary["methods"]["sample"]["flops_per_image"] == 6 * forward + counter.get_total_flops()
    # With all but the adapter frozen, the backward pass has the gradients of what flows, and hardly any of weights.
    assert 1.8 * forward < both["flops_per_image"] < 2.4 * forward
    assert summary["methods"]["unet_vae"]["flops_per_image"] > 3 * forward
    share = both["flops_per_image"] * both["project"]["images_per_second"] / summary["machine"]["matmul_flops"]
    assert both["project"]["matmul_share"] == pytest.approx(share)


def test_growth_is_measured(bench):
    _, summary = bench
    growth = summary["growth"]
    assert {name: [outcome["value"] for outcome in outcomes] for name, outcomes in growth.items()} == {"batch size": [1], "processes": [2], "rows": [20]}
    assert growth["batch size"][0]["images_per_step"] == 1 and growth["processes"][0]["images_per_step"] == 4
    # 20 latents of 8x8x8 numbers in half precision, and embeddings of five captions.
    assert growth["rows"][0]["cache_bytes"] > 20 * 8 * 8 * 8 * 2 + 5 * 77 * 64 * 4
    assert growth["rows"][0]["seconds_to_first_step_uncached"] > 0


def test_the_start_is_measured_beside_the_imports_alone(bench):
    folder, summary = bench
    start = summary["start"]
    assert len(start["import_seconds"]) == len(start["first_step_seconds"]) == 1
    # Which of the two is longer is for a quiet machine to say.
    assert start["import_seconds"][0] > 1 and start["first_step_seconds"][0] > 1
    assert start["ratio"] == pytest.approx(start["first_step_seconds"][0] / start["import_seconds"][0])
    assert f"importing the libraries alone {start['import_seconds'][0]:.1f} s: {start['ratio']:.2f} times" in (folder / "benchmark.md").read_text()


def test_growth_stands_for_the_values_that_are_not_given():
    args = benchmark.parse_args(["--growth", "--rows", "50"])
    assert (args.resolutions, args.batch_sizes, args.processes, args.rows) == ([256, 512, 768], [1, 2, 4], [1, 2], [50])
    assert benchmark.parse_args([]).rows == []


def test_table_and_plot_are_written(bench):
    folder, _ = bench
    table = (folder / "benchmark.md").read_text()
    assert all(f"| {method} | {variant} |" in table for method in ("lora", "unet_vae", "sample") for variant in ("plain", "project"))
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").resize((100, 50)).getcolors(5000)) > 10
    assert not (folder / "jobs").exists() and not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--methods", "adapters"], "invalid choice: 'adapters'"),
        (["--steps", "0"], "not a whole number of at least 1"),
        (["--base", "absent"], "no pipeline there"),
        (["--output_dir", "{file}/x"], "cannot be written"),
        (["--device", "cuda"], "no GPU is found"),
        (["--device", "cpu", "--base", str(BASE), "--resolution", "60", "--methods", "lora"], "multiples of 8"),
    ],
)
def test_bad_input(flags, words, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "file").write_text("")
    flags = [flag.format(file=tmp_path / "file") for flag in flags]
    command = [sys.executable, ROOT / "launch/benchmark.py", *flags, *([] if "--output_dir" in flags else ["--output_dir", tmp_path / "out"])]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and words in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
