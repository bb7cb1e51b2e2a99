"""sample.py: images that depend on seed, prompt and index alone, complete metadata, and every kind of run."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from common import BASE, PEFT_ROWS, ROOT, launch, phantoms, pipeline_of, train
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import sample

LABELS = ["--labels", "Edema", "No Finding"]
# A job of some seconds in many small steps, so that a kill finds something half done.
JOB = [*LABELS, "--images_per_label", 200, "--num_inference_steps", 3, "--resolution", 64, "--batch_size", 4]


def run(output_dir, *flags, model=BASE, steps=3):
    """Samples in this process; returns metadata.csv."""
    fast = ["--num_inference_steps", str(steps), "--resolution", "64", "--images_per_label", "3"]
    sample.main(sample.parse_args(["--model", str(model), "--output_dir", str(output_dir), *fast, *flags]))
    return pd.read_csv(output_dir / "metadata.csv")


def pixels(folder, names):
    return {name: np.asarray(Image.open(folder / name)).astype(int) for name in names}


def furthest(one: dict, two: dict) -> int:
    assert one.keys() == two.keys()
    return max(abs(one[name] - two[name]).max() for name in one)


def test_images_depend_on_seed_prompt_and_index_alone(tmp_path):
    table = run(tmp_path / "a", *LABELS, "--batch_size=4")
    images = pixels(tmp_path / "a", table["file_name"])
    assert len(images) == 6
    assert min(abs(a - b).max() for i, a in enumerate(images.values()) for b in list(images.values())[:i]) > 10
    run(tmp_path / "b", "--labels", "No Finding", "Edema", "--batch_size=1")
    assert furthest(images, pixels(tmp_path / "b", images)) <= 2
    more = run(tmp_path / "c", "--labels", "Edema", "--images_per_label=5", "--batch_size=2")
    edema = [name for name in images if name.startswith("edema")]
    assert len(more) == 5 and furthest({n: images[n] for n in edema}, pixels(tmp_path / "c", edema)) <= 2
    other = run(tmp_path / "d", *LABELS, "--seed=1")
    assert furthest(images, pixels(tmp_path / "d", other["file_name"])) > 10


def test_two_processes_make_the_same_images(tmp_path):
    table = run(tmp_path / "one", *LABELS)
    flags = ["--num_inference_steps", 3, "--resolution", 64, "--images_per_label", 3, "--batch_size", 2]
    done = launch(ROOT / "sample.py", "--model", BASE, "--output_dir", tmp_path / "two", *flags, *LABELS, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pd.read_csv(tmp_path / "two" / "metadata.csv").equals(table)
    assert furthest(pixels(tmp_path / "one", table["file_name"]), pixels(tmp_path / "two", table["file_name"])) <= 2


def test_interrupted_sampling_goes_on(tmp_path, monkeypatch):
    whole = pixels(tmp_path / "whole", run(tmp_path / "whole", *LABELS)["file_name"])

    def interrupted(image, path, save=sample.save_image, left=[2]):
        left[0] -= 1
        if left[0] < 0:
            path.with_name(f".{path.name}.part").write_bytes(b"half a file")
            raise KeyboardInterrupt
        save(image, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "save_image", interrupted)
        run(tmp_path / "cut", *LABELS, "--batch_size=1")
    assert not (tmp_path / "cut" / "metadata.csv").exists()
    done = sorted((tmp_path / "cut").rglob("[!.]*.png"))
    times = {path: path.stat().st_mtime_ns for path in done}
    table = run(tmp_path / "cut", *LABELS)
    assert len(done) == 2 and all(path.stat().st_mtime_ns == times[path] for path in done)
    assert furthest(whole, pixels(tmp_path / "cut", table["file_name"])) <= 2
    assert not list((tmp_path / "cut").rglob("*.part"))


def test_metadata_is_an_image_table_and_an_imagefolder(tmp_path):
    import datasets

    import train_full

    table = run(tmp_path / "s", *LABELS, "--guidance_scale=3", "--scheduler=ddim")
    assert list(table["prompt"].unique()) == ["Chest X-ray of a subject with Edema", "Chest X-ray of a subject with No Finding"]
    assert set(table["guidance_scale"]) == {3} and set(table["num_inference_steps"]) == {3} and set(table["scheduler"]) == {"DDIMScheduler"}
    assert set(table["seed"]) == {0} and set(table["model"]) == {str(BASE)}
    assert (table[sample.LABELS].sum(axis=1) == 1).all() and table["Edema"].sum() == 3
    dataset = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "s"), cache_dir=str(tmp_path / "cache"), split="train")
    assert len(dataset) == 6 and sorted(dataset["prompt"]) == sorted(table["prompt"]) and dataset[0]["image"].size == (64, 64)
    loaded = train_full.load_image_table(str(tmp_path / "s" / "metadata.csv"))
    assert len(loaded) == 6 and all(train_full.image_problem(path) is None for path in loaded["image"])
    sheets = sorted(path.name for path in (tmp_path / "s" / ".contact_sheets").iterdir())
    assert sheets == ["edema.png", "no_finding.png"]


def test_like_csv_has_the_tables_label_combinations(tmp_path):
    import train_full

    table = run(tmp_path / "s", f"--like_csv={phantoms()}", "--split=train", "--num_images=5")
    args = train_full.parse_args(["--train_unet", f"--data_csv={phantoms()}"])
    real = train_full.load_training_data(args).train
    assert len(table) == 5 and table["file_name"].is_unique
    assert set(table["prompt"]) <= set(real["prompt"])
    for _, row in table.iterrows():
        named = row["prompt"].removeprefix("Chest X-ray of a subject with ").split(", ")
        assert [label for label in sample.LABELS if row[label] == 1] == named


@pytest.mark.parametrize("row", ["unet_vae", *PEFT_ROWS])
def test_every_kind_of_run_is_sampled_with_what_it_trained(row, tmp_path):
    flags = ["--save_merged", "--learning_rate=1e-2"] if row in PEFT_ROWS else ["--unet_lr=1e-3"]
    train(row, tmp_path / "run", *flags, "--prompt_template=A film with {}", steps=3)
    table = run(tmp_path / "s", *LABELS, model=tmp_path / "run")
    assert set(table["prompt"]) == {"A film with Edema", "A film with No Finding"}
    images = pixels(tmp_path / "s", table["file_name"])
    template = "--prompt_template=A film with {}"
    run(tmp_path / "base", *LABELS, template)
    assert furthest(images, pixels(tmp_path / "base", images)) > 10
    if row in PEFT_ROWS:
        run(tmp_path / "m", *LABELS, template, model=tmp_path / "run" / "merged")
        assert furthest(images, pixels(tmp_path / "m", images)) <= 2
        # A run that was moved, on a base model that is elsewhere.
        summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
        (tmp_path / "run" / "training_summary.json").write_text(json.dumps(summary | {"base_model": "./gone"}))
        run(tmp_path / "b", *LABELS, f"--base_model={BASE}", model=tmp_path / "run")
        assert furthest(images, pixels(tmp_path / "b", images)) == 0


@pytest.mark.parametrize("scheduler", sample.SCHEDULERS)
def test_schedulers_by_name(scheduler, tmp_path):
    table = run(tmp_path / "s", "--labels", "Edema", "--images_per_label=1", f"--scheduler={scheduler}", steps=4)
    assert table["scheduler"][0] == sample.SCHEDULERS[scheduler][0].__name__
    assert np.asarray(Image.open(tmp_path / "s" / table["file_name"][0])).std() > 1


def test_a_sampler_that_draws_noise_draws_it_per_image(tmp_path):
    """A base model with an ancestral scheduler of its own: here too an image does not depend on its batch."""
    shutil.copytree(BASE, tmp_path / "base")
    index, name = json.loads((BASE / "model_index.json").read_text()), "EulerAncestralDiscreteScheduler"
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    table = run(tmp_path / "a", *LABELS, "--batch_size=6", model=tmp_path / "base")
    assert set(table["scheduler"]) == {name}
    # A slash at the end of a folder's name makes it no other model, and the images there are none to make again.
    run(tmp_path / "a", *LABELS, "--batch_size=1", model=f"{tmp_path / 'base'}/")
    images = pixels(tmp_path / "a", table["file_name"])
    run(tmp_path / "b", *LABELS, "--batch_size=1", model=tmp_path / "base")
    assert furthest(images, pixels(tmp_path / "b", images)) <= 2
    run(tmp_path / "c", *LABELS, "--seed=1", model=tmp_path / "base")
    assert furthest(images, pixels(tmp_path / "c", images)) > 10


def test_reduced_precision_draws_nearly_the_same(tmp_path):
    table = run(tmp_path / "full", *LABELS)
    images = pixels(tmp_path / "full", table["file_name"])
    run(tmp_path / "bf16", *LABELS, "--mixed_precision=bf16")
    halves = pixels(tmp_path / "bf16", images)
    assert 0 < np.mean([abs(halves[name] - image).mean() for name, image in images.items()]) < 8


def test_what_is_not_a_number_is_no_image(tmp_path, capsys):
    shutil.copytree(BASE, tmp_path / "base")
    path = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"decoder.conv_out.weight": weights["decoder.conv_out.weight"].float().sign() * 3e38}, path)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "s", *LABELS, model=tmp_path / "base")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "edema/000000.png: not a number in the image; pass --mixed_precision" in error
    assert not list((tmp_path / "s").rglob("*.png")) and not (tmp_path / "s" / "metadata.csv").exists()


def test_samples_are_those_of_a_plain_pipeline(tmp_path):
    """The same latents through diffusers' own call give the same image."""
    table = run(tmp_path / "s", "--labels", "Edema", "--images_per_label=1")
    generator = torch.Generator().manual_seed(sample.stream_seed(0, "Chest X-ray of a subject with Edema", 0))
    latents = torch.randn((4, 8, 8), generator=generator)[None]
    image = pipeline_of(BASE)(table["prompt"][0], latents=latents, height=64, width=64, num_inference_steps=3).images[0]
    assert abs(np.asarray(image).astype(int) - pixels(tmp_path / "s", table["file_name"])[table["file_name"][0]]).max() <= 2


