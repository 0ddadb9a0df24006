"""Results as tables and text."""
