"""A whole model: calibrate, walk, compress, save."""
