"""Silence for torch's tracer: what it logs while an attempt fails is noise once the error is told in one message."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Within: nothing is logged, warned about or printed to stderr by this process.

    Process-wide, since torch makes loggers and handlers of its own while it traces.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
