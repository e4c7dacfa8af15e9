"""What all eviction methods share: the loop of one layer, which slots are pinned, and what may rank the others."""
