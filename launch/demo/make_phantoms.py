#!/usr/bin/env python
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "pillow", "scipy", "tqdm"]
# ///
"""Draws a chest phantom data set in CheXpert's layout, offline and in half a minute, so the demo needs no download.

    python launch/demo/make_phantoms.py --output_dir data/phantoms
    python launch/demo/make_phantoms.py --output_dir data/phantoms --num_patients 100 --seed 1

Writes <output_dir>/CheXpert-phantom/train.csv and the grayscale JPEGs that it names. The pictures are caricatures of
radiographs: each finding is drawn so that a small classifier can find it, and nothing about them is medically useful.
"""

import argparse
import csv
import functools
import json
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import expit
from tqdm.auto import tqdm

DATASET_NAME = "CheXpert-phantom"
LABELS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
HEADER = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS]

# CheXpert's hierarchy: a study with one of these is also positive for Lung Opacity.
OPACITIES = ("Edema", "Consolidation", "Pneumonia", "Lung Lesion", "Atelectasis")

# How often a study that is not normal has each finding. The six that the demo trains and scores on are frequent, the
# others rare, as in CheXpert. Lung Opacity is here without the studies that get it from the hierarchy.
PREVALENCE = {
    "Enlarged Cardiomediastinum": 0.07,
    "Cardiomegaly": 0.29,
    "Lung Opacity": 0.06,
    "Lung Lesion": 0.04,
    "Edema": 0.19,
    "Consolidation": 0.04,
    "Pneumonia": 0.04,
    "Atelectasis": 0.05,
    "Pneumothorax": 0.24,
    "Pleural Effusion": 0.31,
    "Pleural Other": 0.04,
    "Fracture": 0.05,
    "Support Devices": 0.12,
}
NORMAL_RATE = 0.21
UNNAMED_RATE = 0.02
UNCERTAIN_POSITIVES = {
    name: 0.08 for name in ("Cardiomegaly", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pleural Effusion")
}
UNCERTAIN_NEGATIVE_RATE = 0.01
EXPLICIT_NEGATIVE_RATE = 0.12


# ----------------------------------------------------------------------------------------------------------------------
# Anatomy
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """What stays the same in all studies of one patient. Lengths are in half pictures: x and y run from -1 to 1."""

    width: int
    height: int
    rotation: float
    shift_x: float
    shift_y: float
    lung_top: float
    lung_width: float
    diaphragm: float
    dome: float
    heart: float
    mediastinum: float
    rib_spacing: float
    rib_phase: float
    ribs: float
    vessels: float
    tissue: float
    exposure: float
    contrast: float
    noise: float
    texture_seed: int


def random_anatomy(rng: np.random.Generator, spread: float = 1.0) -> Anatomy:
    """Draws a patient. A larger `spread` gives wider ranges, for pictures that are not to look like this data set."""

    def around(centre: float, half_range: float) -> float:
        return centre + spread * half_range * rng.uniform(-1, 1)

    return Anatomy(
        width=int(rng.integers(136, 153)),
        height=int(rng.integers(160, 177)),
        rotation=around(0, 0.05),
        shift_x=around(0, 0.04),
        shift_y=around(0, 0.03),
        lung_top=around(-0.80, 0.05),
        lung_width=around(0.62, 0.07),
        diaphragm=around(0.66, 0.07),
        dome=around(0.20, 0.05),
        heart=around(0.32, 0.03),
        mediastinum=around(0.15, 0.02),
        rib_spacing=around(0.19, 0.02),
        rib_phase=rng.uniform(),
        ribs=around(0.10, 0.03),
        vessels=around(0.13, 0.03),
        tissue=around(0.62, 0.07),
        exposure=around(1.05, 0.22),
        contrast=around(1.15, 0.12),
        noise=around(0.022, 0.006),
        texture_seed=int(rng.integers(2**31)),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------------------


def grid(anatomy: Anatomy, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The patient's x and y at every pixel, (height, width) each."""
    height, width = size
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    x, y = x.astype(np.float32), y.astype(np.float32)
    cos, sin = np.cos(anatomy.rotation), np.sin(anatomy.rotation)
    return cos * x + sin * y - anatomy.shift_x, cos * y - sin * x - anatomy.shift_y


def inside(distance: np.ndarray, softness: float = 0.015) -> np.ndarray:
    """1 where `distance` is positive, 0 where it is negative, with an edge that does not alias."""
    return expit(distance / softness)


def bump(distance: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-np.square(distance / width))


def cloud(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """Smooth noise of unit variance with about `cells` cells to a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


def polyline(x: np.ndarray, y: np.ndarray, points: Collection[tuple[float, float]], width: float) -> np.ndarray:
    nearest = np.full(x.shape, np.inf, x.dtype)
    points = list(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)))
    return bump(nearest, width)


@dataclass
class Lung:
    """One lung: `air` is 1 inside it; `lateral` runs from 0 at the mediastinum to 1 at the ribs, `depth` from 0 at the
    apex to 1 at the diaphragm; `x` points outwards on both sides."""

    air: np.ndarray
    lateral: np.ndarray
    depth: np.ndarray
    x: np.ndarray


def make_lung(anatomy: Anatomy, x: np.ndarray, y: np.ndarray, side: int, raised: float) -> Lung:
    out = side * x
    # The liver lifts the right diaphragm, which is on the left of the picture.
    base = anatomy.diaphragm - raised - (0.05 if side < 0 else 0.0)
    dome = base + anatomy.dome * (np.square((out - 0.36) / 0.36) - 0.5)
    depth = (y - anatomy.lung_top) / (base + 0.1 - anatomy.lung_top)
    inner = 0.10 + 0.06 * np.clip(depth, 0, 1)
    reach = np.clip(1 - np.clip(depth, 0, 1), 0, 1)
    outer = inner + anatomy.lung_width * np.power(1 - np.power(reach, 2.4), 0.55) * (1 + 0.08 * depth)
    edge = np.minimum(np.minimum(out - inner, outer - out), np.minimum(y - anatomy.lung_top, dome - y))
    lateral = (out - inner) / np.maximum(outer - inner, 0.05)
    return Lung(inside(edge, 0.012), lateral, depth, out)


def rib_cage(anatomy: Anatomy, lung: Lung, y: np.ndarray, step: np.ndarray | float) -> np.ndarray:
    """Back ribs falling outwards and, fainter, front ribs rising; `step` shifts a broken rib."""
    curve = y - 0.30 * lung.x + 0.55 * np.square(lung.x - 0.28) - step
    phase = curve / anatomy.rib_spacing + anatomy.rib_phase
    back = bump(np.abs(phase - np.round(phase)), 0.19)
    phase = (y + 0.55 * lung.x) / (1.25 * anatomy.rib_spacing) + anatomy.rib_phase
    front = bump(np.abs(phase - np.round(phase)), 0.16) * inside(lung.x - 0.35, 0.06)
    return back + 0.35 * front


def vessel_tree(rng: np.random.Generator, lung: Lung, y: np.ndarray) -> np.ndarray:
    """Bright spokes that leave the hilum and fade outwards."""
    from_x, from_y = lung.x - 0.13, y - 0.02
    radius, angle = np.hypot(from_x, from_y), np.arctan2(from_y, from_x)
    spokes = np.sort(rng.uniform(-1.9, 1.9, 12)).astype(np.float32)
    bent = angle + 0.25 * np.sin(5 * radius)
    after = np.clip(np.searchsorted(spokes, bent), 1, len(spokes) - 1)
    nearest = np.minimum(np.abs(bent - spokes[after - 1]), np.abs(bent - spokes[after]))
    return bump(nearest * radius, 0.022) * np.exp(-radius / 0.38) + 0.4 * bump(radius, 0.12)


def place(lung: Lung, lateral: float, depth: float) -> tuple[float, float]:
    """The pixel index of the point of the lung nearest to these lung coordinates."""
    return np.unravel_index(np.argmin(np.square(lung.lateral - lateral) + np.square(lung.depth - depth)), lung.x.shape)


def draw_opacities(
    density: np.ndarray,
    lungs: dict[int, Lung],
    y: np.ndarray,
    findings: set[str],
    sides: dict[str, int],
    rng: np.random.Generator,
) -> None:
    """Adds, in place, what fills air spaces: the findings below Lung Opacity, or a plain hazy patch for it alone."""
    size = density.shape

    def around(lung: Lung, lateral: float, depth: float) -> np.ndarray:
        row, column = place(lung, lateral, depth)
        return np.hypot(lung.x - lung.x[row, column], y - y[row, column])

    if "Lung Opacity" in findings and not findings.intersection(OPACITIES):
        lung = lungs[sides["Lung Opacity"]]
        radius = around(lung, rng.uniform(0.4, 0.7), rng.uniform(0.35, 0.65)) * (1 + 0.12 * cloud(rng, size, 6))
        density += 0.30 * bump(radius, rng.uniform(0.22, 0.28)) * lung.air
    if "Edema" in findings:
        strength = rng.uniform(0.32, 0.40)
        for lung in lungs.values():
            wing = bump(lung.lateral - 0.25, 0.48) * bump(lung.depth - 0.52, 0.33) * (1 + 0.25 * cloud(rng, size, 18))
            septa = bump(np.mod(y / 0.07 + rng.uniform(), 1) - 0.5, 0.15) * inside(lung.lateral - 0.72, 0.05)
            density += (strength * wing + 0.10 * septa * inside(lung.depth - 0.5, 0.05)) * lung.air
    if "Consolidation" in findings:
        lung = lungs[sides["Consolidation"]]
        fissure = rng.uniform(0.38, 0.5) + 0.12 * lung.lateral
        lobe = inside(fissure - lung.depth, 0.015) if rng.uniform() < 0.5 else inside(lung.depth - fissure - 0.1, 0.015)
        density += 0.36 * lobe * (1 + 0.08 * cloud(rng, size, 14)) * lung.air
    if "Pneumonia" in findings:
        lung = lungs[sides["Pneumonia"]]
        lateral, depth = rng.uniform(0.35, 0.6), rng.uniform(0.4, 0.65)
        for _ in range(8):
            radius = around(lung, lateral + rng.uniform(-0.3, 0.3), depth + rng.uniform(-0.2, 0.2))
            density += 0.22 * bump(radius, rng.uniform(0.045, 0.075)) * lung.air
    if "Atelectasis" in findings:
        lung = lungs[sides["Atelectasis"]]
        for start in rng.uniform(0.55, 0.62) + np.array((0.0, 0.13, 0.25)):
            slope = rng.uniform(-0.15, 0.1)
            band = bump(lung.depth - start - slope * lung.lateral, 0.022) * bump(lung.lateral - 0.5, 0.5)
            density += 0.32 * band * lung.air
    if "Lung Lesion" in findings:
        lung = lungs[sides["Lung Lesion"]]
        radius = around(lung, rng.uniform(0.4, 0.7), rng.uniform(0.25, 0.6))
        density += 0.36 * inside(rng.uniform(0.08, 0.115) - radius, 0.012) * lung.air


def draw_support_devices(
    density: np.ndarray, x: np.ndarray, y: np.ndarray, side: int, rng: np.random.Generator
) -> None:
    """Adds, in place, a tube in the airway and either a pacemaker with its lead or a central line."""
    tube = polyline(x, y, [(0.02, -1.1), (-0.01, -0.7), (0.01, rng.uniform(-0.4, -0.3))], 0.022)
    left, top = side * rng.uniform(0.50, 0.56), rng.uniform(-0.62, -0.54)
    line = [(left, top), (side * 0.3, -0.66), (side * 0.12, -0.45), (0.05, -0.1), (0.16, rng.uniform(0.3, 0.4))]
    density += 0.40 * np.maximum(tube, polyline(x, y, line, 0.020))
    if rng.uniform() < 0.7:
        box = np.maximum(np.abs(x - left) / 0.13, np.abs(y - top) / 0.10)
        density += 0.50 * inside(1 - box, 0.06)


def draw_pleura(
    density: np.ndarray,
    lungs: dict[int, Lung],
    findings: set[str],
    sides: dict[str, int],
    rng: np.random.Generator,
) -> None:
    """Changes, in place, what lies between lung and ribs: fluid, air or scar."""
    if "Pleural Other" in findings:
        lung = lungs[sides["Pleural Other"]]
        thickness = 0.19 * (1 + 0.35 * np.sin(9 * lung.depth + rng.uniform(0, 6)))
        density += 0.42 * inside(lung.lateral - 1 + thickness, 0.02) * inside(lung.depth - 0.15, 0.03) * lung.air
    if "Pneumothorax" in findings:
        lung = lungs[sides["Pneumothorax"]]
        edge = rng.uniform(0.50, 0.62) + 0.55 * np.square(np.clip(lung.depth - 0.2, 0, 1))
        free = np.maximum(inside(lung.lateral - edge, 0.02), inside(0.13 - lung.depth, 0.015)) * lung.air
        line = bump(lung.lateral - edge, 0.045) * inside(lung.depth - 0.13, 0.015) * inside(0.97 - edge, 0.02)
        density += free * (0.05 - density) + 0.07 * (lung.air - free) + 0.34 * line * lung.air
    if "Pleural Effusion" in findings:
        both = rng.uniform() < 0.3
        for side, lung in lungs.items():
            if both or side == sides["Pleural Effusion"]:
                level = rng.uniform(0.62, 0.74) - 0.22 * np.power(np.clip(lung.lateral, 0, 1), 4)
                fluid = inside(lung.depth - level, 0.02) * np.minimum(6 * lung.air, 1)
                density += fluid * np.maximum(0.66 - density, 0)


def to_picture(density: np.ndarray, anatomy: Anatomy, rng: np.random.Generator) -> np.ndarray:
    grain = gaussian_filter(rng.standard_normal(density.shape, dtype=np.float32), 0.6) * 1.8
    picture = 0.5 + (density - 0.5) * anatomy.contrast + anatomy.noise * grain
    return np.round(255 * np.power(np.clip(picture, 0, 1), anatomy.exposure)).astype(np.uint8)


def render(
    anatomy: Anatomy,
    findings: Collection[str],
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """A frontal view of this patient with these findings.

    Returns uint8 (height, width); `size` is (height, width), the patient's own where it is not given. The same
    arguments and generator state give the same pixels.
    """
    findings = set(findings)
    x, y = grid(anatomy, size or (anatomy.height, anatomy.width))
    own = np.random.default_rng(anatomy.texture_seed)
    sides = dict(zip(LABELS, rng.choice((-1, 1), len(LABELS)).tolist()))

    body = inside(0.24 + 0.70 * expit((y + 0.80) / 0.05) - np.abs(x), 0.02)
    density = body * (anatomy.tissue + 0.06 * inside(y - anatomy.diaphragm, 0.05) + 0.02 * cloud(own, x.shape, 7))

    lungs = {}
    for side in (-1, 1):
        raised = 0.16 if "Atelectasis" in findings and side == sides["Atelectasis"] else 0.0
        lungs[side] = lung = make_lung(anatomy, x, y, side, raised)
        broken = "Fracture" in findings and side == sides["Fracture"]
        break_x, break_y = rng.uniform(0.42, 0.55), rng.uniform(-0.45, 0.1)
        near_break = broken * bump(np.hypot((lung.x - break_x) / 1.6, y - break_y), 0.17)
        step = 0.5 * anatomy.rib_spacing * near_break * np.tanh((lung.x - break_x) / 0.02)
        markings = anatomy.vessels * (1.25 if "Edema" in findings else 1.0) * vessel_tree(own, lung, y)
        density += lung.air * (0.20 - density + markings + anatomy.ribs * rib_cage(anatomy, lung, y, step))
        callus = bump(np.hypot(lung.x - break_x, y - break_y), 0.055)
        density += broken * (0.45 * callus + 0.10 * near_break * rib_cage(anatomy, lung, y, step)) * body

    draw_opacities(density, lungs, y, findings, sides, rng)

    grown = rng.uniform(1.50, 1.65) if "Cardiomegaly" in findings else rng.uniform(0.96, 1.04)
    wide, tall = anatomy.heart * grown, 0.36 * (1 + 0.35 * (grown - 1))
    heart_x, heart_y = 0.11 + 0.10 * (grown - 1), anatomy.diaphragm - 0.28 - 0.25 * (grown - 1)
    heart = inside(1 - np.hypot((x - heart_x) / wide, (y - heart_y) / tall), 0.04)
    wide = anatomy.mediastinum * (rng.uniform(2.0, 2.3) if "Enlarged Cardiomediastinum" in findings else 1.0)
    vessels = inside(wide * (1 - 0.25 * np.abs(y + 0.35)) - np.abs(x - 0.02), 0.03) * inside(heart_y - y, 0.05)
    knob = inside(0.09 - np.hypot(x - wide, y + 0.38), 0.02)
    shadow = np.maximum(np.maximum(heart, vessels), knob) * body * inside(y + 0.85, 0.05)
    density += shadow * np.maximum(anatomy.tissue - 0.04 - density, 0)

    draw_pleura(density, lungs, findings, sides, rng)

    vertebrae = 1 + 0.35 * np.sin(y * 38 + 6 * anatomy.rib_phase)
    density += body * 0.07 * bump(x, 0.085) * vertebrae
    for side in (-1, 1):
        clavicle = [(side * 0.10, -0.60), (side * 0.35, -0.70), (side * 0.75, -0.78)]
        density += body * 0.13 * polyline(x, y, clavicle, 0.035)
    density *= 1 - 0.25 * bump(np.hypot(x, y + 0.9), 0.12)
    if "Support Devices" in findings:
        draw_support_devices(density, x, y, sides["Support Devices"], rng)
    return to_picture(density, anatomy, rng)


def render_lateral(
    anatomy: Anatomy,
    findings: Collection[str],
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """A side view, there for the training scripts to leave out: only the heart and an effusion differ by findings."""
    x, y = grid(anatomy, size or (anatomy.height, anatomy.width))
    body = inside(0.72 - 0.12 * np.cos(2 * y) - np.abs(x), 0.02)
    density = body * (anatomy.tissue + 0.02 * cloud(rng, x.shape, 7))
    base = anatomy.diaphragm - 0.25 * np.cos(3 * x)
    air = inside(1 - np.hypot(x / 0.52, (y + 0.05) / 0.80), 0.03) * inside(base - y, 0.015)
    density += air * (0.26 - density)
    grown = 1.5 if "Cardiomegaly" in findings else 1.0
    density += 0.32 * inside(1 - np.hypot((x + 0.25) / (0.27 * grown), (y - 0.28) / 0.34), 0.06) * air
    if "Pleural Effusion" in findings:
        density += 0.35 * inside(y - 0.30 + 0.2 * x, 0.02) * inside(x, 0.1) * air
    vertebrae = 1 + 0.4 * np.sin(y * 30)
    density += body * 0.14 * bump(x - 0.42 - 0.08 * np.cos(2 * y), 0.08) * vertebrae
    density += 0.05 * air * rib_cage(anatomy, Lung(air, x, y, np.abs(x)), y, 0.0)
    return to_picture(density, anatomy, rng)


# ----------------------------------------------------------------------------------------------------------------------
# Labels
# ----------------------------------------------------------------------------------------------------------------------


def draw_findings(rng: np.random.Generator) -> set[str]:
    """What is truly there in one study."""
    if rng.uniform() < NORMAL_RATE:
        return {"No Finding"}
    if rng.uniform() < UNNAMED_RATE:
        return set()
    findings = set()
    while not findings:
        findings = {name for name, rate in PREVALENCE.items() if rng.uniform() < rate}
    if findings.intersection(OPACITIES):
        findings.add("Lung Opacity")
    return findings


def to_labels(findings: set[str], rng: np.random.Generator) -> dict[str, float | str]:
    """What the table says of it, with CheXpert's gaps: most negatives are blank, some findings uncertain."""
    labels = {}
    for name in LABELS:
        chance = rng.uniform()
        if name in findings:
            labels[name] = -1.0 if chance < UNCERTAIN_POSITIVES.get(name, 0.0) else 1.0
        elif name == "No Finding" or "No Finding" in findings:
            labels[name] = ""
        elif chance < UNCERTAIN_NEGATIVE_RATE:
            labels[name] = -1.0
        else:
            labels[name] = 0.0 if chance < UNCERTAIN_NEGATIVE_RATE + EXPLICIT_NEGATIVE_RATE else ""
    return labels


# ----------------------------------------------------------------------------------------------------------------------
# The data set
# ----------------------------------------------------------------------------------------------------------------------


def write_patient(folder: Path, patient: int, seed: int) -> list[dict[str, float | str]]:
    """Writes one patient's pictures below `folder` and returns their rows. Depends on nothing but seed and patient."""
    rng = np.random.default_rng([seed, patient])
    anatomy = random_anatomy(rng)
    person = {"Sex": str(rng.choice(["Female", "Male"])), "Age": int(rng.integers(20, 91))}
    rows = []
    for study in range(1, 1 + int(rng.choice((1, 2, 3), p=(0.35, 0.35, 0.30)))):
        findings = draw_findings(rng)
        labels = to_labels(findings, rng)
        projection = str(rng.choice(["AP", "PA"], p=(0.8, 0.2)))
        views = [("view1_frontal", "Frontal", projection, render)]
        if rng.uniform() < 0.15:
            views.append(("view2_lateral", "Lateral", "", render_lateral))
        for name, plane, projection, draw in views:
            path = Path("train", f"patient{patient:05d}", f"study{study}", f"{name}.jpg")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(anatomy, findings, rng)).save(folder / path, quality=92)
            location = {"Path": f"{DATASET_NAME}/{path.as_posix()}", "Frontal/Lateral": plane, "AP/PA": projection}
            rows.append(location | person | labels)
    return rows


def write_dataset(folder: Path, num_patients: int, seed: int) -> None:
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(functools.partial(write_patient, folder, seed=seed), range(1, num_patients + 1), chunksize=4)
        rows = [row for patient in tqdm(drawn, "phantoms", num_patients, unit="patient") for row in patient]
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help=f"folder that gets {DATASET_NAME}/")
    parser.add_argument("--num_patients", type=int, default=900, help="patients, of one to three studies each")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same pictures and table")
    args = parser.parse_args(argv)
    if args.num_patients < 1:
        parser.error(f"--num_patients is {args.num_patients}, but at least 1 is needed")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, but it may not be negative")
    return args


def main(args: argparse.Namespace) -> None:
    final = args.output_dir / DATASET_NAME
    recipe = {"num_patients": args.num_patients, "seed": args.seed}
    if final.exists():
        made_with = final / "made_with.json"
        if not made_with.is_file() or json.loads(made_with.read_text()) != recipe:
            sys.stderr.write(f"{final} holds something else than {recipe}: remove it or choose another --output_dir\n")
            sys.exit(2)
        print(f"{final} is complete already")
    else:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        # A stopped run must leave nothing that looks like a data set, so the folder gets its name when it is complete.
        with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".phantoms-") as partial:
            folder = Path(partial) / DATASET_NAME
            folder.mkdir()
            write_dataset(folder, args.num_patients, args.seed)
            (folder / "made_with.json").write_text(json.dumps(recipe) + "\n")
            folder.rename(final)
    print(final / "train.csv")


if __name__ == "__main__":
    main(parse_args())
