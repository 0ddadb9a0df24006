"""Every file of a data set looked at before training, and what is wrong with it."""
