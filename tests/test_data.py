"""The image table, the split, prompts, images and the stream of samples."""

import gzip
import itertools
import os
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from common import phantoms, picture, small_table, write_table
from PIL import Image

import train_full
from train_full import load_image


def load(table, *flags):
    return train_full.load_training_data(train_full.parse_args(["--train_unet", f"--data_csv={table}", *flags]))


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path):
    for patient in "12345":
        picture(tmp_path / f"patient0000{patient}" / "1.jpg")
    rows = [
        {"Path": "patient00001/1.jpg", "Edema": "1.0", "Cardiomegaly": "1"},
        {"Path": "patient00002/1.jpg", "Edema": "1.0", "Frontal/Lateral": "Lateral"},
        {"Path": "patient00003/1.jpg", "Edema": "0.0"},
        {"Path": "patient00004/1.jpg", "Edema": "-1.0"},
        {"Path": "patient00005/1.jpg", "Support Devices": "1.0", "No Finding": "1.0", "Pneumonia": "-1"},
    ]
    table = write_table(tmp_path / "t.csv", rows)
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # as spreadsheets save it
    data, template = load(table, "--split=all"), "Chest X-ray of a subject with "
    assert data.rows == 5 and list(data.left_out.values()) == [1, 2, 0]
    # Findings in CheXpert's order, uncertain ones not named.
    assert list(data.train["prompt"]) == [template + "Cardiomegaly, Edema", template + "No Finding, Support Devices"]
    assert list(data.train["patient"]) == ["patient00001", "patient00005"]
    ones = load(table, "--split=all", "--uncertain=ones", "--prompt_template=A film: {}.")
    findings = ["Cardiomegaly, Edema", "Edema", "No Finding, Pneumonia, Support Devices"]
    assert list(ones.train["prompt"]) == [f"A film: {text}." for text in findings]


@pytest.mark.parametrize("resize_mode", ["squash", "pad", "crop"])
def test_a_gray_image_gives_the_pixels_of_a_color_one(resize_mode, tmp_path):
    gray = picture(tmp_path / "gray.png", (70, 50))
    Image.open(gray).convert("RGB").save(tmp_path / "color.png")
    one, two = (load_image(str(path), 32, resize_mode) for path in (gray, tmp_path / "color.png"))
    assert one.shape == (32, 32, 3) and one.std() > 1 and np.array_equal(one, two)


def test_the_split_is_by_patient_stable_and_of_the_papers_sizes():
    patients = pd.Series([f"patient{i:05d}" for i in range(64_540)])
    splits = train_full.split_of(pd.DataFrame({"patient": patients}), 0)
    assert splits.value_counts(normalize=True).to_dict() == pytest.approx(train_full.SPLIT_FRACTIONS, abs=0.01)
    # Fixed values: the split must not change from version to version.
    assert list(splits[:8]) == ["train", "test", "train", "test", "train", "test", "test", "test"]
    shuffled = pd.DataFrame({"patient": patients.sample(frac=0.3, random_state=1)})
    assert (train_full.split_of(shuffled, 0) == splits[shuffled.index]).all()
    assert not (train_full.split_of(pd.DataFrame({"patient": patients}), 1) == splits).all()
    data = load(phantoms())
    assert len(data.train) and len(data.heldout) and data.train["patient"].duplicated().any()
    assert not set(data.train["patient"]) & set(data.heldout["patient"])


def test_ready_made_tables_are_used_in_full_with_a_warning_about_shared_patients(tmp_path):
    header, *rows = small_table(tmp_path, 9).read_text().splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join([header, *rows[:5]]))
    (tmp_path / "valid.csv").write_text("".join([header, *rows[3:]]))
    data = load(tmp_path / "train.csv", f"--validation_csv={tmp_path / 'valid.csv'}")
    assert (len(data.train), len(data.heldout)) == (5, 6)
    assert any(note.startswith("2 training patients are also in") for note in data.notes)


@pytest.mark.parametrize("layout", ["root", "parent", "renamed", "image_root"])
def test_paths_are_found_where_chexpert_puts_them(layout, tmp_path):
    """CheXpert's paths start with the data set's own folder, which resized copies rename."""
    folder, path = tmp_path / ("CheXpert-512" if layout == "renamed" else "CheXpert-v1.0"), "train/patient00001/1.jpg"
    picture(folder / path)
    name = path if layout == "root" else f"CheXpert-v1.0/{path}"
    rows = [{"Path": name.replace("1.jpg", "0.jpg"), "Edema": "1"}, {"Path": name, "Edema": "1"}]
    elsewhere = layout == "image_root"
    table = write_table((tmp_path if elsewhere else folder) / "train.csv", rows)
    loaded = train_full.load_image_table(str(table), str(tmp_path) if elsewhere else None)
    # The first image is missing, which does not hide the other.
    assert [Path(image).is_file() for image in loaded["image"]] == [False, True]


