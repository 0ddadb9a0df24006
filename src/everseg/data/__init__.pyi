"""What type checkers and editors read of `everseg.data`, as `everseg/__init__.pyi`."""

from everseg.data.verbs import check as check
from everseg.data.verbs import download as download
from everseg.data.verbs import init as init
from everseg.data.verbs import prepare as prepare
from everseg.data.verbs import saliency as saliency
from everseg.data.verbs import weights as weights

__all__: list[str]
_LAZY: dict[str, str]
