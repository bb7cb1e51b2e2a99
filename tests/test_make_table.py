"""launch/make_table.py on made data of each kind: pixels as pydicom shows them, labels and patients worked out by hand."""

import gzip
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import test_copies
import test_standalone
from common import BASE, ROOT, picture
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

import eval_downstream
import eval_generation
import sample
import train_peft

sys.path.insert(0, str(ROOT / "launch"))
import make_table

RAMP = np.linspace(0, 4095, 32 * 40).round().astype(np.uint16).reshape(32, 40)


def write_dicom(path, pixels=RAMP, **elements):
    """Write a DICOM file of 12 bits stored in 16, unless `elements` say otherwise, and return its dataset."""
    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = DigitalXRayImageStorageForPresentation
    bits = 8 * pixels.itemsize
    defaults = {"Modality": "DX", "PhotometricInterpretation": "MONOCHROME2", "BitsStored": min(bits, 12)}
    defaults |= {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "SamplesPerPixel": 1, "BitsAllocated": bits}
    for name, value in (defaults | {"PixelRepresentation": 0} | elements).items():
        setattr(file, name, value)
    file.HighBit = file.BitsStored - 1
    file.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return file


def deep_picture(path, pixels=RAMP * 8 + 1000):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.write(text)
    return path


def make(source, folder, *more):
    """Run the script on a folder and return its table as strings."""
    output = folder.parent / f"{folder.name}-table"
    argv = ["--source", source, "--data_dir", folder, "--num_workers", 1, "--output_dir", output, *more]
    make_table.main(make_table.parse_args([*map(str, argv)]))
    return pd.read_csv(output / "table.csv", dtype=str, keep_default_na=False)


def pixels_of(folder, table, row=0):
    return np.asarray(Image.open(folder.parent / f"{folder.name}-table" / table["file_name"][row])).astype(int)


def load_as_the_scripts_do(folder, monkeypatch):
    """Read a table in the training's way, from a folder that has nothing to do with it, and return the split."""
    monkeypatch.chdir("/")
    csv = folder.parent / f"{folder.name}-table" / "table.csv"
    return train_peft.load_training_data(train_peft.parse_args(["--method", "lora", "--data_csv", str(csv)]))


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def lookup_table(values, bits):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(values), 0, bits], np.array(values, "<u2").tobytes()
    return [item]


