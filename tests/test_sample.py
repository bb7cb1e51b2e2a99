"""sample.py: images that depend on seed, prompt and index alone, complete metadata, and every kind of run."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import datasets
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
import train_full

TEMPLATE = "Chest X-ray of a subject with {}"
FAST = ["--num_inference_steps", "3", "--resolution", "64"]
LABELS = ["--labels", "Edema", "No Finding", "--images_per_label"]
ROWS = ["lora", "difffit", "vae_text_encoder"]
ROWS += [pytest.param(row, marks=pytest.mark.slow) for row in ("unet_vae", "dora", "bitfit")]
IMAGES = "[!.]*/[!.]*.png"
MISTAKES = {
    "--prompts replaces --labels": ["--prompts", "A film", "--labels", "Edema"],
    "--like_csv absent.csv: no such file": ["--like_csv", "absent.csv"],
    "--images_per_label does not apply to --like_csv": ["--images_per_label", "5", "--like_csv", "absent.csv"],
    "--num_images needs --like_csv": ["--num_images", "5"],
    "exactly one {}": ["--prompt_template", "A film"],
    "--images_per_label must be at least 1": ["--images_per_label", "0"],
    "invalid batch_size value: 'all'": ["--batch_size", "all"],
    "multiples of 8": ["--resolution", "60"],
    "--negative_prompt has no effect": ["--negative_prompt", "blurred", "--guidance_scale", "1"],
    "--lora_scale is for adapters of LoRA and DoRA": ["--lora_scale", "0.5"],
    "fp16 needs a GPU": ["--mixed_precision", "fp16"],
    "finished run or pipeline: no such folder or file": ["--model", "runs/nothing"],
    "launch: cannot be loaded as a finished run or pipeline: neither a run nor": ["--model", str(ROOT / "launch")],
    "--base_model is for adapters and checkpoints": ["--base_model", "./absent"],
}


def run(output_dir, *flags, model=BASE):
    """Sample in this process and return metadata.csv."""
    sample.main(sample.parse_args(["--model", str(model), "--output_dir", str(output_dir), *FAST, *map(str, flags)]))
    return pd.read_csv(output_dir / "metadata.csv")


def pixels(folder):
    """Return the images of a folder by name, as arrays of signed integers."""
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)).astype(int) for path in folder.glob(IMAGES)}


def difference(one, two):
    """Return the largest difference in grey levels of the images that both have."""
    assert one.keys() & two.keys()
    return max(abs(one[name] - two[name]).max() for name in one.keys() & two.keys())


def own_calls(pipeline, table, **options):
    """Return the images of a metadata.csv from diffusers' own call, one by one."""
    images = {}
    for _, row in table.iterrows():
        names = ("num_inference_steps", "guidance_scale", "negative_prompt")
        options |= {name: row[name] for name in names if name in row}
        generator = torch.Generator().manual_seed(sample.keyed_seed(row["seed"], row["prompt"], row["index"]))
        image = pipeline(row["prompt"], generator=generator, height=64, width=64, **options).images[0]
        images[row["file_name"]] = np.asarray(image).astype(int)
    return images


def weights_hash(folder):
    return json.loads((folder / "sampling.json").read_text())["weights"]


