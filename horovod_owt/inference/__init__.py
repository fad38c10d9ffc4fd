"""What is done with a trained net: evaluate it, classify images, hand it on."""
