"""Runs and models on disk: folders that are whole and verified, journals, and the scores kept in them."""
