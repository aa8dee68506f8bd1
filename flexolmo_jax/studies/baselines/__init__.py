"""FlexOlmo compared with every baseline, on the same texts, over several seeds."""
