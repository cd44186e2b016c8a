"""Selections, masks and measurements as pictures: in a notebook, as figures, as one HTML page."""
