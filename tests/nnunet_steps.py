"""examples/trainer_nnunet.py within nnU-Net: a data set planned, preprocessed, trained, resumed; and read by plain nnU-Net.

Run by test_examples.py: ``python nnunet_steps.py EXAMPLE FOLDER``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

SHORT = """
from trainer_nnunet import nnUNetTrainerProAC


class ShortTrainer(nnUNetTrainerProAC):
    def __init__(self, plans, configuration, fold, dataset_json, device):  # nnU-Net looks its arguments up by name
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 3, 1
        self.seen = []

    def train_step(self, batch):
        self.seen.append(batch["target"])
        return super().train_step(batch)
"""


def write_data(raw: Path) -> None:
    """Five volumes of cubes of the classes 0, 1, 2 and of what is ignored, 3."""
    import nibabel
    import numpy as np

    for index in range(5):
        labels = np.random.default_rng(index).integers(0, 4, (4, 4, 4), np.uint8)
        labels = labels.repeat(8, 0).repeat(8, 1).repeat(8, 2)
        for part, values in (f"imagesTr/{index}_0000", labels.astype(np.float32)), (f"labelsTr/{index}", labels):
            (raw / part).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), raw / f"{part}.nii.gz")
    labels = {"background": 0, "one": 1, "two": 2, "ignore": 3}
    description = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))


def main(example: str, folder: Path) -> None:
    external = "nnUNet_extTrainer"
    os.environ |= {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    os.environ |= {external: str(folder / "external"), "nnUNet_n_proc_DA": "1"}
    write_data(folder / "raw" / "Dataset001_Cubes")
    (folder / "external").mkdir()
    shutil.copy(example, folder / "external")
    (folder / "external" / "short.py").write_text(SHORT)

    import torch
    from nnunetv2.experiment_planning import plan_and_preprocess_api as planning
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.set_num_threads(1)
    planning.extract_fingerprints([1], num_processes=1)
    planning.plan_experiments([1])
    planning.preprocess([1], configurations=["3d_fullres"], num_processes=[1])

    def trainer(name):
        return get_trainer_from_args("1", "3d_fullres", "all", name, device=torch.device("cpu"))

    ours = trainer("ShortTrainer")
    ours.initialize()
    before = [parameter.clone() for parameter in ours.proac.parameters()]
    ours.run_training()
    assert len(ours.seen) == 3
    for target in ours.seen:
        assert isinstance(target, list) and target[0].dtype == torch.int16 and target[0].shape[1:] == (1, 32, 32, 32)
        assert set(target[0].unique().tolist()) <= {0, 1, 2, 3} and (target[0] == 3).any()
    assert all((old != new).any() for old, new in zip(before, ours.proac.parameters(), strict=True))

    last = Path(ours.output_folder) / "checkpoint_final.pth"
    resumed = trainer("ShortTrainer")
    resumed.load_checkpoint(str(last))
    assert resumed.current_epoch == 1
    for module, other in (resumed.network, ours.network), (resumed.proac, ours.proac):
        torch.testing.assert_close(dict(module.state_dict()), dict(other.state_dict()))

    plain = trainer("nnUNetTrainer")
    plain.initialize()
    load_pretrained_weights(plain.network, last)

    checkpoint = torch.load(last, weights_only=False)
    checkpoint["trainer_name"] = "nnUNetTrainer"
    torch.save(checkpoint, last)
    del os.environ[external]
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(ours.output_folder_base, ("all",), last.name)
    torch.testing.assert_close(dict(predictor.network.state_dict()), dict(ours.network.state_dict()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
