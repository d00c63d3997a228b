"""Recovery without training: closed-form correction of what pruning left."""

from .recover_pass import Recover, recover_graph
from .synthetic import synthetic_inputs

__all__ = ["Recover", "recover_graph", "synthetic_inputs"]