def test_other_tables_have_prompts_patients_and_file_names_of_their_own(tmp_path):
    picture(tmp_path / "ä, b.png")
    content = 'file_name,patient_id,prompt,Edema\n"ä, b.png",p1,"quoted, with\na line break",\nc.png,,,1\n'
    (tmp_path / "metadata.csv").write_text(content, encoding="utf-8")
    loaded = train_full.load_image_table(str(tmp_path / "metadata.csv"))
    assert list(loaded["patient"]) == ["p1", "c.png"]
    prompts = train_full.add_prompts(loaded, train_full.LABELS, "X {}", "ignore")["prompt"]
    assert list(prompts) == ["quoted, with\na line break", "X Edema"]


LATERAL = "Path,Edema\na_lateral.png,1\nbilateral.png,1\nc.png,1\n"
NIH = "file_name,Effusion,Mass,Edema,index,Age\na.png,1,1,0,0,1\nb.png,0,1,1,1,60\nc.png,0,0,0,1,5\n"
SPELLED = "File Name,No finding,pleural_effusion,View Position\na.png,1,0,PA\nb.png,0,1,LATERAL\nc.png,-1,1,AP\n"
OWN_SPLIT = "file_name,split,Edema\na.png,train,1\nb.png,test,1\nc.png,Validation,1\n"
TEXTS = "file_name,text,Edema\na.png,Small effusion.,1\nb.png,nan,1\nc.png,NaN,0\n"
THREE = "Path,COVID-19,Lung Opacity,tuberculosis\na.png,1,,1\nb.png,,1,\nc.png,-1,,1\n"
LATIN = "Path;prompt\na.png;Erguß, links\n".encode("latin-1")
# Table, flags, the images and captions that are trained on, and words of the block at the start.
TABLES_OF_OTHERS = {
    "laterals in the path": (LATERAL, [], {"bilateral": "Edema", "c": "Edema"}, "1 '_lateral in the path"),
    "views": ("Path,view,Edema\na.png,LL,1\nb.png,pa,1\nc.png,,1\n", [], {"b": "Edema"}, "(from 'view')"),
    "unused labels": (NIH, [], {"b": "Edema"}, "0/1 columns Effusion, Mass; name them with --labels"),
    "their labels": (NIH, ["--labels", "Mass", "Effusion"], {"a": "Mass, Effusion", "b": "Mass"}, "columns Edema;"),
    "spelling": (SPELLED, [], {"a": "No Finding", "c": "Pleural Effusion"}, "No Finding (from 'No finding')"),
    "split": (OWN_SPLIT, ["--split=train"], {"a": "Edema"}, "of the table: {'train': 1, 'test': 1, 'val': 1}"),
    "half a split": (OWN_SPLIT.replace("test", ""), [], {x: "Edema" for x in "abc"}, "not every row has train"),
    "blanks": (TEXTS.replace("nan", "N/A"), [], {"a": "Small effusion.", "b": "Edema"}, "prompt (from 'text')"),
    "texts": (TEXTS, [], {"a": "Small effusion.", "b": "Edema"}, "prompt (from 'text')"),
    "three labels": (
        THREE,
        ["--labels", "Tuberculosis", "COVID-19"],
        {"a": "Tuberculosis, COVID-19", "c": "Tuberculosis"},
        "columns Lung Opacity;",
    ),
    "semicolons": (LATIN, [], {"a": "Erguß, links"}, "separated by ';', Windows-1252"),
    "tabs": (OWN_SPLIT.replace(",", "\t"), [], {x: "Edema" for x in "abc"}, "separated by '\\t', UTF-8"),
    "gzip": (gzip.compress(OWN_SPLIT.encode()), [], {x: "Edema" for x in "abc"}, "3 rows, separated by ','"),
    "repeated": ("Path,Edema\na.png,1\na.png,1\nb.png,1\n", [], {"a": "Edema", "b": "Edema"}, "1 rows list the"),
}


