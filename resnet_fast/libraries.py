"""Model libraries beside torchvision whose ResNets are fused. None is needed, and none is imported for its own sake."""

import sys


def load() -> None:
    """Learn the blocks and networks of every known library that something has imported; a second call is free."""
    if "timm.models.resnet" in sys.modules:
        from . import timm_models  # noqa: F401 (which enters them into the tables)
