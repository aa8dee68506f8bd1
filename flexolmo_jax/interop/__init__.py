"""Models in the formats of other projects."""
