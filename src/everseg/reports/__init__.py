"""Results as tables and text (floor 6)."""