def test_bad_input(tmp_path, capsys):
    def refused(words, *flags, model=BASE, folder="refused"):
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / folder, *flags, model=model)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and words in error and error.strip().count("\n") == 0, error
        if folder == "refused":
            assert not (tmp_path / folder).exists()

    refused("'Oedema' is none of", "--labels", "Oedema")
    refused("names a finding twice", "--labels", "Edema", "Edema")
    refused("no such file", "--like_csv", "absent.csv")
    refused("multiples of 8", "--resolution=60")
    refused("up to 16,384", "--resolution=800000")
    refused("fp16 needs a GPU; pass bf16 or no", "--mixed_precision=fp16")
    refused("cannot draw an image (ValueError: `num_inference_steps`: 5000 cannot be larger", "--scheduler=ddim", "--num_inference_steps=5000")
    (tmp_path / "empty").mkdir()
    refused("neither a finished run nor a pipeline", model=tmp_path / "empty")
    refused("no such folder", model="./absent")
    train("bitfit", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    (tmp_path / "run" / "training_summary.json").write_text(json.dumps(summary | {"base_model": "/gone/base"}))
    capsys.readouterr()
    refused("its base model /gone/base is not there; pass --base_model", model=tmp_path / "run")
    (tmp_path / "run" / "training_summary.json").write_text("{")
    refused("not valid JSON", model=tmp_path / "run")
    (tmp_path / "run" / "training_summary.json").write_text(json.dumps(summary))
    delta = tmp_path / "run" / "unet_delta.safetensors"
    delta.write_bytes(delta.read_bytes()[:100])
    refused("cannot be loaded", model=tmp_path / "run")
    run(tmp_path / "s", *LABELS)
    train("bitfit", tmp_path / "run2", "--learning_rate=1e-2")
    capsys.readouterr()
    refused("made with another seed", *LABELS, "--seed=5", folder="s")
    refused("made with another prompt_template", *LABELS, "--prompt_template=Film of {}", folder="s")
    refused("made with another model, resize_mode, weights", *LABELS, model=tmp_path / "run2", folder="s")
    refused("holds 3 images that this command does not make", "--labels", "Edema", folder="s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    refused("not empty and not a folder of samples", *LABELS, folder="other")
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "file").write_text("")
    refused("cannot be written", *LABELS, f"--output_dir={tmp_path / 'file' / 's'}")


def test_auto_halves_the_batch_until_it_fits(tmp_path, monkeypatch, capsys):
    whole = pixels(tmp_path / "whole", run(tmp_path / "whole", *LABELS, "--batch_size=1")["file_name"])
    sizes, denoise = [], sample.denoise

    def limited(args, pipeline, embeddings, batch, *rest, **trial):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return denoise(args, pipeline, embeddings, batch, *rest, **trial)

    monkeypatch.setattr(sample, "denoise", limited)
    table = run(tmp_path / "auto", *LABELS)
    # One to try the pipeline; six images are left to draw, so six are tried at first.
    assert sizes == [1, 6, 3, 1, 1, 1, 1, 1, 1]
    assert furthest(whole, pixels(tmp_path / "auto", table["file_name"])) <= 2
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "three", *LABELS, "--batch_size=3")
    assert ended.value.code == 2 and "3 images of 64x64 do not fit" in capsys.readouterr().err


