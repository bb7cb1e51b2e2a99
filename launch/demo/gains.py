"""Compare each fine-tuned model of a study with the base model; the last step of launch/demo.sh.

    python launch/demo/gains.py --study demo --methods lora dora unet

As in launch/report.py, the 95% interval of a difference comes from the differences draw by draw.
"""

import argparse
import json
from pathlib import Path

from safetensors.numpy import load_file
from scipy import stats

# Metric: its name, digits to print, and whether lower is better.
FIGURES = {
    "fid": ("FID", 1, True),
    "class_consistency": ("class consistency, mean over the prompts", 2, False),
    "class_consistency_auroc": ("AUROC of the prompt's head, mean over the prompts", 2, False),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="folder that launch/sweep.sh filled")
    parser.add_argument("--methods", nargs="+", required=True, help="rows to compare with the base model")
    return parser.parse_args(argv)


def read_evaluation(study, name):
    """Return values and draws over all labels by metric; only metrics that could be computed have draws."""
    folder = study / "evaluations" / name
    results = json.loads((folder / "generation_metrics.json").read_text())["results"]
    draws = load_file(folder / "generation_draws.safetensors")
    values = {row["metric"]: row["value"] for row in results if row["label"] == "all"}
    return values, {metric: draws[f"{metric}/all"] for metric in FIGURES if f"{metric}/all" in draws}


def main(args):
    base, base_draws = read_evaluation(args.study, "base")
    all_better = True
    for method in args.methods:
        values, draws = read_evaluation(args.study, method)
        for metric, (name, digits, lower_is_better) in FIGURES.items():
            if metric not in draws or metric not in base_draws:
                print(f"{method}: {name} could not be computed")
                all_better = False
                continue
            paired = draws[metric] - base_draws[metric]
            half = stats.t.ppf(0.975, len(paired) - 1) * paired.std(ddof=1)
            difference = values[metric] - base[metric]
            better = difference < -half if lower_is_better else difference > half
            numbers = (
                f"{values[metric]:.{digits}f}, base {base[metric]:.{digits}f}, difference {difference:+.{digits}f}"
            )
            interval = f"({difference - half:+.{digits}f} to {difference + half:+.{digits}f})"
            print(f"{method}: {name} {numbers} {interval}: {'better' if better else 'not shown to be better'}")
            all_better &= better
    if not all_better:
        print("not all better; to train longer: STUDY=demo/long STEPS=2000 bash launch/demo.sh")


if __name__ == "__main__":
    main(parse_args())