def refused(capsys, fragment, output_dir, *flags, model=BASE):
    """Assert that the command ends with status 2 and a sentence with this fragment."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(output_dir, *flags, model=model)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and "error: " in error and fragment in error, error


def edit_weights(part, name, change):
    path = part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {name: change(weights[name])}, path)


def set_scheduler(base, name):
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(BASE, tmp_path / "base")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six images made in one go: folder, metadata.csv and pixels."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *LABELS, 3), pixels(folder)


def test_images_are_those_of_the_pipelines_own_call(whole):
    _, table, images = whole
    assert len(images) == len(table) == 6 and difference(images, own_calls(pipeline_of(BASE), table)) <= 1
    assert min(abs(a - b).max() for i, a in enumerate(images.values()) for b in list(images.values())[:i]) > 10


@pytest.mark.parametrize(
    "scheduler, flags",
    [
        ("ddim", [1]),
        ("dpmsolver++", [7.5, "--negative_prompt=a circle"]),
        ("unipc", [0]),
        ("euler", [3]),
        ("euler_a", [3]),
    ],
)
def test_schedulers_and_guidance_are_the_pipelines(scheduler, flags, tmp_path):
    """Also of an ancestral sampler, which draws its noise per image."""
    flags = ["--scheduler", scheduler, "--seed", 5, "--num_inference_steps", 6, "--guidance_scale", *flags]
    table, pipeline = run(tmp_path, *LABELS, 1, *flags), pipeline_of(BASE)
    scheduler_class, options = sample.SCHEDULERS[scheduler]
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **options)
    assert set(table["scheduler"]) == {scheduler_class.__name__}
    assert difference(pixels(tmp_path), own_calls(pipeline, table)) <= 1


@pytest.mark.parametrize("scheduler", ["LCMScheduler", "TCDScheduler"])
def test_distilled_models_are_the_pipelines(scheduler, base, tmp_path, capsys):
    """Their U-Net takes guidance as an input, so that there is no pass for an empty or negative prompt."""
    config = UNet2DConditionModel.load_config(BASE, subfolder="unet")
    unet = UNet2DConditionModel.from_config(config, time_cond_proj_dim=32)
    unet.load_state_dict(pipeline_of(BASE).unet.state_dict(), strict=False)
    unet.save_pretrained(base / "unet")
    set_scheduler(base, scheduler)
    tables = [run(tmp_path / name, *LABELS, 1, "--guidance_scale", name, model=base) for name in ("3", "9")]
    assert difference(pixels(tmp_path / "3"), own_calls(pipeline_of(base), tables[0])) <= 1
    assert difference(pixels(tmp_path / "3"), pixels(tmp_path / "9")) > 1
    refused(capsys, "nor on LCM-type models", tmp_path / "s", "--negative_prompt=blurred", model=base)


def test_images_depend_on_seed_prompt_and_index_alone(whole, tmp_path):
    images = whole[2]
    run(tmp_path / "a", "--labels", "No Finding", "Edema", "--images_per_label", 4, "--batch_size=1")
    assert len(pixels(tmp_path / "a")) == 8 and difference(images, pixels(tmp_path / "a")) <= 1
    run(tmp_path / "b", *LABELS, 1, "--seed=1")
    assert difference(images, pixels(tmp_path / "b")) > 10
    # The noise is the same in every precision.
    run(tmp_path / "c", *LABELS, 1, "--mixed_precision=bf16")
    assert 0 < np.mean([abs(images[name] - image).mean() for name, image in pixels(tmp_path / "c").items()]) < 8


def test_an_image_that_is_not_a_number_is_not_saved(base, tmp_path, capsys):
    edit_weights(base / "vae", "decoder.conv_in.weight", lambda weight: weight.float().sign() * 3e38)
    refused(capsys, "NaN pixels, which would be black; pass --mixed_precision", tmp_path / "s", *LABELS, 1, model=base)
    assert not pixels(tmp_path / "s") and not (tmp_path / "s" / "metadata.csv").exists()


def test_auto_halves_the_batch_until_it_fits(whole, tmp_path, monkeypatch, capsys):
    sizes, generate = [], sample.generate

    def limited(pipeline, embeddings, rows, *rest):
        sizes.append(len(rows))
        # The second batch of three does not fit either, as if another process had taken memory.
        if len(rows) > 3 or sizes == [6, 3, 3]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(pipeline, embeddings, rows, *rest)

    monkeypatch.setattr(sample, "generate", limited)
    assert run(tmp_path / "auto", *LABELS, 3).equals(whole[1])
    assert sizes == [6, 3, 3, 1, 1, 1] and difference(whole[2], pixels(tmp_path / "auto")) <= 1
    refused(capsys, "out of memory at 64x64; lower --batch_size", tmp_path / "s", *LABELS, 3, "--batch_size=4")


def test_a_compiled_unet_sees_one_size_of_batch(whole, tmp_path, monkeypatch):
    shapes, forward = set(), UNet2DConditionModel.forward

    def recorded(self, sample, *args, **kwargs):
        shapes.add(tuple(sample.shape))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: shapes.add(dynamic))
    monkeypatch.setattr(UNet2DConditionModel, "forward", recorded)
    run(tmp_path, *LABELS, 3, "--batch_size=4", "--compile")
    assert shapes == {False, (8, 4, 8, 8)}
    assert len(pixels(tmp_path)) == 6 and difference(whole[2], pixels(tmp_path)) <= 1


def test_two_processes_make_the_same_images(whole, tmp_path):
    command = [ROOT / "sample.py", "--model", BASE, "--output_dir", tmp_path, *FAST, *LABELS, 3, "--batch_size", 2]
    done = launch(*command, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pd.read_csv(tmp_path / "metadata.csv").equals(whole[1])
    assert len(pixels(tmp_path)) == 6 and difference(whole[2], pixels(tmp_path)) <= 1


def test_a_restart_makes_only_what_is_missing(whole, tmp_path, monkeypatch):
    calls, save_image = [], sample.save_image

    def interrupted(image, path):
        calls.append(path)
        if len(calls) > 2:
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half a file")
            raise KeyboardInterrupt
        save_image(image, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "save_image", interrupted)
        run(tmp_path, *LABELS, 3, "--batch_size=1")
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob(IMAGES)}
    assert len(done) == 2 and not (tmp_path / "metadata.csv").exists()
    assert run(tmp_path, *LABELS, 3).equals(whole[1])
    assert len(pixels(tmp_path)) == 6 and difference(whole[2], pixels(tmp_path)) <= 1
    assert not list(tmp_path.rglob("*.tmp"))
    # Images of each label may be added later.
    assert len(run(tmp_path, *LABELS, 4)) == 8
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in done.items())


def start_and_kill(command, folder, delay):
    """Start a command and kill it with all its processes, `delay` seconds after its first new image."""
    before, silent = len(list(folder.glob(IMAGES))), subprocess.DEVNULL
    with subprocess.Popen([str(part) for part in command], stdout=silent, stderr=silent) as process:
        while process.poll() is None and len(list(folder.glob(IMAGES))) == before:
            time.sleep(0.002)
        time.sleep(delay)
        for member in [process, *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_restarted_it_makes_every_image_once(processes, whole, tmp_path, request):
    kills = 5 if request.config.getoption("--slow") else 1
    job = [*LABELS, 10 + 10 * kills, "--batch_size", 4]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    launcher = [sys.executable, *(torchrun if processes > 1 else [])]
    command = [*launcher, ROOT / "sample.py", "--model", BASE, "--output_dir", tmp_path, *FAST, *job]
    for number in range(kills):
        start_and_kill(command, tmp_path, np.random.default_rng(number).random() * 0.1)
        assert not (tmp_path / "metadata.csv").exists()
    killed, table, images = pixels(tmp_path), run(tmp_path, *job), pixels(tmp_path)
    assert 0 < len(killed) < len(images) and difference(killed, images) == 0
    assert table["file_name"].is_unique and set(table["file_name"]) == images.keys()
    assert difference(whole[2], images) <= 1
    assert [path.name for path in tmp_path.rglob(".*")] == [".contact_sheets"]


def test_missing_images_are_drawn_in_the_batch_that_they_were_in(tmp_path):
    job = [*LABELS, 5, "--batch_size", 4]
    run(tmp_path, *job)
    images = pixels(tmp_path)
    for name in [*images][1::4]:
        (tmp_path / name).unlink()
    run(tmp_path, *job)
    assert len(images) == 10 and difference(images, pixels(tmp_path)) == 0


def test_metadata_is_an_image_table_and_an_imagefolder(whole, tmp_path):
    folder, table, _ = whole
    settings = {"model": str(BASE), "seed": 0, "guidance_scale": 7.5, "num_inference_steps": 3}
    settings |= {"scheduler": "PNDMScheduler", "resolution": 64, "resize_mode": np.nan}
    assert list(table) == ["file_name", "prompt", "index", *sample.LABELS, *settings]
    assert list(table["file_name"]) == [f"{label}/00000{i}.png" for label in ("edema", "no_finding") for i in range(3)]
    assert list(table["prompt"].unique()) == [TEMPLATE.format("Edema"), TEMPLATE.format("No Finding")]
    assert (table[sample.LABELS].sum(axis=1) == 1).all() and table["Edema"].sum() == 3
    assert table[[*settings]].equals(pd.DataFrame(settings, table.index))
    dataset = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path), split="train")
    assert sorted(dataset["prompt"]) == sorted(table["prompt"]) and dataset[0]["image"].size == (64, 64)
    loaded = train_full.load_image_table(str(folder / "metadata.csv"))
    assert all(os.path.isfile(path) for path in loaded["image"]) and list(loaded["prompt"]) == list(table["prompt"])
    assert sorted(path.name for path in (folder / ".contact_sheets").iterdir()) == ["edema.png", "no_finding.png"]


def plan(*flags, **options):
    return sample.plan_samples(sample.parse_args(["--model=x", *map(str, flags)]), TEMPLATE, **options)


def test_free_prompts_and_those_of_a_table_of_reports(tmp_path, capsys):
    given = plan("--prompts", "Small effusion.", "Small effusion", "--images_per_label=2")
    assert (
        list(given["prompt"]) == ["Small effusion."] * 2 + ["Small effusion"] * 2
        and list(given["index"]) == [0, 1] * 2
    )
    assert given["file_name"].is_unique and list(given) == ["file_name", "prompt", "index"]
    text = "file_name,text,Edema\na.png,Small effusion.,-1\nb.png,nan,1\nc.png,,0\nd.png,Small effusion.,1\n"
    (tmp_path / "t.csv").write_text(text)
    drawn = plan(f"--like_csv={tmp_path / 't.csv'}", quiet=False)
    assert list(drawn["prompt"]) == ["Small effusion.", TEMPLATE.format("Edema"), "Small effusion."]
    assert list(drawn["Edema"]) == [0, 1, 1] and list(drawn["index"]) == [0, 0, 1]
    assert drawn["file_name"][0].rpartition("/")[0] == drawn["file_name"][2].rpartition("/")[0]
    assert "prompt (from 'text')" in capsys.readouterr().out
    (tmp_path / "t.csv").write_text("file_name,text\na.png,Clear lungs.\n")  # no labels at all
    assert plan(f"--like_csv={tmp_path / 't.csv'}")[["prompt", "index"]].to_numpy().tolist() == [["Clear lungs.", 0]]


def test_labels_of_any_name(capsys):
    three = ["COVID-19", "Pneumonia/viral", "Normal"]
    drawn = plan("--images_per_label=1", trained_labels=three)
    assert list(drawn["prompt"]) == [TEMPLATE.format(label) for label in three]
    assert list(drawn["file_name"]) == [f"{name}/000000.png" for name in ("covid-19", "pneumonia_viral", "normal")]
    assert (drawn[three].to_numpy() == np.eye(3)).all()
    assert list(plan("--labels", "Oedema", "--images_per_label=1", quiet=False)) == [*drawn.columns[:3], "Oedema"]
    assert "no training image has Oedema" in capsys.readouterr().out


def test_only_labels_that_training_images_had_are_sampled(capsys):
    drawn = plan("--images_per_label=1", seen={"Edema", "Mass", "No Finding"}, quiet=False)
    assert list(drawn["prompt"]) == [TEMPLATE.format(label) for label in ("Edema", "No Finding")]
    assert "no training image has Cardiomegaly, Lung Opacity, Pneumothorax" in capsys.readouterr().out


@pytest.mark.parametrize("uncertain", ["ignore", "ones"])
def test_like_csv_has_the_tables_label_combinations(uncertain, tmp_path):
    # The table alone: its images are not needed.
    csv = shutil.copy(phantoms(), tmp_path / "t.csv")
    flags = [f"--like_csv={csv}", "--split=val", f"--uncertain={uncertain}"]
    drawn = plan(*flags)
    real = pd.read_csv(csv)
    splits = sample.split_of(real.assign(patient=real["Path"].str.extract(r"(patient\d+)", expand=False)), 0)
    positive = real.reindex(columns=sample.LABELS).isin([1, -1] if uncertain == "ones" else [1])
    positive = positive[(real["Frontal/Lateral"] == "Frontal") & (splits == "val") & positive.any(axis=1)]
    assert len(drawn) and (drawn[sample.LABELS].to_numpy() == positive.to_numpy()).all()
    assert drawn["file_name"].is_unique and not drawn.duplicated(["prompt", "index"]).any()
    for _, row in drawn.iterrows():
        named = [label for label in sample.LABELS if row[label] == 1]
        assert row["prompt"] == TEMPLATE.format(", ".join(named))
        assert row["file_name"].split("/")[0] == "+".join(named).lower().replace(" ", "_")
    few = plan(*flags, "--num_images=3")
    assert len(few) == 3 and set(few["prompt"]) <= set(drawn["prompt"])


@pytest.mark.parametrize("row", ROWS)
def test_a_run_is_sampled_with_what_it_trained(row, tmp_path, capsys):
    flags = ["--save_merged", "--learning_rate=1e-2"] if row in PEFT_ROWS else ["--unet_lr=1e-3", "--vae_lr=1e-3"]
    flags += ["--checkpointing_steps=2", "--use_ema", "--ema_decay=0.5", "--prompt_template=A film with {}"]
    folder = tmp_path / "run"
    summary = train(row, folder, *flags, steps=3)
    table = run(tmp_path / "s", *LABELS, 1, model=folder)
    assert set(table["prompt"]) == {"A film with Edema", "A film with No Finding"}
    assert set(table["resize_mode"]) == {"squash"}
    images, merged = pixels(tmp_path / "s"), folder / "merged" if row in PEFT_ROWS else folder
    assert difference(images, own_calls(pipeline_of(merged), table)) <= 1
    assert difference(images, own_calls(pipeline_of(BASE), table)) > 10
    # The last checkpoint has the run's weights, and an earlier one can be sampled before the run has finished.
    path = (folder / "training_summary.json").rename(tmp_path / "training_summary.json")
    for step in (2, 3):
        table = run(tmp_path / f"{step}", *LABELS, 1, model=folder / f"checkpoint-{step}")
        assert set(table["prompt"]) == {"A film with Edema", "A film with No Finding"} and set(table["step"]) == {step}
    assert weights_hash(tmp_path / "2") != weights_hash(tmp_path / "3")
    assert difference(pixels(tmp_path / "3"), images) <= 1
    assert "with the averaged weights after step 3 to" in capsys.readouterr().out
    path = path.rename(folder / path.name)
    if row not in PEFT_ROWS:
        (folder / "model_index.json").unlink()
        refused(capsys, f"not finished; pass a checkpoint: {folder}/checkpoint-", tmp_path / "x", model=folder)
        return
    assert sample.read_summary(str(merged)) == sample.read_summary(str(folder))
    # The base model was moved, or its weights have changed.
    path.write_text(json.dumps(summary | {"base_model": "./gone"}))
    refused(capsys, "of ./gone (see --base_model): no such folder or file", tmp_path / "x", model=folder)
    run(tmp_path / "b", *LABELS, 1, f"--base_model={BASE}", model=folder)
    assert difference(images, pixels(tmp_path / "b")) == 0
    path.write_text(json.dumps(summary | {"identity": {"base_fingerprint": "another"}}))
    refused(capsys, "base model with other weights", tmp_path / "x", model=folder)
    # What is no pipeline.
    refused(capsys, "an adapter itself; pass the pipeline", tmp_path / "x", f"--base_model={folder}", model=folder)
    (file,) = folder.glob("*.safetensors")
    refused(capsys, f"an adapter's file; pass its folder, {folder}", tmp_path / "x", model=file)
    if row == "difffit":
        refused(capsys, "--lora_scale is for adapters of LoRA", tmp_path / "x", "--lora_scale=0", model=folder)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_scale_is_that_of_diffusers(method, tmp_path):
    train(method, tmp_path / "run", "--learning_rate=1e-2", "--checkpointing_steps=2")
    pipeline = pipeline_of(BASE)
    pipeline.load_lora_weights(tmp_path / "run", weight_name="pytorch_lora_weights.safetensors")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        table = run(tmp_path / folder.name / "s", *LABELS, 1, "--lora_scale=0.5", model=folder)
        images = own_calls(pipeline, table, cross_attention_kwargs={"scale": 0.5})
        assert set(table["lora_scale"]) == {0.5} and difference(pixels(tmp_path / folder.name / "s"), images) <= 1
    assert difference(images, own_calls(pipeline, table)) > 3


def test_an_adapters_base_is_loaded_in_the_runs_revision_and_variant(base, tmp_path, monkeypatch, capsys):
    pipeline_of(BASE).save_pretrained(tmp_path / "half", variant="fp16")
    train("bitfit", tmp_path / "run", f"--pretrained_model_name_or_path={tmp_path / 'half'}", "--variant=fp16")
    run(tmp_path / "a", *LABELS, 1, model=tmp_path / "run")
    refused(capsys, "finished run or pipeline", tmp_path / "s", model=tmp_path / "half")
    run(tmp_path / "b", *LABELS, 1, "--variant=fp16", model=tmp_path / "half")
    run(tmp_path / "c", *LABELS, 1)
    assert weights_hash(tmp_path / "a") != weights_hash(tmp_path / "b") == weights_hash(tmp_path / "c")
    calls = []

    def load_pipeline(*args, **kwargs):
        calls.append((args, kwargs))
        raise OSError("offline")

    monkeypatch.setattr(sample, "load_pipeline", load_pipeline)
    path = tmp_path / "run" / "training_summary.json"
    settings = {"revision": "v2", "variant": "fp16", "pretrained_model_name_or_path": "x/y"}
    path.write_text(json.dumps({"base_model": "x/y", "arguments": settings}))
    for flags in ([], ["--base_model=z"], ["--revision=v3"]):
        refused(capsys, "hub says: offline", tmp_path / "x", *flags, model=tmp_path / "run")
    path.unlink()
    refused(capsys, "no training_summary.json", tmp_path / "x", model=tmp_path / "run")
    expected = [("x/y", "v2", "fp16"), ("z", None, None), ("x/y", "v3", "fp16")]
    assert calls == [((name,), {"revision": revision, "variant": variant}) for name, revision, variant in expected]


def test_everyday_mistakes(tmp_path, capsys):
    for fragment, flags in MISTAKES.items():
        refused(capsys, fragment, tmp_path / "s", *flags)
    assert not (tmp_path / "s").exists()


def test_other_kinds_of_models_are_refused(base, tmp_path, capsys):
    config = UNet2DConditionModel.load_config(BASE, subfolder="unet")
    set_scheduler(base, "FlowMatchEulerDiscreteScheduler")
    refused(capsys, "flow matching (FlowMatchEulerDiscreteScheduler)", tmp_path / "s", "--scheduler=ddim", model=base)
    for options, fragment in (({"in_channels": 9}, "an inpainting model"), ({"cross_attention_dim": 2048}, "model")):
        UNet2DConditionModel.from_config(config, **options).save_pretrained(base / "unet")
        refused(capsys, f"{fragment}; pass a text-to-image model", tmp_path / "s", model=base)


def test_a_folder_of_other_images_is_refused(base, whole, tmp_path, capsys):
    folder = shutil.copytree(whole[0], tmp_path / "s")
    refused(capsys, "different seed, prompt_template", folder, *LABELS, 3, "--seed=5", "--prompt_template=Film of {}")
    refused(capsys, "holds 3 other images, such as no_finding/000000.png", folder, "--labels", "Edema")
    refused(capsys, "different negative_prompt", folder, *LABELS, 3, "--negative_prompt=blurred")
    # The same path, trained again.
    saved = json.loads((folder / "sampling.json").read_text())
    (folder / "sampling.json").write_text(json.dumps(saved | {"model": str(base)}))
    edit_weights(base / "unet", "conv_in.bias", lambda bias: bias + 1)
    refused(capsys, "made with different weights", folder, *LABELS, 3, model=base)
    assert difference(whole[2], pixels(folder)) == 0
    refused(capsys, "neither empty nor a folder of samples", ROOT / "launch", *LABELS, 3)
