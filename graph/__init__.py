"""What a model is: one graph view over torch.export and ONNX, operator semantics, axis groups. Knows no pass."""
