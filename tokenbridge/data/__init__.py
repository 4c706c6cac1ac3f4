"""Images: reading, cropping and encoding them, and writing them as pictures."""
