"""Process that holds a model: requests in, answers out, one JSON line each."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from milpress.device.drivers import Driver, create

# What coremltools would load if it is installed, and predicting does not need. It takes seconds and
# 250 MB in each of the processes that are alive at a time.
_LEFT_OUT = {"coreml": ("torch", "sklearn"), "iphone": ("torch", "sklearn")}


def leave_out(driver: str) -> None:
    """Keep a driver's process free of packages that it has no use for."""
    for name in _LEFT_OUT.get(driver, ()):
        # The import system's own way to say that there is no such module.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def serve(driver: Driver) -> None:
    """Answer requests on a driver until there are no more.

    A request is ``{"command": ..., "arguments": {...}}``; an error is answered with its text.
    """
    # Compilers print to the standard output, which is the answers': they get another.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_answer(driver, request["command"], request["arguments"])) + "\n")
        answers.flush()


def _answer(driver: Driver, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        reply: dict[str, Any] = getattr(driver, command)(**arguments)
    # Core ML's errors have no type of their own; whatever it is, the harness wants to hear it.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return reply


if __name__ == "__main__":
    leave_out(sys.argv[1])
    serve(create(sys.argv[1], json.loads(sys.argv[2])))
