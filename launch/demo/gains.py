"""Says of each fine-tuned model whether it beats the base model beyond the intervals, from the study's own figures (of FID,
beyond the interval of the difference over the same images):

    python launch/demo/gains.py --study demo --methods lora dora unet
"""

import argparse
import json
from pathlib import Path

# The figure, its name, its digits, and the row that has the difference to the base model, where there is one.
FIGURES = {
    "fid": ("FID", 1, "fid_gain"),
    "class_consistency": ("class consistency, mean of the labels", 2, None),
    "class_consistency_auroc": ("AUROC of the prompt's head, mean of the labels", 2, None),
}


def read_figures(study: Path, name: str) -> dict[str, dict]:
    """The rows of results over all labels, by metric."""
    summary = json.loads((study / "evaluations" / name / "generation_metrics.json").read_text())
    return {row["metric"]: row for row in summary["results"] if row["label"] == "all"}


def beats(one: dict, base: dict, gain: dict | None) -> bool:
    """Whether the difference's 95 % interval is above 0, or without one the two intervals lie apart; never without an interval."""
    if gain:
        return gain["low"] is not None and gain["low"] > 0
    return None not in (one["low"], base["high"]) and one["low"] > base["high"]


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
        for metric, (name, digits, difference) in FIGURES.items():
            gain = figures[difference] if difference else None
            beaten = beats(figures[metric], base[metric], gain)
            missed += not beaten
            told = [in_words(figures[metric], digits), f"base {in_words(base[metric], digits)}", *([f"difference {in_words(gain, digits)}"] if gain else [])]
            print(f"{method}: {name} {', '.join(told)}: {'better' if beaten else 'NOT better'} beyond the intervals")
    if missed:
        print("not every figure gained: train for longer, with STEPS=2000 and another STUDY")


if __name__ == "__main__":
    main(parse_args())
