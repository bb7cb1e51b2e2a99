"""Says of each fine-tuned model whether it beats the base model beyond the intervals, from the study's own figures:

    python launch/demo/gains.py --study demo --methods bitfit lora unet
"""

import argparse
import json
from pathlib import Path

# The figure, its name, its digits, and whether less is better.
FIGURES = {
    "fid": ("FID", 1, True),
    "class_consistency": ("class consistency, mean of the labels", 2, False),
    "class_consistency_auroc": ("AUROC of the prompt's head, mean of the labels", 2, False),
}


def read_figures(study: Path, name: str) -> dict[str, dict]:
    """The row of results of each of FIGURES, over all labels."""
    summary = json.loads((study / "evaluations" / name / "generation_metrics.json").read_text())
    return {row["metric"]: row for row in summary["results"] if row["label"] == "all" and row["metric"] in FIGURES}


def beats(one: dict, base: dict, less: bool) -> bool:
    """Whether the two 95 % intervals lie apart, on the right side; without an interval nothing is beaten."""
    if None in (one["low"], one["high"], base["low"], base["high"]):
        return False
    return one["high"] < base["low"] if less else one["low"] > base["high"]


def in_words(row: dict, digits: int) -> str:
    if None in (row["value"], row["low"], row["high"]):
        return f"without an interval ({row['note']})"
    return f"{row['value']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="folder that launch/sweep.sh filled")
    parser.add_argument("--methods", nargs="+", required=True, help="rows to compare with the base model")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    base, missed = read_figures(args.study, "base"), 0
    for method in args.methods:
        figures = read_figures(args.study, method)
        for metric, (name, digits, less) in FIGURES.items():
            beaten = beats(figures[metric], base[metric], less)
            missed += not beaten
            ours, theirs = (in_words(row, digits) for row in (figures[metric], base[metric]))
            print(f"{method}: {name} {ours}, base {theirs}: {'better' if beaten else 'NOT better'} beyond the intervals")
    if missed:
        print("not every figure gained: train for longer, with STEPS=2000 and another STUDY")


if __name__ == "__main__":
    main(parse_args())
