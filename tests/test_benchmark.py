"""launch/benchmark.py: the model is Stable Diffusion v1.5, and the figures of a tiny run agree with each other."""

import json
import math
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from common import BASE, ROOT, phantoms, pipeline_of
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig

import eval_downstream
import eval_generation
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
    loss = train_full.build_loss(args, pipeline, uncached, {"mixed_precision": "no"})
    expected = loss(batch | draws)["loss"].mean()
    for function, name in {"randn": "posterior_noise", "randn_like": "noise", "randint": "timesteps"}.items():
        monkeypatch.setattr(torch, function, lambda *_, name=name, **__: draws[name])
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    plain = benchmark.plain_loss(pipeline, scheduler, batch, component == "vae")
    assert plain.item() == pytest.approx(expected.item(), rel=1e-5)


def test_figures_of_a_tiny_run(tmp_path, monkeypatch):
    # All in this process, to import the libraries once; what the benchmark replaces in the scripts is restored.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for script in (train_full, train_peft, sample):
        for name in {"train", "iterate_batches", "generate", "sample"} & set(vars(script)):
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


# Functions that a forecast wraps.
MEASURED = {"generate", "train", "check_and_encode", "draw_validation", "heldout_losses", "load_images", "train_epoch"}
MEASURED |= {"predict", "score", "compute_features", "__call__", "add_set_metrics", "save_checkpoint", "scan_images"}
MEASURED |= {"hash_files", "iterate_batches"}


@pytest.fixture
def tiny_study(tmp_path, monkeypatch):
    """The variables of launch/sweep.sh."""
    study = {"MODEL": BASE, "TRAIN_CSV": phantoms(60), "METHODS": "lora vae", "SEEDS": "0 3", "LAUNCH": "python"}
    study |= {"RESOLUTION": 64, "BATCH": 2, "GLOBAL_BATCH": 4, "EPOCHS": 3, "MIXED_PRECISION": "no", "PROCESSES": 1}
    study |= {"LABELS": "Edema,Pleural Effusion,No Finding", "STUDY": tmp_path, "IMAGE_ROOT": "", "TEST_CSV": ""}
    study |= {"SAMPLE_FLAGS": "--images_per_label 6 --num_inference_steps 2", "VALIDATION_CSV": "", "JUDGE": "yes"}
    study |= {"EVALUATION_FLAGS": f"--features {tmp_path}/downstream/real/classifier --num_subsamples 4"}
    downstream = "--arch resnet18 --weights none --resolution 32 --num_train_epochs 2 --num_seeds 1"
    study |= {"DOWNSTREAM_FLAGS": downstream, "SAMPLING": "labels", "BUDGET": "equal", "TRAIN_IMAGES": 50}
    for name, value in study.items():
        monkeypatch.setenv(name, str(value))


def test_the_plan_of_a_study_is_that_of_sweep_sh(tiny_study):
    steps = benchmark.plan_study(["--max_train_steps=7"])
    kinds = [name.split("/")[0] for name in steps]
    assert [kinds.count(kind) for kind in benchmark.FEW] == [5, 4, 6, 5]
    script, argv = steps["runs/lora_seed3/training_summary.json"]
    args = train_peft.parse_args(argv)
    assert script == "train_peft" and (args.seed, args.max_train_steps, args.gradient_accumulation_steps) == (3, 7, 2)
    labels = sample.parse_args(steps["samples/vae/metadata.csv"][1]).labels
    assert labels == ["Edema", "Pleural Effusion", "No Finding"]
    with pytest.raises(SystemExit, match="2"):
        benchmark.plan_study(["--resolution=128"])
    argv.remove("--max_train_steps=7")
    args = train_peft.parse_args(argv)
    images = len(train_peft.load_training_data(args).train)
    assert benchmark.count_units(train_peft, args, 0, True)["train"] == math.ceil(3 * images / 4)


