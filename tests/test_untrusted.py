"""Files that somebody else made: no pickle is opened through any flag, and what is wrong with a file is said in a sentence."""

import argparse
import ast
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import os
import pickle
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from common import BASE, ROOT, arguments, phantoms, train
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import picture, write_table

import eval_downstream
import eval_generation
import sample
import train_full
import train_peft

spec = importlib.util.spec_from_file_location("report", ROOT / "launch" / "report.py")
report = importlib.util.module_from_spec(spec)
sys.modules.setdefault("report", report)
spec.loader.exec_module(report)

# Flags whose value is a name or a text, never opened. Every other flag with a text for a value is taken for a path.
NO_PATHS = {
    "image_column", "caption_column", "prompt_template", "revision", "variant", "hub_model_id", "validation_prompts", "labels", "title", "rows",
}  # fmt: skip


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_the_bomb_goes_off_where_it_is_loaded(tmp_path):
    # The one pickle that is opened on purpose, made in this line: with a dud, none of the tests below could fail.
    pickle.loads(pickle.dumps(Bomb(tmp_path / "crater")))
    assert (tmp_path / "crater").is_dir()


def write_bomb(path: Path, crater: Path, kind: str = "pickle") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch":
        torch.save({"weight": Bomb(crater)}, path)
    elif kind == "numpy":
        with path.open("wb") as file:
            np.save(file, np.array([Bomb(crater)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps({"weight": Bomb(crater)}))
    return path


WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def bombs(folder: Path, crater: Path) -> list[Path]:
    """Pickles in every disguise: files, and the folders that the scripts write or read."""
    found = [write_bomb(folder / f"file.{suffix}", crater, kind) for suffix, kind in (("safetensors", "pickle"), ("pt", "torch"), ("csv", "pickle"), ("npy", "numpy"), ("ckpt", "torch"))]
    # Pipelines: with pickles alone, with pickles under safetensors' names, and with further parts that are pickles.
    for name in ("bin", "disguised", "more"):
        found.append(folder / f"pipeline-{name}")
        shutil.copytree(BASE, found[-1])
        for part, stem in WEIGHTS.items() if name != "more" else ():
            (found[-1] / part / f"{stem}.safetensors").unlink()
            for suffix in ("bin",) if name == "bin" else ("safetensors", "bin"):
                write_bomb(found[-1] / part / f"{stem}.{suffix}", crater, "torch")
            write_bomb(found[-1] / part / "pytorch_model.bin", crater, "torch")
    index = json.loads((found[-1] / "model_index.json").read_text())
    index |= {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (found[-1] / "model_index.json").write_text(json.dumps(index))
    for part in ("image_encoder", "safety_checker"):
        (found[-1] / part).mkdir(exist_ok=True)
        (found[-1] / part / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
        write_bomb(found[-1] / part / "pytorch_model.bin", crater, "torch")
    # Runs of both kinds, with the summary of a real one.
    for name in ("pytorch_lora_weights", "unet_delta"):
        found.append(folder / f"run-{name}")
        for suffix in ("safetensors", "bin"):
            write_bomb(found[-1] / f"{name}.{suffix}", crater, "torch")
        summary = {"base_model": str(BASE), "prompt_template": "X {}", "resolution": 64, "resize_mode": "squash", "identity": {}}
        (found[-1] / "training_summary.json").write_text(json.dumps(summary))
    # A checkpoint and a classifier whose digests are right.
    found.append(folder / "checkpoint-2")
    for name in ("trainable.safetensors", "optimizer.safetensors", "state.json"):
        write_bomb(found[-1] / name, crater)
    (found[-1] / "state.json").write_text(json.dumps({"step": 2, "samples_seen": 2, "seconds": 1.0, "identity": {}, "optimizer": {}}))
    (found[-1] / "manifest.json").write_text(json.dumps({"files": {p.name: train_full.describe_file(p) for p in found[-1].iterdir()}}))
    found.append(folder / "classifier")
    weights = write_bomb(found[-1] / "model.safetensors", crater, "torch")
    (found[-1] / "classifier.json").write_text(json.dumps(classifier_spec(weights)))
    # Samples, a finished evaluation, a study.
    found.append(folder / "folder")
    for name in ("metadata.csv", "downstream_metrics.json", "settings.json", "data.pkl", "train.parquet", "runs/lora/training_summary.json", "samples/lora/metadata.csv"):
        write_bomb(found[-1] / name, crater)
    return found


def classifier_spec(weights: Path, **changes) -> dict:
    spec = {
        "arch": "resnet18", "labels": ["Edema"], "resolution": 32, "source_resolution": 64, "resize_mode": "squash", "train_on": "real",
        "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}, "thresholds": {"Edema": 0.5}, "split": {"fingerprint": "", "patients": []},
        "real_test_auroc": {}, "model_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    } | changes  # fmt: skip
    return spec | {"spec_sha256": eval_downstream.spec_digest(spec)}


def good_classifier(folder: Path, spoil=lambda path: path) -> str:
    """A classifier folder whose digests are right, also where the weights are spoilt first."""
    weights = folder / "model.safetensors"
    folder.mkdir(exist_ok=True)
    eval_downstream.save_tensors(eval_downstream.build_classifier("resnet18", 1).state_dict(), weights)
    spoil(weights)
    (folder / "classifier.json").write_text(json.dumps(classifier_spec(weights)))
    return str(folder)


def path_flags(script) -> list[str]:
    """The flags of a script whose value may be a path, from its own parser."""
    found = []

    def record(self, *args, **kwargs):
        found.extend(action.dest for action in self._actions if action.option_strings and action.nargs is None and not action.choices)
        found.extend(action.dest for action in self._actions if action.nargs == "+")
        types = {action.dest: action.type for action in self._actions}
        found[:] = [name for name in found if types[name] in (None, Path) and name not in NO_PATHS and name != "help"]
        raise RecordedError

    class RecordedError(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecordedError):
        patch.setattr(argparse.ArgumentParser, "parse_args", record)
        script.parse_args([])
    return found


def command_of(script, folder: Path) -> dict[str, str]:
    """Flags of a small run that would work, by name."""
    csv = str(phantoms())
    if script is train_peft or script is train_full:
        flags = dict(word[2:].split("=", 1) for word in arguments("lora", folder / "out", steps=1, csv=csv)[2:])
        return flags | ({"method": "lora"} if script is train_peft else {})
    if script is sample:
        return {"model": str(BASE), "images_per_label": "1", "num_inference_steps": "1", "resolution": "64", "labels": "Edema", "output_dir": str(folder / "out")}
    if script is eval_generation:
        return {"synthetic": csv, "real_csv": csv, "features": str(folder / "good"), "max_per_label": "4", "num_subsamples": "1", "output_dir": str(folder / "out"), "labels": "Edema"}
    if script is eval_downstream:
        small = {"arch": "resnet18", "weights": "none", "resolution": "32", "num_train_epochs": "1", "num_seeds": "1", "bootstrap_samples": "10", "labels": "Edema", "num_train_images": "4"}
        return small | {"synthetic": csv, "real_csv": csv, "output_dir": str(folder / "out")}
    return {"study": str(folder / "study"), "output_dir": str(folder / "out")}


def run(script, flags: dict[str, str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    script.main(script.parse_args([*argv, *(["--train_unet"] if script is train_full else [])]))


@pytest.mark.parametrize("script", [train_full, train_peft, sample, eval_generation, eval_downstream, report], ids=lambda script: script.__name__)
def test_no_pickle_is_opened_through_any_flag(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    crater, flags = tmp_path / "crater", path_flags(script)
    assert len(flags) >= 4 and "output_dir" in flags
    good_classifier(tmp_path / "good")
    (tmp_path / "study").mkdir()
    disguises = bombs(tmp_path / "bombs", crater)
    for flag in flags:
        refusals = 0
        for bomb in disguises:
            if bomb.name.startswith(("pipeline", "run")) and flag.endswith(("csv", "root")):
                continue
            command = command_of(script, tmp_path)
            if flag == "like_csv":
                command.pop("labels")
            if flag == "base_model":
                (tmp_path / "adapter").mkdir(exist_ok=True)
                save_file({"conv_in.bias": torch.zeros(32)}, tmp_path / "adapter" / "unet_delta.safetensors")
                command["model"] = str(tmp_path / "adapter")
            if flag == "dataset_name":
                command.pop("data_csv")
            if flag == "classifier" and script is eval_downstream:
                command = {name: value for name, value in command.items() if name not in ("synthetic", "labels")}
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            try:
                run(script, command | {flag: str(bomb)})
            except SystemExit as ended:
                error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
                assert ended.code == 2 and len(error) == 1, (flag, bomb.name, error)
                refusals += 1
            assert not crater.exists(), f"--{flag} {bomb.name} was unpickled"
        assert refusals, f"--{flag} took everything"


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path, capsys):
    disguises = {path.name: path for path in bombs(tmp_path, tmp_path / "crater")}
    for script, flag, name in (
        (train_peft, "pretrained_model_name_or_path", "pipeline-bin"), (sample, "model", "pipeline-bin"), (sample, "model", "file.ckpt"),
        (eval_generation, "vae", "pipeline-bin"), (eval_generation, "features", "file.pt"), (eval_downstream, "weights", "file.pt"),
    ):  # fmt: skip
        good_classifier(tmp_path / "good")
        with pytest.raises(SystemExit) as ended:
            run(script, command_of(script, tmp_path) | {flag: str(disguises[name])})
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert ended.value.code == 2 and "python -c" in error, error
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("script", [train_full, train_peft, sample, eval_generation], ids=lambda script: script.__name__)
def test_an_index_of_shards_names_no_pickle(script, part, tmp_path, capsys):
    """Even harmless tensors in one: what the libraries take for unpickling is nothing to rely on."""
    if script is eval_generation and part != "vae":
        return
    shutil.copytree(BASE, tmp_path / "base")
    weights = tmp_path / "base" / part / f"{WEIGHTS[part]}.safetensors"
    tensors = load_file(weights)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, f"{WEIGHTS[part]}-00001-of-00001.safetensors")}
    good_classifier(tmp_path / "good")
    flag = {sample: "model", eval_generation: "vae"}.get(script, "pretrained_model_name_or_path")
    flags = command_of(script, tmp_path) | {flag: str(tmp_path / "base")}
    weights.rename(weights.with_name(f"{weights.stem}-00001-of-00001.safetensors"))
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    if script is sample:
        run(script, flags | {"output_dir": str(tmp_path / "of_shards")})
    index["weight_map"] = dict.fromkeys(tensors, "weights.bin")
    torch.save(tensors, weights.with_name("weights.bin"))
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    sentence = said(capsys, script, flags)
    assert str(tmp_path / "base") in sentence and "pickles are not read" in sentence and not (tmp_path / "out").exists()
    assert torch.load(weights.with_name("weights.bin"), weights_only=True).keys() == tensors.keys()


@pytest.mark.parametrize("name", ["plain", "it's", 'a"b', "$(touch crater)", "x');import os;os.mkdir('crater')#", "`touch crater`\\"])
def test_the_command_that_converts_an_adapter_does_that_and_nothing_else(name, tmp_path, capsys):
    """Whatever its folder is called: the command is made to be pasted into a shell."""
    tensors = {"weight": torch.arange(4.0)}
    (tmp_path / name).mkdir()
    torch.save(tensors, tmp_path / name / "pytorch_lora_weights.bin")
    error = said(capsys, sample, command_of(sample, tmp_path) | {"model": str(tmp_path / name)})
    assert "neither a finished run nor a pipeline" in error
    subprocess.run(["bash", "-c", error[error.index("python -c") :]], check=True, cwd=tmp_path)
    assert load_file(tmp_path / name / "pytorch_lora_weights.safetensors")["weight"].equal(tensors["weight"])
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize("name", ["it's", 'a"b', "$(touch crater)"])
def test_the_command_that_converts_a_pipeline_names_it_whatever_its_name(name, tmp_path):
    shutil.copytree(BASE, tmp_path / name)
    torch.save({}, tmp_path / name / "unet" / "diffusion_pytorch_model.bin")
    advice = train_full.pickle_advice(str(tmp_path / name))
    words = shlex.split(advice[advice.index("python -c") :])
    assert len(words) == 3 and str(tmp_path / name) in [node.value for node in ast.walk(ast.parse(words[2])) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize("script", [train_peft, sample], ids=lambda script: script.__name__)
def test_no_code_of_a_model_folder_runs(script, tmp_path, capsys, monkeypatch):
    """Modules beside the weights, named where diffusers' own loader would look for them, and in the working folder."""
    monkeypatch.chdir(tmp_path)
    flag = "model" if script is sample else "pretrained_model_name_or_path"
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'crater')!r}).mkdir()\nfrom diffusers import {{}} as Evil\n"
    shutil.copytree(BASE, tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    for folder, name in ((".", "StableDiffusionPipeline"), ("base", "StableDiffusionPipeline"), ("base/scheduler", "DDPMScheduler"), ("base/unet", "UNet2DConditionModel")):
        (tmp_path / folder / "evil.py").write_text(code.format(name))
    index |= {"_class_name": ["evil", "Evil"], "unet": ["evil", "Evil"]}
    config = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "evil"}))
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    run(script, command_of(script, tmp_path) | {flag: str(tmp_path / "base")})
    for name in (["evil", "Evil"], ["diffusers", "StableDiffusionPipeline"], ["diffusers", "logging"], ["evil", ["evil"]]):
        (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"scheduler": name}))
        assert "no scheduler of diffusers" in said(capsys, script, command_of(script, tmp_path) | {flag: str(tmp_path / "base"), "output_dir": str(tmp_path / "other")})
    shutil.copytree(BASE, tmp_path / "adapted")
    (tmp_path / "adapted" / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    assert "has an adapter" in said(capsys, script, command_of(script, tmp_path) | {flag: str(tmp_path / "adapted"), "output_dir": str(tmp_path / "other")})
    assert not (tmp_path / "crater").exists() and not (tmp_path / "other").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors and JSON
# ----------------------------------------------------------------------------------------------------------------------


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def long_header(path: Path) -> None:
    """A header of 200 MB that is there."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200 << 20))
        file.truncate(8 + (200 << 20))


def outside(path: Path) -> None:
    """A tensor whose bytes would lie beyond the end of the file."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"")


BROKEN = {"huge header": huge_header, "long header": long_header, "outside": outside, "zip": a_zip, "empty": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("{}")}
CHANGED = {
    "wrong shape": lambda tensors: tensors.update({name: torch.zeros(3, 5, 7) for name in [n for n in tensors if tensors[n].is_floating_point()][:1]}),
    "not finite": lambda tensors: next(tensor for tensor in tensors.values() if tensor.is_floating_point()).fill_(float("inf")),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for method in ("lora", "difffit"):
        train(method, folder / method, "--checkpointing_steps=2")
    return folder


def said(capsys, script, flags) -> str:
    """The one sentence that a script refuses its flags with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(script, flags)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert ended.value.code == 2 and len(lines) == 1 and "error: " in lines[0], lines
    return lines[0]


@pytest.mark.parametrize("how", [*BROKEN, *CHANGED])
def test_broken_weights_are_refused_wherever_they_come_from(how, adapters, tmp_path, capsys):
    def spoil(path: Path) -> Path:
        if how in BROKEN:
            BROKEN[how](path)
        else:
            tensors = load_file(path)
            CHANGED[how](tensors)
            save_file(tensors, path, metadata={"format": "pt"})
        return path

    shutil.copytree(BASE, tmp_path / "base")
    spoil(next((tmp_path / "base" / "vae").glob("*.safetensors")))
    assert str(tmp_path / "base") in said(capsys, train_peft, command_of(train_peft, tmp_path) | {"pretrained_model_name_or_path": str(tmp_path / "base")})
    for method in ("lora", "difffit"):
        shutil.copytree(adapters / method, tmp_path / method)
        spoil(next((tmp_path / method).glob("*.safetensors")))
        assert "cannot be loaded" in said(capsys, sample, command_of(sample, tmp_path) | {"model": str(tmp_path / method)})
    flags = {"classifier": good_classifier(tmp_path / "classifier", spoil), "real_csv": str(phantoms()), "output_dir": str(tmp_path / "out")}
    assert "does not match classifier.json" in said(capsys, eval_downstream, flags)
    weights = tmp_path / "classifier" / "model.safetensors"
    assert str(weights) in said(capsys, eval_downstream, command_of(eval_downstream, tmp_path) | {"weights": str(weights)})
    assert "torchxrayvision's DenseNet-121" in said(capsys, eval_generation, command_of(eval_generation, tmp_path) | {"features": str(weights)})
    assert "no VAE can be loaded" in said(capsys, eval_generation, command_of(eval_generation, tmp_path) | {"features": good_classifier(tmp_path / "sound"), "vae": str(tmp_path / "base")})
    # A checkpoint whose manifest was made to fit.
    shutil.copytree(adapters / "lora" / "checkpoint-2", tmp_path / "checkpoint-2")
    spoil(tmp_path / "checkpoint-2" / "trainable.safetensors")
    names = [path for path in (tmp_path / "checkpoint-2").iterdir() if path.name != "manifest.json"]
    (tmp_path / "checkpoint-2" / "manifest.json").write_text(json.dumps({"files": {path.name: train_full.describe_file(path) for path in names}}))
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2"), "max_train_steps": "3"}
    assert str(tmp_path / "checkpoint-2") in said(capsys, train_peft, command_of(train_peft, tmp_path) | resume)


@pytest.mark.parametrize("content", ["[]", "null", "7", '"text"', "{", "{}", '{"base_model": 3}', "[" * 100_000, "\xff"], ids=lambda text: text[:12])
def test_json_of_another_form_is_refused(content, adapters, tmp_path, capsys):
    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("latin-1"))

    shutil.copytree(adapters / "lora", tmp_path / "lora")
    put(tmp_path / "lora" / "training_summary.json")
    assert "training_summary.json" in said(capsys, sample, command_of(sample, tmp_path) | {"model": str(tmp_path / "lora")})
    good_classifier(tmp_path / "sound")
    put(tmp_path / "sound" / "classifier.json")
    flags = {"classifier": str(tmp_path / "sound"), "real_csv": str(phantoms()), "output_dir": str(tmp_path / "out")}
    assert "classifier.json" in said(capsys, eval_downstream, flags)
    assert "classifier.json" in said(capsys, eval_generation, command_of(eval_generation, tmp_path) | {"features": str(tmp_path / "sound")})
    vae = {"features": good_classifier(tmp_path / "good"), "vae": str(tmp_path / "lora")}
    assert "training_summary.json" in said(capsys, eval_generation, command_of(eval_generation, tmp_path) | vae)
    put(tmp_path / "reference" / "downstream_metrics.json")
    assert "no finished run" in said(capsys, eval_downstream, command_of(eval_downstream, tmp_path) | {"reference": str(tmp_path / "reference")})
    save_file({"weight": torch.zeros(1)}, tmp_path / "progress.safetensors", {"notes": content})
    with pytest.raises(SystemExit) as ended:
        eval_downstream.load_tensors(tmp_path / "progress.safetensors", "delete it")
    assert ended.value.code == 2 and "progress.safetensors: damaged" in capsys.readouterr().err
    for name in ("runs/lora/training_summary.json", "evaluations/lora/generation_metrics.json", "downstream/lora/downstream_metrics.json"):
        put(tmp_path / "study" / name)
        assert name in said(capsys, report, {"study": str(tmp_path / "study"), "output_dir": str(tmp_path / "out")})
        (tmp_path / "study" / name).unlink()
    checkpoint = tmp_path / "lora" / "checkpoint-2"
    put(checkpoint / "state.json")
    names = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {path.name: train_full.describe_file(path) for path in names}}))
    assert "state.json" in said(capsys, train_peft, command_of(train_peft, tmp_path) | {"resume_from_checkpoint": str(checkpoint)})
    put(checkpoint / "manifest.json")
    for script in (train_full, train_peft):
        assert "missing or damaged" in said(capsys, script, command_of(script, tmp_path) | {"resume_from_checkpoint": str(checkpoint)})
    put(tmp_path / "samples" / "sampling.json")
    if content not in ("{}", '{"base_model": 3}'):
        assert "sampling.json" in said(capsys, sample, command_of(sample, tmp_path) | {"output_dir": str(tmp_path / "samples")})


PART_FILES = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("name", PART_FILES)
def test_a_model_whose_json_is_of_another_form_is_refused_or_loads(name, tmp_path, capsys):
    """Whatever the libraries raise, it comes out as a sentence."""
    shutil.copytree(BASE, tmp_path / "base")
    path, refusals = next((p for p in (tmp_path / "base" / name, tmp_path / "base" / "tokenizer" / "tokenizer.json") if p.exists())), 0
    whole = json.loads(path.read_text())
    fields = [whole | {field: value} for field in list(whole)[:12] for value in ("evil", [7], {"a": None})]
    for content in ([], None, 7, "text", {"a": 1}, *fields):
        path.write_text(json.dumps(content))
        try:
            train_peft.load_base_pipeline(train_peft.parse_args(arguments("lora", tmp_path / "run", f"--pretrained_model_name_or_path={tmp_path / 'base'}")))
        except SystemExit as ended:
            lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
            assert ended.code == 2 and len(lines) == 1 and str(tmp_path / "base") in lines[0], lines
            refusals += 1
    assert refusals >= 3


def test_half_a_character_is_refused_before_it_has_to_be_written(adapters, tmp_path, capsys):
    shutil.copytree(adapters / "lora", tmp_path / "lora")
    path = tmp_path / "lora" / "training_summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompt_template": "a\ud800 {}"}))
    assert "surrogates not allowed" in said(capsys, sample, command_of(sample, tmp_path) | {"model": str(tmp_path / "lora")})
    assert not (tmp_path / "out").exists()


def test_no_field_of_a_file_leads_out_of_the_output_folder(adapters, tmp_path):
    """Labels and conditions are of a fixed list, and what a run's files say is used for no name."""
    shutil.copytree(adapters / "lora", tmp_path / "lora")
    path = tmp_path / "lora" / "training_summary.json"
    evil = {"prompt_template": "../../evil {}", "resize_mode": "../../evil", "method": "../../evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    (tmp_path / "in" / "here").mkdir(parents=True)
    run(sample, command_of(sample, tmp_path) | {"model": str(tmp_path / "lora"), "output_dir": str(tmp_path / "in" / "here" / "out")})
    assert not list(tmp_path.rglob("*evil*"))
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"here"} and {path.name for path in (tmp_path / "in" / "here").iterdir()} == {"out"}


# ----------------------------------------------------------------------------------------------------------------------
# Tables and images
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_in_every_dress(line_end, mark, tmp_path):
    """BOM, CRLF, quotes and line ends in cells, doubled, absolute and climbing paths, names in Unicode: the rows as they are."""
    names = ["a b.png", "ü/ß-日本-😀.png", 'quo"te, comma.png', "two\nlines.png", "a b.png", "../up/c.png", str(tmp_path / "absolute.png")]
    for name in names:
        picture(tmp_path / "data" / name)
    lines = [",".join(["Path", "Edema"]), *(f'"{name.replace(chr(34), chr(34) * 2)}",1.0' for name in names)]
    (tmp_path / "data" / "t.csv").write_bytes((mark + line_end.join(lines) + line_end).encode())
    table = train_full.load_image_table(str(tmp_path / "data" / "t.csv"))
    assert list(table["name"]) == names and (table["Edema"] == 1).all()
    assert all(Path(image).is_file() for image in table["image"]) and not any(map(train_full.image_problem, table["image"]))
    assert len(table) == 7 and table["image"].nunique() == 6


def test_what_only_looks_like_a_table_or_a_path(tmp_path, capsys):
    """An archive is not opened, and a name longer than any file's is a missing image."""
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as file:
        file.writestr("t.csv", "Path,Edema\na.jpg,1\n")
    for suffix in ("zip", "gz", "xz", "bz2"):
        (tmp_path / f"t.{suffix}").write_bytes((tmp_path / "t.zip").read_bytes())
        assert f"t.{suffix}" in said(capsys, train_peft, command_of(train_peft, tmp_path) | {"data_csv": str(tmp_path / f"t.{suffix}")})
    (tmp_path / "t.csv").write_text(f"Path,Edema\n{'x' * 5000}.jpg,1\n")
    assert "1 of 1 images cannot be used" in said(capsys, train_peft, command_of(train_peft, tmp_path) | {"data_csv": str(tmp_path / "t.csv"), "split": "all"})
    for flag in ("data_csv", "image_root", "resume_from_checkpoint"):
        assert f"--{flag}" in said(capsys, train_peft, command_of(train_peft, tmp_path) | {flag: "x" * 5000})


def test_a_table_of_a_million_rows(tmp_path):
    rows = 1_000_000
    (tmp_path / "t.csv").write_text("Path,Edema,No Finding\n" + "".join(f"patient{i // 4:06d}/s/{i % 4}.jpg,{i % 2}.0,\n" for i in range(rows)))
    table = train_full.load_image_table(str(tmp_path / "t.csv"))
    assert len(table) == rows and table["Edema"].sum() == rows // 2 and table["patient"].nunique() == rows // 4
    splits = train_full.assign_splits(table["patient"], 0)
    assert splits.value_counts(normalize=True)["train"] == pytest.approx(train_full.SPLIT_FRACTIONS["train"], abs=0.01)


CELLS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(str.strip).filter(bool)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(CELLS, st.sampled_from(["", "1", "1.0", "0", "0.0", "-1", "-1.0"]), CELLS, st.sampled_from(["Frontal", "Lateral", "frontal "])), min_size=1, max_size=12),
    line_end=st.sampled_from(["\n", "\r\n"]), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), mark=st.booleans(),
)  # fmt: skip
def test_any_table_is_read_as_it_was_written(rows, line_end, quoting, mark, tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as file:
        writer = csv.writer(file, lineterminator=line_end, quoting=quoting)
        writer.writerows([("Path", "Edema", "prompt", "Frontal/Lateral"), *rows])
    table = train_full.load_image_table(str(path))
    assert list(table["name"]) == [row[0] for row in rows] and list(table["prompt"]) == [row[2] for row in rows]
    assert [None if np.isnan(value) else value for value in table["Edema"]] == [float(row[1]) if row[1] else None for row in rows]
    assert list(table["frontal"]) == [row[3].strip().lower() == "frontal" for row in rows]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.one_of(st.binary(max_size=200), st.text('Path,file_nameEdma1.0-"\r\n\t \0;\ufeff/', max_size=120).map(lambda text: ("Path,Edema\n" + text).encode())))
