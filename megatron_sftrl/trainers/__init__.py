"""Loops that fit a screen: what happens in which order, with everything else named and elsewhere."""
