"""What a LoRA or DoRA of both models leaves, other readers of it, going on from an adapter, and single-file bases."""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import BASE, PEFT_ROWS, ROOT, change_weights, draw, phantoms, pipeline_of, same, train, weights_of
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import sample
import train_full
import train_peft

FLAGS = ["--train_text_encoder", "--rank=4", "--lora_alpha=16", "--learning_rate=1e-2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train LoRA and DoRA of both models, at a scale of 4."""
    folders = {method: tmp_path_factory.mktemp("both") / method for method in ("lora", "dora")}
    for method, folder in folders.items():
        train(method, folder, *FLAGS, "--save_merged", "--save_kohya", "--checkpointing_steps=100")
    return folders


@pytest.mark.parametrize("method, count", [("lora", 589_824), ("dora", 626_688)])
def test_parameter_counts_of_the_text_encoder(method, count, monkeypatch):
    """In each of 12 layers, 4 projections of 768x768: rank 8 times 1,536, and 768 magnitudes."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    import benchmark

    args = train_peft.parse_args(["--method", method, "--train_text_encoder", f"--data_csv={phantoms()}"])
    with torch.device("meta"):
        parts = {"unet": UNet2DConditionModel(**benchmark.UNET), "vae": AutoencoderKL(**benchmark.VAE)}
        parts["text_encoder"] = CLIPTextModel(CLIPTextConfig(**benchmark.TEXT_ENCODER))
        pipeline = SimpleNamespace(**parts, scheduler=DDPMScheduler())
        train_peft.build_loss(args, pipeline, SimpleNamespace(has_embeddings=False), {"mixed_precision": "no"})
    assert sum(p.numel() for p in pipeline.text_encoder.parameters() if p.requires_grad) == count


def test_exactly_the_attention_projections_of_both_models_change(runs):
    base = weights_of(pipeline_of(BASE))
    projections = re.compile(r".*\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)\.weight")
    expected = {name for name in base if projections.fullmatch(name) and not name.startswith("vae.")}
    for folder in runs.values():
        merged = weights_of(pipeline_of(folder / "merged"))
        assert {name for name in base if not torch.equal(base[name], merged[name])} == expected


# The card's own code, run in a fresh process.
LOAD = """
import json, re, sys
sys.path[:0] = sys.argv[1:3]
import numpy, common
for run in sys.argv[3:]:
    exec(re.search("```python(.*?)```", open(f"{run}/README.md").read(), re.DOTALL)[1])
    pipe.set_progress_bar_config(disable=True)
    numpy.save(f"{run}/images.npy", common.draw(pipe))
"""


def test_adapters_of_both_models_load_in_a_fresh_process_and_equal_the_merged_pipelines(runs):
    command = [sys.executable, "-c", LOAD, ROOT, ROOT / "tests", *runs.values()]
    subprocess.run([*map(str, command)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    base = draw(pipeline_of(BASE))
    for method, folder in runs.items():
        merged = draw(pipeline_of(folder / "merged"))
        assert abs(merged - base).max() > 1e-2
        assert abs(np.load(folder / "images.npy") - merged).max() < 1e-6, method
        for model in (folder, *folder.glob("checkpoint-*")):
            pipeline, _ = sample.load_model(sample.parse_args([f"--model={model}"]), sample.read_summary(model))
            assert abs(draw(pipeline) - merged).max() < 1e-5, model


def merge_as_other_readers_do(pipeline, tensors):
    """Merge a file in kohya's form by the rules of ComfyUI, AUTOMATIC1111 and kohya's scripts; return unknown keys.

    A layer is lora_unet_ or lora_te_text_model_ and its module's name with underscores. Its update is up @ down *
    alpha / rank (alpha is the rank if it is missing), or diff, which kohya's scripts do not read.
    """
    known = set()
    for prefix, model in (("lora_unet_", pipeline.unet), ("lora_te_text_model_", pipeline.text_encoder)):
        for name, module in model.named_modules():
            layer = prefix + name.removeprefix("text_model.").replace(".", "_")
            if f"{layer}.diff" in tensors:
                module.weight.data += tensors[f"{layer}.diff"]
            elif f"{layer}.lora_up.weight" in tensors:
                up, down = (tensors[f"{layer}.lora_{kind}.weight"] for kind in ("up", "down"))
                alpha = tensors.get(f"{layer}.alpha", torch.tensor(float(len(down)))).item()
                update = up.flatten(1) @ down.flatten(1) * (alpha / len(down))
                module.weight.data += update.reshape(module.weight.shape)
            known |= {f"{layer}.{kind}" for kind in ("diff", "alpha", "lora_up.weight", "lora_down.weight")}
    return tensors.keys() - known


def assert_other_readers_agree(folder):
    pipeline, tensors = pipeline_of(BASE), load_file(folder / "lora_kohya.safetensors")
    assert tensors and not merge_as_other_readers_do(pipeline, tensors)
    merged = weights_of(pipeline_of(folder / "merged"))
    assert all((merged[name] - weight).abs().max() < 1e-5 for name, weight in weights_of(pipeline).items())


def test_other_readers_find_every_key_and_merge_to_the_same_weights(runs):
    for folder in runs.values():
        assert_other_readers_agree(folder)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_other_modules_and_a_fractional_alpha(method, tmp_path):
    """A convolution and a linear layer; loaded as merged, and by other readers."""
    flags = ["--lora_target_modules", "proj_in", "ff.net.2", "--lora_alpha=2.5", "--save_merged", "--save_kohya"]
    train(method, tmp_path / "run", *flags, "--learning_rate=1e-2")
    base, merged = weights_of(pipeline_of(BASE)), weights_of(pipeline_of(tmp_path / "run" / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if re.search(r"^unet.*(proj_in|ff\.net\.2)\.weight$", name)}
    assert_other_readers_agree(tmp_path / "run")


@pytest.mark.parametrize("method", PEFT_ROWS)
def test_a_run_goes_on_from_an_adapter(method, tmp_path, capsys):
    """With another alpha, nothing changes until a step is taken."""
    flags = ["--save_merged", *(FLAGS if method in ("lora", "dora") else ["--learning_rate=1e-2"])]
    train(method, tmp_path / "one", *flags)
    init = [*flags, f"--init_from={tmp_path / 'one'}"]
    summary = train(method, tmp_path / "two", *init, "--lora_alpha=3", "--learning_rate=0", steps=1)
    assert summary["steps"] == 1 and summary["identity"]["init_from"] == str(tmp_path / "one")
    one, two = (weights_of(pipeline_of(tmp_path / run / "merged")) for run in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-7) for name in one)
    base = shutil.copytree(BASE, tmp_path / "base")
    change_weights(base / "vae", lambda tensors: tensors["encoder.conv_in.bias"].add_(1))
    refusals = {f"--pretrained_model_name_or_path={base}": "base model with other weights"}
    if method == "lora":
        refusals |= {"--rank=8": "has rank=4, not 8", "--method=dora": "has method=lora, not dora"}
        refusals |= {f"--init_from={base}": "no training_summary.json there"}
        refusals |= {f"--output_dir={tmp_path / 'one'}": "--init_from is the run in --output_dir"}
    for flag, words in refusals.items():
        with pytest.raises(SystemExit) as ended:
            train(method, tmp_path / "three", *init, flag)
        assert ended.value.code == 2 and words in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Single files
# ---------------------------------------------------------------------------------------------------------------------

# Names of modules in such files, by diffusers' names; of the demo's model, with one layer in each block.
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
}
UNET |= {"conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.attentions.0": "middle_block.1"}
UNET |= {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
VAE = {
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
}
for i in range(4):
    UNET |= {
        f"down_blocks.{i}.{kind}.0": f"input_blocks.{2 * i + 1}.{k}"
        for k, kind in enumerate(("resnets", "attentions"))
    }
    UNET[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{2 * i + 2}.0.op"
    UNET[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{2 * i + 1}.{2 if i else 1}"
    VAE |= {
        f"down_blocks.{i}.downsamplers.0": f"down.{i}.downsample",
        f"up_blocks.{i}.upsamplers.0": f"up.{3 - i}.upsample",
    }
    VAE[f"down_blocks.{i}.resnets.0"] = f"down.{i}.block.0"
    for j in range(2):
        UNET |= {f"up_blocks.{i}.resnets.{j}": f"output_blocks.{2 * i + j}.0"}
        UNET |= {f"up_blocks.{i}.attentions.{j}": f"output_blocks.{2 * i + j}.1"}
        VAE[f"up_blocks.{i}.resnets.{j}"] = f"up.{3 - i}.block.{j}"
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
}
UNET_RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_PARTS = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
VAE_PARTS |= {"to_out.0": "proj_out", "conv_norm_out": "norm_out"}


def rename(name, table):
    return next((name.replace(key, table[key], 1) for key in table if f".{key}." in f".{name}"), name)


def write_single_file(path):
    """Write the demo's base model as a single file, with its configurations and tokenizer beside it."""
    pipeline, tensors = pipeline_of(BASE), {}
    for name, tensor in pipeline.unet.state_dict().items():
        renamed = rename(name, UNET)
        tensors[f"model.diffusion_model.{rename(renamed, UNET_RESNET) if '.resnets.' in name else renamed}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        renamed = rename(rename(name, VAE), VAE_PARTS)
        is_attention = "attentions" in name and tensor.ndim == 2
        tensors[f"first_stage_model.{renamed}"] = tensor[:, :, None, None] if is_attention else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    shutil.copytree(BASE, path.parent, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@pytest.fixture
def single_file(tmp_path):
    write_single_file(tmp_path / "single" / "model.safetensors")
    return tmp_path / "single" / "model.safetensors"


def test_a_single_file_is_a_base_model(single_file, tmp_path, capsys):
    assert same(weights_of(train_full.load_pipeline(single_file)), weights_of(pipeline_of(BASE)))
    base = f"--pretrained_model_name_or_path={single_file}"
    assert train("lora", tmp_path / "run", base, steps=1)["base_model"] == str(single_file)
    assert f'from_single_file("{single_file}"' in (tmp_path / "run" / "README.md").read_text()
    assert train("unet", tmp_path / "full", base, steps=1)["steps"] == 1
    pipeline, _ = sample.load_model(sample.parse_args([f"--model={single_file}"]), {})
    assert same(weights_of(pipeline), weights_of(pipeline_of(BASE)))
    (single_file.parent / "model_index.json").unlink()
    with pytest.raises(SystemExit) as ended:
        train("unet", tmp_path / "offline", base)
    assert ended.value.code == 2 and "its configuration is neither" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["model", "first_stage_model", "cond_stage_model"])
def test_missing_weights_and_nan_in_a_single_file_are_refused(prefix, single_file):
    name = max(name for name in load_file(single_file) if name.startswith(f"{prefix}.") and name.endswith("bias"))
    change_weights(single_file.parent, lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(ValueError, match="has weights that are not finite"):
        train_full.load_pipeline(single_file)
    change_weights(single_file.parent, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=r"lacks weights|has no weights for"):
        train_full.load_pipeline(single_file)
    change_weights(single_file.parent, lambda tensors: [tensors.pop(n) for n in [*tensors] if n.startswith(prefix)])
    with pytest.raises(ValueError, match="does not hold the U-Net, VAE and text encoder"):
        train_full.load_pipeline(single_file)
