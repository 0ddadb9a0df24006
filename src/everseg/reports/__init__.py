"""Results as pages, tables and text, and runs side by side."""
