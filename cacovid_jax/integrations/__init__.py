"""Other frameworks that run this library."""
