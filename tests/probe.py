"""Run by `accelerate launch`: trains rows as users do and writes down what each process saw and ended with."""

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator
from common import arguments, script_of
from safetensors.torch import save_file

output_dir, csv, batch_size, accumulation, *rows = sys.argv[1:]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# The rows share one process group.
Accelerator.end_training = lambda self: None

for row in rows:
    script = script_of(row)
    rank = int(os.environ.get("RANK", 0))
    folder = Path(output_dir) / row
    seen = []

    def recorded(self, n, original=script.SampleStream.__getitem__, seen=seen):
        sample = original(self, n)
        if not self.heldout:
            seen.append([n, str(self.images[self.index(n)]), sample["noise"][0, 0, 0].item(), int(sample["timesteps"])])
        return sample

    def checked(parameters, original=script.check_replicas, folder=folder, rank=rank):
        original(parameters)
        save_file({name: p.detach().clone().contiguous() for name, p in parameters.items()}, folder / f"rank-{rank}.safetensors")

    script.SampleStream.__getitem__, getitem = recorded, script.SampleStream.__getitem__
    script.check_replicas, check_replicas = checked, script.check_replicas
    layout = [f"--train_batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
    flags = [*layout, "--max_train_samples=12", "--caption_dropout=0.5"]
    script.main(script.parse_args(arguments(row, folder, *flags, csv=Path(csv), steps=3)))
    script.SampleStream.__getitem__, script.check_replicas = getitem, check_replicas
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
