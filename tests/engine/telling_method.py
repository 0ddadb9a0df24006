"""MiB that says on stderr what the weights of student and teacher are while it trains."""

from __future__ import annotations

import os
from dataclasses import dataclass

from everseg.methods.mib import MiB


@dataclass(kw_only=True)
class Telling(MiB):
    def losses(self, batch, ctx):
        encoders = [one.encoder for one in (ctx.module, ctx.teacher, ctx.folded_teacher) if one is not None]
        for kind in {type(weight.data).__name__ for one in encoders for weight in one.parameters()}:
            os.write(2, f"{kind}\n".encode())
        yield from super().losses(batch, ctx)
