"""Many runs: sweeps over methods, seeds and tasks, and their comparison (floor 6)."""

from everseg.many.comparison import compare
from everseg.many.sweeping import sweep

__all__ = ["compare", "sweep"]
