"""Published weights: where files are found, how they are verified, read and renamed."""
