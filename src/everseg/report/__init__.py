"""everseg.report."""
