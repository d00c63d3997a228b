"""The line of the user's model that makes a call."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from types import FrameType

import torch

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@lru_cache(maxsize=4096)
def _is_users(path: str) -> bool:
    """Whether a source file lies outside torch and this package."""
    return not path.startswith((_TORCH_DIR, _HERE))


def user_frame() -> tuple[str, int, str] | None:
    """(file, line, function) of the innermost frame outside torch and this package."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None:
        code = frame.f_code
        if _is_users(code.co_filename):
            return code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back
    return None
