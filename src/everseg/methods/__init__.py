"""everseg.methods."""
