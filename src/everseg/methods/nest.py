"""New classifier pre-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from everseg.methods.mib import MiB


@dataclass(kw_only=True)
class NeST(MiB):
    """MiB whose new classifiers start as mixtures of the old ones, learnt before each step.

    The pre-tuning works with any method: `method.pretune=5` beside another method's name.

    Source: Xie et al., "Early Preparation Pays Off: New Classifier Pre-tuning for Class Incremental Semantic
    Segmentation", ECCV 2024.
    """

    pretune: Annotated[int, Field(ge=0)] = 5
    """Epochs of pre-tuning before each step that adds classes to old ones (paper's code: 5 on VOC, 15 on ADE): new
    classifiers start as learnt mixtures of the old ones. 0 = none, which is MiB."""
