"""everseg.interop."""
