"""Whether the figures of eval_generation.py catch what is wrong with a set of images:

    python tests/measure_cxr.py --real_csv CheXpert-v1.0/train.csv --labels Pneumonia "No Finding"

The sets are real images themselves, of the patients whom the evaluation does not take as real: as they are, with the two
labels exchanged, blurred, tinted, and copies of the training images. Each is scored as if a model had generated it; printed
is a table of what was found beside the floor. Without --features, seeded random weights stand in for torchxrayvision's.
Not a test: it takes minutes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_generation as evaluation

RESOLUTION = 512
# A radiograph has equal channels; this is a tint that a reader sees.
TINT = np.array([10.0, 0.0, -10.0])


@torch.no_grad()
def random_densenet(paths: pd.Series, file: Path) -> Path:
    """torchxrayvision's DenseNet-121 with random weights and the batch statistics of some images, as a file for --features."""
    torch.manual_seed(0)
    model = evaluation.xrv.models.DenseNet(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    images = [evaluation.xrv_pixels(evaluation.load_image(path, RESOLUTION, "squash")) for path in paths]
    model.train()(torch.from_numpy(np.stack(images)))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return file


def tinted(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image, float) + TINT).clip(0, 255).astype(np.uint8))


def write_set(folder: Path, table: pd.DataFrame, labels: list[str], edit=None) -> Path:
    """A folder as sample.py leaves it, of edited real images."""
    folder.mkdir()
    names = [f"{i:06d}.png" for i in range(len(table))]
    for path, name in zip(table["image"], names):
        image = Image.fromarray(evaluation.load_image(path, RESOLUTION, "squash"))
        (edit(image) if edit else image).save(folder / name)
    marks = {label: (table[label] == 1).astype(float).to_numpy() for label in labels}
    rows = {"file_name": names, **marks, "resolution": RESOLUTION, "resize_mode": "squash"}
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


def write_sets(folder: Path, table: pd.DataFrame, labels: list[str]) -> dict[str, Path]:
    split = evaluation.assign_splits(table["patient"], 0)
    others, train = table[split != "test"], table[split == "train"]
    exchanged = others.assign(**{labels[0]: others[labels[1]], labels[1]: others[labels[0]]})
    sets = {
        "other patients (training ones among them)": (others, None),
        "labels exchanged": (exchanged, None),
        "blurred": (others, lambda image: image.filter(ImageFilter.GaussianBlur(4))),
        "tinted": (others, tinted),
        "copies of training images": (train, None),
    }
    return {name: write_set(folder / str(len(list(folder.iterdir()))), rows, labels, edit) for name, (rows, edit) in sets.items()}


def cells(summary: dict, labels: list[str]) -> list[str]:
    rows = {(row["metric"], row["label"]): row for row in summary["results"]}

    def beside_floor(metric: str, label: str, digits: int) -> str:
        row = rows[metric, label]
        return f"{row['value']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f}) / {row['floor']:.{digits}f}"

    fid = [beside_floor("fid_half_n", label, 1) for label in ("all", *labels)]
    shares = ("colour_visible", "memorisation_nearer_train", "memorisation_suspects", "memorisation_suspects_pixels")
    return [*fid, *(f"{rows[metric, 'all']['value']:.2f}" for metric in shares)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real_csv", required=True, help="image table")
    parser.add_argument("--labels", nargs=2, default=["Pneumonia", "No Finding"], help="two labels of it that exclude each other")
    parser.add_argument("--features", help="as for eval_generation.py (default: random weights)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    table = evaluation.load_image_table(args.real_csv)
    table = table[table["frontal"]]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        features = args.features or random_densenet(table["image"][:16], folder / "xrv.safetensors")
        lines = []
        for name, synthetic in write_sets(folder, table, args.labels).items():
            flags = {"synthetic": synthetic, "real_csv": args.real_csv, "train_csv": args.real_csv, "features": features}
            flags |= {"output_dir": folder / "scores" / synthetic.name, "feature_cache_dir": folder / "cache"}
            evaluation.main(evaluation.parse_args([*(f"--{flag}={value}" for flag, value in flags.items()), "--labels", *args.labels]))
            summary = json.loads((folder / "scores" / synthetic.name / "generation_metrics.json").read_text())
            lines.append([name, *cells(summary, args.labels)])
    fid = [f"FID of {label}, half of n / floor" for label in ("all", *args.labels)]
    shares = ["visible tint", "nearer to training images", "suspects by features", "suspects by pixels"]
    print(evaluation.markdown_table(["set", *fid, *shares], lines))


if __name__ == "__main__":
    main(parse_args())
