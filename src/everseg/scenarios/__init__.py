"""everseg.scenarios."""