@pytest.mark.slow
def test_the_forecast_of_a_tiny_study(tiny_study, tmp_path, monkeypatch):
    """The sum of a step's parts, each as often as planned; caches that the first step fills cost nothing later."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(benchmark, "in_new_process", lambda function, *inputs: function(*inputs))
    for owner in (train_full, train_peft, sample, eval_downstream, eval_generation, eval_generation.ThroughVAE):
        for name in MEASURED & {*vars(owner)}:
            monkeypatch.setattr(owner, name, getattr(owner, name))
    AcceleratorState._reset_state(reset_partial_state=True)
    benchmark.main(benchmark.parse_args(["--device=cpu", f"--output_dir={tmp_path}/b", "--steps=1", "--study"]))
    found = json.loads((tmp_path / "b" / "study.json").read_text())
    cost, seconds = found["costs"]["runs/lora"], found["forecast_seconds"]
    assert len(seconds) == 20 and min(seconds.values()) > 0
    assert cost["empty"]["train"] == pytest.approx(
        cost["few"]["train"] / cost["few_units"]["train"] * cost["units, caches empty"]["train"]
    )
    assert seconds["runs/lora/training_summary.json"] == pytest.approx(cost["rest"] + sum(cost["empty"].values()))
    assert cost["empty"]["check_and_encode"] > 0 == cost["filled"]["check_and_encode"]
    assert found["costs"]["runs/vae"]["filled"]["check_and_encode"] == 0  # anchored
    classified = found["costs"]["downstream"]
    assert classified["empty"]["scan_images"] > 0 == classified["filled"]["scan_images"]
    assert not [*(tmp_path / "b/forecast").glob("runs/*")]
    judged = found["costs"]["evaluations"]
    assert judged["empty"]["add_set_metrics"] == 2.5 * judged["filled"]["add_set_metrics"] > 0
    assert judged["empty"]["ThroughVAE.__call__"] > 0 == judged["filled"]["ThroughVAE.__call__"]
    assert 1e8 < cost["peak_bytes"] < 1e10


PEER = """
import sys, time
from pathlib import Path
from torch.utils.tensorboard import SummaryWriter

flags = dict(word.split("=", 1) for word in sys.argv[1:])
assert (Path(flags["--train_data_dir"]) / "metadata.csv").is_file() and flags["--caption_column"] == "prompt"
writer = SummaryWriter(flags["--output_dir"])
for step in range(int(flags["--max_train_steps"])):
    time.sleep(0.5)
    writer.add_scalar("train_loss", 1.0, step, walltime=100 * step)
writer.close()
"""


@pytest.mark.slow
def test_a_peer_is_timed_by_its_own_log(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    benchmark.main(benchmark.parse_args([*TINY, f"--output_dir={tmp_path}", f"--peer={tmp_path / 'peer.py'}"]))
    found = json.loads((tmp_path / "peer.json").read_text())["peer"]
    (peer,), (project,) = found["rounds"].values()
    assert peer["step"] == 100 and 0 < project["step"] < 100 and found["step"] == 100 / project["step"]
    assert peer["command"] > 6 * 0.5 and found["command"] == peer["command"] / project["command"]


def test_wrong_flags(capsys):
    wrong = {"--steps=0": "at least 1", "--base=x": "no pipeline", "--peer=x": "no such file"}
    wrong |= {"--resolution=64 --study": "no effect on --study; set the variables of launch/sweep.sh"}
    wrong |= {f"--compile --peer={__file__}": "--compile has no effect on --peer"}
    for flags, message in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            benchmark.parse_args(flags.split())
        assert message in capsys.readouterr().err


def test_real_images_are_counted_as_eval_downstream_takes_them(tiny_study):
    """A small real table limits how many samples are trained on."""
    argv = benchmark.plan_study([])["downstream/real/downstream_metrics.json"][1]
    args = eval_downstream.parse_args([*argv, f"--synthetic={phantoms()}"])
    table = eval_downstream.load_image_table(args.real_csv)
    table = table[table["frontal"]]
    splits = eval_downstream.split_of(table, 0).value_counts()
    counts = benchmark.count_units(eval_downstream, args, 10_000, True)
    assert counts["scan_images"] == len(table) and counts["load_images"] == len(table)
    assert counts["train_epoch"] == args.num_train_epochs * splits["train"]
