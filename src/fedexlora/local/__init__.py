"""One client's work of one round."""
