"""A GPU computes what a CPU does, in all precisions, and no step waits for it. Skipped without one."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from common import BASE, ROWS, phantoms, result, script_of, train, trained_weights
from PIL import Image
from test_methods import record

import eval_downstream
import eval_generation
import sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def little_memory():
    """Limit a test to 1% of the GPU's memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("row", ROWS)
def test_a_gpu_trains_as_a_cpu_does(row, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cpu = record(row, tmp_path / "cpu", steps=4)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    for precision, tolerance in (("no", 2e-3), ("bf16", 2e-2), ("fp16", 2e-2)):
        gpu = record(row, tmp_path / precision, f"--mixed_precision={precision}", steps=4)
        assert cpu.summary["device"] == "cpu" != gpu.summary["device"]
        assert gpu.losses == pytest.approx(cpu.losses, rel=tolerance), precision
        weights = trained_weights(row, tmp_path / precision).values()
        assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights)


@pytest.mark.parametrize("row", ["unet_vae_text_encoder", "dora"])
def test_a_resumed_run_ends_alike(row, tmp_path):
    options = ["--mixed_precision=fp16", "--gradient_accumulation_steps=2", "--checkpointing_steps=3", "--use_ema"]
    options += ["--gradient_checkpointing"]
    train(row, tmp_path / "whole", *options, steps=5)
    train(row, tmp_path / "run", *options, f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-3'}", steps=5)
    whole, resumed = trained_weights(row, tmp_path / "whole"), trained_weights(row, tmp_path / "run")
    assert whole.keys() == resumed.keys()
    # A GPU adds up in no fixed order.
    assert max((whole[name] - resumed[name]).abs().max().item() for name in whole) < 1e-5


@pytest.mark.parametrize("row", ["unet", "unet_vae_text_encoder", "lora", "dora", "bitfit", "difffit"])
def test_no_step_waits_for_the_gpu(row, tmp_path, monkeypatch):
    """From the second step on, whatever makes the host wait raises an error."""
    steps = []

    class Watched(script_of(row).tqdm):
        def update(self, n=1):
            super().update(n)
            if self.desc == "training":
                steps.append(self.n)
                torch.cuda.set_sync_debug_mode("error" if 2 <= self.n < 6 else "default")

    monkeypatch.setattr(script_of(row), "tqdm", Watched)
    try:
        train(row, tmp_path / "run", "--mixed_precision=bf16", "--logging_steps=100", steps=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(1, 9))


@pytest.mark.parametrize("row", ["lora", "unet"])
def test_a_compiled_unet_trains_alike(row, tmp_path):
    options = ["--mixed_precision=bf16", "--num_validation_images=1"]
    eager = record(row, tmp_path / "eager", *options, steps=4)
    compiled = record(row, tmp_path / "compiled", *options, "--compile", steps=4)
    assert compiled.losses == pytest.approx(eager.losses, rel=2e-2)
    assert np.asarray(Image.open(tmp_path / "compiled" / "validation" / "step-000004.png")).std() > 5


def test_a_batch_that_does_not_fit_raises_what_the_script_answers(tmp_path, little_memory):
    with pytest.raises(torch.OutOfMemoryError):
        train("unet", tmp_path / "run", "--train_batch_size=64", resolution=256)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Return a function that draws six images of 128x128 and returns them as one array."""

    def draw(*flags, cpu=False):
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu).lower())
        folder = tmp_path / "-".join([*flags, str(cpu)]).replace("/", "")
        fixed = "--images_per_label=3 --num_inference_steps=5 --resolution=128 --labels Edema".split()
        fixed.append("No Finding")
        sample.main(sample.parse_args([f"--model={BASE}", *fixed, f"--output_dir={folder}", *flags]))
        paths = [path for path in sorted(folder.glob("*/*.png")) if path.parent.name[0] != "."]
        assert len(paths) == 6
        return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])

    return draw


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "dpmsolver++", "unipc"])
def test_a_gpu_samples_as_a_cpu_does(scheduler, images):
    """Differences are in grey levels of 255."""
    flags = [f"--scheduler={scheduler}"]
    full, fp16 = images(*flags, "--mixed_precision=no"), images(*flags, "--mixed_precision=fp16")
    assert abs(images(*flags, "--mixed_precision=no", cpu=True) - full).mean() < 0.5
    assert abs(images(*flags, "--mixed_precision=no", "--batch_size=1") - full).max() <= 2
    assert abs(images(*flags, "--mixed_precision=bf16") - full).mean() < 8
    for other in (full, images(*flags, "--mixed_precision=fp16", "--batch_size=1")):
        assert abs(other - fp16).mean() < 1


def test_a_compiled_unet_samples_alike(images):
    assert abs(images("--batch_size=4", "--compile") - images("--batch_size=4")).mean() < 1


def test_an_automatic_batch_size_fits_into_little_memory(images, little_memory):
    options = ["--resolution=256", "--mixed_precision=no"]
    assert abs(images(*options) - images(*options, "--batch_size=1")).mean() < 0.5


def test_both_evaluations_agree_with_the_cpu(tmp_path, monkeypatch):
    fixed = ["--images_per_label=20", "--num_inference_steps=5", "--labels", "Edema", "No Finding"]
    sample.main(sample.parse_args([f"--model={BASE}", *fixed, f"--output_dir={tmp_path / 'samples'}"]))
    common = [f"--synthetic={tmp_path / 'samples'}", f"--real_csv={phantoms()}", "--labels", "Edema", "No Finding"]
    downstream = "--train_on real --arch resnet18 --weights none --resolution 64 --num_seeds 1 --num_train_epochs 2"
    classifier = tmp_path / "cpu" / "downstream" / "classifier"
    generation = f"--real_split all --classifier {classifier} --features {classifier} --vae {BASE}"
    found = {}
    for device in ("cpu", "gpu"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
        for script, flags in ((eval_downstream, downstream), (eval_generation, generation)):
            AcceleratorState._reset_state(reset_partial_state=True)
            name = script.__name__.removeprefix("eval_")
            cache = [f"--feature_cache_dir={tmp_path / device / 'features'}"] * (name == "generation")
            output = tmp_path / device / name
            script.main(script.parse_args([*common, *flags.split(), *cache, f"--output_dir={output}"]))
            found[device, name] = json.loads((output / f"{name}_metrics.json").read_text())
    for metric in ("fid", "fid_vae", "vendi", "kid"):
        cpu, gpu = (result(found[device, "generation"], metric) for device in ("cpu", "gpu"))
        assert gpu == pytest.approx(cpu, rel=1e-2), metric
