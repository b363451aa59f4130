"""The hot operations, one folder each: api, reference, a file per backend."""
