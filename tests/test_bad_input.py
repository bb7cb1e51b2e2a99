"""Everyday mistakes end with one sentence on stderr and exit status 2, and leave nothing behind."""

import json
import math
import re
import shutil

import common
import pytest
import torch
from common import BASE, change_weights, phantoms, picture, pipeline_of, same, small_table, train, trained_weights
from filelock import FileLock

import train_full
import train_peft


@pytest.fixture
def refused(capsys, tmp_path):
    """Return a function that runs a row that has to be refused, and returns the sentence."""

    def run(row, *flags, csv=None, folder="refused"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            common.run_main(common.script_of(row), common.arguments(row, tmp_path / folder, *flags, csv=csv))
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in lines if line.strip() and not re.search(r"usage: |(image|step)/s", line)]
        assert ended.value.code == 2 and len(lines) == 1 and "error: " in lines[0], lines
        assert folder != "refused" or not (tmp_path / folder).exists()
        return lines[0]

    return run


FLAGS = {
    "--method prefix": "invalid choice: 'prefix'",
    "--rank 0": "--rank must be at least 1, and --lora_alpha above 0",
    "--lora_alpha 0": "--rank must be at least 1, and --lora_alpha above 0",
    "--method bitfit --train_text_encoder": "--train_text_encoder needs --method lora or dora",
    "--max_grad_norm -1": "--max_grad_norm must not be negative",
    "--checkpointing_steps -1": "--checkpointing_steps must not be negative",
    "--train_batch_size 0": "--train_batch_size must be at least 1",
    "--learning_rate fast": "invalid float value: 'fast'",
    "--caption_dropout 1.5": "between 0 and 1",
    "--prompt_template none": "exactly one {}",
    "--snr_gamma 0": "--snr_gamma must be above 0",
    "--lr_warmup_steps 10": "use constant_with_warmup",
    "--lr_num_cycles 2": "--lr_num_cycles needs --lr_scheduler cosine_with_restarts",
    "--lr_num_cycles 0": "--lr_num_cycles must be at least 1",
    "--lr_power 2": "--lr_power needs --lr_scheduler polynomial",
    "--validation_prompts X --num_validation_images 0": "--validation_prompts has no effect",
    "--no_such_flag": "--no_such_flag",
    "--data_csv absent.csv": "absent.csv: no such file",
    "--image_root absent": "absent: no such file",
    "--dataset_name data": "either --data_csv or --dataset_name",
}


@pytest.mark.parametrize("argv", [*FLAGS, ""])
def test_flags(argv, capsys):
    """With nothing to train: train_full.py."""
    script, method = (train_peft, ["--method", "lora"]) if argv else (train_full, [])
    with pytest.raises(SystemExit) as ended:
        script.parse_args(["--data_csv", str(phantoms()), *method, *argv.split()])
    usage, error = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and usage.startswith("usage: ") and FLAGS.get(argv, "nothing to train") in error


def test_without_data_the_sentence_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train_peft.parse_args(["--method", "bitfit"])
    error = capsys.readouterr().err
    expected = ("CheXpert-v1.0/train.csv", str(tmp_path), "--data_csv", "bash launch/demo.sh")
    assert ended.value.code == 2 and all(words in error for words in expected)
    # With CheXpert unpacked under its own name, no flag is needed.
    name = "CheXpert-v1.0-small/train/patient00001/1.jpg"
    picture(tmp_path / name)
    common.write_table(tmp_path / "CheXpert-v1.0-small" / "train.csv", [{"Path": name, "Edema": "1"}])
    data = train_peft.load_training_data(train_peft.parse_args(["--method", "bitfit", "--split", "all"]))
    assert data.source == "CheXpert-v1.0-small/train.csv" and len(data.train) == 1


TABLES = {
    b"": "not a readable CSV",
    b"Path,Edema\n": "no rows below the header",
    b"Image,Edema\na.jpg,1\n": "no image column",
    b"Path,Oedema\na.jpg,1\n": "no label or prompt column",
    b"Path,Edema\na.jpg,1\na.jpg,2\n": "row 2, column 'Edema': '2' is not 1, 0, -1 or blank",
    b"Path,Edema\na.jpg,1\n,1\n": "row 2 has no path",
    b"Path,Edema\na.jpg,1,2,3\na.jpg,1\n": "not a readable CSV",
    b"Path,Edema\na.jpg,1\na.jpg,1,2\n": "not a readable CSV",
    b"Path,Edema\n\xff\xfe,1\n": "none of its images exist under",
    b"Path,Edema\nb.jpg,1\n": "none of its images exist",
    b"Path,Edema\na.jpg,0\n": "no training images left of 1 rows (1 without a positive label)",
    b"Path,Edema,Frontal/Lateral\na.jpg,1,Lateral\n": "1 not frontal",
    b"Path,Edema\npatient00001/a.jpg,1\n": "1 not in split train",  # a patient of the test split
}


