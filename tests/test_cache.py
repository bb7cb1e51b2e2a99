"""The cache of latents changes nothing but time, and a step does not wait for the device."""

import os
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from common import BASE, change_weights, phantoms, pipeline_of, script_of, small_table, train
from diffusers import AutoencoderKL
from test_methods import record, reference
from torch.utils._python_dispatch import TorchDispatchMode

import train_full
import train_peft


def test_the_cache_changes_the_losses_by_fp16_rounding_alone(tmp_path):
    stream, base = record("bitfit", tmp_path / "run", steps=1).streams[0], pipeline_of(BASE)
    cached, exact = (reference(stream, base, range(8), cached)["diffusion"] for cached in (True, False))
    assert 0 < abs(cached - exact) < 1e-3 * exact
    for n in range(4):
        image = train_peft.load_image(stream.images[stream.image_index(n)], 64, "squash")
        posterior = base.vae.encode(train_peft.to_pixel_values(image)[None]).latent_dist.parameters[0]
        assert torch.equal(stream[n]["posterior"], posterior.half().float())


@pytest.fixture
def calls(monkeypatch):
    """Count the images that train_peft.py decodes and encodes."""
    counts = {"load_image": 0, "encode": 0}

    def count(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: counts.update({name: counts[name] + 1}) or original(*args))

    count(train_peft, "load_image")
    count(AutoencoderKL, "encode")
    return counts


def test_latents_are_shared_by_all_runs_and_keyed_by_what_they_depend_on(calls, tmp_path):
    """Another table or fewer images: nothing is decoded again. Another image, geometry or VAE: it is."""
    root = shutil.copytree(phantoms().parent, tmp_path / "data" / "CheXpert-phantom")

    def new(*flags, csv=root / "train.csv"):
        calls.update(load_image=0, encode=0)
        options = ["--overwrite_output_dir", "--max_validation_samples=1000", *flags]
        train("bitfit", tmp_path / "run", *options, csv=csv, steps=1)
        assert calls["load_image"] == calls["encode"]
        return calls["encode"]

    flags = ["--method=bitfit", f"--data_csv={root / 'train.csv'}", "--max_validation_samples=1000"]
    data, everything = train_peft.load_training_data(train_peft.parse_args(flags)), new()
    assert everything == len(data.train) + len(data.heldout) > 8  # each is decoded once
    assert new() == new("--max_train_samples=3") == 0
    table = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    table[::-1].to_csv(root / "reversed.csv", index=False)
    assert new(csv=root / "reversed.csv") == 0
    os.utime(data.train["image"][0])
    assert new() == 1
    assert new("--resize_mode=pad") == new("--resolution=32") == everything
    base = shutil.copytree(BASE, tmp_path / "base")
    change_weights(base / "vae", lambda tensors: tensors["quant_conv.bias"].add_(0.1))
    assert new(f"--pretrained_model_name_or_path={base}") == everything


def test_an_interrupted_encoding_keeps_what_it_has(calls, tmp_path, monkeypatch):
    encode, table = AutoencoderKL.encode, small_table(tmp_path)

    def interrupted(self, pixels):
        if calls["encode"] == 5:
            raise KeyboardInterrupt
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKL, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("bitfit", tmp_path / "run", "--split=all", csv=table)
    train("bitfit", tmp_path / "run", "--split=all", csv=table)
    assert calls["encode"] == 12


def test_processes_encode_every_image_between_them(tmp_path):
    """Also if the second looks for missing latents when the first has already begun; on a GPU in batches."""
    args = train_full.parse_args(["--train_unet", f"--data_csv={small_table(tmp_path)}", "--resolution=64"])
    args.output_dir, images = tmp_path / "run", list(train_full.load_training_data(args).train["image"])
    paths, vae = train_full.latent_paths(images, "0" * 64, args), pipeline_of(BASE).vae
    process = {"num_processes": 2, "is_main_process": True, "device": vae.device, "wait_for_everyone": lambda: None}
    for rank in (0, 1):
        train_full.check_and_encode(SimpleNamespace(process_index=rank, **process), images, paths, vae, args)
    assert len(paths) > 2 and all(path.exists() for path in paths)
    args.latent_cache_dir, process["device"] = tmp_path / "batches", SimpleNamespace(type="cuda")
    batches, process["num_processes"] = train_full.latent_paths(images, "0" * 64, args), 1
    train_full.check_and_encode(SimpleNamespace(process_index=0, **process), images, batches, vae, args)
    for one, batch in zip(map(np.load, paths), map(np.load, batches)):
        np.testing.assert_allclose(one, batch, rtol=2e-3, atol=2e-3)  # float16's precision


class DeviceReads(TorchDispatchMode):
    """Count what makes the host wait for a device: each number that is read from a tensor."""

    count, paused = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += waits and not self.paused
        return function(*args, **(kwargs or {}))

    def tolist(self, tensor, original=torch.Tensor.tolist):
        self.count += tensor.is_floating_point() and not self.paused
        return original(tensor)


@pytest.mark.parametrize("row", ["unet_vae_text_encoder", "dora"])
def test_a_step_reads_nothing_from_the_device_but_at_logging_steps(row, tmp_path, monkeypatch):
    script, reads = script_of(row), DeviceReads()
    loop, draw = script.train, script.SampleStream.__getitem__

    def watched(*args):
        with reads:
            return loop(*args)

    def drawn(self, n):
        reads.paused = True  # samples are drawn on the CPU, whatever the device
        sample = draw(self, n)
        reads.paused = False
        return sample

    monkeypatch.setattr(script, "train", watched)
    monkeypatch.setattr(script.SampleStream, "__getitem__", drawn)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.tolist(tensor))
    flags = ["--gradient_accumulation_steps=2", "--use_ema", "--lr_scheduler=cosine", "--snr_gamma=5"]
    train(row, tmp_path / "run", *flags, "--logging_steps=3", steps=6, resolution=32)
    # The loader draws a seed of its own, on the CPU; a logging step reads the losses and whether a signal arrived.
    assert reads.count == 1 + 2 * 2
