"""Bad input ends with one sentence on stderr and exit status 2, and leaves nothing half-written."""

import json
import shutil

import pytest
from accelerate.state import AcceleratorState
from common import BASE, arguments, phantoms, pipeline_of, result, script_of, train
from safetensors.torch import load_file, save_file
from test_data import picture, write_table

import train_full
import train_peft


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs a row that has to be refused; returns the sentence."""

    def run(row, *flags, csv=None, folder="refused", argv=None):
        script = script_of(row)
        capsys.readouterr()
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit) as ended:
            script.main(script.parse_args(argv or arguments(row, tmp_path / folder, *flags, csv=csv)))
        lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        assert ended.value.code == 2
        assert len(lines) == 1 and "error: " in lines[0], lines
        if folder == "refused":
            assert not (tmp_path / "refused").exists()
        return lines[0]

    return run


def small_table(tmp_path, rows=12):
    """A table whose images exist, of as many patients."""
    paths = [f"images/patient{i:05d}/1.jpg" for i in range(rows)]
    for path in paths:
        picture(tmp_path / path, (100, 100))
    return write_table(tmp_path / "t.csv", [{"Path": path, "Edema": "1"} for path in paths])


@pytest.mark.parametrize(
    "script, argv, words",
    [
        (train_full, [], "at least one of --train_unet, --train_text_encoder, --train_vae"),
        (train_peft, ["--method", "prefix"], "invalid choice: 'prefix'"),
        (train_peft, [], "--method"),
        (train_peft, ["--method", "lora", "--rank", "0"], "at least 1"),
        (train_peft, ["--method", "lora", "--gradient_accumulation_steps", "9" * 30], "less than 2**31"),
        (train_peft, ["--method", "lora", "--output_dir", "run\udcff"], "not in UTF-8"),
        (train_peft, ["--method", "lora", "--learning_rate", "nan"], "not a number of at least 0"),
        (train_peft, ["--method", "lora", "--caption_dropout", "1.5"], "not between 0 and 1"),
        (train_peft, ["--method", "lora", "--prompt_template", "no place"], "needs {} exactly once"),
        (train_peft, ["--method", "lora", "--no_such_flag"], "--no_such_flag"),
        (train_peft, ["--method", "lora", "--adam_beta2", "1"], "not below 1"),
        (train_peft, ["--method", "lora", "--split_seed", "-1"], "split_seed"),
        (train_peft, ["--method", "lora", "--resume_from_checkpoint", "nowhere"], "no checkpoint there"),
        (train_peft, ["--method", "lora", "--data_csv", "absent.csv"], "absent.csv: no such file"),
    ],
)
def test_flags(script, argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        script.parse_args([*(["--data_csv", str(phantoms())] if "absent.csv" not in argv else []), *argv])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and error.count("\n") == 1


def test_without_data_the_sentence_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train_peft.parse_args(["--method", "bitfit"])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert all(words in error for words in ("CheXpert-v1.0/train.csv", str(tmp_path), "--data_csv", "bash launch/demo.sh"))
    # With CheXpert unpacked under its own name, no flag is needed.
    write_table(tmp_path / "t.csv", [{"Path": "CheXpert-v1.0-small/train/patient00001/1.jpg", "Edema": "1"}])
    (tmp_path / "CheXpert-v1.0-small").mkdir()
    (tmp_path / "t.csv").rename(tmp_path / "CheXpert-v1.0-small" / "train.csv")
    data = train_peft.load_training_data(train_peft.parse_args(["--method", "bitfit", "--split", "all"]))
    assert data.source == "CheXpert-v1.0-small/train.csv" and len(data.train) == 1


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "the file is empty"),
        ("Path,Edema\n", "no rows below the header"),
        ("Image,Edema\na.jpg,1\n", "no path column"),
        ("Path,Oedema\na.jpg,1\n", "no label column"),
        ("Path,Edema\na.jpg,1\nb.jpg,2\n", "data row 2, column 'Edema': '2' is none of 1, 0, -1 and blank"),
        ("Path,Edema\na.jpg,1\nb.jpg,yes\n", "'yes' is none of"),
        ("Path,Edema\na.jpg,1\n,1\n", "data row 2 has no path"),
        ("Path,Edema\na.jpg,1,2,3\nb.jpg,1\n", "not a CSV"),
        (b"Path,Edema\n\xff\xfe,1\n", "not a CSV in UTF-8"),
        ("Path,Edema\npatient00001/a.jpg,0\n", "nothing left to train on of 1 rows (1 no positive label)"),
        ('Path,Edema,Frontal/Lateral\na.jpg,1,Lateral\n', "1 not frontal"),
    ],
)
def test_tables(content, words, refused, tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refused("bitfit", csv=table)
    assert words in sentence and str(table) in sentence


def test_nothing_left_after_the_split(refused, tmp_path):
    # A patient whom the hash puts into the test part.
    table = small_table(tmp_path)
    loaded = train_full.load_image_table(str(table))
    tested = loaded["patient"][train_full.assign_splits(loaded["patient"], 0) == "test"].iloc[0]
    table = write_table(tmp_path / "one.csv", [{"Path": f"images/{tested}/1.jpg", "Edema": "1"}])
    assert "1 not in split 'train'" in refused("unet", csv=table)


def test_bad_images_are_all_listed_before_training(refused, tmp_path):
    table = small_table(tmp_path)
    images = sorted((tmp_path / "images").rglob("*.jpg"))
    images[0].unlink()
    images[3].write_bytes(images[3].read_bytes()[:300])
    images[5].write_text("hello")
    sentence = refused("lora", "--split=all", csv=table)
    assert "3 of 12 images cannot be used" in sentence
    assert all(str(images[i]) in sentence for i in (0, 3, 5))


@pytest.mark.parametrize("flags", [["--latent_cache_dir=none", "--dataloader_num_workers=1"], ["--latent_cache_dir=none"], []])
def test_an_image_that_breaks_later_is_named(flags, refused, tmp_path, monkeypatch):
    table = small_table(tmp_path)
    broken = sorted((tmp_path / "images").rglob("*.jpg"))[4]
    broken.write_bytes(broken.read_bytes()[:-500])
    monkeypatch.setattr(train_peft, "check_images", lambda *_: [])
    sentence = refused("bitfit", *flags, "--split=all", "--max_train_steps=6", csv=table, folder="begun")
    assert str(broken) in sentence and "cannot be decoded" in sentence
    assert not (tmp_path / "begun" / "training_summary.json").exists()
    assert not list((tmp_path / "latent_cache").glob("*.part"))


@pytest.mark.parametrize("part", ["vae", "unet", "tokenizer", "scheduler", "text_encoder", "model_index.json"])
def test_model_folder_with_a_part_missing(part, refused, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    gone = tmp_path / "base" / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    sentence = refused("bitfit", f"--pretrained_model_name_or_path={tmp_path / 'base'}")
    assert part in sentence and str(tmp_path / "base") in sentence


def test_model_folder_without_weights_or_absent(refused, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert str(tmp_path / "base") in refused("bitfit", f"--pretrained_model_name_or_path={tmp_path / 'base'}")
    assert "no-such-folder" in refused("bitfit", "--pretrained_model_name_or_path=./no-such-folder")


@pytest.mark.parametrize(
    "part, file, changes, words",
    [
        ("tokenizer", "tokenizer_config.json", {"model_max_length": 1}, "its tokenizer's prompts are too short"),
        ("tokenizer", "tokenizer_config.json", {"model_max_length": 10**30}, "its tokenizer's prompts are too short, or longer"),
        ("tokenizer", "tokenizer_config.json", {"model_max_length": -5}, "cannot be loaded"),
        ("tokenizer", "tokenizer_config.json", {"pad_token": None}, "padding token"),
        ("vae", "config.json", {"scaling_factor": "1"}, "cannot be loaded"),
        ("unet", "config.json", {"addition_embed_type": "text"}, "unet has no weights for"),
        ("unet", "config.json", {"class_embeddings_concat": True, "class_embed_type": "identity"}, "cannot be loaded"),
    ],
)
def test_settings_of_the_base_model_that_do_not_fit_together(part, file, changes, words, refused, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    path = tmp_path / "base" / part / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    sentence = refused("lora", f"--pretrained_model_name_or_path={tmp_path / 'base'}")
    assert words in sentence and str(tmp_path / "base") in sentence


@pytest.mark.parametrize("part, config, layer", [("unet", {"in_channels": 9}, "conv_in"), ("unet", {"out_channels": 8}, "conv_out"), ("vae", {"out_channels": 1}, "decoder.conv_out")])
def test_parts_of_the_base_model_that_do_not_fit_together(part, config, layer, refused, tmp_path):
    """Each sound by itself: an inpainting U-Net, one that predicts a variance too, a VAE of grey images."""
    pipeline = pipeline_of(BASE)
    module = getattr(pipeline, part)
    other = type(module).from_config(module.config, **config)
    weights = module.state_dict()
    other.load_state_dict({name: tensor if name.startswith(f"{layer}.") else weights[name] for name, tensor in other.state_dict().items()})
    setattr(pipeline, part, other)
    pipeline.save_pretrained(tmp_path / "base")
    for row in ("unet", "bitfit"):
        assert "cannot be loaded" in refused(row, f"--pretrained_model_name_or_path={tmp_path / 'base'}")


def test_resolution_that_the_vae_cannot_take(refused):
    assert "--resolution 60: this VAE takes multiples of 8" in refused("unet", "--resolution=60")


def test_output_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = refused("unet", f"--output_dir={tmp_path / 'file' / 'run'}")
    assert "--output_dir" in sentence and "cannot be written" in sentence
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "loop" in refused("unet", f"--output_dir={tmp_path / 'loop'}")
    assert "loop" in refused("unet", f"--latent_cache_dir={tmp_path / 'loop'}")


def test_a_dataset_folder_that_no_library_can_read(refused, tmp_path):
    for name, content in (("metadata.csv", b"\0" * 100), ("README.md", b"---\nconfigs: [\n---\n")):
        folder = tmp_path / name
        picture(folder / "1.png")
        (folder / name).write_bytes(content)
        argv = arguments("lora", tmp_path / "refused", f"--dataset_name={folder}")
        assert f"--dataset_name {folder}: cannot be loaded" in refused("lora", argv=[word for word in argv if not word.startswith("--data_csv")])


def test_a_folder_with_a_run_is_not_overwritten_unasked(refused, tmp_path):
    train("bitfit", tmp_path / "run")
    before = (tmp_path / "run" / "unet_delta.safetensors").read_bytes()
    assert "already holds a run" in refused("bitfit", folder="run")
    assert (tmp_path / "run" / "unet_delta.safetensors").read_bytes() == before
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train("unet", tmp_path / "run", "--overwrite_output_dir", "--checkpointing_steps=1", steps=4)
    # Nothing of the old run is left to be taken for the new one's, and nothing else is touched.
    train("lora", tmp_path / "run", "--overwrite_output_dir", "--checkpointing_steps=1")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"notes.txt", "README.md", "training_summary.json", "pytorch_lora_weights.safetensors", "checkpoint-1", "checkpoint-2"}


def test_resuming_with_what_does_not_fit(refused, tmp_path, capsys):
    train("lora", tmp_path / "run", "--checkpointing_steps=1")
    resume = f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-1'}"
    assert "method was 'lora' and is now 'dora'" in refused("dora", resume)
    assert "method was 'lora' and is now 'unet'" in refused("unet", resume)
    assert "rank was 8 and is now 4" in refused("lora", resume, "--rank=4")
    assert "use 8bit adam" in refused("lora", resume, "--use_8bit_adam")
    past = f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-2'}"
    assert "past the 1 steps asked for" in refused("lora", past, "--max_train_steps=1")
    shutil.copytree(BASE, tmp_path / "base")
    change_weights(tmp_path / "base" / "unet", lambda tensors: tensors["conv_in.bias"].add_(1))
    assert "the base model was" in refused("lora", resume, f"--pretrained_model_name_or_path={tmp_path / 'base'}")
    capsys.readouterr()
    train("lora", tmp_path / "faster", resume, "--learning_rate=3e-4")
    assert "learning rate was 0.0001 and is now 0.0003" in capsys.readouterr().out
    # The same model under another path is the same model.
    shutil.copytree(BASE, tmp_path / "moved")
    train("lora", tmp_path / "goes_on", resume, f"--pretrained_model_name_or_path={tmp_path / 'moved'}")
    damaged = tmp_path / "run" / "checkpoint-1" / "trainable.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    assert "missing or damaged" in refused("lora", resume, folder="damaged")


def change_weights(folder, change):
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("part, name", [("unet", "conv_in.weight"), ("text_encoder", None), ("vae", "decoder.conv_out.bias")])
def test_missing_weights_are_not_made_up(part, name, refused, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    change_weights(tmp_path / "base" / part, lambda tensors: tensors.pop(name or next(n for n in tensors if "position" in n)))
    assert f"{part} has no weights for" in refused("lora", f"--pretrained_model_name_or_path={tmp_path / 'base'}")


def test_old_names_of_the_vaes_attention_are_not_missing_weights(tmp_path):
    """Stable Diffusion v1.5 itself is stored with the names that diffusers has given up since."""
    import torch

    shutil.copytree(BASE, tmp_path / "base")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [n for n in tensors if ".attentions." in n]:
            for new, before in old.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{before}.")] = tensors.pop(name)

    change_weights(tmp_path / "base" / "vae", rename)
    loaded, expected = train_full.load_pipeline(str(tmp_path / "base")).vae.state_dict(), pipeline_of(BASE).vae.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_scheduler_with_its_first_runge_kutta_steps_is_taken(tmp_path):
    """diffusers' own default of PNDM, which cannot do with fewer than four steps."""
    shutil.copytree(BASE, tmp_path / "base")
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"skip_prk_steps": False}))
    assert train_full.load_pipeline(str(tmp_path / "base")).scheduler.config.skip_prk_steps is False