@pytest.mark.parametrize("case", TABLES_OF_OTHERS)
def test_tables_of_others_are_read_right_and_nothing_is_ignored_in_silence(case, tmp_path):
    content, flags, expected, words = TABLES_OF_OTHERS[case]
    for name in ("a", "b", "c", "a_lateral", "bilateral"):
        picture(tmp_path / f"{name}.png")
    table = tmp_path / ("t.csv.gz" if case == "gzip" else "t.csv")
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    data = load(table, *(flags if case == "split" else ["--split=all", *flags]), "--prompt_template={}")
    assert dict(zip(data.train["name"].str.removesuffix(".png"), data.train["prompt"])) == expected
    assert words in "; ".join(text for _, text in data.block)
    if case == "split":
        assert list(data.heldout["name"]) == ["c.png"] and list(data.val_counts[0].values())[2] == 1
    assert data.own_prompts == {"texts": 1, "blanks": 1, "semicolons": 1}.get(case, 0)


def test_a_folder_called_inpatient_is_no_patient(tmp_path):
    rows = [{"Path": f"inpatient2020/{i}.png", "Edema": "1"} for i in range(60)]
    for row in rows:
        picture(tmp_path / row["Path"])
    data = load(write_table(tmp_path / "t.csv", rows))
    assert data.train["patient"].is_unique and 0 < len(data.train) < 60 and len(data.heldout)
    assert any(note.startswith("some rows have no patient_id") for note in data.notes)


def test_a_wrong_image_root_is_named(tmp_path, capsys):
    picture(tmp_path / "a.png")
    (tmp_path / "other").mkdir()
    table = write_table(tmp_path / "t.csv", [{"Path": "a.png", "Edema": "1"}])
    with pytest.raises(SystemExit) as ended:
        load(table, f"--image_root={tmp_path / 'other'}")
    assert ended.value.code == 2
    assert f"none of its images exist under {tmp_path / 'other'}, such as a.png" in capsys.readouterr().err


def save_dataset(folder, features, **columns):
    """Write a Hugging Face data set of as many noise images as the columns have rows, which parquet files hold."""
    count = len(next(iter(columns.values())))
    images = [{"path": None, "bytes": Path(picture(folder.parent / f"{i}.png")).read_bytes()} for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), **features})
    folder.mkdir()
    datasets.Dataset.from_dict({"image": images, **columns}, features).to_parquet(folder / "train.parquet")
    return folder


def load_dataset(folder, *flags):
    args = train_full.parse_args(["--train_unet", f"--dataset_name={folder}", "--split=all", *flags])
    return train_full.load_training_data(args)


def test_classes_of_a_dataset_are_named_not_numbered(tmp_path):
    marks = datasets.ClassLabel(names=["unlabeled", "uncertain", "absent", "present"])
    findings = datasets.Sequence(datasets.ClassLabel(names=["Mass", "Fracture"]))
    text = datasets.Value("string")
    rows = {"Edema": [3, 1, 0, 3], "found": [[], [1], [0, 1], []]}
    rows["Path"] = [f"files/patient0000{i}/{i}.png" for i in (1, 1, 2, 3)]
    folder = save_dataset(tmp_path / "d", {"Edema": marks, "found": findings, "Path": text}, **rows)
    data = load_dataset(folder, "--prompt_template={}")
    assert list(data.train["prompt"]) == ["Edema", "Fracture", "Fracture", "Edema"]
    assert list(data.train["patient"]) == ["patient00001", "patient00001", "patient00002", "patient00003"]
    ones = load_dataset(folder, "--uncertain=ones", "--labels", "Mass", "Edema", "--prompt_template={}").train
    assert list(ones["prompt"]) == ["Edema", "Edema", "Mass", "Edema"]
    assert "Mass" in dict(data.block)["not used"]


def test_class_folders_are_captions_or_labels_and_parts_of_a_dataset_its_split(tmp_path):
    for i, part in enumerate(["train/Normal", "train/COVID-19", "test/COVID-19"]):
        picture(tmp_path / "data" / part / f"{i}.png")
    captions = load_dataset(tmp_path / "data", "--caption_column=label").train["prompt"]
    assert sorted(captions) == ["COVID-19", "COVID-19", "Normal"]
    flags = ["--labels", "normal", "COVID-19", "--prompt_template={}", "--split=train"]
    assert sorted(load_dataset(tmp_path / "data", *flags).train["prompt"]) == ["COVID-19", "normal"]


