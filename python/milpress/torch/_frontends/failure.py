"""Why a frontend could not convert a module."""

from __future__ import annotations

from milpress.errors import UnsupportedError


class FrontendError(UnsupportedError):
    """One frontend can't convert a module; its text is a clause that says why.

    Parameters
    ----------
    text
        The clause.
    no_trace
        Why a trace would be another model than the module; empty where it may be tried.
    """

    def __init__(self, text: str, *, no_trace: str = "") -> None:
        super().__init__(text)
        self.no_trace = no_trace


def gist(error: BaseException) -> str:
    """Return what an error of another package says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]} ({type(error).__name__})" if lines else type(error).__name__
