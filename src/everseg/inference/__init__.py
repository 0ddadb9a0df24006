"""Trained models at work: predictions, counts over test images, windows, choice of domain, pictures."""
