"""Images and masks: readers, class index, transforms, batches, checks and downloads."""
