"""--help of the five scripts, and the flags and defaults that shell loops depend on."""

import argparse
import importlib

import pytest

REQUIRED = {
    "train_full": "--train_unet --data_csv x",
    "train_peft": "--method bitfit --data_csv x",
    "sample": "--model runs/bitfit",
    "eval_generation": "--synthetic samples/bitfit --real_csv x",
    "eval_downstream": "--synthetic samples/bitfit --real_csv x",
}
# Flags and defaults; a name alone is a switch that is off, or a value that is unset.
TRAINING = """
    data_csv validation_csv dataset_name image_root split split_seed=0 uncertain=ignore max_train_samples
    resolution=512 resize_mode=squash on_bad_image=stop caption_dropout=0.1 latent_cache_dir
    pretrained_model_name_or_path=stable-diffusion-v1-5/stable-diffusion-v1-5 mixed_precision gradient_checkpointing
    compile snr_gamma noise_offset=0.0 train_batch_size=4 num_train_epochs=100 max_train_steps
    gradient_accumulation_steps=4 lr_scheduler=constant lr_warmup_steps=0 max_grad_norm=1.0 use_8bit_adam use_ema
    adam_beta1=0.9 adam_beta2=0.999 adam_weight_decay=0.01 adam_epsilon=1e-08 validation_steps=500
    num_validation_images=4 checkpointing_steps=500 checkpoints_total_limit=2 resume_from_checkpoint
    report_to=tensorboard push_to_hub seed=0 output_dir
"""
CONTRACT = {
    "train_full": f"""{TRAINING}
        train_unet train_text_encoder train_vae unet_lr=1e-05 text_encoder_lr=1e-06 vae_lr=1e-06 vae_loss=anchored
        vae_recon_weight=1.0 vae_anchor_weight=1.0""",
    "train_peft": f"""{TRAINING}
        method rank=8 lora_alpha=16 lora_dropout=0.0 learning_rate=0.0001 save_merged
        lora_target_modules train_text_encoder init_from save_kohya""",
    "sample": """
        model labels like_csv images_per_label num_images num_inference_steps=50 guidance_scale=7.5 scheduler
        resolution batch_size=auto seed=0 output_dir split=all split_seed=0 uncertain=ignore prompt_template base_model
        revision variant lora_scale=1.0 negative_prompt""",
    "eval_generation": """
        synthetic real_csv image_root real_split=test train_csv train_split=train split_seed=0 uncertain=ignore
        classifier features=['xrv'] baseline vae max_per_label=5000 pool=unique resolution resize_mode seed=0
        output_dir""",
    "eval_downstream": """
        synthetic real_csv image_root train_on=synthetic arch=efficientnet_b0 weights=imagenet num_seeds=3 output_dir
        labels split split_seed=0 uncertain=ignore resize_mode seed=0 horizontal_flip resolution=224 reference""",
}
CHOICES = {
    "split": ["train", "val", "test", "all"],
    "uncertain": ["ones", "zeros", "ignore"],
    "resize_mode": ["squash", "pad", "crop"],
    "method": ["lora", "dora", "bitfit", "difffit"],
    "vae_loss": ["anchored", "joint"],
    "scheduler": ["ddim", "pndm", "dpmsolver++", "unipc", "euler", "euler_a"],
    "train_on": ["synthetic", "real", "both"],
}
OBVIOUS = """train_unet train_text_encoder train_vae unet_lr text_encoder_lr vae_lr learning_rate method lr_scheduler
    adam_beta1 adam_beta2 adam_weight_decay adam_epsilon ema_decay report_to""".split()


class Captured(Exception):
    """Carries a script's parser out of its parse_args."""


def flags_of(script):
    """Return a script's argparse actions by name."""

    def capture(parser, argv=None):
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Captured) as captured:
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        importlib.import_module(script).parse_args([])
    return {action.dest: action for action in captured.value.args[0]._actions if action.dest != "help"}


@pytest.mark.parametrize("script", CONTRACT)
def test_flags_explain_themselves(script):
    for name, action in flags_of(script).items():
        assert action.help or name in OBVIOUS, f"--{name} has no help"
        assert len(action.help or "") <= 90, f"--{name}: help of {len(action.help)} characters"
        assert action.option_strings == [f"--{name}"], f"{action.option_strings}: one long name in snake case"
        assert action.container.title != "options", f"--{name} is in no group"


@pytest.mark.parametrize("script", CONTRACT)
def test_names_and_defaults_are_the_contract(script):
    flags = flags_of(script)
    for name, _, default in (word.partition("=") for word in CONTRACT[script].split()):
        assert name in flags, f"{script}.py lacks --{name}"
        value = flags[name].default
        assert str(value) == default if default else value in (None, False, ""), f"--{name}: default {value}"
    for name, choices in CHOICES.items():
        assert name not in flags or list(flags[name].choices) == choices


def test_the_trainings_share_their_flags():
    one, two = (
        {name: {**vars(action), "container": action.container.title} for name, action in flags_of(script).items()}
        for script in ("train_full", "train_peft")
    )
    del one["train_text_encoder"], two["train_text_encoder"]  # as a whole in one script, LoRA in the other
    shared = one.keys() & two.keys()
    assert {name: one[name] for name in shared} == {name: two[name] for name in shared}
    own = [name.partition("=")[0] for script in ("train_full", "train_peft") for name in CONTRACT[script].split()]
    assert one.keys() ^ two.keys() == {name for name in own if own.count(name) == 1}


@pytest.mark.parametrize("script", CONTRACT)
def test_help_shows_the_docstring_and_few_flags_are_required(script, capsys, monkeypatch):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and module.__doc__ in shown
    assert all(f"--{name}" in shown for name in flags_of(script))
    monkeypatch.setattr("os.path.exists", lambda path: True)
    monkeypatch.setattr("os.path.isfile", lambda path: True)
    args = module.parse_args(REQUIRED[script].split())
    assert args.output_dir and args.seed == 0
