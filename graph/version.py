"""The version of foldline; pyproject.toml repeats it, and a test holds the two together."""

VERSION = "0.1.0"
