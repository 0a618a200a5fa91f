"""The package's logger: every fallback is said once, with its reason. RESNET_FAST_LOG sets the level."""

import logging
import os

logger = logging.getLogger("resnet_fast")
_level = (os.environ.get("RESNET_FAST_LOG") or "WARNING").upper()
if _level not in logging.getLevelNamesMapping():
    logger.warning("RESNET_FAST_LOG=%r is unknown; valid: %s", _level, ", ".join(logging.getLevelNamesMapping()))
    _level = "WARNING"
logger.setLevel(_level)

_said: set[str] = set()


def once(message: str, level: int = logging.WARNING) -> None:
    """Log `message` the first time this process meets it."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def said() -> tuple[str, ...]:
    """Everything `once` has said so far, for `resnet-fast info` and the tests."""
    return tuple(sorted(_said))


def forget() -> None:
    """Let every message be said again."""
    _said.clear()
