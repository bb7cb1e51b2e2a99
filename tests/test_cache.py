"""The caches of latents and captions: they change nothing but time, are shared, and are never used damaged."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import BASE, phantoms, pipeline_of, result, script_of, train, trained_weights
from test_methods import make_stream
from torch.utils._python_dispatch import TorchDispatchMode

import train_full


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


def losses_of(row, output_dir, monkeypatch, *flags, steps=50) -> np.ndarray:
    """The training loss of every step of a run."""
    losses = []
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "log", lambda self, values, step: losses.append(values["loss"]) if "loss" in values else None)
        train(row, output_dir, "--max_train_samples=6", *flags, steps=steps)
    assert len(losses) == steps
    return np.array(losses)


@pytest.mark.parametrize("row", ["unet", "lora"])
def test_the_cache_changes_the_losses_by_fp16_rounding_alone(row, tmp_path, monkeypatch):
    script = script_of(row)
    cached = losses_of(row, tmp_path / "cached", monkeypatch)
    assert list((tmp_path / "latent_cache").glob("latents-*/*.npy"))
    encoded = losses_of(row, tmp_path / "encoded", monkeypatch, "--latent_cache_dir=none")
    assert 0 < abs(cached - encoded).max() < 1e-3 * encoded.mean()
    # With the moments rounded in the same way in the loop itself, next to nothing of the difference is left.
    encode = script.encode_moments
    monkeypatch.setattr(script, "encode_moments", lambda vae, pixels: encode(vae, pixels).half().float())
    rounded = losses_of(row, tmp_path / "rounded", monkeypatch, "--latent_cache_dir=none")
    assert abs(cached - rounded).max() < 0.1 * abs(cached - encoded).max()


@torch.no_grad()
def test_latents_drawn_from_the_cache_have_the_posteriors_mean_and_variance():
    stream = make_stream(train_full, phantoms())
    posterior = pipeline_of(BASE).vae.encode(stream[0]["pixel_values"][None]).latent_dist
    mean, std = train_full.split_moments(posterior.parameters.half())
    draws = 4000
    stream.moments, stream.with_pixels = [posterior.parameters.half()[0].numpy()] * len(stream), False
    latents = torch.stack([mean[0] + std[0] * stream[n]["latent_noise"] for n in range(draws)])
    # Of 256 means and variances the furthest lies within five standard errors, beside what fp16 rounds: 11 bits.
    rounding, error = posterior.mean[0].abs() * 2**-11, (latents.mean(0) - posterior.mean[0]).abs()
    assert (error < 5 * posterior.std[0] / draws**0.5 + rounding).all()
    assert (error > rounding).any()
    assert (latents.var(0) / posterior.var[0] - 1).abs().max() < 5 * (2 / draws) ** 0.5


KEYS = [f"image-{i}" for i in range(10)]


def filled(accelerator, folder, encoded=None, keys=KEYS) -> list[np.ndarray]:
    """Rows from a cache whose row i is full of i; the positions that had to be encoded are added to `encoded`."""

    def encode(positions):
        for i in positions:
            if encoded is not None:
                encoded.append(i)
            yield np.full((2, 3), int(keys[i].split("-")[1]), np.float32)

    return train_full.cache_rows(accelerator, folder, keys, encode, np.float16, "image")


def are_right(rows: list[np.ndarray]) -> bool:
    return all(row.dtype == np.float16 and np.array_equal(row, np.full((2, 3), i)) for i, row in enumerate(rows)) and len(rows) == 10


def flip(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "a bit in the rows": lambda path: flip(path, -3),
    "a bit in the header": lambda path: flip(path, 12),
    "without its seal": lambda path: path.with_suffix(".json").unlink(),
    "half a seal": lambda path: path.with_suffix(".json").write_text(path.with_suffix(".json").read_text()[:20]),
    "other JSON": lambda path: path.with_suffix(".json").write_text("[1]"),
    "endlessly nested JSON": lambda path: path.with_suffix(".json").write_text("[" * 100_000),
    "keys exchanged": lambda path: path.with_suffix(".json").write_text(
        json.dumps((index := json.loads(path.with_suffix(".json").read_text())) | {"keys": index["keys"][::-1]})
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_again_and_no_other(damage, accelerator, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_full, "CACHE_FILE_ROWS", 4)
    assert are_right(filled(accelerator, tmp_path))
    files = sorted(tmp_path.glob("*.npy"))
    lost = json.loads(files[1].with_suffix(".json").read_text())["keys"]
    times = {path: path.stat().st_mtime_ns for path in files}
    DAMAGE[damage](files[1])
    encoded = []
    assert are_right(filled(accelerator, tmp_path, encoded))
    assert [KEYS[i] for i in encoded] == lost and f"{files[1]}: damaged" in capsys.readouterr().err
    assert not files[1].exists() and all(files[i].stat().st_mtime_ns == times[files[i]] for i in (0, 2))
    encoded.clear()
    assert are_right(filled(accelerator, tmp_path, encoded)) and not encoded


def test_an_interrupted_encoding_keeps_its_whole_files(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(train_full, "CACHE_FILE_ROWS", 4)

    def encode(positions):
        for i in positions:
            if i == 6:
                raise KeyboardInterrupt
            yield np.full((2, 3), i, np.float32)

    with pytest.raises(KeyboardInterrupt):
        train_full.cache_rows(accelerator, tmp_path, KEYS, encode, np.float16, "image")
    (tmp_path / "0123.part").write_bytes(b"what a kill leaves")
    os.utime(tmp_path / "0123.part", (0, 0))
    encoded = []
    assert are_right(filled(accelerator, tmp_path, encoded))
    assert encoded == [4, 5, 6, 7, 8, 9] and not list(tmp_path.glob("*.part"))


def test_rows_are_shared_whatever_the_table(accelerator, tmp_path):
    encoded = []
    filled(accelerator, tmp_path, encoded, KEYS[3:7])
    assert are_right(filled(accelerator, tmp_path, encoded))
    assert encoded == [0, 1, 2, 3, 0, 1, 2, 7, 8, 9]
    twice = filled(accelerator, tmp_path, encoded, [*KEYS[:2], *KEYS[:2]])
    assert len(encoded) == 10 and [row[0, 0] for row in twice] == [0, 1, 0, 1]


def test_two_processes_share_the_encoding(tmp_path, monkeypatch):
    """Each encodes its half of what is missing, and both end with all rows; collectives are played by hand."""
    monkeypatch.setattr(train_full, "broadcast_object_list", lambda values: values)
    monkeypatch.setattr(train_full, "gather_object", lambda values: values)
    encoded = {0: [], 1: []}

    def process(rank, other=lambda: None):
        fake = SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=other, device=torch.device("cpu"))
        return filled(fake, tmp_path, encoded[rank])

    # The second one begins as early as the first, and ends while the first waits for it.
    seen = train_full.read_cache
    monkeypatch.setattr(train_full, "read_cache", lambda accelerator, folder, calls=[]: calls.append(0) or ({} if len(calls) < 3 else seen(accelerator, folder)))
    assert are_right(process(0, other=lambda: process(1)))
    assert sorted(encoded[0] + encoded[1]) == list(range(10)) and len(encoded[0]) == len(encoded[1]) == 5


def test_what_the_rows_depend_on_is_in_the_key(tmp_path, monkeypatch):
    """Another table or fewer images: nothing is encoded again. Another image, geometry, resolution or VAE: it is."""
    import shutil

    import pandas as pd

    root = shutil.copytree(phantoms().parent, tmp_path / "data" / "CheXpert-phantom")
    script, encoded = script_of("bitfit"), []
    encode = script.encode_moments
    monkeypatch.setattr(script, "encode_moments", lambda vae, pixels: encoded.append(1) or encode(vae, pixels))

    def newly_encoded(*flags, csv=root / "train.csv", base=BASE) -> int:
        encoded.clear()
        flags = ["--overwrite_output_dir", "--max_validation_samples=1000", *flags]
        train("bitfit", tmp_path / "run", f"--pretrained_model_name_or_path={base}", *flags, csv=csv, steps=1)
        return len(encoded)

    everything = newly_encoded()
    assert everything > 8
    assert newly_encoded() == newly_encoded("--max_train_samples=3") == 0
    frame = pd.read_csv(root / "train.csv", dtype=str, keep_default_na=False)
    frame[::-1].to_csv(root / "reversed.csv", index=False)
    assert newly_encoded(csv=root / "reversed.csv") == 0
    args = script.parse_args(["--method=bitfit", f"--data_csv={root / 'train.csv'}"])
    os.utime(script.load_training_data(args).train["image"][0])
    assert newly_encoded() == 1
    assert newly_encoded("--resize_mode=pad") == newly_encoded("--resolution=32") == everything
    pipeline = pipeline_of(BASE)
    with torch.no_grad():
        pipeline.vae.quant_conv.bias.add_(0.1)
    pipeline.save_pretrained(tmp_path / "base")
    assert newly_encoded(base=tmp_path / "base") == everything
    assert len(list((tmp_path / "latent_cache").glob("latents-*"))) == 4
    assert len(list((tmp_path / "latent_cache").glob("captions-*"))) == 1


def test_a_run_on_a_damaged_cache_ends_like_one_on_a_whole_one(tmp_path, capsys):
    first = result(train("bitfit", tmp_path / "one"), "train_loss")
    for path in (tmp_path / "latent_cache").glob("*/*.npy"):
        flip(path, 400)
    capsys.readouterr()
    assert result(train("bitfit", tmp_path / "two"), "train_loss") == first
    assert capsys.readouterr().err.count(": damaged, ") == 2


@pytest.mark.parametrize("row", ["unet", "vae", "lora"])
@pytest.mark.parametrize("pictures", [0, 1])
def test_what_is_cached_leaves_the_device(row, pictures, tmp_path, monkeypatch):
    """The loop's module does not hold it, and where no picture is drawn with it, memory does not either."""
    script, models, pipelines = script_of(row), [], []
    load, loop = script.load_base_pipeline, script.train
    monkeypatch.setattr(script, "load_base_pipeline", lambda args: pipelines.append(load(args)) or pipelines[-1])

    def recorded(args, accelerator, state, *rest):
        pipeline = pipelines[0]
        devices = {name: getattr(pipeline, name).device.type for name in ("unet", "vae", "text_encoder")}
        models.append((accelerator.unwrap_model(state.model), devices))
        return loop(args, accelerator, state, *rest)

    monkeypatch.setattr(script, "train", recorded)
    train(row, tmp_path / "run", f"--num_validation_images={pictures}")
    ((model, devices),) = models
    away = "cpu" if pictures else "meta"
    assert model.text_encoder is None and (model.vae is None) == (row != "vae")
    assert devices == {"unet": "cpu", "vae": "cpu" if row == "vae" else away, "text_encoder": away}


