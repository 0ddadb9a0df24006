"""From a split of a data set to batches of one size: class index, samples, transforms, loader."""
