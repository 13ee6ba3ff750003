"""nnU-Net: a trainer class that adds ProAC, in two and three dimensions. The three lines of ProAC are marked.

Put this file into a folder of its own, and there::

    export nnUNet_extTrainer=THAT_FOLDER
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerProAC
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from proac_cuda import ProACRegularizer  # 1


class nnUNetTrainerProAC(nnUNetTrainer):
    def configure_optimizers(self):
        layer = f"decoder.stages.{len(self.network.decoder.stages) - 3}"  # the third finest, at stride 4
        channels = self.network.encoder.output_channels[2]
        classes, ignored = len(self.label_manager.all_labels), self.label_manager.ignore_label or 255
        self.proac = ProACRegularizer(self.network, layer, classes, in_channels=channels, ignore_index=ignored)  # 2
        optimizer, scheduler = super().configure_optimizers()
        optimizer.add_param_group({"params": self.proac.parameters()})
        if self.is_ddp:
            self.proac = torch.nn.parallel.DistributedDataParallel(self.proac)
        return optimizer, scheduler

    def _build_loss(self):
        base = super()._build_loss()

        def loss(output, target):  # of every deep supervision, the finest first: (B, 1, *spatial), int16
            if not self.network.training:
                return base(output, target)
            return base(output, target) + 0.1 * self.proac(target[0].squeeze(1))  # 3

        return loss

    def save_checkpoint(self, filename):
        super().save_checkpoint(filename)  # plain nnU-Net's keys alone; ProAC's go into a file beside it
        if self.local_rank == 0 and not self.disable_checkpointing:
            torch.save(self.proac.state_dict(), filename.replace("checkpoint_", "proac_"))

    def load_checkpoint(self, filename):
        super().load_checkpoint(filename)
        self.proac.load_state_dict(torch.load(filename.replace("checkpoint_", "proac_"), self.device))
