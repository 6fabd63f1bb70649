"""The round and the run, written once over a transport."""
