"""Draws real phantoms and each model's samples side by side.

    python launch/demo/compare.py --demo_dir demo --models base bitfit lora unet
"""

import argparse
import json
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

CONDITIONS = ["No Finding", "Cardiomegaly", "Lung Opacity", "Edema", "Pneumothorax", "Pleural Effusion"]
IMAGES_PER_CONDITION = 2


def real_images(csv: Path, condition: str) -> list[Path]:
    """Frontal phantoms that have this finding and, if there are any, no other."""
    table = pd.read_csv(csv)
    table = table[(table["Frontal/Lateral"] == "Frontal") & (table[condition] == 1)]
    others = table[[c for c in CONDITIONS if c not in (condition, "Lung Opacity")]].eq(1).any(axis=1)
    return [csv.parent.parent / path for path in pd.concat([table[~others], table[others]])["Path"]]


def sampled_images(folder: Path, condition: str) -> list[Path]:
    table = pd.read_csv(folder / "metadata.csv")
    return [folder / name for name in table[table[condition] == 1]["file_name"]]


def colour(paths: list[Path]) -> float:
    """Mean absolute difference between the colour channels in grey levels; 0 for a radiograph."""
    images = [np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in paths]
    return float(np.mean([np.abs(image - image.mean(axis=2, keepdims=True)).mean() for image in images]))


def caption(name: str, run: Path, images: list[Path]) -> str:
    """The row's name with what its summary says of the training, and how far from grey its images are."""
    lines = [name, f"colour {colour(images):.1f}"]
    if (run / "training_summary.json").is_file():
        summary = json.loads((run / "training_summary.json").read_text())
        values = {row["metric"]: row["value"] for row in summary["results"]}
        lines.insert(1, f"{sum(summary['trainable_parameters'].values()):,} parameters")
        lines.insert(2, f"held-out {values['heldout_diffusion_start']:.3f} → {values['heldout_diffusion']:.3f}")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo_dir", type=Path, required=True, help="folder that launch/demo.sh filled")
    parser.add_argument("--models", nargs="+", required=True, help="sample folders to show, in this order")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    csv = args.demo_dir / "phantoms" / "CheXpert-phantom" / "train.csv"
    rows = {"phantoms (real)": {c: real_images(csv, c)[: 4 * IMAGES_PER_CONDITION] for c in CONDITIONS}}
    rows |= {name: {c: sampled_images(args.demo_dir / "samples" / name, c) for c in CONDITIONS} for name in args.models}
    columns = IMAGES_PER_CONDITION * len(CONDITIONS)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.15 * columns + 2, 1.25 * len(rows) + 0.4), squeeze=False)
    for row, (name, images) in zip(axes, rows.items()):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.axis("off")
        every = [path for paths in images.values() for path in paths]
        row[0].text(-0.15, 0.5, caption(name, args.demo_dir / "runs" / name, every), transform=row[0].transAxes, ha="right", va="center", fontsize=8)
        for i, condition in enumerate(CONDITIONS):
            for axis, path in zip(row[IMAGES_PER_CONDITION * i :], images[condition][:IMAGES_PER_CONDITION]):
                axis.imshow(Image.open(path).convert("RGB").resize((128, 128)))
    for i, condition in enumerate(CONDITIONS):
        axes[0][IMAGES_PER_CONDITION * i].set_title(condition, fontsize=9, loc="left")
    figure.subplots_adjust(left=0.15, right=0.995, top=0.95, bottom=0.01, wspace=0.04, hspace=0.06)
    picture = args.demo_dir / "comparison.png"
    part = picture.with_name(".comparison.part.png")
    figure.savefig(part, dpi=110)
    os.replace(part, picture)
    print(f"side by side: {picture}")


if __name__ == "__main__":
    main(parse_args())
