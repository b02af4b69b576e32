"""Pre-activation residual networks at full speed: fused BN-ReLU-conv prefixes for PyTorch.

    model = torchvision.models.densenet121()
    report = preact.fuse_(model)  # in place; same parameters, same state_dict, same results
    print(report)
    preact.unfuse_(model)

``import preact`` loads no native library and asks no device; the first fused call does.
"""

from . import functional, models, ops
from .backends import use_backend
from .fold import FoldReport, fold_, unfold_
from .fuse import FusionReport, fuse_, unfuse_
from .memory import retain_freed_memory
from .modules import (
    BatchNormReLU2d,
    BatchNormReLUConv2d,
    IdentityAdd,
    PreActBasicBlock,
    PreActBottleneck,
    SyncBatchNormReLU2d,
    convert_sync_batchnorm,
)
from .plans import use_plan

__version__ = "0.1.0"

__all__ = [
    "BatchNormReLU2d",
    "BatchNormReLUConv2d",
    "FoldReport",
    "FusionReport",
    "IdentityAdd",
    "PreActBasicBlock",
    "PreActBottleneck",
    "SyncBatchNormReLU2d",
    "convert_sync_batchnorm",
    "fold_",
    "functional",
    "fuse_",
    "models",
    "ops",
    "retain_freed_memory",
    "unfold_",
    "unfuse_",
    "use_backend",
    "use_plan",
]
