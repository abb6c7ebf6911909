"""Systems that stand beside CaCoVID, each small, trainable and compared."""
