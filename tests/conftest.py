"""Put the scripts on the path, keep threads from competing, and leave slow tests to --slow."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The longest files first, so that the two workers finish together.
LONGEST = ["test_study.py", "test_processes.py", "test_eval_downstream.py", "test_faults.py", "test_sample.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--slow", action="store_true", help="also run long kills, all rows on two processes, the full study"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; only run with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
