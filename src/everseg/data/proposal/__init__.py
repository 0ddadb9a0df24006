"""What lies in a folder, and the data.yaml proposed for it."""