def test_the_model_card_says_that_captions_were_texts():
    args = train_full.parse_args(["--train_unet", f"--data_csv={phantoms()}"])
    summary = {"trainable_parameters": {}, "results": [], "method": "unet", "images": 3, "steps": 1}
    summary |= {"global_batch_size": 1, "example_prompt": "Small effusion.", "own_prompts": 2}
    assert "2 images were trained on texts of their own, such as reports" in str(
        train_full.model_card(args, summary, "")
    )
    assert "own" not in str(train_full.model_card(args, summary | {"own_prompts": 0}, ""))


def test_imagefolder_datasets_load_like_tables(tmp_path):
    direct = [load_image(picture(tmp_path / "data" / name), 16, "squash") for name in ("a.png", "b.png")]
    content = "file_name,patient_id,Edema,Cardiomegaly\na.png,p1,1.0,\nb.png,p2,-1.0,1.0\n"
    (tmp_path / "data" / "metadata.csv").write_text(content)
    args = train_full.parse_args(["--train_unet", f"--dataset_name={tmp_path / 'data'}", "--split=all"])
    train = train_full.load_training_data(args).train
    assert list(train["prompt"]) == [f"Chest X-ray of a subject with {text}" for text in ("Edema", "Cardiomegaly")]
    assert list(train["patient"]) == ["p1", "p2"]
    assert np.array_equal([load_image(image, 16, "squash") for image in train["image"]], direct)


