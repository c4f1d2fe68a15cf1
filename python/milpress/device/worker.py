"""What runs in the process that holds a model: requests in, answers out, one JSON line each."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from milpress.device.drivers import Driver, create


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
    serve(create(sys.argv[1], json.loads(sys.argv[2])))
