"""A run on disk: its directory, its metrics, what a person sees of it."""
