"""The audit: every published claim beside what was measured, with a verdict and its evidence."""
