"""The embedded benchmark: procedurally made clips with lettered questions."""
