"""What the evaluation costs at full size, without images: python tests/measure_scale.py [--rows 25133] [--labels 0]

Scores two sets of seeded random features of width 1,024 (FID at six sizes, KID, Vendi, PRDC, memorisation, all intervals)
with the script's own functions and its default number of subsamples; prints the seconds and the peak memory, and times FID
against torchmetrics' in the same run. Not a test: machines are too different for a limit.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def source(evaluation, name: str, rows: int, labels: list[str], seed: int, shift: float):
    """A set of images that are only features: correlated and positive, as pooled activations are."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32) / 8
    features = np.empty((rows, 1024), np.float32)
    for start in range(0, rows, 4096):
        shape = features[start : start + 4096].shape
        noise = generator.standard_normal(shape, np.float32) * 0.3
        features[start : start + 4096] = np.abs(generator.standard_normal((shape[0], 64), np.float32) @ mixing + noise + shift)
    patients = [f"{name}{i // 2}" for i in range(rows)]
    table = pd.DataFrame({"image": patients, "name": patients, "patient": patients})
    share = rows // max(1, len(labels))
    rows_of = {label: np.arange(i * share, (i + 1) * share) for i, label in enumerate(labels)}
    for label, own in rows_of.items():
        table[label] = np.isin(np.arange(rows), own).astype(float)
    thumbnails = generator.integers(0, 256, (rows, 1024), np.uint8)
    heads = generator.random((rows, 6), np.float32)
    return evaluation.Source(name, table, rows_of, np.arange(rows), features, heads, np.zeros(rows, np.float32), thumbnails)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=25133)
    parser.add_argument("--labels", type=int, default=0, help="score so many labels as well, each with its share of the rows")
    parser.add_argument("--torchmetrics", action="store_true", help="only time FID against torchmetrics' at n = 3,000")
    args = parser.parse_args()
    import eval_generation as evaluation

    if args.torchmetrics:
        import torch
        from torchmetrics.image.fid import FrechetInceptionDistance

        one, two = (source(evaluation, name, 3000, [], seed, shift).features for name, seed, shift in (("a", 1, 0.0), ("b", 2, 0.1)))
        features = torch.nn.Identity()
        features.num_features = 1024
        ratios = []
        for _ in range(25):
            metric = FrechetInceptionDistance(feature=features)
            start = time.perf_counter()
            metric.update(torch.from_numpy(one).double(), real=True)
            metric.update(torch.from_numpy(two).double(), real=False)
            their_moments, start = time.perf_counter() - start, time.perf_counter()
            theirs, their_distance = float(metric.compute()), time.perf_counter() - start
            # torch's threads spin for a while after their work, and would take the processor from what comes next.
            time.sleep(0.5)
            start = time.perf_counter()
            pair = (*evaluation.moments(one), *evaluation.moments(two))
            our_moments, start = time.perf_counter() - start, time.perf_counter()
            ours, our_distance = evaluation.frechet_distance(*pair), time.perf_counter() - start
            whole = (their_moments + their_distance) / (our_moments + our_distance)
            ratios.append((their_distance / our_distance, whole))
            print(
                f"FID {ours:.12g}, torchmetrics {theirs:.12g}, relative difference {abs(ours / theirs - 1):.1e}; "
                f"moments {our_moments:.3f} s against {their_moments:.3f} s; distance {our_distance:.3f} s against "
                f"{their_distance:.3f} s, {their_distance / our_distance:.1f} times faster; together {whole:.1f} times"
            )
        distance, whole = np.median(ratios, axis=0)
        print(f"medians of {len(ratios)} rounds: distance {distance:.1f} times faster, with the moments {whole:.1f} times")
        return

    labels = evaluation.CONDITIONS[: args.labels]
    sources = {
        name: source(evaluation, name, args.rows, labels, seed, shift)
        for name, seed, shift in (("real", 1, 0.0), ("synthetic", 2, 0.05), ("train", 3, 0.0))
    }
    plan = evaluation.Plan(sources, labels, 512, "squash", [], [], {})
    flags = ["--synthetic", "none", "--real_csv", __file__, "--train_csv", __file__]

    class Network:
        labels = evaluation.CONDITIONS
        thresholds = dict.fromkeys(evaluation.CONDITIONS, 0.5)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    rows, _, _ = evaluation.score_sources(evaluation.parse_args(flags), plan, Network())
    seconds = time.perf_counter() - start
    assert all(row["value"] is not None for row in rows if "fid" in row["metric"] or "memorisation" in row["metric"])
    wanted = ("fid", "fid_infinity", "kid", "vendi", "precision", "coverage", "memorisation_nearer_train")
    print(json.dumps([row for row in rows if row["metric"] in wanted and row["label"] == "all"], indent=1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.rows:,} + {args.rows:,} rows, {args.labels} labels: {seconds:.0f} s, peak memory {peak:.2f} GiB, of which {before:.2f} before scoring"
    )


if __name__ == "__main__":
    main()
