"""Examine a folder of images and masks, and propose a data.yaml for it."""
