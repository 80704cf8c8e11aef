"""Self-training: views of the images, their pseudo-labels at every step, and the Trainer that learns from them."""
