"""everseg.presets."""
