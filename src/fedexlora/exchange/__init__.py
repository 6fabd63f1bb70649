"""What travels between server and clients, and what is written down: typed, checked, in bytes."""
