"""Prints the runs of the training scripts as one Markdown table.

    python launch/table.py runs/lora runs/bitfit
"""

import argparse
import json
from pathlib import Path

COLUMNS = ["row", "trainable parameters", "held-out loss before", "after", "change (95% interval)", "steps", "seconds", "peak GiB"]


def table_row(run: Path) -> list[str]:
    """One run's cells; a run without a summary is shown as not finished."""
    path = run / "training_summary.json"
    if not path.is_file():
        return [run.name, "not finished"] + [""] * (len(COLUMNS) - 2)
    summary = json.loads(path.read_text())
    rows = {row["metric"]: row for row in summary["results"]}
    before, after, change = (rows.get(f"heldout_diffusion{suffix}", {"value": None}) for suffix in ("_start", "", "_change"))
    heldout = ["not measured"] * 3
    if change["value"] is not None:
        interval = f"{change['low']:+.4f} to {change['high']:+.4f}" if change["low"] is not None else "one image"
        heldout = [f"{before['value']:.4f}", f"{after['value']:.4f}", f"{change['value']:+.4f} ({interval})"]
    parameters = sum(summary["trainable_parameters"].values())
    return [summary["method"], f"{parameters:,}", *heldout, f"{summary['steps']:,}", f"{rows['seconds']['value']:.0f}", f"{rows['peak_memory_gib']['value']:.2f}"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, in the order of the table")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    for cells in [COLUMNS, ["---"] * len(COLUMNS), *map(table_row, args.runs)]:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(parse_args())
