# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "pandas", "pillow", "scipy", "tqdm"]
# ///
"""Draw a chest phantom data set in CheXpert's layout, offline and in half a minute.

    python launch/demo/make_phantoms.py --output_dir data/phantoms
    python launch/demo/make_phantoms.py --output_dir data/phantoms --num_patients 100 --seed 1

Writes grayscale JPEGs to <output_dir>/CheXpert-phantom, and then train.csv. The images are caricatures of radiographs,
drawn so that a small classifier can see each finding. They have no medical use.
"""

import argparse
import functools
import itertools
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.special import expit
from tqdm.auto import tqdm

DATASET_NAME = "CheXpert-phantom"
LABELS = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,"
    "Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
).split(",")
# How often an abnormal study has each finding. Those that the demo trains and evaluates on are frequent; so is Lung
# Opacity, since others imply it.
PREVALENCE = {"Cardiomegaly": 0.29, "Edema": 0.19, "Pneumothorax": 0.24, "Pleural Effusion": 0.31}
PREVALENCE |= {"Enlarged Cardiomediastinum": 0.07, "Lung Opacity": 0.06, "Support Devices": 0.12}
PREVALENCE |= {"Lung Lesion": 0.04, "Consolidation": 0.04, "Pneumonia": 0.04, "Pleural Other": 0.04}
PREVALENCE |= {"Atelectasis": 0.05, "Fracture": 0.05}
# CheXpert's hierarchy: a study with one of these is also positive for Lung Opacity.
OPACITIES = ("Edema", "Consolidation", "Pneumonia", "Lung Lesion", "Atelectasis")
NORMAL_RATE = 0.21
UNNAMED_RATE = 0.02  # of abnormal studies whose findings are none of the 14 labels
# How often the table has -1 for findings that are present and absent, and 0 rather than a blank for absent ones.
SOMETIMES_UNCERTAIN = ("Cardiomegaly", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pleural Effusion")
UNCERTAIN_POSITIVE_RATE = 0.08
UNCERTAIN_NEGATIVE_RATE = 0.01
EXPLICIT_NEGATIVE_RATE = 0.12


# ---------------------------------------------------------------------------------------------------------------------
# Anatomy and drawing
# ---------------------------------------------------------------------------------------------------------------------


def random_anatomy(rng, spread=1.0):
    """Return what all studies of one patient share; `spread` scales the ranges. The image runs from -1 to 1."""

    def around(center, half_range):
        return center + spread * half_range * rng.uniform(-1, 1)

    return SimpleNamespace(
        width=int(rng.integers(136, 153)),  # pixels
        height=int(rng.integers(160, 177)),
        rotation=around(0, 0.05),  # radians
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


# Arrays (height, width): `air` is 1 inside the lung and 0 outside, `lateral` runs from 0 at the mediastinum to 1 at
# the ribs, `depth` from 0 at the apex to 1 at the diaphragm, and `x` points outwards on both sides.
Lung = namedtuple("Lung", "air lateral depth x")


def make_lung(anatomy, x, y, side, raised):
    """Return the Lung on the left (`side` -1) or right (1) of the image, its diaphragm raised by a length."""
    out = side * x
    # The liver lifts the right diaphragm, which is on the left of the image.
    base = anatomy.diaphragm - raised - (0.05 if side < 0 else 0.0)
    dome = base + anatomy.dome * (np.square((out - 0.36) / 0.36) - 0.5)
    depth = (y - anatomy.lung_top) / (base + 0.1 - anatomy.lung_top)
    inner = 0.10 + 0.06 * np.clip(depth, 0, 1)
    height = 1 - np.clip(depth, 0, 1)
    outer = inner + anatomy.lung_width * np.power(1 - np.power(height, 2.4), 0.55) * (1 + 0.08 * depth)
    edge = np.minimum(np.minimum(out - inner, outer - out), np.minimum(y - anatomy.lung_top, dome - y))
    lateral = (out - inner) / np.maximum(outer - inner, 0.05)
    return Lung(inside(edge, 0.012), lateral, depth, out)


def grid(anatomy, size=None):
    """Return the patient's x and y at every pixel, (height, width) each; `size` replaces the patient's own."""
    height, width = size or (anatomy.height, anatomy.width)
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    x, y = x.astype(np.float32), y.astype(np.float32)
    cos, sin = np.cos(anatomy.rotation), np.sin(anatomy.rotation)
    return cos * x + sin * y - anatomy.shift_x, cos * y - sin * x - anatomy.shift_y


def inside(distance, softness=0.015):
    """Return 1 where `distance` is positive and 0 where it is negative, with an antialiased edge."""
    return expit(distance / softness)


def bump(distance, width):
    """Return a Gaussian of the distance, 1 where it is 0."""
    return np.exp(-np.square(distance / width))


def cloud(rng, size, cells):
    """Return smooth noise of unit variance with about `cells` cells to a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


def polyline(x, y, points, width):
    """Return a soft line through some points."""
    nearest = np.full(x.shape, np.inf, x.dtype)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        along = np.clip(((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - x0 - along * (x1 - x0), y - y0 - along * (y1 - y0)))
    return bump(nearest, width)


def rib_cage(anatomy, lung, y, step):
    """Return back ribs, which fall outwards, and fainter front ribs, which rise; `step` displaces a broken rib."""
    curve = y - 0.30 * lung.x + 0.55 * np.square(lung.x - 0.28) - step
    phase = curve / anatomy.rib_spacing + anatomy.rib_phase
    back = bump(np.abs(phase - np.round(phase)), 0.19)
    phase = (y + 0.55 * lung.x) / (1.25 * anatomy.rib_spacing) + anatomy.rib_phase
    front = bump(np.abs(phase - np.round(phase)), 0.16) * inside(lung.x - 0.35, 0.06)
    return back + 0.35 * front


def vessel_tree(rng, lung, y):
    """Return bright spokes that leave the hilum and fade outwards."""
    from_x, from_y = lung.x - 0.13, y - 0.02
    radius, angle = np.hypot(from_x, from_y), np.arctan2(from_y, from_x)
    spokes = np.sort(rng.uniform(-1.9, 1.9, 12)).astype(np.float32)
    bent = angle + 0.25 * np.sin(5 * radius)
    after = np.clip(np.searchsorted(spokes, bent), 1, len(spokes) - 1)
    nearest = np.minimum(np.abs(bent - spokes[after - 1]), np.abs(bent - spokes[after]))
    return bump(nearest * radius, 0.022) * np.exp(-radius / 0.38) + 0.4 * bump(radius, 0.12)


def draw_opacities(density, lungs, y, findings, sides, rng):
    """Add what fills air spaces to `density`, in place; Lung Opacity without a cause is a hazy patch."""
    size = density.shape

    def distance_from(lung, lateral, depth):
        """Return the distance from a point in lung coordinates."""
        center = np.argmin(np.square(lung.lateral - lateral) + np.square(lung.depth - depth))
        return np.hypot(lung.x - lung.x.flat[center], y - y.flat[center])

    if "Lung Opacity" in findings and not findings.intersection(OPACITIES):
        lung = lungs[sides["Lung Opacity"]]
        radius = distance_from(lung, rng.uniform(0.4, 0.7), rng.uniform(0.35, 0.65))
        radius *= 1 + 0.12 * cloud(rng, size, 6)
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
        is_upper = rng.uniform() < 0.5
        lobe = inside(fissure - lung.depth if is_upper else lung.depth - fissure - 0.1, 0.015)
        density += 0.36 * lobe * (1 + 0.08 * cloud(rng, size, 14)) * lung.air
    if "Pneumonia" in findings:
        lung = lungs[sides["Pneumonia"]]
        lateral, depth = rng.uniform(0.35, 0.6), rng.uniform(0.4, 0.65)
        for _ in range(8):
            radius = distance_from(lung, lateral + rng.uniform(-0.3, 0.3), depth + rng.uniform(-0.2, 0.2))
            density += 0.22 * bump(radius, rng.uniform(0.045, 0.075)) * lung.air
    if "Atelectasis" in findings:
        lung = lungs[sides["Atelectasis"]]
        for start in rng.uniform(0.55, 0.62) + np.array((0.0, 0.13, 0.25)):
            slope = rng.uniform(-0.15, 0.1)
            band = bump(lung.depth - start - slope * lung.lateral, 0.022) * bump(lung.lateral - 0.5, 0.5)
            density += 0.32 * band * lung.air
    if "Lung Lesion" in findings:
        lung = lungs[sides["Lung Lesion"]]
        radius = distance_from(lung, rng.uniform(0.4, 0.7), rng.uniform(0.25, 0.6))
        density += 0.36 * inside(rng.uniform(0.08, 0.115) - radius, 0.012) * lung.air


def draw_mediastinum(density, anatomy, x, y, body, findings, rng):
    """Add heart, great vessels and aortic knob to `density`, in place."""
    grown = rng.uniform(1.50, 1.65) if "Cardiomegaly" in findings else rng.uniform(0.96, 1.04)
    heart_x, heart_y = 0.11 + 0.10 * (grown - 1), anatomy.diaphragm - 0.28 - 0.25 * (grown - 1)
    heart_width, heart_height = anatomy.heart * grown, 0.36 * (1 + 0.35 * (grown - 1))
    heart = inside(1 - np.hypot((x - heart_x) / heart_width, (y - heart_y) / heart_height), 0.04)
    width = anatomy.mediastinum * (rng.uniform(2.0, 2.3) if "Enlarged Cardiomediastinum" in findings else 1.0)
    vessels = inside(width * (1 - 0.25 * np.abs(y + 0.35)) - np.abs(x - 0.02), 0.03) * inside(heart_y - y, 0.05)
    knob = inside(0.09 - np.hypot(x - width, y + 0.38), 0.02)
    shadow = np.maximum(np.maximum(heart, vessels), knob) * body * inside(y + 0.85, 0.05)
    density += shadow * np.maximum(anatomy.tissue - 0.04 - density, 0)


def draw_pleura(density, lungs, findings, sides, rng):
    """Change `density` between lung and ribs, in place: scar, air or fluid."""
    if "Pleural Other" in findings:
        lung = lungs[sides["Pleural Other"]]
        thickness = 0.19 * (1 + 0.35 * np.sin(9 * lung.depth + rng.uniform(0, 6)))
        density += 0.42 * inside(lung.lateral - 1 + thickness, 0.02) * inside(lung.depth - 0.15, 0.03) * lung.air
    if "Pneumothorax" in findings:
        lung = lungs[sides["Pneumothorax"]]
        edge = rng.uniform(0.50, 0.62) + 0.55 * np.square(np.clip(lung.depth - 0.2, 0, 1))
        free_air = np.maximum(inside(lung.lateral - edge, 0.02), inside(0.13 - lung.depth, 0.015)) * lung.air
        line = bump(lung.lateral - edge, 0.045) * inside(lung.depth - 0.13, 0.015) * inside(0.97 - edge, 0.02)
        # Free air is black; the collapsed lung is denser, and a bright line bounds it.
        density += free_air * (0.05 - density) + 0.07 * (lung.air - free_air) + 0.34 * line * lung.air
    if "Pleural Effusion" in findings:
        both = rng.uniform() < 0.3
        for side, lung in lungs.items():
            if both or side == sides["Pleural Effusion"]:
                level = rng.uniform(0.62, 0.74) - 0.22 * np.power(np.clip(lung.lateral, 0, 1), 4)
                fluid = inside(lung.depth - level, 0.02) * np.minimum(6 * lung.air, 1)
                density += fluid * np.maximum(0.66 - density, 0)


def draw_support_devices(density, x, y, side, rng):
    """Add a tube in the airway and a pacemaker with its lead, or a central line, to `density`, in place."""
    tube = polyline(x, y, [(0.02, -1.1), (-0.01, -0.7), (0.01, rng.uniform(-0.4, -0.3))], 0.022)
    left, top = side * rng.uniform(0.50, 0.56), rng.uniform(-0.62, -0.54)
    line = [(left, top), (side * 0.3, -0.66), (side * 0.12, -0.45), (0.05, -0.1), (0.16, rng.uniform(0.3, 0.4))]
    density += 0.40 * np.maximum(tube, polyline(x, y, line, 0.020))
    if rng.uniform() < 0.7:
        box = np.maximum(np.abs(x - left) / 0.13, np.abs(y - top) / 0.10)
        density += 0.50 * inside(1 - box, 0.06)


def to_image(density, anatomy, rng):
    grain = gaussian_filter(rng.standard_normal(density.shape, dtype=np.float32), 0.6) * 1.8
    image = 0.5 + (density - 0.5) * anatomy.contrast + anatomy.noise * grain
    return np.round(255 * np.power(np.clip(image, 0, 1), anatomy.exposure)).astype(np.uint8)


def render_frontal(anatomy, findings, rng, size=None):
    """Return a frontal view of this patient with these findings, uint8 (height, width)."""
    x, y = grid(anatomy, size)
    texture_rng = np.random.default_rng(anatomy.texture_seed)  # the same texture in all studies of a patient
    sides = dict(zip(LABELS, rng.choice((-1, 1), len(LABELS)).tolist()))
    body = inside(0.24 + 0.70 * expit((y + 0.80) / 0.05) - np.abs(x), 0.02)
    density = body * (
        anatomy.tissue + 0.06 * inside(y - anatomy.diaphragm, 0.05) + 0.02 * cloud(texture_rng, x.shape, 7)
    )

    lungs = {}
    for side in (-1, 1):
        raised = 0.16 if "Atelectasis" in findings and side == sides["Atelectasis"] else 0.0
        lungs[side] = lung = make_lung(anatomy, x, y, side, raised)
        broken = "Fracture" in findings and side == sides["Fracture"]
        break_x, break_y = rng.uniform(0.42, 0.55), rng.uniform(-0.45, 0.1)
        near_break = broken * bump(np.hypot((lung.x - break_x) / 1.6, y - break_y), 0.17)
        ribs = rib_cage(anatomy, lung, y, 0.5 * anatomy.rib_spacing * near_break * np.tanh((lung.x - break_x) / 0.02))
        markings = anatomy.vessels * (1.25 if "Edema" in findings else 1.0) * vessel_tree(texture_rng, lung, y)
        density += lung.air * (0.20 - density + markings + anatomy.ribs * ribs)
        callus = bump(np.hypot(lung.x - break_x, y - break_y), 0.055)
        density += broken * (0.45 * callus + 0.10 * near_break * ribs) * body
    draw_opacities(density, lungs, y, findings, sides, rng)
    draw_mediastinum(density, anatomy, x, y, body, findings, rng)
    draw_pleura(density, lungs, findings, sides, rng)

    vertebrae = 1 + 0.35 * np.sin(y * 38 + 6 * anatomy.rib_phase)
    density += body * 0.07 * bump(x, 0.085) * vertebrae
    for side in (-1, 1):
        clavicle = [(side * 0.10, -0.60), (side * 0.35, -0.70), (side * 0.75, -0.78)]
        density += body * 0.13 * polyline(x, y, clavicle, 0.035)
    density *= 1 - 0.25 * bump(np.hypot(x, y + 0.9), 0.12)  # trachea
    if "Support Devices" in findings:
        draw_support_devices(density, x, y, sides["Support Devices"], rng)
    return to_image(density, anatomy, rng)


def render_lateral(anatomy, findings, rng):
    """Return a lateral view, which shows only heart and effusion; the training scripts should leave it out."""
    x, y = grid(anatomy)
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
    return to_image(density, anatomy, rng)


# ---------------------------------------------------------------------------------------------------------------------
# Labels and files
# ---------------------------------------------------------------------------------------------------------------------


def draw_findings(rng):
    """Return the findings that one study shows, {"No Finding"} for a normal one."""
    if rng.uniform() < NORMAL_RATE:
        return {"No Finding"}
    if rng.uniform() < UNNAMED_RATE:
        return set()
    findings = set()
    while not findings:
        findings = {name for name in LABELS[1:] if rng.uniform() < PREVALENCE[name]}
    return findings | {"Lung Opacity"} if findings.intersection(OPACITIES) else findings


def to_labels(findings, rng):
    """Return the study's label columns. As in CheXpert most negatives are blank and some findings uncertain."""
    labels = {}
    for name in LABELS:
        chance = rng.uniform()
        if name in findings:
            labels[name] = -1.0 if name in SOMETIMES_UNCERTAIN and chance < UNCERTAIN_POSITIVE_RATE else 1.0
        elif name == "No Finding" or "No Finding" in findings:
            labels[name] = ""
        elif chance < UNCERTAIN_NEGATIVE_RATE:
            labels[name] = -1.0
        else:
            labels[name] = 0.0 if chance < UNCERTAIN_NEGATIVE_RATE + EXPLICIT_NEGATIVE_RATE else ""
    return labels


def write_patient(folder, patient, seed):
    """Write one patient's images and return their rows, which depend on seed and patient only."""
    rng = np.random.default_rng([seed, patient])
    anatomy = random_anatomy(rng)
    person = {"Sex": str(rng.choice(["Female", "Male"])), "Age": int(rng.integers(20, 91))}
    rows = []
    for study in range(1, 1 + int(rng.choice((1, 2, 3), p=(0.35, 0.35, 0.30)))):
        findings = draw_findings(rng)
        labels = to_labels(findings, rng)
        views = [("view1_frontal", "Frontal", str(rng.choice(["AP", "PA"], p=(0.8, 0.2))), render_frontal)]
        if rng.uniform() < 0.15:
            views.append(("view2_lateral", "Lateral", "", render_lateral))
        for name, plane, projection, render in views:
            path = Path("train", f"patient{patient:05d}", f"study{study}", f"{name}.jpg")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(anatomy, findings, rng)).save(folder / path, quality=92)
            view = {"Frontal/Lateral": plane, "AP/PA": projection}
            rows.append({"Path": f"{DATASET_NAME}/{path.as_posix()}"} | person | view | labels)
    return rows


def parse_args(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]", formatter_class=formatter)
    flag = parser.add_argument
    flag("--output_dir", type=Path, required=True, help=f"folder to write {DATASET_NAME}/ to")
    flag("--num_patients", type=int, default=900, help="patients, with one to three studies each")
    flag("--seed", type=int, default=0, help="the same seed gives the same images and table")
    return parser.parse_args(argv)


def main(args):
    folder = args.output_dir / DATASET_NAME
    table, temporary = folder / "train.csv", folder / ".train.csv.tmp"
    table.unlink(missing_ok=True)  # it may be that of other images
    write = functools.partial(write_patient, folder, seed=args.seed)
    with ProcessPoolExecutor() as pool:
        patients = pool.map(write, range(1, args.num_patients + 1), chunksize=4)
        rows = [row for patient in tqdm(patients, "phantoms", args.num_patients) for row in patient]
    pd.DataFrame(rows).to_csv(temporary, index=False, lineterminator="\n")
    temporary.replace(table)
    print(table)


if __name__ == "__main__":
    main(parse_args())
