"""Pictures of records: this package reads records and nothing else."""
