"""Uses of a trained model: evaluate it, classify images, export it."""
