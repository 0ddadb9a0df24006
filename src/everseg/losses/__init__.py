"""everseg.losses."""
