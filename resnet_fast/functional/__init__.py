"""Stateless fused functions; every argument is validated here (by `arguments`), and nothing below checks again.

They have PyTorch's own meaning: with batch statistics the running ones are updated in place. They are differentiable
(twice, too), autocast-aware and traceable by torch.compile and torch.export. Where a fused op has no meaning to the
caller (TorchScript and ONNX tracing, torch.func transforms, forward-mode AD, empty batches) the same arithmetic runs as
plain PyTorch.
"""

from .conv_bn_act import ConvBn, bn_act, conv_bn_act, conv_bn_shortcut_act
from .residual_block import residual_block, stem

__all__ = ["ConvBn", "bn_act", "conv_bn_act", "conv_bn_shortcut_act", "residual_block", "stem"]