SHOWN = {
    "window": {"WindowCenter": 2000, "WindowWidth": 1500},
    "MONOCHROME1": {"WindowCenter": [1500, 9], "WindowWidth": [2000, 9], "PhotometricInterpretation": "MONOCHROME1"},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"},
    "lookup": {"VOILUTSequence": lookup_table(np.arange(4096) ** 2 // 4095, 12), "PhotometricInterpretation": "MONOCHROME1"},
    "rescaled": {"WindowCenter": 300, "WindowWidth": 400, "RescaleSlope": 0.25, "RescaleIntercept": -100},
}


@pytest.mark.parametrize("kind", SHOWN)
def test_dicom_pixels_are_what_pydicom_shows(kind, tmp_path):
    file = write_dicom(tmp_path / "in/a/1", **SHOWN[kind])
    write_dicom(tmp_path / "in/b/2", **SHOWN[kind])
    shown = apply_voi_lut(apply_modality_lut(file.pixel_array, file), file)
    low, high = {"rescaled": (-100, 0.25 * 4095 - 100)}.get(kind, (0, 4095))  # of the output, by the standard
    expected = (shown - low) / (high - low) * 255
    expected = 255 - expected if "PhotometricInterpretation" in SHOWN[kind] else expected
    assert expected.min() < 1 and expected.max() > 254 or kind == "sigmoid"
    assert np.abs(pixels_of(tmp_path / "in", make("dicom", tmp_path / "in")) - expected).max() <= 1


def test_dicom_without_a_window(tmp_path):
    write_dicom(tmp_path / "in/a/deep.dcm")
    write_dicom(tmp_path / "in/b/eight.dcm", (RAMP // 32).astype(np.uint8))
    table = make("dicom", tmp_path / "in")
    low, high = np.percentile(RAMP, (0.5, 99.5))
    assert np.abs(pixels_of(tmp_path / "in", table) - ((RAMP - low) / (high - low) * 255).clip(0, 255)).max() <= 1
    assert (pixels_of(tmp_path / "in", table, 1) == RAMP // 32).all()


def test_negative_slope_and_broken_lookup_table(tmp_path, capsys):
    # Stored values fall as the rescaled ones rise, so the image is inverted, and the window with it.
    write_dicom(tmp_path / "in/a/1", WindowCenter=-2000, WindowWidth=4096, RescaleSlope=-1, RescaleIntercept=0)
    write_dicom(tmp_path / "in/b/2", VOILUTSequence=lookup_table(np.arange(4096) // 16, 8))
    table = make("dicom", tmp_path / "in", "--on_bad_image", "skip")
    assert "1 unreadable" in capsys.readouterr().out and len(table) == 1
    expected = ((4048 - RAMP.astype(float)) / 4095 * 255).clip(0, 255)
    assert np.abs(pixels_of(tmp_path / "in", table) - expected).max() <= 1


def test_deep_png_and_tiff(tmp_path):
    deep_picture(tmp_path / "in/a/1.png")
    deep_picture(tmp_path / "in/b/2.tif")
    pixels = RAMP.astype(int) * 8 + 1000
    table = make("folder", tmp_path / "in", "--size", "0")
    low, high = np.percentile(pixels, (0.5, 99.5))
    for row in (0, 1):
        expected = ((pixels - low) / (high - low) * 255).clip(0, 255)
        assert np.abs(pixels_of(tmp_path / "in", table, row) - expected).max() <= 1
    (tmp_path / "in-table/table.csv").unlink()
    table = make("folder", tmp_path / "in", "--window=9000,17000", "--size=16", "--num_workers=2")
    expected = ((pixels - 9000) / 8000 * 255).clip(0, 255).reshape(16, 2, 20, 2).mean(axis=(1, 3))
    image = pixels_of(tmp_path / "in", table)
    assert image.shape == (16, 20) and np.abs(image - expected)[2:-2, 2:-2].mean() < 3


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------

NIH = """Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,\
Height],OriginalImagePixelSpacing[x,y],
00000001_000.png,Cardiomegaly|Effusion,0,1,057Y,M,PA,1,1,1,1,
00000001_001.png,No Finding,1,1,58,M,AP,1,1,1,1,
00000002_000.png,Pleural_Thickening,0,2,411,F,PA,1,1,1,1,
00000003_000.png,Hernia|Effusion,0,3,41,F,PA,1,1,1,1,
"""


def nih_data(folder):
    write(folder / "Data_Entry_2017.csv", NIH.replace("\\\n", ""))
    for i, name in enumerate(["00000001_000", "00000001_001", "00000002_000"]):
        picture(folder / f"images_{i + 1:03}/images/{name}.png")
    return folder


def test_nih(tmp_path, monkeypatch, capsys):
    table = make("nih", nih_data(tmp_path / "in"))
    assert list(table["file_name"])[0] == "../in/images_001/images/00000001_000.png"
    columns = "patient_id Frontal/Lateral AP/PA Sex Age Cardiomegaly|Hernia|No Finding|Pleural Effusion|Pleural_Thickening"
    columns = [*columns.split()[:5], *columns.split(" ", 5)[5].split("|")]
    assert table[columns].to_numpy().tolist() == [
        "1 Frontal PA Male 57 1 0 0 1 0".split(),
        "1 Frontal AP Male 58 0 0 1 0 0".split(),
        ["2", "Frontal", "PA", "Female", "", *"0 0 0 0 1".split()],  # of 411 years
    ]
    assert "split" not in table
    shown = capsys.readouterr().out
    assert "3 of 2 patients" in shown and "1 without an image file" in shown and "3 used where they are" in shown
    assert "Hernia 0" in shown.split("others")[1] and not (tmp_path / "in-table/converted-512").exists()
    write(tmp_path / "in/train_val_list.txt", "00000001_000.png\n00000001_001.png\n")
    write(tmp_path / "in/test_list.txt", "00000002_000.png\n00000003_000.png\n")
    (tmp_path / "in-table/table.csv").unlink()
    table = make("nih", tmp_path / "in", "--val_fraction", "0")
    assert list(table["split"]) == ["train", "train", "test"]
    assert set(load_as_the_scripts_do(tmp_path / "in", monkeypatch).train["patient"]) <= {"1", "2"}
