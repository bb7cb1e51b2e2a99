"""What pytest needs before it imports a test: the scripts on the path, and no more threads than help; and the order of the files."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# The longest first, so that the processes that share the files come to their end together.
LONGEST = ["test_study.py", "test_processes.py", "test_eval_downstream.py", "test_faults.py", "test_sample.py", "test_eval_generation.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
