"""Work on a data set ahead of training: filters, features, TFDS."""