def test_any_other_bytes_are_a_table_or_a_sentence(content, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            table = train_full.load_image_table(str(path))
            assert len(table) and (table["name"] != "").all()
        except SystemExit as ended:
            assert ended.code == 2 and said.getvalue().count("\n") == 1 and str(path) in said.getvalue()


def write_deep_png(path: Path, colour_type: int, channels: int) -> None:
    """4x4 pixels of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = zlib.compress((b"\0" + b"\x12\x34" * channels * 4) * 4)
    header = struct.pack(">2I5B", 4, 4, 16, colour_type, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def write_planar_tiff(path: Path) -> None:
    """4x4 pixels of 16 bits, red, green and blue one after the other, of which Pillow takes each plane for one of 8 bits."""
    lists, at = {258: (16, 16, 16), 273: (0, 32, 64), 279: (32, 32, 32)}, 8 + 2 + 10 * 12 + 4
    entries, extra = [], b""
    for tag, value in sorted(({256: 4, 257: 4, 259: 1, 262: 2, 277: 3, 278: 4, 284: 2} | lists).items()):
        if tag in lists:
            numbers = [number + at + 24 + 12 for number in value] if tag == 273 else value
            entries.append(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 3, at + len(extra)))
            extra += struct.pack("<3I" if tag == 273 else "<3H", *numbers)
        else:
            entries.append(struct.pack("<HHIHH", tag, 3, 1, value, 0))
    extra = extra.ljust(36, b"\0")
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 10) + b"".join(entries) + struct.pack("<I", 0) + extra + b"\x34\x12" * 48)


def test_images_of_every_kind(tmp_path):
    """What is a still 8-bit image is read; anything else is refused with a sentence on what to do."""
    noise = Image.effect_noise((40, 30), 60)
    fine = {
        "one.png": Image.new("L", (1, 1), 200), "cmyk.jpg": noise.convert("CMYK"), "palette.png": noise.convert("P"), "alpha.png": noise.convert("RGBA"),
        "grey_alpha.png": noise.convert("LA"), "bits.png": noise.convert("1"), "wide.png": Image.new("L", (9000, 1)),
    }  # fmt: skip
    for name, image in fine.items():
        image.save(tmp_path / name)
        assert train_full.image_problem(str(tmp_path / name), decode=True) is None
        assert train_full.load_image(str(tmp_path / name), 16, "pad").shape == (16, 16, 3)
    upright = Image.fromarray(np.repeat([[255] * 10 + [0] * 30], 20, axis=0).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    upright.save(tmp_path / "turned.png", exif=exif)
    turned = train_full.load_image(str(tmp_path / "turned.png"), 16, "squash")
    assert turned[:, -3:].min() > 200 and turned[:, :8].max() < 20
    for name, image, words in (
        ("deep.png", Image.fromarray(np.zeros((4, 4), np.uint16)), "type I;16; convert it to 8 bits"), ("float.tif", Image.fromarray(np.zeros((4, 4), np.float32)), "8 bits"),
    ):  # fmt: skip
        image.save(tmp_path / name)
        assert words in train_full.image_problem(str(tmp_path / name))
    for name, colour_type, channels, words in (("deep_colour.png", 2, 3, "of 16 bits"), ("deep_alpha.png", 4, 2, "of 16 bits")):
        write_deep_png(tmp_path / name, colour_type, channels)
        assert f"{words}; convert it to 8 bits" in train_full.image_problem(str(tmp_path / name))
    write_planar_tiff(tmp_path / "planar.tif")
    assert "type RGB of 16 bits" in train_full.image_problem(str(tmp_path / "planar.tif"))
    # Pillow would hand it to Ghostscript.
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n")
    assert "not a readable image (UnidentifiedImageError)" in train_full.image_problem(str(tmp_path / "program.png"), decode=True)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        assert "not a file" in train_full.image_problem(str(tmp_path / name))
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames = [Image.new("RGB", (4, 4), value) for value in ("black", "white")]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert "2 frames" in train_full.image_problem(str(tmp_path / name))
    # What Pillow's readers raise on these is neither an OSError nor a ValueError.
    size = struct.pack("<7I", 124, 0x1007, 4, 4, 0, 0, 0)
    (tmp_path / "unknown.dds").write_bytes(b"DDS " + size + b"\0" * 44 + struct.pack("<II4s10I", 32, 4, b"ZZZZ", *[0] * 10))
    (tmp_path / "empty.tif").write_bytes(b"II*\0" + struct.pack("<IHI", 8, 0, 0))
    for name in ("unknown.dds", "empty.tif"):
        assert "not a readable image" in train_full.image_problem(str(tmp_path / name))
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert "decompression bomb" in train_full.image_problem(str(tmp_path / "bomb.png"))
    for kind in ("png", "jpg"):
        write_bomb(tmp_path / f"pickle.{kind}", tmp_path / "crater")
        assert "not a readable image" in train_full.image_problem(str(tmp_path / f"pickle.{kind}"))
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize("script", ["train_peft", "eval_generation", "eval_downstream"])
def test_a_decompression_bomb_ends_every_script_with_a_sentence(script, tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / f"images/patient{i:05d}/1.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "images/patient00003/1.png")
    table = write_table(tmp_path / "t.csv", [{"Path": f"images/patient{i:05d}/1.png", "Edema": str(i % 2 * 1.0)} for i in range(20)])
    module = sys.modules[script]
    flags = command_of(module, tmp_path)
    if script == "train_peft":
        flags |= {"data_csv": str(table), "split": "all"}
    elif script == "eval_generation":
        flags |= {"synthetic": str(table), "real_csv": str(table), "real_split": "all", "features": good_classifier(tmp_path / "sound"), "max_per_label": "50", "uncertain": "ones"}
    else:
        flags |= {"real_csv": str(table), "train_on": "real", "synthetic": str(table), "test_csv": str(table)}
        flags.pop("num_train_images")
    sentence = said(capsys, module, flags)
    assert "decompression bomb" in sentence and "patient00003" in sentence and "--on_bad_image skip" in sentence
