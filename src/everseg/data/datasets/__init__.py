"""everseg.data.datasets."""
