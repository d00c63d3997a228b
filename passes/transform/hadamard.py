"""Orthogonal matrices: Hadamard with random signs, uniformly random, and those that keep the vector of ones."""

from __future__ import annotations

import numpy as np


def hadamard(size: int) -> np.ndarray | None:
    """A Hadamard matrix (entries +-1, H H^T = size I), int8, or None where no construction here gives one.

    Sylvester's doubling of orders 1, 2 and those of Paley's first construction, q + 1 for primes q = 3 mod 4.
    """
    power = 1
    while size % power == 0:
        core = size // power
        base = np.ones((1, 1), np.int8) if core == 1 else _paley(core)
        if base is not None:
            while len(base) < size:
                base = np.block([[base, base], [base, -base]])
            return base
        power *= 2
    return None


def _paley(order: int) -> np.ndarray | None:
    q = order - 1
    if q < 3 or q % 4 != 3 or any(q % d == 0 for d in range(2, int(q**0.5) + 1)):
        return None
    squares = {x * x % q for x in range(1, q)}
    character = np.array([0] + [1 if x in squares else -1 for x in range(1, q)], np.int8)
    jacobsthal = character[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q]
    skew = np.zeros((order, order), np.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
    return np.eye(order, dtype=np.int8) + skew


def random_orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """Uniformly distributed (Haar) orthogonal matrix, float64."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diag(r)))


def random_hadamard(size: int, rng: np.random.Generator) -> np.ndarray:
    """Hadamard matrix over sqrt(size) with random signs of its rows, float64.

    Where no Hadamard matrix of the size is known here: the Kronecker product of the largest power of two's and a
    uniformly random orthogonal matrix of the rest.
    """
    made = hadamard(size)
    if made is None:
        power = size & -size
        rest = random_orthogonal(size // power, rng)
        small = hadamard(power)
        assert small is not None
        full = np.kron(small / np.sqrt(power), rest)
    else:
        full = made / np.sqrt(size)
    return np.asarray(rng.choice([-1.0, 1.0], size)[:, None] * full)


def keeping_ones(inner: np.ndarray) -> np.ndarray:
    """The rotation [n, n] that keeps the ones and acts as ``inner`` [n - 1, n - 1] on what is orthogonal to them."""
    n = len(inner) + 1
    basis = ones_basis(n)
    block = np.eye(n)
    block[1:, 1:] = inner
    return np.asarray(basis.T @ block @ basis)


def ones_basis(n: int) -> np.ndarray:
    """An orthogonal matrix whose first row is the ones over sqrt(n) (a Householder reflection)."""
    v = np.full(n, 1 / np.sqrt(n))
    v[0] -= 1.0
    return np.asarray(np.eye(n) - 2 * np.outer(v, v) / (v @ v))
