"""Image data sets, each prepared once as a memory-mapped bank of images that reading needs no other package for."""