def test_auto_finds_the_size_of_a_batch(monkeypatch):
    args, rows = sample.parse_args(["--model=x"]), pd.DataFrame({"prompt": ["p"] * 100, "index": range(100)})
    assert args.batch_size == "auto"
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=4))
    on = {name: SimpleNamespace(device=torch.device(name), vae_scale_factor=8, unet=unet, dtype=torch.float16) for name in ("cpu", "cuda")}
    sizes = {side: sample.find_batch_size(args, on["cpu"], {}, rows, side) for side in (64, 256, 512, 1024)}
    assert sizes == {64: 64, 256: 8, 512: 2, 1024: 1}
    assert sample.find_batch_size(args, on["cpu"], {}, rows[:5], 64) == 5
    # A GPU on which a model takes 4 GiB, each image one more in the U-Net, and four together three more in the VAE.
    drawn, zeros = [], torch.zeros
    monkeypatch.setattr(sample, "denoise", lambda args, pipeline, embeddings, batch, *rest, **options: drawn.append(len(batch)))
    monkeypatch.setattr(sample, "decode", lambda pipeline, latents: drawn.append(tuple(latents.shape)))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, dtype: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 4 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: (4 + (drawn[-1] if isinstance(drawn[-1], int) else 3)) * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 6 * 2**30)
    for free, size in ((80, 64), (34, 27), (6, 3), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 80 * 2**30))
        drawn.clear()
        assert sample.find_batch_size(args, on["cuda"], {}, rows, 512) == size and drawn == [1, 2, (4, 4, 64, 64)]

    def too_large(args, pipeline, embeddings, batch, *rest, **options):
        if len(batch) == 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(sample, "denoise", too_large)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**30)
    assert sample.find_batch_size(args, on["cuda"], {}, rows, 512) == 1


