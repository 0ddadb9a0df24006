"""everseg.models."""
