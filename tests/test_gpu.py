"""What only a GPU shows: every row and script computes there what it computes on a CPU, in all precisions, and no step waits. Skipped without one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import BASE, ROWS, phantoms, result, script_of, train, trained_weights
from PIL import Image

import eval_downstream
import eval_generation
import sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture
def little_memory():
    """A GPU with 1 % of its memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def losses_of(row, output_dir, monkeypatch, *flags, cpu: bool = False, steps: int = 4, **options) -> np.ndarray:
    """The training loss of every step of a run."""
    losses = []
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(cpu).lower())
        patch.setattr(Accelerator, "log", lambda self, values, step: losses.append(values["loss"]) if "loss" in values else None)
        summary = train(row, output_dir, *flags, steps=steps, **options)
    assert len(losses) == steps and (summary["device"] == "cpu") == cpu
    return np.array(losses)


@pytest.mark.parametrize("row", ROWS)
def test_a_gpu_trains_as_a_cpu_does(row, tmp_path, monkeypatch):
    cpu = losses_of(row, tmp_path / "cpu", monkeypatch, cpu=True)
    for precision, tolerance in (("no", 2e-3), ("bf16", 2e-2), ("fp16", 2e-2)):
        gpu = losses_of(row, tmp_path / precision, monkeypatch, f"--mixed_precision={precision}")
        assert abs(gpu / cpu - 1).max() < tolerance, (precision, gpu, cpu)
        weights = trained_weights(row, tmp_path / precision)
        assert all(weight.isfinite().all() and weight.dtype == torch.float32 for weight in weights.values())


@pytest.mark.parametrize("row", ["unet_vae_text_encoder", "dora"])
def test_a_run_goes_on_where_it_was(row, tmp_path):
    options = ["--mixed_precision=fp16", "--gradient_accumulation_steps=2", "--checkpointing_steps=3", "--use_ema", "--gradient_checkpointing"]
    train(row, tmp_path / "whole", *options, steps=5)
    train(row, tmp_path / "resumed", *options, f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-3'}", steps=5)
    whole, resumed = trained_weights(row, tmp_path / "whole"), trained_weights(row, tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    # A GPU adds up in no fixed order.
    assert max((whole[name] - resumed[name]).abs().max().item() for name in whole) < 1e-5


@pytest.mark.parametrize("row, precision", [("unet", "bf16"), ("unet_vae_text_encoder", "bf16"), ("lora", "bf16"), ("dora", "bf16"), ("bitfit", "no"), ("difffit", "bf16")])
def test_no_step_waits_for_the_gpu(row, precision, tmp_path, monkeypatch):
    """From the second step on, whatever makes the host wait raises an error."""
    script = script_of(row)
    original, seen = script.tqdm, []

    def watched(*args, **kwargs):
        bar = original(*args, **kwargs)
        if kwargs.get("desc") == "training":
            update = bar.update

            def step():
                update()
                seen.append(bar.n)
                torch.cuda.set_sync_debug_mode("error" if 2 <= bar.n < 6 else "default")

            bar.update = step
        return bar

    monkeypatch.setattr(script, "tqdm", watched)
    try:
        train(row, tmp_path / "run", f"--mixed_precision={precision}", "--logging_steps=100", steps=8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == list(range(1, 9))


@pytest.mark.parametrize("row", ["lora", "unet"])
def test_a_compiled_unet_trains_alike(row, tmp_path, monkeypatch):
    options = ["--mixed_precision=bf16", "--num_validation_images=1"]
    eager, compiled = (losses_of(row, tmp_path / name, monkeypatch, *options, *flags) for name, flags in (("eager", ()), ("compiled", ("--compile",))))
    assert abs(compiled / eager - 1).max() < 2e-2
    with Image.open(tmp_path / "compiled" / "validation" / "step-000004.png") as picture:
        assert np.asarray(picture).std() > 5


def test_what_does_not_fit_says_what_to_lower(tmp_path, capsys, little_memory):
    with pytest.raises(SystemExit) as ended:
        train("unet", tmp_path / "run", "--train_batch_size=64", "--gradient_accumulation_steps=1", resolution=256)
    error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error:" in line]
    assert ended.value.code == 2 and len(error) == 1 and "lower --train_batch_size" in error[0]


def draw(folder: Path, monkeypatch, *flags, cpu: bool = False) -> dict[str, np.ndarray]:
    """Six images of 128x128 by name."""
    AcceleratorState._reset_state(reset_partial_state=True)
    fixed = ["--model", str(BASE), "--labels", "Edema", "No Finding", "--images_per_label", "3", "--num_inference_steps", "5", "--resolution", "128"]
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(cpu).lower())
        sample.main(sample.parse_args([*fixed, "--output_dir", str(folder), *flags]))
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*/[!.]*.png")) if path.parent.name[0] != "."}


def apart(one: dict, two: dict) -> tuple[float, int]:
    """Mean and largest difference in grey levels of 255."""
    assert one.keys() == two.keys() and len(one) == 6
    differences = np.stack([abs(one[name] - two[name]) for name in one])
    return differences.mean(), differences.max()


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "dpmsolver++", "unipc"])
def test_a_gpu_samples_as_a_cpu_does(scheduler, tmp_path, monkeypatch):
    flags = ["--scheduler", scheduler]
    cpu = draw(tmp_path / "cpu", monkeypatch, *flags, cpu=True)
    full = draw(tmp_path / "full", monkeypatch, *flags, "--mixed_precision=no")
    found = {"fp32": apart(cpu, full)}
    for precision in ("fp16", "bf16"):
        found[precision] = apart(full, draw(tmp_path / precision, monkeypatch, *flags, f"--mixed_precision={precision}"))
    found["one at a time"] = apart(full, draw(tmp_path / "one", monkeypatch, *flags, "--mixed_precision=no", "--batch_size=1"))
    found["fp16 one at a time"] = apart(draw(tmp_path / "fp16", monkeypatch, *flags), draw(tmp_path / "one16", monkeypatch, *flags, "--batch_size=1"))
    print(scheduler, found)
    assert found["fp32"][0] < 0.5 and found["one at a time"][1] <= 2 and found["fp16"][0] < 1 and found["bf16"][0] < 8 and found["fp16 one at a time"][0] < 1