@pytest.mark.parametrize("content", TABLES)
def test_tables(content, refused, tmp_path):
    for name in ("a.jpg", "patient00001/a.jpg"):
        picture(tmp_path / name)
    (tmp_path / "t.csv").write_bytes(content)
    sentence = refused("bitfit", csv=tmp_path / "t.csv")
    assert TABLES[content] in sentence and str(tmp_path / "t.csv") in sentence


def test_bad_images_are_listed_before_training_or_left_out(refused, tmp_path):
    table = small_table(tmp_path)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    images[0].unlink()
    images[3].write_bytes(images[3].read_bytes()[:300])
    images[5].write_text("hello")
    sentence = refused("lora", "--split=all", csv=table)
    assert "3 images cannot be used" in sentence and "--on_bad_image skip" in sentence
    assert all(str(images[i]) in sentence for i in (0, 3, 5))
    summary = train("lora", tmp_path / "run", "--split=all", "--on_bad_image=skip", csv=table)
    assert summary["images"] == 9 and summary["left_out"]["unreadable"] == 3
    # It is the run on a table without them.
    good = [line for i, line in enumerate(table.read_text().splitlines(keepends=True)) if i not in (1, 4, 6)]
    (tmp_path / "good.csv").write_text("".join(good))
    train("lora", tmp_path / "good", "--split=all", csv=tmp_path / "good.csv")
    assert same(trained_weights("lora", tmp_path / "run"), trained_weights("lora", tmp_path / "good"))


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(BASE, tmp_path / "base")


@pytest.mark.parametrize("part", ["vae", "tokenizer", "model_index.json"])
def test_a_base_without_a_part(part, refused, base):
    shutil.rmtree(base / part) if (base / part).is_dir() else (base / part).unlink()
    assert str(base) in refused("bitfit", f"--pretrained_model_name_or_path={base}")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_pickles_are_not_read(part, refused, base):
    """Weights that are there as a pickle only are refused, not unpickled."""
    (weights,) = (base / part).glob("*.safetensors")
    name = "pytorch_model.bin" if part == "text_encoder" else f"{weights.stem}.bin"
    torch.save(getattr(pipeline_of(base), part).state_dict(), base / part / name)
    weights.unlink()
    assert str(base) in refused("bitfit", f"--pretrained_model_name_or_path={base}")


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_missing_weights_and_nan_are_not_trained_on(part, refused, base):
    changed = []

    def spoil(tensors):
        changed.append(min(tensors))
        tensors[changed[0]].view(-1)[0] = math.nan

    change_weights(base / part, spoil)
    assert f"{part} has weights that are not finite" in refused("lora", f"--pretrained_model_name_or_path={base}")
    change_weights(base / part, lambda tensors: tensors.pop(changed[0]))
    assert f"{part} has no weights for" in refused("unet", f"--pretrained_model_name_or_path={base}")


def test_an_inpainting_model_and_one_that_predicts_the_sample(refused, base):
    pipeline = pipeline_of(base)
    pipeline.unet = type(pipeline.unet).from_config(pipeline.unet.config, in_channels=9)
    pipeline.save_pretrained(base)
    assert "takes 9 channels" in refused("bitfit", f"--pretrained_model_name_or_path={base}")
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    assert "predicts sample" in refused("lora", f"--pretrained_model_name_or_path={base}")


def test_what_is_no_base_model_is_named(refused, base, tmp_path):
    """An adapter, an unfinished run, SDXL, a pickle, and nothing at all."""
    for name, file in {"adapter": "unet_delta.safetensors", "unfinished": "checkpoint-2", "old": "model.ckpt"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).mkdir() if name == "unfinished" else (tmp_path / name / file).write_bytes(b"")
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionXLPipeline"}))
    expected = {tmp_path / "adapter": "an adapter; pass its base model", tmp_path / "unfinished": "an unfinished run"}
    expected |= {tmp_path / "old" / "model.ckpt": "not a .safetensors file", base: "it is a StableDiffusionXLPipeline"}
    for path, words in (expected | {"runs/nothing": "neither a folder nor"}).items():
        sentence = refused("bitfit", f"--pretrained_model_name_or_path={path}")
        assert f"{path}: " in sentence and words in sentence


def test_lora_target_modules_that_do_not_exist(refused):
    assert "--lora_target_modules to_x: " in refused("lora", "--lora_target_modules=to_x")


