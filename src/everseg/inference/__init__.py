"""Use of trained models: predictions, counts over test images, windows, choice of domain, pictures."""
