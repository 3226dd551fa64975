"""Bilinear transforms of fast convolutions, in exact arithmetic and as straight-line code."""
