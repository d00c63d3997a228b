"""Adapters: one declarative registry of weight updates, inserted for training and merged into the weights again."""

from .adapter import Adapter, Entry
from .insert import InsertAdapter, insert_adapter
from .kinds import AdapterKind, Geometry, NotFoldable, Start, kind_of, kinds, register
from .merge import MergeAdapter, MergeResult, merge_adapter, unmerge_adapter
from .view import View

__all__ = [
    "Adapter",
    "AdapterKind",
    "Entry",
    "Geometry",
    "InsertAdapter",
    "MergeAdapter",
    "MergeResult",
    "NotFoldable",
    "Start",
    "View",
    "insert_adapter",
    "kind_of",
    "kinds",
    "merge_adapter",
    "register",
    "unmerge_adapter",
]