def test_the_vaes_old_attention_names_are_not_missing_weights(base):
    """Stable Diffusion v1.5 itself is stored with the names that diffusers no longer uses."""
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}

    def rename(tensors):
        for name in [name for name in tensors if any(new in name for new in old)]:
            new = next(new for new in old if new in name)
            tensors[name.replace(new, old[new])] = tensors.pop(name)

    change_weights(base / "vae", rename)
    assert same(train_full.load_pipeline(str(base)).vae.state_dict(), pipeline_of(BASE).vae.state_dict())


def test_a_resolution_that_the_vae_cannot_take(refused):
    assert "--resolution 60 must be a multiple of 8" in refused("unet", "--resolution=60")


def test_the_base_models_own_folder(refused, base):
    flags = [f"--pretrained_model_name_or_path={base}", "--overwrite_output_dir"]
    assert "holds the base model" in refused("unet", *flags, folder="base")
    assert (base / "model_index.json").exists()


def test_a_folder_in_use_is_overwritten_only_on_request(refused, tmp_path):
    train("unet", tmp_path / "run", "--checkpointing_steps=1", steps=4)
    before = trained_weights("unet", tmp_path / "run")
    assert "already holds a run" in refused("bitfit", folder="run")
    assert same(before, trained_weights("unet", tmp_path / "run"))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train("lora", tmp_path / "run", "--overwrite_output_dir", "--checkpointing_steps=1")
    # Nothing is left of the old run, which the new one's could be confused with, and other files stay.
    kept = {"notes.txt", "checkpoint-1", "checkpoint-2"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {*kept, "README.md", "training_summary.json", "pytorch_lora_weights.safetensors"}


def test_two_runs_in_one_folder(refused, tmp_path):
    """The second is refused, even if it is to overwrite; what a killed run leaves of its lock is not in the way."""
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        assert "another run is writing to" in refused("bitfit", "--overwrite_output_dir", folder="run")
    assert (tmp_path / "run" / ".lock").exists()
    train("bitfit", tmp_path / "run", steps=1)
    assert not (tmp_path / "run" / ".lock").exists()


def test_overwriting_a_run_from_another_ones_checkpoint(tmp_path):
    train("bitfit", tmp_path / "one", "--checkpointing_steps=1")
    train("bitfit", tmp_path / "two", "--checkpointing_steps=2", steps=6)
    resume = f"--resume_from_checkpoint={tmp_path / 'one' / 'checkpoint-1'}"
    train("bitfit", tmp_path / "two", resume, "--overwrite_output_dir", "--checkpointing_steps=1", steps=3)
    assert {path.name for path in (tmp_path / "two").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_resuming_with_what_does_not_fit(refused, tmp_path, base, capsys):
    train("lora", tmp_path / "run", "--checkpointing_steps=1")
    resume = f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-1'}"
    for row in ("dora", "unet"):
        assert f"trained with method=lora, not {row}" in refused(row, resume)
    assert "trained with rank=8, not 4" in refused("lora", resume, "--rank=4")
    assert "trained with global_batch_size=2, not 4" in refused("lora", resume, "--gradient_accumulation_steps=2")
    past = f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}"
    assert "is beyond step 1" in refused("lora", past, "--max_train_steps=1")
    assert "no checkpoint there" in refused("lora", f"--resume_from_checkpoint={tmp_path}")
    # The same weights under another path are the same base; other weights are not.
    train("lora", tmp_path / "moved", resume, f"--pretrained_model_name_or_path={base}")
    change_weights(base / "unet", lambda tensors: tensors["conv_in.bias"].add_(1))
    assert "base model with other weights" in refused("lora", resume, f"--pretrained_model_name_or_path={base}")
    capsys.readouterr()
    train("lora", tmp_path / "faster", resume, "--learning_rate=3e-4")
    assert "learning_rate was 0.0001 in" in capsys.readouterr().out


def test_latest_does_not_restart_a_finished_run(refused, tmp_path):
    train("bitfit", tmp_path / "run")
    assert "already holds a run" in refused("bitfit", "--resume_from_checkpoint=latest", folder="run")
    # With its last checkpoint, a run that is finished, or was killed while it saved, ends the same again.
    flags = ["--checkpointing_steps=100", "--resume_from_checkpoint=latest"]
    loss = common.result(train("bitfit", tmp_path / "other", *flags), "train_loss")
    (tmp_path / "other" / "training_summary.json").unlink()
    assert common.result(train("bitfit", tmp_path / "other", *flags), "train_loss") == loss
    assert same(trained_weights("bitfit", tmp_path / "run"), trained_weights("bitfit", tmp_path / "other"))
