"""Reparameterizations: weights as functions of other tensors, inserted for training and evaluated away afterwards."""
