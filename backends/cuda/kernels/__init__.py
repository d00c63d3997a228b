"""Triton kernels and their launchers. A module here imports triton, so the operators import it when they launch."""
