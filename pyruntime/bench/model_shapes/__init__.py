"""Dimensions of published models, one JSON file each; `pyruntime.bench.shapes` reads them."""
