"""Fetching public data sets, and drawing masks from polygon annotations."""
