"""Adapters: one declarative registry of weight updates, inserted for training and merged into the weights again."""
