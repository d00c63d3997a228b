"""Quantization-aware training: fake quantization inserted, trained in plain PyTorch, frozen into Q/DQ."""