def test_a_compiled_unet_sees_one_size_of_batch(tmp_path, monkeypatch):
    table = run(tmp_path / "plain", *LABELS, "--batch_size=4")
    shapes = set()
    forward = UNet2DConditionModel.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: shapes.add(dynamic))
    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda self, x, *rest: shapes.add(x.shape) or forward(self, x, *rest))
    run(tmp_path / "compiled", *LABELS, "--batch_size=4", "--compile")
    # Two for each image, with and without the prompt; to try the pipeline, before it is compiled, a pass and one image.
    assert shapes == {False, torch.Size((1, 4, 8, 8)), torch.Size((2, 4, 8, 8)), torch.Size((8, 4, 8, 8))}
    assert furthest(pixels(tmp_path / "plain", table["file_name"]), pixels(tmp_path / "compiled", table["file_name"])) <= 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("undisturbed")
    return pixels(folder, run(folder, *LABELS)["file_name"])


@pytest.mark.parametrize("name", ["sampling.json", "000002.png", "no_finding.png", "metadata.csv"])
def test_a_full_disk_ends_in_a_sentence_and_the_next_start_goes_on(name, undisturbed, tmp_path, monkeypatch, capsys):
    def full(source, target, replace=os.replace):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(os, "replace", full)
        run(tmp_path / "s", *LABELS, "--batch_size=1")
    error = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert ended.value.code == 2 and "error: " in error and "No space left on device" in error, error
    assert not (tmp_path / "s" / "metadata.csv").exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("*/[!.]*.png") if path.parent.name[0] != "."}
    least, most = {"sampling.json": (0, 0), "000002.png": (2, 4)}.get(name, (6, 6))
    assert least <= len(times) <= most and all(Image.open(path).convert("RGB") for path in times)
    table = run(tmp_path / "s", *LABELS)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items()) and not list((tmp_path / "s").rglob("*.part"))
    assert furthest(undisturbed, pixels(tmp_path / "s", table["file_name"])) <= 2


