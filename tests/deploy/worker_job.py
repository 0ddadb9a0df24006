"""A job for the processes of `serve --workers` that needs no PyTorch, so that they start at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from everseg.deploy.http_server import RefusedError


def numbered(first: int) -> Callable[[str], int]:
    """A job: what is asked says what happens."""

    def answer(word: str) -> int:
        if word == "refuse":
            raise RefusedError(413, "too large")
        if word == "fail":
            raise ValueError(word)
        if word == "hang":
            time.sleep(60)
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return first + len(word)

    return answer
