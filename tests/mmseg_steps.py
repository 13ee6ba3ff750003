"""examples/head_mmsegmentation.py in a configuration of mmsegmentation: trained by the Runner for three steps, and resumed.

Run by test_examples.py: ``python mmseg_steps.py EXAMPLE FOLDER``.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CONFIGURATION = """
custom_imports = dict(imports=["head_mmsegmentation"])
default_scope = "mmseg"
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[127.5] * 3, std=[127.5] * 3, size=(64, 64), pad_val=0, seg_pad_val=255
    ),
    backbone=dict(type="ResNetV1c", depth=18, base_channels=16, strides=(1, 2, 1, 1), norm_cfg=dict(type="BN")),
    decode_head=dict(type="ProACFCNHead", in_channels=128, channels=16, in_index=3, num_classes=5),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
train_dataloader = dict(
    batch_size=2,
    sampler=dict(type="InfiniteSampler"),
    dataset=dict(
        type="BaseSegDataset",
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        metainfo=dict(classes=list("abcde")),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="RandomRotate", prob=1.0, degree=20),
            dict(type="PackSegInputs"),
        ],
    ),
)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.01))
train_cfg = dict(by_epoch=False, max_iters=3)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=1), checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3)
)
"""


def write_files(folder: Path) -> None:
    """Six images and masks of the classes 0 to 4."""
    for part, shape, values, suffix in ("images", (64, 64, 3), 256, "jpg"), ("masks", (64, 64), 5, "png"):
        (folder / part).mkdir()
        for index in range(6):
            picture = np.random.default_rng(index).integers(0, values, shape, np.uint8)
            Image.fromarray(picture).save(folder / part / f"{index}.{suffix}")


def main(example: str, folder: Path) -> None:
    from mmengine.config import Config
    from mmengine.runner import Runner

    sys.path.insert(0, str(Path(example).parent))
    write_files(folder)
    (folder / "configuration.py").write_text(CONFIGURATION)
    config = Config.fromfile(folder / "configuration.py")
    config.train_dataloader.dataset.data_root = str(folder)
    config.work_dir = str(folder / "work")

    from mmseg.utils import register_all_modules

    register_all_modules()
    runner = Runner.from_cfg(config)
    seen = []
    head = runner.model.decode_head
    head.proac.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    before = [parameter.clone() for parameter in head.projection.parameters()]
    runner.train()
    assert len(seen) == 3
    for features, labels in seen:
        assert features.shape[2:] == (8, 8) and labels.dtype == torch.int64 and labels.shape == (2, 64, 64)
        assert (labels == 255).any()  # the corners that rotation leaves
    assert all((old != new).any() for old, new in zip(before, head.projection.parameters(), strict=True))

    config.experiment_name, config.resume, config.train_cfg.max_iters = "resumed", True, 4
    try:
        Runner.from_cfg(config).train()
        raise SystemExit("a Runner resumes without help now: change docs/using/frameworks.md")
    except pickle.UnpicklingError as error:
        assert "weights_only" in str(error)
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # for files that one wrote oneself
    config.experiment_name = "resumed with help"
    resumed = Runner.from_cfg(config)
    resumed.load_or_resume()
    assert resumed.iter == 3
    torch.testing.assert_close(dict(resumed.model.state_dict()), dict(runner.model.state_dict()))
    resumed.train()
    assert resumed.iter == 4


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
