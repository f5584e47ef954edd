"""What training on Lightning needs in segmentation and classification alike."""
