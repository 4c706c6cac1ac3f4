"""A fifth system from outside the package: every latent is a Gaussian of its own, given the class."""
