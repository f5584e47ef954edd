"""Training and evaluation of the classifier on ImageNet, or any images in class folders."""
