"""mmsegmentation: a decode head that adds ProAC, for mmengine's Runner. The three lines of ProAC are marked.

In a configuration file, read by ``Config.fromfile``, with this file on the Python path::

    custom_imports = dict(imports=["head_mmsegmentation"])
    model["decode_head"]["type"] = "ProACFCNHead"
"""

import importlib
import sys
from unittest.mock import MagicMock

if (
    importlib.util.find_spec("mmcv._ext") is None
):  # mmcv-lite: none of mmcv's compiled operators, which this head does not need
    sys.modules["mmcv._ext"] = MagicMock(__spec__=importlib.machinery.ModuleSpec("mmcv._ext", None))

from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS

from proac_cuda import ProACLoss, ProjectionHead  # 1


@MODELS.register_module()
class ProACFCNHead(FCNHead):
    """FCNHead, and ProAC on the last map that it takes; the base class may be any other decode head."""

    def __init__(self, *, proac_weight=0.1, embedding_dim=256, **options):
        super().__init__(**options)
        channels = self.in_channels if isinstance(self.in_channels, int) else self.in_channels[-1]
        self.proac_weight = proac_weight
        self.projection = ProjectionHead(channels, embedding_dim)
        self.proac = ProACLoss(self.num_classes, embedding_dim, ignore_index=self.ignore_index)  # 2

    def loss(self, inputs, batch_data_samples, train_cfg):
        losses = super().loss(inputs, batch_data_samples, train_cfg)
        features = self._transform_inputs(inputs)
        features = features[-1] if isinstance(features, (list, tuple)) else features
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)  # int64
        losses["loss_proac"] = self.proac_weight * self.proac(self.projection(features), labels)  # 3
        return losses
