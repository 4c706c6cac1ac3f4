"""TokenBridge: a masked transformer with a head that predicts the tokens of a position channel by channel."""
