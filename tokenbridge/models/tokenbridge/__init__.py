"""TokenBridge: a masked transformer whose head predicts a position's channel tokens one after another."""
