"""A label set outside CheXpert's goes through training, sampling, both evaluations and the report."""

import json
import sys

import pandas as pd
from common import ROOT, phantoms, train

import eval_downstream
import eval_generation
import sample
import train_full

sys.path.insert(0, str(ROOT / "launch"))
import report

LABELS = ["COVID-19", "Pleural Plaque", "Normal"]
SMALL = ["--arch=resnet18", "--weights=none", "--resolution=32", "--num_seeds=1", "--num_train_epochs=1"]
SMALL += ["--bootstrap_samples=50", "--train_batch_size=8"]


def run(script, *argv):
    script.main(script.parse_args([*map(str, argv)]))


def test_three_other_labels_from_the_table_to_the_report(tmp_path):
    study, names = tmp_path / "study", dict(zip(["Edema", "Cardiomegaly", "No Finding"], LABELS))
    raw = pd.read_csv(phantoms(), dtype=str, keep_default_na=False).rename(columns=names)
    raw = raw.drop(columns=[label for label in train_full.LABELS if label in raw])
    raw.assign(Path=train_full.load_image_table(phantoms())["image"]).to_csv(tmp_path / "t.csv", index=False)
    flags = ["--labels", *LABELS]
    summary = train("bitfit", study / "runs" / "bitfit", *flags, csv=tmp_path / "t.csv")
    assert {row["label"] for row in summary["results"] if row["metric"] == "images_train"} == {"all", *LABELS}
    samples = study / "samples" / "bitfit"
    run(
        sample,
        f"--model={study / 'runs' / 'bitfit'}",
        "--images_per_label=12",
        "--num_inference_steps=2",
        f"--output_dir={samples}",
    )
    made = pd.read_csv(samples / "metadata.csv")
    assert list(made["prompt"].unique()) == [f"Chest X-ray of a subject with {label}" for label in LABELS]
    assert (made[LABELS].sum() == 12).all()

    tables = [f"--synthetic={samples}", f"--real_csv={tmp_path / 't.csv'}", *flags]
    run(eval_downstream, *tables, *SMALL, f"--output_dir={study / 'downstream' / 'bitfit'}")
    classifier = f"--features={study / 'downstream' / 'bitfit' / 'classifier'}"
    output_dir = f"--output_dir={study / 'evaluations' / 'bitfit'}"
    run(eval_generation, *tables, classifier, "--num_subsamples=3", output_dir)
    for name, metric in (("downstream/bitfit/downstream", "accuracy"), ("evaluations/bitfit/generation", "fid")):
        rows = json.loads((study / f"{name}_metrics.json").read_text())["results"]
        assert {row["label"] for row in rows if row["metric"] == metric} == {"all", *LABELS}
    run(report, f"--study={study}")
    page, values = (study / "report" / "report.html").read_text(), pd.read_csv(study / "report" / "report.csv")
    assert all(label in page for label in LABELS) and {*LABELS} <= {*values["label"]}
