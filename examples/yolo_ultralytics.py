"""ultralytics: semantic segmentation with YOLO26, a trainer class that adds ProAC. The three lines of ProAC are marked."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from ultralytics.models.yolo.semantic import SemanticSegmentationTrainer

from proac_cuda import ProACRegularizer  # 1

CLASSES = 5


class ProACTrainer(SemanticSegmentationTrainer):
    def get_model(self, *arguments, **options):
        model = super().get_model(*arguments, **options)
        channels = model.model[16].cv2.conv.out_channels
        self.proac = proac = ProACRegularizer(model, "model.16", self.data["nc"], in_channels=channels)  # 2

        def add_proac(model, inputs, output):
            if model.training and isinstance(inputs[0], dict):  # a batch, not images alone; the model gives its loss
                term = 0.1 * proac(inputs[0]["semantic_mask"])  # 3
                output = output[0] + len(inputs[0]["img"]) * term, output[1] | {"proac_loss": term.detach()}
            return output

        model.register_forward_hook(add_proac)
        return model

    def build_optimizer(self, *arguments, **options):
        optimizer = super().build_optimizer(*arguments, **options)
        optimizer.add_param_group({"params": list(self.proac.to(self.device).parameters())})
        return optimizer

    def save_model(self):  # without the hooks of the averaged copy, a checkpoint needs ultralytics alone
        self.ema.ema._forward_hooks.clear()
        self.ema.ema.model[16]._forward_hooks.clear()
        return super().save_model()


folder = Path(tempfile.mkdtemp())  # stands for your files: images, and masks of classes with 255 where there is none
for part, shape, values in ("images", (64, 64, 3), 256), ("masks", (64, 64), CLASSES):
    (folder / part).mkdir()
    for index in range(6):
        Image.fromarray(np.random.randint(0, values, shape, np.uint8)).save(folder / part / f"{index}.png")
data = folder / "data.yaml"
data.write_text(f"path: {folder}\ntrain: images\nval: images\nmasks_dir: masks\nnc: {CLASSES}\n")
options = {"epochs": 1, "imgsz": 64, "batch": 2, "nbs": 2, "workers": 0, "plots": False, "device": "cpu"}
ProACTrainer(overrides={"model": "yolo26n-sem.yaml", "data": str(data), **options}).train()