def test_an_image_that_was_damaged_later_is_named(tmp_path, capsys):
    table = run(tmp_path / "s", *LABELS)
    path = tmp_path / "s" / table["file_name"][1]
    path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "s" / "metadata.csv").unlink()
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "s", *LABELS)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and f"{path}: cannot be read" in error and not (tmp_path / "s" / "metadata.csv").exists()
    path.unlink()
    assert run(tmp_path / "s", *LABELS).equals(table)


# What is wrong with a model's JSON beside another form: values of another type or of no meaning.
WRONG = {
    "unet/config.json": {
        "sample_size": ["text", [64, 64], None, 0], "norm_eps": [None], "act_fn": [7], "class_embed_type": ["identity"], "in_channels": ["4", 5],
        "addition_embed_type": ["text", "evil"], "attention_head_dim": [[], "x", 3], "time_embedding_type": ["evil"], "cross_attention_dim": [None],
        "block_out_channels": [7, []], "down_block_types": ["x"], "center_input_sample": ["x"], "encoder_hid_dim_type": ["text_proj"],
    },
    "vae/config.json": {
        "scaling_factor": ["text", None, 0, float("nan")], "block_out_channels": [7, []], "latent_channels": [None, 3], "act_fn": ["evil"],
        "norm_num_groups": [3, "8"], "force_upcast": ["x"], "out_channels": [1], "sample_size": ["x"],
    },
    "text_encoder/config.json": {
        "hidden_act": ["evil", 7], "num_attention_heads": [3, "4", 0], "layer_norm_eps": [None, "x"], "max_position_embeddings": ["77", 8], "eos_token_id": ["x", None],
        "dtype": ["evil", 7], "vocab_size": [None], "model_type": ["evil", 7], "hidden_size": [32], "architectures": [7], "attention_dropout": ["x"],
    },
    "tokenizer/tokenizer_config.json": {
        "model_max_length": ["77", None, 10**9, -1, 0], "pad_token": [7, None, {"a": 1}], "tokenizer_class": ["evil", 7], "bos_token": [[]], "backend": ["evil"],
    },
    "scheduler/scheduler_config.json": {
        "prediction_type": ["evil", 7, None], "num_train_timesteps": ["1000", 0, -1, None], "beta_start": ["x", None], "beta_schedule": ["evil"], "trained_betas": ["evil", {"a": 1}],
        "timestep_spacing": ["evil"], "steps_offset": ["1", 10**6], "skip_prk_steps": ["x", False], "_class_name": [7, "evil"], "_diffusers_version": [7],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_model_whose_settings_are_wrong_is_refused_or_drawn(name, tmp_path, capsys):
    shutil.copytree(BASE, tmp_path / "base")
    path = tmp_path / "base" / name
    whole, refusals = json.loads(path.read_text()), 0
    for content in ([], None, 7, "text", {"a": 1}, *(whole | {field: value} for field, values in WRONG[name].items() for value in values)):
        path.write_text(json.dumps(content))
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        try:
            assert len(run(tmp_path / "s", "--labels", "Edema", "--images_per_label=1", model=tmp_path / "base", steps=2)) == 1
        except SystemExit as ended:
            error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
            assert ended.code == 2 and len(error) == 1 and str(tmp_path) in error[0], error
            refusals += 1
        except Exception as error:
            raise AssertionError(f"{name}: {content}") from error
    assert refusals >= 6


def test_a_sampler_that_does_not_know_what_the_model_predicts_is_refused(tmp_path, capsys):
    shutil.copytree(BASE, tmp_path / "base")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "evil"}))
    for flags in ([], *([f"--scheduler={name}"] for name in sample.SCHEDULERS)):
        with pytest.raises(SystemExit) as ended:
            run(tmp_path / "s", *LABELS, *flags, model=tmp_path / "base")
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert ended.value.code == 2 and "cannot draw an image" in error and "evil" in error and not (tmp_path / "s").exists(), error


