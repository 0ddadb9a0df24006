"""everseg.data."""
