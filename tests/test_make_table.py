"""launch/make_table.py on made data of each kind: pixels as pydicom shows them, labels and patients by hand."""

import gzip
import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import test_copies
import test_standalone
from common import ROOT, picture, run_main, train
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
    "lookup": {
        "VOILUTSequence": lookup_table(np.arange(4096) ** 2 // 4095, 12),
        "PhotometricInterpretation": "MONOCHROME1",
    },
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
# Sources: tables, images, flags, and the table.csv that is expected, worked out by hand.
# ---------------------------------------------------------------------------------------------------------------------

NIH = """\
Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,Original[Width,Height],
00000001_000.png,Cardiomegaly|Effusion,0,1,057Y,M,PA,1,1,
00000001_001.png,No Finding,1,1,58,M,AP,1,1,
00000002_000.png,Pleural_Thickening,0,2,411,F,PA,1,1,
00000003_000.png,Hernia|Effusion,0,3,41,F,PA,1,1,
"""
MIMIC_LABELS = "subject_id,study_id,Edema,No Finding,Pleural Effusion\n1,11,-1.0,,1.0\n2,22,,1.0,0.0\n"
CHEXPERT = "CheXpert-v1.0 batch"
PADCHEST = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
CASES = {
    "nih": {  # one image is not there, and an age is wrong
        "Data_Entry_2017.csv": NIH,
        "train_val_list.txt": "00000001_000.png\n00000001_001.png\n",
        "test_list.txt": "00000002_000.png\n00000003_000.png\n",
        "images": "images_001/images/00000001_000.png images_002/images/00000001_001.png "
        "images_012/images/00000002_000.png",
        "flags": "--val_fraction 0",
        "printed": [
            "3, patients: 2",
            "Hernia 0; to use them, pass --labels",
            "3 used where",
            "1 without an image file",
        ],
        "expected": """\
file_name,patient_id,Frontal/Lateral,AP/PA,Sex,Age,split,No Finding,Cardiomegaly,Pleural Effusion,Hernia,\
Pleural_Thickening
../in/images_001/images/00000001_000.png,1,Frontal,PA,Male,57,train,0,1,1,0,0
../in/images_002/images/00000001_001.png,1,Frontal,AP,Male,58,train,1,0,0,0,0
../in/images_012/images/00000002_000.png,2,Frontal,PA,Female,,test,0,0,0,0,1
""",
    },
    "mimic": {  # an uncertain label, and a study without labels and view
        "mimic-cxr-2.0.0-metadata.csv.gz": """\
dicom_id,subject_id,study_id,ViewPosition,StudyDate
a,1,11,PA,21800506
b,1,11,LATERAL,21800506
c,2,22,AP,21800506
d,3,33,,21800506
""",
        "mimic-cxr-2.0.0-chexpert.csv.gz": MIMIC_LABELS,
        "mimic-cxr-2.0.0-split.csv.gz": "dicom_id,study_id,subject_id,split\na,11,1,train\nb,11,1,train\nc,22,2,test\n\
d,33,3,validate\n",
        "patients.csv": "subject_id,gender,anchor_age,anchor_year\n1,F,52,2178\n2,M,90,2180\n",
        "images": "files/p11/p1/s11/a.jpg files/p11/p1/s11/b.jpg files/p12/p2/s22/c.jpg files/p13/p3/s33/d.jpg",
        "expected": """\
file_name,patient_id,Frontal/Lateral,AP/PA,Sex,Age,split,No Finding,Edema,Pleural Effusion
../in/files/p11/p1/s11/a.jpg,1,Frontal,PA,Female,54,train,,-1,1
../in/files/p11/p1/s11/b.jpg,1,Lateral,,Female,54,train,,-1,1
../in/files/p12/p2/s22/c.jpg,2,Frontal,AP,Male,90,test,1,,0
../in/files/p13/p3/s33/d.jpg,3,,,,,val,,,
""",
    },
    "padchest": {  # "Unchanged" leaves open what else is there
        PADCHEST: """\
ImageID,StudyDate_DICOM,PatientID,PatientBirth,PatientSex_DICOM,Projection,PhotometricInterpretation_DICOM,Report,Labels
a.png,20140915,P1,1930.0,F,PA,MONOCHROME2,uno,"['pulmonary mass', 'pleural effusion', ' cardiomegaly']"
b.png,20140915,P2,1990.0,M,L,MONOCHROME2,dos,['normal']
c.png,20140915,P3,,M,AP_horizontal,MONOCHROME2,tres,"['Unchanged', 'pneumonia']"
d.png,20140915,P3,,M,PA,MONOCHROME2,x,"['exclude', 'normal']"
e.png,20140915,P3,,M,PA,MONOCHROME1,x,['normal']
f.png,20140915,P3,,M,PA,MONOCHROME2,x,
""",
        "deep": "0/a.png 1/b.png 1/c.png 1/d.png 1/e.png 1/f.png",
        "flags": "--prompt_column Report",
        "printed": ["1 marked exclude, 1 MONOCHROME1 as PNG, 1 without labels", "3 written"],
        "expected": """\
file_name,patient_id,Frontal/Lateral,AP/PA,Sex,Age,prompt,No Finding,Cardiomegaly,Pneumonia,Pleural Effusion,\
pulmonary mass,unchanged
images-8bit-512/0/a.png,P1,Frontal,PA,Female,84,uno,0,1,0,1,1,0
images-8bit-512/1/b.png,P2,Lateral,,Male,24,dos,1,0,0,0,0,0
images-8bit-512/1/c.png,P3,Frontal,AP,Male,,tres,,,1,,,1
""",
    },
    "vindr": {  # of b's two readers one says yes and one no
        "annotations/image_labels_train.csv": """\
image_id,rad_id,Pleural effusion,Nodule/Mass,No finding
a,R1,1,0,0
a,R2,1,0,1
a,R3,0,0,0
b,R1,1,0,0
b,R2,0,0,1
""",
        "annotations/image_labels_test.csv": "image_id,Pleural effusion,Nodule/Mass,Other disease\nc,0,1,1\n",
        "dicom": "train/a.dicom train/b.dicom test/c.dicom",
        "flags": "--val_fraction 0",
        "expected": """\
file_name,patient_id,Frontal/Lateral,AP/PA,Sex,Age,split,No Finding,Pleural Effusion,Nodule/Mass,Other diseases
images-8bit-512/train/a.png,a,Frontal,PA,Female,45,train,0,1,0,
images-8bit-512/train/b.png,b,Frontal,PA,Female,45,train,-1,-1,0,
images-8bit-512/test/c.png,c,Frontal,PA,Female,45,test,,0,1,1
""",
    },
    "rsna": {
        "stage_2_train_labels.csv": "patientId,x,y,Target\na,,,0\nb,1,2,1\nb,3,4,1\nc,,,0\n",
        "stage_2_detailed_class_info.csv": "patientId,class\na,Normal\nb,Lung Opacity\nb,Lung Opacity\nc,Not Normal\n",
        "dicom": "stage_2_train_images/a.dcm stage_2_train_images/b.dcm stage_2_train_images/c.dcm",
        "expected": """\
file_name,patient_id,Frontal/Lateral,AP/PA,Sex,Age,No Finding,Lung Opacity,Not Normal
images-8bit-512/stage_2_train_images/a.png,a,Frontal,AP,Female,45,1,0,0
images-8bit-512/stage_2_train_images/b.png,b,Frontal,AP,Female,45,0,1,0
images-8bit-512/stage_2_train_images/c.png,c,Frontal,AP,Female,45,0,0,1
""",
    },
    "chexpert": {
        f"{CHEXPERT} 1 (validate & csv)/train.csv": """\
Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Edema
CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,
CheXpert-v1.0/train/patient30001/study1/view2_lateral.jpg,Male,8,Lateral,,,-1.0
""",
        "test_labels.csv": "Path,Edema\ntest/patient64741/study1/view1_frontal.jpg,0.0\n",
        "images": f"{CHEXPERT} 2 (train 1)/patient00001/study1/view1_frontal.jpg\n"
        f"{CHEXPERT} 3 (train 2)/patient30001/study1/view2_lateral.jpg\ntest/patient64741/study1/view1_frontal.jpg",
        "flags": "--val_fraction 0",
        "expected": f"""\
file_name,patient_id,Frontal/Lateral,AP/PA,Sex,Age,split,No Finding,Edema
../in/{CHEXPERT} 2 (train 1)/patient00001/study1/view1_frontal.jpg,patient00001,Frontal,AP,Female,68,train,1,
../in/{CHEXPERT} 3 (train 2)/patient30001/study1/view2_lateral.jpg,patient30001,Lateral,,Male,8,train,,-1
../in/test/patient64741/study1/view1_frontal.jpg,patient64741,Frontal,,,,test,,0
""",
    },
    "chexpert-plus": {  # reports as prompts, no test set
        "df_chexpert_plus_240401.csv": """\
path_to_image,frontal_lateral,ap_pa,deid_patient_id,section_impression,age,sex,split
train/patient00001/study1/view1_frontal.jpg,Frontal,AP,patient00001,"1. Edema,
  new.",61.0,Male,train
""",
        "chexbert_labels/impression_fixed.json": '{"path_to_image": "train/patient00001/study1/view1_frontal.jpg", \
"Edema": 1.0, "No Finding": null, "Pneumonia": -1.0}',
        "images": "PNG/train/patient00001/study1/view1_frontal.png",
        "flags": "--prompt_column section_impression",
        "expected": """\
file_name,patient_id,Frontal/Lateral,AP/PA,Sex,Age,prompt,Edema,Pneumonia
../in/PNG/train/patient00001/study1/view1_frontal.png,patient00001,Frontal,AP,Male,61,"1. Edema, new.",1,-1
""",
    },
    "folder": {
        "images": "train/NORMAL/p1_a.jpeg test/PNEUMONIA/p2_b.jpeg val/COVID/images/p3_c.png val/COVID/masks/c.png",
        "flags": "--patient_regex p[0-9]",
        "printed": ["1 segmentation masks"],
        "expected": """\
file_name,patient_id,split,No Finding,Pneumonia,COVID
../in/test/PNEUMONIA/p2_b.jpeg,p2,test,0,1,0
../in/train/NORMAL/p1_a.jpeg,p1,train,1,0,0
../in/val/COVID/images/p3_c.png,p3,val,0,0,1
""",
    },
}


def write_case(folder, case):
    split = re.compile("\n" if "\n" in case.get("images", "") else " ").split
    for kind, write_image in (("images", picture), ("deep", deep_picture), ("dicom", write_patient)):
        for name in split(case[kind]) if kind in case else []:
            write_image(folder / name)
    for name, text in case.items():
        if "." in name:
            write(folder / name, text)


def write_patient(path):
    write_dicom(path, PatientID=path.stem, PatientSex="F", PatientAge="045Y", ViewPosition="AP")


@pytest.mark.parametrize("source", CASES)
def test_table_is_as_worked_out_by_hand(source, tmp_path, monkeypatch, capsys):
    case = CASES[source]
    write_case(tmp_path / "in", case)
    make(source, tmp_path / "in", *case.get("flags", "").split())
    assert (tmp_path / "in-table/table.csv").read_text() == case["expected"]
    shown = capsys.readouterr().out
    assert all(text in shown for text in case.get("printed", [])), shown
    # The scripts read it from a folder that has nothing to do with it.
    monkeypatch.chdir("/")
    table = train_peft.load_image_table(str(tmp_path / "in-table/table.csv"))
    for row, image in enumerate(table["image"]):
        assert train_peft.load_image(image, 64, "squash").std() > 0 and Path(image).samefile(
            tmp_path / "in-table" / table["name"][row]
        )


def test_hugging_face(tmp_path):
    picture(tmp_path / "1.png")
    deep_picture(tmp_path / "2.png")
    kind, states = datasets.ClassLabel, ["unlabeled", "uncertain", "absent", "present"]
    kinds = {"image": datasets.Image(), "label": kind(names=["NORMAL", "COVID-19"]), "Sex": kind(names=["M", "F"])}
    kinds |= {"findings": datasets.List(kind(names=["Effusion", "Mass"])), "Edema": kind(names=states)}
    rows = {"image": [str(tmp_path / "1.png"), str(tmp_path / "2.png")], "label": [0, 1], "Sex": [0, 1]}
    rows |= {"findings": [[], [0, 1]], "Edema": [0, 1]}
    for split in ("train", "test"):
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        dataset.to_parquet(tmp_path / f"in/data/{split}-00000-of-00001.parquet")
    table = make("hf", tmp_path / "in", "--val_fraction", "0")
    assert [*table] == "file_name,Sex,split,No Finding,Edema,Pleural Effusion,COVID-19,Mass".split(",")
    expected = ["Male,train,1,,0,0,0", "Female,train,0,-1,1,1,1", "Male,test,1,,0,0,0", "Female,test,0,-1,1,1,1"]
    assert [",".join(row[1:]) for row in table.to_numpy()] == expected
    assert (pixels_of(tmp_path / "in", table) == np.asarray(Image.open(tmp_path / "1.png"))).all()


def hospital(folder):
    """Write DICOM files of two views of 24 patients, with names of no suffix, and return the table of findings."""
    rng, rows = np.random.default_rng(0), ["Accession Number;Pleural effusion;Normal;split;Note"]
    for i in range(24):
        tags = {"PatientID": f"P{i}", "PatientSex": "MF"[i % 2], "PatientAge": "003M", "AccessionNumber": f"A{i}"}
        for view in ("PA", "LL"):
            pixels, tags["ViewPosition"] = rng.integers(0, 4096, (64, 80)).astype(np.uint16), view
            write_dicom(folder / f"study{i}" / f"IM{view}", pixels, **tags, WindowCenter=2048, WindowWidth=4096)
        rows.append(f"A{i};{i % 2};{(i + 1) % 2};{['train', 'val', 'test'][i // 2 % 3]};größer")
    write_dicom(folder / "report", Modality="SR")
    csv = folder.parent / "findings.csv"
    csv.write_bytes("\n".join([*rows, "A99;0;0;train;"]).encode("cp1252"))
    return csv


def test_hospital_through_all_scripts(tmp_path, capsys):
    csv = hospital(tmp_path / "in")
    table = make("dicom", tmp_path / "in", "--labels_csv", csv)
    shown = capsys.readouterr().out
    assert "1 rows of" in shown and "not used: Note" in shown and "1 not radiographs (SR)" in shown
    assert "Lateral 24, Frontal 24; the scripts use the frontal ones" in shown
    patient = [",".join(row) for row in table[table["patient_id"] == "P3"].to_numpy()]
    assert patient[1] == "images-8bit-512/study3/IMPA.png,P3,Frontal,PA,Female,0,val,0,1"
    run, samples, output = tmp_path / "run", tmp_path / "samples", tmp_path / "in-table/table.csv"
    assert train("bitfit", run, csv=output)["results"]
    argv = ["--model", run, "--labels", "Pleural Effusion", "No Finding", "--images_per_label=16", "--resolution=64"]
    run_main(sample, [*map(str, argv), "--num_inference_steps=1", f"--output_dir={samples}"])
    real = [f"--synthetic={samples}", f"--real_csv={output}"]
    small = "--train_on=real --weights=none --resolution=32 --num_seeds=1 --num_train_epochs=1 --train_batch_size=8"
    downstream = f"{small} --bootstrap_samples=20 --output_dir={tmp_path}/downstream"
    run_main(eval_downstream, [*real, *downstream.split()])
    features = f"--features={tmp_path}/downstream/classifier --num_subsamples=3 --output_dir={tmp_path}/evaluation"
    run_main(eval_generation, [*real, *features.split()])
    assert json.loads((tmp_path / "evaluation/generation_metrics.json").read_text())["results"]


# ---------------------------------------------------------------------------------------------------------------------
# Everyday mistakes
# ---------------------------------------------------------------------------------------------------------------------


def test_interrupted_and_finished_runs(tmp_path, capsys):
    for name in ("a/1", "b/2"):
        deep_picture(tmp_path / f"in/{name}.png")
    write(tmp_path / "in/b/3.png", "not an image")
    message = refusal("folder", tmp_path / "in", capsys)
    assert "1 images cannot be read; repair them or pass --on_bad_image skip" in message and "b/3.png" in message
    first = tmp_path / "in-table/images-8bit-512/a/1.png"
    first.write_bytes(b"kept")
    assert len(make("folder", tmp_path / "in", "--on_bad_image", "skip")) == 2 and first.read_bytes() == b"kept"
    assert [path.name for path in (tmp_path / "in-table").rglob("*.tmp")] == []
    assert "table.csv exists already; delete it" in refusal("folder", tmp_path / "in", capsys)


def refusal(source, folder, capsys, *more):
    """Return the sentence with which the script ends, after checking that it is one and that no table was written."""
    before = (folder.parent / f"{folder.name}-table/table.csv").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        make(source, folder, *more)
    message = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and (folder.parent / f"{folder.name}-table/table.csv").exists() == before
    return message


def test_mistakes(tmp_path, capsys, monkeypatch):
    assert "nowhere: no such file or folder" in refusal("nih", tmp_path / "nowhere", capsys)
    picture(tmp_path / "in/NORMAL/1.png")
    assert "no Data_Entry_2017*.csv* under" in refusal("nih", tmp_path / "in", capsys)
    assert "only the class folder NORMAL under" in refusal("folder", tmp_path / "in", capsys)
    assert "no DICOM files under" in refusal("dicom", tmp_path / "in", capsys)
    csv = write(tmp_path / "labels.csv", "file_name,Edema\n2.png,1\n")
    assert "no column names any of the 1 images" in refusal("folder", tmp_path / "in", capsys, "--labels_csv", csv)
    write(csv, "file_name,Note\n1.png,fine\n")
    assert "no labels and no prompts in what" in refusal("folder", tmp_path / "in", capsys, "--labels_csv", csv)
    write(csv, "file_name,Edema\n1.png,maybe\n")
    assert "column 'Edema', row 1: 'maybe' is not" in refusal("folder", tmp_path / "in", capsys, "--labels_csv", csv)
    write(tmp_path / "in/Data_Entry_2017.csv", NIH)
    assert "none of the 4 images in the tables are under" in refusal("nih", tmp_path / "in", capsys)
    write(tmp_path / "broken/a/1.dcm", "not DICOM")
    write_dicom(tmp_path / "broken/b/2.dcm")
    assert "1 images cannot be read" in refusal("dicom", tmp_path / "broken", capsys)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    assert "pip install 'pydicom>=3'" in refusal("dicom", tmp_path / "broken", capsys)


def test_header_and_copies(monkeypatch):
    source = (ROOT / "launch/make_table.py").read_text()
    listed = re.findall(r'"([a-z-]+)>=', re.match(r"# /// script\n.*?# ///\n", source, re.DOTALL)[0])
    imported = {name.split(".")[0] for name in re.findall(r"^ *(?:import|from) ([\w.]+)", source, re.MULTILINE)}
    packages = {test_standalone.PACKAGE_OF.get(name, name) for name in imported - set(sys.stdlib_module_names)}
    assert {*listed} == packages | {"python-gdcm"}  # which pydicom decodes with
    sources = {name: (ROOT / f"{name}.py").read_text() for name in test_copies.SCRIPTS}
    assert test_copies.check({Path(name).stem: text for name, text in sources.items()} | {"make_table": source}) == []
    assert all(len(text) <= 90 for text in re.findall(r'help="(.*)"\)', source))