def kill_and_start_again(folder, processes: int, kills: int, seed: int) -> int:
    """Runs one job of sample.py, each start killed with all its processes at a random moment, then once undisturbed.

    The moments are drawn over the time from the launch to a little beyond what a start has been seen to need, so they fall
    into imports, loading, sampling and the writing of files alike. Returns how many starts were cut off.
    """
    moments, cut, span = np.random.default_rng(seed), 0, 8.0
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu" if processes > 1 else "--cpu", "--num_machines", "1"]
    command += ["--num_processes", processes, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    job = [ROOT / "sample.py", "--model", BASE, "--output_dir", folder, *JOB]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(4 * kills):
        if cut == kills:
            break
        process = subprocess.Popen([*map(str, command), *map(str, job)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        before = len(list(folder.rglob("[!.]*.png")))
        # Half of the kills come a random while after the first new image, which is when files are being written.
        while_writing, delay = moments.random() < 0.5, moments.random()
        while process.poll() is None and time.monotonic() - started < (60 if while_writing else span * delay):
            if while_writing and len(list(folder.rglob("[!.]*.png"))) > before:
                span = max(span, time.monotonic() - started)
                time.sleep(0.5 * delay)
                break
            time.sleep(0.005)
        if process.poll() is None:
            # The launcher gives each of its processes a session of its own, which outlives it; stopped, it starts no more.
            launcher = psutil.Process(process.pid)
            launcher.suspend()
            for child in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            cut += 1
        process.wait()
        if (folder / "metadata.csv").exists() and cut < kills:
            # It ended before its turn; what is left to draw is made anew by taking most of it away.
            for path in sorted(folder.rglob("[!.]*.png"))[::2]:
                path.unlink()
    done = launch(*job, processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    return cut


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_it_makes_every_image_once(processes, tmp_path):
    """SIGKILL at random moments of one job; KILLS=20 is the whole of it, some minutes for each number of processes."""
    kills = int(os.environ.get("KILLS", 3))
    assert kill_and_start_again(tmp_path / "killed", processes, kills, seed=processes) == kills
    table = pd.read_csv(tmp_path / "killed" / "metadata.csv")
    sample.main(sample.parse_args(["--model", str(BASE), "--output_dir", str(tmp_path / "whole"), *map(str, JOB)]))
    assert table.equals(pd.read_csv(tmp_path / "whole" / "metadata.csv")) and table["file_name"].is_unique
    found = sorted(str(path.relative_to(tmp_path / "killed")) for path in (tmp_path / "killed").rglob("*.png") if path.parent.name[0] != ".")
    assert found == sorted(table["file_name"])
    assert furthest(pixels(tmp_path / "whole", found), pixels(tmp_path / "killed", found)) <= 2
    assert not list((tmp_path / "killed").rglob("*.part")) and not list((tmp_path / "killed").rglob(".*.png*"))
