"""Codes chosen column by column, the error of each taken up by those that follow: GPTQ for every format.

"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; for groups of columns under one
code as in "GPTVQ: The Blessing of Dimensionality for LLM Quantization".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ....graph.errors import ConstraintError
from .layout import Layout

CHUNK = 128
"""Columns whose updates are applied to the rest at once, for formats without blocks."""


def inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """Upper factor U with ``U^T U = (G + d I)^-1``, float64; d is ``damping`` times the mean of G's diagonal.

    Raises:
        ConstraintError: G is not the Gram matrix of finite inputs.
    """
    gram = np.array(gram, np.float64)
    diagonal = np.einsum("ii->i", gram)
    if not np.isfinite(gram).all():
        raise ConstraintError("the inputs of this weight are not finite", found="NaN or infinity in their Gram matrix")
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    diagonal += damping * float(diagonal.mean())
    lower = np.linalg.cholesky(gram)
    inverse = np.linalg.inv(lower)
    inverse = inverse.T @ inverse
    return np.ascontiguousarray(np.linalg.cholesky(inverse).T)


def compensated(fmt: Any, weight: np.ndarray, axis: int, gram: np.ndarray, *, damping: float = 0.01) -> Any:
    """A weight in a format, with the output error ``|| X (W - Q)^T ||`` driven down column by column.

    Scales of a block are chosen when its first column comes up, from the weights as updated by then; what a format
    learns from the whole tensor (codebook, exponent) is found before, weighted by the diagonal of the Gram matrix.

    Args:
        fmt: a format.
        weight: float array.
        axis: output-channel axis.
        gram: X^T X of the inputs, [columns, columns].
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        The encoded weight. Inputs that were never active leave their columns rounded to the nearest.
    """
    layout = Layout(weight.shape, axis)
    matrix = layout.matrix(weight).astype(np.float64)
    if gram.shape != (layout.columns, layout.columns):
        raise ConstraintError("the Gram matrix does not fit the weight", expected=layout.columns, found=gram.shape)
    importance = np.maximum(np.einsum("ii->i", np.asarray(gram, np.float64)), 0)
    factor = inverse_factor(gram, damping)
    ready = fmt.prepared(layout.matrix(weight), importance)
    whole = None if fmt.block else ready.fit_matrix(layout.matrix(weight), layout, importance)
    step = 1 if whole is None else whole.step
    width = fmt.block or -(-CHUNK // step) * step
    parts = []
    for start in range(0, layout.columns, width):
        stop = min(start + width, layout.columns)
        part = whole
        if part is None:
            part = ready.fit_matrix(
                matrix[:, start:stop].astype(np.float32), Layout((layout.rows, stop - start)), importance[start:stop]
            )
        step = part.step
        offset = start if whole is not None else 0
        codes, errors = [], np.empty((layout.rows, stop - start))
        for j in range(start, stop, step):
            columns = matrix[:, j : j + step]
            code = part.nearest(columns.astype(np.float32), j - start + offset)
            values = part.values(code, j - start + offset)
            codes.append(code)
            for k in range(step):
                error = (matrix[:, j + k] - values[:, k]) / factor[j + k, j + k]
                matrix[:, j + k + 1 : stop] -= np.outer(error, factor[j + k, j + k + 1 : stop])
                errors[:, j + k - start] = error
        matrix[:, stop:] -= errors @ factor[start:stop, stop:]
        parts.append(part.with_codes(np.concatenate(codes, axis=1)))
    if whole is not None:
        return whole.with_codes(np.concatenate([p.codes for p in parts], axis=1))
    return ready.join(parts, layout)
