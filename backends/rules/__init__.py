"""Rules of `fl.check`: what a target makes of an ONNX file, as data that can be listed, run and tested."""

from .onnx_file import OnnxFile
from .rule import Rule, Where, markdown, run_rules

__all__ = ["OnnxFile", "Rule", "Where", "markdown", "run_rules"]
