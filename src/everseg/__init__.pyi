"""What type checkers and editors read of `everseg`: the names of `_LAZY`, imported at once; a test compares the two."""

from collections.abc import Mapping
from typing import Any

from everseg import data as data
from everseg import interop as interop
from everseg import losses as losses
from everseg import metrics as metrics
from everseg import scenarios as scenarios
from everseg.api import Run as Run
from everseg.api import demo as demo
from everseg.api import features as features
from everseg.api import load as load
from everseg.api import report as report
from everseg.api import run as run
from everseg.deploy.adopt import adopt as adopt
from everseg.deploy.bench import bench as bench
from everseg.deploy.browser import page as page
from everseg.deploy.diff import diff as diff
from everseg.deploy.export import export as export
from everseg.deploy.extend import extend as extend
from everseg.deploy.extend import preview as preview
from everseg.deploy.history import history as history
from everseg.deploy.history import rollback as rollback
from everseg.deploy.hub import pull as pull
from everseg.deploy.hub import push as push
from everseg.deploy.serve import serve as serve
from everseg.deploy.sign import sign as sign
from everseg.deploy.sign import verify as verify
from everseg.engine.rescore import evaluate as evaluate
from everseg.inference.predict import predict as predict
from everseg.labels import LabelPolicy as LabelPolicy
from everseg.labels import LabelSpace as LabelSpace
from everseg.methods.base import Method as Method
from everseg.reports.compare.comparison import compare as compare
from everseg.reports.installation import env as env
from everseg.reports.outline import show as show
from everseg.sweeps.sweep import sweep as sweep

__version__: str
__all__: list[str]
_LAZY: dict[str, str]

def lazy_attribute(module: str, addresses: Mapping[str, str], name: str) -> Any: ...