class ReadingsOfTheDevice(TorchDispatchMode):
    """Counts what makes the host wait for a device: each number that is read from a tensor."""

    def __init__(self):
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += waits and not self.paused
        return function(*args, **(kwargs or {}))

    def tolist(self, tensor, original=torch.Tensor.tolist):
        """Losses are read as a list; the whole numbers so read are a batch's, which is on the CPU as the loader made it."""
        self.count += tensor.is_floating_point() and tensor.numel() > 0 and not self.paused
        return original(tensor)


@pytest.mark.parametrize("row", ["unet", "text_encoder", "unet_vae", "lora", "dora", "bitfit", "difffit"])
def test_the_step_reads_nothing_from_the_device_but_at_logging_steps(row, tmp_path, monkeypatch):
    script = script_of(row)
    loop, draw = script.train, script.SampleStream.__getitem__
    readings = ReadingsOfTheDevice()

    def counted(*args):
        with readings:
            return loop(*args)

    def drawn(self, n):
        # Samples are drawn on the CPU, whatever the device.
        readings.paused = True
        sample = draw(self, n)
        readings.paused = False
        return sample

    monkeypatch.setattr(script, "train", counted)
    monkeypatch.setattr(script.SampleStream, "__getitem__", drawn)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: readings.tolist(tensor))
    flags = ["--gradient_accumulation_steps=2", "--use_ema", "--lr_scheduler=cosine", "--snr_gamma=5"]
    train(row, tmp_path / "run", *flags, "--logging_steps=3", steps=9)
    # The loader draws a seed of its own, on the CPU.
    assert readings.count == 1 + 3


