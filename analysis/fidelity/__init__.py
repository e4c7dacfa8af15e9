"""How far the answers of a compressed cache are from the full cache's: numbers of a sample, panels of cells, labels."""
