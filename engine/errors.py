"""What can be wrong with a request, said so that whoever passes it on need not read the words."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be done as it is.

    Args:
        message: What is wrong and what would be right.
        field: Whose value it is: "prompt", or a field of SamplingParams.
    """

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class ContextLengthError(RequestError):
    """A prompt that is too long for the model's context together with the tokens that are to follow it."""

    def __init__(self, message: str, field: str = "prompt") -> None:
        super().__init__(message, field)
