"""Measure whether eval_generation.py's figures catch what is wrong with a set of images:

    python tests/measure_cxr.py CheXpert-v1.0/train.csv Pneumonia "No Finding" --features rad-dino

The sets are real images of patients outside the test split: as they are, with the two labels exchanged, blurred,
tinted, and copies of training images. Each is scored as if a model had generated it; further flags go to
eval_generation.py. Not a test, since it takes minutes.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_generation as evaluation

SHARES = ("colour_visible", "memorisation_nearer_train", "memorisation_suspects", "memorisation_suspects_pixels")


def write_set(folder, table, labels, edit):
    """Write edited images as sample.py would."""
    folder.mkdir()
    names = [f"{i:06d}.png" for i in range(len(table))]
    for path, name in zip(table["image"], names):
        edit(Image.fromarray(evaluation.load_image(path, 512, "squash"))).save(folder / name)
    flags = {label: (table[label] == 1).astype(float).to_numpy() for label in labels}
    metadata = {"file_name": names, **flags, "resolution": 512, "resize_mode": "squash"}
    pd.DataFrame(metadata).to_csv(folder / "metadata.csv", index=False)


def tint(image):
    """Shift the channels apart by what a reader sees; a radiograph's are equal."""
    return Image.fromarray((np.asarray(image, float) + [10, 0, -10]).clip(0, 255).astype(np.uint8))


csv, first, second, *more = sys.argv[1:]
table = evaluation.load_image_table(csv)
table = table[table["frontal"]]
split = evaluation.assign_splits(table["patient"], 0)
others = table[split != "test"]
sets = {
    "other patients": (others, lambda image: image),
    "labels exchanged": (others.assign(**{first: others[second], second: others[first]}), lambda image: image),
    "blurred": (others, lambda image: image.filter(ImageFilter.GaussianBlur(4))),
    "tinted": (others, tint),
    "training images": (table[split == "train"], lambda image: image),
}
with tempfile.TemporaryDirectory() as folder:
    for name, (rows, edit) in sets.items():
        synthetic, output = Path(folder) / name, Path(folder) / f"{name} scores"
        write_set(synthetic, rows, [first, second], edit)
        flags = [
            f"--synthetic={synthetic}",
            f"--real_csv={csv}",
            f"--train_csv={csv}",
            f"--output_dir={output}",
            *more,
        ]
        flags += [f"--feature_cache_dir={folder}/cache", "--labels", first, second]
        evaluation.main(evaluation.parse_args(flags))
        results = json.loads((output / "generation_metrics.json").read_text())["results"]
        by_name = {(row["metric"], row["label"]): row for row in results}
        print(name, *(f"  {metric} {by_name[metric, 'all']['value']:.2f}" for metric in SHARES), sep="\n")
        for label in ("all", first, second):
            row = by_name["fid_half_n", label]
            interval = f"{row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
            print(f"  FID at half of n, {label}: {interval}; between real patients {row['floor']:.1f}")
