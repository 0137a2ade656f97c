"""Times of the losses and of training steps."""
