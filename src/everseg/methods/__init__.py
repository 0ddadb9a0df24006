"""Methods: what is learnt from a batch and what is kept from the teacher."""
