"""mmsegmentation 1.x: a decode head that adds ProAC to its losses. UNTESTED in training.

mmsegmentation needs the compiled ops of mmcv, of which there is no build for the PyTorch that this package needs. The head
alone was run once, with mmsegmentation 1.2.2 and those ops left out. In a configuration:
``custom_imports = dict(imports=["head_mmsegmentation"])``, and ``type="ProACFCNHead"`` instead of ``type="FCNHead"``.
"""

from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS

from proac_cuda import ProACLoss, ProjectionHead


@MODELS.register_module()
class ProACFCNHead(FCNHead):
    """FCNHead with the ProAC loss on the backbone's map; the base class may be any other decode head."""

    def __init__(self, *args, proac_weight=0.1, embedding_dim=256, **kwargs):
        super().__init__(*args, **kwargs)
        channels = self.in_channels[-1] if isinstance(self.in_channels, (list, tuple)) else self.in_channels
        self.proac_weight = proac_weight
        self.projection = ProjectionHead(channels, embedding_dim)
        self.proac = ProACLoss(self.num_classes, embedding_dim, ignore_index=self.ignore_index)

    def loss(self, inputs, batch_data_samples, train_cfg):
        losses = super().loss(inputs, batch_data_samples, train_cfg)
        features = self._transform_inputs(inputs)
        features = features[-1] if isinstance(features, (list, tuple)) else features
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        losses["loss_proac"] = self.proac_weight * self.proac(self.projection(features), labels)
        return losses
