"""Images: where they come from, how they are read and cropped, and how they are written."""
