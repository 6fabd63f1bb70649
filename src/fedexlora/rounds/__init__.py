"""The round and the run, whatever reaches the clients: recipe, rounds, versions, records."""
