"""everseg.metrics."""
