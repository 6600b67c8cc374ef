"""Plug-ins for adgrid: one for each shape that a method, a dataset or a backbone may have."""