def test_a_compiled_unet_samples_alike(tmp_path, monkeypatch):
    eager, compiled = (draw(tmp_path / name, monkeypatch, "--batch_size=4", *flags) for name, flags in (("eager", ()), ("compiled", ("--compile",))))
    assert apart(eager, compiled)[0] < 1


def test_a_batch_that_does_not_fit_is_halved_or_refused(tmp_path, monkeypatch, capsys, little_memory):
    whole = draw(tmp_path / "one", monkeypatch, "--batch_size=1", "--resolution=256", "--mixed_precision=no")
    assert apart(whole, draw(tmp_path / "auto", monkeypatch, "--resolution=256", "--mixed_precision=no"))[0] < 0.5
    with pytest.raises(SystemExit) as ended:
        draw(tmp_path / "all", monkeypatch, "--resolution=1024", "--images_per_label=64", "--batch_size=128", "--mixed_precision=no")
    assert ended.value.code == 2 and "128 images of 1024x1024 do not fit" in capsys.readouterr().err


def test_both_evaluations_say_what_they_say_on_a_cpu(tmp_path, monkeypatch):
    draw(tmp_path / "samples", monkeypatch, "--images_per_label=20")
    figures = {}
    for name, cpu in (("cpu", True), ("gpu", False)):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", str(cpu).lower())
            downstream = ["--real_csv", phantoms(), "--synthetic", tmp_path / "samples", "--labels", "Edema", "No Finding", "--train_on", "real", "--arch", "resnet18", "--weights", "none", "--resolution", 64]
            downstream += ["--num_seeds", 1, "--num_train_epochs", 2, "--train_batch_size", 8, "--bootstrap_samples", 50, "--output_dir", tmp_path / name / "downstream"]
            eval_downstream.main(eval_downstream.parse_args([str(word) for word in downstream]))
            AcceleratorState._reset_state(reset_partial_state=True)
            classifier = tmp_path / "cpu" / "downstream" / "classifier"
            generation = ["--synthetic", tmp_path / "samples", "--real_csv", phantoms(), "--real_split", "all", "--labels", "Edema", "No Finding", "--classifier", classifier, "--features", classifier]
            generation += ["--vae", BASE, "--num_subsamples", 5, "--feature_cache_dir", tmp_path / name / "features", "--output_dir", tmp_path / name / "generation"]
            eval_generation.main(eval_generation.parse_args([str(word) for word in generation]))
        figures[name] = [json.loads((tmp_path / name / part).read_text()) for part in ("downstream/downstream_metrics.json", "generation/generation_metrics.json")]
    for cpu, gpu in zip(figures["cpu"], figures["gpu"]):
        assert [(row["metric"], row["label"], row["n"]) for row in cpu["results"]] == [(row["metric"], row["label"], row["n"]) for row in gpu["results"]]
    for metric in ("fid", "fid_vae", "vendi", "kid"):
        assert result(figures["gpu"][1], metric) == pytest.approx(result(figures["cpu"][1], metric), rel=1e-2), metric
