"""Compare each fine-tuned model of a study with the base model; the last step of launch/demo.sh.

    python launch/demo/gains.py --study demo --methods lora dora unet

Reads report.csv, which launch/report.py writes, and calls a model better where the report does: p < 0.05 after Holm's
correction.
"""

import argparse
from pathlib import Path

import pandas as pd

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


def main(args):
    figures = pd.read_csv(args.study / "report" / "report.csv")
    figures = figures[figures["label"] == "all"].set_index(["row", "metric"])
    all_better = True
    for method in args.methods:
        for metric, (name, digits, lower_is_better) in FIGURES.items():
            if (f"{method} - base", metric) not in figures.index:
                print(f"{method}: {name} could not be compared")
                all_better = False
                continue
            value, base = figures.loc[(method, metric), "value"], figures.loc[("base", metric), "value"]
            difference, low, high, p = figures.loc[(f"{method} - base", metric), ["value", "low", "high", "p_holm"]]
            better = p < 0.05 and (difference < 0) == lower_is_better
            numbers = f"{value:.{digits}f}, base {base:.{digits}f}, difference {difference:+.{digits}f}"
            interval = f"({low:+.{digits}f} to {high:+.{digits}f})"
            print(f"{method}: {name} {numbers} {interval}: {'better' if better else 'not shown to be better'}")
            all_better &= better
    if not all_better:
        print("not all better; to train longer: STUDY=demo/long STEPS=2000 bash launch/demo.sh")


if __name__ == "__main__":
    main(parse_args())