def test_a_model_that_predicts_the_sample_is_refused(refused, tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    assert "'sample'; only epsilon and v_prediction" in refused("lora", f"--pretrained_model_name_or_path={tmp_path / 'base'}")


def test_folders_that_are_no_runs_are_left_alone(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint=latest"]):
        assert "README.md would be overwritten" in refused("unet", *flags, folder="mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    shutil.copytree(BASE, tmp_path / "base")
    sentence = refused("unet", f"--pretrained_model_name_or_path={tmp_path / 'base'}", "--overwrite_output_dir", folder="base")
    assert "the base model's own folder" in sentence and (tmp_path / "base" / "model_index.json").exists()


def test_latest_does_not_restart_a_finished_run(refused, tmp_path):
    train("bitfit", tmp_path / "run")
    delta = tmp_path / "run" / "unet_delta.safetensors"
    before = delta.read_bytes()
    assert "already holds a run" in refused("bitfit", "--resume_from_checkpoint=latest", folder="run")
    assert delta.read_bytes() == before
    # With its last checkpoint, a run that is finished or was killed while it saved ends the same again.
    loss = result(train("bitfit", tmp_path / "other", "--checkpointing_steps=100"), "train_loss")
    (tmp_path / "other" / "training_summary.json").unlink()
    summary = train("bitfit", tmp_path / "other", "--checkpointing_steps=100", "--resume_from_checkpoint=latest")
    # Tensors are compared, not files: safetensors writes the entries of its header in any order.
    trained, again = load_file(delta), load_file(tmp_path / "other" / "unet_delta.safetensors")
    assert trained.keys() == again.keys() and all(trained[name].equal(again[name]) for name in trained)
    assert result(summary, "train_loss") == loss


def test_going_back_to_an_earlier_checkpoint_leaves_no_later_one(tmp_path):
    flags = ["--checkpointing_steps=1", "--checkpoints_total_limit=5"]
    train("bitfit", tmp_path / "run", *flags, steps=4)
    back = f"--resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-1'}"
    train("bitfit", tmp_path / "run", *flags, back, "--learning_rate=1e-2", steps=2)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_what_no_device_here_can_do(refused, monkeypatch):
    assert "fp16 needs a GPU" in refused("lora", "--mixed_precision=fp16")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "DEEPSPEED is not supported" in refused("lora")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP is not supported" in refused("unet", "--fsdp")


def test_fsdp_says_what_it_needs(refused):
    assert "--fsdp needs several processes" in refused("unet", "--fsdp")
    for flag in ("--compile", "--use_8bit_adam"):
        assert "--fsdp goes with neither --compile nor --use_8bit_adam" in refused("unet", "--fsdp", flag)


def test_no_pickle_is_read(refused, tmp_path):
    """A base model whose weights are a pickle is refused, not unpickled."""
    import torch

    shutil.copytree(BASE, tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipeline_of(BASE).unet.state_dict(), tmp_path / "base" / "unet" / "diffusion_pytorch_model.bin")
    assert str(tmp_path / "base") in refused("bitfit", f"--pretrained_model_name_or_path={tmp_path / 'base'}")


def test_the_summary_is_complete_and_valid_json(tmp_path):
    summary = train("bitfit", tmp_path / "run")
    names = {row["metric"] for row in summary["results"]}
    assert names >= {"trainable_parameters", "seconds_per_epoch", "peak_memory_gib", "train_loss", "heldout_diffusion_start", "heldout_diffusion", "heldout_diffusion_change"}
    keys = {"metric", "label", "value", "low", "high", "n", "floor", "note"}
    assert all(row.keys() == keys and row["value"] is not None for row in summary["results"])
    assert summary["arguments"]["method"] == "bitfit" and summary["images"] > 0 and summary["steps"] == 2
    assert json.loads((tmp_path / "run" / "training_summary.json").read_text()) == summary
