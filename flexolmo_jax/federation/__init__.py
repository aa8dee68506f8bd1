"""Packages of anchors and experts on disk: written, checked, merged, loaded."""
