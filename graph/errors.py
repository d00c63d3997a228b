"""The errors foldline raises: each names the node, the value, what was expected, what was found and the way out."""

from __future__ import annotations


class FoldlineError(Exception):
    """Base of every error that foldline raises on purpose.

    Args:
        message: what went wrong, in one sentence.
        node: name of the node (or weight, file, configuration key) concerned.
        value: the offending value, printed with ``repr``-like brevity.
        expected: what would have been accepted.
        found: what was there instead.
        hint: the way out, as an instruction to the user.

    Attributes:
        pass_name: the pass that was running, where one was ("prune (2 of 4)"); the pipeline sets it.
    """

    pass_name: str | None = None

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        value: object = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.node = node
        self.value = value
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self._render())

    def _render(self) -> str:
        lines = [self.message]
        for label, item in (
            ("pass", self.pass_name),
            ("node", self.node),
            ("value", self.value),
            ("expected", self.expected),
            ("found", self.found),
            ("try", self.hint),
        ):
            if item is not None:
                lines.append(f"  {label}: {item}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self._render()


class TraceError(FoldlineError):
    """A model could not be captured as a graph; names the line of the user's model and what to try."""


class UnsupportedOp(FoldlineError):
    """An operator has no rule and the requested action cannot go round it."""


class ConstraintError(FoldlineError):
    """What was asked cannot be done to this model: a ratio, target, pattern, plan or pass order is impossible."""


class VerificationError(FoldlineError):
    """Two models that must agree do not; names the first diverging value."""


class ConfigError(FoldlineError):
    """A pipeline file or an argument is invalid; names the key and the nearest valid one."""


class BackendError(FoldlineError):
    """A backend refused or failed; names the target and what it said."""


class ModelFileError(FoldlineError):
    """A model file is missing, truncated, or not what its name says."""
