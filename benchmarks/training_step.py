"""The share of the loss in a training step of the demo, measured in a process of its own, set up as the demo's is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.05  # the share that is aimed at


def measure(steps: int, device: str, threads: int) -> dict[str, Any]:
    """Medians over the steps; {"reason": ...} where the demo's data are not installed."""
    command = [sys.executable, "-m", "benchmarks.training_step", str(steps), device, str(threads)]
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as the demo sets it
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"reason": last}
    return json.loads(done.stdout.splitlines()[-1])


def _main() -> None:
    import torch

    from .segmentation.climate import load_climate
    from .segmentation.train import TrainConfig, Training
    from .timing import Spread

    steps, device, threads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    config = TrainConfig(proac_weight=0.5, device=device)
    data = load_climate()
    training = Training(config, data)
    records = [training.step() for _ in range(steps + 2)]
    records = records[2:]  # the first ones fetch memory
    result = {
        "steps": steps,
        "batch": [config.batch_size, 3, *config.crop],
        "classes": len(data.train.class_names),
        "channels": config.embedding_dim,
        "step_ms": Spread.of([1e3 * r.seconds for r in records]),
        "cross_entropy_ms": Spread.of([1e3 * r.cross_entropy_seconds for r in records]),
        "proac_ms": Spread.of([1e3 * r.proac_seconds for r in records]),
        "share": Spread.of([r.proac_seconds / r.seconds for r in records]),
        "limit": LIMIT,
    }
    print(json.dumps({name: v._asdict() if isinstance(v, Spread) else v for name, v in result.items()}))


if __name__ == "__main__":
    _main()
