"""The image engine: text to image and image to image, every picture with its own mixture of adapters in one batch."""
