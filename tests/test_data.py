"""The image table, the split, prompts, images and the stream of samples."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from common import phantoms
from PIL import Image

import train_full

HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *train_full.LABELS]


def write_table(path: Path, rows: list[dict], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, HEADER, restval="")
        writer.writeheader()
        writer.writerows({"Frontal/Lateral": "Frontal", **row} for row in rows)
    return path


def picture(path: Path, size=(30, 20), mode="L", **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert(mode).save(path, **options)
    return str(path)


def load(table: Path, *flags: str) -> train_full.TrainingData:
    return train_full.load_training_data(train_full.parse_args(["--train_unet", "--data_csv", str(table), *flags]))


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path):
    rows = [
        {"Path": "a/patient00001/study1/view1_frontal.jpg", "Edema": "1.0", "Cardiomegaly": "1"},
        {"Path": "a/patient00001/study1/view2_lateral.jpg", "Edema": "1.0", "Frontal/Lateral": "Lateral"},
        {"Path": "a/patient00002/study1/view1_frontal.jpg", "Edema": "0.0"},
        {"Path": "a/patient00003/study1/view1_frontal.jpg", "Edema": "-1.0"},
        {"Path": "a/patient00004/study1/view1_frontal.jpg", "No Finding": "1.0", "Support Devices": "1.0", "Pneumonia": "-1"},
    ]
    table = write_table(tmp_path / "t.csv", rows, encoding="utf-8-sig")
    data = load(table, "--split=all")
    assert data.rows == 5
    assert data.left_out == {"not frontal": 1, "no positive label": 2, "not in split 'all'": 0}
    template = "Chest X-ray of a subject with "
    # Findings in CheXpert's order, uncertain ones not named.
    assert list(data.train["prompt"]) == [template + "Cardiomegaly, Edema", template + "No Finding, Support Devices"]
    assert list(data.train["patient"]) == ["patient00001", "patient00004"]
    ones = load(table, "--split=all", "--uncertain=ones", "--prompt_template=A film: {}.")
    assert list(ones.train["prompt"]) == ["A film: Cardiomegaly, Edema.", "A film: Edema.", "A film: No Finding, Pneumonia, Support Devices."]


def test_split_is_by_patient_stable_and_of_the_papers_sizes():
    patients = pd.Series([f"patient{i:05d}" for i in range(64_540)])
    splits = train_full.assign_splits(patients, 0)
    shares = splits.value_counts(normalize=True)
    for name, share in train_full.SPLIT_FRACTIONS.items():
        assert shares[name] == pytest.approx(share, abs=0.01)
    shuffled = patients.sample(frac=0.3, random_state=1)
    assert (train_full.assign_splits(shuffled, 0) == splits[shuffled.index]).all()
    assert not (train_full.assign_splits(patients, 1) == splits).all()
    data = load(phantoms())
    assert len(data.train) and len(data.heldout)
    assert not set(data.train["patient"]) & set(data.heldout["patient"])
    assert data.train["patient"].duplicated().any()


def test_ready_made_tables_are_used_whole_and_their_overlap_is_told(tmp_path):
    train = write_table(tmp_path / "train.csv", [{"Path": f"patient0000{i}/1.jpg", "Edema": "1"} for i in range(5)])
    valid = write_table(tmp_path / "valid.csv", [{"Path": f"patient0000{i}/2.jpg", "Edema": "1"} for i in range(3, 9)])
    data = load(train, f"--validation_csv={valid}")
    assert (len(data.train), len(data.heldout)) == (5, 6)
    assert any(note.startswith("2 patients are in both") for note in data.notes)


@pytest.mark.parametrize("layout", ["root", "parent", "renamed", "image_root"])
def test_paths_are_found_where_chexpert_puts_them(layout, tmp_path):
    """CheXpert's paths start with the data set's own folder, which resized copies rename."""
    folder = tmp_path / ("CheXpert-512" if layout == "renamed" else "CheXpert-v1.0")
    picture(folder / "train/patient00001/study1/view1_frontal.jpg")
    path = "train/patient00001/study1/view1_frontal.jpg" if layout == "root" else "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
    table = write_table((tmp_path if layout == "image_root" else folder) / "train.csv", [{"Path": path, "Edema": "1"}])
    loaded = train_full.load_image_table(str(table), str(tmp_path) if layout == "image_root" else None)
    assert Path(loaded["image"][0]).is_file()


def test_a_missing_first_image_does_not_hide_the_others(tmp_path):
    picture(tmp_path / "DS/train/patient00002/1.jpg")
    rows = [{"Path": f"DS/train/patient0000{i}/1.jpg", "Edema": "1"} for i in (1, 2)]
    loaded = train_full.load_image_table(str(write_table(tmp_path / "DS" / "train.csv", rows)))
    assert [Path(image).is_file() for image in loaded["image"]] == [False, True]


def test_other_tables_have_prompts_patients_and_file_names_of_their_own(tmp_path):
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,patient_id,prompt,Edema\n"ä, b.png",p1,"quoted, with\na line break",\nc.png,,,1\n')
    loaded = train_full.load_image_table(str(table))
    assert list(loaded["patient"]) == ["p1", "c.png"]
    prompts = train_full.add_prompts(loaded, "X {}", "ignore")["prompt"]
    assert list(prompts) == ["quoted, with\na line break", "X Edema"]


def test_imagefolder_datasets_load_like_tables(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / "data" / name)
    (tmp_path / "data" / "metadata.csv").write_text("file_name,patient_id,Edema,Cardiomegaly\na.png,p1,1.0,\nb.png,p2,-1.0,1.0\n")
    args = train_full.parse_args(["--train_unet", f"--dataset_name={tmp_path / 'data'}", "--split=all"])
    data = train_full.load_training_data(args)
    assert list(data.train["prompt"]) == ["Chest X-ray of a subject with Edema", "Chest X-ray of a subject with Cardiomegaly"]
    assert list(data.train["patient"]) == ["p1", "p2"]
    direct = train_full.load_image(str(tmp_path / "data" / "a.png"), 16, "squash")
    assert np.array_equal(train_full.load_image(data.train["image"][0], 16, "squash"), direct)
    assert train_full.image_problem(data.train["image"][0]) is None


def test_geometry_keeps_what_it_promises(tmp_path):
    white = tmp_path / "white.png"
    Image.new("L", (40, 20), 255).save(white)
    assert (train_full.load_image(str(white), 16, "squash") == 255).all()
    assert (train_full.load_image(str(white), 16, "crop") == 255).all()
    padded = train_full.load_image(str(white), 16, "pad")
    assert (padded[0] == 0).all() and (padded[-1] == 0).all() and (padded[8] == 255).all()
    left = tmp_path / "left.png"
    Image.fromarray(np.repeat([[255] * 10 + [0] * 30], 20, axis=0).astype(np.uint8)).save(left)
    squashed = train_full.load_image(str(left), 16, "squash")
    # No flip: the marker stays on its side.
    assert squashed.shape == (16, 16, 3) and squashed[:, :3].min() > 200 and squashed[:, 8:].max() < 20


@pytest.mark.parametrize("mode, suffix", [("L", "jpg"), ("L", "png"), ("RGB", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("CMYK", "jpg"), ("L", "tif"), ("L", "bmp")])
def test_still_8_bit_images_are_accepted(mode, suffix, tmp_path):
    path = picture(tmp_path / f"image.{suffix}", mode=mode)
    assert train_full.image_problem(path) is None
    assert train_full.load_image(path, 8, "squash").shape == (8, 8, 3)


def test_bad_images_are_told_apart(tmp_path):
    whole = Path(picture(tmp_path / "whole.jpg", (200, 200))).read_bytes()
    png = Path(picture(tmp_path / "whole.png", (200, 200))).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "trailing.jpg").write_bytes(whole + b"\0" * 500)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    problems = {name: train_full.image_problem(str(tmp_path / name)) for name in ("cut.jpg", "cut.png", "text.jpg", "empty.jpg", "deep.png", "moving.gif", "absent.jpg")}
    assert all(problem and name in problem for name, problem in problems.items()), problems
    assert "8 bits" in problems["deep.png"] and "2 frames" in problems["moving.gif"] and "no such file" in problems["absent.jpg"]
    assert train_full.image_problem(str(tmp_path / "trailing.jpg")) is None


def make_stream(images: int, **options) -> train_full.SampleStream:
    defaults = {"seed": 3, "resolution": 64, "resize_mode": "squash", "input_ids": torch.zeros(images + 1, 77, dtype=torch.long), "with_pixels": False}
    return train_full.SampleStream(
        list(range(images)), list(range(images)), (4, 8, 8), 1000, moments=np.zeros((images, 8, 8, 8), np.float16), **(defaults | options)
    )


@pytest.mark.parametrize("processes, batch_size, accumulation", [(1, 3, 1), (2, 3, 1), (4, 2, 2), (3, 1, 5)])
def test_every_image_comes_once_an_epoch_whatever_the_layout(processes, batch_size, accumulation):
    images, batches = 37, 40
    stream = make_stream(images)
    parts = [list(train_full.rank_batches(0, batches, batch_size, rank, processes)) for rank in range(processes)]
    order = [n for batch in zip(*parts) for n in itertools.chain(*batch)]
    assert order == list(range(batches * batch_size * processes))
    for epoch in range(len(order) // images):
        assert sorted(stream.index(n) for n in range(epoch * images, (epoch + 1) * images)) == list(range(images))
    assert [stream.index(n) for n in range(images)] != [stream.index(n) for n in range(images, 2 * images)]
    # Going on after any number of samples is the tail of the same order.
    assert list(train_full.rank_batches(batch_size * processes, batches - 1, batch_size, 0, processes)) == parts[0][1:]


def test_samples_are_a_function_of_seed_and_number():
    stream, other = make_stream(10), make_stream(10, seed=4)
    first, again = stream[13], make_stream(10)[13]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], stream[14]["noise"]) and not torch.equal(first["noise"], other[13]["noise"])
    assert not torch.equal(first["noise"], first["latent_noise"])
    drawn = torch.stack([stream[n]["noise"] for n in range(200)])
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02
    timesteps = torch.tensor([int(stream[n]["timesteps"]) for n in range(2000)]).float()
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and abs(timesteps.mean() - 499.5) < 25


def test_caption_dropout_and_noise_offset():
    ids = torch.arange(11)[:, None].expand(11, 77)
    dropped = [int(make_stream(10, input_ids=ids, caption_dropout=0.25)[n]["input_ids"][0]) == 10 for n in range(2000)]
    assert abs(np.mean(dropped) - 0.25) < 0.03
    plain, offset = make_stream(10)[5]["noise"], make_stream(10, noise_offset=0.5)[5]["noise"]
    shift = offset - plain
    assert shift.std(dim=(1, 2)).max() < 1e-6 and shift.abs().max() > 0.05


def test_heldout_samples_are_the_same_for_every_seed_and_cover_the_timesteps():
    one, two = make_stream(100, heldout=True), make_stream(100, heldout=True, seed=99)
    assert all(torch.equal(one[7][name], two[7][name]) for name in one[7])
    timesteps = sorted(int(one[n]["timesteps"]) for n in range(100))
    assert max(b - a for a, b in zip(timesteps, timesteps[1:])) < 30 and [one.index(n) for n in range(100)] == list(range(100))