def test_an_empty_cell_of_a_dataset_is_an_unreadable_image(tmp_path):
    rows = {"image": [str(picture(tmp_path / "a.png")), None], "text": ["one", "two"]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    images = [(dataset, "image", row) for row in (0, 1)]
    args = train_full.parse_args(["--train_unet", f"--data_csv={phantoms()}", f"--output_dir={tmp_path / 'run'}"])
    assert len(set(train_full.latent_paths(images, "0" * 64, args))) == 2
    with pytest.raises(ValueError, match="row 1: "):
        load_image(images[1], 16, "squash")


def test_geometry(tmp_path):
    white, left = str(tmp_path / "white.png"), str(tmp_path / "left.png")
    Image.new("L", (40, 20), 255).save(white)
    assert (load_image(white, 16, "squash") == 255).all() and (load_image(white, 16, "crop") == 255).all()
    padded = load_image(white, 16, "pad")
    assert (padded[[0, -1]] == 0).all() and (padded[8] == 255).all()
    # No flip: what is on the left stays there.
    Image.fromarray(np.repeat([[255] * 10 + [0] * 30], 20, axis=0).astype(np.uint8)).save(left)
    squashed = load_image(left, 16, "squash")
    assert squashed.shape == (16, 16, 3) and squashed[:, :3].min() > 200 and squashed[:, 8:].max() < 20


def test_still_8_bit_images_are_read(tmp_path):
    for name in "L.jpg L.png RGB.jpg P.png LA.png RGBA.png 1.png CMYK.jpg L.tif RGB.tif L.bmp".split():
        path = picture(tmp_path / name, mode=name.split(".")[0])
        assert load_image(path, 8, "squash").shape == (8, 8, 3)


def write_deep_png(path, colour_type, channels):
    """Write 4x4 pixels of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">2I5B", 4, 4, 16, colour_type, 0, 0, 0)
    pixels = zlib.compress((b"\0" + b"\x12\x34" * channels * 4) * 4)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def test_other_images_are_refused(tmp_path):
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / name)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    write_deep_png(tmp_path / "rgb.png", 2, 3)
    write_deep_png(tmp_path / "grey_alpha.png", 4, 2)
    # Pillow does not write these either: change the bits per sample, and for the second the planar configuration.
    deep = Path(picture(tmp_path / "rgb.tif", mode="RGB"))
    deep.write_bytes(deep.read_bytes().replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)))
    planar = [struct.pack("<HHIH", 284, 3, 1, value) for value in (1, 2)]
    (tmp_path / "planar.tif").write_bytes(deep.read_bytes().replace(*planar))
    for name in ("moving.gif", "moving.png", "moving.tif"):
        frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    whole = Path(picture(tmp_path / "cut.jpg", (200, 200)))
    whole.write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "more.img").write_bytes(bytes(128) + b"DICM" + bytes(100))
    expected = {"moving": "more than one frame", "cut": "truncated", "text": "identify", "absent": "no such file"}
    expected |= dict.fromkeys(["scan", "more"], "a DICOM file; convert it with launch/make_table.py")
    for name in [*os.listdir(tmp_path), "absent.jpg"]:
        with pytest.raises(ValueError, match=expected.get(name[:-4], "more than 8 bits")) as error:
            load_image(str(tmp_path / name), 8, "squash")
        assert name in str(error.value)


@pytest.fixture
def make_stream(tmp_path):
    """Return a function that makes a stream whose captions are the numbers of the images, and -1 the empty one."""
    np.save(tmp_path / "latents.npy", np.zeros((8, 8, 8), np.float16))
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1000))
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    pipeline = SimpleNamespace(vae=vae, vae_scale_factor=8, scheduler=scheduler)
    defaults = {"resolution": 64, "resize_mode": "squash", "seed": 3, "caption_dropout": 0.0, "noise_offset": 0.0}

    def make(images, heldout=False, **options):
        table = pd.DataFrame({"image": map(str, range(images)), "prompt": map(str, range(images))})
        captions = {text: {"input_ids": torch.tensor(int(text or -1))} for text in [*table["prompt"], ""]}
        latents, args = [tmp_path / "latents.npy"] * images, SimpleNamespace(**defaults | options)
        return train_full.SampleStream(table, latents, captions, pipeline, args, heldout=heldout)

    return make


@pytest.mark.parametrize("processes, batch_size", [(1, 3), (2, 3), (4, 2), (3, 1)])
def test_every_image_comes_once_an_epoch_in_any_layout(processes, batch_size, make_stream):
    args, stream = SimpleNamespace(train_batch_size=batch_size, dataloader_num_workers=0), make_stream(37)

    class Numbers(torch.utils.data.Dataset):
        def __getitem__(self, n):
            return {"n": torch.tensor(n)}

    def order(first_sample, num_batches):
        parts, layout = [], {"device": torch.device("cpu"), "num_processes": processes}
        for rank in range(processes):
            process = SimpleNamespace(process_index=rank, **layout)
            batches = train_full.iterate_batches(process, Numbers(), args, first_sample, num_batches)
            parts.append([batch["n"].tolist() for batch in batches])
        return [n for batch in zip(*parts) for n in itertools.chain(*batch)]

    size = processes * batch_size
    assert order(0, 40) == list(range(40 * size))
    assert order(3 * size, 37) == list(range(3 * size, 40 * size))  # as after resuming
    epochs = [[stream.image_index(n) for n in range(start, start + 37)] for start in (0, 37, 74)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs) and epochs[0] != epochs[1]


def test_samples_are_a_function_of_seed_and_number(make_stream):
    stream, other = make_stream(10), make_stream(10, seed=4)
    first, again = stream[13], make_stream(10)[13]
    assert first.keys() == {"noise", "posterior_noise", "timesteps", "input_ids", "posterior"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first["input_ids"] == stream.image_index(13)
    for noise in (stream[14]["noise"], other[13]["noise"], first["posterior_noise"]):
        assert not torch.equal(first["noise"], noise)
    noise = torch.stack([stream[n]["noise"] for n in range(200)])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    timesteps = torch.tensor([int(stream[n]["timesteps"]) for n in range(2000)]).float()
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and abs(timesteps.mean() - 499.5) < 25


def test_caption_dropout_and_noise_offset(make_stream):
    stream, plain = make_stream(10, caption_dropout=0.25), make_stream(10)
    assert np.mean([int(stream[n]["input_ids"]) == -1 for n in range(2000)]) == pytest.approx(0.25, abs=0.03)
    assert all(int(plain[n]["input_ids"]) >= 0 for n in range(100))
    shift = make_stream(10, noise_offset=0.5)[5]["noise"] - plain[5]["noise"]
    assert shift.std(dim=(1, 2)).max() < 1e-6 and shift.abs().max() > 0.05


def test_heldout_samples_are_the_same_for_every_seed_and_cover_the_timesteps(make_stream):
    one = make_stream(100, heldout=True)
    two = make_stream(100, heldout=True, seed=99, caption_dropout=1.0, noise_offset=1.0)
    assert all(torch.equal(one[7][name], two[7][name]) for name in one[7])
    timesteps = sorted(int(one[n]["timesteps"]) for n in range(100))
    assert max(b - a for a, b in itertools.pairwise(timesteps)) < 30
    assert [one.image_index(n) for n in range(100)] == list(range(100))