@pytest.mark.parametrize("row", ["unet", "unet_vae"])
def test_resuming_is_bit_identical_in_the_layout_of_gpus(row, tmp_path, monkeypatch):
    """Fused AdamW goes through weights and moments as they lie in memory, which a checkpoint's file does not keep."""
    monkeypatch.setattr(train_full, "to_channels_last", lambda component: component.to(memory_format=torch.channels_last))
    options = ["--checkpointing_steps=2", "--unet_lr=1e-3"]
    train(row, tmp_path / "whole", *options, steps=4)
    train(row, tmp_path / "resumed", *options, f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-2'}", steps=4)
    whole, resumed = trained_weights(row, tmp_path / "whole"), trained_weights(row, tmp_path / "resumed")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_compiling_sees_one_shape_of_batch(tmp_path, monkeypatch):
    """Five held-out images in batches of two: the last one is filled up, and the losses are those of an uncompiled run."""
    shapes = set()
    forward = train_full.DiffusionLoss.forward
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: shapes.add(("dynamic", dynamic)))
    monkeypatch.setattr(train_full.DiffusionLoss, "forward", lambda self, batch: shapes.add(batch["noise"].shape) or forward(self, batch))
    plain = train("unet", tmp_path / "plain", "--max_validation_samples=5")
    assert shapes == {torch.Size((2, 4, 8, 8)), torch.Size((1, 4, 8, 8))}
    shapes.clear()
    compiled = train("unet", tmp_path / "compiled", "--max_validation_samples=5", "--compile")
    assert shapes == {torch.Size((2, 4, 8, 8)), ("dynamic", False)}
    assert result(compiled, "heldout_diffusion") == pytest.approx(result(plain, "heldout_diffusion"), abs=1e-6)
