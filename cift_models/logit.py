"""A multinomial logit by maximum a posteriori, for labels that overlap: what members make of few independent ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def fit_logit(x: F64, y: NDArray[np.integer], weight: float, mean: F64, precision: F64, offset: F64 | float = 0.0) -> F64:
    """The most probable coefficients (3, F + 1), the constant last, of softmax(offset + x @ slopes + constant).

    x (m, F), given classes y (m,) in 0..2, each of which counts `weight`. Coefficients are N(`mean` (3, F + 1), 1 / `precision` (F + 1,));
    `offset` (m, 3) is known.
    """
    from scipy.optimize import minimize

    rows, design = np.arange(len(y)), np.column_stack([x, np.ones(len(y))])
    hot = np.eye(3)[y]

    def loss(w: F64) -> tuple[float, F64]:
        apart = w.reshape(mean.shape) - mean
        z = design @ w.reshape(mean.shape).T + offset
        z -= z.max(1, keepdims=True)
        p = np.exp(z)
        total = p.sum(1)
        value = weight * float((np.log(total) - z[rows, y]).sum()) + 0.5 * float((precision * apart**2).sum())
        return value, (weight * ((p / total[:, None] - hot).T @ design) + precision * apart).ravel()

    found: F64 = minimize(loss, mean.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return found.reshape(mean.shape)
