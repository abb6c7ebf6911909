"""The mathematics that several compressors share."""
