"""Training on real radiographs, where they are on this machine."""

import pytest
from common import PEFT_ROWS, REAL_CSV, train


@pytest.mark.skipif(not REAL_CSV.is_file(), reason="the real radiographs are not on this machine")
@pytest.mark.parametrize("row", ["unet_text_encoder", "dora"])
def test_training_on_real_radiographs_lowers_the_heldout_loss(row, tmp_path):
    rate = ["--learning_rate=1e-3"] if row in PEFT_ROWS else ["--unet_lr=1e-4", "--text_encoder_lr=1e-5"]
    options = [*rate, "--train_batch_size=8", "--max_validation_samples=64", "--max_train_samples=320"]
    summary = train(row, tmp_path / "run", *options, csv=REAL_CSV, steps=40)
    change = next(row for row in summary["results"] if row["metric"] == "heldout_diffusion_change")
    assert change["n"] == 64 and change["high"] < 0
